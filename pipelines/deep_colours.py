"""Colours of more than 8 bits a sample of which Pillow makes others than a viewer shows."""

from __future__ import annotations

import cv2
import numpy as np
from PIL import Image

from pipelines.pixels import DecodeError, Pixels, eight_bits_of_gray

PNG_BITS = 24  # the byte that says how many a sample has
SIZES = b"\xff\x4f\xff\x51"  # how the codestream of a JPEG 2000 begins: sizes, and then what each sample is
SAMPLES = 40  # bytes from there to their number, before the three of each
SIGNED = 0x80
COLOURS, ENUMERATED, YCC = b"colr", b"\1", b"\0\0\0\x12"  # a box before it, and what it says
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # what it tells becomes a reject here


def is_deep_png(image: Image.Image, data: bytes) -> bool:
    """Whether it has 16 bits and a colour that is transparent, which Pillow looks for when it has cut them to 8."""
    return image.format == "PNG" and image.mode == "RGB" and "transparency" in image.info and data[PNG_BITS] == 16


def from_deep_png(data: bytes) -> Pixels:
    """Its RGB, the transparent colour white. Raises DecodeError."""
    bgra = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.shape[2:] != (4,):
        raise DecodeError("damaged image: a PNG of 16 bits whose transparent colour cannot be read")
    rgb = (bgra[..., 2::-1] // 256).astype(np.uint8)  # as Pillow does with all other deep colours
    rgb[bgra[..., 3] == 0] = 255
    return rgb


def is_deep_jpeg2000(image: Image.Image, data: bytes) -> bool:
    """Whether it has colours, or alpha, of more than 8 bits: Pillow rounds the largest numbers to 256, which is 0."""
    return image.format == "JPEG2000" and image.mode[0] != "I" and max(_jpeg2000_bits(data)[0], default=0) > 8


def from_deep_jpeg2000(data: bytes) -> Image.Image:
    """RGB or RGBA of 8 bits, rounded. Raises DecodeError."""
    bits, is_signed = _jpeg2000_bits(data)
    if len(bits) not in (3, 4) or len(set(bits)) > 1 or is_signed or _is_ycc(data):
        kind = "signed numbers" if is_signed else "YCC" if _is_ycc(data) else f"{len(bits)} samples"
        raise DecodeError(f"a JPEG 2000 of {kind}, {max(bits)} bits, is not known: save it as RGB or RGBA")
    bgra = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.dtype != np.uint16 or bgra.shape[2:] != (len(bits),):
        raise DecodeError(f"damaged image: a JPEG 2000 of {bits[0]} bits that cannot be read")
    order = [2, 1, 0, 3][: len(bits)]
    return Image.fromarray(np.ascontiguousarray(eight_bits_of_gray(bgra, bits[0])[..., order]))


def _jpeg2000_bits(data: bytes) -> tuple[list[int], bool]:
    """How many each sample has, and whether some have a sign."""
    at = data.find(SIZES) + SAMPLES
    count = int.from_bytes(data[at : at + 2], "big")
    stated = data[at + 2 : at + 2 + 3 * count : 3]
    return [(each & ~SIGNED) + 1 for each in stated], any(each & SIGNED for each in stated)


def _is_ycc(data: bytes) -> bool:
    """Which OpenCV makes others of."""
    _, box, stated = data[: data.find(SIZES)].partition(COLOURS)
    return bool(box) and stated[:1] == ENUMERATED and stated[3:7] == YCC
