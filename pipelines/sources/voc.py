"""Pascal VOC's segmentation (2007 to 2012), in the folders of the download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mrcnn.structures import Category
from pipelines.config import BuildConfig
from pipelines.records import ImageRecord, Objects, Reject, SourceData, SourceError
from pipelines.sources.annotation_files import decode_ids, object_of_mask
from pipelines.sources.image_files import named_images
from pipelines.sources.names import name_fault, shown_uri
from pipelines.storage import open_store

CLASSES = (
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
)  # fmt: skip
CATEGORIES = tuple(Category(id=id_, name=name) for id_, name in enumerate(CLASSES, start=1))
BACKGROUND, VOID = 0, 255


def read_voc(config: BuildConfig) -> SourceData:
    """Records of the images that ImageSets/Segmentation/SPLIT.txt names, below `config.images`. Category ids are the
    classes' numbers in the masks, 1 to 20. Raises FileNotFoundError where there is no such list or nothing in it."""
    images, split = open_store(config.images).check_folder(), config.split or "train"
    listed = f"ImageSets/Segmentation/{split}.txt"
    try:
        text = images.read_bytes(listed).decode("utf-8-sig", errors="replace")
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{images.uri} has no {listed}: give the folder of one year, such as VOC2012, or another --split"
        ) from None
    stems: dict[str, None] = {}  # in order
    rejects: list[Reject] = []
    for stem in filter(None, map(str.strip, text.splitlines())):
        fault = "listed twice" if stem in stems else name_fault(stem)
        if fault is None:
            stems[stem] = None
        else:
            rejects.append(Reject(shown_uri(images, f"JPEGImages/{stem}.jpg"), None, "source", fault))
    if not stems:
        raise FileNotFoundError(f"{images.uri_of(listed)} names no images: give another --split")

    def annotation_files(name: str) -> tuple[str, ...]:
        png = f"{name.removeprefix('JPEGImages/').removesuffix('.jpg')}.png"
        return f"SegmentationObject/{png}", f"SegmentationClass/{png}"

    names = [f"JPEGImages/{stem}.jpg" for stem in stems]
    versions = {
        f"{folder}/{name}": version
        for folder in ("JPEGImages", "SegmentationObject", "SegmentationClass")
        for name, version in images.join(folder).versions()
    }
    return named_images(
        images, names, categories=CATEGORIES, annotation_files=annotation_files, rejects=rejects, versions=versions
    )


def voc_objects(record: ImageRecord, files: Sequence[bytes], categories: Sequence[Category]) -> Objects:
    """Each number in the image of objects, with the class that most of its pixels have in the image of classes. Void,
    the rim that nobody could assign, belongs to no object."""
    objects, classes = (decode_ids(each) for each in files)
    if objects.shape != classes.shape:
        raise SourceError(f"masks of objects and of classes differ in size: {objects.shape}, {classes.shape}")
    found = Objects(height=objects.shape[0], width=objects.shape[1])
    for value in np.unique(objects).tolist():
        if value in (BACKGROUND, VOID):
            continue
        mask = objects == value
        inside = classes[mask]
        numbers, pixels = np.unique(inside[(inside != BACKGROUND) & (inside != VOID)], return_counts=True)
        label = int(numbers[pixels.argmax()]) if numbers.size else BACKGROUND
        if 1 <= label <= len(categories):
            found.usable.append(object_of_mask(mask, categories[label - 1], id_=value, label=label, crowd=False))
        else:
            found.rejected.append((value, f"unknown category: {label}" if label else "object has no class"))
    return found
