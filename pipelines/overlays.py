"""Pictures of some images with what was found in them, drawn from the finished parts: no model is needed."""

from __future__ import annotations

import hashlib
import heapq
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq

from mrcnn.structures import Category
from mrcnn.visualize import draw_results
from pipelines.inputs import Input, Inputs, Picture, Reader
from pipelines.pixels import MAX_PIXELS, Pixels, allow_pixels
from pipelines.predict_folder import OVERLAYS, REPORT, part_name
from pipelines.predict_options import PredictRun
from pipelines.stages import Stopwatch
from pipelines.storage import Store
from pipelines.tasks import failing_in_words, run_tasks
from pipelines.transforms import encode, use_one_thread

Chosen = dict[int, list[Input]]
"""Images to draw, by their chunk's number"""


@dataclass(frozen=True)
class DrawSettings:
    """What all pictures have in common."""

    reader: Reader
    out: Store
    categories: tuple[Category, ...]
    max_pixels: int = MAX_PIXELS


def overlay_name(reader: Reader, item: Input) -> str:
    """Where the picture of an image goes."""
    return f"{OVERLAYS}/{reader.picture_name(item)}.png"  # a.jpg and a.png are two


def choose(inputs: Inputs, run: PredictRun, size: int) -> Chosen:
    """The images that are to be drawn. Goes through all names, and holds those of the chosen ones.

    Raises ValueError for the name of an image that is not there.
    """
    if run.overlay_names:
        found = _named(inputs, run.overlay_names, size)
    elif not run.overlays:
        return {}
    elif run.overlay_images[0] == "random":
        smallest = heapq.nsmallest(run.overlays, _by_chance(inputs, run.overlay_seed, size))
        found = [(number, item) for _, number, item in sorted(smallest, key=lambda each: each[1])]
    else:
        found = _first(inputs, run.overlays, size)
    chosen: Chosen = {}
    for number, item in found:
        chosen.setdefault(number, []).append(item)
    return chosen


def _usable(inputs: Inputs, size: int) -> Iterator[tuple[int, Input]]:
    return ((chunk.number, item) for chunk in inputs.chunks(size) for item in chunk.inputs if not item.fault)


def _first(inputs: Inputs, count: int, size: int) -> list[tuple[int, Input]]:
    return [each for each, _ in zip(_usable(inputs, size), range(count), strict=False)]


def _by_chance(inputs: Inputs, seed: int, size: int) -> Iterator[tuple[bytes, int, Input]]:
    """Each with a digest of its name and the seed: the smallest are a sample that depends on nothing else."""
    for number, item in _usable(inputs, size):
        yield hashlib.sha256(f"{seed} {item.name}".encode(errors="surrogateescape")).digest(), number, item


def _named(inputs: Inputs, names: Sequence[str], size: int) -> list[tuple[int, Input]]:
    wanted = set(names)
    found = [each for each in _usable(inputs, size) if each[1].name in wanted]
    missing = wanted - {item.name for _, item in found}
    if missing:
        raise ValueError(
            f"--overlay-images {' '.join(sorted(missing))}: there is no such image in {inputs.uri}: give names as they "
            "are below the folder, full URIs of a list, numbers of rows of shards, or first or random"
        )
    return found


def draw(chosen: Chosen, settings: DrawSettings) -> int:
    """Draw the pictures that are missing, a task for each chunk that has some. Returns how many are there now: none of
    images that were rejected."""
    there = overlays_there(settings.out)
    missing = {
        number: [item for item in items if overlay_name(settings.reader, item) not in there]
        for number, items in chosen.items()
    }
    tasks = [{"name": part_name(n), "inputs": json.dumps(items)} for n, items in missing.items() if items]
    drawn = sum(len(items) for items in chosen.values()) - sum(len(items) for items in missing.values())
    for row in run_tasks(partial(draw_chunk, settings=settings), tasks) if tasks else ():
        drawn += row["drawn"]
    return drawn


def overlays_there(out: Store) -> set[str]:
    """Names of the pictures that are there, as of `overlay_name`."""
    return {f"{OVERLAYS}/{name}" for name, _ in out.join(OVERLAYS).entries()}


@failing_in_words
def draw_chunk(task: dict[str, Any], settings: DrawSettings) -> dict[str, Any]:
    """A task of Ray Data: {name of a part, inputs (JSON)} -> {drawn}."""
    use_one_thread()
    allow_pixels(settings.max_pixels)
    drawn = 0
    with settings.out.local_copy(task["name"]) as path, pq.ParquetFile(path) as part:
        rows = PartRows(part)
        for item in (Input(*each) for each in json.loads(task["inputs"])):
            picture = settings.reader.read(item, Stopwatch())
            row = rows.get(picture.uri)
            if row is not None and isinstance(picture, Picture):
                pixels = draw_row(picture, row, settings.categories)
                if not drawn:
                    _forget_report(settings.out)
                settings.out.write_bytes(overlay_name(settings.reader, item), encode(pixels, "png"))
                drawn += 1
    return {"drawn": drawn}


def _forget_report(out: Store) -> None:
    """It does not show what is drawn now. Another task may have done so."""
    with suppress(FileNotFoundError):
        out.remove(REPORT)


class PartRows:
    """Rows of a part by the URI of their image. Only groups of rows that are asked for are read."""

    def __init__(self, part: pq.ParquetFile) -> None:
        self._part = part
        groups = [part.read_row_group(i, columns=["uri"])["uri"].to_pylist() for i in range(part.num_row_groups)]
        self._places = {uri: (group, i) for group, uris in enumerate(groups) for i, uri in enumerate(uris)}

    def get(self, uri: str) -> dict[str, Any] | None:
        """The row of an image; None where it has none: it was rejected."""
        if uri not in self._places:
            return None
        group, i = self._places[uri]
        (row,) = self._part.read_row_group(group).slice(i, 1).to_pylist()
        return dict(row)


def draw_row(
    picture: Picture, row: dict[str, Any], categories: Sequence[Category], *, thumbnail: int | None = None
) -> Pixels:
    """An image with what was found in it, see `draw_results`."""
    pixels, size = picture.pixels, (row["height"], row["width"])
    if pixels.shape[:2] != size:  # stored in another size than its source's
        pixels = np.asarray(cv2.resize(pixels, size[::-1], interpolation=cv2.INTER_LINEAR), np.uint8)
    return draw_results(pixels, row["detections"], categories, thumbnail=thumbnail)
