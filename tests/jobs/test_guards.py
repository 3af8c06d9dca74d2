"""What stops a training: losses that are not finite, batches that memory is too short for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from watch import Watched

from jobs.config import OptimizerConfig, TrainConfig
from jobs.engine import Engine
from jobs.guards import NonFiniteLossError, check_losses, check_skipped, is_out_of_memory, too_large
from mrcnn import MaskRCNN
from mrcnn.structures import ImageBatch, Targets

Batch = tuple[ImageBatch, Targets]


def test_the_first_bad_step_is_named_with_its_images() -> None:
    steps = [{"loss": 1.0, "loss_mask": 0.2}, {"loss": float("nan"), "loss_mask": 0.5}, {"loss": float("inf")}]
    check_losses(steps[:1], first_step=7, image_ids=[[1, 2]])
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 8 \(loss nan, loss_mask 0\.5; images 3, 4\)"):
        check_losses(steps, first_step=7, image_ids=[[1, 2], [3, 4], [5, 6]])


def test_skipped_steps_are_no_fault_until_there_are_too_many() -> None:
    check_losses([{"loss": float("nan"), "skipped": 1.0}], first_step=1, image_ids=[[1]])
    check_skipped(2, 2, step=5, image_ids=[9])
    with pytest.raises(NonFiniteLossError, match=r"3 batches up to step 5 .* images 9, 8: on_nan allows 2"):
        check_skipped(3, 2, step=5, image_ids=[9, 8])


@pytest.fixture
def engine(small_model: MaskRCNN) -> Engine:
    """Batch norm, momentum, weight decay; may skip."""
    config = TrainConfig(
        model=small_model.config, optimizer=OptimizerConfig(warmup_steps=0), global_batch=2, on_nan=("skip", "3")
    )
    model = MaskRCNN(replace(small_model.config, backbone=replace(small_model.config.backbone, norm="bn")))
    return Engine(model, config, torch.device("cpu"))


def state(engine: Engine) -> dict[str, torch.Tensor]:
    momentum = {str(i): each["momentum_buffer"] for i, each in enumerate(engine.optimizer.state.values())}
    return {name: value.clone() for name, value in (engine.model.state_dict() | momentum).items()}


@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_skipped_step_changes_nothing(
    engine: Engine, small_batch: Batch, steps_before: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(steps_before):
        assert engine.train_step(*small_batch)["skipped"] == 0
    before = state(engine)
    normalize = engine.model.get_submodule("normalize").forward
    with monkeypatch.context() as patch:
        patch.setattr(engine.model.get_submodule("normalize"), "forward", lambda images: normalize(images) * torch.nan)
        spoilt = engine.train_step(*small_batch)
    assert spoilt["skipped"] == 1
    assert not spoilt["loss"].isfinite()
    after = state(engine)
    for name, value in before.items():
        counts = name.endswith("num_batches_tracked")
        assert torch.equal(value + counts, after[name]), name
    assert engine.step == steps_before + 1
    assert engine.train_step(*small_batch)["skipped"] == 0
    assert not torch.equal(state(engine)["rpn.objectness.weight"], after["rpn.objectness.weight"])


def test_skipping_takes_the_same_steps_as_stopping(small_model: MaskRCNN, small_batch: Batch) -> None:
    config = TrainConfig(model=small_model.config, optimizer=OptimizerConfig(warmup_steps=0), global_batch=2)
    found = []
    for on_nan in (("stop",), ("skip", "1")):
        torch.manual_seed(0)
        engine = Engine(MaskRCNN(small_model.config), replace(config, on_nan=on_nan), torch.device("cpu"))
        found.append([float(engine.train_step(*small_batch)["loss"]) for _ in range(3)])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_skipping_waits_for_no_value(engine: Engine, small_batch: Batch) -> None:
    engine.train_step(*small_batch)
    with Watched() as watched:
        engine.train_step(*small_batch)
    assert watched.waits == []


@pytest.mark.parametrize("words", [("skip",), ("skip", "0"), ("skip", "some"), ("skip", "1", "2"), ("go",), ()])
def test_bad_words_for_on_nan(words: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="on_nan is"):
        TrainConfig(on_nan=words)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


def test_the_machine_s_own_words_are_known() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_a_batch_too_large_is_described(small_batch: Batch) -> None:
    images, targets = small_batch
    text = str(too_large(images, targets, [17, 4], step=12))
    height, width = images.sizes[0].tolist()
    objects = int((targets.labels[0] > 0).sum())
    assert "batch of step 12: images 17, 4 of " in text
    assert f"{width} x {height}" in text
    assert f" with {objects}," in text
    assert "--images-at-once" in text
