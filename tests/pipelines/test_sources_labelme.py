"""LabelMe: shapes become objects, groups become one, what has no inside is rejected."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sources import Built, built, masks, write_image

from pipelines.build import prepare
from pipelines.config import BuildConfig
from pipelines.storage import Store
from pipelines.storage_errors import FileRefusedError

SQUARE = [[2.0, 2.0], [10.0, 2.0], [10.0, 10.0], [2.0, 10.0]]


def shape(label: Any = "cat", kind: str | None = "polygon", points: Any = None, group: Any = None) -> dict[str, Any]:
    return {"label": label, "points": points or SQUARE, "group_id": group, "shape_type": kind, "flags": {}}


def write(folder: Path, stem: str, shapes: Any, *, image: str | None = ".png", **other: Any) -> None:
    """A JSON and its image."""
    if image:
        write_image(folder / f"{stem}{image}")
    content = {"version": "5.5.0", "imagePath": f"{stem}.png", "imageData": None, "imageHeight": 24, "imageWidth": 32}
    (folder / f"{stem}.json").parent.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(json.dumps({**content, "shapes": shapes, **other}))


def labelme(tmp_path: Path, **settings: Any) -> Built:
    return built(tmp_path / "out", images=str(tmp_path / "data"), format="labelme", **settings)


def test_shapes_become_objects(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "a", [shape("dog"), shape("cat", "rectangle", [[30, 20], [12, 4]])], image=".JPG")
    write(data, "deep/er/b", [shape("cat", "circle", [[16, 12], [16, 22]]), shape("dog", None)])
    write(data, "c", [])
    made = labelme(tmp_path)
    assert made.classes == ["cat", "dog"], "sorted"
    first, empty, second = made.rows
    assert [row.uri.removeprefix(f"{data}/") for row in made.rows] == ["a.JPG", "c.png", "deep/er/b.png"]
    assert [(each["label"], each["category_id"], each["box"]) for each in first.instances] == [
        (2, 2, [2, 2, 10, 10]),
        (1, 1, [12, 4, 30, 20]),
    ]
    assert [each["area"] for each in first.instances] == [64, 18 * 16]
    assert masks(first)[1][4:20, 12:30].all()
    assert masks(first)[1].sum() == 18 * 16
    assert empty.instances == []
    circle, dog = second.instances
    assert circle["area"] == pytest.approx(math.pi * 100, rel=0.02)
    y, x = np.mgrid[:24, :32] + 0.5
    disc = (x - 16) ** 2 + (y - 12) ** 2 <= 100
    assert (masks(second)[0] != disc).sum() < 0.1 * disc.sum()
    assert dog["label"] == 2
    assert made.totals.annotations == made.totals.instances == 4
    assert not made.rejects


def test_a_group_of_a_label_is_one_object(tmp_path: Path) -> None:
    far = [[20.0, 12.0], [28.0, 12.0], [28.0, 20.0], [20.0, 20.0]]
    shapes = [shape(group=1), shape("dog", group=1), shape(points=far, group=1), shape(points=far, group=2), shape()]
    write(tmp_path / "data", "a", shapes)
    made = labelme(tmp_path)
    (row,) = made.rows
    assert [each["label"] for each in row.instances] == [1, 2, 1, 1]
    joined = row.instances[0]
    assert len(joined["segmentation"]["polygons"]) == 2
    assert (joined["box"], joined["area"]) == ([2, 2, 28, 20], 128)
    assert masks(row)[0][2:10, 2:10].all()
    assert masks(row)[0][12:20, 20:28].all()
    assert masks(row)[0].sum() == 128


def test_shapes_without_inside_are_rejected_alone(tmp_path: Path) -> None:
    shapes = [
        shape(),
        shape(kind="line"),
        shape(kind="point"),
        shape(kind="mask"),
        shape(points=SQUARE[:2]),
        shape(points=[[1, 2, 3]] * 3),
        shape(points=[[1, float("nan")]] * 3),
        shape(kind="circle", points=[[5, 5], [5, 5]]),
        shape(label=5),
        "text",
        shape(points=[[50, 50], [60, 50], [60, 60]]),
    ]
    write(tmp_path / "data", "a", shapes)
    made = labelme(tmp_path)
    assert len(made.rows[0].instances) == 1
    assert made.totals.annotations == len(shapes)
    assert dict(made.lost) == {
        2: "source: shape is no polygon, rectangle, circle or mask: 'line'",
        3: "source: shape is no polygon, rectangle, circle or mask: 'point'",
        4: "source: mask has no image",
        5: "source: polygon has fewer than 3 points: 2",
        6: "source: points are not pairs of finite numbers",
        7: "source: points are not pairs of finite numbers",
        8: "source: circle has no extent: radius 0",
        9: "source: shape has no label",
        10: "source: shape has no label",
        11: "validate: box lies outside the image: [50.0, 50.0, 10.0, 10.0] in 32 x 24",
    }


def mask_shape(bitmap: Any, left: float, top: float, **other: Any) -> dict[str, Any]:
    """As LabelMe writes one: a PNG of zeros and ones, and its first and last pixel."""
    data = io.BytesIO()
    Image.fromarray(np.asarray(bitmap, np.uint8)).save(data, "PNG")
    height, width = np.shape(bitmap)
    corners = [[left, top], [left + width - 1, top + height - 1]]
    return {**shape(kind="mask", points=corners, **other), "mask": base64.b64encode(data.getvalue()).decode()}


def test_masks_are_shapes(tmp_path: Path) -> None:
    bitmap = np.random.RandomState(0).randint(0, 2, (6, 9))
    alone, joined = np.zeros((2, 24, 32), bool)
    alone[10:16, 20:29] = joined[18:24, 23:32] = bitmap
    joined[2:11, 2:11] = True  # LabelMe draws a polygon's rim, too
    shapes = [mask_shape(bitmap, 20.0, 10.0), shape(group=1), mask_shape(bitmap, 23, 18, group=1)]
    write(tmp_path / "data", "a", [*shapes, mask_shape(bitmap, 2, 2, label="dog", group=1)])
    row = labelme(tmp_path).rows[0]
    assert [each["label"] for each in row.instances] == [1, 1, 2]
    for found, expected, instance in zip(masks(row), (alone, joined), row.instances, strict=False):
        np.testing.assert_array_equal(found, expected)
        assert instance["area"] == expected.sum()
    assert row.instances[1]["box"] == [2, 2, 32, 24]


def test_base64_may_have_lines_and_sizes_a_point(tmp_path: Path) -> None:
    """As MIME encoders write the one, and programs whose numbers are all alike the other."""
    bitmap = np.ones((2, 3))
    lines = base64.encodebytes(base64.b64decode(mask_shape(bitmap, 4, 5)["mask"])).decode()
    assert "\n" in lines
    write(tmp_path / "data", "a", [{**mask_shape(bitmap, 4, 5), "mask": lines}], imageHeight=24.0, imageWidth=32.0)
    red = base64.encodebytes(write_image(tmp_path / "red.png", value=200).read_bytes()).decode()
    write(tmp_path / "data", "inside", [shape()], image=None, imageData=red)
    write(tmp_path / "data", "half", [shape()], imageHeight=24.5)
    made = labelme(tmp_path)
    assert [Path(row.uri).name for row in made.rows] == ["a.png", "inside.json"]
    assert masks(made.rows[0])[0].sum() == 6
    assert made.rejects == {"half.png": "source: annotation file states no size: 32 x 24.5"}


def test_masks_that_cannot_be_used_are_rejected_alone(tmp_path: Path) -> None:
    good, other = mask_shape(np.ones((2, 3)), 4, 5), mask_shape(np.ones((3, 3)), 4, 5)
    shapes = [
        good,
        {**good, "mask": other["mask"]},
        {**good, "mask": "%%%"},
        {**good, "mask": base64.b64encode(b"text").decode()},
        mask_shape(np.ones((2, 3)), 30, 5),
        mask_shape(np.zeros((2, 3)), 4, 5),
    ]
    write(tmp_path / "data", "a", shapes)
    write(tmp_path / "data", "b", [good], imageHeight=None, imageWidth=None)
    made = labelme(tmp_path)
    assert made.totals.instances == 1
    assert sorted(made.lost) == [
        (1, "source: mask needs imageHeight and imageWidth"),
        (2, "source: mask has 3 x 3 pixels, not as its corners [(4.0, 5.0), (6.0, 6.0)]"),
        (3, "source: mask is not base64: Only base64 data is allowed"),
        (4, "source: mask is not an image of a known format"),
        (5, "source: mask does not lie in the image: [(30.0, 5.0), (32.0, 6.0)] in 32 x 24"),
        (6, "source: mask is empty"),
    ]


def test_classes_may_be_given(tmp_path: Path) -> None:
    write(tmp_path / "data", "a", [shape("dog"), shape("cat"), shape("__ignore__")])
    made = labelme(tmp_path, classes=("dog", "cat", "cow"))
    assert made.classes == ["dog", "cat", "cow"]
    assert [each["label"] for each in made.rows[0].instances] == [1, 2]
    assert made.lost == [(3, "source: unknown category: '__ignore__'")]
    with pytest.raises(ValueError, match=r"holds another build .annotations_sha256"):
        labelme(tmp_path, classes=("cat", "dog", "cow"))


def test_the_image_may_lie_in_the_json(tmp_path: Path) -> None:
    data = tmp_path / "data"
    red = base64.b64encode(write_image(tmp_path / "red.png", value=200).read_bytes()).decode()
    write(data, "inside", [shape()], image=None, imageData=red)
    write(data, "beside", [shape()], imageData=red)
    write(data, "nowhere", [shape()], image=None)
    write(data, "broken", [shape()], image=None, imageData="%%%")
    made = labelme(tmp_path)
    assert [(Path(row.uri).name, int(row.image[0, 0, 0])) for row in made.rows] == [
        ("beside.png", 128),
        ("inside.json", 200),
    ], "a file beside it comes first"
    assert {name: reason.split(":")[1] for name, reason in made.rejects.items()} == {
        "nowhere.json": " no image",
        "broken.json": " imageData is not base64",
    }


@pytest.mark.parametrize(
    ("path", "meant", "other"), [("a.png", "a.png", "a.jpg"), ("x.png", "a.jpg", "a.png"), (None, "a.jpg", "a.png")]
)
def test_the_second_image_of_a_json_is_a_reject(tmp_path: Path, path: str | None, meant: str, other: str) -> None:
    data = tmp_path / "data"
    write(data, "a", [shape()], image=".jpg", imagePath=path)
    for name in ("a.png", "b.jpg", "b.png"):
        write_image(data / name)
    made = labelme(tmp_path, classes=("dog",))
    assert [Path(row.uri).name for row in made.rows] == [meant]
    assert made.rejects == {
        other: f"source: its JSON, a.json, is of another image: {meant}",
        "b.jpg": "read: annotation file, no such file: b.json",
        "b.png": "read: annotation file, no such file: b.json",
    }


def test_a_json_that_says_it_is_of_another_image_is_nobodys(tmp_path: Path) -> None:
    """By names it belongs to one image, by its imagePath to another: either may be wrong. Where there is no such image,
    files have been renamed."""
    data = tmp_path / "data"
    for name, path in (("a", "b.png"), ("b", "a.png"), ("c", "d.png"), ("e", "gone.png"), ("f", "sub/../f.png")):
        write(data, name, [shape()], imagePath=path)
    write_image(data / "d.png")
    made = labelme(tmp_path)
    assert [Path(row.uri).name for row in made.rows] == ["e.png", "f.png"]
    assert made.rejects == {
        "a.png": "source: its JSON, a.json, is of another image: b.png",
        "b.png": "source: its JSON, b.json, is of another image: a.png",
        "c.png": "source: its JSON, c.json, is of another image: d.png",
        "d.png": "read: annotation file, no such file: d.json",
    }


def test_the_second_json_of_an_image_is_a_reject(tmp_path: Path) -> None:
    """On disks where case counts."""
    data = tmp_path / "data"
    write(data, "a", [shape()], image=".jpg")
    (data / "a.JSON").write_bytes((data / "a.json").read_bytes())
    made = labelme(tmp_path)
    assert (made.totals.images, made.totals.rows) == (2, 1)
    assert made.rejects == {"a.json": "source: two JSON files for one image: a.JSON is the other"}


def test_an_image_path_leads_to_its_image(tmp_path: Path) -> None:
    """As LabelMe's --output lays them out: the JSON files in a folder of their own."""
    data = tmp_path / "data"
    for name in ("images/a.png", "images/b.png", "images/c.png", "d.png"):
        write_image(data / name)
    write(data, "labels/a", [shape("dog")], image=None, imagePath="../images/a.png")
    write(data, "labels/b", [shape("cat")], image=None, imagePath="..\\images\\b.png")
    picture = base64.b64encode((data / "images/b.png").read_bytes()).decode()
    write(data, "labels/b2", [shape("cat")], image=None, imagePath="../images/b.png", imageData=picture)
    write(data, "labels/d", [shape("cat")], image=None, imagePath="../../data/d.png")
    write(data, "labels/e", [shape("cat")], image=None, imagePath=str(data / "images/c.png"))
    write(data, "labels/f", [shape("cat")], image=None, imagePath="f.json")
    for classes in ((), ("cat", "dog")):
        made = built(tmp_path / f"out{len(classes)}", images=str(data), format="labelme", classes=classes)
        assert made.classes == ["cat", "dog"]
        assert [row.uri.removeprefix(f"{data}/") for row in made.rows] == ["images/a.png", "images/b.png"]
        assert [row.instances[0]["label"] for row in made.rows] == [2, 1]
        assert {name: reason.split(":")[1] for name, reason in made.rejects.items()} == {
            "c.png": " annotation file, no such file", "d.png": " annotation file, no such file",
            "d.json": " no image", "e.json": " no image", "f.json": " no image",
            "b2.json": " two JSON files for one image",
        }  # fmt: skip


