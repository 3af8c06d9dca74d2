"""Every kind of image file comes out as the RGB that a viewer shows; what is none, with a reason."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import simplejpeg
from PIL import EpsImagePlugin, Image, ImageCms, ImageOps
from PIL.PngImagePlugin import PngInfo

from pipelines import pixels, transforms
from pipelines.jpeg_segments import MAX_SCANS, has_more_scans, read_header
from pipelines.pixels import DecodeError, allow_pixels
from pipelines.records import SourceError
from pipelines.sources.annotation_files import decode_ids
from pipelines.transforms import decode, decode_stored, encode

SCAN = b"\xff\xda"


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


UPRIGHT: dict[int, Callable[[Image.Image], Image.Image]] = {
    1: lambda image: image,
    2: ImageOps.mirror,
    3: lambda image: image.rotate(180),
    4: ImageOps.flip,
    5: lambda image: image.transpose(Image.Transpose.TRANSPOSE),
    6: lambda image: image.transpose(Image.Transpose.ROTATE_270),
    7: lambda image: image.transpose(Image.Transpose.TRANSVERSE),
    8: lambda image: image.transpose(Image.Transpose.ROTATE_90),
}


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_exif_orientation(picture: Image.Image, orientation: int, format_: str) -> None:
    """The eight cases of the EXIF standard, written out; a TIFF's is among its tags, and Pillow turns it itself."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(picture, format_, exif=exif, **({"lossless": True} if format_ == "WEBP" else {}))
    plain = Image.open(io.BytesIO(saved(picture, format_))) if format_ == "JPEG" else picture
    assert_same(decode(data), UPRIGHT[orientation](plain), tolerance=1 if format_ == "JPEG" else 0)


XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>"""


@pytest.mark.parametrize(
    ("format_", "exif", "turned"),
    [
        *((format_, *each) for format_ in ("JPEG", "PNG", "WEBP", "TIFF") for each in ((1, False), (8, True))),
        *((format_, None, True) for format_ in ("JPEG", "PNG", "WEBP", "TIFF", "AVIF")),
    ],
)
def test_xmp_tells_the_orientation_where_exif_does_not(format_: str, exif: int | None, turned: bool) -> None:
    """In all formats alike, as Pillow and Windows have it."""
    options: dict[str, Any] = {}
    if exif:
        options["exif"] = Image.Exif()
        options["exif"][0x0112] = exif
    if format_ == "PNG":
        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    elif format_ == "TIFF":
        options["tiffinfo"] = {700: XMP} | ({274: exif} if exif else {})
        options.pop("exif", None)
    else:
        options["xmp"] = XMP
    image = Image.new("RGB", (30, 20), "red")
    image.paste("blue", (0, 0, 15, 20))
    shown = decode(saved(image, format_, **options))
    assert shown.shape[:2] == ((30, 20) if turned else (20, 30))
    blue = shown[2, 10] if exif != 8 else shown[-3, 10]
    assert blue[2] > 200 > blue[0]


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("broken", [b"broken", b"MM\0*", b"II*\0\x08\0\0\0\xff\xff"])
def test_unreadable_exif_is_none(picture: Image.Image, format_: str, broken: bytes) -> None:
    options = {"lossless": True} if format_ == "WEBP" else {}
    plain = decode(saved(picture, format_, **options))
    np.testing.assert_array_equal(decode(saved(picture, format_, exif=b"Exif\0\0" + broken, **options)), plain)


ORIENTATIONS = {  # what is no number of them, and what is though it is no integer: type, count and value
    "ascii": ((2, 4, b"top\0"), False),
    "bytes": ((7, 4, b"\0\6\0\0"), False),
    "two": ((3, 2, b"\0\6\0\6"), False),
    "none": ((3, 1, b"\0\0\0\0"), False),
    "nan": ((11, 1, b"\x7f\xc0\0\0"), False),
    "float": ((11, 1, struct.pack(">f", 6.0)), True),
    "long": ((4, 1, b"\0\0\0\6"), True),
}


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", ORIENTATIONS)
def test_an_orientation_that_is_no_number_turns_nothing(picture: Image.Image, format_: str, kind: str) -> None:
    (type_, count, value), turns = ORIENTATIONS[kind]
    entry = struct.pack(">HHHI", 1, 0x0112, type_, count) + value + bytes(4)
    exif = b"Exif\0\0MM\0*" + struct.pack(">I", 8) + entry
    assert decode(saved(picture, format_, exif=exif)).shape == ((90, 60, 3) if turns else (60, 90, 3))


@pytest.mark.parametrize("broken", [b"Exif\0\0broken", b"Exif\0\0MM\0*"])
@pytest.mark.parametrize("format_", ["JPEG", "PNG", "WEBP"])
def test_xmp_counts_beside_unreadable_exif(picture: Image.Image, format_: str, broken: bytes) -> None:
    options: dict[str, Any] = {"xmp": XMP}
    if format_ == "PNG":
        options = {"pnginfo": PngInfo()}
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", XMP.decode())
    assert decode(saved(picture, format_, exif=broken, **options)).shape == (90, 60, 3)


@pytest.mark.parametrize("channels", [3, 4])
def test_deep_colours_of_a_jpeg_2000(channels: int) -> None:
    """The largest numbers are white, and what is opaque is seen."""
    eight = np.random.default_rng(0).integers(0, 256, (40, 50, channels), np.uint8)
    eight[:4], eight[:, :4, :3], eight[..., 3:] = 255, 0, 255
    good, data = cv2.imencode(".jp2", eight.astype(np.uint16) * 257, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    assert good
    np.testing.assert_array_equal(decode(data.tobytes()), eight[..., 2::-1])
    seen_through = eight.astype(np.uint16) * 257
    seen_through[..., 3:] = 0
    good, data = cv2.imencode(".jp2", seen_through, [cv2.IMWRITE_JPEG2000_COMPRESSION_X1000, 1000])
    assert channels == 3 or decode(data.tobytes()).min() == 255


def with_bits(data: bytes, stated: int) -> bytes:
    """A JPEG 2000 that says of all its samples that they have such bits."""
    at = data.index(b"\xff\x4f\xff\x51") + 40
    made = bytearray(data)
    for sample in range(int.from_bytes(data[at : at + 2], "big")):
        made[at + 2 + 3 * sample] = stated
    return bytes(made)


def test_deep_jpeg_2000s_that_are_rejects() -> None:
    """Pillow makes others of them, and so does OpenCV, if it knows them."""
    for data, kind in (
        (with_bits(saved(Image.new("LA", (8, 8)), "JPEG2000"), 15), "2 samples, 16"),
        (with_bits(saved(Image.new("RGB", (8, 8)), "JPEG2000"), 0x80 | 11), "signed numbers, 12"),
        (with_bits(saved(Image.new("YCbCr", (8, 8)), "JPEG2000"), 9), "YCC, 10"),
    ):
        with pytest.raises(DecodeError, match=f"a JPEG 2000 of {kind} bits, is not known: save it as RGB or RGBA"):
            decode(data)


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "YCbCr"])
def test_jpeg_2000s_of_8_bits(picture: Image.Image, mode: str) -> None:
    image = picture.convert(mode)
    shown = decode(saved(image, "JPEG2000", irreversible=False))
    assert abs(shown.astype(int) - np.asarray(image.convert("RGB"))).max() <= 2
    assert decode(saved(image, "JPEG2000", signed=True)).shape == shown.shape


def bmp_of(bgra: np.ndarray) -> bytes:
    """With a header of version 4, which says where alpha is; its first row is at the bottom."""
    height, width = bgra.shape[:2]
    masks = struct.pack("<4I", 0x00FF0000, 0x0000FF00, 0x000000FF, 0xFF000000)
    head = struct.pack("<IiiHHI", 108, width, height, 1, 32, 3) + bytes(20) + masks + bytes(52)
    return (
        struct.pack("<2sIHHI", b"BM", 14 + len(head) + bgra.nbytes, 0, 0, 14 + len(head)) + head + bgra[::-1].tobytes()
    )


def test_a_bmp_all_of_which_could_be_seen_through_is_opaque(picture: Image.Image) -> None:
    rgb = np.asarray(picture)
    for alpha, is_seen in ((0, True), (255, True), (1, False)):
        bgra = np.concatenate([rgb[..., ::-1], np.full((*rgb.shape[:2], 1), alpha, np.uint8)], axis=2)
        assert Image.open(io.BytesIO(bmp_of(bgra))).mode == "RGBA"
        assert np.array_equal(decode(bmp_of(bgra)), rgb) == is_seen


def test_why_an_image_is_not_known() -> None:
    png = bytearray(saved(Image.new("RGB", (8, 8)), "PNG"))
    png[30] ^= 1  # of the checksum of its header
    jpeg = saved(Image.new("RGB", (8, 8)), "JPEG")
    at = jpeg.index(b"\xff\xc0") + 4
    for data, reason in (
        (bytes(png), "damaged image: a PNG whose header or checksums are wrong"),
        (jpeg[:at] + b"\x0c" + jpeg[at + 1 :], "not a JPEG that is known: its header is cut off, or it has 12 bits"),
        (b"\0\0\0\x18ftypheic" + bytes(60), "HEIC is not known: save it as JPEG"),
    ):
        with pytest.raises(DecodeError, match=reason):
            decode(data)


def tga_of(pixels: np.ndarray, bits: int, alpha_bits: int) -> bytes:
    """(H, W) numbers of so many bits, of which it says that some are alpha; its first row is at the top."""
    height, width = pixels.shape
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 2, 0, 0, 0, 0, 0, width, height, bits, 0x20 | alpha_bits)
    return head + pixels.astype(f"<u{bits // 8}").tobytes()


def test_bits_of_a_tga_that_are_no_alpha() -> None:
    red, green = 0x00FF0000, 0x0000FF00
    picture = np.array([[red, green, green]])
    shown = np.array([[[255, 0, 0], [0, 255, 0], [0, 255, 0]]])
    np.testing.assert_array_equal(decode(tga_of(picture, 32, 0)), shown)  # else all would be seen through
    np.testing.assert_array_equal(decode(tga_of(picture | 0xFF000000, 32, 8)), shown)
    half = decode(tga_of(picture | 0x80000000, 32, 8))[0]
    np.testing.assert_allclose(half, [[255, 127, 127], [127, 255, 127], [127, 255, 127]], atol=1)
    small = np.array([[0x7C00, 0x03E0, 0x03E0]])
    for high in (0, 0x8000):
        for alpha_bits in (0, 1):
            np.testing.assert_array_equal(decode(tga_of(small | high, 16, alpha_bits)), shown)


def test_gray_of_a_tga_without_alpha() -> None:
    head = struct.pack("<BBBHHBHHHHBB", 0, 0, 3, 0, 0, 0, 0, 0, 2, 1, 16, 0x20)
    np.testing.assert_array_equal(decode(head + bytes([7, 0, 200, 0]))[0, :, 0], [7, 200])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_of_a_tiff_are_the_numbers_that_are_stored(bits: int) -> None:
    ids = np.arange(2 ** min(bits, 4)).reshape(-1, 2)
    single = np.unpackbits(ids.astype(np.uint8)[..., None], axis=2)[..., -bits:].reshape(len(ids), -1)
    packed = np.packbits(single, axis=1).tobytes()
    tags = {256: 2, 257: len(ids), 258: bits, 259: 1, 262: 1, 273: 8, 277: 1, 278: len(ids), 279: len(packed)}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    np.testing.assert_array_equal(decode_ids(head + packed + struct.pack("<H", len(tags)) + entries + bytes(4)), ids)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_ids_are_the_numbers_that_are_stored(bits: int) -> None:
    """Pillow spreads those of 2 and 4 bits, which are gray to it, to 8."""
    ids = np.arange(2 ** min(bits, 4)).reshape(-1, 2)
    np.testing.assert_array_equal(decode_ids(png_of(ids, (0,), bits)), ids)


def test_orientation_in_a_late_segment(picture: Image.Image) -> None:
    """Behind a colour profile of more than 64 kB."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(picture, "JPEG", exif=exif)
    segments = [
        b"\xff\xe2" + (65000).to_bytes(2, "big") + b"ICC_PROFILE\0" + bytes([i, 2]) + bytes(65000 - 16) for i in (1, 2)
    ]
    assert decode(data[:2] + b"".join(segments) + data[2:]).shape == (90, 60, 3)


