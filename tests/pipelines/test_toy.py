"""Toy data: the same bytes for the same seed, masks exact to the pixel."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipelines.storage import open_store
from pipelines.toy import MIN_VISIBLE, ToySummary, make_toy_data, make_toy_image


def bitmap(annotation: dict, height: int, width: int) -> np.ndarray:
    rle = annotation["segmentation"]
    if not isinstance(rle, dict):
        rle = coco_mask.merge(coco_mask.frPyObjects(rle, height, width))
    return coco_mask.decode(rle)


def test_same_seed_same_bytes_whatever_the_number(toy_data: ToySummary, tmp_path: Path) -> None:
    fewer = make_toy_data(str(tmp_path / "fewer"), images=3, seed=5, size=96)
    other = make_toy_data(str(tmp_path / "other"), images=3, seed=6, size=96)
    for name in open_store(fewer.images_uri).list():
        data = (Path(fewer.images_uri) / name).read_bytes()
        assert data == (Path(toy_data.images_uri) / name).read_bytes()
        assert data != (Path(other.images_uri) / name).read_bytes()


def test_masks_boxes_and_areas_agree(toy_data: ToySummary) -> None:
    coco = json.loads(Path(toy_data.annotations_uri).read_text())
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    covered = {id_: np.zeros(size, int) for id_, size in sizes.items()}
    for annotation in coco["annotations"]:
        mask = bitmap(annotation, *sizes[annotation["image_id"]])
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        box = [columns[0], rows[0], columns[-1] + 1 - columns[0], rows[-1] + 1 - rows[0]]
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == box
        covered[annotation["image_id"]] += mask
    assert all(each.max() == 1 for each in covered.values()), "a pixel belongs to the topmost object alone"
    kinds = {type(annotation["segmentation"]) for annotation in coco["annotations"]}
    assert kinds == {list, dict}, "both polygons and run lengths occur"


def test_paint_is_where_the_mask_is() -> None:
    image = make_toy_image(seed=1, index=0, size=128, objects=(1, 1))
    (annotation,) = image.annotations
    mask = bitmap(annotation, *image.pixels.shape[:2]).astype(bool)
    values = image.pixels.astype(int)
    saturation = values.max(axis=2) - values.min(axis=2)
    assert np.median(saturation[mask]) > 2 * np.median(saturation[~mask])


def test_objects_stay_visible_and_shapes_vary() -> None:
    images = [make_toy_image(seed=2, index=i, size=64) for i in range(40)]
    assert {2, 3, 4, 5} == {len(image.annotations) for image in images}
    assert {1, 3, 7, 12} == {each["category_id"] for image in images for each in image.annotations}
    assert len({image.pixels.shape for image in images}) > 10
    smallest = min(each["area"] for image in images for each in image.annotations)
    assert smallest > MIN_VISIBLE * 0.5 * (64 / 6 / 2) ** 2


def test_keypoints_are_ends_and_centre_and_change_nothing_else(toy_data: ToySummary, tmp_path: Path) -> None:
    made = make_toy_data(str(tmp_path), images=16, seed=5, size=96, keypoints=True)
    coco, plain = (json.loads(Path(each.annotations_uri).read_text()) for each in (made, toy_data))
    name = "images/000000000003.jpg"
    assert (tmp_path / name).read_bytes() == (Path(toy_data.out) / name).read_bytes()
    assert not any("keypoints" in each for each in plain["annotations"] + plain["categories"])
    assert all(each["keypoints"] == ["left_end", "right_end", "centre"] for each in coco["categories"])
    sizes = {image["id"]: (image["height"], image["width"]) for image in coco["images"]}
    seen = []
    for annotation, same in zip(coco["annotations"], plain["annotations"], strict=True):
        points = np.array(annotation["keypoints"]).reshape(-1, 3)
        assert annotation["num_keypoints"] == (points[:, 2] > 0).sum()
        assert not points[points[:, 2] == 0].any()
        seen += points[:, 2].tolist()
        height, width = sizes[annotation["image_id"]]
        assert ((points[:, :2] >= 0) & (points[:, :2] <= [width - 1, height - 1])).all()
        x, y, w, h = annotation["bbox"]
        if isinstance(annotation["segmentation"], list) and points[:, 2].all():  # nothing covers it
            assert points[0, 0] == pytest.approx(x - 0.5, abs=2)
            assert points[1, 0] == pytest.approx(x + w - 0.5, abs=2)
            assert (points[2, :2] > [x, y]).all()
            assert (points[2, :2] < [x + w, y + h]).all()
        assert same == {key: value for key, value in annotation.items() if "keypoints" not in key}
    assert set(seen) == {0, 1, 2}


def test_writes_to_s3(s3: str) -> None:
    toy = make_toy_data(f"{s3}/toy", images=2, seed=1, size=32)
    assert list(open_store(toy.out).list()) == [
        "annotations.json",
        "images/000000000001.jpg",
        "images/000000000002.jpg",
    ]


@pytest.mark.parametrize("wrong", [{"images": 0}, {"size": 8}, {"objects": (3, 2)}])
def test_refuses_nonsense(wrong: dict, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="must be"):
        make_toy_data(str(tmp_path), **{"images": 1, "seed": 0, **wrong})
