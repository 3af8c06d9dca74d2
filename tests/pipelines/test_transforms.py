"""Decoding and resizing against Pillow, masks against resized bitmaps."""

from __future__ import annotations

import io
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from pipelines.rle import bitmap_from_ends, counts_from_polygons, ends_from_bitmap, ends_from_counts
from pipelines.transforms import DecodeError, decode, decode_stored, encode, resize_mask


@pytest.fixture
def picture() -> Image.Image:
    """Smooth colours with some edges, 90 x 60."""
    y, x = np.mgrid[:60, :90]
    channels = [x * 2.5, y * 4, (x // 15 + y // 15) % 2 * 200 + 20]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8))


def saved(image: Image.Image, format_: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


def assert_same(ours: np.ndarray, theirs: Image.Image, tolerance: int = 0) -> None:
    reference = np.asarray(theirs.convert("RGB")).astype(int)
    assert ours.dtype == np.uint8
    assert ours.shape == reference.shape
    assert abs(ours.astype(int) - reference).max() <= tolerance


@pytest.mark.parametrize(
    ("mode", "format_", "options"),
    [
        ("RGB", "JPEG", {}),
        ("RGB", "JPEG", {"progressive": True, "subsampling": 0}),
        ("L", "JPEG", {}),
        ("CMYK", "JPEG", {}),
        ("RGB", "PNG", {}),
        ("P", "PNG", {}),
        ("L", "PNG", {}),
        ("1", "PNG", {}),
        ("P", "GIF", {}),
        ("RGB", "BMP", {}),
        ("RGB", "WEBP", {"lossless": True}),
        ("RGB", "TIFF", {}),
    ],
)
def test_decodes_as_pillow(picture: Image.Image, mode: str, format_: str, options: dict) -> None:
    data = saved(picture.convert(mode), format_, **options)
    assert_same(decode(data), Image.open(io.BytesIO(data)), tolerance=1 if format_ == "JPEG" else 0)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_exif_orientation(picture: Image.Image, orientation: int, format_: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture, format_, exif=exif)
    assert_same(decode(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data))), tolerance=1)


def test_sixteen_bit_gray() -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = decode(saved(Image.fromarray(values), "PNG"))
    np.testing.assert_array_equal(image[..., 0], np.rint(values / 257).astype(np.uint8))


def test_alpha_is_laid_over_white(picture: Image.Image) -> None:
    picture.putalpha(Image.new("L", picture.size, 0))
    assert (decode(saved(picture, "PNG")) == 255).all()


@pytest.mark.parametrize("data", [b"", b"just text, not an image", b"\xff\xd8\xff\xe0 broken"])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
@pytest.mark.parametrize("tenth", range(10))
def test_truncated_anywhere(picture: Image.Image, format_: str, tenth: int) -> None:
    data = saved(picture, format_)
    with pytest.raises(DecodeError):
        decode(data[: len(data) * tenth // 10])


def test_decompression_bomb() -> None:
    png = saved(Image.new("1", (1, 1)), "PNG")
    chunk = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + png[24:29]
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode(png[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + png[33:])
    jpeg = bytearray(saved(Image.new("L", (8, 8)), "JPEG"))
    frame = jpeg.index(b"\xff\xc0")
    jpeg[frame + 5 : frame + 9] = (60_000).to_bytes(2, "big") * 2
    with pytest.raises(DecodeError, match="decompression bomb: 60000 x 60000"):
        decode(bytes(jpeg))


def test_encodings_come_back(picture: Image.Image) -> None:
    image = np.asarray(picture)
    for encoding in ("raw", "png", "jpeg"):
        data = encode(image, encoding)  # type: ignore[arg-type]
        back = decode_stored(data, encoding=encoding, height=60, width=90)
        assert abs(back.astype(int) - image).mean() <= (2 if encoding == "jpeg" else 0)
        assert data == encode(image, encoding)  # type: ignore[arg-type]


def iou(one: np.ndarray, other: np.ndarray) -> float:
    return float((one & other).sum() / (one | other).sum())


@pytest.mark.parametrize("factor", [0.37, 1.0, 2.9])
def test_scaled_masks_overlap_the_resized_bitmap(factor: float) -> None:
    height, width = 240, 300
    polygon = np.array([30, 40, 250, 60, 270, 200, 140, 120, 60, 220], float)
    ends = ends_from_counts(counts_from_polygons([polygon], height, width))
    size = round(height * factor), round(width * factor)
    bitmap = Image.fromarray(bitmap_from_ends(ends, height, width) * np.uint8(255))
    direct = np.asarray(bitmap.resize(size[::-1], Image.Resampling.BILINEAR)) >= 128
    scaled = bitmap_from_ends(resize_mask(ends, (height, width), size), *size).astype(bool)
    assert iou(scaled, direct) >= 0.995
    moved = (polygon.reshape(-1, 2) * [size[1] / width, size[0] / height]).ravel()
    drawn = bitmap_from_ends(ends_from_counts(counts_from_polygons([moved], *size)), *size).astype(bool)
    assert iou(drawn, direct) >= 0.97 if factor < 1 else iou(drawn, direct) >= 0.985
    if factor == 1:
        np.testing.assert_array_equal(ends_from_bitmap(scaled), ends)