@pytest.mark.parametrize("format_", ["PNG", "TIFF"])
def test_sixteen_bit_gray(format_: str) -> None:
    values = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    image = decode(saved(Image.fromarray(values), format_))
    np.testing.assert_array_equal(image[..., 0], np.rint(values / 257).astype(np.uint8))


def png_of(values: np.ndarray, hidden: tuple[int, ...], bits: int = 16) -> bytes:
    """(H, W) or (H, W, 3) of so many bits, and the value that is transparent."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, 2 if values.ndim == 3 else 0, 0, 0, 0)
    single = np.unpackbits(values.astype(">u2").view(np.uint8)).reshape(-1, 16)[:, -bits:]
    pixels = b"".join(b"\0" + np.packbits(row).tobytes() for row in single.reshape(len(values), -1))
    chunks = [(b"IHDR", header), (b"tRNS", struct.pack(f">{len(hidden)}H", *hidden)), (b"IDAT", zlib.compress(pixels))]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*each) for each in [*chunks, (b"IEND", b"")])


def test_sixteen_bit_png_with_a_transparent_value() -> None:
    """Shown as white: that value only, not all whose high byte is the same."""
    gray = np.array([[1000, 1001, 1100], [3, 60000, 65535]], np.uint16)
    expected = np.array([[255, 4, 4], [0, 233, 255]])
    np.testing.assert_array_equal(decode(png_of(gray, (1000,))), np.repeat(expected[..., None], 3, axis=2))
    colour = np.stack([gray, gray[::-1], gray], axis=2)
    expected = (colour >> 8).astype(np.uint8)
    expected[0, 0] = 255
    np.testing.assert_array_equal(decode(png_of(colour, (1000, 3, 1000))), expected)
    with pytest.raises(DecodeError, match="damaged image"):
        decode(png_of(colour, (1000, 3, 1000))[:-30])


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_gray_png_of_few_bits_with_a_transparent_value(bits: int) -> None:
    values = np.arange(2**bits).reshape(2, -1)
    shown = np.rint(values * 255 / (2**bits - 1))
    for hidden in {0, 1, 2 ** (bits - 1), 2**bits - 1}:
        image = decode(png_of(values, (hidden,), bits))
        np.testing.assert_array_equal(image[..., 0], np.where(values == hidden, 255, shown))


def gray_tiff(values: np.ndarray, *, bits: int, photometric: int = 1, kind: int = 1) -> bytes:
    """One strip without compression; 12 bits lie without gaps. `kind` is SampleFormat: 1 unsigned, 2 signed."""
    height, width = values.shape
    if bits == 12:
        pairs = values.reshape(-1, 2).astype(int)
        data = np.stack([pairs[:, 0] >> 4, (pairs[:, 0] & 15) << 4 | pairs[:, 1] >> 8, pairs[:, 1] & 255], axis=1)
        pixels = data.astype(np.uint8).tobytes()
    else:
        pixels = values.astype(f"<{'u' if kind == 1 else 'i'}{bits // 8}").tobytes()
    tags = {
        256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: height, 279: len(pixels),
        339: kind,
    }  # fmt: skip
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return struct.pack("<2sHI", b"II", 42, 8 + len(pixels)) + pixels + struct.pack("<H", len(tags)) + entries + bytes(4)


@pytest.mark.parametrize(
    ("bits", "top", "photometric"), [(12, 4095, 1), (16, 65535, 0), (16, 65535, 1), (32, 2**32 - 1, 1)]
)
def test_gray_tiff_of_any_depth_and_direction(bits: int, top: int, photometric: int) -> None:
    """As the file's tags have it; 0 may stand for white. (Of 12 and 32 bits Pillow does not read these.)"""
    values = np.linspace(0, top, 64).astype(np.int64).reshape(4, 16)
    shown = np.rint(values * (255 / top))
    image = decode(gray_tiff(values, bits=bits, photometric=photometric))
    np.testing.assert_array_equal(image[..., 1], 255 - shown if photometric == 0 else shown)


