"""TIFFs that Pillow does not know, or mistakes: deep planes, deep gray of the other byte order, BigTIFF of it."""

from __future__ import annotations

import io
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    PLANAR_CONFIGURATION,
    YCBCRSUBSAMPLING,
    TiffImageFile,
)
from tifffile import EXTRASAMPLE, PHOTOMETRIC, TiffFile, TiffPage

from pipelines.pixels import ORIENTATION, DecodeError, Pixels, check_size, eight_bits_of_gray

logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what it tells becomes a reject here

PLANES, YCBCR = 2, 6  # values of tags
GRAY = (PHOTOMETRIC.MINISWHITE, PHOTOMETRIC.MINISBLACK)
SAMPLES: dict[int, int] = {**dict.fromkeys(GRAY, 1), PHOTOMETRIC.RGB: 3, PHOTOMETRIC.SEPARATED: 4}
MODES = {1: "L", 3: "RGB", 4: "CMYK"}
ALPHA: dict[int, str] = {EXTRASAMPLE.UNASSALPHA: "A", EXTRASAMPLE.ASSOCALPHA: "a"}  # Pillow's letters for them
MOST_BYTES = 16  # of a pixel: of what has more, memory may be too small for what is left out


def is_mistaken(image: TiffImageFile) -> bool:
    """Whether Pillow would make other pixels of a TIFF that it has opened: of numbers of 16 bits in planes, where they
    are not compressed, it takes each byte for a number. Raises DecodeError where there is none who does better."""
    tags = image.tag_v2
    if image.tile[0].codec_name != "raw":
        return False
    if tags.get(PHOTOMETRIC_INTERPRETATION) == YCBCR and tags.get(YCBCRSUBSAMPLING, (2, 2)) != (1, 1):
        raise DecodeError("a TIFF of subsampled YCbCr without compression is not known: save it as RGB")
    return tags.get(PLANAR_CONFIGURATION) == PLANES and max(tags.get(BITSPERSAMPLE, (1,))) > 8


def open_tiff(data: bytes, max_pixels: int) -> tuple[Image.Image, int]:
    """The first image in a TIFF, with 8 bits a sample, and its orientation. Raises DecodeError, and what tifffile
    raises."""
    with TiffFile(io.BytesIO(data)) as file:
        page = file.pages.first
        assert isinstance(page, TiffPage)
        check_size(page.imagelength, page.imagewidth, max_pixels)
        mode = _mode(page)
        pixels = _eight_bits(page)
        orientation = int(page.tags.valueof(ORIENTATION, default=1))
    image = Image.frombytes(mode, (page.imagewidth, page.imagelength), pixels[..., : len(mode)].tobytes())
    return image.convert(mode.upper()), orientation


def _mode(page: TiffPage) -> str:
    """Pillow's name for what a pixel has; samples that the TIFF does not explain are left out."""
    samples = SAMPLES.get(-1 if page.photometric is None else page.photometric, 0)
    size = page.samplesperpixel * page.dtype.itemsize if page.dtype else MOST_BYTES + 1
    if not samples or page.axes not in ("YX", "YXS", "SYX") or size > MOST_BYTES:
        kind = getattr(page.photometric, "name", page.photometric)
        raise DecodeError(f"a TIFF of {kind} with {page.samplesperpixel} samples, {page.axes}, is not known")
    alpha = ALPHA.get(page.extrasamples[0], "") if page.extrasamples and samples != 4 else ""
    return MODES[samples] + alpha


def _eight_bits(page: TiffPage) -> Pixels:
    """(H, W, samples). Deep colours are cut, as Pillow does it, gray is rounded."""
    pixels = _decompressed(page)
    if pixels.dtype.kind not in "ub":
        raise DecodeError(f"pixels of the type {pixels.dtype} have no known range")
    if page.axes == "SYX":
        pixels = pixels.transpose(1, 2, 0)
    pixels = pixels.reshape(page.imagelength, page.imagewidth, -1)
    if pixels.dtype == bool:
        eight = pixels * np.uint8(255)
    elif page.photometric in GRAY:
        eight = eight_bits_of_gray(pixels, page.bitspersample)
    else:
        eight = (pixels >> (8 * pixels.itemsize - 8)).astype(np.uint8)
    if page.photometric == PHOTOMETRIC.MINISWHITE:
        eight[..., 0] = 255 - eight[..., 0]
    return eight


def _decompressed(page: TiffPage) -> NDArray[Any]:
    try:
        return page.asarray()
    except (ValueError, NotImplementedError) as error:
        if "imagecodecs" not in str(error):
            raise
        what = f"{page.bitspersample} bits with {getattr(page.compression, 'name', page.compression)} compression"
        raise DecodeError(f"a TIFF of {what} is not known: save it with 8 or 16 bits and without") from None
