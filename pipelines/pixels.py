"""Images as arrays: what may be one, and what all ways to decode one have in common."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs
BYTES_OF_PIXEL = 16  # at most, in a file: four numbers of 32 bits
LONGEST_SIDE = 1_000_000  # pixels, as libpng has it: of a row that is far longer Pillow says that memory is short
GRAY_TOGETHER = 2**20  # pixels whose numbers are rounded at once: they take eight times as much memory meanwhile
ORIENTATION = 0x0112  # tag of EXIF and TIFF


class DecodeError(ValueError):
    """The bytes are not an image that can be used; the message says why."""


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise DecodeError for an image of more pixels, or with a longer side, than is allowed."""
    if max(height, width) > LONGEST_SIDE:
        raise DecodeError(f"decompression bomb: {width} x {height} pixels, the bound of a side is {LONGEST_SIDE}")
    if height * width > max_pixels:
        raise DecodeError(f"decompression bomb: {width} x {height} pixels, the bound is {max_pixels}")


def allow_pixels(max_pixels: int) -> None:
    """Raise Pillow's own bound in this process: it has but one for all images."""
    Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, max_pixels)


def orientation_by(told: Any, xmp: bytes) -> int:
    """What EXIF tells of it, if it is one of those that there are; else what XMP says, if it does."""
    return int(told) if told in range(1, 9) else _orientation_in_xmp(xmp)


def _orientation_in_xmp(xmp: bytes) -> int:
    """As Pillow reads it where an image has no EXIF."""
    image = Image.new("1", (1, 1))
    image.info["xmp"] = xmp
    return int(image.getexif().get(ORIENTATION, 1))


def turned(image: Pixels, orientation: int) -> Pixels:
    """Turn and mirror as the EXIF orientation says (1: as stored, ... 8)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def eight_bits_of_gray(gray: NDArray[Any], bits: int) -> Pixels:
    """Numbers of so many bits, rounded to 8; of 32 bits only 16 are meant where all values fit into them."""
    fits = bits <= 16 or gray.max(initial=0) <= 65535
    top = 2 ** min(bits, 16) - 1 if fits else np.iinfo(gray.dtype).max
    strips = np.array_split(gray, max(1, min(len(gray), gray.size // GRAY_TOGETHER)))
    return np.concatenate([np.clip(np.rint(each * (255.0 / top)), 0, 255).astype(np.uint8) for each in strips])
