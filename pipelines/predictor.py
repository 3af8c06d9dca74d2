"""A model with the options of a prediction: decoded images in, detections as rows out.

What needs no model can be done in other threads (`prepare`, `rows`); `detect` is for one thread. An image's detections
depend on the image alone, and with a batch size above 1 on the images of the same size that are next to it in its
chunk: never on what else runs, or was run before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from mrcnn.evaluation import coco_results
from mrcnn.model import MaskRCNN
from mrcnn.preprocess import batch_images, resize_image, resized_size
from mrcnn.structures import Category, Detections
from mrcnn.tta import TTAConfig, predict_with_tta
from mrcnn.weights import model_from_files
from pipelines.inputs import Picture
from pipelines.pixels import Pixels
from pipelines.predict_options import PredictOptions
from pipelines.prefetch import prefetched
from pipelines.rle import Window
from pipelines.tile_merging import Piece, merge_pieces, touches_inner_edge
from pipelines.tiling import Tiling, windows

TTA_SCALES = (0.75, 1.0, 1.25)  # of the model's own shorter side: 600, 800, 1000
TILE_THREADS = 1

Entry = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True)
class View:
    """What `detect` looks at: an image, ready for it, whose detections are wanted in another size."""

    pixels: NDArray[Any]
    """(H, W, 3): as the network sees it; with --tta or --tile as it was decoded"""
    source_size: tuple[int, int]

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the pixels."""
        return self.pixels.shape[0], self.pixels.shape[1]


@dataclass(frozen=True)
class Seen:
    """What was found in a part of an image; the window is None for the whole."""

    window: Window | None
    found: Detections


def wanted_labels(categories: Sequence[Category], classes: Sequence[str]) -> list[int]:
    """Labels of the classes that are given by name or id; all where none are. Raises ValueError for an unknown one."""
    if not classes:
        return list(range(1, len(categories) + 1))
    labels = {name: label for label, each in enumerate(categories, start=1) for name in (str(each.id), each.name)}
    names = {each.name: label for label, each in enumerate(categories, start=1)}
    unknown = [name for name in classes if name not in labels]
    if unknown:
        known = ", ".join(f"{each.id} {each.name}" for each in categories)
        raise ValueError(f"--classes {' '.join(unknown)}: the model has no such category; it has {known}")
    return sorted({(labels | names)[name] for name in classes})


def load_predictor(files: Mapping[str, bytes], source: str, options: PredictOptions) -> Predictor:
    """The model with the options, on the CPU. Raises ValueError where they do not fit each other, naming `source`."""
    model = model_from_files(files, source)
    if options.keypoints == "yes" and model.roi_heads.keypoint_head is None:
        raise ValueError(f"--keypoints yes: the model {source} finds none: leave it out, or take one with keypoints")
    return Predictor(model, options)


