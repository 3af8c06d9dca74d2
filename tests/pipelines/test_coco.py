"""COCO files: what is not COCO is refused, what is wrong in one is rejected, the rest survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask
from sources import built, write_image

from pipelines.config import BuildConfig
from pipelines.manifest import LostError
from pipelines.records import ImageRecord, Objects, SourceData
from pipelines.rle import bitmap_from_ends, segmentation_ends
from pipelines.scaling import Scaling, scale_instance
from pipelines.sources import coco as coco_module
from pipelines.sources.coco import coco_objects, read_coco
from pipelines.validate import AnnotationError, min_extent, to_instance

SQUARE = [1.0, 1.0, 5.0, 1.0, 5.0, 5.0, 1.0, 5.0]
SIZE = (10, 12)


def image(id_: Any = 1, **other: Any) -> dict[str, Any]:
    return {"id": id_, "file_name": f"{id_}.jpg", "height": 10, "width": 12, **other}


def annotation(id_: Any = 1, **other: Any) -> dict[str, Any]:
    common = {"image_id": 1, "category_id": 7, "bbox": [1, 1, 4, 4], "area": 16, "iscrowd": 0}
    return {"id": id_, **common, "segmentation": [SQUARE], **other}


def read(path: str) -> SourceData:
    images = Path(path).parent / "images"
    images.mkdir(exist_ok=True)
    return read_coco(BuildConfig(images=str(images), annotations=path, out="unused"))


def objects(source: SourceData, record: ImageRecord | None = None) -> Objects:
    """Of the first record, if no other is given."""
    return coco_objects(record or source.records[0], (), source.categories)


def coco(tmp_path: Path, **parts: Any) -> str:
    categories = [{"id": 7, "name": "seven"}, {"id": 3, "name": "three"}]
    content = {"images": [image()], "annotations": [annotation()], "categories": categories, **parts}
    path = tmp_path / "coco.json"
    path.write_text(json.dumps(content))
    return str(path)


def test_names_of_categories_are_text(tmp_path: Path) -> None:
    """JSON's escapes may be none: the manifest could not be written."""
    write_image(tmp_path / "a.png")
    person = {"id": 1, "name": "a\ud800", "keypoints": ["\ud800b"]}
    content = {"images": [{"id": 1, "file_name": "a.png"}], "annotations": [], "categories": [person]}
    (tmp_path / "coco.json").write_text(json.dumps(content))
    made = built(tmp_path / "out", images=str(tmp_path), annotations=str(tmp_path / "coco.json"))
    assert made.classes == ["a\\ud800"]


def test_labels_follow_sorted_category_ids(tmp_path: Path) -> None:
    source = read(coco(tmp_path))
    assert [(each.id, each.name) for each in source.categories] == [(3, "three"), (7, "seven")]
    assert [each["label"] for each in objects(source).usable] == [2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ('{"images": [', "not valid JSON"),
        ("[1, 2]", "a list where an object"),
        ("{}", "no list 'images'"),
        ('{"images": [{}], "annotations": []}', "no list 'categories'"),
        ('{"images": [{}], "categories": {}}', "'categories' is not a list"),
        ('{"images": [], "categories": [1]}', "no images"),
        ('{"images": [{}], "categories": [], "annotations": []}', "no categories"),
        ('{"images": [{}], "categories": [{"id": "x"}]}', "category"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}', "twice"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a"}], "annotations": 3}', "not a list"),
        (
            json.dumps({"images": [{}], "categories": [{"id": i, "name": "a"} for i in range(32768)]}),
            "has 32768 categories, shards have room for 32767",
        ),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a", "keypoints": 17}]}', "no list of differing names"),
        ('{"images": [{}], "categories": [{"id": 1, "name": "a", "keypoints": ["x", "x"]}]}', "no list of differing"),
    ],
)
def test_what_is_not_coco_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read(str(path))
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
        (image(1.5), "image id is not a whole number: 1.5"),
        (image("2"), "image id is not a whole number: '2'"),
        (image(True), "image id is not a whole number: True"),
        (image(2**63), "image id is not a whole number"),
        (image(1.0), "duplicate image id"),
        (image(2, file_name="a\0b"), "file name leads out"),
        (image(2, file_name="a\ud800.jpg"), "file name is not Unicode"),
    ],
)
def test_bad_images_are_rejected(tmp_path: Path, bad: Any, reason: str) -> None:
    source = read(coco(tmp_path, images=[image(), bad]))
    assert len(source.records) == 1
    (reject,) = source.rejects
    assert reject.stage == "source"
    assert reject.reason.startswith(reason)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (annotation(1), "duplicate annotation id"),
        (annotation(1.0), "duplicate annotation id"),
        (annotation(2, image_id=99), "no such image: image_id 99"),
        (annotation(2, image_id="1"), "no such image: image_id '1'"),
        (annotation(2, image_id=5), "image rejected: image has no file_name"),
        (None, "no such image"),
    ],
)
def test_annotations_of_no_image_are_rejected(tmp_path: Path, bad: Any, reason: str) -> None:
    images = [image(), image(5, file_name=3)]
    source = read(coco(tmp_path, images=images, annotations=[annotation(), bad]))
    assert len(objects(source).usable) == 1
    (reject,) = source.rejected_annotations
    assert reject.stage == "source"
    assert reject.reason.startswith(reason)
    assert source.annotations == 2


