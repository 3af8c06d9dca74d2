"""The whole way on real images: build, train on two workers, evaluate, predict; pycocotools accepts what comes out."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from jobs import tracking
from jobs.config import TrainJob
from jobs.evaluate import evaluate
from jobs.predict import predict
from jobs.presets import PRESETS
from jobs.train import TrainSummary, train
from pipelines.build import BuildSummary, build
from pipelines.config import BuildConfig
from pipelines.predict_options import PredictRun

pytestmark = [pytest.mark.coco100, pytest.mark.usefixtures("mlflow_store")]

STEPS = 36


@pytest.fixture(scope="module")
def built(coco100: Path, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, BuildSummary]:
    """Both halves at the paper's 800 pixels."""
    out = tmp_path_factory.mktemp("coco")
    return {
        part: build(
            BuildConfig(
                images=str(coco100 / part),
                annotations=str(coco100 / f"annotations/instances_{part}.json"),
                out=str(out / part),
                encoding="jpeg",
                rows_per_shard=16,
            )
        )
        for part in ("train2017", "val2017")
    }


@pytest.fixture(scope="module")
def trained(built: dict[str, BuildSummary], tmp_path_factory: pytest.TempPathFactory) -> TrainSummary:
    """A few dozen steps of the small preset at a small size."""
    preset = PRESETS["r18_fpn_small"]
    small = replace(preset.model, input=replace(preset.model.input, shorter_side=160, longer_side=267))
    config = replace(preset, model=small, steps=STEPS, log_every=6, pictures=2)
    job = TrainJob(
        data=built["train2017"].out,
        val_data=built["val2017"].out,
        storage=str(tmp_path_factory.mktemp("runs")),
        run="coco100",
        workers="2",
    )
    return train(job, config)


def test_all_images_and_objects_are_in_the_shards(built: dict[str, BuildSummary]) -> None:
    for part, objects in (("train2017", 470), ("val2017", 382)):
        totals = built[part].totals
        assert (totals.images, totals.rows, totals.rejects) == (50, 50, 0)
        assert (totals.annotations, totals.instances) == (objects, objects)


@pytest.mark.drill
def test_the_loss_is_finite_and_falls(trained: TrainSummary) -> None:
    history = tracking.client().get_metric_history(trained.run_id, "train/loss")
    losses = [metric.value for metric in sorted(history, key=lambda metric: metric.step)]
    assert len(losses) == STEPS // 6
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.drill
def test_evaluation_covers_every_image(trained: TrainSummary, built: dict[str, BuildSummary]) -> None:
    metrics = evaluate(trained.model_uri, built["val2017"].out).metrics
    assert metrics.images == 50
    assert metrics.mask["AP"] == pytest.approx(trained.outcome.metrics["val/mask_AP"], abs=1e-6)


@pytest.mark.drill
def test_pycocotools_accepts_the_predictions(trained: TrainSummary, coco100: Path, tmp_path: Path) -> None:
    summary = predict(
        trained.model_uri,
        str(coco100 / "val2017"),
        str(tmp_path / "out"),
        run=PredictRun(overlays=2, coco_results=True),
    )
    assert (summary.images, summary.rejects_by_reason) == (50, {})
    rows = pq.read_table(tmp_path / "out" / "predictions").to_pylist()
    truth = COCO(str(coco100 / "annotations/instances_val2017.json"))
    assert sorted(row["image_id"] for row in rows) == sorted(truth.imgs)
    assert all((row["height"], row["width"]) == size_of(truth, row["image_id"]) for row in rows)
    assert len(list((tmp_path / "out" / "overlays").glob("*.png"))) == 2
    results = json.loads((tmp_path / "out" / "coco_results.json").read_text())
    assert len(results) == summary.detections
    assert results, "the model found nothing at all: train longer"
    for kind in ("bbox", "segm"):
        evaluation = COCOeval(truth, truth.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        assert 0 <= evaluation.stats[0] <= 1


def size_of(truth: COCO, image_id: int) -> tuple[int, int]:
    image = truth.imgs[image_id]
    return image["height"], image["width"]