def test_a_tiff_of_32_bits_may_hold_16() -> None:
    values = np.linspace(0, 65535, 64).astype(np.int64).reshape(4, 16)
    for kind in (1, 2):
        image = decode(gray_tiff(values, bits=32, kind=kind))
        np.testing.assert_array_equal(image[..., 0], np.rint(values / 257))
    signed = np.array([[-5, 0, 2**30, 2**31 - 1]])
    np.testing.assert_array_equal(decode(gray_tiff(signed, bits=32, kind=2))[0, :, 0], [0, 0, 128, 255])


@pytest.mark.parametrize(("suffix", "alpha"), [(".png", False), (".png", True), (".tiff", False)])
def test_sixteen_bit_colour(suffix: str, alpha: bool) -> None:
    """By the high byte, as Pillow and libpng do: never more than one level below the nearest."""
    values = np.random.default_rng(0).integers(0, 65536, (40, 50, 3)).astype(np.uint16)
    written = np.dstack([values[..., ::-1], np.full((40, 50), 65535, np.uint16)]) if alpha else values[..., ::-1]
    good, data = cv2.imencode(suffix, written)
    assert good
    image = decode(data.tobytes())
    np.testing.assert_array_equal(image, (values >> 8).astype(np.uint8))
    assert abs(image - np.rint(values / 257)).max() <= 1


