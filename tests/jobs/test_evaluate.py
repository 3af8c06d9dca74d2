"""Evaluation on shards: truth comes back in source pixels, and every image counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SMALL

from jobs.evaluate import JudgedRow, evaluate, judge_rows, metrics_of
from mrcnn import Category, Detections, MaskRCNN, save_model
from pipelines.build import BuildConfig, build
from pipelines.loader import ShardDataset
from pipelines.toy import ToySummary


def model_for(dataset: ShardDataset, seed: int = 0) -> MaskRCNN:
    """A small model with the categories of a data set and random weights."""
    torch.manual_seed(seed)
    config = replace(SMALL, num_classes=len(dataset.categories))
    return MaskRCNN(config, dataset.categories).eval()


class Omniscient:
    """Answers with the truth: boxes exactly, masks as full rectangles."""

    def __init__(self, dataset: ShardDataset) -> None:
        self.categories, self.dataset, self.calls = dataset.categories, dataset, 0

    def predict(self, images: Sequence[np.ndarray], source_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        (image,), ((height, width),) = images, source_sizes
        row = self.dataset.read(self.calls)
        self.calls += 1
        scale = torch.tensor([width / image.shape[1], height / image.shape[0]] * 2)
        n = len(row.instances)
        return [
            Detections(
                boxes=torch.tensor([i["box"] for i in row.instances]) * scale,
                labels=torch.tensor([i["label"] for i in row.instances]),
                scores=torch.linspace(1, 0.5, n),
                mask_probs=torch.ones(n, 28, 28),
                image_size=(height, width),
            )
        ]


@pytest.fixture(scope="module")
def halved(toy_config: BuildConfig, ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """The toy data at half its size."""
    out = str(tmp_path_factory.mktemp("halved"))
    build(replace(toy_config, out=out, shorter_side=48, longer_side=80))
    return ShardDataset(out)


@pytest.fixture(scope="module")
def truth_rows(halved: ShardDataset) -> list[JudgedRow]:
    return judge_rows(Omniscient(halved), halved, range(len(halved)))  # type: ignore[arg-type]


def test_truth_comes_back_in_source_pixels(
    truth_rows: list[JudgedRow], halved: ShardDataset, toy_data: ToySummary
) -> None:
    from pipelines.storage import read_uri

    source = json.loads(read_uri(toy_data.annotations_uri))
    images = {image["id"]: image for image in source["images"]}
    expected = sorted((a["image_id"], a["category_id"], *a["bbox"], a["area"]) for a in source["annotations"])
    found = sorted(
        (a["image_id"], a["category_id"], *a["bbox"], a["area"]) for row in truth_rows for a in row.annotations
    )
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    for row in truth_rows:
        assert row.image["height"] == images[row.image["id"]]["height"] > 48


def test_perfect_boxes_give_one_whatever_the_order(truth_rows: list[JudgedRow], halved: ShardDataset) -> None:
    metrics = metrics_of(truth_rows, halved.categories)
    assert metrics.box["AP"] == pytest.approx(1.0)
    assert 0.1 < metrics.mask["AP50"] < 1  # rectangles where stars are
    assert metrics_of(truth_rows[::-1], halved.categories) == metrics
    assert metrics.images == len(halved) == 16


def test_the_command_measures_all_images_in_parallel(toy_shards: str, ray_cluster: None, tmp_path: Path) -> None:
    dataset = ShardDataset(toy_shards)
    model = model_for(dataset)
    save_model(model, tmp_path / "model")
    out = tmp_path / "results" / "metrics.json"
    summary = evaluate(str(tmp_path / "model"), toy_shards, str(out))
    alone = metrics_of(judge_rows(model, dataset, range(len(dataset))), dataset.categories)
    assert summary.metrics == alone
    written = json.loads(out.read_text())
    assert written["mask"]["AP"] == pytest.approx(alone.mask["AP"], abs=1e-12)
    assert written["data_digest"] == dataset.manifest.digest
    assert "images/s" in str(summary)
    assert str(out) in str(summary)


def test_other_categories_are_refused_by_name(toy_shards: str, ray_cluster: None, tmp_path: Path) -> None:
    categories = [Category(i, f"thing{i}") for i in range(1, 4)]
    save_model(MaskRCNN(SMALL, categories), tmp_path)
    with pytest.raises(ValueError, match=r"1 thing1.*circle"):
        evaluate(str(tmp_path), toy_shards)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        evaluate(str(tmp_path), str(tmp_path / "nowhere"))
