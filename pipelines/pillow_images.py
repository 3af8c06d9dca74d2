"""All image files but ordinary JPEGs: decoded by Pillow, or by others where it makes of them what no viewer shows."""

from __future__ import annotations

import io
from functools import cache

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError
from PIL.GifImagePlugin import GifImageFile
from PIL.TiffImagePlugin import PLANAR_CONFIGURATION, YCBCRSUBSAMPLING, TiffImageFile

from pipelines.deep_colours import (
    PNG_BITS,
    from_deep_jpeg2000,
    from_deep_png,
    is_deep_jpeg2000,
    is_deep_png,
)
from pipelines.jpeg_segments import BEGINNING, check_scans, read_header
from pipelines.pixels import (
    ORIENTATION,
    DecodeError,
    Pixels,
    check_size,
    eight_bits_of_gray,
    orientation_by,
    turned,
)

# All but programs (EPS), and what Pillow decodes as it opens it, before anyone can ask for its size (icons)
FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000", "PSD", "PCX", "SGI", "QOI", "DDS",
    "SUN", "TGA",
)  # fmt: skip
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # TIFF tags
WHITE_IS_ZERO, YCBCR, PLANES, SIGNED = 0, 6, 2, 2  # values of these and others
MOTOROLA = b"MM"  # how a TIFF of big-endian numbers begins
TGA_BITS_AND_DESCRIPTION = 16, 17  # bytes: how many a pixel has, how many of these are alpha
TIFF, BIG_TIFF = (b"II*\0", b"MM\0*", b"II+\0"), b"MM\0+"  # how they begin
PNG, BOX = b"\x89PNG\r\n\x1a\n", b"ftyp"
HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")  # kinds of what is in such a box
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # one text or profile as all of them: 64 MB, not 1


def decode_any(data: bytes, max_pixels: int) -> Pixels:
    """Any image file as the RGB that a viewer shows. Raises DecodeError."""
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
        raise DecodeError(_unidentified(data)) from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(f"decompression bomb: {error}") from None
    except (DecodeError, MemoryError):  # which is not the image's fault
        raise
    except Exception as error:  # Pillow's plug-ins raise whatever: RuntimeError, struct.error, zlib.error, ...
        raise DecodeError(f"damaged image: {error}") from None


def _decode_with_pillow(data: bytes, max_pixels: int) -> Pixels:
    with open_image(data) as image:
        check_size(image.height, image.width, max_pixels)
        if isinstance(image, TiffImageFile) and _is_mistaken(image):
            return _decode_tiff(data, max_pixels)
        frame = image.tile[0].extents if isinstance(image, GifImageFile) else None
        image.load()
        # after load(), which itself turns a TIFF, and finds the texts of a PNG that come late
        orientation = 1 if isinstance(image, TiffImageFile) else orientation_of(image)
        _spread_hidden_gray(image, data)
        if is_deep_png(image, data):
            pixels = from_deep_png(data)
        elif is_deep_jpeg2000(image, data):
            pixels = _to_rgb(from_deep_jpeg2000(data))
        else:
            pixels = _to_rgb(image.convert("RGB") if _has_no_alpha(image, data) else image)
        if frame is not None and frame != (0, 0, *image.size):
            pixels = _alone_in_white(pixels, frame)
    return turned(pixels, orientation)


def _unidentified(data: bytes) -> str:
    """Why Pillow does not know it, so far as its first bytes tell."""
    if data.startswith(PNG):
        return "damaged image: a PNG whose header or checksums are wrong"
    if data.startswith(BEGINNING):
        return "not a JPEG that is known: its header is cut off, or it has 12 bits, or is lossless: save it with 8 bits"
    if data[4:8] == BOX and data[8:12] in HEIF:
        return "HEIC is not known: save it as JPEG"
    return "not an image of a known format"


def _is_mistaken(image: TiffImageFile) -> bool:
    """Whether Pillow would make other pixels of a TIFF that it has opened: of numbers of 16 bits in planes, where they
    are not compressed, it takes each byte for a number. Raises DecodeError where there is none who does better."""
    tags = image.tag_v2
    if image.tile[0].codec_name != "raw":
        is_deep = max(tags.get(BITS, (1,))) > 8
        if is_deep and tags.prefix == MOTOROLA and SIGNED in tags.get(SAMPLE_FORMAT, ()):  # turned round once too often
            raise DecodeError("a TIFF of signed big-endian numbers, compressed, is not known: save it with 8 bits")
        return False
    if tags.get(PHOTOMETRIC) == YCBCR and tags.get(YCBCRSUBSAMPLING, (2, 2)) != (1, 1):
        raise DecodeError("a TIFF of subsampled YCbCr without compression is not known: save it as RGB")
    return tags.get(PLANAR_CONFIGURATION) == PLANES and max(tags.get(BITS, (1,))) > 8


def _decode_tiff(data: bytes, max_pixels: int) -> Pixels:
    from pipelines.tiff import open_tiff  # seldom needed

    image, orientation = open_tiff(data, max_pixels)
    return turned(_to_rgb(image), orientation)


def open_image(data: bytes) -> Image.Image:
    """An image of one of the FORMATS as Pillow opens it, not yet decoded.

    Raises UnidentifiedImageError, DecodeError for a JPEG of too many scans, and whatever Pillow's plug-ins raise.
    """
    if data.startswith(BEGINNING):
        check_scans(data, read_header(data))
    return Image.open(io.BytesIO(data), formats=_known_formats())


@cache
def _known_formats() -> tuple[str, ...]:
    Image.init()  # not all versions have all
    return tuple(each for each in FORMATS if each in Image.OPEN)


def orientation_of(image: Image.Image) -> int:
    """By its EXIF, or where that does not tell, by its XMP. Unreadable EXIF is no EXIF."""
    try:
        told = image.getexif().get(ORIENTATION)
    except MemoryError:
        raise
    except Exception:  # struct.error, SyntaxError, ...; then it does not look into the XMP
        told = None
    return orientation_by(told, image.info.get("xmp", b""))


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


def _has_no_alpha(image: Image.Image, data: bytes) -> bool:
    """Of a TGA that says so, or whose colours take 16 bits: Pillow takes what is left for alpha. Of a BMP all of which
    could be seen through: who made it left the byte empty, as viewers know."""
    if image.format in ("BMP", "DIB") and image.mode == "RGBA":
        return image.getchannel("A").getextrema() == (0, 0)
    bits, described = TGA_BITS_AND_DESCRIPTION
    if image.format != "TGA" or image.mode not in ("RGBA", "LA"):
        return False
    return data[described] & 15 == 0 or (image.mode == "RGBA" and data[bits] == 16)


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
