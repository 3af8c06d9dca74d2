"""Evaluation on shards: truth comes back in source pixels, and every image counts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made_shards import instance, make_shards
from made_shards import row as made_row
from models import SMALL

from jobs.evaluate import JudgedRow, check_categories, evaluate, found_kinds, judge_rows, metrics_of
from jobs.evaluations import ap_metrics
from mrcnn import Category, Detections, KeypointConfig, MaskConfig, MaskRCNN, ModelConfig, save_model
from pipelines import patience
from pipelines.build import BuildConfig, build
from pipelines.dataset import Row, ShardDataset
from pipelines.storage_errors import UnreachableError
from pipelines.toy import ToySummary, make_toy_data


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


def test_a_storage_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a training, an evaluation would else end the workers, and a second one those that come after them."""
    uri = make_shards(tmp_path / "made", [made_row(i, (32, 40), [instance([4, 4, 20, 30])]) for i in range(3)])
    dataset, away, read = ShardDataset(uri), [1, 2], ShardDataset.read

    def stumbling(self: ShardDataset, index: int) -> Row:
        if away and index == 1:
            away.pop()
            raise UnreachableError(f"{uri} cannot be reached")
        return read(self, index)

    truth = Omniscient(ShardDataset(uri))
    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    monkeypatch.setattr(ShardDataset, "read", stumbling)
    rows = judge_rows(truth, dataset, range(3))  # type: ignore[arg-type]
    assert [each.image["id"] for each in rows] == [0, 1, 2]
    assert not away


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


KEYPOINTS = replace(SMALL, mask=MaskConfig(head="none"), keypoint=KeypointConfig(num_keypoints=3, convs=1, channels=16))
BOXES = replace(SMALL, mask=MaskConfig(head="none"))


class Pointing(Omniscient):
    """Answers with the true boxes and keypoints, and no masks."""

    def predict(self, images: Sequence[np.ndarray], source_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        (image,), ((height, width),) = images, source_sizes
        row = self.dataset.read(self.calls)
        (found,) = super().predict(images, source_sizes)
        points = torch.tensor([i["keypoints"] for i in row.instances]).reshape(-1, 3, 3)
        scale = torch.tensor([width / image.shape[1], height / image.shape[0]])
        points[..., :2] = (points[..., :2] + 0.5) * scale - 0.5
        return [replace(found, mask_probs=None, keypoints=points)]


@pytest.fixture(scope="module")
def pointed(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Toy data with keypoints, at half its size."""
    folder = tmp_path_factory.mktemp("pointed")
    toy = make_toy_data(str(folder / "toy"), images=6, seed=2, size=96, keypoints=True)
    config = BuildConfig(
        images=toy.images_uri, annotations=toy.annotations_uri, out=str(folder / "shards"),
        shorter_side=48, longer_side=80,
    )  # fmt: skip
    build(config)
    return ShardDataset(config.out)


def test_keypoints_come_back_in_source_pixels(pointed: ShardDataset) -> None:
    rows = judge_rows(Pointing(pointed), pointed, range(len(pointed)))  # type: ignore[arg-type]
    metrics = metrics_of(rows, pointed.categories, found_kinds(KEYPOINTS))
    assert metrics.box["AP"] == metrics.keypoints["AP"] == pytest.approx(1.0)
    assert set(metrics.keypoints_per_category) == {"circle", "square", "triangle", "star"}
    assert metrics.mask == {}
    assert list(ap_metrics(metrics)) == ["val/keypoint_AP", "val/keypoint_AP50", "val/box_AP", "val/box_AP50"]
    off = metrics_of([shifted(row) for row in rows], pointed.categories, found_kinds(KEYPOINTS))
    assert off.keypoints["AP"] < 0.3
    assert off.box["AP"] == pytest.approx(1.0)


def shifted(row: JudgedRow) -> JudgedRow:
    """With keypoints a tenth of the image off."""
    results = [
        result | {"keypoints": [x if i % 3 == 2 else x + row.image["width"] / 10 for i, x in enumerate(points)]}
        for result in row.results
        for points in [result["keypoints"]]
    ]
    return replace(row, results=results)


def test_what_a_model_does_not_find_is_not_measured(pointed: ShardDataset) -> None:
    assert found_kinds(SMALL) == {"box", "mask"}
    assert found_kinds(BOXES) == {"box"}
    assert found_kinds(replace(KEYPOINTS, mask=MaskConfig())) == {"box", "mask", "keypoints"}
    rows = [replace(row, results=[]) for row in judge_rows(Omniscient(pointed), pointed, range(2))]  # type: ignore[arg-type]
    assert list(ap_metrics(metrics_of(rows, pointed.categories, found_kinds(BOXES)))) == ["val/box_AP", "val/box_AP50"]


@pytest.mark.parametrize("config", [BOXES, KEYPOINTS])
def test_models_without_masks_are_evaluated(config: ModelConfig, pointed: ShardDataset) -> None:
    torch.manual_seed(0)
    model = MaskRCNN(replace(config, num_classes=4), pointed.categories).eval()
    rows = judge_rows(model, pointed, range(2))
    metrics = metrics_of(rows, pointed.categories, found_kinds(config))
    assert sum(len(row.results) for row in rows) > 0
    assert metrics.mask == {}
    assert bool(metrics.keypoints) == (config is KEYPOINTS)
    assert "mask" not in metrics.table()


def test_keypoints_have_to_mean_the_same_only_to_a_model_that_finds_some(pointed: ShardDataset) -> None:
    unnamed = [Category(each.id, each.name) for each in pointed.categories]
    check_categories(MaskRCNN(replace(SMALL, num_classes=4), unnamed), "m", pointed)
    with pytest.raises(
        ValueError, match=r"knows the categories \['1 circle', .*1 circle \(left_end, right_end, centre\)"
    ):
        check_categories(MaskRCNN(replace(KEYPOINTS, num_classes=4), unnamed), "m", pointed)


def test_what_a_model_knows_beyond_the_data_does_not_count(pointed: ShardDataset) -> None:
    """As torchvision's 90 classes, of which COCO uses 80."""
    more = [Category(99, "unused"), *pointed.categories]
    torch.manual_seed(0)
    model = MaskRCNN(replace(SMALL, num_classes=5), more).eval()
    with torch.no_grad():
        model.roi_heads.box_head.class_logits.weight.mul_(30)
    check_categories(model, "m", pointed)
    rows = judge_rows(model, pointed, range(2))
    known = {category.id for category in pointed.categories}
    found = {result["category_id"] for row in rows for result in row.results}
    assert found
    assert found <= known
    metrics_of(rows, pointed.categories, found_kinds(SMALL))
    with pytest.raises(ValueError, match="evaluate on data with the model's categories"):
        check_categories(MaskRCNN(replace(SMALL, num_classes=4), [Category(i, str(i)) for i in range(4)]), "m", pointed)
