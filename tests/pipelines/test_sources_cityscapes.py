"""Cityscapes' folders: the same masks from polygons and from instance ids, which are those of its creators' script."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as mask_utils
from sources import built, masks, write_image

from mrcnn.cityscapes import CLASSES
from pipelines.build import build
from pipelines.config import BuildConfig
from pipelines.dataset import ShardDataset
from pipelines.records import ImageRecord, Objects, SourceError
from pipelines.sources.cityscapes import CATEGORIES, cityscapes_objects
from pipelines.storage import open_store

HEIGHT, WIDTH = 64, 128
NAMES = [*CLASSES.values(), "cargroup", "persongroup", "bicyclegroup", "road", "polegroup", "caravan", "license plate"]
EXPECTED = [
    "145624df724d5fe56b29178212674f70efc19a2c77aa69042fe99184487d55f7",
    "0b2a0e172847fdc22b4d14f3ece7f5ebd469dfc29ea90012e2222702090054f4",
    "69813c154dacf517671c035886fdc777092df6025c8235caa410f69346d2d4a2",
]
"""SHA-256 of the instance ids (int32, other classes 0) that json2instanceImg of cityscapesScripts 2.3.0 makes of
`scene(0)` to `scene(2)`."""


def scene(seed: int) -> dict[str, Any]:
    """Polygons of all kinds over each other, some of them partly or wholly outside."""
    rng = np.random.RandomState(seed)  # whose numbers never change
    objects = []
    for _ in range(40):
        centre = rng.uniform([-10, -10], [WIDTH + 10, HEIGHT + 10])
        angles = np.sort(rng.uniform(0, 2 * np.pi, rng.randint(3, 9)))
        points = centre + np.stack([np.cos(angles), np.sin(angles)], 1) * rng.uniform(4, 25, (len(angles), 1))
        label = NAMES[rng.randint(len(NAMES))]
        objects.append({"label": label, "polygon": np.rint(points).astype(int).tolist(), "deleted": 0})
    return {"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}


def ids_of(objects: Objects) -> np.ndarray:
    """The image of ids that the masks of objects make; they do not overlap."""
    ids = np.zeros((HEIGHT, WIDTH), np.int32)
    for each in objects.usable:
        mask = mask_utils.decode(each["segmentation"]).astype(bool)
        assert not ids[mask].any()
        ids[mask] = each["id"]
    return ids


def objects_of(content: dict[str, Any]) -> Objects:
    record = ImageRecord(1, "a", annotation_files=["a_gtFine_polygons.json"])
    return cityscapes_objects(record, [json.dumps(content).encode()], CATEGORIES)


def png(ids: np.ndarray) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(ids.astype(np.uint16)).save(sink, "png")
    return sink.getvalue()


def write_data_set(root: Path, kinds: str = "both", images: int = 3, split: str = "train") -> str:
    """The folders of the download, with polygons, ids or both."""
    for i in range(images):
        name = f"{split}/city{i % 2}/city{i % 2}_00000{i}_000019"
        write_image(root / f"leftImg8bit/{name}_leftImg8bit.png", HEIGHT, WIDTH)
        folder = root / f"gtFine/{name}_x"
        folder.parent.mkdir(parents=True, exist_ok=True)
        if kinds in ("both", "polygons"):
            folder.with_name(f"{folder.name[:-2]}_gtFine_polygons.json").write_text(json.dumps(scene(i)))
        if kinds in ("both", "ids"):
            folder.with_name(f"{folder.name[:-2]}_gtFine_instanceIds.png").write_bytes(
                png(ids_of(objects_of(scene(i))))
            )
        folder.with_name(f"{folder.name[:-2]}_gtFine_color.png").write_bytes(b"not looked at")
    return str(root)


@pytest.mark.parametrize("seed", range(3))
def test_masks_are_those_of_the_creators(seed: int) -> None:
    found = objects_of(scene(seed))
    assert hashlib.sha256(ids_of(found).tobytes()).hexdigest() == EXPECTED[seed]
    for each in found.usable:
        label = each["id"] // 1000 if each["id"] >= 1000 else each["id"]
        assert each["category_id"] == label == CATEGORIES[each["label"] - 1].id
        assert each["iscrowd"] == (each["id"] < 1000)
        assert each["area"] == mask_utils.area(each["segmentation"])
        assert each["bbox"] == mask_utils.toBbox(each["segmentation"]).tolist()
    hidden = {id_ for id_, _ in found.rejected}
    assert not hidden & {each["id"] for each in found.usable}


def test_polygons_and_ids_give_the_same_rows(tmp_path: Path) -> None:
    settings = {"format": "cityscapes", "shorter_side": HEIGHT, "longer_side": WIDTH}
    polygons, ids, both = (
        built(tmp_path / f"{kinds}-out", images=write_data_set(tmp_path / kinds, kinds), **settings)
        for kinds in ("polygons", "ids", "both")
    )
    assert polygons.classes == list(CLASSES.values())
    assert polygons.totals.rows == 3
    assert polygons.totals.annotations == polygons.totals.instances + len(polygons.lost)
    assert {reason for _, reason in polygons.lost} == {"source: object is hidden by others, or lies outside the image"}
    assert not ids.lost
    for other in (ids, both):
        for ours, theirs in zip(polygons.rows, other.rows, strict=True):
            assert ours.instances == theirs.instances
            assert ours.image_id == theirs.image_id
            assert ours.uri.rsplit("/", 3)[1:] == theirs.uri.rsplit("/", 3)[1:]
    assert [len(masks(row)) for row in ids.rows] == [len(objects_of(scene(i)).usable) for i in (0, 2, 1)], "by city"


def test_a_city_may_be_a_link(tmp_path: Path) -> None:
    root = Path(write_data_set(tmp_path / "data"))
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder).mkdir()
        (root / folder / "train/city1").rename(tmp_path / folder / "city1")
        (root / folder / "train/city1").symlink_to(tmp_path / folder / "city1")
    settings = {"format": "cityscapes", "images": str(root), "shorter_side": HEIGHT, "longer_side": WIDTH}
    made = built(tmp_path / "out", **settings)
    assert (made.totals.rows, made.rejects) == (2, {"city1": "source: a symbolic link leads out of the image folder"})
    assert built(tmp_path / "followed", **settings, follow_links=True).totals.rows == 3


def test_what_is_missing_or_damaged_is_a_reject(tmp_path: Path) -> None:
    root = Path(write_data_set(tmp_path / "data", "polygons", images=4, split="val"))
    fine = root / "gtFine/val"
    (fine / "city0/city0_000000_000019_gtFine_polygons.json").unlink()
    (fine / "city1/city1_000001_000019_gtFine_polygons.json").write_text('{"imgHeight": 64, ')
    (root / "leftImg8bit/val/city0/city0_000002_000019_leftImg8bit.png").unlink()
    write_image(root / "leftImg8bit/val/city1/city1_000003_000019_leftImg8bit.png", 10, 20)
    write_image(root / "leftImg8bit/val/city1/city1_000009_000019_leftImg8bit.png", HEIGHT, WIDTH)
    shutil.copy(
        fine / "city0/city0_000002_000019_gtFine_polygons.json", fine / "city1/city1_000009_000019_gtFine_polygons.json"
    )
    made = built(
        tmp_path / "out", images=str(root), format="cityscapes", split="val", shorter_side=HEIGHT, longer_side=WIDTH
    )
    assert {name.split("_")[1]: reason.split(":")[:2] for name, reason in made.rejects.items()} == {
        "000000": ["read", " annotation file, no such file"],
        "000001": ["source", " annotation file is not valid JSON"],
        "000003": ["validate", " image is not of the annotated size"],
    }, "the image that is gone is not listed: it is no image"
    assert made.totals.rows == 1
    assert made.totals.annotations == made.totals.instances + len(made.lost)


def test_wrong_folder_or_split(tmp_path: Path) -> None:
    write_data_set(tmp_path / "data", images=1)
    for images, split in ((tmp_path / "data", "val"), (tmp_path / "data/leftImg8bit", None)):
        with pytest.raises(FileNotFoundError, match="give the folder with leftImg8bit and gtFine in it, or another"):
            built(tmp_path / "out", images=str(images), format="cityscapes", split=split)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"imgHeight": None}, "states no size"),
        ({"imgHeight": 10**6, "imgWidth": 10**6}, "too large"),
        ({"imgHeight": 1, "imgWidth": 70_000_000}, "too large: 70000000 x 1 pixels, the bound of a side is 1000000"),
        ({"objects": {}}, "no list 'objects'"),
    ],
)
def test_files_that_are_not_cityscapes(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=message):
        objects_of({**scene(0), **wrong})


def test_bad_objects_are_rejected_alone() -> None:
    square = [[1, 1], [9, 1], [9, 9], [1, 9]]
    listed = [
        {"label": "car", "polygon": square},
        {"label": "car", "polygon": square[:2]},
        {"label": "person", "polygon": [[1, 1], [2, float("nan")], [3, 4]]},
        {"polygon": square},
        {"label": "bus", "polygon": square, "deleted": 1},
        {"label": "road", "polygon": None},
        "text",
    ]
    found = objects_of({"imgHeight": 20, "imgWidth": 20, "objects": listed})
    assert [each["id"] for each in found.usable] == [26000]
    bad = "polygon is not a list of three or more points"
    assert found.rejected == [(26001, bad), (24000, bad), (None, "object has no label"), (None, "object has no label")]


@pytest.mark.usefixtures("ray_cluster")
def test_from_s3_with_ray(s3: str, tmp_path: Path) -> None:
    root, store = Path(write_data_set(tmp_path / "data")), open_store(f"{s3}/cityscapes")
    for path in filter(Path.is_file, root.rglob("*")):
        store.write_bytes(str(path.relative_to(root)), path.read_bytes())
    config = BuildConfig(
        images=str(root), out=str(tmp_path / "here"), format="cityscapes", max_rejected_annotation_share=1.0,
        shorter_side=HEIGHT, longer_side=WIDTH, rows_per_shard=1,
    )  # fmt: skip
    assert build(config).totals == build(replace(config, images=store.uri, out=str(tmp_path / "there"))).totals
    here, there = ShardDataset(str(tmp_path / "here")), ShardDataset(str(tmp_path / "there"))
    assert [here.read(i).instances for i in range(3)] == [there.read(i).instances for i in range(3)]


@pytest.mark.parametrize("kinds", ["polygons", "ids", "images"])
def test_a_finished_build_is_not_that_of_changed_files(tmp_path: Path, kinds: str) -> None:
    root = write_data_set(tmp_path / "data", "polygons" if kinds == "images" else kinds, images=1)
    settings = {"images": root, "format": "cityscapes", "shorter_side": HEIGHT, "longer_side": WIDTH}
    built(tmp_path / "out", **settings)
    pattern = {"polygons": "*_polygons.json", "ids": "*_instanceIds.png", "images": "*_leftImg8bit.png"}[kinds]
    (file,) = Path(root).rglob(pattern)
    file.write_bytes(file.read_bytes() + b" ")
    with pytest.raises(ValueError, match=r"holds another build .file_versions_sha256"):
        built(tmp_path / "out", **settings)
