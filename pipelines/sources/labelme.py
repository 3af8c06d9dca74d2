"""LabelMe: a JSON file of shapes for each image, beside it or with its path."""

from __future__ import annotations

import base64
import binascii
import math
import posixpath
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from mrcnn.structures import Category
from pipelines.config import BuildConfig
from pipelines.manifest import FILE_NAME, PROGRESS
from pipelines.pixels import BYTES_OF_PIXEL
from pipelines.prefetch import prefetched
from pipelines.records import ImageRecord, Objects, Reject, SourceData, SourceError, printable
from pipelines.sources.annotation_files import (
    Points,
    check_size,
    decode_ids,
    object_of_mask,
    parse_object,
    points_of,
)
from pipelines.sources.image_files import named_images
from pipelines.sources.names import SUFFIXES, links_outside, shown_uri, unfollowed_folders
from pipelines.storage import Store, open_store
from pipelines.storage_errors import FileRefusedError, UnfitFileError

JSON, SHARD = ".json", ".arrow"
CIRCLE_ERROR = 0.1  # pixels by which a circle's polygon may be inside of it
READ_THREADS, READ_AHEAD = 8, 16
NEEDED = {"polygon": 3, "rectangle": 2, "circle": 2, "mask": 2}  # points of shapes that have an inside


@dataclass(frozen=True)
class _Mask:
    """A shape that is a bitmap."""

    bitmap: NDArray[np.bool_]
    corner: tuple[int, int]
    """x and y of its first pixel"""


def read_labelme(config: BuildConfig) -> SourceData:
    """Records of all images below `config.images`, each with the JSON of its own name (a.json for a.jpg), or else with
    the one whose imagePath leads to it. An image without one has not been annotated, and is a reject, as is one whose
    JSON says that it is of another image here, and the second JSON for an image. A JSON without image stands for the
    image in its imageData.

    Category ids are the labels, 1..K, in the order of `config.classes` or else of the sorted names that occur. Raises
    FileNotFoundError where there are no JSON files, ValueError where they name no class.
    """
    images = open_store(config.images).check_folder()
    listed = _without_builds(images.versions((*SUFFIXES, JSON, SHARD), follow_links=config.follow_links))
    photos = dict.fromkeys(name for name in listed if not name.lower().endswith(JSON))
    notes = [name for name in listed if name.lower().endswith(JSON)]
    by_stem = {_stem(name): name for name in reversed(notes)}
    if not notes:
        raise FileNotFoundError(f"{images.uri} holds no JSON files beside its images: is it LabelMe?")
    jsons = {name: by_stem[_stem(name)] for name in photos if _stem(name) in by_stem}
    labels, said = _labels_and_photos(images, sorted(by_stem.values()), config)
    others = _of_others(jsons, {note: name for note, name in said.items() if name in photos})
    classes = config.classes or tuple(sorted(labels))
    if not classes:
        raise ValueError(f"{images.uri}: no shape of its JSON files has a label: is it LabelMe?")
    seconds = {name: by_stem[_stem(name)] for name in notes}  # such as a.json beside a.JSON
    for note in sorted({*by_stem.values()} - {*jsons.values()}):
        if said[note] in photos:
            seconds[note] = jsons.setdefault(said[note], note)
    seconds = {note: first for note, first in seconds.items() if note != first}
    rejects = [
        Reject(shown_uri(images, name), None, "source", f"its JSON, {jsons[name]}, is of another image: {other}")
        for name, other in others.items()
    ]
    rejects += [
        Reject(shown_uri(images, name), None, "source", f"two JSON files for one image: {first} is the other")
        for name, first in seconds.items()
    ]
    return named_images(
        images,
        sorted({*photos, *by_stem.values()} - {*jsons.values()} - others.keys() - seconds.keys()),
        rejects=[*rejects, *unfollowed_folders(images, follow_links=config.follow_links)],
        categories=tuple(Category(id=id_, name=name) for id_, name in enumerate(classes, start=1)),
        versions=listed,
        annotation_files=lambda name: (jsons.get(name) or by_stem.get(_stem(name), f"{_stem(name)}{JSON}"),),
    )


