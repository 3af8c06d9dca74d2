"""The batches that a training sees, as its settings have them."""

from __future__ import annotations

from collections.abc import Generator

from jobs.config import TrainConfig
from pipelines.augment import Augmentation
from pipelines.dataset import ShardDataset
from pipelines.loader import Batch, batches
from pipelines.proposals import ProposalDataset


def training_stream(
    config: TrainConfig,
    data: ShardDataset,
    *,
    rank: int = 0,
    world_size: int = 1,
    start_images: int = 0,
    pin_memory: bool = False,
    proposals: ProposalDataset | None = None,
) -> Generator[Batch]:
    """A worker's share of the batches of a training, from a place in the order of images on."""
    yield from batches(
        data,
        seed=config.seed,
        global_batch=config.global_batch,
        rank=rank,
        world_size=world_size,
        images_at_once=config.images_at_once,
        start_images=start_images,
        aspect_groups=config.aspect_groups,
        augmentation=augmentation_of(config),
        pin_memory=pin_memory,
        threads=config.loader_threads,
        network_input=config.model.input,
        proposals=proposals,
    )


def augmentation_of(config: TrainConfig) -> Augmentation:
    """What a training does to its images."""
    return Augmentation(
        flip=config.flip,
        jitter_sides=config.jitter_sides,
        large_jitter=config.large_jitter,
        max_objects=config.max_objects,
    )
