"""TIFFs that Pillow does not know, or would make other pixels of, come out as what was written."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image, TiffImagePlugin

from pipelines.pixels import DecodeError
from pipelines.transforms import decode

ORDERS = [">", "<"]


def written(pixels: NDArray[Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    tifffile.imwrite(buffer, pixels, **options)
    return buffer.getvalue()


@pytest.fixture
def eight() -> NDArray[np.uint8]:
    """(13, 21, 4): no colour is another's, none is its own neighbour's."""
    return np.random.default_rng(0).integers(0, 256, (13, 21, 4), np.uint8)


def deep(eight: NDArray[np.uint8]) -> NDArray[np.uint16]:
    """Of 16 bits, the lower half of them noise."""
    return eight * np.uint16(256) + np.random.default_rng(1).integers(0, 256, eight.shape, np.uint16)


def over_white(rgb: NDArray[np.uint8], alpha: NDArray[np.uint8]) -> NDArray[np.float64]:
    share = alpha[..., None] / 255
    return rgb * share + 255 * (1 - share)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("more", [{}, {"rowsperstrip": 4}, {"tile": (16, 16)}, {"compression": "zlib"}])
def test_deep_planes(eight: NDArray[np.uint8], order: str, more: dict[str, Any]) -> None:
    planes = deep(eight).transpose(2, 0, 1)
    rgb = decode(written(planes[:3], photometric="rgb", planarconfig="separate", byteorder=order, **more))
    np.testing.assert_array_equal(rgb, eight[..., :3])
    data = written(
        planes, photometric="rgb", planarconfig="separate", byteorder=order, extrasamples=["unassalpha"], **more
    )
    assert abs(decode(data) - over_white(eight[..., :3], eight[..., 3])).max() <= 1
    cmyk = decode(written(planes, photometric="separated", planarconfig="separate", byteorder=order, **more))
    np.testing.assert_array_equal(cmyk, np.asarray(Image.fromarray(eight, "CMYK").convert("RGB")))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("photometric", ["minisblack", "miniswhite"])
def test_deep_gray(eight: NDArray[np.uint8], order: str, bits: int, photometric: str) -> None:
    values = eight[..., 0].astype(f"u{bits // 8}") * ((2**bits - 1) // 255)
    image = decode(written(values, photometric=photometric, byteorder=order))
    shown = eight[..., 0] if photometric == "minisblack" else 255 - eight[..., 0]
    np.testing.assert_array_equal(image, np.repeat(shown[..., None], 3, axis=2))


@pytest.mark.parametrize("order", ORDERS)
def test_large_files_of_both_orders(eight: NDArray[np.uint8], order: str) -> None:
    """BigTIFF, of which Pillow knows one order. Its orientation is a tag as any other, its XMP too."""
    options: dict[str, Any] = {"bigtiff": True, "byteorder": order, "photometric": "rgb"}
    np.testing.assert_array_equal(decode(written(eight[..., :3], **options)), eight[..., :3])
    xmp = b'<rdf:Description tiff:Orientation="6"/>'
    for tags, turns in (
        ([(274, 3, 1, 6, True)], -1),
        ([(700, 1, len(xmp), xmp, True)], -1),
        ([(274, 3, 1, 8, True), (700, 1, len(xmp), xmp, True)], 1),
    ):
        turned = decode(written(eight[..., :3], **options, extratags=tags))
        np.testing.assert_array_equal(turned, np.rot90(eight[..., :3], turns))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", ["unassalpha", "assocalpha", "unspecified"])
def test_deep_gray_with_alpha_lies_over_white(eight: NDArray[np.uint8], order: str, kind: str) -> None:
    gray, alpha = eight[..., 0], eight[..., 1] | 128
    stored = np.uint8(gray * (alpha / 255)) if kind == "assocalpha" else gray
    values = np.stack([stored, alpha], axis=2).astype(np.uint16) * 257
    image = decode(written(values, photometric="minisblack", extrasamples=[kind], byteorder=order))
    shown = gray if kind == "unspecified" else over_white(gray[..., None], alpha)[..., 0]
    assert abs(image[..., 0] - shown.astype(float)).max() <= (0 if kind == "unspecified" else 3)


def test_what_nobody_reads_is_a_reject_with_its_reason(eight: NDArray[np.uint8]) -> None:
    for data, reason in (
        (written(deep(eight)[..., :3], photometric="cielab"), "a TIFF of CIELAB, YXS, is not known"),
        (written(np.float32(eight[..., :3]), photometric="rgb"), "a TIFF of 32 bits, float32, is not known"),
        (written(eight[..., 0] > 9, bigtiff=True, byteorder=">"), "a TIFF of 1 bits, bool, is not known"),
        (written(eight[..., 0], bigtiff=True, byteorder=">", compression="zlib"), "with ADOBE_DEFLATE compression"),
        (with_compression(written(eight[..., 0].astype(np.uint32), byteorder=">"), 5), "with LZW compression"),
        (b"II+\0" + bytes(60), "damaged image"),
    ):
        with pytest.raises(DecodeError, match=reason):
            decode(data)


@pytest.mark.parametrize("tag", [tifffile.TIFF.TAGS["StripOffsets"], tifffile.TIFF.TAGS["StripByteCounts"]])
@pytest.mark.parametrize("strip", [0, 1, 2])
def test_a_strip_that_is_not_there_is_not_black(eight: NDArray[np.uint8], tag: int, strip: int) -> None:
    data = bytearray(written(eight[..., :3], photometric="rgb", bigtiff=True, byteorder=">", rowsperstrip=5))
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found = file.pages.first.tags[tag]
        size = found.valuebytecount // found.count
        at = found.valueoffset + strip * size
    for value in (0, 65_535):
        data[at : at + size] = value.to_bytes(size, "big")
        with pytest.raises(DecodeError, match="truncated image"):
            decode(bytes(data))


@pytest.mark.parametrize("cut", [1, 100])
def test_a_file_that_is_cut_off_is_a_reject(eight: NDArray[np.uint8], cut: int) -> None:
    data = written(eight[..., :3], photometric="rgb", bigtiff=True, byteorder=">")
    with pytest.raises(DecodeError):
        decode(data[:-cut])


def test_memory_is_not_taken_for_what_is_only_stated(eight: NDArray[np.uint8]) -> None:
    """Of 9400 x 9400 pixels, a hundred or so are there."""
    data = written(eight[..., 0].astype(np.uint32), byteorder=">")
    for tag in (256, 257, 278):
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            found = file.pages.first.tags[tag]
        at, size = found.valueoffset, found.valuebytecount
        data = data[:at] + (9400).to_bytes(size, "big") + data[at + size :]
    with pytest.raises(DecodeError, match="truncated image: 1092 bytes of 353440000"):
        decode(data)


def test_bytes_that_are_used_again_are_bounded_by_the_file(eight: NDArray[np.uint8]) -> None:
    """All strips lie at one place: a file of kilobytes could state gigabytes, of any number of samples."""
    deep_row = np.zeros((100, 21, 30), np.uint16)
    data = written(deep_row, photometric="rgb", bigtiff=True, byteorder=">", rowsperstrip=1)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        found = file.pages.first.tags["StripOffsets"]
        at, size, first = found.valueoffset, found.valuebytecount, found.value[0]
    data = data[:at] + struct.pack(">100Q", *[first] * 100) + data[at + size :]
    assert decode(data).shape == (100, 21, 3)
    with pytest.raises(DecodeError, match=r"truncated image: \d+ bytes of 126000"):
        decode(data[: first + 2 * 21 * 30])


@pytest.mark.parametrize("compression", [None, "zlib"])
def test_signed_bytes_have_no_order(compression: str | None) -> None:
    gray = np.arange(100, dtype=np.int8).reshape(10, 10)
    one, other = (written(gray, photometric="minisblack", byteorder=order, compression=compression) for order in ORDERS)
    np.testing.assert_array_equal(decode(one), decode(other))


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_signed_gray_is_the_same_in_any_order_or_none(bits: int, order: str, compression: str | None) -> None:
    gray = np.random.default_rng(0).integers(-400, 30_000, (9, 11)).astype(f"i{bits // 8}")
    data = written(gray, photometric="minisblack", byteorder=order, compression=compression)
    if order == ">" and compression:
        with pytest.raises(DecodeError, match="a TIFF of signed big-endian numbers, compressed, is not known"):
            decode(data)
        return
    expected = np.rint(np.clip(gray, 0, None) * (255 / 65535))
    np.testing.assert_array_equal(decode(data)[..., 0], expected)


def with_compression(data: bytes, number: int) -> bytes:
    """A big-endian TIFF that says that it is compressed in another way."""
    plain = struct.pack(">HHIHH", 259, 3, 1, 1, 0)
    assert data.count(plain) == 1
    return data.replace(plain, struct.pack(">HHIHH", 259, 3, 1, number, 0))


def test_subsampled_colours_without_compression_are_not_mistaken_for_others() -> None:
    """Pillow takes four bytes of luminance and two of colour for two pixels."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[TiffImagePlugin.YCBCRSUBSAMPLING] = (2, 2)
    buffer = io.BytesIO()
    Image.new("YCbCr", (16, 16), (90, 100, 200)).save(buffer, "TIFF", tiffinfo=tags)
    with pytest.raises(DecodeError, match="subsampled YCbCr without compression is not known"):
        decode(buffer.getvalue())


def test_the_bound_of_pixels_holds(eight: NDArray[np.uint8]) -> None:
    data = written(eight[..., :3], photometric="rgb", bigtiff=True, byteorder=">")
    assert decode(data, max_pixels=13 * 21).shape == (13, 21, 3)
    with pytest.raises(DecodeError, match="decompression bomb: 21 x 13 pixels, the bound is 272"):
        decode(data, max_pixels=13 * 21 - 1)
