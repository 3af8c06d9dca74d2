"""`mrcnn benchmark predict` with a tiny model: that both sides do the same work, and what is reported. Times are not
judged."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL
from PIL import Image
from pycocotools import mask as coco_mask
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.transforms.functional import to_tensor

from jobs import benchmark_predict
from jobs.benchmark_peers import find_objects, ours_of, torchvision_model
from jobs.benchmark_predict import (
    CASES,
    PredictCase,
    PredictReport,
    check_same,
    further_speed,
    plain_loop,
    run_predict_benchmark,
)
from jobs.cli import main
from mrcnn.structures import Category
from pipelines.stages import STAGES

TINY = PredictCase("tiny", SMALL, 1)
CATEGORIES = [Category(id=10 * label, name=str(label)) for label in (1, 2, 3)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two JPEGs of 60 x 80 and 80 x 60, blots of colour."""
    coarse = np.random.default_rng(0).integers(0, 256, (2, 6, 8, 3), np.uint8)
    images = tmp_path / "images"
    images.mkdir()
    for i, size in enumerate([(80, 60), (60, 80)]):
        Image.fromarray(coarse[i]).resize(size, Image.Resampling.BICUBIC).save(images / f"{i}.jpg", quality=95)
    return images


@pytest.mark.drill
def test_the_benchmark_runs_and_reports(folder: Path, ray_cluster: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_predict, "SMALLEST_CHUNK", 2)
    monkeypatch.setattr(benchmark_predict, "further_speed", lambda *runs: 2.0)
    threads = torch.get_num_threads()
    report = run_predict_benchmark("predict", str(folder), cpus=1, repeats=1, case=TINY)
    assert torch.get_num_threads() == threads
    assert (report.what, report.images, report.repeats) == ("tiny", 2, 1)
    assert report.detections >= 2
    assert report.same >= 0.97
    assert (report.ours, report.ratio) == (2.0, 2.0 / report.torchvision)
    assert report.torchvision > 0
    assert report.start > 0
    for stages in (report.ours_stages, report.torchvision_stages):
        assert list(stages) == list(STAGES)
        assert all(seconds > 0 for seconds in stages.values())
    assert {"CPU", "threads", "ray", "Pillow"} <= report.machine.keys()


@torch.no_grad()
def test_the_loop_is_the_models_own_way(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    peer = torchvision_model(SMALL)
    files = sorted(folder.iterdir())
    images = [to_tensor(Image.open(file)) for file in files]
    find_objects(peer, images[0])
    seconds = plain_loop(peer, files, tmp_path / "out.json", CATEGORIES)
    assert list(seconds) == list(STAGES)
    results = json.loads((tmp_path / "out.json").read_text())
    for i, image in enumerate(images):
        (found,) = peer([image])
        own = [each for each in results if each["image_id"] == i]
        assert len(own) == len(found["boxes"]) > 0
        for each, box, label, mask in zip(own, found["boxes"], found["labels"], found["masks"], strict=True):
            x, y, width, height = each["bbox"]
            assert [x, y, x + width, y + height] == pytest.approx(box.tolist(), abs=1e-4)
            assert each["category_id"] == 10 * int(label)
            np.testing.assert_array_equal(coco_mask.decode(each["segmentation"]), mask[0].numpy() >= 0.5)


def test_the_large_model_is_torchvisions() -> None:
    with torch.device("meta"):
        theirs = maskrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
        built = torchvision_model(CASES["predict"].model).state_dict()
    shapes = {name: value.shape for name, value in theirs.items() if not name.endswith("num_batches_tracked")}
    assert {name: value.shape for name, value in built.items()} == shapes


def test_the_small_model_is_the_presets() -> None:
    preset = CASES["predict-small"].model
    ours = ours_of(torchvision_model(preset), preset).config
    assert (ours.num_classes, ours.input.shorter_side, ours.input.longer_side) == (80, 320, 533)
    assert (ours.rpn.pre_nms_top_n_test, ours.rpn.post_nms_top_n_test) == (500, 300)
    assert (ours.backbone.name, ours.backbone.norm, ours.backbone.fpn_norm) == ("resnet18", "gn", "gn")
    assert (ours.backbone.fpn_channels, ours.roi.box_channels, ours.mask.channels) == (128, 512, 128)
    assert (ours.roi.aligned, ours.mask.paste, ours.input.resize) == (False, "padded", "bilinear")


def test_only_further_images_count() -> None:
    assert further_speed(30.0, 50.0, 10) == 0.5
    with pytest.raises(RuntimeError, match=r"10 further images take -1\.0 s"):
        further_speed(30.0, 29.0, 10)


def results(count: int) -> list[dict[str, Any]]:
    bitmap = np.zeros((40, 40), np.uint8)
    bitmap[5:25, 5:25] = 1
    rle = coco_mask.encode(np.asfortranarray(bitmap))
    entry = {"image_id": 1, "bbox": [5.0, 5.0, 20.0, 20.0], "score": 0.5, "segmentation": rle}
    return [{**deepcopy(entry), "category_id": i} for i in range(count)]


def test_different_work_is_no_comparison() -> None:
    assert check_same(results(100), results(100)) == 1.0
    assert check_same(results(100), results(98)) == 0.98
    shifted = np.zeros((40, 40), np.uint8)
    shifted[7:27, 5:25] = 1
    for name, value in (
        ("bbox", [5.0, 6.5, 20.0, 20.0]),
        ("score", 0.55),
        ("image_id", 2),
        ("category_id", 100),
        ("segmentation", coco_mask.encode(np.asfortranarray(shifted))),
    ):
        other = results(10)
        other[0][name] = value
        with pytest.raises(RuntimeError, match=r"only 90\.0% and 90\.0% are the same, and 97% have to be"):
            check_same(results(10), other)
    for ours, theirs in ((100, 90), (90, 100), (0, 0), (0, 3)):
        with pytest.raises(RuntimeError, match="their speeds cannot be compared"):
            check_same(results(ours), results(theirs))


def test_the_table_and_the_file(tmp_path: Path) -> None:
    stages = dict(zip(STAGES, (0.001, 0.02, 1.5, 0.03, 0.004), strict=True))
    report = PredictReport(
        machine={"CPU": "slow", "threads": 2}, what="R-50", images=8, detections=33.4, ours=1.5, torchvision=0.5,
        start=9.87, ours_stages=stages, torchvision_stages=stages, same=0.998, repeats=3,
    )  # fmt: skip
    lines = str(report).splitlines()
    assert lines[0] == "CPU: slow"
    assert lines[3] == "R-50: 8 images, 33 detections each, 99.8% the same (medians of 3)"
    assert lines[5].split() == ["images/s", "1.500", "0.500", "3.00"]
    assert lines[8].split() == ["model,", "s/image", "1.5000", "1.5000"]
    assert "9.9 s more" in lines[-1]
    report.write(str(tmp_path / "out.json"))
    data = json.loads((tmp_path / "out.json").read_text())
    assert (data["ratio"], data["ours_stages"]["masks"]) == (3.0, 0.03)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("predict", "--images", "/nowhere"), "images is /nowhere, which holds no .jpg files"),
        (("predict", "--repeats", "0"), "repeats is 0"),
        (("predict-small", "--threads", "0"), "threads is 0"),
        (("predict", "--device", "cuda"), "device is cuda, but predict uses CPUs only"),
        (("predict-small", "--profile"), "--profile is for the model and its operators, not for predict-small"),
    ],
)
def test_bad_arguments_end_with_code_2(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["benchmark", *words]) == 2
    assert message in capsys.readouterr().err
