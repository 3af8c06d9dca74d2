"""COCO instances, person keypoints or image_info (unlabeled, test): one JSON file -> image records.

The file is read as a stream. Of its annotations the driver keeps only the text, by image; the tasks parse it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mrcnn.structures import Category
from pipelines.config import BuildConfig
from pipelines.records import ImageRecord, Images, Objects, Reject, RejectedAnnotation, SourceData, printable
from pipelines.sources.json_stream import Element, JsonObject, file_blocks
from pipelines.sources.names import name_fault, plain_name, shown_uri
from pipelines.storage import open_store, split_uri

INT64, INT32 = 2**63, 2**31
MAX_CATEGORIES = 2**15 - 1  # labels are int16
KEPT = ("bbox", "area", "iscrowd", "segmentation", "keypoints")


def read_coco(config: BuildConfig) -> SourceData:
    """Records of the images in `config.annotations`, whose file names are relative to `config.images`.

    Labels are 1..K by rising category id. An image that cannot be used is a reject, and so is an annotation of no such
    image. A file without annotations (image_info) may lack categories, too. An id may be written as 1.0, not as "1".
    LVIS's images are those of COCO by the folders train2017 and val2017 below `config.images`.
    The images are not listed, and are taken as unchanging: only the JSON tells one data set from another.

    Raises ValueError, naming the file and what is wrong with it, where it is not COCO at all or too large for memory.
    """
    assert config.annotations is not None
    images = open_store(config.images).check_folder()
    content, sha256 = _parse(config.annotations)
    records = content.records()
    return SourceData(
        images_at=images,
        categories=_categories(content.categories, config.annotations),
        records=records,
        rejects=[Reject(shown_uri(images, each.name), each.image_id, "source", each.reason) for each in content.lost],
        images=content.listed,
        sha256=sha256,
        rejected_annotations=list(content.rejected_annotations(images)),
        annotations=content.annotations,
    )


def coco_objects(record: ImageRecord, files: Sequence[bytes], categories: Sequence[Category]) -> Objects:
    """The annotations in a record. One has as many keypoints as its category names, or none; where the category names
    none, keypoints are kept, but no model is trained on them."""
    assert not files
    objects = Objects(height=record.height, width=record.width)
    labels = {category.id: label for label, category in enumerate(categories, start=1)}
    for each in json.loads(record.annotations or "[]"):
        id_, category_id = whole(each.get("id"), INT64), whole(each.get("category_id"), INT32)
        if "segments_info" in each:
            objects.rejected.append((id_, "annotation is COCO's panoptic: give its instances file"))
        elif id_ is None:
            objects.rejected.append((None, f"annotation id is not a whole number: {each.get('id')!r}"))
        elif category_id not in labels:
            objects.rejected.append((id_, f"unknown category: {each.get('category_id')!r}"))
        elif fault := _keypoint_fault(each.get("keypoints"), len(categories[labels[category_id] - 1].keypoints)):
            objects.rejected.append((id_, fault))
        else:
            kept = {key: each[key] for key in KEPT if key in each}
            objects.usable.append({"id": id_, "category_id": category_id, "label": labels[category_id], **kept})
    return objects


def whole(value: Any, bound: int) -> int | None:
    """A whole number from -bound to bound, also where it is written as 1.0 (as pandas does); None for all else."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    good = isinstance(value, int) and not isinstance(value, bool) and -bound <= value < bound
    return value if good else None


@dataclass(frozen=True)
class _Lost:
    """An image of the file that cannot be used."""

    image_id: int | None
    name: str
    reason: str


@dataclass
class _Content:
    """What was in the lists of a file, as far as the driver looks."""

    images: dict[int, tuple[str, int | None, int | None]] = field(default_factory=dict)
    """File name, height and width by id"""
    lost: list[_Lost] = field(default_factory=list)
    categories: list[Any] = field(default_factory=list)
    listed: int = 0
    """Images, good or not"""
    annotations: int = 0
    texts: dict[int, list[str]] = field(default_factory=dict)
    """Annotations by the image id in them, which may be of no image"""
    rejected: list[tuple[int | None, int | None, str]] = field(default_factory=list)
    """Image id, annotation id and reason"""
    seen: set[int] = field(default_factory=set)
    """Annotation ids"""

    def add(self, element: Element) -> None:
        value = element.value if isinstance(element.value, dict) else {}
        if element.key == "images":
            self._add_image(value)
        elif element.key == "annotations":
            self._add_annotation(value, element.text)
        elif element.key == "categories":
            self.categories.append(element.value)

    def _add_image(self, image: dict[str, Any]) -> None:
        self.listed += 1
        id_, name = whole(image.get("id"), INT64), _file_name(image)
        height, width = (whole(image.get(side), INT32) for side in ("height", "width"))
        reason = _image_fault(image) or ("duplicate image id" if id_ in self.images else None)
        if reason is None:
            assert id_ is not None
            assert isinstance(name, str)
            self.images[id_] = (name, height, width)
        else:
            self.lost.append(_Lost(id_, name if isinstance(name, str) else "", reason))

    def _add_annotation(self, annotation: dict[str, Any], text: str) -> None:
        self.annotations += 1
        image_id, id_ = (whole(annotation.get(key), INT64) for key in ("image_id", "id"))
        if id_ is not None and id_ in self.seen:
            self.rejected.append((image_id, id_, "duplicate annotation id"))
        elif image_id is None:
            self.rejected.append((None, id_, f"no such image: image_id {annotation.get('image_id')!r}"))
        else:
            self.texts.setdefault(image_id, []).append(text)
        if id_ is not None:
            self.seen.add(id_)

    def records(self) -> list[ImageRecord]:
        """Records of the good images; `texts` keeps only what belongs to none of them."""
        return [
            ImageRecord(id_, *image, annotations=f"[{','.join(texts)}]" if (texts := self.texts.pop(id_, None)) else "")
            for id_, image in self.images.items()
        ]

    def rejected_annotations(self, images: Images) -> Iterator[RejectedAnnotation]:
        """Duplicates and those of no image; after `records`."""
        for image_id, id_, reason in self.rejected:
            name = self.images[image_id][0] if image_id in self.images else ""
            yield RejectedAnnotation(shown_uri(images, name) if name else "", image_id, id_, "source", reason)
        lost = {each.image_id: each for each in self.lost}
        for image_id, texts in self.texts.items():
            uri, reason = "", f"no such image: image_id {image_id}"
            if image := lost.get(image_id):
                uri, reason = shown_uri(images, image.name), f"image rejected: {image.reason}"
            for text in texts:
                yield RejectedAnnotation(uri, image_id, whole(json.loads(text).get("id"), INT64), "source", reason)


