"""File names: read whatever they are made of, never outside the folder; ids that depend on the name alone."""

from __future__ import annotations

import errno
import json
import os
import socket
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sources import built, write_image

from pipelines.sources import names as names_module
from pipelines.sources.names import HASHED, image_ids, links_outside, name_fault
from pipelines.storage import open_store

ODD = [
    "with space.png", " leading.png", "ünï/cödé-日本語.png", "back\\slash.png", "per%20cent%.png", "a+b&c=d.png",
    "ques?tion.png", "ha#sh.png", "star*[ab].png", "quote'\"s.png", "~tilde.png", "deep/er/still/x.png",
    "semi;colon.png", "$HOME.png", "-dash.png", "{a,b}.png", "new\nline.png",
]  # fmt: skip
OUTSIDE = ["../secret.png", "a/../../secret.png", "..", "/etc/passwd", "s3://other/secret.png", "nul\0.png", ""]


def coco_of(names: list[str]) -> dict[str, Any]:
    images = [{"id": i, "file_name": name} for i, name in enumerate(names, start=1)]
    return {"images": images, "annotations": [], "categories": [{"id": 1, "name": "a"}]}


def test_odd_names_are_read_and_no_file_outside(tmp_path: Path) -> None:
    write_image(tmp_path / "secret.png")
    for name in ODD:
        write_image(tmp_path / "images" / name)
    (tmp_path / "coco.json").write_text(json.dumps(coco_of([*ODD, *OUTSIDE])))
    made = built(tmp_path / "out", images=str(tmp_path / "images"), annotations=str(tmp_path / "coco.json"))
    assert [row.uri for row in made.rows] == [f"{tmp_path}/images/{name}" for name in ODD]
    assert made.totals.rejects == len(OUTSIDE)
    assert set(made.rejects.values()) == {"source: file name leads out of the image folder"}
    listed = built(tmp_path / "listed", images=str(tmp_path / "images"), format="images")
    assert sorted(row.uri for row in listed.rows) == sorted(f"{tmp_path}/images/{name}" for name in ODD)
    assert not listed.rejects


def test_backslashes_are_slashes_where_no_file_has_them(tmp_path: Path) -> None:
    """As programs on Windows write them; still nothing outside is read."""
    for name in ("secret.png", "images/train/a.png", "images/both/c.png", "images/both\\c.png"):
        write_image(tmp_path / name)
    os.symlink("/etc", tmp_path / "images/link")
    names = ["train\\a.png", ".\\train\\a.png", "both\\c.png", "..\\secret.png", "link\\passwd", "C:\\b.png", "\\d.png"]
    (tmp_path / "coco.json").write_text(json.dumps(coco_of(names)))
    made = built(tmp_path / "out", images=str(tmp_path / "images"), annotations=str(tmp_path / "coco.json"))
    assert [row.uri.removeprefix(f"{tmp_path}/images/") for row in made.rows] == [
        "train/a.png",
        "train/a.png",
        "both\\c.png",
    ]
    assert made.rejects == {
        "..\\secret.png": "read: no such file",
        "passwd": "read: a symbolic link leads out of the image folder",
        "C:\\b.png": "read: no such file",
        "\\d.png": "read: no such file",
    }


def test_accents_are_apart_or_not(tmp_path: Path) -> None:
    """Of names as a Mac has them and as all others have them, both mean either's file, unless both are there."""
    apart, together = (unicodedata.normalize(form, "Müller é.png") for form in ("NFD", "NFC"))
    for folder, name in (("mac", apart), ("other", together), ("both", apart), ("both", together)):
        write_image(tmp_path / "images" / folder / name)
    names = [f"{folder}/{name}" for folder in ("mac", "other", "both") for name in (apart, together)]
    (tmp_path / "coco.json").write_text(json.dumps(coco_of([*names, "mac\\" + together])))
    made = built(tmp_path / "out", images=str(tmp_path / "images"), annotations=str(tmp_path / "coco.json"))
    found = [f"mac/{apart}"] * 2 + [f"other/{together}"] * 2 + [f"both/{apart}", f"both/{together}", f"mac/{apart}"]
    assert [row.uri.removeprefix(f"{tmp_path}/images/") for row in made.rows] == found
    assert not made.rejects


