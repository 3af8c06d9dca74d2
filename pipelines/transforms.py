"""Bytes -> RGB, and RGB -> bytes that are stored. Images are (H, W, 3) uint8 RGB arrays throughout."""

from __future__ import annotations

import cv2
import numpy as np
import simplejpeg
import torch

from pipelines.config import Encoding
from pipelines.jpeg_segments import check_scans, read_header
from pipelines.pillow_images import decode_any, open_image, orientation_of
from pipelines.pixels import MAX_PIXELS, DecodeError, Pixels, check_size, turned

PIXELS_VERSION = 4  # raised where the same file gives other pixels or masks: no build mixes shards of before and after
JPEG_QUALITY = 95
MAX_SIDE: dict[Encoding, int] = {"jpeg": 65_500, "png": 1_000_000}  # libjpeg's and libpng's bounds


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Any image file as the RGB that a viewer shows: upright, alpha over white, 16 bit as 8, first frame.

    simplejpeg for ordinary JPEGs, Pillow for all else. Colour profiles are not applied: networks are trained on, and
    the peers read, the numbers as they are stored. CMYK becomes RGB by Pillow's formula, and JPEG's CMYK is taken for
    inverted, as Adobe writes it and browsers read it.
    Raises DecodeError, also for an image of more than `max_pixels`; beyond Pillow's own bound, see `allow_pixels`.
    """
    if not data:
        raise DecodeError("the file is empty")
    image = _decode_jpeg(data, max_pixels) if simplejpeg.is_jpeg(data) else None
    return decode_any(data, max_pixels) if image is None else image


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels | None:
    """None where Pillow has to look at it: CMYK, sampling that simplejpeg does not know (a KeyError), or damage that
    libjpeg warns of and Pillow may forgive."""
    header = read_header(data)
    check_scans(data, header)
    try:
        height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
        check_size(height, width, max_pixels)
        if colorspace not in ("YCbCr", "RGB", "Gray"):
            return None
        image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    except DecodeError:
        raise
    except (ValueError, KeyError):
        return None
    return _upright(image, data) if header.may_be_turned else image


def _upright(image: Pixels, data: bytes) -> Pixels:
    try:
        with open_image(data) as header:
            orientation = orientation_of(header)
    except MemoryError:
        raise
    except Exception:  # as in pipelines/pillow_images.py
        return image
    return turned(image, orientation)


def use_one_thread() -> None:
    """One core for each Ray task: OpenCV and torch would otherwise each take them all."""
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def encode(image: Pixels, encoding: Encoding) -> bytes:
    """Pixels as a JPEG or PNG, no side longer than MAX_SIDE; raw ones need no encoding. The same pixels give the same
    bytes."""
    if encoding == "jpeg":
        return simplejpeg.encode_jpeg(image, quality=JPEG_QUALITY, colorspace="RGB", colorsubsampling="444")
    assert encoding == "png"
    good, data = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert good
    return data.tobytes()


def decode_stored(data: bytes | memoryview, *, encoding: str, height: int, width: int) -> Pixels:
    """The inverse of `encode` (JPEG's loss apart). Raw pixels are a read-only view of `data`.

    Raises ValueError where the bytes are not an image of height x width.
    """
    if encoding == "raw":
        return np.frombuffer(data, np.uint8).reshape(height, width, 3)
    if encoding == "jpeg":
        image = simplejpeg.decode_jpeg(data, colorspace="RGB")
    elif encoding == "png":
        image = _decode_png(data)
    else:
        raise ValueError(f"an image of this shard is stored as {encoding!r}: raw, jpeg and png are known")
    if image.shape != (height, width, 3):
        raise ValueError(f"an image has {image.shape[1]} x {image.shape[0]} pixels, {width} x {height} are stated")
    return image


def _decode_png(data: bytes | memoryview) -> Pixels:
    try:
        bgr = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    except cv2.error:  # no bytes, or a size beyond its bounds
        bgr = None
    if bgr is None:
        raise ValueError("an image of this shard is not a PNG: build the data again")
    return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB), np.uint8)
