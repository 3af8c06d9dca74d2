"""Pictures of detections and of ground truth: translucent masks, outlines, thin boxes, keypoints, labels."""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as mask_utils

from mrcnn.skeleton import limbs, own_keypoints
from mrcnn.structures import Category, Detections

MIN_SIDE = 800
"""Smaller images are enlarged until their longer side has this many pixels: labels are legible then."""
MASK_OPACITY = 0.45
DRAWN_SCORE = 0.5
"""Least score of what is drawn, unless another is asked for"""

Color = tuple[int, int, int]
Rle = Mapping[str, Any]
LEFT: Color = (255, 150, 0)
RIGHT: Color = (0, 160, 255)
"""Of keypoints and limbs of the left_ and the right_ side; all others have their object's colour."""


@dataclass(frozen=True)
class _Drawn:
    """One object in pixels of the image."""

    box: tuple[float, float, float, float]  # xyxy
    mask: Rle | None  # of the image; one at a time is a bitmap
    color: Color
    text: str
    keypoints: np.ndarray  # (points, 3): x, y as pixel numbers; 0 not there, 1 hidden, 2 visible
    names: tuple[str, ...]


def class_color(label: int) -> Color:
    """RGB of a label, the same in every picture; neighbouring labels are far apart in hue."""
    hue = (label * 0.61803398875 + 0.55) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.85 if label % 2 else 0.65, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_detections(
    image: np.ndarray,
    detections: Detections,
    categories: Sequence[Category],
    *,
    score_threshold: float = DRAWN_SCORE,
    keypoint_threshold: float = 0.05,
) -> np.ndarray:
    """The image with the detections of at least `score_threshold`, the best on top.

    `image` is (H, W, 3) uint8 RGB of size `detections.image_size`; the picture may be larger (`MIN_SIDE`). Of their
    keypoints those of at least `keypoint_threshold` are drawn, with COCO's limbs between those that have COCO's names.
    Raises ValueError if the sizes differ.
    """
    if image.shape[:2] != tuple(detections.image_size):
        raise ValueError(
            f"the image is {image.shape[:2]} pixels, but the detections are for {detections.image_size}: "
            "draw on the image that was given to predict"
        )
    kept = [i for i, score in enumerate(detections.scores.tolist()) if score >= score_threshold]
    points = own_keypoints(detections, categories)
    seen = [_points(each, keypoint_threshold) for each in points]
    return _draw(image, [_detected(detections, i, categories, seen[i]) for i in reversed(kept)])


def draw_results(
    image: np.ndarray,
    results: Sequence[Mapping[str, Any]],
    categories: Sequence[Category],
    *,
    score_threshold: float = DRAWN_SCORE,
    keypoint_threshold: float = 0.05,
    thumbnail: int | None = None,
) -> np.ndarray:
    """As `draw_detections`, of rows: each has `label`, `score`, `box` (xywh), `rle` and `keypoints` (x, y, score), the
    last two None where there are none. A `thumbnail` has this many pixels on its longer side, and no labels."""
    kept = [each for each in results if each["score"] >= score_threshold]
    objects = [_result(each, categories, keypoint_threshold) for each in reversed(kept)]
    return _draw(image, objects, thumbnail=thumbnail)


def draw_instances(
    image: np.ndarray, instances: Sequence[Mapping[str, Any]], categories: Sequence[Category]
) -> np.ndarray:
    """The image with its annotations, as rows of the shards have them, in pixels of `image`.

    Each instance has `label`, `box` (xyxy), `iscrowd`, `segmentation` with `polygons` or `rle`, and perhaps
    `keypoints`: hidden ones are drawn as rings.
    """
    return _draw(image, [_annotated(instance, image.shape[:2], categories) for instance in instances])


def _detected(detections: Detections, i: int, categories: Sequence[Category], keypoints: np.ndarray) -> _Drawn:
    label = int(detections.labels[i])
    has_mask = detections.mask_probs is not None
    x1, y1, x2, y2 = detections.boxes[i].tolist()
    return _Drawn(
        box=(x1, y1, x2, y2),
        mask=detections.rles[i] if has_mask else None,
        color=class_color(label),
        text=f"{categories[label - 1].name} {100 * float(detections.scores[i]):.0f}",
        keypoints=keypoints,
        names=categories[label - 1].keypoints,
    )