def test_annotations_of_a_rejected_image_tell_which(tmp_path: Path) -> None:
    images = [image(), image(5, file_name="../x.jpg")]
    source = read(coco(tmp_path, images=images, annotations=[annotation(), annotation(2, image_id=5)]))
    assert [each.uri for each in source.rejected_annotations] == [each.uri for each in source.rejects]
    assert source.rejects[0].uri.endswith("/../x.jpg")


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (annotation("x"), "annotation id is not a whole number: 'x'"),
        (annotation(2.5), "annotation id is not a whole number: 2.5"),
        ({"image_id": 1, "segments_info": []}, "annotation is COCO's panoptic: give its instances file"),
        (annotation(2, category_id=8), "unknown category: 8"),
        (annotation(2, category_id=None), "unknown category: None"),
        (annotation(2, category_id="7"), "unknown category: '7'"),
    ],
)
def test_bad_annotations_are_rejected(tmp_path: Path, bad: Any, reason: str) -> None:
    found = objects(read(coco(tmp_path, annotations=[annotation(), bad])))
    assert [each["id"] for each in found.usable] == [1]
    assert [why for _, why in found.rejected] == [reason]


def test_a_lost_image_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = coco(tmp_path, images=[image(1), image(2), image("bad")])
    records = coco_module._Content.records
    monkeypatch.setattr(coco_module._Content, "records", lambda self: records(self)[1:])
    with pytest.raises(LostError, match="3 images went in, 1 were used and 1 rejected"):
        read(path)


def test_whole_numbers_may_be_written_as_floats(tmp_path: Path) -> None:
    """As pandas writes a column in which one value was missing."""
    source = read(
        coco(tmp_path, images=[image(1.0, height=10.0)], annotations=[annotation(1.0, image_id=1.0, category_id=7.0)])
    )
    (record,) = source.records
    assert (record.image_id, record.height, type(record.height)) == (1, 10, int)
    assert [(each["id"], each["category_id"]) for each in objects(source).usable] == [(1, 7)]
    assert not source.rejected_annotations


def test_images_of_lvis_are_named_by_their_address(tmp_path: Path) -> None:
    address = "http://images.cocodataset.org/val2017/000000000139.jpg"
    odd = [image(3, file_name=None, coco_url="http://x/../a.jpg"), image(4, file_name=None, coco_url=5)]
    signed = image(6, file_name=None, coco_url=f"{address}?sig=a/b/c")
    listed = [image(1, file_name=None, coco_url=address), image(2, coco_url=address), signed, *odd]
    source = read(coco(tmp_path, images=listed))
    assert [each.file_name for each in source.records] == [
        "val2017/000000000139.jpg", "2.jpg", "val2017/000000000139.jpg",
    ]  # fmt: skip
    reasons = ["file name leads out of the image folder", "image has no file_name"]
    assert [each.reason for each in source.rejects] == reasons


def test_image_info_has_images_alone(tmp_path: Path) -> None:
    """test2017 has categories, an unlabeled set may have none."""
    path = tmp_path / "image_info.json"
    path.write_text(json.dumps({"images": [image()], "categories": [{"id": 7, "name": "seven"}]}))
    source = read(str(path))
    assert [each.name for each in source.categories] == ["seven"]
    assert (len(source.records), source.annotations, objects(source)) == (1, 0, Objects(height=10, width=12))
    path.write_text(json.dumps({"images": [image()]}))
    assert read(str(path)).categories == ()


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
    source = read(coco(tmp_path, annotations=annotations, categories=categories))
    assert [each.keypoints for each in source.categories] == [(), ("left_eye", "right_eye")]
    found = objects(source)
    assert [each["id"] for each in found.usable] == [1, 2, 4, 5]
    assert found.rejected == [(3, "keypoints are not those of the category: 3 numbers for 2 keypoints")]
    kept = [to_instance(each, SIZE)["keypoints"] for each in found.usable]
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
        ({"bbox": [3, 3, 1e-6, 4]}, "box has no extent: 1e-06 x 4 in the image"),
        ({"bbox": [-5, 3, 5 + 1e-6, 4]}, "box has no extent"),
        ({"segmentation": [[1, 1, 2, 2, 3, float("nan")]]}, "polygon is not a list of finite"),
        ({"segmentation": [[1, 1, 2, 2, 1e8, 3]]}, "polygon lies far outside"),
        ({"segmentation": [[-9, -9, 20, -9, 5, 19] * 40]}, "polygon has too long an outline"),
        ({"segmentation": "mask"}, "segmentation is neither"),
        ({"segmentation": {"size": [9, 12], "counts": [108]}}, "run lengths are for another size"),
        ({"segmentation": {"size": "\ud800", "counts": "1"}}, r"run lengths are for another size: '\\ud800'"),
        ({"segmentation": {"size": [10, 12], "counts": "0" + "oooooooo9" * 60_000}}, "run lengths are damaged"),
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
        ({"keypoints": [1, 2, 2, 1, -11, 1]}, "keypoint lies far outside"),
    ],
)
def test_unusable_geometry_has_its_reason(wrong: dict, reason: str) -> None:
    with pytest.raises(AnnotationError, match=reason):
        to_instance({**annotation(), "label": 2, **wrong}, SIZE)


