"""What the segments of a JPEG say, against libjpeg, and which files are left to it."""

from __future__ import annotations

import io
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from pipelines.jpeg_header import EXIF, JpegHeader, jpeg_header

COMPONENTS = {"Gray": 1, "YCbCr": 3, "RGB": 3, "CMYK": 4, "YCCK": 4}


def saved(mode: str = "RGB", size: tuple[int, int] = (90, 60), **options: Any) -> bytes:
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def exif_turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif.tobytes()


def segment(kind: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, kind, len(body) + 2) + body


def by_libjpeg(data: bytes) -> tuple[int, int, int]:
    height, width, colorspace, _ = simplejpeg.decode_jpeg_header(data)
    return height, width, COMPONENTS[colorspace]


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize(
    "options",
    [{}, {"progressive": True}, {"optimize": True}, {"quality": 100}, {"comment": b"x" * 70},
     {"restart_marker_rows": 1}, {"icc_profile": b"p" * 70_000}],
)  # fmt: skip
@pytest.mark.parametrize("size", [(90, 60), (1, 1), (300, 2)])
def test_is_what_libjpeg_says(mode: str, options: dict[str, Any], size: tuple[int, int]) -> None:
    data = saved(mode, size, **options)
    assert jpeg_header(data) == JpegHeader(*by_libjpeg(data), has_exif=False)
    data = saved(mode, size, exif=exif_turned(), **options)
    assert jpeg_header(data) == JpegHeader(*by_libjpeg(data), has_exif=True)


def test_exif_is_found_where_it_is_alone() -> None:
    plain = saved()
    start, rest = plain[:2], plain[2:]
    other = segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x/>")
    for more, has_exif in (
        (segment(0xE1, EXIF + b"MM"), True),
        (other + segment(0xFE, b"c") + segment(0xE1, EXIF + b"MM"), True),
        (other, False),
        (segment(0xFE, EXIF), False),  # in a comment
        (segment(0xE2, EXIF), False),
        (segment(0xE1, b"_" + EXIF), False),
    ):
        header = jpeg_header(start + more + rest)
        assert header is not None
        assert header.has_exif is has_exif
    assert jpeg_header(plain + EXIF) == jpeg_header(plain)


def test_what_is_out_of_the_ordinary_is_left_to_libjpeg() -> None:
    plain = saved()
    frame = plain.index(b"\xff\xc0")
    (length,) = struct.unpack_from(">H", plain, frame + 2)
    twice = plain[: frame + 2 + length] + plain[frame : frame + 2 + length] + plain[frame + 2 + length :]
    before_scan = plain[: plain.index(b"\xff\xda")]
    for data in (
        plain[:2] + b"\xff" + plain[2:],  # filled up, as the standard allows
        plain[:2] + b"garbage" + plain[2:],
        plain[:2] + b"\xff\x01" + plain[2:],  # a marker without a segment
        plain[:2] + struct.pack(">BBH", 0xFF, 0xFE, 1) + plain[2:],
        plain.replace(b"\xff\xc0", b"\xff\xc9", 1),  # arithmetic coding
        twice,
        before_scan[:frame] + plain[plain.index(b"\xff\xda") :],
        before_scan,
        plain[:3],
        plain[:2],
        b"",
    ):
        assert jpeg_header(data) is None


def test_says_what_libjpeg_says_of_damaged_files_or_nothing(coco100: Path) -> None:
    """A frame that libjpeg does not see would be a size that nobody has checked."""
    random_, told = random.Random(0), 0
    files = sorted((coco100 / "val2017").glob("*.jpg"))[:10]
    for data in (file.read_bytes() for file in files):
        scan = data.index(b"\xff\xda")
        for _ in range(200):
            damaged = bytearray(data)
            for _ in range(random_.choice([1, 1, 2, 5])):
                damaged[random_.randrange(2, scan + 4)] = random_.choice(
                    [0xFF, 0xC0, 0xC2, 0xDA, 0, random_.randrange(256)]
                )
            header = jpeg_header(bytes(damaged))
            try:
                expected = by_libjpeg(bytes(damaged))
            except ValueError:  # it refuses more, when it comes to it
                continue
            if header is not None:
                told += 1
                assert (header.height, header.width, header.components) == expected
    assert told > 500