def _without_builds(found: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Names with their versions, sorted, without the JSON files that builds write among them."""
    listed = dict(sorted(found))
    folders = {posixpath.dirname(name) for name in listed if name.endswith(SHARD)}
    own = {posixpath.join(folder, FILE_NAME) for folder in folders}
    names = [name for name in listed if not (name.endswith(SHARD) or name in own or PROGRESS in name.split("/"))]
    return {name: listed[name] for name in names}


def labelme_objects(record: ImageRecord, files: Sequence[bytes], categories: Sequence[Category]) -> Objects:
    """One object of each shape, or of all shapes of a label that share a group_id. Polygons, rectangles, circles and
    masks are shapes with an inside; others are rejected. An area is the sum of the shapes', so overlaps count twice,
    but with a mask among them all are drawn as one."""
    content = parse_object(files[0])
    shapes = content.get("shapes")
    if not isinstance(shapes, list):
        raise SourceError("annotation file has no list 'shapes': it is not LabelMe's")
    labels = {category.name: label for label, category in enumerate(categories, start=1)}
    size = _size(content)
    found = Objects(height=size and size[0], width=size and size[1])
    groups: dict[Any, dict[str, Any]] = {}
    for number, shape in enumerate(shapes, start=1):
        try:
            part = _part(shape, labels, size)
        except SourceError as error:
            found.rejected.append((number, str(error)))
            continue
        group = shape.get("group_id")
        key = number if group is None else (shape["label"], str(group))
        label = labels[shape["label"]]
        new = {"id": number, "label": label, "category": categories[label - 1], "parts": []}
        groups.setdefault(key, new)["parts"].append(part)
    for each in groups.values():
        annotation = _annotation(**each, size=size)
        if annotation is None:
            found.rejected.append((each["id"], "mask is empty"))
        else:
            found.usable.append(annotation)
    return _with_image(found, record, content)


def _size(content: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width of the image, where the file states them. Raises SourceError."""
    height, width = content.get("imageHeight"), content.get("imageWidth")
    return None if height is None and width is None else check_size(height, width)


def _with_image(found: Objects, record: ImageRecord, content: dict[str, Any]) -> Objects:
    """Add the image itself where no file has it."""
    if record.file_name not in record.annotation_files:
        return found
    image = _base64(content.get("imageData"), "imageData")
    if not image:
        raise SourceError(f"no image: neither a file beside it nor imageData (imagePath {content.get('imagePath')!r})")
    return replace(found, image=image)


def _base64(data: Any, what: str) -> bytes:
    """No bytes where there is no text. Raises SourceError."""
    try:  # lines, as MIME has them, are no fault
        return base64.b64decode("".join(data.split()), validate=True) if isinstance(data, str) else b""
    except (binascii.Error, ValueError) as error:
        raise SourceError(f"{what} is not base64: {error}") from None


def _annotation(
    *, id: int, label: int, category: Category, parts: list[Points | _Mask], size: tuple[int, int] | None
) -> dict[str, Any] | None:
    """None where masks are among the parts, and not one pixel is inside."""
    outlines = [part for part in parts if not isinstance(part, _Mask)]
    if len(outlines) < len(parts):
        assert size is not None
        drawn = _drawn(parts, size)
        return object_of_mask(drawn, category, id_=id, label=label, crowd=False) if drawn.any() else None
    xs, ys = [x for part in outlines for x, _ in part], [y for part in outlines for _, y in part]
    return {
        "id": id,
        "label": label,
        "category_id": category.id,
        "bbox": [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)],
        "area": sum(map(_area, outlines)),
        "iscrowd": 0,
        "segmentation": [[value for point in part for value in point] for part in outlines],
    }


def _drawn(parts: list[Points | _Mask], size: tuple[int, int]) -> NDArray[np.bool_]:
    """All parts in one bitmap (H, W), as LabelMe draws them."""
    image = Image.new("1", size[::-1])
    for part in parts:
        if isinstance(part, _Mask):
            image.paste(1, part.corner, Image.fromarray(part.bitmap))
        else:
            ImageDraw.Draw(image).polygon(part, fill=1)
    return np.asarray(image)


def _area(points: Points) -> float:
    turned = [*points[1:], *points[:1]]
    return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, turned, strict=True))) / 2


