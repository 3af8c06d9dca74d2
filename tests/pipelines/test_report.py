"""report.html: what it says, what it shows, and that nothing in a name can change it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import cv2
import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import measure, show
from predicted import detection, finish

from mrcnn.structures import Category
from pipelines.inputs import Input, Picture, open_inputs
from pipelines.overlays import DrawSettings, choose, draw_chunk, overlay_name
from pipelines.pixels import MAX_PIXELS
from pipelines.predict import PREDICTIONS
from pipelines.predict_folder import ChunkReceipt, claim, part_name, read_json
from pipelines.predict_options import PredictRun
from pipelines.report import class_bars, score_bars, size_bars, write_report
from pipelines.stages import Stopwatch
from pipelines.storage import open_store
from pipelines.storage_errors import UnreachableError
from pipelines.tally import Tally, tally_part
from pipelines.thumbnails import MOST_DRAWN, SPREAD, images_to_show, make_thumbnails

EVIL = "<script>alert(1)</script>&\"'"
CATEGORIES = (Category(3, "cat"), Category(7, EVIL), Category(9, "yak"))
VOID, INLINE = {"meta", "img", "link", "br"}, {"a", "code", "i", "span", "strong"}


class Page(HTMLParser):
    """The text that is seen, the elements with their attributes; all that is opened has to be closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        self.words += [] if tag in INLINE else [" "]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        self.words += [] if tag in INLINE else [" "]
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.elements if name == tag]


SCORES = [0] * 9 + [1, 2, 3, 4, 5, 6, 7, 8, 9] + [0] * 2  # of what `find` finds in `images`, in bins of 0.05


def find(picture: Picture) -> list[dict[str, Any]]:
    """None in the first image, one in the second, two in the third, and so on, of labels 1, 1, 2, 1, 1, 2, ..."""
    height, width = picture.source_size
    count = int(re.findall(r"\d+", Path(picture.uri).name)[-1]) % 10
    boxes = [(3.0 * i, 2.0 * i, width - 3.0 * i, height - 2.0 * i) for i in range(count)]
    return [
        detection(1 + (i % 3 == 2), 0.87 - 0.05 * i, box, size=(height, width)) for i, box in enumerate(boxes)
    ]  # best first


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for i in range(10):
        noise = rng.integers(0, 256, (90 + 7 * i, 120, 3), dtype=np.uint8)
        assert cv2.imwrite(str(folder / f"{i:02d}.png"), noise)
    (folder / "broken.png").write_bytes(b"no image")
    (folder / "empty.png").write_bytes(b"")
    return folder


def report(images: str | Path, out: Path, run: PredictRun | None = None, **settings: Any) -> tuple[Page, str]:
    """A finished prediction's page, parsed and as it is."""
    inputs, store = open_inputs(str(images), max_pixels=MAX_PIXELS), open_store(str(out))
    manifest, drawn = finish(
        inputs, store, settings.pop("categories", CATEGORIES), settings.pop("find", find), **settings
    )
    size = manifest["plan"]["chunk_size"]
    chosen = choose(inputs, run or PredictRun(), size)
    for number, items in chosen.items():
        draw_items(drawn, number, items)
    write_report(inputs, manifest, drawn)
    text = (out / "report.html").read_text()
    return Page(text), text


def draw_items(drawn: DrawSettings, number: int, items: list) -> None:
    assert draw_chunk({"name": part_name(number), "inputs": json.dumps(items)}, drawn)["failure"] == ""


def test_the_page_says_what_the_manifest_says(images: Path, tmp_path: Path) -> None:
    page, text = report(images, tmp_path)
    totals = read_json(open_store(str(tmp_path)), "manifest.json")["totals"]
    assert totals == {"images": 12, "rows": 10, "rejects": 2, "detections": 45}
    for words in (
        "Predictions of models:/shapes/1 12 images in the folder", "Images 12 ", "Detections 45 4.5 per image",
        "Without a detection 1 10.0 % of images", "Rejects 2 16.7 % of images", "cat 33 73.3 %", f"{EVIL} 12 26.7 %",
        "1 class without a detection yak", "0.85 to 0.90 9 ", "2 to 3 2 4 to 7 4 8 to 15 2 ",
        "1 decode: not an image of a known format broken.png", "1 decode: the file is empty empty.png",
        "Score threshold 0.05", "Most detections 100 of each image", "Classes all 3", "Tiles no", "config.json 00000",
    ):  # fmt: skip
        assert words in page.text, page.text
    assert text.startswith("<!DOCTYPE html>\n")
    assert str(tmp_path) not in text, "the same wherever it lies"


