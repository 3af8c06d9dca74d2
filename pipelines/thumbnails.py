"""Small pictures of some images with what was found in them, for the report: read and drawn without Ray or a model."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import pyarrow.parquet as pq
import simplejpeg

from mrcnn.visualize import DRAWN_SCORE
from pipelines.inputs import Input, Inputs, Picture
from pipelines.overlays import Chosen, DrawSettings, PartRows, draw_row, overlay_name
from pipelines.pixels import MAX_PIXELS, Pixels, allow_pixels
from pipelines.predict_folder import part_name
from pipelines.prefetch import prefetched
from pipelines.records import Reject
from pipelines.stages import Stopwatch
from pipelines.storage_errors import UnreachableError, without_secrets

SPREAD = 24  # thumbnails, evenly over all inputs
MOST_DRAWN = 48  # beside those, of the images that --overlays draws
SIDE = 400  # pixels
MOST_BYTES = 22_000  # of a JPEG, which base64 makes a third longer
QUALITIES = (82, 70, 55, 40)
THREADS = 4


@dataclass(frozen=True)
class Thumbnail:
    """An image and what was found in it."""

    uri: str
    detections: int | None
    """None where its row could not be told"""
    best: float
    """Score; 0 without detections"""
    drawn: tuple[tuple[int, int], ...]
    """Label and number of the detections that are drawn, most frequent first"""
    overlay: str
    """Name of the large picture; empty without"""
    picture: str = ""
    """Data URI; empty where the image could not be read"""
    size: tuple[int, int] = (0, 0)
    """Width and height of the picture"""
    failure: str = ""
    """Why it could not be read"""


def images_to_show(inputs: Inputs, there: Collection[str], size: int) -> Chosen:
    """Images that lie evenly over all, and the first of those of which there are overlays of these names, in the
    inputs' order. `size` is a chunk's."""
    places = set(np.linspace(0, inputs.count - 1, SPREAD).astype(np.int64).tolist())
    left = min(len(there), MOST_DRAWN)
    shown: Chosen = {}
    for chunk in inputs.chunks(size):
        for place, item in enumerate(chunk.inputs, start=chunk.number * size):
            if item.fault:
                continue
            is_drawn = left > 0 and overlay_name(inputs.reader, item) in there
            left -= is_drawn
            if is_drawn or place in places:
                shown.setdefault(chunk.number, []).append(item)
    return shown


def make_thumbnails(shown: Chosen, there: Collection[str], settings: DrawSettings) -> list[Thumbnail]:
    """Of each image but those that were rejected. One that is gone says so; `there` are names of overlays.

    Raises PermissionError or UnreachableError where the images' storage does not answer: it may later.
    """
    allow_pixels(settings.max_pixels)
    threads = THREADS if settings.max_pixels <= MAX_PIXELS else 1  # of the largest images, one is in memory
    made = prefetched(partial(_of_chunk, settings, there), shown.items(), threads=threads, ahead=threads)
    return [each for some in made for each in some]


def _of_chunk(settings: DrawSettings, there: Collection[str], numbered: tuple[int, Sequence[Input]]) -> list[Thumbnail]:
    number, items = numbered
    with settings.out.local_copy(part_name(number)) as path, pq.ParquetFile(path) as part:
        rows = PartRows(part)
        return [made for item in items for made in _of_image(settings, there, item, rows)]


def _of_image(settings: DrawSettings, there: Collection[str], item: Input, rows: PartRows) -> Iterator[Thumbnail]:
    overlay = overlay_name(settings.reader, item)
    overlay = overlay if overlay in there else ""
    try:
        picture = settings.reader.read(item, Stopwatch())
    except UnreachableError:
        raise
    except (FileNotFoundError, ValueError) as error:  # shards or a bucket that are gone: all is predicted none the less
        yield Thumbnail(without_secrets(item.name), None, 0.0, (), overlay, failure=str(error))
        return
    row = rows.get(picture.uri)
    if row is not None:
        yield _thumbnail(picture, row, settings, overlay)


def _thumbnail(picture: Picture | Reject, row: dict[str, Any], settings: DrawSettings, overlay: str) -> Thumbnail:
    found = row["detections"]
    best = max((each["score"] for each in found), default=0.0)
    drawn = Counter(each["label"] for each in found if each["score"] >= DRAWN_SCORE)
    known = partial(Thumbnail, picture.uri, len(found), best, tuple(drawn.most_common()), overlay)
    if isinstance(picture, Reject):
        return known(failure=picture.reason)
    pixels = draw_row(picture, row, settings.categories, thumbnail=SIDE)
    return known(picture=_data_uri(pixels), size=(pixels.shape[1], pixels.shape[0]))


def _data_uri(pixels: Pixels) -> str:
    """A JPEG as good as there are bytes for."""
    for quality in QUALITIES:
        data = simplejpeg.encode_jpeg(pixels, quality=quality, colorspace="RGB", colorsubsampling="420")
        if len(data) <= MOST_BYTES:
            return f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return _data_uri(np.asarray(cv2.resize(pixels, None, fx=0.7, fy=0.7, interpolation=cv2.INTER_AREA), np.uint8))
