"""A checkpoint brings everything back, or is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.checkpoint import Best, Checkpoints, Progress
from jobs.config import OptimizerConfig, TrainConfig
from jobs.engine import Engine
from mrcnn import MaskRCNN, load_model
from mrcnn.structures import ImageBatch, Targets
from pipelines import patience
from pipelines.storage import Store
from pipelines.storage_errors import UnreachableError


def engine_for(model: MaskRCNN) -> Engine:
    config = TrainConfig(model=model.config, optimizer=OptimizerConfig(warmup_steps=3), steps=50)
    return Engine(model, config, torch.device("cpu"))


def progress(engine: Engine) -> Progress:
    return Progress(step=engine.step, images_seen=engine.images_seen, seed=0, data_digest="d")


def test_training_goes_on_bit_for_bit(
    small_model: MaskRCNN, small_batch: tuple[ImageBatch, Targets], tmp_path: Path
) -> None:
    engine = engine_for(small_model)
    for _ in range(2):
        engine.train_step(*small_batch)
    uri = Checkpoints(str(tmp_path)).save(small_model, engine, progress(engine), keep=2)
    for _ in range(2):
        engine.train_step(*small_batch)

    resumed_model = MaskRCNN(small_model.config)
    resumed = engine_for(resumed_model)
    found = Checkpoints(str(tmp_path)).restore(resumed_model, resumed, 2)
    assert (found.step, found.images_seen, resumed.step) == (2, 32, 2)
    for _ in range(2):
        resumed.train_step(*small_batch)
    for name, value in small_model.state_dict().items():
        assert torch.equal(value, resumed_model.state_dict()[name]), name
    assert load_model(uri).config == small_model.config  # a checkpoint is a model, too


def test_the_newest_stay_and_the_unfinished_do_not_count(small_model: MaskRCNN, tmp_path: Path) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    assert checkpoints.steps() == []
    for step in (5, 10, 15):
        checkpoints.save(small_model, engine, replace(progress(engine), step=step), keep=2)
    assert checkpoints.steps() == [10, 15]
    folder = tmp_path / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["step-00000010", "step-00000015"]
    (folder / "step-00000015" / "checkpoint.json").unlink()  # as if the writer had died before its last file
    assert checkpoints.steps() == [10]


def test_the_best_and_those_that_are_due_stay(small_model: MaskRCNN, tmp_path: Path) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))

    def save(step: int, *, to_evaluate: bool) -> None:
        at_step = replace(progress(engine), step=step)
        checkpoints.save(small_model, engine, at_step, keep=1, to_evaluate=to_evaluate)

    assert checkpoints.best() is None
    for step in (1, 2, 3):
        save(step, to_evaluate=step < 3)
    assert checkpoints.due() == [1, 2]
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.name_best(1, step_of_run=11, measure="val/mask_AP", value=0.5)
    checkpoints.write_evaluation(1, {"AP": 0.5})
    checkpoints.write_evaluation(2, {"AP": 0.4})
    save(4, to_evaluate=True)
    assert checkpoints.steps() == [1, 4]
    assert checkpoints.best() == Best(11, "val/mask_AP", 0.5, "step-00000001")
    assert load_model(checkpoints.uri(1)).config == small_model.config
    checkpoints.name_best(4, step_of_run=14, measure="val/mask_AP", value=0.6)
    checkpoints.write_evaluation(4, {"AP": 0.6})
    checkpoints.prune(1)
    assert checkpoints.steps() == [4]
    checkpoints.forget_evaluation(4)
    assert checkpoints.due() == [4]


def test_a_step_that_is_trained_again_is_evaluated_again(small_model: MaskRCNN, tmp_path: Path) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    for _ in range(2):
        checkpoints.save(small_model, engine, replace(progress(engine), step=5), keep=2, to_evaluate=True)
        assert checkpoints.due() == [5]
        checkpoints.write_evaluation(5, {"AP": 0.5})
        assert checkpoints.due() == []


def test_only_the_model_is_read_for_an_evaluation(small_model: MaskRCNN, tmp_path: Path) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    checkpoints.save(small_model, engine, replace(progress(engine), step=3), keep=1)
    folder = tmp_path / "checkpoints" / "step-00000003"
    (folder / "optimizer.safetensors").unlink()
    assert set(checkpoints.read_model(3)) == {"model.safetensors", "config.json"}
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        checkpoints.read_model(3)


def test_on_s3(small_model: MaskRCNN, s3: str) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(f"{s3}/checkpoint-test")
    for step in (1, 2):
        checkpoints.save(small_model, engine, replace(progress(engine), step=step), keep=1)
    assert checkpoints.steps() == [2]
    assert checkpoints.restore(MaskRCNN(small_model.config), engine, 2).step == 2
    checkpoints.mark_to_evaluate(2)
    assert checkpoints.due() == [2]
    checkpoints.name_best(2, step_of_run=2, measure="val/mask_AP", value=0.5)
    checkpoints.write_evaluation(2, {"AP": 0.5})
    checkpoints.save(small_model, engine, replace(progress(engine), step=3), keep=1)
    assert checkpoints.steps() == [2, 3]
    checkpoints.save(small_model, engine, replace(progress(engine), step=2), keep=1, to_evaluate=True)
    assert checkpoints.due() == [2]


def test_a_store_that_is_away_is_waited_for(
    small_model: MaskRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    write, failures = Store.write_bytes, ["optimizer.safetensors", "checkpoint.json"]

    def fail_once(store: Store, name: str, data: bytes) -> None:
        if name in failures:
            failures.remove(name)
            raise UnreachableError(f"{name} cannot be reached")
        write(store, name, data)

    monkeypatch.setattr(Store, "write_bytes", fail_once)
    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    checkpoints.save(small_model, engine, replace(progress(engine), step=1), keep=1)
    assert failures == []
    assert checkpoints.restore_newest(small_model, engine) == 1


def test_a_checkpoint_that_cannot_be_written_leaves_nothing(
    small_model: MaskRCNN, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    checkpoints.save(small_model, engine, replace(progress(engine), step=1), keep=1)
    write = Store.write_bytes

    def full(store: Store, name: str, data: bytes) -> None:
        if name == "optimizer.safetensors":
            raise ValueError("No space left on device")
        write(store, name, data)

    monkeypatch.setattr(Store, "write_bytes", full)
    with pytest.raises(ValueError, match="No space left"):
        checkpoints.save(small_model, engine, replace(progress(engine), step=2), keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]


def test_a_changed_checkpoint_is_refused(small_model: MaskRCNN, tmp_path: Path) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    checkpoints.save(small_model, engine, replace(progress(engine), step=3), keep=1)
    folder = tmp_path / "checkpoints" / "step-00000003"
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        checkpoints.restore(small_model, engine, 3)
    for _ in range(2):  # and it is not forgotten: to begin anew, as if there was none, would surprise
        with pytest.raises(ValueError, match=r"no checkpoint in .* is what was written: start a new run"):
            checkpoints.restore_newest(small_model, engine)
    manifest = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**manifest, "format": "other"}))
    with pytest.raises(ValueError, match="not of format"):
        checkpoints.restore_newest(small_model, engine)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "changed": lambda folder: rewrite(folder / "model.safetensors", lambda data: data[:-1] + b"!"),
    "torn": lambda folder: rewrite(folder / "optimizer.safetensors", lambda data: data[: len(data) // 2]),
    "a file less": lambda folder: (folder / "optimizer.safetensors").unlink(),
    "torn manifest": lambda folder: rewrite(folder / "checkpoint.json", lambda data: data[: len(data) // 2]),
    "a digest less": lambda folder: rewrite(
        folder / "checkpoint.json", lambda data: data.replace(b"optimizer.safetensors", b"config.json")
    ),
    "of another step": lambda folder: rewrite(
        folder / "checkpoint.json", lambda data: data.replace(b'"step": 3', b'"step": 4')
    ),
}


def rewrite(path: Path, change: Callable[[bytes], bytes]) -> None:
    before = path.read_bytes()
    path.write_bytes(change(before))
    assert path.read_bytes() != before


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_good_one_is_used(
    small_model: MaskRCNN, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    parameter = next(small_model.parameters())
    for step in (1, 2, 3):
        with torch.no_grad():
            parameter.fill_(step)
        engine.step = step
        checkpoints.save(small_model, engine, progress(engine), keep=3)
    folder = tmp_path / "checkpoints" / "step-00000003"
    DAMAGE[damage](folder)
    assert checkpoints.restore_newest(small_model, engine) == engine.step == 2
    assert bool((parameter == 2).all())
    assert "step-00000003" in capsys.readouterr().out

    assert checkpoints.steps() == [1, 2]  # it stays to be looked at, but pushes out no good one
    assert (folder / "refused.json").exists()
    (folder / f".model.safetensors.{'0' * 32}.part").touch()  # as of a writer that was killed
    engine.step = 3
    checkpoints.save(small_model, engine, progress(engine), keep=3)
    assert not list(folder.glob(".*"))
    assert checkpoints.restore_newest(small_model, engine) == 3


def test_another_models_checkpoint_is_refused(small_model: MaskRCNN, tmp_path: Path) -> None:
    engine, checkpoints = engine_for(small_model), Checkpoints(str(tmp_path))
    checkpoints.save(small_model, engine, replace(progress(engine), step=3), keep=1)
    other = MaskRCNN(replace(small_model.config, num_classes=5))
    with pytest.raises(ValueError, match=r"is of another model .*mask_logits"):
        checkpoints.restore(other, engine_for(other), 3)
