"""Bytes -> RGB -> resized -> bytes. Images are (H, W, 3) uint8 RGB arrays throughout."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import TiffImageFile

from pipelines.config import Encoding
from pipelines.jpeg_segments import has_more_scans, read_header

Pixels = NDArray[np.uint8]

PIXELS_VERSION = (
    3  # raised where the same file gives other pixels or masks: a build does not mix shards of before and after
)
MAX_PIXELS = 89_478_485  # Pillow's own bound against decompression bombs
LONGEST_SIDE = 1_000_000  # pixels, as libpng has it: of a row that is far longer Pillow says that memory is short
GRAY_TOGETHER = 2**20  # pixels whose numbers are rounded at once: they take eight times as much memory meanwhile
# All but programs (EPS), and what Pillow decodes as it opens it, before anyone can ask for its size (icons)
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "PSD", "PCX", "SGI", "QOI", "DDS",
    "SUN", "TGA",
)  # fmt: skip
ORIENTATION = 0x0112  # EXIF tag
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO = 0
PNG_BITS = 24  # the byte that says how many a sample has
TGA_BITS_AND_DESCRIPTION = 16, 17  # bytes: how many a pixel has, how many of these are alpha
TIFF, BIG_TIFF = (b"II*\0", b"MM\0*", b"II+\0"), b"MM\0+"  # how they begin
MAX_SCANS = 100  # of a JPEG, as libtiff has it: cameras and tools make a dozen; each takes as long as a whole image
JPEG_QUALITY = 95
MAX_SIDE: dict[Encoding, int] = {"jpeg": 65_500, "png": 1_000_000}  # libjpeg's and libpng's bounds
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one text or profile as all of them: 64 MB, not 1


class DecodeError(ValueError):
    """The bytes are not an image that can be used; the message says why."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Pixels:
    """Any image file as the RGB that a viewer shows: upright, alpha over white, 16 bit as 8, first frame.

    simplejpeg for ordinary JPEGs, Pillow for all else. Colour profiles are not applied: networks are trained on, and
    the peers read, the numbers as they are stored. CMYK becomes RGB by Pillow's formula, and JPEG's CMYK is taken for
    inverted, as Adobe writes it and browsers read it.
    Raises DecodeError, also for an image of more than `max_pixels`; above Pillow's own bound, see `allow_pixels`.
    """
    if not data:
        raise DecodeError("the file is empty")
    image = _decode_jpeg(data, max_pixels) if simplejpeg.is_jpeg(data) else None
    return _decode_any(data, max_pixels) if image is None else image


def allow_pixels(max_pixels: int) -> None:
    """Raise Pillow's own bound in this process: it has but one for all images."""
    Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, max_pixels)


def _decode_jpeg(data: bytes, max_pixels: int) -> Pixels | None:
    """None where Pillow has to look at it: CMYK, sampling that simplejpeg does not know (a KeyError), or damage that
    libjpeg warns of and Pillow may forgive."""
    header = read_header(data)
    if header.may_have_scans and has_more_scans(data, MAX_SCANS):
        raise DecodeError(f"decompression bomb: a JPEG of more than {MAX_SCANS} scans")
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
            orientation = _orientation(header)
    except MemoryError:
        raise
    except Exception:  # as in _decode_any
        return image
    return _turned(image, orientation)


