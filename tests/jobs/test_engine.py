"""The training step and the schedule, in one process."""

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import nn
from watch import Watched

from jobs.config import OptimizerConfig, TrainConfig
from jobs.engine import Engine, build_optimizer, learning_rate, read_losses
from mrcnn import MaskRCNN
from mrcnn.structures import ImageBatch, Targets


def test_the_papers_schedule() -> None:
    """0.02 at 16 images, a tenth from 120k of 160k on, linear warm-up before."""
    config = TrainConfig()
    assert learning_rate(1000, config) == learning_rate(119_999, config) == 0.02
    assert learning_rate(120_000, config) == pytest.approx(0.002)
    assert learning_rate(0, config) == pytest.approx(0.02 * 1e-3)
    assert learning_rate(500, config) == pytest.approx(0.02 * 0.5005)


@pytest.mark.parametrize(("batch", "rate"), [(16, 0.02), (8, 0.01), (64, 0.08)])
def test_the_rate_follows_the_global_batch(batch: int, rate: float) -> None:
    assert learning_rate(2000, replace(TrainConfig(), global_batch=batch)) == pytest.approx(rate)


def test_normalisation_and_biases_do_not_decay() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
    model[2].weight.requires_grad_(False)
    decayed, plain = build_optimizer(model, OptimizerConfig(weight_decay=0.5)).param_groups
    assert [p.shape for p in decayed["params"]] == [(4, 3, 3, 3)]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.5, 0)
    assert len(plain["params"]) == 4


def test_steps_count_and_learn(small_model: MaskRCNN, small_batch: tuple[ImageBatch, Targets]) -> None:
    config = TrainConfig(model=small_model.config, optimizer=OptimizerConfig(warmup_steps=2), steps=40, global_batch=16)
    engine = Engine(small_model, config, torch.device("cpu"))
    losses = [engine.train_step(*small_batch) for _ in range(12)]
    assert engine.step == 12
    assert engine.images_seen == 12 * 16
    assert not losses[0]["loss"].requires_grad
    read = read_losses(losses)
    assert read.shape == (12, 6)
    assert read[-2:, 0].mean() < read[:2, 0].mean()
    torch.testing.assert_close(read[:, 0], read[:, 1:].sum(dim=1))


def test_gradients_are_clipped(small_model: MaskRCNN, small_batch: tuple[ImageBatch, Targets]) -> None:
    optimizer = OptimizerConfig(warmup_steps=0, clip_norm=1e-6, weight_decay=0)
    engine = Engine(small_model, TrainConfig(model=small_model.config, optimizer=optimizer), torch.device("cpu"))
    before = {name: p.detach().clone() for name, p in small_model.named_parameters()}
    engine.train_step(*small_batch)
    moved = sum((p - before[name]).square().sum() for name, p in small_model.named_parameters()).sqrt()
    assert 0 < moved <= 0.02 * 1e-6 * 1.001


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_whole_step_waits_for_no_value(
    precision: Literal["fp32", "bf16"], small_model: MaskRCNN, small_batch: tuple[ImageBatch, Targets]
) -> None:
    """Forward, backward, clipping and update, with momentum of a step before."""
    optimizer = OptimizerConfig(warmup_steps=2, clip_norm=1.0)
    config = TrainConfig(model=small_model.config, optimizer=optimizer, precision=precision)
    engine = Engine(small_model, config, torch.device("cpu"))
    with Watched() as watched:
        for _ in range(2):
            engine.train_step(*small_batch)
    assert watched.waits == []


def test_bfloat16_stays_close(small_model: MaskRCNN, small_batch: tuple[ImageBatch, Targets]) -> None:
    config = TrainConfig(model=small_model.config)
    full = Engine(small_model, config, torch.device("cpu")).train_step(*small_batch)
    half = Engine(small_model, replace(config, precision="bf16"), torch.device("cpu")).train_step(*small_batch)
    assert half["loss"].dtype == torch.float32
    torch.testing.assert_close(half["loss"], full["loss"], rtol=0.05, atol=0)