def test_it_needs_nothing_but_itself(images: Path, tmp_path: Path) -> None:
    page, text = report(images, tmp_path)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    assert not re.findall(r"@import|url\(", text)
    assert all(each["src"].startswith("data:image/jpeg;base64,") and each["alt"] for each in page.all("img"))
    assert max(len(each["src"]) for each in page.all("img")) < 30_000, "though the images are noise"


def test_names_of_users_stay_text(tmp_path: Path) -> None:
    pictures = tmp_path / "in" / EVIL.rpartition("/")[0]
    pictures.mkdir(parents=True)
    cv2.imwrite(str(pictures / f"{EVIL.rpartition('/')[2]}5.png"), np.full((50, 60, 3), 100, np.uint8))
    (pictures / f"{EVIL.rpartition('/')[2]}.jpg").write_bytes(b"broken")
    page, text = report(tmp_path / "in", tmp_path / "out", PredictRun(overlays=2), model=f"models:/{EVIL}/1")
    assert "<script" not in text
    assert "script" not in {tag for tag, _ in page.elements}
    for words in (f"models:/{EVIL}/1", f"{EVIL}5.png", f"{EVIL}.jpg", f"1 {EVIL}"):
        assert words in page.text
    links = [each["href"] for each in page.all("a")]
    assert len(links) == 2
    assert all((tmp_path / "out" / unquote(link)).is_file() for link in links)


def test_names_that_are_no_unicode_are_shown_escaped(tmp_path: Path) -> None:
    source = tmp_path / b"caf\xe9".decode(errors="surrogateescape")
    source.mkdir()
    cv2.imwrite(str(tmp_path / "1.png"), np.zeros((30, 40, 3), np.uint8))
    shutil.copy(tmp_path / "1.png", source / b"b\xe4r.png".decode(errors="surrogateescape"))
    shutil.move(tmp_path / "1.png", source / "1.png")
    page, _ = report(source, tmp_path / "out", PredictRun(overlays=1))
    assert "source: file name is not Unicode b\\udce4r.png" in page.text
    assert len(page.all("img")) == 1


