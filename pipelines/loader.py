"""Shards -> batches for training and evaluation. Nothing of Ray in here.

pipelines/order.py says which images come when, augment.py what is done to each, collate.py makes tensors of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from threading import Event
from typing import TypeVar

from mrcnn.config import InputConfig
from mrcnn.inputs import check_targets
from mrcnn.rpn import Proposals
from mrcnn.structures import ImageBatch, Targets
from pipelines.augment import UNCHANGED, Augmentation
from pipelines.collate import collate, most_keypoints
from pipelines.dataset import Row, ShardDataset
from pipelines.order import Order, StepPart, image_seed, step_parts
from pipelines.patience import patiently
from pipelines.prefetch import prefetched
from pipelines.proposals import ProposalDataset, collate_proposals
from pipelines.scaling import Scaling

R = TypeVar("R")


@dataclass(frozen=True)
class Batch:
    """One rank's share of one training step, or a part of it."""

    images: ImageBatch
    targets: Targets
    image_ids: tuple[int, ...]
    proposals: Proposals | None = None
    """Where the detector trains on those of an RPN that was trained apart"""
    weight: float = 1.0
    """Images of this part of all ranks, as a share of the step's"""
    ends_step: bool = True

    def pinned(self) -> Batch:
        """The same in page-locked memory."""
        proposals = self.proposals and self.proposals.pin_memory()
        return replace(self, images=self.images.pin_memory(), targets=self.targets.pin_memory(), proposals=proposals)


def batches(
    dataset: ShardDataset,
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    images_at_once: int = 0,
    start_images: int = 0,
    aspect_groups: bool = True,
    augmentation: Augmentation = UNCHANGED,
    threads: int = 2,
    prefetch: int = 4,
    network_input: InputConfig | None = None,
    proposals: ProposalDataset | None = None,
    pin_memory: bool = False,
) -> Iterator[Batch]:
    """Endless batches of `rank`, read ahead by threads: one a step, or several with `images_at_once`, the most that one
    may hold (0: no bound). Close the iterator to stop them.

    `start_images` is the number of images that all ranks together have consumed before: the stream goes on
    there. Every image comes once in each epoch; a step may span two epochs. With `aspect_groups`, landscape and
    portrait images are kept apart as far as that goes (see pipelines/order.py). Each image is resized to what
    `network_input` asks for; without one it keeps the size it is stored in. Its `proposals`, if there are any, go with
    it. `pin_memory` makes copies to a GPU fast.
    Raises ValueError where `global_batch` is too small to share (`step_parts`), or the data set is empty. Where a row
    cannot be read, the iterator raises ValueError or FileNotFoundError.
    """
    assert 0 <= rank < world_size
    parts = step_parts(global_batch, rank=rank, world_size=world_size, images_at_once=images_at_once)
    if len(dataset) == 0:
        raise ValueError(f"{dataset.uri} holds no images: look at its rejects.parquet")
    places = ((start, part) for start in count(start_images, global_batch) for part in parts)
    portrait = dataset.portrait() if aspect_groups else None
    order = Order(seed, len(dataset), global_batch=global_batch, portrait=portrait)
    closed = Event()
    load = _Loader(dataset, order, augmentation, network_input, proposals, pin_memory, closed)
    return prefetched(load, places, threads=threads, ahead=prefetch, ended=closed)


@dataclass(frozen=True)
class _Loader:
    """Where a step begins in the stream of images, and a part of it -> a batch. Threads share it."""

    dataset: ShardDataset
    order: Order
    augmentation: Augmentation
    network_input: InputConfig | None
    proposals: ProposalDataset | None
    pin_memory: bool
    closed: Event
    """Nobody waits for a batch any more: nor shall its threads for a storage that is away"""

    def __call__(self, place: tuple[int, StepPart]) -> Batch:
        start, part = place
        batch = self._load(range(start + part.places.start, start + part.places.stop))
        batch = replace(batch, weight=part.weight, ends_step=part.ends_step)
        return batch.pinned() if self.pin_memory else batch

    def _load(self, places: range) -> Batch:
        epochs, indices = zip(*(self.order(place) for place in places), strict=True)
        stored = [self._patiently(partial(self.dataset.read, index)) for index in indices]
        keys = [(self.order.seed, epoch, row.image_id) for epoch, row in zip(epochs, stored, strict=True)]
        flips = [self.augmentation.flips(key) for key in keys]
        try:
            rows = [self.augmentation(row, key, self.network_input) for row, key in zip(stored, keys, strict=True)]
            images, targets = self._tensors(rows, seeds=[image_seed(*key) for key in keys], flips=flips)
        except ValueError as error:
            uris = ", ".join(row.uri for row in stored)
            raise ValueError(
                f"{self.dataset.uri}, among {uris}: {error}; `mrcnn verify-data` finds damaged rows"
            ) from error
        proposals = None
        if self.proposals is not None:
            scalings = [Scaling(before.size, after.size) for before, after in zip(stored, rows, strict=True)]
            found = [self._patiently(partial(self.proposals.read, index)) for index in indices]
            proposals = collate_proposals(found, scalings, flips=flips, top_n=self.proposals.top_n)
        return Batch(images, targets, tuple(row.image_id for row in rows), proposals)

    def _patiently(self, call: Callable[[], R]) -> R:
        return patiently(call, unwanted=self.closed)

    def _tensors(self, rows: list[Row], *, seeds: list[int], flips: list[bool]) -> tuple[ImageBatch, Targets]:
        """Refuses what no model can learn from, here, where it is on the CPU: on a GPU nobody looks at values."""
        categories = self.dataset.categories
        divisor = self.network_input.size_divisor if self.network_input else 32
        images, targets = collate(rows, seeds=seeds, flips=flips, categories=categories, size_divisor=divisor)
        check_targets(targets, images, num_classes=len(categories), num_keypoints=most_keypoints(categories))
        return images, targets