@pytest.mark.parametrize("marker", [True, False])
def test_cmyk_jpeg_is_taken_for_inverted(marker: bool) -> None:
    """As browsers do, whether or not the file has Adobe's marker."""
    colour = (200, 30, 60)
    data = saved(Image.new("RGB", (32, 24), colour).convert("CMYK"), "JPEG", quality=100)
    start = data.index(b"\xff\xee")
    length = 2 + int.from_bytes(data[start + 2 : start + 4], "big")
    image = decode(data if marker else data[:start] + data[start + length :])
    assert abs(image.astype(int) - colour).max() <= 2


def test_ycck_jpeg() -> None:
    inverted = np.full((24, 32, 4), 255 - np.array([55, 225, 195, 0]), np.uint8)
    data = simplejpeg.encode_jpeg(inverted, quality=100, colorspace="CMYK", colorsubsampling="444")
    assert simplejpeg.decode_jpeg_header(data)[2] == "YCCK"
    assert abs(decode(data).astype(int) - (200, 30, 60)).max() <= 2


def test_jpeg_of_rare_sampling() -> None:
    """Colour of a quarter of the lines: four blocks of brightness to one each of colour, all of them gray here."""
    data = bytearray(saved(Image.new("RGB", (8, 32), (128, 128, 128)), "JPEG", subsampling=0))
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    data[frame + 11] = 0x14
    data[scan + 6 : scan + 11 : 2] = bytes(3)  # one Huffman table for all
    block = "00" + "1010"  # no difference of brightness, nothing else
    bits = (6 * block).ljust(40, "1")
    data[scan + 14 :] = int(bits, 2).to_bytes(5, "big") + b"\xff\xd9"
    image = decode(bytes(data))
    assert image.shape == (32, 8, 3)
    assert (image == 128).all()


def test_exif_counts_wherever_it_stands_before_the_pixels(picture: Image.Image) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    plain, upright = saved(picture, "JPEG"), saved(picture, "JPEG", exif=exif)
    start = upright.index(b"Exif") - 4
    (size,) = struct.unpack_from(">H", upright, start + 2)
    segment = upright[start : start + 2 + size]
    other = struct.pack(">BBH", 0xFF, 0xE1, 8) + b"http:/"
    frame, scan = plain.index(b"\xff\xc0"), plain.index(b"\xff\xda")
    turned = decode(upright)
    assert turned.shape[:2] == (picture.width, picture.height)
    for data in (
        plain[:2] + segment + plain[2:],
        plain[:2] + other + segment + plain[2:],
        plain[:frame] + segment + plain[frame:],
        plain[:scan] + segment + plain[scan:],
        plain[:2] + b"\xff" + segment + plain[2:],  # filled up, as the standard allows
    ):
        np.testing.assert_array_equal(decode(data), turned)
    for data in (plain + segment, plain[:2] + struct.pack(">BBH", 0xFF, 0xFE, len(segment) + 2) + segment + plain[2:]):
        np.testing.assert_array_equal(decode(data), decode(plain))  # behind the image, or in a comment