def test_odd_names_are_read_from_s3(s3: str, tmp_path: Path) -> None:
    store, picture = open_store(f"{s3}/odd"), write_image(tmp_path / "a.png").read_bytes()
    names = [name for name in ODD if "\n" not in name and "\\" not in name]  # this server's own bounds
    for name in names:
        store.write_bytes(name, picture)
    open_store(f"{s3}/odd-json").write_bytes("coco.json", json.dumps(coco_of([*names, *OUTSIDE])).encode())
    made = built(tmp_path / "out", images=f"{s3}/odd", annotations=f"{s3}/odd-json/coco.json")
    assert [row.uri for row in made.rows] == [f"{s3}/odd/{name}" for name in names]
    assert made.totals.rejects == len(OUTSIDE)
    listed = built(tmp_path / "listed", images=f"{s3}/odd", format="images")
    assert sorted(row.uri for row in listed.rows) == sorted(f"{s3}/odd/{name}" for name in names)


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_dots_in_names_mean_nothing(tmp_path: Path, where: str, request: pytest.FixtureRequest) -> None:
    """Also on S3, which takes such a name for a mistake of the request."""
    uri = str(tmp_path / "images")
    if where == "s3":
        uri = f"{request.getfixturevalue('s3')}/dots"
    for name in ("a.png", "deep/b.png", "c.png"):
        open_store(uri).write_bytes(name, write_image(tmp_path / "picture.png").read_bytes())
    names = ["./a.png", "././deep/./b.png", "./", ".", "./../secret.png", "/./etc/passwd"]
    (tmp_path / "coco.json").write_text(json.dumps(coco_of(names)))
    made = built(tmp_path / "out", images=uri, annotations=str(tmp_path / "coco.json"))
    assert [row.uri for row in made.rows] == [f"{uri}/a.png", f"{uri}/deep/b.png"]
    assert made.totals.rejects == 4
    assert set(made.rejects.values()) == {"source: file name leads out of the image folder"}
    open_store(uri).write_bytes("list.txt", f"./a.png\n{uri}/./deep/./b.png\n./c.png\na.png\n".encode())
    listed = built(tmp_path / "listed", images=f"{uri}/list.txt", format="images")
    assert [row.uri for row in listed.rows] == [f"{uri}/a.png", f"{uri}/deep/b.png", f"{uri}/c.png"]
    assert listed.rejects == {"a.png": "source: listed twice"}


