"""Where images and their annotations come from.

A source is one module with two functions. `read(config)` runs once, in the driver: it lists files or streams one file
of annotations, and returns a record for each image, with the names of the annotation files that belong to it alone.
`objects(record, files, categories)` runs in the image's task: it makes COCO annotations of these files' bytes (or of
the record's own text), and raises `SourceError` where they cannot be read.

To add one, write its module, a line in SOURCES, and its name in `pipelines.config.Format`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mrcnn.structures import Category
from pipelines.config import BuildConfig, Format
from pipelines.records import ImageRecord, Objects, SourceData
from pipelines.sources.cityscapes import cityscapes_objects, read_cityscapes
from pipelines.sources.coco import coco_objects, read_coco
from pipelines.sources.image_files import no_objects, read_image_files
from pipelines.sources.labelme import labelme_objects, read_labelme
from pipelines.sources.voc import read_voc, voc_objects


@dataclass(frozen=True)
class Source:
    """The two functions of a format."""

    read: Callable[[BuildConfig], SourceData]
    objects: Callable[[ImageRecord, Sequence[bytes], Sequence[Category]], Objects]


SOURCES: dict[Format, Source] = {
    "coco": Source(read_coco, coco_objects),
    "cityscapes": Source(read_cityscapes, cityscapes_objects),
    "voc": Source(read_voc, voc_objects),
    "labelme": Source(read_labelme, labelme_objects),
    "images": Source(read_image_files, no_objects),
}