def _orientation(image: Image.Image) -> int:
    """By its EXIF, or where that does not tell, by its XMP. Unreadable EXIF is no EXIF."""
    try:
        return int(image.getexif().get(ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # struct.error, SyntaxError, ...
        return 1


def _turned(image: Pixels, orientation: int) -> Pixels:
    """Turn and mirror as the EXIF orientation says (1: as stored, ... 8)."""
    if orientation in (5, 6, 7, 8):
        image = image.transpose(1, 0, 2)
    if orientation in (2, 3, 6, 7):
        image = image[:, ::-1]
    if orientation in (3, 4, 7, 8):
        image = image[::-1]
    return np.ascontiguousarray(image)


def open_image(data: bytes) -> Image.Image:
    """An image of one of the FORMATS as Pillow opens it, not yet decoded.

    Raises UnidentifiedImageError, and whatever Pillow's plug-ins raise.
    """
    return Image.open(io.BytesIO(data), formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()  # not all versions have all
    return tuple(each for each in FORMATS if each in Image.OPEN)


def _decode_any(data: bytes, max_pixels: int) -> Pixels:
    try:
        try:
            if data.startswith(BIG_TIFF):  # Pillow warns, and then says that it does not know them
                return _decode_tiff(data, max_pixels)
            return _decode_with_pillow(data, max_pixels)
        except UnidentifiedImageError:
            if not data.startswith(TIFF):
                raise
            return _decode_tiff(data, max_pixels)
    except UnidentifiedImageError:
        raise DecodeError("not an image of a known format") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"decompression bomb: {error}") from None
    except (DecodeError, MemoryError):  # which is not the image's fault
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever: RuntimeError, struct.error, zlib.error, ...
        raise DecodeError(f"damaged image: {error}") from None


def _decode_with_pillow(data: bytes, max_pixels: int) -> Pixels:
    with open_image(data) as image:
        check_size(image.height, image.width, max_pixels)
        if isinstance(image, TiffImageFile) and image.tile[0].codec_name == "raw":
            from pipelines.tiff import is_mistaken

            if is_mistaken(image):
                return _decode_tiff(data, max_pixels)
        frame = image.tile[0].extents if isinstance(image, GifImageFile) else None
        image.load()
        orientation = _orientation(image)  # after load(), which itself turns a TIFF
        _spread_hidden_gray(image, data)
        if _is_deep_png(image, data):
            pixels = _from_deep_png(data)
        else:
            pixels = _to_rgb(image.convert("RGB") if _has_no_alpha(image, data) else image)
        if frame is not None and frame != (0, 0, *image.size):
            pixels = _alone_in_white(pixels, frame)
    return _turned(pixels, orientation)


def _decode_tiff(data: bytes, max_pixels: int) -> Pixels:
    from pipelines.tiff import open_tiff  # seldom needed

    image, orientation = open_tiff(data, max_pixels)
    return _turned(_to_rgb(image), orientation)


def _to_rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I"):
        return _from_deep_gray(image)
    if image.mode == "F":
        raise DecodeError("floating-point pixels have no known range")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.array(image.convert("RGB"))


def _from_deep_gray(image: Image.Image) -> Pixels:
    """16-bit gray (of a TIFF 9 to 15 bits, or 32 where a value needs it) to 8 bit, rounded. Pillow leaves it to others
    what a TIFF says of its numbers, and which gray is transparent."""
    gray, tags = np.asarray(image), image.tag_v2 if isinstance(image, TiffImageFile) else {}
    bits, kind = (int(tags.get(tag, (default,))[0]) for tag, default in ((BITS, 16), (SAMPLE_FORMAT, 1)))
    if bits == 32 and kind == 1:
        gray = gray.view(np.uint32)
    eight = eight_bits_of_gray(gray, bits)
    if tags.get(PHOTOMETRIC) == WHITE_IS_ZERO:
        eight = 255 - eight
    if (hidden := image.info.get("transparency")) is not None:
        eight[gray == hidden] = 255
    return np.repeat(eight[..., None], 3, axis=2)


def eight_bits_of_gray(gray: NDArray[Any], bits: int) -> Pixels:
    """Numbers of so many bits, rounded to 8; of 32 bits only 16 are meant where all values fit into them."""
    fits = bits <= 16 or gray.max(initial=0) <= 65535
    top = 2 ** min(bits, 16) - 1 if fits else np.iinfo(gray.dtype).max
    strips = np.array_split(gray, max(1, min(len(gray), gray.size // GRAY_TOGETHER)))
    return np.concatenate([np.clip(np.rint(each * (255.0 / top)), 0, 255).astype(np.uint8) for each in strips])


def _has_no_alpha(image: Image.Image, data: bytes) -> bool:
    """Of a TGA whose pixels have 16 bits, or 32 of which it says that none are alpha: Pillow takes them for that."""
    bits, described = TGA_BITS_AND_DESCRIPTION
    return image.format == "TGA" and image.mode == "RGBA" and (data[bits] == 16 or data[described] & 15 == 0)


def _spread_hidden_gray(image: Image.Image, data: bytes) -> None:
    """A PNG's 2 or 4 bits Pillow spreads to 8, but not those of the value that is transparent."""
    if image.format == "PNG" and image.mode == "L" and "transparency" in image.info:
        image.info["transparency"] *= 255 // (2 ** data[PNG_BITS] - 1)


def _alone_in_white(pixels: Pixels, box: tuple[int, int, int, int]) -> Pixels:
    """The first frame of a GIF: around it nothing is drawn yet, where Pillow shows the palette's first colour."""
    left, top, right, bottom = box
    shown = np.full_like(pixels, 255)
    shown[top:bottom, left:right] = pixels[top:bottom, left:right]
    return shown


def _is_deep_png(image: Image.Image, data: bytes) -> bool:
    """Whether it has 16 bits and a colour that is transparent, which Pillow looks for when it has cut them to 8."""
    return image.format == "PNG" and image.mode == "RGB" and "transparency" in image.info and data[PNG_BITS] == 16


def _from_deep_png(data: bytes) -> Pixels:
    bgra = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if bgra is None or bgra.shape[2:] != (4,):
        raise DecodeError("damaged image: a PNG of 16 bits whose transparent colour cannot be read")
    rgb = (bgra[..., 2::-1] // 256).astype(np.uint8)  # as Pillow does with all other deep colours
    rgb[bgra[..., 3] == 0] = 255
    return rgb


def check_size(height: int, width: int, max_pixels: int) -> None:
    """Raise DecodeError for an image of more pixels, or with a longer side, than is allowed."""
    if max(height, width) > LONGEST_SIDE:
        raise DecodeError(f"decompression bomb: {width} x {height} pixels, the bound of a side is {LONGEST_SIDE}")
    if height * width > max_pixels:
        raise DecodeError(f"decompression bomb: {width} x {height} pixels, the bound is {max_pixels}")


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
