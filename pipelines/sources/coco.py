"""COCO instances and person keypoints: one JSON file -> image records."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, TypeGuard

from mrcnn.structures import Category
from pipelines.records import ImageRecord, Reject, RejectedAnnotation, SourceData
from pipelines.storage import Store, check_name, read_uri

INT64, INT32 = 2**63, 2**31
KEPT = ("id", "category_id", "bbox", "area", "iscrowd", "segmentation", "keypoints")


def read_coco(annotations: str, images: Store) -> SourceData:
    """Parse a COCO file (whole, in memory); `images` is the folder of the file names in it.

    Labels are 1..K by rising category id. An image or annotation that cannot be used is a reject. An annotation has as
    many keypoints as its category names, or none; where the category names none, keypoints are kept, but no model is
    trained on them. Raises ValueError, naming the file and what is wrong with it, where it is not COCO at all.
    """
    data = read_uri(annotations)
    try:
        content = json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{annotations} is not valid JSON ({error}): is it cut off, or another file?") from None
    _check_shape(content, annotations)
    categories = _categories(content["categories"], annotations)
    images_listed, annotations_listed = content["images"], content.get("annotations", [])
    records, rejects = _images(images_listed, images)
    labels = {category.id: label for label, category in enumerate(categories, start=1)}
    keypoints = {category.id: len(category.keypoints) for category in categories}
    lost = {each.image_id: each for each in rejects if each.image_id is not None}
    rejected = _attach(annotations_listed, _Index(images, records, lost, labels, keypoints))
    return SourceData(
        categories=categories,
        records=list(records.values()),
        rejects=rejects,
        rejected_annotations=rejected,
        images=len(images_listed),
        annotations=len(annotations_listed),
        sha256=hashlib.sha256(data).hexdigest(),
    )


def _check_shape(content: Any, name: str) -> None:
    if not isinstance(content, dict):
        raise ValueError(f"{name} is not COCO: a {type(content).__name__} where an object with 'images' should be")
    for key in ("images", "categories"):
        if not isinstance(content.get(key), list):
            raise ValueError(f"{name} is not COCO: it has no list {key!r} (it has {', '.join(content) or 'nothing'})")
        if not content[key]:
            raise ValueError(f"{name} has no {key}: give the instances or keypoints file of the data set")
    if not isinstance(content.get("annotations", []), list):
        raise ValueError(f"{name} is not COCO: 'annotations' is not a list")


def _categories(listed: list[Any], name: str) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for each in listed:
        good = isinstance(each, dict) and _is_int(each.get("id"), INT32) and isinstance(each.get("name"), str)
        if not good:
            raise ValueError(f"{name}: category {each!r} needs a whole-number 'id' and a 'name'")
        if each["id"] in found:
            raise ValueError(f"{name}: category id {each['id']} comes twice: ids must differ")
        found[each["id"]] = Category(id=each["id"], name=each["name"], keypoints=_keypoint_names(each, name))
    return tuple(found[id_] for id_ in sorted(found))


def _keypoint_names(category: dict[str, Any], file_name: str) -> tuple[str, ...]:
    names = category.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names) or len(set(names)) != len(names):
        raise ValueError(f"{file_name}: keypoints of category {category['name']!r} are no list of differing names")
    return tuple(names)


def _images(listed: list[Any], images: Store) -> tuple[dict[int, ImageRecord], list[Reject]]:
    records: dict[int, ImageRecord] = {}
    rejects: list[Reject] = []
    for each in listed:
        each = each if isinstance(each, dict) else {}
        reason = _image_fault(each, records)
        if reason is None:
            records[each["id"]] = ImageRecord(each["id"], each["file_name"], each.get("height"), each.get("width"))
            continue
        name = each.get("file_name")
        uri = f"{images.uri}/{name}" if isinstance(name, str) else images.uri
        rejects.append(Reject(uri, each["id"] if _is_int(each.get("id"), INT64) else None, "source", reason))
    return records, rejects


def _image_fault(image: dict[str, Any], seen: dict[int, ImageRecord]) -> str | None:
    if not _is_int(image.get("id"), INT64):
        return f"image id is not a whole number: {image.get('id')!r}"
    if image["id"] in seen:
        return "duplicate image id"
    if not isinstance(image.get("file_name"), str):
        return "image has no file_name"
    for side in ("height", "width"):
        if image.get(side) is not None and not (_is_int(image[side], INT32) and image[side] > 0):
            return f"image {side} is not a positive whole number: {image[side]!r}"
    try:
        check_name(image["file_name"])
    except ValueError:
        return "file name leads out of the image folder"
    return None


@dataclass(frozen=True)
class _Index:
    """What annotations refer to."""

    images: Store
    records: dict[int, ImageRecord]
    lost: dict[int, Reject]
    """Rejected images by id"""
    labels: dict[int, int]
    """By category id"""
    keypoints: dict[int, int]
    """Their number by category id"""

    def uri(self, image_id: int | None) -> str:
        record = None if image_id is None else self.records.get(image_id)
        return "" if record is None else self.images.uri_of(record.file_name)


def _attach(listed: list[Any], index: _Index) -> list[RejectedAnnotation]:
    """Append annotations to their images' records; returns those that cannot be."""
    rejected: list[RejectedAnnotation] = []
    seen: set[int] = set()
    for each in listed:
        each = each if isinstance(each, dict) else {}
        image_id, annotation_id = (each[key] if _is_int(each.get(key), INT64) else None for key in ("image_id", "id"))
        reason = "duplicate annotation id" if annotation_id in seen else _annotation_fault(each, index)
        if reason is None:
            kept = {key: each[key] for key in KEPT if key in each}
            label = index.labels[each["category_id"]]
            index.records[each["image_id"]].annotations.append({**kept, "label": label})
        else:
            uri = index.uri(image_id)
            rejected.append(RejectedAnnotation(uri, image_id, annotation_id, "source", reason))
        if annotation_id is not None:
            seen.add(annotation_id)
    return rejected


def _annotation_fault(annotation: dict[str, Any], index: _Index) -> str | None:
    image_id, category = annotation.get("image_id"), annotation.get("category_id")
    if not _is_int(image_id, INT64) or image_id not in index.records:
        lost = index.lost.get(image_id) if _is_int(image_id, INT64) else None
        return f"image rejected: {lost.reason}" if lost else f"no such image: image_id {image_id!r}"
    if not _is_int(annotation.get("id"), INT64):
        return f"annotation id is not a whole number: {annotation.get('id')!r}"
    if not _is_int(category, INT32) or category not in index.labels:
        return f"unknown category: {category!r}"
    return _keypoint_fault(annotation.get("keypoints"), index.keypoints[category])


def _keypoint_fault(keypoints: Any, expected: int) -> str | None:
    """What is in the list is looked at later, when instances are made."""
    if not expected or not keypoints or not isinstance(keypoints, list) or len(keypoints) == 3 * expected:
        return None
    return f"keypoints are not those of the category: {len(keypoints)} numbers for {expected} keypoints"


def _is_int(value: object, bound: int) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -bound <= value < bound
