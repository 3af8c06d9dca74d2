"""A peer's checkpoint, converted and predicted with, gives the peer's own COCO results.

From files on the disk to a results file: decoding, resizing, the model in an actor, pasting, run lengths. What remains
is float32's rounding: ours normalizes after resizing where torchvision does before, multiplies matrices of other shapes
where it reads masks, and each near tie of two scores or overlaps may fall either way.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection._utils import overwrite_eps
from torchvision.transforms.functional import to_tensor

from jobs.benchmark_peers import find_objects, torchvision_model
from jobs.benchmark_predict import plain_loop
from jobs.convert import convert_from
from jobs.predict import predict
from jobs.presets import PRESETS
from mrcnn.coco_categories import COCO_CATEGORIES, COCO_CATEGORIES_WITH_GAPS
from mrcnn.config import InputConfig
from mrcnn.peer_names import Peer
from pipelines.predict_options import PredictRun

Results = list[dict[str, Any]]

SIDES = {"shorter_side": 256, "longer_side": 427}  # of the live model: a tenth of the pixels of 800 x 1333
PHOTOGRAPHS = 6

SAME_SHARE = 0.97  # of the detections have a partner of the same class; all had, where these numbers were taken
SAME_BOX = 0.1  # pixels; 0.027 were seen
SAME_SCORE = 5e-4  # 5e-5 were seen
SAME_MASK = 0.98  # IoU; 0.9996 was seen, but where torchvision cuts a corner of a box to another whole pixel
SAME_POINT = 0.01  # pixels; 0.0007 were seen, but where two places of a heatmap are all but equal
SAME_AP = 0.005  # no difference was seen
SHIFT = 3  # pixels by which the truth is off, so that its overlaps lie around all of COCO's thresholds


def predicted(model: Path, files: Sequence[Path], folder: Path) -> Results:
    """What `mrcnn predict --coco-results` writes for some files; their names are image ids."""
    images = folder / "images"
    images.mkdir()
    for file in files:
        shutil.copy(file, images)
    summary = predict(str(model), str(images), str(folder / "out"), run=PredictRun(coco_results=True))
    assert (summary.images, summary.rejects_by_reason) == (len(files), {})
    results: Results = json.loads((folder / "out" / "coco_results.json").read_text())
    return results


def converted(peer: Peer, state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """A model's folder, made from a checkpoint file."""
    torch.save(state, folder / "checkpoint.pth")
    convert_from(peer, str(folder / "checkpoint.pth"), str(folder / "model"), **options)
    return folder / "model"


def overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    return float(coco_mask.iou([one["bbox"]], [other["bbox"]], [False])[0, 0])


def mask_overlap(one: dict[str, Any], other: dict[str, Any]) -> float:
    """IoU; two empty masks are the same."""
    masks = [one["segmentation"], other["segmentation"]]
    both, either = (float(coco_mask.area(coco_mask.merge(masks, intersect=intersect))) for intersect in (True, False))
    return both / either if either else 1.0