def _result(row: Mapping[str, Any], categories: Sequence[Category], keypoint_threshold: float) -> _Drawn:
    category = categories[row["label"] - 1]
    x, y, width, height = row["box"]
    return _Drawn(
        box=(x, y, x + width, y + height),
        mask=row["rle"],
        color=class_color(row["label"]),
        text=f"{category.name} {100 * row['score']:.0f}",
        keypoints=_points(row["keypoints"], keypoint_threshold),
        names=category.keypoints,
    )


def _annotated(instance: Mapping[str, Any], size: tuple[int, int], categories: Sequence[Category]) -> _Drawn:
    label = instance["label"]
    name = categories[label - 1].name
    x1, y1, x2, y2 = instance["box"]
    return _Drawn(
        box=(x1, y1, x2, y2),
        mask=_annotated_mask(instance["segmentation"], size),
        color=class_color(label),
        text=f"{name} (crowd)" if instance["iscrowd"] else name,
        keypoints=_points(instance.get("keypoints")),
        names=categories[label - 1].keypoints,
    )


def _points(flat: Sequence[float] | None, score_threshold: float | None = None) -> np.ndarray:
    """(points, 3) of x, y, visibility (0, 1, 2) triples, or of x, y, score triples: 2 from the threshold on, else 0."""
    points = np.array(flat or [], np.float64).reshape(-1, 3)
    if score_threshold is not None:
        points[:, 2] = np.where(points[:, 2] >= score_threshold, 2, 0)
    return points


def _annotated_mask(segmentation: Mapping[str, Any] | None, size: tuple[int, int]) -> Rle | None:
    if segmentation is None:
        return None
    if segmentation["polygons"]:
        rles = mask_utils.frPyObjects([list(map(float, p)) for p in segmentation["polygons"]], *size)
        merged: Rle = mask_utils.merge(rles)
        return merged
    rle = segmentation["rle"]
    return None if rle is None else {"size": list(rle["size"]), "counts": rle["counts"]}


def _draw(image: np.ndarray, objects: Sequence[_Drawn], *, thumbnail: int | None = None) -> np.ndarray:
    longer = max(image.shape[:2])
    scale = thumbnail / longer if thumbnail else max(1.0, MIN_SIDE / longer)
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))  # width, height
    canvas = np.ascontiguousarray(cv2.resize(image, size, interpolation=_interpolation(scale)))
    line = max(1, round(max(size) / 600))
    for item in objects:
        if item.mask is not None:
            _paint_mask(canvas, item.mask, item.color, scale, line)
    for item in objects:
        x1, y1, x2, y2 = (round(v * scale) for v in item.box)
        cv2.rectangle(canvas, (x1, y1), (x2 - 1, y2 - 1), item.color, line, cv2.LINE_AA)
    for item in objects:
        _paint_keypoints(canvas, item, scale, line)
    for item, corner in _label_places(objects, scale, canvas.shape[:2]) if not thumbnail else ():
        _paint_label(canvas, item, corner)
    return canvas


def _interpolation(scale: float) -> int:
    return cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC


def _paint_mask(canvas: np.ndarray, rle: Rle, color: Color, scale: float, line: int) -> None:
    """Blend the mask's colour in and draw its outline, looking at no more than the mask's own part of the image."""
    x, y, width, height = (int(v) for v in mask_utils.toBbox(rle))
    left, top = round(x * scale), round(y * scale)
    part = canvas[top : round((y + height) * scale), left : round((x + width) * scale)]
    if not part.size:
        return
    mask = np.ascontiguousarray(mask_utils.decode(rle)[y : y + height, x : x + width]) * np.uint8(255)
    soft = cv2.resize(mask, part.shape[1::-1], interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    inside = soft >= 128  # enlarging the mask has kept its edge smooth
    part[inside] = (1 - MASK_OPACITY) * part[inside] + MASK_OPACITY * np.array(color, np.float32)
    contours, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE, offset=(left, top))
    dark = tuple(channel // 3 for channel in color)  # sets neighbours of one class apart
    cv2.drawContours(canvas, contours, -1, dark, line + 1, cv2.LINE_AA)
    cv2.drawContours(canvas, contours, -1, color, line, cv2.LINE_AA)


def _paint_keypoints(canvas: np.ndarray, item: _Drawn, scale: float, line: int) -> None:
    """Limbs, then points over them; dark edges keep them apart from the mask."""
    places = [(round((x + 0.5) * scale - 0.5), round((y + 0.5) * scale - 0.5)) for x, y, _ in item.keypoints.tolist()]
    seen = item.keypoints[:, 2]
    names = item.names if len(item.names) == len(places) else ("",) * len(places)
    drawn = [(a, b) for a, b in limbs(names) if seen[a] > 0 and seen[b] > 0]
    for width, dark in ((line + 3, True), (line + 1, False)):
        for a, b in drawn:
            color = _side_color(names[a], names[b], item.color)
            cv2.line(canvas, places[a], places[b], (0, 0, 0) if dark else color, width, cv2.LINE_AA)
    for name, place, visibility in zip(names, places, seen, strict=True):
        if visibility > 0:
            cv2.circle(canvas, place, line + 3, (0, 0, 0), cv2.FILLED, cv2.LINE_AA)
            color = _side_color(name, name, item.color)
            cv2.circle(canvas, place, line + 2, color, cv2.FILLED if visibility > 1 else 1, cv2.LINE_AA)


def _side_color(one: str, other: str, color: Color) -> Color:
    """Of a limb from one keypoint to another."""
    for side, its_color in (("left_", LEFT), ("right_", RIGHT)):
        if one.startswith(side) and other.startswith(side):
            return its_color
    return color


def _font(size: tuple[int, int]) -> tuple[float, int]:
    """Scale and thickness of the labels for a canvas of height, width."""
    scale = max(0.4, max(size) / 2000)
    return scale, max(1, round(scale * 1.6))


def _label_places(
    objects: Sequence[_Drawn], scale: float, size: tuple[int, int]
) -> Iterator[tuple[_Drawn, tuple[int, int]]]:
    """Upper left corner of each label: over its box or in it, moved down while it would hide another."""
    font, thickness = _font(size)
    taken: list[tuple[int, int, int, int]] = []
    for item in reversed(objects):  # the best detection, drawn last, chooses first
        width, height = _label_size(item.text, font, thickness)
        x = min(max(round(item.box[0] * scale), 0), max(size[1] - width, 0))
        y = round(item.box[1] * scale) - height
        y = min(y if y >= 0 else y + height, size[0] - height)
        while any(_overlap((x, y, width, height), other) for other in taken) and y + 2 * height <= size[0]:
            y += height
        taken.append((x, y, width, height))
        yield item, (x, y)


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _label_size(text: str, font: float, thickness: int) -> tuple[int, int]:
    (width, height), baseline = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, font, thickness)
    return width + 6, height + baseline + 4


def _paint_label(canvas: np.ndarray, item: _Drawn, corner: tuple[int, int]) -> None:
    font, thickness = _font(canvas.shape[:2])
    width, height = _label_size(item.text, font, thickness)
    (_, text_height), _ = cv2.getTextSize(item.text, cv2.FONT_HERSHEY_SIMPLEX, font, thickness)
    x, y = corner
    cv2.rectangle(canvas, (x, y), (x + width, y + height), item.color, cv2.FILLED)
    red, green, blue = item.color
    ink = (0, 0, 0) if 0.299 * red + 0.587 * green + 0.114 * blue > 110 else (255, 255, 255)
    cv2.putText(
        canvas,
        item.text,
        (x + 3, y + text_height + 2),
        cv2.FONT_HERSHEY_SIMPLEX,
        font,
        ink,
        thickness,
        cv2.LINE_AA,
    )
