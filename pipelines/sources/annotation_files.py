"""What the sources with an annotation file for each image have in common: JSON, images of ids, objects from masks."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile
from pycocotools import mask as coco_mask

from mrcnn.structures import Category
from pipelines.pillow_images import BITS, PNG_BITS, open_image
from pipelines.pixels import LONGEST_SIDE
from pipelines.records import SourceError

ID_MODES = ("1", "L", "P", "I", "I;16", "I;16B", "I;16L")  # one number a pixel: of a palette, its index

MAX_COORDINATE = 1e6  # pixels

Ids = NDArray[np.int32]
Points = list[tuple[float, float]]


def parse_object(data: bytes) -> dict[str, Any]:
    """The JSON object in a file. Raises SourceError."""
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise SourceError(f"annotation file is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise SourceError("annotation file is no JSON object")
    return content


def points_of(value: Any) -> Points:
    """x, y pairs of finite numbers. Raises SourceError."""
    good = isinstance(value, list) and all(
        isinstance(point, list) and len(point) == 2 and all(_is_finite(each) for each in point) for point in value
    )
    if not good:
        raise SourceError("points are not pairs of finite numbers")
    return [(float(x), float(y)) for x, y in value]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < MAX_COORDINATE  # a NaN is not below anything


def check_size(height: Any, width: Any, what: str = "annotation file") -> tuple[int, int]:
    """The size of an image as its annotations state it. Raises SourceError where it is none, or a bomb."""
    height, width = (int(side) if isinstance(side, float) and side.is_integer() else side for side in (height, width))
    if not all(isinstance(side, int) and side > 0 for side in (height, width)):
        raise SourceError(f"{what} states no size: {width!r} x {height!r}")
    if max(height, width) > LONGEST_SIDE:
        raise SourceError(f"{what} is too large: {width} x {height} pixels, the bound of a side is {LONGEST_SIDE}")
    bound = Image.MAX_IMAGE_PIXELS or math.inf  # that of the images, see pixels.allow_pixels
    if height * width > bound:
        raise SourceError(f"{what} is too large: {width} x {height} pixels, the bound is {bound}")
    return height, width


def decode_ids(data: bytes, what: str = "annotation file") -> Ids:
    """An image of ids (H, W), one number a pixel. Raises SourceError, whose message begins with `what` it is."""
    try:
        with open_image(data) as image:
            check_size(image.height, image.width, what)
            if image.mode not in ID_MODES:
                raise SourceError(f"{what} is no image of ids: its pixels are {image.mode}")
            ids = np.asarray(image).astype(np.int32)
            return ids // (255 // (2 ** _bits(image, data) - 1)) if image.mode == "L" else ids
    except (SourceError, MemoryError):  # which is not the file's fault
        raise
    except UnidentifiedImageError:  # whose message differs each time
        raise SourceError(f"{what} is not an image of a known format") from None
    except Exception as error:  # Pillow's plug-ins raise whatever
        raise SourceError(f"{what} is a damaged image: {error}") from None


def _bits(image: Image.Image, data: bytes) -> int:
    """Of a gray image: what has 2 or 4, Pillow has spread to 8."""
    if image.format == "PNG":
        return data[PNG_BITS]
    return int(image.tag_v2.get(BITS, (1,))[0]) if isinstance(image, TiffImageFile) else 8


def object_of_mask(mask: NDArray[np.bool_], category: Category, *, id_: int, label: int, crowd: bool) -> dict[str, Any]:
    """The annotation of a mask (H, W) that is not empty: its run lengths, and box and area of the pixels."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {
        "id": id_,
        "category_id": category.id,
        "label": label,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": float(np.count_nonzero(mask)),
        "iscrowd": int(crowd),
        "segmentation": {"size": list(mask.shape), "counts": rle["counts"].decode()},
    }