def test_no_bytes_of_pixels_are_searched_for_exif(picture: Image.Image) -> None:
    class Watched(bytes):
        def __contains__(self, part: object) -> bool:
            pytest.fail("all bytes were searched")

    for options in ({}, {"progressive": True}, {"icc_profile": b"p" * 70_000}):
        header = read_header(Watched(saved(picture, "JPEG", **options)))
        assert not header.may_be_turned
        assert header.may_have_scans == ("progressive" in options)


def with_scans(data: bytes, times: int) -> bytes:
    """A JPEG whose last scan comes so many times more."""
    return data[:-2] + data[data.rindex(SCAN) : -2] * times + data[-2:]


def test_a_jpeg_of_too_many_scans_is_a_bomb() -> None:
    """Each takes as long as a whole image: a thousand of them, of 14 bytes each, would take a task minutes."""
    data = saved(Image.new("L", (90, 60), 128), "JPEG", progressive=True)
    few = data.count(SCAN)
    shown = decode(data)
    np.testing.assert_array_equal(decode(with_scans(data, MAX_SCANS - few)), shown)
    for times in (MAX_SCANS - few + 1, 5000):
        with pytest.raises(DecodeError, match="decompression bomb: a JPEG of more than 100 scans"):
            decode(with_scans(data, times))
        for end in (b"\0", b"\n", data[-2:]):  # simplejpeg knows it for none, Pillow does
            with pytest.raises(DecodeError, match="of more than 100 scans"):
                decode(with_scans(data, times) + end)
        with pytest.raises(DecodeError, match="of more than 100 scans"):
            decode(with_scans(data, times)[:-2])
        with pytest.raises(SourceError, match="of more than 100 scans"):
            decode_ids(with_scans(data, times))
    hidden = struct.pack(">BBH", 0xFF, 0xFE, 4) + b"\xff\xd9"  # a comment with the mark of an image's end
    last = data.rindex(SCAN)
    with pytest.raises(DecodeError, match="scans"):
        decode(data[:last] + hidden + data[last:-2] * MAX_SCANS + data[-2:])


def test_scans_of_single_colours_are_counted_too(picture: Image.Image) -> None:
    """Of a JPEG that is not progressive: its frame has three components, this scan has one."""
    data = bytearray(saved(picture, "JPEG"))
    data[data.index(SCAN) + 4] = 1
    assert read_header(bytes(data)).may_have_scans
    assert not has_more_scans(bytes(data), 1)


def test_scans_elsewhere_are_none_of_the_image_s(picture: Image.Image) -> None:
    """In another segment, as of a thumbnail, or behind the image's end, as of a film that a telephone puts there."""
    data = saved(picture, "JPEG", progressive=True)
    shown = decode(data)
    inside = struct.pack(">BBH", 0xFF, 0xEA, 2 + 400) + SCAN * 200
    for other in (data[:2] + inside + data[2:], data + SCAN * 1000):
        np.testing.assert_array_equal(decode(other), shown)


@pytest.mark.parametrize("format_", ["PNG", "GIF", "WEBP"])
def test_transparent_colours_are_white(picture: Image.Image, format_: str) -> None:
    """A palette with a transparent entry, a key colour, or an alpha channel: half of the picture is seen through."""
    image = picture.convert("P", palette=Image.Palette.ADAPTIVE, colors=8)
    indices = np.asarray(image).copy()
    indices[:, :45] = 7
    image.putdata(indices.ravel().tolist())
    image = image.convert("RGBA") if format_ == "WEBP" else image
    if format_ == "WEBP":
        image.putalpha(Image.fromarray(np.where(indices == 7, 0, 255).astype(np.uint8)))
    data = saved(image, format_, **({"lossless": True} if format_ == "WEBP" else {"transparency": 7}))
    ours = decode(data)
    assert (ours[indices == 7] == 255).all()
    shown = np.asarray(image.convert("RGB"))[indices != 7]
    np.testing.assert_array_equal(ours[indices != 7], shown)


def test_palettes_may_have_alpha() -> None:
    """A TGA's, of two colours with 32 bits."""
    header = struct.pack("<BBBHHBHHHHBB", 0, 1, 1, 0, 2, 32, 0, 0, 2, 1, 8, 0x20)
    image = decode(header + bytes([10, 20, 30, 255, 40, 50, 60, 0]) + bytes([0, 1]))
    assert image.tolist() == [[[30, 20, 10], [255, 255, 255]]]


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_half_transparent_is_mixed_with_white(mode: str) -> None:
    image = Image.new(mode, (8, 8), (100, 50, 0, 128) if mode == "RGBA" else (100, 128))
    expected = [177, 152, 127] if mode == "RGBA" else [177, 177, 177]
    assert abs(decode(saved(image, "PNG")).astype(int) - expected).max() <= 1


