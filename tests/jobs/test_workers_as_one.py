"""Processes of DDP train as one process with all of their images would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from made_shards import instance, make_shards, row
from models import SMALL
from torch.nn.parallel import DistributedDataParallel

from jobs.config import OptimizerConfig, TrainConfig
from jobs.engine import Engine, read_losses
from jobs.ranks import mean_over_ranks
from mrcnn import MaskRCNN
from mrcnn.config import Norm
from mrcnn.distributed import train_together
from pipelines.dataset import ShardDataset
from pipelines.loader import batches

STEPS = 20
RATE = 0.0001  # a larger one has boxes cross thresholds, and rounding then decides what is learnt
SIZE = (96, 128)
# Every candidate becomes a proposal and every proposal a RoI: near ties, which rounding decides, then change nothing.
MODEL = replace(
    SMALL,
    num_classes=1,
    rpn=replace(SMALL.rpn, nms_iou=1.0, pre_nms_top_n_train=10, post_nms_top_n_train=50),
    roi=replace(SMALL.roi, batch_size_per_image=60, positive_fraction=1.0),
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Ten images of one size (padding would let a rank's images see how large the others are), with no to four
    objects: so there are ranks without a positive."""
    rows = []
    for i in range(10):
        boxes = [(5 + 20 * n, 5 + 3 * i, 35 + 20 * n + 2 * i, 45 + 3 * i) for n in range(i % 5)]
        rows.append(row(i, SIZE, [instance(box) for box in boxes]))
    return make_shards(tmp_path_factory.mktemp("ddp"), rows)


def config_of(norm: Norm, images_at_once: int = 0) -> TrainConfig:
    return TrainConfig(
        model=replace(MODEL, backbone=replace(SMALL.backbone, norm=norm)),
        optimizer=OptimizerConfig(base_lr=RATE, warmup_steps=0),
        steps=STEPS,
        global_batch=4,
        images_at_once=images_at_once,
    )


def curve_of(rank: int, world_size: int, folder: str, shards: str, config: TrainConfig) -> None:
    """A process of a training; rank 0 leaves the losses of each step in the folder, and its weights."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model: torch.nn.Module = MaskRCNN(config.model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if world_size > 1:
        where = f"file://{folder}/meeting-{world_size}"
        dist.init_process_group("gloo", init_method=where, rank=rank, world_size=world_size)
        assert dist.group.WORLD is not None
        train_together(model, dist.group.WORLD)
        model = DistributedDataParallel(model, gradient_as_bucket_view=True)
    engine = Engine(model, config, torch.device("cpu"))
    stream = batches(
        ShardDataset(shards), seed=0, global_batch=config.global_batch, rank=rank, world_size=world_size,
        images_at_once=config.images_at_once,
    )  # fmt: skip
    losses = []
    while engine.step < STEPS:
        batch = next(stream)
        engine.accumulate(batch.images, batch.targets, weight=batch.weight, ends_step=batch.ends_step)
        if batch.ends_step:
            losses.append(engine.update())
    stream.close()  # type: ignore[attr-defined]
    means = mean_over_ranks(read_losses(losses), world_size, torch.device("cpu"))
    if rank == 0:
        weights = {name.removeprefix("module."): value for name, value in model.state_dict().items()}
        torch.save({"losses": means} | weights, f"{folder}/{world_size}.pt")
    if world_size > 1:
        dist.destroy_process_group()


def train(folder: Path, shards: str, config: TrainConfig, world_size: int) -> dict[str, torch.Tensor]:
    mp.spawn(curve_of, (world_size, str(folder), shards, config), nprocs=world_size)
    found: dict[str, torch.Tensor] = torch.load(folder / f"{world_size}.pt", weights_only=True)
    return found


@pytest.mark.parametrize(("norm", "world_size"), [("frozen_bn", 3), ("sync_bn", 2)])
def test_several_workers_train_as_one(tmp_path: Path, shards: str, norm: Norm, world_size: int) -> None:
    """The losses of 20 steps, and what was learnt from them. Of four images three workers get 2, 1, 1."""
    config = config_of(norm)
    one = train(tmp_path, shards, config, 1)
    torch.manual_seed(0)
    start = MaskRCNN(config.model).state_dict()
    several = train(tmp_path, shards, config, world_size)
    torch.testing.assert_close(several["losses"], one["losses"], rtol=1e-4, atol=1e-5)
    for name in ("rpn.objectness.weight", "roi_heads.box_head.box_deltas.weight", "backbone.stem.0.weight"):
        moved, expected = several[name] - start[name], one[name] - start[name]
        assert 0 < (moved - expected).norm() < 0.02 * expected.norm(), name
    statistics = "backbone.stages.3.1.bn2.running_var"
    torch.testing.assert_close(several[statistics], one[statistics], rtol=1e-3, atol=1e-5)


def test_parts_of_a_step_add_up(tmp_path: Path, shards: str) -> None:
    """One image at a time: losses are divided by each part's own samples, so they are near those of the whole."""
    whole = train(tmp_path, shards, config_of("frozen_bn"), 2)["losses"]
    parts = train(tmp_path, shards, config_of("frozen_bn", images_at_once=1), 2)["losses"]
    torch.testing.assert_close(parts[:, 1], whole[:, 1], rtol=1e-3, atol=0)  # objectness: as many samples in each
    assert not torch.equal(parts[:, 4], whole[:, 4])