def _part(shape: Any, labels: dict[str, int], size: tuple[int, int] | None) -> Points | _Mask:
    """The polygon of a shape, or its mask. Raises SourceError with the reason why it has none."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise SourceError("shape has no label")
    if shape["label"] not in labels:
        raise SourceError(f"unknown category: {shape['label']!r}")
    kind = shape.get("shape_type") or "polygon"
    if not isinstance(kind, str) or kind not in NEEDED:
        raise SourceError(f"shape is no polygon, rectangle, circle or mask: {kind!r}")
    points = points_of(shape.get("points"))
    if len(points) < NEEDED[kind]:
        raise SourceError(f"{kind} has fewer than {NEEDED[kind]} points: {len(points)}")
    if kind == "mask":
        return _mask(shape, points, size)
    if kind == "circle":
        return _circle(points[0], math.dist(points[0], points[1]))
    return _rectangle(points) if kind == "rectangle" else points


def _mask(shape: dict[str, Any], corners: Points, size: tuple[int, int] | None) -> _Mask:
    """From an image in base64, and the first and the last pixel of where it lies."""
    if size is None:
        raise SourceError("mask needs imageHeight and imageWidth")
    (left, top), (right, bottom) = ((int(x), int(y)) for x, y in corners[:2])
    if not (0 <= left <= right < size[1] and 0 <= top <= bottom < size[0]):
        raise SourceError(f"mask does not lie in the image: {corners[:2]} in {size[1]} x {size[0]}")
    data = _base64(shape.get("mask"), "mask")
    if not data:
        raise SourceError("mask has no image")
    bitmap = decode_ids(data, "mask") != 0
    if bitmap.shape != (bottom - top + 1, right - left + 1):
        raise SourceError(f"mask has {bitmap.shape[1]} x {bitmap.shape[0]} pixels, not as its corners {corners[:2]}")
    return _Mask(bitmap, (left, top))


def _rectangle(corners: Points) -> Points:
    """From two opposite corners, or from all four, in any order."""
    (left, right), (top, bottom) = ((min(each), max(each)) for each in zip(*corners, strict=True))
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def _circle(centre: tuple[float, float], radius: float) -> Points:
    if radius <= CIRCLE_ERROR:
        raise SourceError(f"circle has no extent: radius {radius:g}")
    count = max(12, math.ceil(math.pi / math.acos(1 - CIRCLE_ERROR / radius)))
    angles = (2 * math.pi * i / count for i in range(count))
    return [(centre[0] + radius * math.cos(each), centre[1] + radius * math.sin(each)) for each in angles]


def _labels_and_photos(images: Store, names: Sequence[str], config: BuildConfig) -> tuple[set[str], dict[str, str]]:
    """Labels of all shapes of some JSON files, and the image that each of these says it is of; a file that cannot be
    used is told when its image's turn comes."""

    def read(name: str) -> dict[str, Any]:
        if not config.follow_links and links_outside(images, name):
            return {}
        try:
            return parse_object(images.read_bytes(name, config.max_pixels * BYTES_OF_PIXEL))
        except (FileNotFoundError, FileRefusedError, UnfitFileError, SourceError):
            return {}

    labels, photos = set[str](), dict[str, str]()
    for name, content in zip(names, prefetched(read, names, threads=READ_THREADS, ahead=READ_AHEAD), strict=True):
        shapes, photos[name] = content.get("shapes"), _photo_of(name, content.get("imagePath"))
        found = [shape.get("label") for shape in shapes if isinstance(shape, dict)] if isinstance(shapes, list) else []
        # no class is called what is not Unicode
        labels.update(label for label in found if isinstance(label, str) and label == printable(label))
    return labels, photos


def _photo_of(note: str, path: Any) -> str:
    """The name that an imagePath gives, which is relative to its JSON; the JSON's own where it is no path."""
    if not isinstance(path, str):
        return note
    return posixpath.normpath(posixpath.join(posixpath.dirname(note), path.replace("\\", "/")))


def _of_others(jsons: dict[str, str], said: dict[str, str]) -> dict[str, str]:
    """The images whose JSON, by its name, is of another, and that other image: the one that the JSON says, where there
    is such an image, or else the first of those that are called like it. Where one is called so and another is said to
    be meant, files were renamed or copied, and neither is sure."""
    first = {note: name for name, note in reversed(jsons.items())} | said
    return {name: first[note] for name, note in jsons.items() if first[note] != name}


def _stem(name: str) -> str:
    """Folder and name without suffix."""
    return str(PurePosixPath(name).with_suffix(""))
