"""Pictures are looked at by people; here: that everything is drawn where it belongs, and only that."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mrcnn.structures import Category, Detections
from mrcnn.visualize import LEFT, MIN_SIDE, RIGHT, class_color, draw_detections, draw_instances, draw_results

CATEGORIES = (Category(3, "cat"), Category(7, "a rather long name"), Category(9, "yak"))


def gray(height: int, width: int) -> np.ndarray:
    return np.full((height, width, 3), 100, np.uint8)


def detections(size: tuple[int, int], *boxes: tuple[float, ...], scores: tuple[float, ...]) -> Detections:
    n = len(boxes)
    return Detections(
        boxes=torch.tensor(boxes).reshape(n, 4),
        labels=torch.arange(n) % 3 + 1,
        scores=torch.tensor(scores),
        mask_probs=torch.ones(n, 28, 28),
        image_size=size,
    )


def changed(picture: np.ndarray) -> np.ndarray:
    return (picture != 100).any(axis=2)


def test_a_large_image_keeps_its_size_and_what_is_outside_stays() -> None:
    image = gray(900, 1200)
    found = detections((900, 1200), (100.0, 200.0, 300.0, 500.0), scores=(0.9,))
    picture = draw_detections(image, found, CATEGORIES)
    assert picture.shape == image.shape
    assert picture.dtype == np.uint8
    assert (image == 100).all()
    touched = changed(picture)
    assert touched[210:490, 110:290].all()
    assert not touched[510:].any()
    assert not touched[:, 320:].any()
    inside = picture[350, 200].astype(int)
    color = np.array(class_color(1))
    assert np.abs(inside - (0.55 * 100 + 0.45 * color)).max() <= 2


def test_a_small_image_is_enlarged_and_its_label_readable() -> None:
    found = detections((96, 128), (20.0, 30.0, 100.0, 80.0), scores=(0.9,))
    picture = draw_detections(gray(96, 128), found, CATEGORIES)
    assert max(picture.shape) == MIN_SIDE
    scale = MIN_SIDE / 128
    top = round(30 * scale)
    label = picture[top - 10 : top, round(20 * scale) + 1 : round(20 * scale) + 30].reshape(-1, 3).astype(int)
    brightness = label.sum(axis=1)
    assert brightness.max() - brightness.min() > 200  # ink on colour


def test_only_confident_detections_are_drawn() -> None:
    found = detections((600, 800), (0.0, 0.0, 100.0, 100.0), (400.0, 300.0, 500.0, 400.0), scores=(0.9, 0.4))
    left_out = changed(draw_detections(gray(600, 800), found, CATEGORIES))
    assert not left_out[250:, 350:].any()
    drawn = changed(draw_detections(gray(600, 800), found, CATEGORIES, score_threshold=0.3))
    assert drawn[310:390, 410:490].all()


def test_the_best_detection_is_on_top() -> None:
    found = detections((600, 800), *[(100.0, 100.0, 300.0, 300.0)] * 2, scores=(0.9, 0.8))
    picture = draw_detections(gray(600, 800), found, CATEGORIES)
    first, second = (np.array(class_color(label)) for label in (1, 2))
    under = 0.55 * 100 + 0.45 * second
    assert np.abs(picture[200, 200] - (0.55 * under + 0.45 * first)).max() <= 3


@pytest.mark.parametrize("size", [(20, 300), (300, 20), (1, 1), (800, 1333)])
def test_any_shape_and_crowded_corners_work(size: tuple[int, int]) -> None:
    height, width = float(size[0]), float(size[1])
    boxes = [(0.0, 0.0, width, height)] * 40 + [(width - 1, height - 1, width, height)] * 10
    found = detections(size, *boxes, scores=(0.9,) * 50)
    picture = draw_detections(gray(*size), found, CATEGORIES)
    assert changed(picture).any()
    assert max(picture.shape) >= MIN_SIDE


def test_nothing_found_gives_the_image_itself() -> None:
    image = np.random.default_rng(0).integers(0, 256, (600, 800, 3), dtype=np.uint8)
    assert (draw_detections(image, detections((600, 800), scores=()), CATEGORIES) == image).all()


def test_an_image_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(50, 60\) pixels, but the detections are for \(96, 128\)"):
        draw_detections(gray(50, 60), detections((96, 128), scores=()), CATEGORIES)


def test_annotations_with_polygons_runs_and_without_masks() -> None:
    bitmap = np.zeros((600, 800), np.uint8, order="F")
    bitmap[300:400, 500:600] = 1
    rle = {"size": [600, 800], "counts": coco_mask.encode(bitmap)["counts"].decode()}
    square = [100.0, 100.0, 200.0, 100.0, 200.0, 200.0, 100.0, 200.0]
    instances = [
        instance(1, [100, 100, 200, 200], {"polygons": [square], "rle": None}),
        instance(2, [500, 300, 600, 400], {"polygons": None, "rle": rle}, iscrowd=True),
        instance(3, [300, 400, 380, 480], None),
    ]
    touched = changed(draw_instances(gray(600, 800), instances, CATEGORIES))
    assert touched[110:190, 110:190].all()
    assert touched[310:390, 510:590].all()
    assert not touched[410:470, 310:370].any()  # only its box
    assert touched[400, 300:380].all()


def instance(label: int, box: list[float], segmentation: object, *, iscrowd: bool = False) -> dict:
    return {"label": label, "box": box, "iscrowd": iscrowd, "segmentation": segmentation}


@pytest.mark.parametrize("size", [(600, 800), (60, 80)])
def test_a_thumbnail_has_its_size_and_no_labels(size: tuple[int, int]) -> None:
    height, width = size
    bitmap = np.zeros(size, np.uint8, order="F")
    bitmap[height // 2 : 3 * height // 4, width // 4 : width // 2] = 1
    rle = {"size": list(size), "counts": coco_mask.encode(bitmap)["counts"].decode()}
    box = [width / 4, height / 2, width / 4, height / 4]
    row = {"label": 1, "score": 0.9, "box": box, "rle": rle, "keypoints": None}
    picture = draw_results(gray(*size), [row], CATEGORIES, thumbnail=160)
    assert picture.shape == (120, 160, 3)
    touched = changed(picture)
    assert touched[62:88, 42:78].all()
    assert not touched[:57].any(), "there would be the label"
    assert not touched[93:].any()


def test_classes_have_colors_of_their_own() -> None:
    colors = {class_color(label) for label in range(1, 91)}
    assert len(colors) == 90
    assert max(max(color) for color in colors) <= 255


ARMS = ("nose", "left_elbow", "left_wrist", "right_wrist")
PERSON = (Category(1, "person", ARMS),)


def color_at(picture: np.ndarray, x: int, y: int) -> tuple[int, ...]:
    return tuple(picture[y, x].tolist())


def test_keypoints_and_coco_limbs_of_annotations() -> None:
    points = [200, 100, 2, 100, 200, 2, 100, 300, 1, 0, 0, 0]
    one = instance(1, [50, 50, 350, 350], None) | {"keypoints": points}
    picture = draw_instances(gray(600, 800), [one], PERSON)
    assert color_at(picture, 200, 100) == class_color(1)
    assert color_at(picture, 100, 200) == LEFT
    assert color_at(picture, 100, 250) == LEFT  # the limb
    assert color_at(picture, 100, 300) == (0, 0, 0)  # hidden: a ring
    assert not changed(picture)[:40, :40].any()  # not annotated: no limb to its zeros, either
    hidden = draw_instances(gray(600, 800), [one | {"keypoints": None}], PERSON)
    assert not changed(hidden)[180:320, 90:110].any()


def test_keypoints_of_detections_without_masks() -> None:
    points = torch.tensor([[[200.0, 100, 0.9], [100, 200, 0.9], [100, 300, 0.01], [300, 300, 0.9]]])
    found = Detections(
        boxes=torch.tensor([[50.0, 50, 350, 350]]),
        labels=torch.tensor([1]),
        scores=torch.tensor([0.9]),
        image_size=(600, 800),
        keypoints=points,
    )
    picture = draw_detections(gray(600, 800), found, PERSON)
    assert color_at(picture, 300, 300) == RIGHT
    assert not changed(picture)[230:320, 90:110].any()  # not sure enough, and so is its limb
    sure = draw_detections(gray(600, 800), found, PERSON, keypoint_threshold=0.0)
    assert color_at(sure, 100, 300) == color_at(sure, 100, 250) == LEFT
    assert not changed(picture)[150:180, 250:340].any()  # the box is empty: there is no mask
    unnamed = draw_detections(gray(600, 800), found, (Category(1, "person"),))
    assert color_at(unnamed, 300, 300) == class_color(1)
