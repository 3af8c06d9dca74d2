"""Cityscapes' fine annotations, from polygons or from images of instance ids, in the folders of the download.

Both give the same masks: polygons are painted in their order, as the creators of the data set painted their ids, so
that of an object stays what the later ones leave visible.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mrcnn.cityscapes import CLASSES
from mrcnn.structures import Category
from pipelines.config import BuildConfig
from pipelines.records import ImageRecord, Objects, SourceData, SourceError
from pipelines.sources.annotation_files import Ids, check_size, decode_ids, object_of_mask, parse_object, points_of
from pipelines.sources.image_files import named_images
from pipelines.sources.names import unfollowed_folders
from pipelines.storage import Store, open_store

CATEGORIES = tuple(Category(id=id_, name=name) for id_, name in CLASSES.items())
IDS = {name: id_ for id_, name in CLASSES.items()}
LABELS = {id_: label for label, id_ in enumerate(CLASSES, start=1)}
IMAGE, POLYGONS, INSTANCE_IDS = "_leftImg8bit.png", "_gtFine_polygons.json", "_gtFine_instanceIds.png"
GROUP = "group"
FIRST_NUMBER = 1000  # ids of objects are label id * 1000 + number; below, they are of groups and of other classes
UNPAINTED = ("license plate",)  # has no id


def read_cityscapes(config: BuildConfig) -> SourceData:
    """Records of leftImg8bit/SPLIT/CITY/*_leftImg8bit.png below `config.images`, each with its polygons or, where there
    are none, its instanceIds from gtFine/SPLIT/CITY. Labels are in the order of Cityscapes' ids.

    Raises FileNotFoundError where there are no such images.
    """
    images, split = open_store(config.images).check_folder(), config.split or "train"
    photos, fine = f"leftImg8bit/{split}", f"gtFine/{split}"
    links = config.follow_links
    versions = _versions(images, photos, (IMAGE,), follow_links=links)
    versions |= _versions(images, fine, (INSTANCE_IDS, POLYGONS), follow_links=links)
    names = sorted(name for name in versions if name.startswith(f"{photos}/"))
    if not names:
        raise FileNotFoundError(
            f"{images.uri} holds no {photos}/CITY/*{IMAGE}: "
            "give the folder with leftImg8bit and gtFine in it, or another --split"
        )

    def annotation_files(name: str) -> tuple[str, ...]:
        stem = f"{fine}/{name[len(photos) + 1 : -len(IMAGE)]}"
        masks_only = f"{stem}{INSTANCE_IDS}" in versions and f"{stem}{POLYGONS}" not in versions
        return (f"{stem}{INSTANCE_IDS if masks_only else POLYGONS}",)

    return named_images(
        images,
        names,
        categories=CATEGORIES,
        annotation_files=annotation_files,
        rejects=unfollowed_folders(images.join(photos), follow_links=links),
        versions=versions,
    )


def _versions(images: Store, folder: str, endings: tuple[str, ...], *, follow_links: bool) -> dict[str, str]:
    found = images.join(folder).versions(tuple(ending.lower() for ending in endings), follow_links=follow_links)
    return {f"{folder}/{name}": version for name, version in found}


def cityscapes_objects(record: ImageRecord, files: Sequence[bytes], categories: Sequence[Category]) -> Objects:
    """Objects of the eight classes. Polygons labelled as a group of one ("cargroup") are one crowd a class."""
    rejected: list[tuple[int | None, str]] = []
    if record.annotation_files[0].endswith(POLYGONS):
        ids, painted = _paint(parse_object(files[0]), rejected)
    else:
        ids, painted = decode_ids(files[0]), []
    values = np.unique(ids).tolist()
    rejected += [(id_, "object is hidden by others, or lies outside the image") for id_ in painted if id_ not in values]
    usable = [
        object_of_mask(ids == value, categories[label - 1], id_=value, label=label, crowd=value < FIRST_NUMBER)
        for value in values
        if (label := LABELS.get(value // FIRST_NUMBER if value >= FIRST_NUMBER else value)) is not None
    ]
    return Objects(usable, rejected, *ids.shape)


def _paint(content: dict[str, Any], rejected: list[tuple[int | None, str]]) -> tuple[Ids, list[int]]:
    """The image of ids that the polygons of a file make, and the ids of the objects in it; what is no polygon is
    appended to `rejected`. Raises SourceError."""
    height, width = check_size(content.get("imgHeight"), content.get("imgWidth"))
    listed = content.get("objects")
    if not isinstance(listed, list):
        raise SourceError("annotation file has no list 'objects'")
    image = Image.new("I", (width, height), 0)
    draw, numbers, painted = ImageDraw.Draw(image), Counter[int](), list[int]()
    for each in listed:
        each = each if isinstance(each, dict) else {}
        name = each.get("label")
        if not isinstance(name, str):
            rejected.append((None, "object has no label"))
            continue
        if name in UNPAINTED or each.get("deleted"):
            continue
        id_ = _id(name, numbers)
        try:
            polygon = points_of(each.get("polygon"))
        except SourceError:
            polygon = []
        if len(polygon) >= 3:
            draw.polygon(polygon, fill=id_)
            painted += [id_] * (id_ > 0 and id_ not in painted)
        elif id_:
            rejected.append((id_, "polygon is not a list of three or more points"))
    return np.asarray(image).astype(np.int32), painted


def _id(name: str, numbers: Counter[int]) -> int:
    """The value of an object's pixels; 0 for what has no instances, which only hides what it covers."""
    if name in IDS:
        id_ = IDS[name]
        numbers[id_] += 1
        return id_ * FIRST_NUMBER + numbers[id_] - 1
    return IDS.get(name.removesuffix(GROUP), 0) if name.endswith(GROUP) else 0
