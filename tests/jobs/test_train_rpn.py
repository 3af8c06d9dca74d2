"""The ways of training the RPN through Ray Train: separate on one worker, four steps on two."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from models import SMALL
from safetensors.torch import load_file
from torch import Tensor

from jobs import tracking
from jobs.config import OptimizerConfig, TrainConfig, TrainJob
from jobs.evaluate import evaluate
from jobs.train import TrainSummary, train
from mrcnn import MaskRCNN, load_model

pytestmark = [pytest.mark.drill, pytest.mark.usefixtures("mlflow_store")]

CONFIG = TrainConfig(
    model=replace(SMALL, backbone=replace(SMALL.backbone, norm="bn")),
    optimizer=OptimizerConfig(base_lr=0.04, warmup_steps=2, decay_at=(1.0,)),
    rpn="separate",
    steps=4,
    global_batch=4,
    log_every=2,
    evaluate_every=4,
    checkpoint_every=2,
    pictures=0,
)


@pytest.fixture(scope="module")
def job(toy_shards: str, tmp_path_factory: pytest.TempPathFactory) -> TrainJob:
    """On shards of this module's own, as proposals are written beside them."""
    folder = tmp_path_factory.mktemp("rpn")
    shutil.copytree(toy_shards, folder / "shards")
    data = str(folder / "shards")
    return TrainJob(data=data, val_data=data, storage=str(folder / "runs"), run="apart")


@pytest.fixture(scope="module")
def apart(job: TrainJob) -> TrainSummary:
    return train(job, CONFIG)


def state(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def initial(config: TrainConfig, folder: Path) -> dict[str, Tensor]:
    """The weights that a run starts from."""
    model = load_model(folder / "model")
    torch.manual_seed(config.seed)
    return MaskRCNN(model.config, model.categories).state_dict()


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """The modules of the model in which a bit has changed."""
    assert before.keys() == after.keys()
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


def history(run_id: str, key: str) -> list[int]:
    return [metric.step for metric in tracking.client().get_metric_history(run_id, key)]


def test_separate_trains_two_networks_in_one_run(apart: TrainSummary, job: TrainJob) -> None:
    run = Path(job.storage, job.run)
    assert apart.outcome.step == 8
    assert set(apart.outcome.metrics) >= {"val/mask_AP", "val/box_AP"}
    start, rpn, detector = initial(CONFIG, run), state(run / "1-rpn"), state(run)
    assert moved(start, rpn) == {"rpn_backbone", "rpn"}
    assert moved(rpn, detector) == {"backbone", "roi_heads"}
    assert load_model(run / "model").config.rpn.features == "own"
    manifest = json.loads(Path(job.data, "proposals", "apart-1-rpn", "manifest.json").read_text())
    assert sum(file["rows"] for file in manifest["files"]) == 16
    assert history(apart.run_id, "train/loss") == [2, 4, 6, 8]
    assert history(apart.run_id, "train/loss_objectness") == [2, 4]
    assert history(apart.run_id, "train/loss_mask") == [6, 8]
    assert history(apart.run_id, "val/mask_AP") == [8]
    assert tracking.find_run("apart").info.status == "FINISHED"
    metrics = evaluate(apart.model_uri, job.val_data).metrics  # it is a model as any other
    assert metrics.box["AP"] == pytest.approx(apart.outcome.metrics["val/box_AP"], abs=1e-9)


def test_killed_in_its_second_phase_it_ends_with_the_same_bits(
    apart: TrainSummary, job: TrainJob, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's folder as it was between steps 2 and 4 of the detector."""
    whole, killed = Path(job.storage, "apart"), Path(job.storage, "killed") / "apart"
    shutil.copytree(whole, killed)
    shutil.rmtree(killed / "model")
    shutil.rmtree(killed / "2-detector" / "checkpoints" / "step-00000004")
    (killed / "2-detector" / "outcome.json").unlink()
    proposals = Path(job.data, "proposals", "apart-1-rpn")
    times = {path: path.stat().st_mtime_ns for folder in (killed / "1-rpn", proposals) for path in folder.rglob("*")}
    again = replace(job, storage=str(killed.parent), resume=True)
    for change, message in (
        ({"rpn": "joint"}, "rpn was separate, is joint"),
        ({"steps": 6}, "steps was 4, is 6"),
    ):
        with pytest.raises(ValueError, match=message):
            train(again, replace(CONFIG, **change))
    summary = train(again, CONFIG)
    assert "2-detector: going on from" in capsys.readouterr().out
    assert summary.run_id == apart.run_id
    assert summary.outcome.metrics == apart.outcome.metrics
    assert moved(state(whole), state(killed)) == set()
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_proposals_of_a_run_of_the_same_name_are_not_taken(apart: TrainSummary, job: TrainJob, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"apart-1-rpn holds the proposals of another run: .* another --run name"):
        train(replace(job, storage=str(tmp_path)), CONFIG)
    assert not (tmp_path / "apart").exists()


def test_four_steps_end_in_shared_features(job: TrainJob) -> None:
    config = replace(CONFIG, rpn="four_step", steps=2)
    summary = train(replace(job, run="shared", workers="2"), config)
    assert summary.outcome.step == 8
    assert set(summary.outcome.metrics) >= {"val/mask_AP", "val/box_AP"}
    run = Path(job.storage, "shared")
    start = initial(config, run)
    first, second, third, last = (state(run / name) for name in ("1-rpn", "2-detector", "3-rpn", ""))
    assert moved(start, first) == {"backbone", "rpn"}
    assert moved(start, second) == {"backbone", "roi_heads"}  # it has its own features yet
    assert moved(second, third) == {"rpn"}
    assert moved(third, last) == {"roi_heads"}
    assert load_model(run / "model").config.rpn.features == "shared"
    folders = [path.name for path in Path(job.data, "proposals").iterdir() if path.name.startswith("shared")]
    assert sorted(folders) == ["shared-1-rpn", "shared-3-rpn"]
    assert history(summary.run_id, "train/loss_objectness") == [2, 6]
    assert history(summary.run_id, "train/loss_mask") == [4, 8]
    assert history(summary.run_id, "val/box_AP") == [8]
    again = replace(job, run="shared", resume=True, weights=str(run / "model" / "model.safetensors"))
    with pytest.raises(ValueError, match=r"weights of .*shared was another one: resume with what it was begun with"):
        train(again, config)