def test_colour_profiles_are_not_applied(picture: Image.Image) -> None:
    """Nor lost: the numbers are those of the file. A wide-gamut red would come out as another number."""
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    data = saved(picture, "PNG", icc_profile=profile)
    assert Image.open(io.BytesIO(data)).info["icc_profile"] == profile
    assert_same(decode(data), picture)


def test_first_frame(picture: Image.Image) -> None:
    second = ImageOps.mirror(picture).convert("P")
    data = saved(picture.convert("P"), "GIF", save_all=True, append_images=[second])
    assert_same(decode(data), picture.convert("P"))


def test_around_a_first_frame_nothing_is_drawn() -> None:
    """Which is white, as all that is transparent, and not the palette's first colour."""
    image = Image.new("P", (2, 3), 1)
    image.putpalette([0, 0, 200, 250, 0, 0])
    data = bytearray(saved(image, "GIF", optimize=False))
    frame = data.index(struct.pack("<cHHHH", b",", 0, 0, 2, 3))
    data[frame + 1 : frame + 5], data[6:10] = struct.pack("<HH", 3, 1), struct.pack("<HH", 8, 6)
    expected = np.full((6, 8, 3), 255)
    expected[1:4, 3:5] = 250, 0, 0
    np.testing.assert_array_equal(decode(bytes(data)), expected)


def test_alpha_is_laid_over_white(picture: Image.Image) -> None:
    picture.putalpha(Image.new("L", picture.size, 0))
    assert (decode(saved(picture, "PNG")) == 255).all()


@pytest.mark.parametrize("data", [b"", b"just text, not an image", b"\xff\xd8\xff\xe0 broken"])
def test_not_an_image(data: bytes) -> None:
    with pytest.raises(DecodeError):
        decode(data)


def test_postscript_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_, **__: pytest.fail("a program of the data is run"))
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n{} loop\n"
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode(data)
    with pytest.raises(SourceError, match="not an image of a known format"):
        decode_ids(data)


@pytest.mark.parametrize("kind", ["text", "profile"])
def test_large_texts_and_profiles_are_no_damage(picture: Image.Image, kind: str) -> None:
    """As editors and scanners write them."""
    texts = PngInfo()
    if kind == "text":
        texts.add_text("Raw profile type xmp", "a" * 2_000_000, zip=True)
    data = saved(picture, "PNG", pnginfo=texts, icc_profile=b"a" * 2_000_000 if kind == "profile" else None)
    assert_same(decode(data), picture)


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


def png_header(width: int, height: int) -> bytes:
    """A PNG of RGBA whose pixels are missing."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 6, 0, 0, 0)
    head = struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 0) + b"IDAT" + struct.pack(">I", zlib.crc32(b"IDAT"))


@pytest.mark.parametrize("size", [(70_000_000, 1), (1, 70_000_000), (1_000_001, 1)])
def test_a_side_may_be_too_long_whatever_the_pixels(size: tuple[int, int]) -> None:
    """Of rows of 2^31 bits Pillow says that memory is short, which would end a build; it is the image's fault."""
    with pytest.raises(DecodeError, match=rf"bomb: {size[0]} x {size[1]} pixels, the bound of a side is 1000000"):
        decode(png_header(*size))
    with pytest.raises(SourceError, match="the bound of a side is 1000000"):
        decode_ids(png_header(*size))


def test_a_long_side_within_the_bound() -> None:
    assert decode(saved(Image.new("L", (1_000_000, 1), 7), "PNG")).shape == (1, 1_000_000, 3)


def test_icons_are_not_decoded_to_learn_their_size(picture: Image.Image) -> None:
    """Which is what Pillow does as it opens them."""
    with pytest.raises(DecodeError, match="not an image of a known format"):
        decode(saved(picture, "ICO"))