class Predictor:
    """Finds objects in images. The model is changed for the options: it is this predictor's alone."""

    def __init__(self, model: MaskRCNN, options: PredictOptions) -> None:
        roi = model.config.roi
        if options.score_threshold is not None:
            roi = replace(roi, score_threshold=options.score_threshold)
        if options.max_detections is not None:
            roi = replace(roi, max_detections=options.max_detections)
        keypoint = model.config.keypoint
        if options.keypoints == "no":
            model.roi_heads.keypoint_head, keypoint = None, replace(keypoint, num_keypoints=0)
        model.config = model.roi_heads.config = replace(model.config, roi=roi, keypoint=keypoint)
        self.labels = wanted_labels(model.categories, options.classes)
        if len(self.labels) < len(model.categories):
            model.roi_heads.find_only(self.labels)
        self.model, self.options = model, options
        side, overlap = options.tiles
        self.tiling = Tiling(side, overlap)
        self.tta: TTAConfig | None = None
        if options.tta:
            self.tta = TTAConfig(scales=tuple(round(s * model.config.input.shorter_side) for s in TTA_SCALES))

    @property
    def plan(self) -> dict[str, Any]:
        """The options, those of the model in the place of defaults: all that results depend on beside model and
        images."""
        roi, categories = self.model.config.roi, self.model.categories
        return {
            "score_threshold": roi.score_threshold,
            "max_detections": roi.max_detections,
            "classes": [categories[label - 1].id for label in self.labels],
            "keypoints": self.model.roi_heads.keypoint_head is not None,
            "tta": list(self.tta.scales) if self.tta else [],
            "tile": [self.tiling.side, self.tiling.overlap] if self.tiling.side else [],
            "batch_size": self.options.batch_size,
            "max_pixels": self.options.max_pixels,
        }

    @property
    def at_once(self) -> int:
        """Images that `detect_all` is to be given at a time, so that there are batches among them."""
        batches = 1 if self.options.batch_size == 1 or self.tta or self.tiling.side else 4
        return batches * self.options.batch_size if batches > 1 else 1

    def prepare(self, picture: Picture) -> View:
        """The image as `detect_all` takes it."""
        whole = View(picture.pixels, picture.source_size)
        return whole if self.tta or self.tiling.side else self._resized(whole)

    def _resized(self, view: View) -> View:
        bounds = self.model.config.input
        height, width = resized_size(
            *view.size, shorter_side=bounds.shorter_side, longer_side=bounds.longer_side, resize=bounds.resize
        )
        return replace(view, pixels=resize_image(view.pixels, height, width, bounds.resize))

    def detect_all(self, views: Sequence[View]) -> list[list[Seen]]:
        """What is found in each of some images, in host memory."""
        if self.tiling.side:
            return [self._detect_tiles(view) for view in views]
        return [[Seen(None, found)] for found in self._detect(views)]

    def _detect(self, views: Sequence[View]) -> list[Detections]:
        """One batch after the other, each of images of one padded size, in their order."""
        found: dict[int, Detections] = {}
        for batch in self._batches(views):
            some = [views[i] for i in batch]
            found |= zip(batch, map(in_host_memory, self._look(some)), strict=True)
        return [found[i] for i in range(len(views))]

    def _batches(self, views: Sequence[View]) -> Iterator[list[int]]:
        divisor, size = self.model.config.input.size_divisor, self.options.batch_size
        alike: dict[tuple[int, int], list[int]] = {}
        for i, view in enumerate(views):
            height, width = view.size
            alike.setdefault((-(-height // divisor), -(-width // divisor)), []).append(i)
        for members in alike.values():
            yield from (members[start : start + size] for start in range(0, len(members), size))

    def _look(self, views: Sequence[View]) -> list[Detections]:
        sizes = [view.source_size for view in views]
        if self.tta:
            images = [view.pixels for view in views]
            return predict_with_tta(self.model, images, self.tta, source_sizes=sizes)
        batch = batch_images([view.pixels for view in views], size_divisor=self.model.config.input.size_divisor)
        return self.model.detect(batch.to(next(self.model.parameters()).device, non_blocking=True), sizes)

    def _detect_tiles(self, view: View) -> list[Seen]:
        """All tiles are of one size; the next ones are resized while the model looks at one batch."""
        found: list[Seen] = []
        cut = windows(view.size, self.tiling)
        ahead = 2 * self.options.batch_size
        tiles = prefetched(partial(self._tile, view.pixels), cut, threads=TILE_THREADS, ahead=ahead)
        for some in some_of(zip(cut, tiles, strict=True), self.options.batch_size):
            seen = self._detect([tile for _, tile in some])
            found += [Seen(window, each) for (window, _), each in zip(some, seen, strict=True)]
        return found

    def _tile(self, pixels: Pixels, window: Window) -> View:
        shown = pixels[window.y : window.y + window.height, window.x : window.x + window.width]
        tile = View(np.ascontiguousarray(shown), (window.height, window.width))
        return tile if self.tta else self._resized(tile)

    def rows(self, image_id: int, size: tuple[int, int], seen: Sequence[Seen]) -> list[Entry]:
        """Detections as in the output, best first, of an image of this source size: masks as run lengths, tiles
        merged."""
        if len(seen) == 1 and seen[0].window in (None, Window(0, 0, *size)):
            return detection_rows(image_id, seen[0].found, self.model.categories)
        pieces: list[Piece] = []
        for each in seen:
            assert each.window is not None
            moved = _moved(each.found, each.window, size)
            pieces += [
                Piece(row, each.window, touches_inner_edge(row["box"], each.window, size))
                for row in detection_rows(image_id, moved, self.model.categories)
            ]
        return merge_pieces(pieces, size, nms_iou=self.model.config.roi.nms_iou)


def detection_rows(image_id: int, found: Detections, categories: Sequence[Category]) -> list[Entry]:
    """Detections of one image as in the schema."""
    return [
        {
            "label": label,
            "category_id": entry["category_id"],
            "score": entry["score"],
            "box": entry["bbox"],
            "rle": entry.get("segmentation"),
            "keypoints": entry.get("keypoints"),
        }
        for label, entry in zip(found.labels.tolist(), coco_results(image_id, found, categories), strict=True)
    ]


def in_host_memory(found: Detections) -> Detections:
    """The same for other threads, which then need no GPU."""
    names = ("boxes", "labels", "scores", "mask_probs", "keypoints")
    tensors = {name: getattr(found, name) for name in names}
    return replace(found, **{name: each.cpu() for name, each in tensors.items() if each is not None})


def _moved(found: Detections, window: Window, size: tuple[int, int]) -> Detections:
    """From pixels of a window to those of its image."""
    corner = torch.tensor([window.x, window.y], dtype=found.boxes.dtype)
    keypoints = found.keypoints
    if keypoints is not None:
        keypoints = torch.cat([keypoints[..., :2] + corner, keypoints[..., 2:]], dim=-1)
    return replace(found, boxes=found.boxes + corner.repeat(2), keypoints=keypoints, image_size=size)


def some_of(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Lists of up to `size` items."""
    some: list[T] = []
    for item in items:
        some.append(item)
        if len(some) == size:
            yield some
            some = []
    if some:
        yield some