@pytest.mark.parametrize("where", ["disk", "s3"])
def test_a_file_larger_than_any_image_is_not_read(
    tmp_path: Path, where: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "images"
    write_image(root / "good.png", value=7)
    with (root / "huge.jpg").open("wb") as file:
        file.truncate(16 * 1000 + 1)
    uri = str(root)
    if where == "s3":
        uri = f"{request.getfixturevalue('s3')}/huge"
        for name in ("good.png", "huge.jpg"):
            open_store(uri).write_bytes(name, (root / name).read_bytes())
    made = built(tmp_path / "out", images=uri, format="images", max_pixels=1000)
    assert made.rejects == {"huge.jpg": "read: file too large: 16001 bytes, the bound is 16000"}
    assert made.totals.rows == 1


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    write_image(tmp_path / "images/good.png")
    os.mkfifo(tmp_path / "images/pipe.png")
    os.symlink("/dev/zero", tmp_path / "images/zero.png")
    made = built(tmp_path / "out", images=str(tmp_path / "images"), format="images", follow_links=True)
    assert made.rejects == dict.fromkeys(("pipe.png", "zero.png"), "read: not a regular file")
    assert made.totals.rows == 1


@pytest.mark.parametrize("follow_links", [False, True])
def test_what_cannot_even_be_opened_is_a_reject(
    tmp_path: Path, follow_links: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_image(tmp_path / "images/good.png")
    monkeypatch.chdir(tmp_path / "images")  # a socket's name is short
    os.symlink("loop.png", "loop.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
        made = built(tmp_path / "out", images=str(tmp_path / "images"), format="images", follow_links=follow_links)
    assert made.rejects == {
        "loop.png": f"read: not a regular file: {os.strerror(errno.ELOOP)}",
        "socket.png": f"read: not a regular file: {os.strerror(errno.ENXIO)}",
    }
    assert made.totals.rows == 1


def test_source_rejects_belong_to_a_finished_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But not to one that has not ended: they may be mended."""
    images = tmp_path / "images"
    write_image(images / "good.png")
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", images / "link")
    settings = {"images": str(images), "format": "images"}

    def crash(*args: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pipelines.build.Manifest.write", crash)
        with pytest.raises(KeyboardInterrupt):
            built(tmp_path / "out", **settings)
    (images / "link").unlink()
    assert built(tmp_path / "out", **settings).rejects == {}
    os.symlink(tmp_path / "elsewhere", images / "link")
    with pytest.raises(ValueError, match=r"holds another build \(source_rejects_sha256 None there, '\w+' here\)"):
        built(tmp_path / "out", **settings)
    assert built(tmp_path / "other", **settings).totals.rejects == 1
    (images / "link").unlink()
    with pytest.raises(ValueError, match=r"holds another build \(source_rejects_sha256 '\w+' there, None here\)"):
        built(tmp_path / "other", **settings)


def test_names_that_are_no_text_are_rejects(tmp_path: Path) -> None:
    write_image(tmp_path / "images/good.png")
    os.rename(write_image(tmp_path / "images/bad.png"), os.fsencode(tmp_path / "images/b") + b"\xff\xfe.png")
    made = built(tmp_path / "out", images=str(tmp_path / "images"), format="images")
    assert made.totals.rows == 1
    assert made.rejects == {"b\\udcff\\udcfe.png": "source: file name is not Unicode"}


def test_links_that_lead_out_are_followed_only_when_told(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("images/real.png", "images/folder/other.png", "elsewhere/secret.png"):
        write_image(tmp_path / name)
    (images / "out.png").symlink_to(tmp_path / "elsewhere/secret.png")
    (images / "relative.png").symlink_to("../elsewhere/secret.png")
    (images / "in.png").symlink_to(images / "folder/other.png")
    (images / "away").symlink_to(tmp_path / "elsewhere")
    (images / "folder/back").symlink_to(images)
    (tmp_path / "same").symlink_to(images)
    names = ["real.png", "out.png", "relative.png", "in.png", "away/secret.png"]
    (tmp_path / "coco.json").write_text(json.dumps(coco_of(names)))
    settings = {"images": str(tmp_path / "same"), "annotations": str(tmp_path / "coco.json")}  # itself through a link
    made = built(tmp_path / "out", **settings)
    assert [Path(row.uri).name for row in made.rows] == ["real.png", "in.png"]
    reason = "read: a symbolic link leads out of the image folder"
    assert made.rejects == {"out.png": reason, "relative.png": reason, "secret.png": reason}
    assert built(tmp_path / "followed", **settings, follow_links=True).totals.rows == 5
    with pytest.raises(ValueError, match="follow_links False there, True here"):
        built(tmp_path / "out", **settings, follow_links=True)
    assert not links_outside(open_store("s3://bucket/images"), "away/secret.png")
    store = open_store(str(images))
    through = {"folder/back/real.png": False, "folder/back/out.png": True, "folder/back/away/secret.png": True}
    through |= {"./" * 2100 + "out.png": True, ".//" * 1400 + "away/secret.png": True, "./" * 2100 + "real.png": False}
    through |= {"folder/../../elsewhere/secret.png": True, "./in.png": False, "": False}
    assert {name: links_outside(store, name) for name in through} == through


def test_linked_folders_are_followed_when_told_and_rejects_otherwise(tmp_path: Path) -> None:
    images = tmp_path / "images"
    for name in ("images/real.png", "images/folder/other.png", "elsewhere/far.png"):
        write_image(tmp_path / name)
    (images / "away").symlink_to(tmp_path / "elsewhere")
    (images / "same").symlink_to(images / "folder")  # whose images have names of their own
    (tmp_path / "elsewhere/back").symlink_to(images)
    (tmp_path / "elsewhere/round").symlink_to(tmp_path / "elsewhere")
    made = built(tmp_path / "out", images=str(images), format="images")
    assert sorted(Path(row.uri).name for row in made.rows) == ["other.png", "real.png"]
    assert made.rejects == {"away": "source: a symbolic link leads out of the image folder"}
    followed = built(tmp_path / "followed", images=str(images), format="images", follow_links=True)
    names = ["away/far.png", "folder/other.png", "real.png"]
    assert [row.uri.removeprefix(f"{images}/") for row in followed.rows] == names
    assert not followed.rejects


def test_ids_are_the_numbers_of_the_names() -> None:
    assert image_ids(["000000000139.jpg", "val/000000000285.png", "7.x.png"])[:2] == [139, 285]
    assert image_ids(["a.png"]) == image_ids(["a.png", "b.png", "1.png"])[:1], "whatever else there is"
    assert image_ids(["a.png"]) == [6900012215589924822], "and always: data sets have it"
    same = image_ids(["a/1.png", "b/1.png", "2.png"])
    assert same[2] == 2
    assert len({*same, 1}) == 4, "a number that two files have is neither's"
    assert image_ids(["1" * 19 + ".png"])[0] >= HASHED, "too long for a number of 64 bits"
    assert image_ids(["٣.png"])[0] >= HASHED, "a digit elsewhere"


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), unique=True))
def test_ids_differ_and_fit_into_64_bits(names: list[str]) -> None:
    ids = image_ids(names)
    assert len(set(ids)) == len(names)
    assert all(0 <= each < 2**63 for each in ids)


def test_equal_hashes_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names_module, "_hashed", lambda name: HASHED | len(name))
    with pytest.raises(ValueError, match=r"bb\.png and cc\.png get the same image id, \d+: rename one of them"):
        image_ids(["a.png", "bb.png", "cc.png"])


@pytest.mark.parametrize("name", ["a/../b", "../b", "/b", "", "a\0", "x://y"])
def test_names_that_lead_out(name: str) -> None:
    assert name_fault(name) == "file name leads out of the image folder"