def _parse(uri: str) -> tuple[_Content, str]:
    """The content of a file and its SHA-256."""
    digest, content = hashlib.sha256(), _Content()
    store, name = split_uri(uri)

    def blocks() -> Iterator[bytes]:
        for block in file_blocks(store, name):
            digest.update(block)
            yield block

    parser = JsonObject(blocks(), uri)
    for element in parser.elements():
        content.add(element)
    _check_shape(parser, content, uri)
    return content, digest.hexdigest()


def _check_shape(parser: JsonObject, content: _Content, name: str) -> None:
    kinds = parser.kinds
    if parser.kind != "object":
        raise ValueError(f"{name} is not COCO: a {parser.kind} where an object with 'images' should be")
    needed = {"images": content.images or content.lost, "categories": content.categories}
    for key in needed if "annotations" in kinds else ["images"]:
        if kinds.get(key) != "list":
            raise ValueError(f"{name} is not COCO: it has no list {key!r} (it has {', '.join(kinds) or 'nothing'})")
        if not needed[key]:
            raise ValueError(f"{name} has no {key}: give the instances or keypoints file of the data set")
    for key in ("annotations", "categories"):
        if kinds.get(key, "list") != "list":
            raise ValueError(f"{name} is not COCO: {key!r} is not a list")


def _categories(listed: list[Any], name: str) -> tuple[Category, ...]:
    found: dict[int, Category] = {}
    for each in listed:
        id_ = whole(each.get("id"), INT32) if isinstance(each, dict) else None
        if id_ is None or not isinstance(each.get("name"), str):
            raise ValueError(f"{name}: category {each!r} needs a whole-number 'id' and a 'name'")
        if id_ in found:
            raise ValueError(f"{name}: category id {id_} comes twice: ids must differ")
        found[id_] = Category(id=id_, name=printable(each["name"]), keypoints=_keypoint_names(each, name))
    if len(found) > MAX_CATEGORIES:
        raise ValueError(f"{name} has {len(found)} categories, shards have room for {MAX_CATEGORIES}")
    return tuple(found[id_] for id_ in sorted(found))


def _keypoint_names(category: dict[str, Any], file_name: str) -> tuple[str, ...]:
    names = category.get("keypoints") or []
    if not isinstance(names, list) or not all(isinstance(each, str) for each in names) or len(set(names)) != len(names):
        raise ValueError(f"{file_name}: keypoints of category {category['name']!r} are no list of differing names")
    return tuple(map(printable, names))


def _image_fault(image: dict[str, Any]) -> str | None:
    if whole(image.get("id"), INT64) is None:
        return f"image id is not a whole number: {image.get('id')!r}"
    name = _file_name(image)
    if not isinstance(name, str):
        return "image has no file_name"
    for side in ("height", "width"):
        if image.get(side) is not None and (whole(image[side], INT32) or 0) <= 0:
            return f"image {side} is not a positive whole number: {image[side]!r}"
    return name_fault(name)


def _file_name(image: dict[str, Any]) -> Any:
    """An image's file_name; where LVIS has none, folder and name at the end of its address in COCO."""
    name, address = image.get("file_name"), image.get("coco_url")
    if name is None and isinstance(address, str):
        name = "/".join(address.partition("?")[0].split("/")[-2:])
    return plain_name(name) if isinstance(name, str) else name


def _keypoint_fault(keypoints: Any, expected: int) -> str | None:
    """What is in the list is looked at later, when instances are made."""
    if not expected or not keypoints or not isinstance(keypoints, list) or len(keypoints) == 3 * expected:
        return None
    return f"keypoints are not those of the category: {len(keypoints)} numbers for {expected} keypoints"
