"""From a decoded image with its objects to rows of shards: cut, resized, encoded."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrcnn.preprocess import resize_image, resized_size
from pipelines.config import Encoding
from pipelines.pixels import Pixels
from pipelines.scaling import Scaling, scale_instances
from pipelines.shards import Drawn
from pipelines.storage import Store
from pipelines.tiling import Part, Tiling, windows
from pipelines.transforms import MAX_SIDE, encode


@dataclass(frozen=True)
class Scale:
    """One of the data sets that a build makes: where it goes, and the sides of its images."""

    out: Store
    shorter_side: int
    """0: every image keeps its own size"""
    longer_side: int

    def size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width of a stored image."""
        if not self.shorter_side:
            return height, width
        return resized_size(height, width, shorter_side=self.shorter_side, longer_side=self.longer_side)


@dataclass(frozen=True)
class Picture:
    """An image of the source, decoded."""

    image_id: int
    uri: str
    pixels: Pixels


def size_fault(source: tuple[int, int], *, tiling: Tiling, scales: Sequence[Scale], encoding: Encoding) -> str | None:
    """Why an image of (height, width), or a tile of it, cannot be stored at one of the scales."""
    window, bound = windows(source, tiling)[0], MAX_SIDE.get(encoding)  # all windows have one size
    for scale in scales:
        height, width = scale.size(window.height, window.width)
        if bound and max(height, width) > bound:
            return f"image has a side too long for {encoding}: {width} x {height} pixels to store, the bound is {bound}"
    return None


def make_row(picture: Picture, part: Part, scale: Scale, encoding: Encoding) -> dict[str, Any]:
    """A row as in pipelines/schema.py of the whole image or of one of its tiles."""
    window = part.window
    pixels = picture.pixels[window.y : window.y + window.height, window.x : window.x + window.width]
    source = window.height, window.width
    size = scale.size(*source)
    whole = picture.pixels.shape[:2]
    tile = None
    if source != whole:
        tile = {"image_id": picture.image_id, "y": window.y, "x": window.x, "height": whole[0], "width": whole[1]}
    return {
        "image_id": picture.image_id if tile is None else tile_id(picture.image_id, window.y, window.x),
        "uri": picture.uri,
        "height": size[0],
        "width": size[1],
        "source_height": source[0],
        "source_width": source[1],
        "encoding": encoding,
        "image": _drawn(pixels, size) if encoding == "raw" else _encoded(pixels, size, encoding),
        "instances": scale_instances(part.instances, Scaling(source, size)),
        "tile": tile,
    }


def _drawn(pixels: Pixels, size: tuple[int, int]) -> Drawn:
    """Pixels that are resized into the file. Until then they are a view: of all tiles, one at a time is copied."""

    def draw(out: NDArray[np.uint8]) -> None:
        resize_image(np.ascontiguousarray(pixels), *size, out=out.reshape(*size, 3))

    return Drawn(size[0] * size[1] * 3, draw)


def _encoded(pixels: Pixels, size: tuple[int, int], encoding: Encoding) -> bytes:
    return encode(resize_image(np.ascontiguousarray(pixels), *size), encoding)


def tile_id(image_id: int, y: int, x: int) -> int:
    """Image id of a tile: 63 bits drawn from its image's id and its corner, the same in every build."""
    digest = hashlib.blake2b(struct.pack("<qqq", image_id, y, x), digest_size=8, person=b"tile").digest()
    return int.from_bytes(digest, "little") >> 1
