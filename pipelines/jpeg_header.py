"""What a JPEG says of itself before its pixels, without a decoder, which takes a tenth of a millisecond to tell."""

from __future__ import annotations

import struct
from dataclasses import dataclass

MARKER = 0xFF
FRAMES = (0xC0, 0xC1, 0xC2)  # Huffman coded: baseline, extended, progressive
SCAN = 0xDA
APP1 = 0xE1
SEGMENTS = {*range(0xE0, 0xF0), 0xFE, 0xDB, 0xC4, 0xDD}  # APPn, comments, tables, restart intervals
EXIF = b"Exif\0\0"


@dataclass(frozen=True)
class JpegHeader:
    """Of a JPEG's first image, as it is stored."""

    height: int
    width: int
    components: int
    has_exif: bool


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header, from the segments before the first scan (ITU T.81, annex B). None where they are not in the plain
    order that cameras and libraries write: a decoder then has to look."""
    frame: tuple[int, int, int] | None = None
    has_exif, at = False, 2  # behind the start of the image
    try:
        while True:
            begin, kind, length = struct.unpack_from(">BBH", data, at)
            if begin != MARKER or length < 2:
                return None
            if kind == SCAN:
                return JpegHeader(*frame, has_exif) if frame else None
            if kind in FRAMES and frame is None:
                frame = struct.unpack_from(">HHB", data, at + 5)
            elif kind not in SEGMENTS:
                return None
            has_exif = has_exif or (kind == APP1 and data.startswith(EXIF, at + 4))
            at += 2 + length
    except struct.error:  # the data ends
        return None
