"""Pascal VOC's folders: objects from the two images of numbers, void left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sources import Built, built, masks, write_image

CAR, PERSON, VOID = 7, 15, 255


def write_ids(path: Path, ids: np.ndarray) -> None:
    """As the download has them: PNG with a palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(ids.astype(np.uint8), "P")
    image.putpalette(np.random.RandomState(0).randint(0, 256, 768).tolist())
    image.save(path)


def scene() -> tuple[np.ndarray, np.ndarray]:
    """Ids of objects and of classes: a car, two persons, one of them in two pieces, and void around the car."""
    objects, classes = np.zeros((24, 32), int), np.zeros((24, 32), int)
    objects[2:12, 2:12], classes[2:12, 2:12] = VOID, VOID
    objects[3:11, 3:11], classes[3:11, 3:11] = 1, CAR
    objects[3:6, 20:25], classes[3:6, 20:25] = 2, PERSON
    objects[8:10, 20:25], classes[8:10, 20:25] = 2, PERSON
    objects[15:20, 1:30], classes[15:20, 1:30] = 3, PERSON
    return objects, classes


def write_data_set(root: Path, stems: list[str], split: str = "train") -> str:
    for stem in stems:
        write_image(root / f"JPEGImages/{stem}.jpg")
        for folder, ids in zip(("SegmentationObject", "SegmentationClass"), scene(), strict=True):
            write_ids(root / folder / f"{stem}.png", ids)
    listed = root / f"ImageSets/Segmentation/{split}.txt"
    listed.parent.mkdir(parents=True)
    listed.write_text("\n".join(stems) + "\n")
    return str(root)


def voc(tmp_path: Path, root: str, **settings: str) -> Built:
    return built(tmp_path / "out", images=root, format="voc", **settings)


def test_objects_are_the_numbers_in_the_masks(tmp_path: Path) -> None:
    made = voc(tmp_path, write_data_set(tmp_path / "VOC2012", ["2007_000032", "2007_000033"]))
    assert (len(made.classes), made.classes[CAR - 1], made.classes[PERSON - 1]) == (20, "car", "person")
    assert [Path(row.uri).stem for row in made.rows] == ["2007_000032", "2007_000033"]
    assert made.totals.annotations == made.totals.instances == 6
    for row in made.rows:
        assert [each["category_id"] for each in row.instances] == [CAR, PERSON, PERSON]
        assert [each["label"] for each in row.instances] == [CAR, PERSON, PERSON]
        for number, mask, instance in zip((1, 2, 3), masks(row), row.instances, strict=True):
            np.testing.assert_array_equal(mask, scene()[0] == number)
            assert instance["area"] == mask.sum()
            assert not instance["iscrowd"]
        assert row.instances[1]["box"] == [20, 3, 25, 10], "of both pieces"


def test_split_and_list(tmp_path: Path) -> None:
    root = write_data_set(tmp_path / "VOC2007", ["000001", "000002", "my 3"], split="trainval")
    listed = "\ufeff000002\r\n 000001 \n000002\nmy 3\n../../etc/x\n \n\n"
    Path(root, "ImageSets/Segmentation/trainval.txt").write_text(listed)
    made = voc(tmp_path, root, split="trainval")
    assert [row.image_id for row in made.rows[:2]] == [2, 1], "numbers where names are, in the order of the list"
    assert [Path(row.uri).name for row in made.rows[2:]] == ["my 3.jpg"]
    assert made.rejects == {
        "000002.jpg": "source: listed twice",
        "x.jpg": "source: file name leads out of the image folder",
    }
    with pytest.raises(FileNotFoundError, match=r"no ImageSets/Segmentation/val.txt: give the folder of one year"):
        voc(tmp_path, root, split="val")
    Path(root, "ImageSets/Segmentation/test.txt").write_text("\n")
    with pytest.raises(FileNotFoundError, match="names no images"):
        voc(tmp_path, root, split="test")


def test_masks_that_are_missing_damaged_or_contradict(tmp_path: Path) -> None:
    stems = [f"2007_00000{i}" for i in range(8)]
    root = Path(write_data_set(tmp_path / "VOC2012", stems))
    objects, classes = scene()
    (root / f"SegmentationClass/{stems[1]}.png").unlink()
    (root / f"SegmentationObject/{stems[2]}.png").write_bytes(b"no image")
    write_ids(root / f"SegmentationClass/{stems[3]}.png", classes[:, :30])
    Image.new("RGB", (32, 24)).save(root / f"SegmentationObject/{stems[4]}.png")
    changed = np.where(objects == 1, 44, np.where(objects == 2, 0, classes))
    changed[15:19] = VOID  # most of the third object: its class is that of the rest
    write_ids(root / f"SegmentationClass/{stems[5]}.png", changed)
    shutil.copy(write_image(tmp_path / "other.png", 12, 16), root / f"JPEGImages/{stems[6]}.jpg")
    (root / f"JPEGImages/{stems[7]}.jpg").unlink()
    made = voc(tmp_path, str(root))
    assert {Path(name).stem[-1]: reason for name, reason in made.rejects.items()} == {
        "1": f"read: annotation file, no such file: SegmentationClass/{stems[1]}.png",
        "2": "source: annotation file is not an image of a known format",
        "3": "source: masks of objects and of classes differ in size: (24, 32), (24, 30)",
        "4": "source: annotation file is no image of ids: its pixels are RGB",
        "6": "validate: image is not of the annotated size: 32 x 24 stated, 16 x 12 decoded",
        "7": "read: no such file",
    }
    assert [each["label"] for each in made.rows[1].instances] == [PERSON]
    assert made.lost[:2] == [(1, "source: unknown category: 44"), (2, "source: object has no class")]
    assert made.lost[-1] == (3, "read: image rejected: no such file"), "counted without its image"
    assert made.totals.annotations == made.totals.instances + len(made.lost) == 12


def test_numbers_of_32_bits_are_no_classes(tmp_path: Path) -> None:
    """What Pillow reads is no PNG perhaps, whatever it is called."""
    root = Path(write_data_set(tmp_path / "VOC2012", ["a"]))
    objects, classes = scene()
    classes[objects == 1], classes[objects == 2] = -5, 2**31 - 1
    Image.fromarray(classes.astype(np.int32)).save(root / "SegmentationClass/a.png", "TIFF")
    made = voc(tmp_path, str(root))
    assert [each["label"] for each in made.rows[0].instances] == [PERSON]
    assert made.lost == [(1, "source: unknown category: -5"), (2, "source: unknown category: 2147483647")]


@pytest.mark.parametrize("folder", ["JPEGImages", "SegmentationObject", "SegmentationClass"])
def test_a_finished_build_is_not_that_of_changed_files(tmp_path: Path, folder: str) -> None:
    root = write_data_set(tmp_path / "VOC2012", ["2007_000032"])
    voc(tmp_path, root)
    (file,) = Path(root, folder).iterdir()
    file.write_bytes(file.read_bytes() + b"0")
    with pytest.raises(ValueError, match=r"holds another build .file_versions_sha256"):
        voc(tmp_path, root)
