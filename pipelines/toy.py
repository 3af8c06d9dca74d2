"""A toy data set in COCO's format: overlapping shapes on textured background, with exact masks.

Shapes are drawn by the rasteriser that reads their polygons later, so a polygon or run-length mask is the painted
object to the pixel. Shape decides the class; colour only hints at it.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from tqdm import tqdm

from pipelines.prefetch import prefetched
from pipelines.rle import bitmap_from_ends, segmentation_ends
from pipelines.storage import Store, open_store

Mask = NDArray[np.bool_]
Canvas = NDArray[np.float32]

CATEGORIES = ((1, "circle"), (3, "square"), (7, "triangle"), (12, "star"))  # ids with gaps, as in COCO
KEYPOINTS = ("left_end", "right_end", "centre")
HUES = (0.02, 0.30, 0.58, 0.83)  # where the colour of most objects of a class lies
HUE_SPREAD = 0.10
ODD_COLOUR_SHARE = 0.25  # objects of any hue whatever
MIN_VISIBLE = 0.35  # share of a shape that the others and the border have to leave
GRID = 64  # corners lie on multiples of 1/64 pixel: as float32, too, they give the same mask
TRIES = 50  # to place one more object


@dataclass(frozen=True)
class ToySummary:
    """What was made."""

    out: str
    images: int
    instances: int
    instances_per_class: dict[str, int]
    seconds: float

    @property
    def images_uri(self) -> str:
        """For `build-data --images`."""
        return f"{self.out}/images"

    @property
    def annotations_uri(self) -> str:
        """For `build-data --annotations`."""
        return f"{self.out}/annotations.json"


@dataclass(frozen=True)
class _Shape:
    category: int  # index into CATEGORIES
    polygon: list[float]
    full: Mask
    keypoints: NDArray[np.float64]  # (3, 2), as the corners of the polygon


@dataclass(frozen=True)
class ToyImage:
    """One image and its visible objects, bottom first."""

    pixels: NDArray[np.uint8]
    annotations: list[dict[str, Any]]
    """COCO annotations without id and image_id"""


def make_toy_data(
    out: str,
    *,
    images: int,
    seed: int,
    size: int = 128,
    objects: tuple[int, int] = (2, 5),
    keypoints: bool = False,
) -> ToySummary:
    """Write `out`/images/*.jpg and `out`/annotations.json; `out` is a local path or s3://bucket/prefix.

    Image i is a function of (seed, i, size, objects) alone. `size` is the shorter side in pixels, the longer
    one is up to a quarter longer; an image has `objects` (fewest, most) objects. With `keypoints` each object has its
    leftmost and its rightmost corner and its centre as keypoints. Raises ValueError for numbers that make no sense.
    """
    if images < 1:
        raise ValueError(f"--images is {images}, but must be at least 1")
    if size < 32:
        raise ValueError(f"--size is {size} pixels, but must be at least 32: shapes would be too small to tell apart")
    if not 1 <= objects[0] <= objects[1]:
        raise ValueError(f"objects is {objects}, but must be (fewest, most) from 1 on")
    start = time.monotonic()
    store = open_store(out)
    make = partial(_make_and_write, store.join("images"), seed=seed, size=size, objects=objects)
    made = tqdm(prefetched(make, range(images), threads=2, ahead=16), total=images, unit=" images", disable=None)
    records = list(made)
    coco = _coco(records, seed, keypoints=keypoints)
    store.write_bytes("annotations.json", json.dumps(coco).encode())
    names = dict(CATEGORIES)
    found = [names[each["category_id"]] for each in coco["annotations"]]
    return ToySummary(
        out=store.uri,
        images=images,
        instances=len(found),
        instances_per_class={name: found.count(name) for name in names.values()},
        seconds=time.monotonic() - start,
    )


def _make_and_write(store: Store, index: int, **how: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    image = make_toy_image(index=index, **how)
    image_id = index + 1
    name = f"{image_id:012d}.jpg"  # as COCO's files have their image's id
    store.write_bytes(name, simplejpeg.encode_jpeg(image.pixels, quality=92, colorspace="RGB", colorsubsampling="444"))
    height, width = image.pixels.shape[:2]
    return {"id": image_id, "file_name": name, "height": height, "width": width}, image.annotations


def _coco(records: list[tuple[dict[str, Any], list[dict[str, Any]]]], seed: int, *, keypoints: bool) -> dict[str, Any]:
    left_out = () if keypoints else ("keypoints", "num_keypoints")
    owned = [
        (record["id"], {key: value for key, value in each.items() if key not in left_out})
        for record, annotations in records
        for each in annotations
    ]
    names = {"keypoints": KEYPOINTS} if keypoints else {}
    return {
        "info": {"description": f"toy shapes, seed {seed}"},
        "images": [record for record, _ in records],
        "annotations": [{"id": i, "image_id": image, **each} for i, (image, each) in enumerate(owned, start=1)],
        "categories": [{"id": id_, "name": name, "supercategory": "shape", **names} for id_, name in CATEGORIES],
    }


def make_toy_image(*, seed: int, index: int, size: int = 128, objects: tuple[int, int] = (2, 5)) -> ToyImage:
    """Image `index` of the data set of `seed`."""
    rng = np.random.default_rng([seed % 2**64, index])
    sides = (size, int(rng.integers(size, size + size // 4 + 1)))
    height, width = sides if rng.random() < 0.7 else sides[::-1]
    shapes = _place(rng, height, width, int(rng.integers(objects[0], objects[1] + 1)))
    canvas = _background(rng, height, width)
    for shape in shapes:
        _paint(rng, canvas, shape)
    grain = rng.normal(0, 3, canvas.shape)
    pixels = np.clip(cv2.GaussianBlur(canvas, (3, 3), 0.6) + grain, 0, 255).astype(np.uint8)
    visible = _visible([shape.full for shape in shapes])
    annotations = [_annotate(shape, mask) for shape, mask in zip(shapes, visible, strict=True)]
    return ToyImage(pixels, annotations)


def _place(rng: np.random.Generator, height: int, width: int, wanted: int) -> list[_Shape]:
    """Shapes one over another, each of which stays visible enough."""
    shapes: list[_Shape] = []
    areas: list[float] = []
    for _ in range(wanted * TRIES):
        shape, area = _random_shape(rng, height, width)
        masks = _visible([each.full for each in [*shapes, shape]])
        if all(mask.sum() >= MIN_VISIBLE * full for mask, full in zip(masks, [*areas, area], strict=True)):
            shapes.append(shape)
            areas.append(area)
        if len(shapes) == wanted:
            break
    return shapes


def _random_shape(rng: np.random.Generator, height: int, width: int) -> tuple[_Shape, float]:
    """A shape, and its area were it not cut by the border."""
    side = min(height, width)
    radius = side * float(np.exp(rng.uniform(np.log(1 / 6), np.log(1 / 2)))) / 2
    center = rng.uniform([0.6 * radius] * 2, [width - 0.6 * radius, height - 0.6 * radius])
    category = int(rng.integers(len(CATEGORIES)))
    corners = np.round((center + radius * _outline(CATEGORIES[category][1], rng)) * GRID) / GRID
    x, y = corners.T
    area = abs(float(x @ np.roll(y, 1) - y @ np.roll(x, 1))) / 2
    polygon = corners.ravel().tolist()
    ends = segmentation_ends({"polygons": [polygon], "rle": None}, height, width)
    full = bitmap_from_ends(ends, height, width).astype(bool)
    return _Shape(category, polygon, full, np.stack([corners[x.argmin()], corners[x.argmax()], center])), area


def _outline(name: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Corners (n, 2) of a randomly turned and slightly squeezed shape that fits the unit circle."""
    points = {"circle": 32, "square": 4, "triangle": 3, "star": 10}[name]
    turn = rng.uniform(0, 2 * np.pi)
    angles = 2 * np.pi * np.arange(points) / points
    radii = np.where(np.arange(points) % 2, 0.5, 1.0) if name == "star" else np.ones(points)
    corners = radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)
    corners[:, 1] *= rng.uniform(0.8, 1.0)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    return corners @ rotation.T


def _visible(full: list[Mask]) -> list[Mask]:
    """What is left of each mask under all that come after it."""
    covered = np.zeros_like(full[0])
    visible = []
    for mask in reversed(full):
        visible.append(mask & ~covered)
        covered |= mask
    return visible[::-1]


def _annotate(shape: _Shape, visible: Mask) -> dict[str, Any]:
    """Polygon where nothing covers the shape, run lengths where its outline is another's."""
    rle = coco_mask.encode(np.asfortranarray(visible, np.uint8))
    keypoints = [_annotate_point(x, y, shape.full, visible) for x, y in shape.keypoints.tolist()]
    counts = {"size": list(visible.shape), "counts": rle["counts"].decode()}
    return {
        "category_id": CATEGORIES[shape.category][0],
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(visible.sum()),
        "iscrowd": 0,
        "segmentation": [shape.polygon] if (visible == shape.full).all() else counts,
        "keypoints": [value for point in keypoints for value in point],
        "num_keypoints": sum(visibility > 0 for _, _, visibility in keypoints),
    }


def _annotate_point(x: float, y: float, full: Mask, visible: Mask) -> tuple[float, float, int]:
    """Pixel numbers and visibility: 1 where another object covers this one, 0 outside of the image, else 2."""
    height, width = visible.shape
    if not (0.5 <= x <= width - 0.5 and 0.5 <= y <= height - 0.5):
        return 0, 0, 0
    near = np.s_[max(int(y) - 1, 0) : int(y) + 2, max(int(x) - 1, 0) : int(x) + 2]  # ends lie on the outline
    covered = full[near].any() and not visible[near].any()
    return x - 0.5, y - 0.5, 1 if covered else 2


def _background(rng: np.random.Generator, height: int, width: int) -> Canvas:
    """Muted gradient, stripes, blotches and grain (H, W, 3), with strokes that are no objects."""
    y, x = np.mgrid[:height, :width].astype(np.float32) / max(height, width)
    canvas = np.broadcast_to(_colour(rng.random(), rng.uniform(0.05, 0.3), rng.uniform(0.35, 0.75)), (height, width, 3))
    gradient, stripes = rng.uniform(0, 2 * np.pi, 2)
    tone = 70 * rng.random() * (np.cos(gradient) * x + np.sin(gradient) * y)
    tone = tone + 22 * rng.random() * np.sin((np.cos(stripes) * x + np.sin(stripes) * y) * rng.uniform(20, 90))
    blotches = rng.normal(0, 14, (int(rng.integers(4, 14)), int(rng.integers(4, 14)), 3)).astype(np.float32)
    canvas = canvas + tone[..., None] + cv2.resize(blotches, (width, height), interpolation=cv2.INTER_CUBIC)
    canvas = np.ascontiguousarray(canvas + rng.normal(0, 6, canvas.shape), np.float32)
    for _ in range(int(rng.integers(3, 10))):
        _stroke(rng, canvas)
    return canvas


def _stroke(rng: np.random.Generator, canvas: Canvas) -> None:
    """A thin line or a dot."""
    height, width = canvas.shape[:2]
    colour = _colour(rng.random(), rng.uniform(0.1, 0.6), rng.uniform(0.2, 0.9)).tolist()
    x, y = (int(value) for value in rng.integers(0, [width, height]))
    if rng.random() < 0.5:
        dx, dy = (int(value) for value in rng.integers(-width // 3, width // 3 + 1, 2))
        cv2.line(canvas, (x, y), (x + dx, y + dy), colour, int(rng.integers(1, 3)))
    else:
        cv2.circle(canvas, (x, y), int(rng.integers(1, max(3, width // 40))), colour, -1)


def _paint(rng: np.random.Generator, canvas: Canvas, shape: _Shape) -> None:
    """Fill a shape with a shaded colour and a dark or light rim, in place."""
    odd = rng.random() < ODD_COLOUR_SHARE
    hue = rng.random() if odd else HUES[shape.category] + rng.uniform(-HUE_SPREAD, HUE_SPREAD)
    colour = _colour(hue % 1, rng.uniform(0.5, 0.95), rng.uniform(0.55, 1.0))
    y, x = np.mgrid[: canvas.shape[0], : canvas.shape[1]].astype(np.float32) / max(canvas.shape)
    angle = rng.uniform(0, 2 * np.pi)
    shading = 1 + 0.5 * (np.cos(angle) * (x - 0.5) + np.sin(angle) * (y - 0.5))
    inside = cv2.erode(shape.full.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    shading = np.where(inside, shading, shading * rng.choice([0.6, 1.3]))
    canvas[shape.full] = (colour * shading[..., None])[shape.full]


def _colour(hue: float, saturation: float, value: float) -> NDArray[np.float32]:
    """RGB, 0..255, from HSV, 0..1."""
    hsv = np.array([[[hue * 360, saturation, value]]], np.float32)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0] * np.float32(255)