@pytest.mark.parametrize("format_", ["PCX", "SGI", "QOI", "DDS", "DIB", "JPEG2000", "AVIF"])
def test_seldom_formats(picture: Image.Image, format_: str) -> None:
    options = {"JPEG2000": {"irreversible": False}, "AVIF": {"quality": 100, "subsampling": "4:4:4"}}.get(format_, {})
    assert_same(decode(saved(picture, format_, **options)), picture, tolerance=4 if format_ == "AVIF" else 0)


def test_gray_is_rounded_alike_in_all_strips(monkeypatch: pytest.MonkeyPatch) -> None:
    gray = np.random.default_rng(0).integers(0, 65536, (37, 11), np.uint16)
    whole = pixels.eight_bits_of_gray(gray, 16)
    np.testing.assert_array_equal(whole, np.rint(gray / 257))
    monkeypatch.setattr(pixels, "GRAY_TOGETHER", 20)
    np.testing.assert_array_equal(pixels.eight_bits_of_gray(gray, 16), whole)
    assert pixels.eight_bits_of_gray(gray[:0], 16).shape == (0, 11)


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_the_bound_of_pixels_is_the_caller_s(picture: Image.Image, format_: str) -> None:
    data = saved(picture, format_)
    assert decode(data, max_pixels=60 * 90).shape == (60, 90, 3)
    with pytest.raises(DecodeError, match="decompression bomb: 90 x 60 pixels, the bound is 5399"):
        decode(data, max_pixels=60 * 90 - 1)


def test_a_large_bound_needs_pillow_s_raised(picture: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above its bound Pillow warns, and above twice of it raises, whatever we say. A small bound stands for it here."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)
    monkeypatch.setattr(pixels, "MAX_PIXELS", 2000)
    data = saved(picture, "PNG")
    with pytest.raises(DecodeError, match="decompression bomb"):
        decode(data, max_pixels=6000)
    allow_pixels(6000)
    assert decode(data, max_pixels=6000).shape == (60, 90, 3)
    allow_pixels(100)
    assert Image.MAX_IMAGE_PIXELS == 2000, "never below Pillow's own"


@pytest.mark.coco100
def test_real_jpegs_are_pillow_s(coco100: Path) -> None:
    for path in sorted(coco100.glob("*2017/*.jpg")):
        np.testing.assert_array_equal(decode(path.read_bytes()), np.asarray(Image.open(path).convert("RGB")))


def test_encodings_come_back(picture: Image.Image) -> None:
    image = np.asarray(picture)
    for encoding in ("raw", "png", "jpeg"):
        data = image.tobytes() if encoding == "raw" else encode(image, encoding)  # type: ignore[arg-type]
        back = decode_stored(data, encoding=encoding, height=60, width=90)
        assert abs(back.astype(int) - image).mean() <= (2 if encoding == "jpeg" else 0)
        assert encoding == "raw" or data == encode(image, encoding)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["raw", "png", "jpeg"])
def test_stored_images_that_are_damaged(picture: Image.Image, encoding: Any) -> None:
    image = np.asarray(picture)
    data = image.tobytes() if encoding == "raw" else encode(image, encoding)
    for spoilt in (b"", b"no image"):
        with pytest.raises(ValueError, match=r"."):
            decode_stored(spoilt, encoding=encoding, height=60, width=90)
    with pytest.raises(ValueError, match="reshape" if encoding == "raw" else "90 x 60 pixels, 91 x 60 are stated"):
        decode_stored(data, encoding=encoding, height=60, width=91)


@pytest.mark.parametrize("encoding", ["png", "jpeg"])
def test_the_longest_side_that_can_be_stored(encoding: Any) -> None:
    side = transforms.MAX_SIDE[encoding]
    line = np.zeros((1, side, 3), np.uint8)
    data = encode(line, encoding)
    assert decode_stored(data, encoding=encoding, height=1, width=side).shape == line.shape


@pytest.mark.parametrize("format_", ["JPEG", "PNG"])
def test_short_memory_is_not_the_images_fault(
    picture: Image.Image, format_: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(*_: Any, **__: Any) -> None:
        raise MemoryError

    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(picture, format_, exif=exif)
    monkeypatch.setattr(Image, "open", short)
    with pytest.raises(MemoryError):
        decode(data)
    with pytest.raises(MemoryError):
        decode_ids(data)