def test_the_shards_may_lie_among_the_images(tmp_path: Path) -> None:
    """What a build itself writes is no source, of the same one either that is run again."""
    write(tmp_path / "data", "a", [shape()])
    where = {"images": str(tmp_path / "data"), "format": "labelme", "shorter_side": 24, "longer_side": 32}
    write(tmp_path / "data/later", "manifest", [shape()])  # a name as any other where there are no shards
    prepare(BuildConfig(out=str(tmp_path / "data/out"), **where))  # as far as one gets that is killed early
    assert (tmp_path / "data/out/_progress/build.json").exists()
    os.symlink(tmp_path / "data", tmp_path / "other name")
    for out in ("data/out", "data/out", "other name/out", "data/second", "data", "data", "data/out"):
        made = built(tmp_path / out, **where)
        assert (len(made.rows), made.rejects) == (2, {})


def test_images_among_the_shards_are_images(tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png")
    write(tmp_path / "data/train", "b", [shape()])
    for format_ in ("images", "labelme"):
        made = built(tmp_path / "data/train", images=str(tmp_path / "data"), format=format_)
        assert made.totals.images == 2
        shutil.rmtree(tmp_path / "data/train/_progress", ignore_errors=True)
        for name in ("manifest.json", "shard-00000.arrow", "rejects.parquet", "rejected_annotations.parquet"):
            (tmp_path / "data/train" / name).unlink()


def test_a_json_too_large_to_be_looked_into_is_a_reject(tmp_path: Path) -> None:
    for stem in "ab":
        write(tmp_path / "data", stem, [shape()])
    os.truncate(tmp_path / "data/b.json", 2**40)
    (reject,) = labelme(tmp_path).rejects.items()
    assert reject[0] == "b.png"
    assert reject[1].startswith("read: annotation file, file too large: 1099511627776 bytes, the bound is ")


def test_images_and_files_that_do_not_fit(tmp_path: Path) -> None:
    data = tmp_path / "data"
    write(data, "good", [shape()])
    write(data, "small", [shape()], imageHeight=10)
    write(data, "unstated", [shape()], imageHeight=None, imageWidth=None)
    write_image(data / "alone.png")
    (data / "coco.json").write_text('{"images": []}')
    write_image(data / "cut.png")
    (data / "cut.json").write_text('{"shapes": [')
    made = labelme(tmp_path)
    assert [Path(row.uri).name for row in made.rows] == ["good.png", "unstated.png"]
    assert {name: reason.split(":")[:2] for name, reason in made.rejects.items()} == {
        "small.png": ["validate", " image is not of the annotated size"],
        "alone.png": ["read", " annotation file, no such file"],
        "coco.json": ["source", " annotation file has no list 'shapes'"],
        "cut.png": ["source", " annotation file is not valid JSON"],
    }


def test_text_that_is_not_unicode_is_told(tmp_path: Path) -> None:
    write(tmp_path / "data", "a", [shape("\ud800"), shape("cat"), shape(kind="\ud800")])
    made = labelme(tmp_path)
    assert made.classes == ["cat"]
    assert made.lost == [
        (1, "source: unknown category: '\\ud800'"),
        (3, "source: shape is no polygon, rectangle, circle or mask: '\\ud800'"),
    ]


def test_a_json_that_may_not_be_read_is_a_reject(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made to fail here: the tests may run as root, whom no mode stops."""
    for stem in "ab":
        write(tmp_path / "data", stem, [shape()])
    read = Store.read_bytes

    def refusing(self: Store, name: str, at_most: int | None = None) -> bytes:
        if name == "b.json":
            raise FileRefusedError("no")
        return read(self, name, at_most)

    monkeypatch.setattr(Store, "read_bytes", refusing)
    assert labelme(tmp_path).rejects == {"b.png": "read: annotation file, no permission: b.json"}


def test_a_json_that_is_a_pipe_is_a_reject(tmp_path: Path) -> None:
    write(tmp_path / "data", "a", [shape()])
    write_image(tmp_path / "data/b.png")
    os.mkfifo(tmp_path / "data/b.json")
    assert labelme(tmp_path).rejects == {"b.png": "read: annotation file, not a regular file: b.json"}


def test_folders_that_are_not_labelme(tmp_path: Path) -> None:
    write_image(tmp_path / "data/a.png")
    with pytest.raises(FileNotFoundError, match="no JSON files beside its images"):
        labelme(tmp_path)
    (tmp_path / "data/a.json").write_text("{}")
    with pytest.raises(ValueError, match="no shape of its JSON files has a label"):
        labelme(tmp_path)


def test_a_finished_build_is_not_that_of_changed_annotations(tmp_path: Path) -> None:
    write(tmp_path / "data", "a", [shape()])
    labelme(tmp_path)
    write(tmp_path / "data", "a", [shape(), shape()], image=None)
    with pytest.raises(ValueError, match=r"holds another build .file_versions_sha256"):
        labelme(tmp_path)