@pytest.mark.parametrize("factor", [0.01, 0.37, 1.0, 7.0])
@pytest.mark.parametrize("side", [100, 5000, 80_000_000])
def test_the_smallest_box_keeps_its_extent_in_float32(side: int, factor: float) -> None:
    """Or the build would accept what verify-data calls broken."""
    given, extent = {**annotation(), "label": 2, "segmentation": None}, 1.001 * min_extent(side)
    for left in np.linspace(0, side - extent, 1001)[:-1].tolist():
        instance = to_instance({**given, "bbox": [left, 0, extent, 1]}, (1, side))
        x1, _, x2, _ = np.multiply(instance["box"], factor).astype(np.float32)
        assert x1 < x2


def test_everything_is_scaled_with_the_image() -> None:
    scaling = Scaling(before=(10, 12), after=(20, 36))
    given = annotation(label=2, keypoints=[1, 2, 2, 0, 0, 0])
    instance = scale_instance(to_instance(given, scaling.before), scaling)
    assert instance["box"] == [3, 2, 15, 10]
    assert instance["area"] == 16 * 6
    assert instance["segmentation"]["polygons"] == [[3, 2, 15, 2, 15, 10, 3, 10]]
    assert instance["keypoints"] == [4, 4.5, 2, 0, 0, 0], "pixel numbers, so that centres scale; unlabelled stay"


def test_box_is_clipped_to_the_image() -> None:
    assert to_instance(annotation(label=2, bbox=[-3, 4, 100, 3]), SIZE)["box"] == [0, 4, 12, 7]


def test_outlines_may_be_as_long_as_any_mask_has() -> None:
    """Of every other pixel a polygon, and some around an image of a single one. An unlabelled keypoint is nowhere."""
    pixels = [[x, y, x + 1, y, x + 1, y + 1, x, y + 1] for y in range(10) for x in range(y % 2, 12, 2)]
    given = annotation(label=2, segmentation=pixels, keypoints=[-1e6, 1e6, 0])
    assert len(to_instance(given, SIZE)["segmentation"]["polygons"]) == 60
    large = [[-1, -1, 2, -1, 2, 2, -1, 2]] * 16
    assert to_instance(annotation(label=2, bbox=[0, 0, 1, 1], segmentation=large), (1, 1))


@pytest.mark.parametrize("nothing", [None, [], [[]]])
def test_an_object_may_have_a_box_alone(nothing: Any) -> None:
    """In each of the ways in which programs write that there is no more."""
    instance = to_instance(annotation(label=2, segmentation=nothing, area=None, iscrowd=None, keypoints=None), SIZE)
    assert (instance["segmentation"], instance["area"], instance["iscrowd"]) == (None, 16, False)


def test_run_lengths_of_either_kind_are_the_same_mask() -> None:
    bitmap = np.zeros((10, 12), np.uint8)
    bitmap[2:7, 3:9] = 1
    compressed = coco_mask.encode(np.asfortranarray(bitmap))["counts"].decode()
    flat = bitmap.ravel(order="F")
    runs = np.diff([0, *(np.flatnonzero(np.diff(flat)) + 1), flat.size]).tolist()
    for counts in (compressed, runs):
        rle = {"size": [10, 12], "counts": counts}
        instance = to_instance(annotation(label=2, iscrowd=1, segmentation=rle), SIZE)
        assert instance["iscrowd"] is True
        assert instance["segmentation"]["rle"] == {"size": [10, 12], "counts": compressed}
        ends = segmentation_ends(instance["segmentation"], 10, 12)
        np.testing.assert_array_equal(bitmap_from_ends(ends, 10, 12), bitmap)


@pytest.mark.coco100
@pytest.mark.parametrize("kind", ["instances", "person_keypoints"])
def test_real_files_have_no_rejects(coco100: Path, kind: str) -> None:
    annotations = str(coco100 / f"annotations/{kind}_train2017.json")
    source = read_coco(BuildConfig(images=str(coco100 / "train2017"), annotations=annotations, out="unused"))
    assert len(source.records) == 50
    assert not source.rejected_annotations
    assert {len(category.keypoints) for category in source.categories} == ({0} if kind == "instances" else {17})
    for record in source.records:
        assert record.height is not None
        assert record.width is not None
        size = (record.height, record.width)
        for each in objects(source, record).usable:
            to_instance(each, size)
