"""inspect-data: numbers that were counted by hand, a picture of the images, and no more read than is needed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from sources import built, write_image

from jobs.cli import main
from pipelines.contact_sheet import CAPTION, FILE_NAME, MARGIN, SIDE, _caption, write_contact_sheet
from pipelines.dataset import Row
from pipelines.inspect import DataSummary, summarize
from pipelines.manifest import Manifest
from pipelines.storage import Store, open_store

NAMES = ["left_end", "right_end"]


def write_coco(folder: Path) -> dict[str, str]:
    """Four images of three sizes, one of them missing; objects of all sizes, a crowd, keypoints, one without mask."""
    sizes = {1: (240, 320), 2: (240, 320), 3: (400, 100), 4: (50, 50), 5: (10, 10)}
    for id_, (height, width) in sizes.items():
        if id_ != 5:
            write_image(folder / f"images/{id_}.png", height, width, value=40 * id_)
    images = [{"id": i, "file_name": f"{i}.png", "height": h, "width": w} for i, (h, w) in sizes.items()]
    categories = [{"id": 3, "name": "cat"}, {"id": 9, "name": "dog", "keypoints": NAMES}, {"id": 20, "name": "unseen"}]
    annotations = [
        square(1, 1, 3, (10, 10), 31),
        square(2, 1, 3, (100, 100), 95),
        square(3, 2, 3, (10, 10), 96) | {"keypoints": [0, 0, 0, 0, 0, 0]},
        square(4, 1, 9, (50, 10), 32) | {"keypoints": [60, 20, 2, 70, 30, 1]},
        square(5, 1, 9, (0, 0), 200) | {"iscrowd": 1},
        square(6, 3, 9, (20, 20), 60) | {"segmentation": []},
        square(7, 3, 9, (20, 20), 0),
        square(8, 5, 9, (0, 0), 5),
    ]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (folder / "coco.json").write_text(json.dumps(content))
    return {"images": str(folder / "images"), "annotations": str(folder / "coco.json")}


def square(id_: int, image: int, category: int, corner: tuple[int, int], side: int) -> dict[str, Any]:
    x, y = corner
    polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
    common = {"bbox": [x, y, side, side], "area": side * side, "iscrowd": 0, "segmentation": [polygon]}
    return {"id": id_, "image_id": image, "category_id": category, **common}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of `write_coco`, at half the size, two images a shard."""
    folder = tmp_path_factory.mktemp("inspect")
    settings = {"shorter_side": 120, "longer_side": 160, "rows_per_shard": 2}
    built(folder / "shards", **write_coco(folder), **settings)
    return str(folder / "shards")


@pytest.fixture(scope="module")
def summary(shards: str) -> DataSummary:
    return summarize(shards)


def test_tiles_are_told_apart() -> None:
    row = Row(1, "s3://b/large.png", np.zeros((64, 64, 3), np.uint8), (64, 64), [], {"x": 32, "y": 0})
    first = Row(1, row.uri, row.image, row.source_size, [], {"x": 0, "y": 0})
    assert not np.array_equal(_caption(row, 800), _caption(first, 800))


def test_counts(summary: DataSummary) -> None:
    tally = summary.tally
    assert dict(tally.sizes) == {(240, 320): 2, (400, 100): 1, (50, 50): 1}, "of the original images"
    assert dict(tally.encodings) == {"raw": 4}
    assert dict(tally.objects) == {1: 3, 2: 3}
    assert dict(tally.images) == {1: 2, 2: 2}
    assert dict(tally.objects_of_images) == {4: 1, 1: 2, 0: 1}
    assert tally.areas.tolist() == [1, 3, 2], "31; 32, 60 and 95; 96 and 200 pixels wide"
    assert (tally.crowds, tally.without_mask, tally.with_keypoints) == (1, 1, 1)
    assert summary.rejects_by_reason == {"read: no such file": 1}
    assert summary.rejected_annotations_by_reason == {
        "validate: box has no extent": 1,
        "read: image rejected": 1,
    }


