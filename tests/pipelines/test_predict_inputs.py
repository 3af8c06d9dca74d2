"""What is predicted: how it is listed without being held, and what becomes of names that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.inputs import Chunk, Input, NamedInputs, Picture, open_inputs
from pipelines.pixels import MAX_PIXELS
from pipelines.records import Reject
from pipelines.sources.names import ImageIds, image_ids
from pipelines.stages import Stopwatch, describe


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b/7.png", "a/7.png", "a/8.png", "x.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.zeros((4, 6, 3), np.uint8))
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def inputs_of(folder: Path | str) -> NamedInputs:
    found = open_inputs(str(folder), max_pixels=MAX_PIXELS)
    assert isinstance(found, NamedInputs)
    return found


def all_of(inputs: NamedInputs, size: int = 3) -> list[Input]:
    return [item for chunk in inputs.chunks(size) for item in chunk.inputs]


def test_chunks_are_cut_by_order_alone_and_can_be_gone_through_again(folder: Path) -> None:
    inputs = inputs_of(folder)
    chunks = list(inputs.chunks(3))
    assert [(chunk.number, len(chunk.inputs)) for chunk in chunks] == [(0, 3), (1, 1)]
    assert [item.name for item in all_of(inputs)] == ["a/7.png", "a/8.png", "b/7.png", "x.png"]
    assert list(inputs.chunks(3)) == chunks
    assert inputs.count == 4
    assert Chunk.from_json(1, chunks[1].to_json().encode()) == chunks[1]


def test_ids_are_those_that_a_build_gives(folder: Path) -> None:
    found = all_of(inputs_of(folder))
    assert [item.image_id for item in found] == image_ids([item.name for item in found])
    assert found[1].image_id == 8
    assert found[0].image_id != 7, "two files are called so"


@settings(max_examples=50, deadline=None)
@given(st.lists(st.text("012a/", min_size=1, max_size=3), unique=True))
def test_ids_of_names_that_are_not_held(names: list[str]) -> None:
    ids = ImageIds()
    for name in [*names, *names[:2]]:
        ids.add(name)
    assert [ids.id_of(name) for name in names] == image_ids(names)
    assert [ids.repeats(name) for name in names] == [i < 2 for i in range(len(names))]


def test_the_digest_is_of_the_names_and_a_chunk_knows_its_files_versions(folder: Path) -> None:
    before = inputs_of(folder)
    cv2.imwrite(str(folder / "x.png"), np.zeros((5, 6, 3), np.uint8))
    after = inputs_of(folder)
    assert before.sha256 == after.sha256
    pairs = zip(before.chunks(3), after.chunks(3), strict=True)
    assert [ours.versions_sha256 == theirs.versions_sha256 for ours, theirs in pairs] == [True, False]
    (folder / "x.png").unlink()
    assert inputs_of(folder).sha256 != before.sha256


def test_what_cannot_be_read_is_a_reject_with_its_reason(
    folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "secret.png").write_bytes((folder / "x.png").read_bytes())
    (folder / "link.png").symlink_to(elsewhere / "secret.png")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "y.png").write_bytes(b"none")
    inputs = inputs_of(folder)
    read = [inputs.reader.read(item, Stopwatch()) for item in all_of(inputs)]
    rejects = {Path(each.uri).name: (each.stage, each.reason) for each in read if isinstance(each, Reject)}
    assert rejects == {
        "link.png": ("read", "a symbolic link leads out of the image folder"),
        "linked": ("source", "a symbolic link leads out of the image folder"),
        "y.png": ("decode", "not an image of a known format"),
    }
    assert sum(isinstance(each, Picture) for each in read) == 4 == inputs.count - len(rejects)


def test_a_list_is_read_line_by_line(folder: Path) -> None:
    lines = ["\ufeffa/7.png", f"{folder}/x.png", "", "a/7.png", "../out.png", "s3://only-a-bucket"]
    (folder / "list.txt").write_text("\r\n".join(lines))
    found = all_of(inputs_of(folder / "list.txt"))
    assert [item.name for item in found[:3]] == [f"{folder}/a/7.png", f"{folder}/x.png", f"{folder}/a/7.png"]
    assert found[0].image_id == 7, "the same name twice is one name"
    assert [bool(item.fault) for item in found] == [False, False, True, True, True]
    assert found[2].fault == "listed twice"
    (folder / "list.txt").write_text("\n\n")
    with pytest.raises(FileNotFoundError, match="lists no images"):
        inputs_of(folder / "list.txt")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        inputs_of(folder / "none.txt")


def test_a_folder_of_images_may_hold_a_manifest_of_its_own(folder: Path) -> None:
    (folder / "manifest.json").write_text(json.dumps({"made by": "somebody"}))
    assert inputs_of(folder).count == 4
    (folder / "manifest.json").write_text("{")
    assert inputs_of(folder).count == 4


def test_ten_thousand_names_take_little_memory(tmp_path: Path) -> None:
    """What the driver keeps of a name: 16 bytes, by the sizes of all that the inputs hold."""
    (tmp_path / "list.txt").write_text(
        "\n".join(f"s3://bucket/a-rather-long-prefix/{i:08d}.jpg" for i in range(10_000))
    )
    inputs = inputs_of(tmp_path / "list.txt")
    held = [inputs._ids._hashes, inputs._ids._numbers]
    assert sum(each.itemsize * len(each) for each in held) == 16 * inputs.count == 160_000
    assert max(len(chunk.inputs) for chunk in inputs.chunks(100)) == 100


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (
            {"reading": 1.0, "decoding": 2.0, "model": 9.0, "waiting": 0.5},
            "limits it: model; the model works 90 %",
        ),
        (
            {"reading": 8.0, "decoding": 2.0, "model": 2.0, "waiting": 7.0},
            "limits it: reading; the model works 20 %",
        ),
        ({"model": 3.0, "masks": 6.0, "waiting": 0.1}, "limits it: masks; the model works 30 %"),
    ],
)
def test_what_limits_is_said(seconds: dict[str, float], words: str) -> None:
    told = describe(seconds, images=50, wall=10.0)
    assert words in told
    assert "5.0 images/s an actor" in told
