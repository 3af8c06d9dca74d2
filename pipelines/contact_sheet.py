"""One picture of some images of a data set, with their masks, boxes and keypoints drawn."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from mrcnn.visualize import draw_instances
from pipelines.dataset import Row, ShardDataset
from pipelines.pixels import Pixels
from pipelines.scaling import Scaling, scale_instance
from pipelines.storage import open_store
from pipelines.transforms import encode
from pipelines.verify_rows import instance_faults

FILE_NAME = "contact_sheet.png"
COLUMNS = 3
MOST_IMAGES = 100
SIDE = 800  # pixels of a cell: as large as mrcnn.visualize makes an image, so that labels stay legible
CAPTION = 28
MARGIN = 8


def write_contact_sheet(data: str, out: str, images: int) -> str:
    """Draw images that are evenly spread over a data set, and write them as one PNG into the folder `out`: its URI.

    Raises ValueError for a number of images that `check_images` refuses, or where the data set is damaged.
    """
    check_images(images)
    dataset, store = ShardDataset(data), open_store(out)
    numbers = np.unique(np.linspace(0, len(dataset) - 1, min(images, len(dataset)), dtype=np.int64)).tolist()
    cells = [draw_cell(_sound_row(dataset, number), dataset) for number in numbers]
    store.write_bytes(FILE_NAME, bytes(encode(_arrange(cells), "png")))
    return store.uri_of(FILE_NAME)


def _sound_row(dataset: ShardDataset, number: int) -> Row:
    """A row that can be drawn: a damaged coordinate may be so large that OpenCV takes all memory."""
    row = dataset.read(number)
    faults = (fault for each in row.instances for fault in instance_faults(each, row.size, dataset.categories))
    if fault := next(faults, None):
        raise ValueError(f"{dataset.uri} is damaged (row {number}: {fault}): run `mrcnn verify-data {dataset.uri}`")
    return row


def check_images(images: int) -> None:
    """Raises ValueError where there can be no picture of so many images: all of it is in memory."""
    if not 1 <= images <= MOST_IMAGES:
        raise ValueError(f"--images is {images}, but must be 1 to {MOST_IMAGES}")


def draw_cell(row: Row, dataset: ShardDataset) -> Pixels:
    """An image with its objects, at most `SIDE` pixels on a side, and a line that says which it is."""
    height, width = row.size
    scale = min(1.0, SIDE / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    image = cv2.resize(np.asarray(row.image), size[::-1], interpolation=cv2.INTER_AREA) if scale < 1 else row.image
    instances = [scale_instance(each, Scaling((height, width), size)) for each in row.instances]
    drawn = draw_instances(image, instances, dataset.categories)
    return np.concatenate([drawn, _caption(row, drawn.shape[1])])


def _caption(row: Row, width: int) -> Pixels:
    name = row.uri.rsplit("/", 1)[-1]
    place = f" at {row.tile['x']}, {row.tile['y']}" if row.tile else ""
    text = f"{name}: {row.source_size[1]} x {row.source_size[0]}{place}, {len(row.instances)} objects"
    line = np.full((CAPTION, width, 3), 255, np.uint8)
    shown = text.encode("ascii", "replace").decode()  # OpenCV's fonts have no more
    cv2.putText(line, shown, (4, CAPTION - 9), cv2.FONT_HERSHEY_SIMPLEX, 0.55, (0, 0, 0), 1, cv2.LINE_AA)
    return line


def _arrange(cells: list[Pixels]) -> Pixels:
    """Rows of cells, each as tall as the tallest in it."""
    lines = [cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)]
    width = SIDE if len(cells) == 1 else min(COLUMNS, len(cells)) * (SIDE + MARGIN) - MARGIN
    return np.concatenate([_line(line, width) for line in lines])


def _line(cells: list[Pixels], width: int) -> Pixels:
    line: Any = np.full((max(cell.shape[0] for cell in cells) + MARGIN, width, 3), 255, np.uint8)
    for i, cell in enumerate(cells):
        left = i * (SIDE + MARGIN)
        line[: cell.shape[0], left : left + cell.shape[1]] = cell
    return line