def test_table(summary: DataSummary, shards: str) -> None:
    lines = str(summary).split("\n")
    assert max(map(len, lines[2:])) <= 80
    for line in (
        "5 images: 4 rows (4 raw), 1 rejected",
        "        1 x read: no such file",
        "8 annotations: 6 objects, 2 rejected",
        "height                     50      240      400",
        "width                      50      100      320",
        "width / height           0.25        1     1.33",
        "objects                     0        1        4",
        "1 images are taller than wide, 1 square, 2 wider than tall",
        "small, under 32 x 32 pixels           1   16.7%",
        "medium                                3   50.0%",
        "large, from 96 x 96 pixels on         2   33.3%",
        "crowds                                1",
        "without mask                          1",
        "with keypoints                        1",
        "images without objects                1",
        "    1     3  cat                             3   50.0%        2",
        "    2     9  dog                             3   50.0%        2",
        "    3    20  unseen                          0    0.0%        0",
    ):
        assert line in lines, str(summary)
    size = sum(shard.bytes for shard in Manifest.read(open_store(shards)).shards)
    assert lines[0].startswith(f"{shards}: format coco, from ")
    assert lines[1] == f"3 shards, {size / 1e6:.1f} MB ({size / 4000:.0f} kB an image)"


def test_a_source_without_annotations(tmp_path: Path) -> None:
    write_image(tmp_path / "images/a.png")
    built(tmp_path / "out", images=str(tmp_path / "images"), format="images")
    text = str(summarize(str(tmp_path / "out")))
    assert "format images" in text
    assert "0 annotations: 0 objects, 0 rejected" in text
    assert "class" not in text
    assert write_contact_sheet(str(tmp_path / "out"), str(tmp_path), 5) == str(tmp_path / FILE_NAME)


def test_only_small_columns_are_read_from_s3(shards: str, s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = open_store(f"{s3}/inspected")
    for name in open_store(shards).list():
        store.write_bytes(name, Path(shards, name).read_bytes())
    read: list[int] = []
    read_range = Store.read_range

    def counted(self: Store, name: str, start: int, length: int) -> bytes:
        data = read_range(self, name, start, length)
        read.append(len(data))
        return data

    monkeypatch.setattr(Store, "read_range", counted)
    monkeypatch.setattr("pipelines.inspect.BLOCK", 512)
    there, here = summarize(store.uri), summarize(shards)
    assert str(there).split("\n")[1:] == str(here).split("\n")[1:]
    assert sum(read) < 0.4 * sum(shard.bytes for shard in there.manifest.shards)


def test_picture(shards: str, tmp_path: Path) -> None:
    path = write_contact_sheet(shards, str(tmp_path), 12)
    picture = cv2.imread(path)
    assert picture.shape[1] == 3 * SIDE + 2 * MARGIN
    assert picture.shape[0] == (SIDE + CAPTION + MARGIN) * 2, "the first line has a tall image"
    assert (picture[SIDE - 5, :SIDE] == 255).all(), "below the first image, which is wider than tall"
    crowd, plain = picture[300, 400], picture[300, SIDE + MARGIN + 780]
    assert len(set(plain.tolist())) == 1, "gray, as the image is"
    assert len(set(crowd.tolist())) > 1, "coloured by a mask"
    few = cv2.imread(write_contact_sheet(shards, str(tmp_path), 2))
    assert few.shape[1] == 2 * SIDE + MARGIN
    with pytest.raises(ValueError, match="--images is 0, but must be 1 to 100"):
        write_contact_sheet(shards, str(tmp_path), 0)


def test_command(shards: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect-data", shards, "--out", str(tmp_path), "--images", "1"]) == 0
    printed = capsys.readouterr().out
    assert "5 images: 4 rows" in printed
    assert f"picture: {tmp_path / FILE_NAME}" in printed
    assert np.any(cv2.imread(str(tmp_path / FILE_NAME)))
    for number in ("0", "101"):
        assert main(["inspect-data", shards, "--out", str(tmp_path), "--images", number]) == 2
        told = capsys.readouterr()
        assert (told.out, f"--images is {number}, but must be 1 to 100" in told.err) == ("", True), "before the scan"
    assert main(["inspect-data", str(tmp_path)]) == 2
    assert "no finished shards" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["missing", "short", "rubbish"])
def test_damage_is_told(tmp_path: Path, damage: str) -> None:
    built(tmp_path / "out", **write_coco(tmp_path))
    path = tmp_path / "out/shard-00000.arrow"
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(data[:-100] if damage == "short" else bytes(len(data)))
    with pytest.raises((ValueError, FileNotFoundError), match=r"shard-00000\.arrow is .*: run `mrcnn verify-data"):
        summarize(str(tmp_path / "out"))
