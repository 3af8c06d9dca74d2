"""COCO files: what is not COCO is refused, what is wrong in one is rejected, the rest survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from pipelines.rle import bitmap_from_ends, segmentation_ends
from pipelines.scaling import Scaling
from pipelines.sources.coco import read_coco
from pipelines.storage import open_store
from pipelines.validate import AnnotationError, to_instance

IMAGES = open_store("/images")
SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
SAME = Scaling(before=(10, 12), after=(10, 12))


def image(id_: Any = 1, **other: Any) -> dict[str, Any]:
    return {"id": id_, "file_name": f"{id_}.jpg", "height": 10, "width": 12, **other}


def annotation(id_: Any = 1, **other: Any) -> dict[str, Any]:
    common = {"image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    return {"id": id_, **common, "segmentation": [SQUARE], **other}


def coco(tmp_path: Path, **parts: Any) -> str:
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    content = {"images": [image()], "annotations": [annotation()], "categories": categories, **parts}
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_labels_follow_sorted_category_ids(tmp_path: Path) -> None:
    source = read_coco(coco(tmp_path), IMAGES)
    assert [(each.id, each.name) for each in source.categories] == [(3, "three"), (7, "seven")]
    assert source.records[0].annotations[0]["label"] == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"images": [', "not valid JSON"),
        ("[1, 2]", "a list where an object"),
        ("{}", "no list 'images'"),
        ('{"images": [{}]}', "no list 'categories'"),
        ('{"images": [], "categories": [1]}', "no images"),
        ('{"images": [{}], "categories": []}', "no categories"),
        ('{"images": [{}], "categories": [{"id": "x"}]}', "category"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "twice"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a"}], "annotations": 3}', "not a list"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a", "keypoints": 17}]}', "no list of differing names"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a", "keypoints": ["x", "x"]}]}', "no list of differing"),
    ],
)
def test_what_is_not_coco_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_coco(str(path), IMAGES)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (image(), "duplicate image id"),
        (image("two"), "image id is not a whole number"),
        (image(2, file_name=None), "image has no file_name"),
        (image(2, file_name="../x.jpg"), "file name leads out"),
        (image(2, file_name="/etc/x.jpg"), "file name leads out"),
        (image(2, height=0), "image height is not"),
        (image(2, width=float("nan")), "image width is not"),
        ("text", "image id is not"),
    ],
)
def test_bad_images_are_rejected(tmp_path: Path, bad: Any, reason: str) -> None:
    source = read_coco(coco(tmp_path, images=[image(), bad]), IMAGES)
    assert len(source.records) == 1
    (reject,) = source.rejects
    assert reject.stage == "source"
    assert reject.reason.startswith(reason)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (annotation(1), "duplicate annotation id"),
        (annotation("x"), "annotation id is not"),
        (annotation(2, image_id=99), "no such image: image_id 99"),
        (annotation(2, category_id=8), "unknown category: 8"),
        (annotation(2, image_id=5), "image rejected: image has no file_name"),
        (None, "no such image"),
    ],
)
def test_bad_annotations_are_rejected(tmp_path: Path, bad: Any, reason: str) -> None:
    images = [image(), image(5, file_name=3)]
    source = read_coco(coco(tmp_path, images=images, annotations=[annotation(), bad]), IMAGES)
    assert len(source.records[0].annotations) == 1
    (reject,) = source.rejected_annotations
    assert reject.reason.startswith(reason)


def test_keypoints_are_as_many_as_their_category_names(tmp_path: Path) -> None:
    categories = [{"id": 7, "name": "seven", "keypoints": ["left_eye", "right_eye"]}, {"id": 3, "name": "three"}]
    both, none, one = [1, 2, 2, 3, 4, 1], [], [1, 2, 2]
    annotations = [
        annotation(1, keypoints=both),
        annotation(2, keypoints=none),
        annotation(3, keypoints=one),
        annotation(4, category_id=3, keypoints=one),
        annotation(5),
    ]
    source = read_coco(coco(tmp_path, annotations=annotations, categories=categories), IMAGES)
    assert [each.keypoints for each in source.categories] == [(), ("left_eye", "right_eye")]
    assert [each["id"] for each in source.records[0].annotations] == [1, 2, 4, 5]
    (reject,) = source.rejected_annotations
    assert reject.annotation_id == 3
    assert reject.reason == "keypoints are not those of the category: 3 numbers for 2 keypoints"
    kept = [to_instance(each, SAME)["keypoints"] for each in source.records[0].annotations]
    assert kept == [both, None, one, None]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ({"bbox": None}, "box is not a list"),
        ({"bbox": [1, 1, 4]}, "box does not have four numbers"),
        ({"bbox": [1, 1, float("nan"), 4]}, "box is not a list of finite"),
        ({"bbox": [1, 1, 0, 4]}, "box has no extent"),
        ({"bbox": [1, 1, -3, 4]}, "box has no extent"),
        ({"bbox": [20, 1, 3, 4]}, "box lies outside"),
        ({"area": float("inf")}, "area is not"),
        ({"area": -1}, "area is negative"),
        ({"iscrowd": 2}, "iscrowd"),
        ({"segmentation": [[1, 1, 2, 2]]}, "polygon has fewer than three points"),
        ({"segmentation": [[*SQUARE, 1.0]]}, "polygon has fewer than three points or an odd count"),
        ({"segmentation": [[1, 1, 2, 2, 3, 3]]}, "polygon has no area"),
        ({"segmentation": [[1, 1, 2, 2, 3, float("nan")]]}, "polygon is not a list of finite"),
        ({"segmentation": [[1, 1, 2, 2, 1e8, 3]]}, "polygon lies far outside"),
        ({"segmentation": "mask"}, "segmentation is neither"),
        ({"segmentation": {"size": [9, 12], "counts": [108]}}, "run lengths are for another size"),
        ({"segmentation": {"size": [10, 12], "counts": [100]}}, "run lengths do not fill"),
        ({"segmentation": {"size": [10, 12], "counts": [-1, 121]}}, "run lengths are damaged"),
        ({"segmentation": {"size": [10, 12], "counts": []}}, "run lengths do not fill"),
        ({"segmentation": {"size": [10, 12], "counts": "\x7f"}}, "run lengths are damaged"),
        ({"keypoints": [1, 2]}, "keypoints are not triples"),
        ({"keypoints": ["a"]}, "keypoints is not a list"),
        ({"keypoints": 5}, "keypoints is not a list"),
        ({"keypoints": [1, float("inf"), 2]}, "keypoints is not a list of finite"),
        ({"keypoints": [1, 2, 3]}, "keypoint visibility is neither 0, 1 nor 2: 3"),
        ({"keypoints": [1, 2, 0.5]}, "keypoint visibility is neither"),
    ],
)
def test_unusable_geometry_has_its_reason(wrong: dict, reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason):
        to_instance({**annotation(), "label": 2, **wrong}, SAME)


def test_everything_is_scaled_with_the_image() -> None:
    scaling = Scaling(before=(10, 12), after=(20, 36))
    given = annotation(label=2, keypoints=[1, 2, 2, 0, 0, 0])
    instance = to_instance(given, scaling)
    assert instance["box"] == [3, 2, 15, 10]
    assert instance["area"] == 16 * 6
    assert instance["segmentation"]["polygons"] == [[3, 2, 15, 2, 15, 10, 3, 10]]
    assert instance["keypoints"] == [4, 4.5, 2, 0, 0, 0], "pixel numbers, so that centres scale; unlabelled stay"


def test_box_is_clipped_to_the_image() -> None:
    assert to_instance(annotation(label=2, bbox=[-3, 4, 100, 3]), SAME)["box"] == [0, 4, 12, 7]


def test_run_lengths_of_either_kind_are_the_same_mask() -> None:
    bitmap = np.zeros((10, 12), np.uint8)
    bitmap[2:7, 3:9] = 1
    compressed = coco_mask.encode(np.asfortranarray(bitmap))["counts"].decode()
    flat = bitmap.ravel(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    for counts in (compressed, runs):
        rle = {"size": [10, 12], "counts": counts}
        instance = to_instance(annotation(label=2, iscrowd=1, segmentation=rle), SAME)
        assert instance["iscrowd"] is True
        assert instance["segmentation"]["rle"] == {"size": [10, 12], "counts": compressed}
        ends = segmentation_ends(instance["segmentation"], 10, 12)
        np.testing.assert_array_equal(bitmap_from_ends(ends, 10, 12), bitmap)


@pytest.mark.coco100
@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
def test_real_files_have_no_rejects(coco100: Path, kind: str) -> None:
    source = read_coco(str(coco100 / f"annotations/{kind}_train2017.json"), open_store(str(coco100 / "train2017")))
    assert len(source.records) == 50
    assert not source.rejected_annotations
    assert {len(category.keypoints) for category in source.categories} == ({0} if kind == "instances" else {17})
    for record in source.records:
        assert record.height is not None
        assert record.width is not None
        size = (record.height, record.width)
        for each in record.annotations:
            to_instance(each, Scaling(size, (size[0] * 2, size[1] * 2)))
