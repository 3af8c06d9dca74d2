"""TIFFs that Pillow does not know, or mistakes: deep planes, deep gray of the other byte order, BigTIFF of it.

Only without compression: what compressed data come to is not bounded by their number of bytes.
"""

from __future__ import annotations

import io
import logging
from math import prod
from typing import Any

import numpy as np
from PIL import Image
from PIL.TiffImagePlugin import XMP
from tifffile import COMPRESSION, EXTRASAMPLE, PHOTOMETRIC, TiffFile, TiffPage

from pipelines.pixels import ORIENTATION, DecodeError, Pixels, check_size, eight_bits_of_gray, orientation_by

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it tells becomes a reject here

GRAY = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
SAMPLES: dict[int, int] = {**dict.fromkeys(GRAY, 1), PHOTOMETRIC.RGB: 3, PHOTOMETRIC.SEPARATED: 4}
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
ALPHA: dict[int, str] = {EXTRASAMPLE.UNASSALPHA: "A", EXTRASAMPLE.ASSOCALPHA: "a"}  # Pillow's letters for them


def open_tiff(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The first image in a TIFF, with 8 bits a sample, and its orientation. Raises DecodeError, and what tifffile
    raises."""
    with TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        assert isinstance(page, TiffPage)
        check_size(page.imagelength, page.imagewidth, max_pixels)
        mode = _mode(page)
        _check_whole(page, len(data))
        pixels = _eight_bits(page)
        orientation = orientation_by(page.tags.valueof(ORIENTATION), _bytes(page.tags.valueof(XMP)))
    image = Image.frombytes(mode, (page.imagewidth, page.imagelength), pixels[..., : len(mode)].tobytes())
    return image.convert(mode.upper()), orientation


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


def _mode(page: TiffPage) -> str:
    """Pillow's name for what a pixel has; samples that the TIFF does not explain are left out. Raises DecodeError."""
    samples = SAMPLES.get(-1 if page.photometric is None else page.photometric, 0)
    if not samples or page.axes not in ("YX", "YXS", "SYX"):
        raise DecodeError(f"a TIFF of {_name(page.photometric)}, {page.axes}, is not known: save it as RGB")
    if page.compression != COMPRESSION.NONE:
        raise DecodeError(f"such a TIFF with {_name(page.compression)} compression is not known: save it without")
    if page.dtype is None or page.dtype.kind != "u" or page.bitspersample != 8 * page.dtype.itemsize:
        raise DecodeError(f"a TIFF of {page.bitspersample} bits, {page.dtype}, is not known: save it with 8 or 16 bits")
    alpha = ALPHA.get(page.extrasamples[0], "") if page.extrasamples and samples != 4 else ""
    return MODES[samples] + alpha


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))


def _check_whole(page: TiffPage, size: int) -> None:
    """Raise DecodeError unless all strips or tiles are in the file, which is no smaller than its pixels: of what is not
    there tifffile makes zeros, and strips at one place could come to any size, however many are stated."""
    assert page.dtype is not None
    ends = [offset + count for offset, count in zip(page.dataoffsets, page.databytecounts, strict=False)]
    there = sum(page.databytecounts)
    stated = prod(page.shape) * page.dtype.itemsize
    if len(ends) != prod(page.chunked) or min(page.databytecounts, default=0) <= 0 or min(page.dataoffsets) <= 0:
        raise DecodeError(
            f"truncated image: {len(ends)} strips or tiles of {prod(page.chunked)}, or some without bytes"
        )
    if max(ends) > size or min(there, size) < stated:
        raise DecodeError(f"truncated image: {min(there, size)} bytes of {stated}")


def _eight_bits(page: TiffPage) -> Pixels:
    """(H, W, samples). Deep colours are cut, as Pillow does it, gray is rounded."""
    pixels = page.asarray(maxworkers=1)
    if page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    if page.photometric not in GRAY:
        return (pixels >> (8 * pixels.itemsize - 8)).astype(np.uint8)
    eight = eight_bits_of_gray(pixels, page.bitspersample)
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        eight[..., 0] = 255 - eight[..., 0]
    return eight