def test_pictures_are_spread_over_all_and_those_that_were_drawn(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    names = [f"{i:04d}.png" for i in range(200)]
    for name in names:
        (tmp_path / "in" / name).touch()
    inputs = open_inputs(str(tmp_path / "in"), max_pixels=MAX_PIXELS)
    shown = images_to_show(inputs, set(), 16)
    found = [item.name for items in shown.values() for item in items]
    assert (len(found), found[0], found[-1], found) == (SPREAD, names[0], names[-1], sorted(found))
    gaps = np.diff([names.index(name) for name in found])
    assert gaps.max() - gaps.min() <= 1
    drawn = choose(inputs, PredictRun(overlays=100), 16)
    there = {overlay_name(inputs.reader, item) for items in drawn.values() for item in items}
    more = [item.name for items in images_to_show(inputs, there, 16).values() for item in items]
    assert more == sorted(set(found) | set(names[:MOST_DRAWN])), "at most so many: the page would be too large"


def test_pictures_show_what_was_found(images: Path, tmp_path: Path) -> None:
    page, text = report(images, tmp_path, PredictRun(overlay_images=("03.png", "08.png")))
    alts = [each["alt"] for each in page.all("img")]
    assert alts == [f"{i:02d}.png with its detections" for i in range(10)]
    assert f"03.png 3 detections, best score 0.87, large picture 2 cat 1 {EVIL}" in page.text
    assert "Evenly spread over all images, with some of those in overlays/." in page.text
    assert f"09.png 9 detections, best score 0.87 6 cat 2 {EVIL}" in page.text, "the ninth is not drawn"
    assert {each["href"] for each in page.all("a")} == {f"overlays/{name}.png" for name in ("03.png", "08.png")}
    assert text.count("00.png") == 3, "name, URI and alternative text: nothing was drawn"


def test_an_image_that_is_gone_says_so_in_its_place(images: Path, tmp_path: Path) -> None:
    """The prediction is finished: only its picture is not to be had."""
    shutil.copytree(images, tmp_path / "in")
    inputs, store = open_inputs(str(tmp_path / "in"), max_pixels=MAX_PIXELS), open_store(str(tmp_path / "out"))
    manifest, drawn = finish(inputs, store, CATEGORIES, find)
    (tmp_path / "in" / "04.png").unlink()
    write_report(inputs, manifest, drawn)
    page = Page((tmp_path / "out/report.html").read_text())
    assert "Could not be read for this page: no such file 04.png 4 detections, best score 0.87" in page.text
    assert len(page.all("img")) == 9


class Failing:
    """A reader that reads nothing."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def picture_name(self, item: Input) -> str:
        return item.name

    def read(self, item: Input, watch: Stopwatch) -> Picture:
        raise self.error


def test_a_store_that_is_gone_leaves_a_page(images: Path, tmp_path: Path) -> None:
    """As shards may be."""
    inputs, store = open_inputs(str(images), max_pixels=MAX_PIXELS), open_store(str(tmp_path))
    manifest, drawn = finish(inputs, store, CATEGORIES, find)
    gone = Failing(FileNotFoundError("there is no folder <shards>"))
    write_report(inputs, manifest, replace(drawn, reader=gone))
    page = Page((tmp_path / "report.html").read_text())
    assert page.text.count("Could not be read for this page: there is no folder <shards>") == 12
    assert "Detections 45" in page.text
    assert "09.png" in page.text
    assert "0 detections" not in page.text, "nobody knows which row is the image's"


@pytest.mark.parametrize("error", [UnreachableError, PermissionError])
def test_a_store_that_does_not_answer_now_is_asked_again_later(images: Path, tmp_path: Path, error: Any) -> None:
    inputs, store = open_inputs(str(images), max_pixels=MAX_PIXELS), open_store(str(tmp_path))
    manifest, drawn = finish(inputs, store, CATEGORIES, find)
    with pytest.raises(error, match="the storage is away"):
        write_report(inputs, manifest, replace(drawn, reader=Failing(error("the storage is away"))))
    assert not store.exists("report.html")


def test_no_secret_of_a_list_is_shown(images: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("https://host/a.jpg?X-Amz-Signature=hidden\n")
    inputs, store = open_inputs(str(tmp_path / "list.txt"), max_pixels=MAX_PIXELS), open_store(str(tmp_path / "out"))
    shown = images_to_show(inputs, set(), 1)
    with store.new_file(part_name(0)) as path:
        pq.write_table(PREDICTIONS.empty_table(), path)
    (made,) = make_thumbnails(shown, set(), DrawSettings(Failing(FileNotFoundError("gone")), store, CATEGORIES))
    assert (made.uri, made.failure) == ("https://host/a.jpg", "gone")


@pytest.mark.parametrize("kind", ["all rejects", "one image", "a list"])
def test_few_images(images: Path, tmp_path: Path, kind: str) -> None:
    source = tmp_path / "in"
    source.mkdir()
    if kind == "all rejects":
        for i in range(5):
            (source / f"{i}.jpg").write_bytes(b"")
        page, _ = report(source, tmp_path / "out")
        for words in (
            "Rejects 5 100.0 % of images",
            "5 decode: the file is empty 0.jpg 1.jpg 2.jpg and 2 more",
            "Nothing was found.",
            "None of the images that were chosen",
        ):
            assert words in page.text
        assert "Scores" not in page.text
    elif kind == "one image":
        shutil.copy(images / "00.png", source)
        page, _ = report(source, tmp_path / "out")
        for words in (
            "1 image in the folder",
            "Nothing was found.",
            "00.png 0 detections",
            "Every image could be used",
        ):
            assert words in page.text
    else:
        (tmp_path / "list.txt").write_text(f"{images}/05.png\n{images}/gone.png\n")
        page, _ = report(tmp_path / "list.txt", tmp_path / "out", PredictRun(overlays=2))
        for words in ("2 images of the list", "05.png 5 detections", "1 read: no such file gone.png"):
            assert words in page.text
        assert len(page.all("a")) == 2


def test_the_same_bytes_wherever_it_lies(images: Path, tmp_path: Path) -> None:
    pages = [report(images, tmp_path / name, PredictRun(overlays=2))[1] for name in ("a", "b")]
    assert pages[0] == pages[1]


def test_it_goes_before_what_it_shows_is_made_again(images: Path, tmp_path: Path) -> None:
    report(images, tmp_path)
    inputs, store = open_inputs(str(images), max_pixels=MAX_PIXELS), open_store(str(tmp_path))
    plan = read_json(store, "manifest.json")["plan"]
    assert claim(store, plan, inputs, 4) is None
    assert store.exists("report.html")
    store.remove(part_name(1))
    assert claim(store, plan, inputs, 4) == {0, 2}
    assert not store.exists("report.html")


def test_many_classes_are_all_there(images: Path, tmp_path: Path) -> None:
    many = [Category(i, f"class {i}") for i in range(1, 101)]

    def one_of_each(picture: Picture) -> list[dict[str, Any]]:
        first = int(Path(picture.uri).stem)
        return [detection(label, 0.5, (0, 0, 9, 9)) for label in range(1, 101 - first)]

    page, text = report(images, tmp_path, categories=many, find=one_of_each)
    assert "70 more classes" in page.text
    names = re.findall(r'<th scope="row">(class \d+)</th>', text)
    assert (len(names), names[:2], names[-1]) == (100, ["class 1", "class 2"], "class 100")


def test_bars() -> None:
    assert [(b.label, b.percent) for b in score_bars([0, 3, 12] + [0] * 17)][:3] == [
        ("0.00 to 0.05", "0.00"), ("0.05 to 0.10", "25.00"), ("0.10 to 0.15", "100.00"),
    ]  # fmt: skip
    assert [b.label for b in size_bars([1, 1, 1, 1])] == ["0", "1", "2 to 3", "4 to 7"]
    assert [(b.label, b.count) for b in class_bars([0, 2, 5], CATEGORIES)] == [(EVIL, 5), ("cat", 2), ("yak", 0)]
    assert score_bars([0] * 20)[0].percent == "0"


def test_tallies_are_of_what_was_found_and_add_up(images: Path, tmp_path: Path) -> None:
    report(images, tmp_path)
    tallies = [tally_part(path) for path in sorted((tmp_path / "predictions").glob("*.parquet"))]
    total = sum(tallies, Tally())
    assert total.labels == [0, 33, 12]
    assert total.images == [1, 1, 2, 4, 2]
    assert total.scores == SCORES
    manifest = read_json(open_store(str(tmp_path)), "manifest.json")
    assert Tally(**manifest["tally"]) == total
    assert [Tally(**part["tally"]) for part in manifest["parts"]] == tallies
    receipt = ChunkReceipt(0, 1, 2, 3, 0, tally=tallies[0])
    assert ChunkReceipt.from_json(receipt.to_json()) == receipt


MEASURED = """{
    images: [...document.images].map(each => each.naturalWidth),
    bars: [...document.querySelectorAll(".track > div")].map(
        bar => [Number(bar.dataset.count), bar.getBoundingClientRect().width, bar.parentElement.clientWidth]),
    columns: [...document.querySelectorAll(".columns")].map(chart => [...chart.querySelectorAll("[data-count]")].map(
        bar => [Number(bar.dataset.count), bar.getBoundingClientRect().height])),
    text: document.body.innerText,
    wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
}"""


def test_in_a_browser(images: Path, tmp_path: Path) -> None:
    report(images, tmp_path / "out", PredictRun(overlays=1))
    page, profile = tmp_path / "out" / "report.html", tmp_path / "profile"
    assert show(page, profile).console == [], "nothing was refused, nothing failed"
    for width in (400, 1400):
        seen = measure(page, profile, MEASURED, width=width)
        assert len(seen["images"]) == 10
        assert min(seen["images"]) > 0
        assert seen["wide"] == 0, "nothing is wider than the window"
        assert [count for count, _, _ in seen["bars"]] == [33, 12]
        (_, longest, _), (_, other, _) = seen["bars"]
        assert longest > 40
        assert other / longest == pytest.approx(12 / 33, abs=0.02)
        scores, sizes = seen["columns"]
        assert [count for count, _ in scores] == SCORES
        assert [height for _, height in scores] == pytest.approx([180 * count / 9 for count, _ in scores], abs=2)
        assert [count for count, _ in sizes] == [1, 1, 2, 4, 2]
        for words in ("models:/shapes/1", "Detections\n45", "Rejects\n2", EVIL):
            assert words in seen["text"]