def pairs(theirs: Results, ours: Results) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Detections of the same image and class with an IoU of the boxes above 0.99."""
    found = []
    for each in theirs:
        alike = [o for o in ours if (o["image_id"], o["category_id"]) == (each["image_id"], each["category_id"])]
        best = max(alike, key=lambda other: overlap(each, other), default=None)
        if best is not None and overlap(each, best) > 0.99:
            found.append((each, best))
    return found


def check_same(ours: Results, theirs: Results) -> None:
    """The same detections, as far as `theirs` has them: boxes, scores, and masks, their areas, or keypoints."""
    same = pairs(theirs, ours)
    assert len(same) >= SAME_SHARE * max(len(ours), len(theirs)) > 0
    assert away(same, "bbox").max() <= SAME_BOX
    assert away(same, "score").max() <= SAME_SCORE
    if "segmentation" in theirs[0]:
        assert np.mean([mask_overlap(*each) >= SAME_MASK for each in same]) >= SAME_SHARE
    if "area" in theirs[0]:
        areas = [(each["area"], int(coco_mask.area(found["segmentation"]))) for each, found in same]
        assert np.mean([abs(a - b) <= (1 - SAME_MASK) * a for a, b in areas]) >= SAME_SHARE
    if "keypoints" in theirs[0]:
        off = away(same, "keypoints").reshape(-1, 3)
        assert (off[:, :2] <= SAME_POINT).mean() >= SAME_SHARE
        assert off[:, 2].max() <= SAME_SCORE


def away(same: Sequence[tuple[dict[str, Any], dict[str, Any]]], name: str) -> np.ndarray:
    """Differences between partners."""
    return np.abs([np.subtract(one[name], other[name]) for one, other in same])


@pytest.fixture
def peer(coco100: Path) -> TorchvisionMaskRCNN:
    """torchvision's R-50-FPN as it is with COCO's weights, with random ones that find objects in photographs."""
    torch.manual_seed(0)
    preset = PRESETS["r50_fpn"].model
    model = torchvision_model(replace(preset, num_classes=90, input=InputConfig(**SIDES)))
    overwrite_eps(model, 0.0)  # as torchvision does for its COCO weights
    find_objects(model, to_tensor(Image.open(photographs(coco100)[0]).convert("RGB")))
    return model


def photographs(folder: Path) -> list[Path]:
    """Some of the fifty validation images."""
    return sorted((folder / "val2017").glob("*.jpg"))[:: 50 // PHOTOGRAPHS][:PHOTOGRAPHS]


@pytest.mark.drill
@pytest.mark.coco100
def test_torchvisions_results_and_average_precision(
    peer: TorchvisionMaskRCNN, coco100: Path, ray_cluster: None, tmp_path: Path
) -> None:
    files = photographs(coco100)
    plain_loop(peer, files, tmp_path / "theirs.json", COCO_CATEGORIES_WITH_GAPS)
    theirs: Results = json.loads((tmp_path / "theirs.json").read_text())
    model = converted("torchvision", peer.state_dict(), tmp_path)
    config = json.loads((model / "config.json").read_text())
    config["model"]["input"] |= SIDES
    (model / "config.json").write_text(json.dumps(config))
    ours = predicted(model, files, tmp_path)
    check_same(ours, theirs)
    truth = moved_truth(theirs)
    for kind in ("bbox", "segm"):
        found, expected = (average_precision(truth, results, kind) for results in (ours, theirs))
        assert 0.2 < expected[0] < 0.8, "a truth that tells little"
        assert found == pytest.approx(expected, abs=SAME_AP)


def moved_truth(results: Results) -> dict[str, Any]:
    """Every other detection as an object that lies a little to the right and below: random weights find nothing that
    COCO has annotated."""
    annotations = []
    sizes = {each["image_id"]: each["segmentation"]["size"] for each in results}
    for i, each in enumerate(results[::2], start=1):
        bitmap = np.zeros(sizes[each["image_id"]], np.uint8)
        bitmap[SHIFT:, SHIFT:] = coco_mask.decode(each["segmentation"])[:-SHIFT, :-SHIFT]
        rle = coco_mask.encode(np.asfortranarray(bitmap))
        x, y, width, height = each["bbox"]
        about = {"image_id": each["image_id"], "category_id": each["category_id"], "iscrowd": 0, "id": i}
        annotations.append(
            {**about, "segmentation": rle, "area": int(bitmap.sum()), "bbox": [x + SHIFT, y + SHIFT, width, height]}
        )
    images = [{"id": image, "height": size[0], "width": size[1]} for image, size in sizes.items()]
    categories = [{"id": category.id, "name": category.name} for category in COCO_CATEGORIES_WITH_GAPS]
    return {"images": images, "annotations": annotations, "categories": categories}


def average_precision(truth: dict[str, Any], results: Results, kind: str) -> np.ndarray:
    """pycocotools' twelve numbers."""
    dataset = COCO()
    dataset.dataset = truth
    dataset.createIndex()
    evaluation = COCOeval(dataset, dataset.loadRes(results), kind)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return np.asarray(evaluation.stats)


def stored_results(name: str, image_id: str) -> Results:
    """What a peer found in an image of the oracle, with masks, their areas or keypoints where these are stored."""
    arrays = {
        key.removeprefix(f"{image_id}/"): values
        for key, values in oracle.read_npz(f"{name}_eval.npz").items()
        if key.startswith(f"{image_id}/")
    }
    is_torchvision = "labels" in arrays
    labels = arrays["labels"] - 1 if is_torchvision else arrays["classes"]
    categories = COCO_CATEGORIES_WITH_GAPS if is_torchvision else COCO_CATEGORIES
    boxes = np.concatenate([arrays["boxes"][:, :2], arrays["boxes"][:, 2:] - arrays["boxes"][:, :2]], axis=1)
    rles = oracle.read_json("paste_rle.json")[image_id]  # of torchvision's masks
    results = []
    for i, (label, box, score) in enumerate(zip(labels, boxes, arrays["scores"], strict=True)):
        entry = {
            "image_id": int(image_id),
            "category_id": categories[label].id,
            "bbox": box.tolist(),
            "score": float(score),
        }
        if "mask_areas" in arrays:
            entry["area"] = int(arrays["mask_areas"][i])
        if is_torchvision:
            entry["segmentation"] = {"size": rles["size"], "counts": rles["torchvision"][i]}
        if "keypoints" in arrays:
            # detectron2 takes the half pixel away where it writes results
            entry["keypoints"] = (arrays["keypoints"][i] - [0.5, 0.5, 0.0]).ravel().tolist()
        results.append(entry)
    return results


@pytest.mark.drill
@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        ("tv_maskrcnn_r50_fpn", "17627"),
        ("d2_mask_R_50_FPN", "6818"),
        ("d2_keypoint_R_50_FPN", "87038"),
    ],
)
def test_stored_results_at_the_checkpoints_own_size(
    name: str, image_id: str, ray_cluster: None, tmp_path: Path
) -> None:
    state = oracle.filled_state(name)
    if name.startswith("tv_"):
        model = converted("torchvision", state, tmp_path, norm_eps=1e-5)
    else:
        model = converted("detectron2", {"model": state}, tmp_path)
    file = oracle.oracle_folder() / oracle.read_json("images.json")[image_id]["file"]
    ours, theirs = predicted(model, [file], tmp_path), stored_results(name, image_id)
    check_same(ours, theirs)
