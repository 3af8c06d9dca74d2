"""Shards -> batches for training and evaluation. Nothing of Ray in here.

The order of training images is a function of (seed, epoch) alone: the stream is the permutation of epoch 0,
then of epoch 1, and so on; step s takes the next `global_batch` of it, of which each rank has its contiguous
share. So it depends on neither threads nor, as a whole, on the number of ranks, and goes on from a count of
images.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mrcnn.config import InputConfig
from mrcnn.inputs import check_targets
from mrcnn.preprocess import batch_images, resize_image, resized_size
from mrcnn.rpn import Proposals
from mrcnn.structures import Category, ImageBatch, RunLengthMasks, Targets, mirrored_keypoints
from pipelines.manifest import Manifest
from pipelines.prefetch import prefetched
from pipelines.proposals import ProposalDataset, collate_proposals
from pipelines.rle import flip_ends, segmentation_ends
from pipelines.scaling import Scaling, scale_instance
from pipelines.shards import ShardedRows
from pipelines.storage import open_store
from pipelines.transforms import decode_stored

MIN_BOX_SIDE = 1e-3  # pixels; a box without extent has no regression target


@dataclass(frozen=True)
class Row:
    """One stored image with its annotations, in pixels of the stored image."""

    image_id: int
    uri: str
    image: NDArray[Any]
    """(H, W, 3) RGB, perhaps read-only: uint8, or float32 once it is resized as torchvision does it"""
    source_size: tuple[int, int]
    """Height and width of the original"""
    instances: list[dict[str, Any]]
    """As in pipelines/schema.py"""


class ShardDataset:
    """The rows of a folder of shards, by number. Opens files when they are first needed; cheap to pickle.

    Raises FileNotFoundError where there is no finished data set, ValueError where it is damaged or of another
    version.
    """

    def __init__(self, uri: str) -> None:
        self._store = open_store(uri)
        self.manifest = Manifest.read(self._store)

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store, "manifest": self.manifest}

    @property
    def uri(self) -> str:
        """Where the shards are."""
        return self._store.uri

    @property
    def categories(self) -> tuple[Category, ...]:
        """Label l is `categories[l - 1]`."""
        return self.manifest.categories

    @cached_property
    def _rows(self) -> ShardedRows:
        return ShardedRows(self._store, self.manifest.shards)

    def __len__(self) -> int:
        return len(self._rows)

    def numbers(self, shard: int) -> range:
        """Numbers of the rows of a shard."""
        return self._rows.numbers(shard)

    def read(self, index: int) -> Row:
        """Row by its number, decoded. Threads may call it at once."""
        row = self._rows.read(index)
        height, width = row["height"].as_py(), row["width"].as_py()
        return Row(
            image_id=row["image_id"].as_py(),
            uri=row["uri"].as_py(),
            image=decode_stored(
                memoryview(row["image"].as_buffer()).cast("B"),
                encoding=row["encoding"].as_py(),
                height=height,
                width=width,
            ),
            source_size=(row["source_height"].as_py(), row["source_width"].as_py()),
            instances=row["instances"].as_py(),
        )


@dataclass(frozen=True)
class Batch:
    """One rank's share of one training step."""

    images: ImageBatch
    targets: Targets
    image_ids: tuple[int, ...]
    proposals: Proposals | None = None
    """Where the detector trains on those of an RPN that was trained apart"""


def epoch_order(seed: int, epoch: int, n: int) -> NDArray[np.int64]:
    """Permutation of n rows for one epoch, from (seed, epoch) alone."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_unsigned(seed), epoch])))
    return generator.permutation(n)


def image_seed(seed: int, epoch: int, image_id: int, *, purpose: str = "targets") -> int:
    """63 random bits for one purpose on one image in one epoch; the same on every machine."""
    key = struct.pack("<QQQ", _unsigned(seed), epoch, _unsigned(image_id))
    digest = hashlib.blake2b(key, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def _unsigned(value: int) -> int:
    return value % 2**64


def batches(
    dataset: ShardDataset,
    *,
    seed: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    start_images: int = 0,
    flip: float = 0.5,
    threads: int = 2,
    prefetch: int = 4,
    network_input: InputConfig | None = None,
    proposals: ProposalDataset | None = None,
) -> Iterator[Batch]:
    """Endless batches of `rank`, read ahead by threads. Close the iterator to stop them.

    `start_images` is the number of images that all ranks together have consumed before: the stream goes on
    there. Every image comes once in each epoch; a step may span two epochs. Each image is mirrored with
    probability `flip`, and resized to what `network_input` asks for; without one it keeps the size it is stored in.
    Its `proposals`, if there are any, go with it.
    Raises ValueError where `world_size` does not divide `global_batch`, or the data set is empty.
    """
    if global_batch < 1 or global_batch % world_size:
        raise ValueError(f"global batch is {global_batch}, but must be a positive multiple of the {world_size} workers")
    if len(dataset) == 0:
        raise ValueError(f"{dataset.uri} holds no images: look at its rejects.parquet")
    assert 0 <= rank < world_size
    share = global_batch // world_size
    places = (range(start, start + share) for start in count(start_images + rank * share, global_batch))
    order = _Order(seed, len(dataset))
    load = partial(_load, dataset=dataset, order=order, flip=flip, network_input=network_input, proposals=proposals)
    return prefetched(load, places, threads=threads, ahead=prefetch)


class _Order:
    """Place in the stream of all epochs -> (epoch, row). Keeps the permutations of two epochs."""

    def __init__(self, seed: int, rows: int) -> None:
        self.seed, self.rows = seed, rows
        self._kept: dict[int, NDArray[np.int64]] = {}

    def __call__(self, place: int) -> tuple[int, int]:
        epoch, position = divmod(place, self.rows)
        order = self._kept.get(epoch)
        if order is None:  # two threads may both come here: they make the same
            order = epoch_order(self.seed, epoch, self.rows)
            self._kept = {kept: self._kept[kept] for kept in (epoch - 1,) if kept in self._kept} | {epoch: order}
        return epoch, int(order[position])


def _load(
    places: range,
    *,
    dataset: ShardDataset,
    order: _Order,
    flip: float,
    network_input: InputConfig | None,
    proposals: ProposalDataset | None,
) -> Batch:
    epochs, indices = zip(*(order(place) for place in places), strict=True)
    stored = [dataset.read(index) for index in indices]
    rows = [resize_row(row, network_input) for row in stored]
    keys = [(order.seed, epoch, row.image_id) for epoch, row in zip(epochs, rows, strict=True)]
    flips = [image_seed(*key, purpose="flip") < flip * 2**63 for key in keys]
    images, targets = collate(
        rows,
        seeds=[image_seed(*key) for key in keys],
        flips=flips,
        categories=dataset.categories,
        size_divisor=network_input.size_divisor if network_input else 32,
    )
    _check(targets, images, dataset, [row.uri for row in rows])
    found = None
    if proposals is not None:
        scalings = [Scaling(_size(before), _size(after)) for before, after in zip(stored, rows, strict=True)]
        found = collate_proposals([proposals.read(i) for i in indices], scalings, flips=flips, top_n=proposals.top_n)
    return Batch(images, targets, tuple(row.image_id for row in rows), found)


def _check(targets: Targets, images: ImageBatch, dataset: ShardDataset, uris: list[str]) -> None:
    """Refuse what no model can learn from, here, where it is on the CPU: on a GPU nobody looks at values."""
    categories = dataset.categories
    try:
        check_targets(targets, images, num_classes=len(categories), num_keypoints=_most_keypoints(categories))
    except ValueError as error:
        raise ValueError(f"{dataset.uri}, among {', '.join(uris)}: {error}") from error


def _size(row: Row) -> tuple[int, int]:
    return row.image.shape[0], row.image.shape[1]


def resize_row(row: Row, network_input: InputConfig | None) -> Row:
    """The row with its image and instances at the network's size; unchanged if it is stored in that size."""
    if network_input is None:
        return row
    height, width = _size(row)
    shorter, longer, resize = network_input.shorter_side, network_input.longer_side, network_input.resize
    size = resized_size(height, width, shorter_side=shorter, longer_side=longer, resize=resize)
    scaling = Scaling((height, width), size)
    instances = [scale_instance(instance, scaling) for instance in row.instances]
    return replace(row, image=resize_image(row.image, *size, resize), instances=instances)


def collate(
    rows: Sequence[Row],
    *,
    seeds: Sequence[int],
    flips: Sequence[bool],
    categories: Sequence[Category] = (),
    size_divisor: int = 32,
) -> tuple[ImageBatch, Targets]:
    """Stack rows, padded with zeros to a common multiple of `size_divisor`, mirrored where `flips` says so.

    Objects whose box is narrower than MIN_BOX_SIDE are left out; an object without a segmentation has a mask without
    runs. Where the categories name keypoints, all objects have as many as the category with most of them: those that
    its own category does not have are not annotated, as are all of a crowd and of an object without keypoints.
    """
    images = [row.image[:, ::-1] if flip else row.image for row, flip in zip(rows, flips, strict=True)]
    objects = [_objects(row, flip, categories) for row, flip in zip(rows, flips, strict=True)]
    most = max(len(each.labels) for each in objects)
    boxes = torch.zeros(len(rows), most, 4)
    labels = torch.zeros(len(rows), most, dtype=torch.int64)
    iscrowd = torch.zeros(len(rows), most, dtype=torch.bool)
    keypoints = torch.zeros(len(rows), most, _most_keypoints(categories), 3)
    for b, each in enumerate(objects):
        n = len(each.labels)
        boxes[b, :n] = torch.from_numpy(each.boxes)
        labels[b, :n] = torch.tensor(each.labels, dtype=torch.int64)
        iscrowd[b, :n] = torch.tensor(each.iscrowd, dtype=torch.bool)
        keypoints[b, :n] = torch.from_numpy(each.keypoints)
    targets = Targets(
        boxes=boxes,
        labels=labels,
        iscrowd=iscrowd,
        masks=_flatten_masks([each.masks for each in objects], most),
        seeds=torch.tensor(seeds, dtype=torch.int64),
        keypoints=keypoints if keypoints.shape[2] else None,
    )
    return batch_images(images, size_divisor=size_divisor), targets


@dataclass(frozen=True)
class _Objects:
    boxes: NDArray[np.float32]
    labels: list[int]
    iscrowd: list[bool]
    masks: list[NDArray[np.int64]]
    keypoints: NDArray[np.float32]


def _objects(row: Row, flip: bool, categories: Sequence[Category]) -> _Objects:
    height, width = row.image.shape[:2]
    kept = [each for each in row.instances if _has_extent(each["box"])]
    boxes = np.array([each["box"] for each in kept], np.float32).reshape(-1, 4)
    masks = [segmentation_ends(each["segmentation"], height, width) for each in kept]
    if flip:
        boxes = np.stack([width - boxes[:, 2], boxes[:, 1], width - boxes[:, 0], boxes[:, 3]], axis=1)
        masks = [flip_ends(each, height, width) if len(each) else each for each in masks]
    keypoints = np.zeros((len(kept), _most_keypoints(categories), 3), np.float32)
    if keypoints.size:
        for points, each in zip(keypoints, kept, strict=True):
            own = _keypoints(each, categories[each["label"] - 1], mirrored_in=width if flip else None)
            points[: len(own)] = own
    return _Objects(boxes, [each["label"] for each in kept], [each["iscrowd"] for each in kept], masks, keypoints)


def _most_keypoints(categories: Sequence[Category]) -> int:
    return max((len(category.keypoints) for category in categories), default=0)


def _keypoints(instance: dict[str, Any], category: Category, *, mirrored_in: int | None) -> NDArray[np.float32]:
    """(keypoints of the category, 3), with zeros where nothing is annotated; mirrored in an image of some width."""
    if instance["iscrowd"] or not instance["keypoints"] or not category.keypoints:
        return np.zeros((len(category.keypoints), 3), np.float32)
    points = np.array(instance["keypoints"], np.float32).reshape(-1, 3)
    annotated = points[:, 2:] > 0
    if mirrored_in is not None:
        points[:, 0] = mirrored_in - 1 - points[:, 0]  # they are pixel numbers: see pipelines/scaling.py
    points = np.where(annotated, points, np.float32(0))
    return points if mirrored_in is None else points[mirrored_keypoints(category.keypoints)]


def _has_extent(box: Sequence[float]) -> bool:
    return box[2] - box[0] >= MIN_BOX_SIDE and box[3] - box[1] >= MIN_BOX_SIDE


def _flatten_masks(masks: Sequence[Sequence[NDArray[np.int64]]], most: int) -> RunLengthMasks:
    """B lists of run ends -> B x `most` instances, those that are padding without runs."""
    padded = [ends for image in masks for ends in [*image, *[np.zeros(0, np.int64)] * (most - len(image))]]
    offsets = np.cumsum([0, *(len(ends) for ends in padded)])
    ends = np.concatenate([np.zeros(0, np.int64), *padded]).astype(np.int32)
    return RunLengthMasks(torch.from_numpy(ends), torch.from_numpy(offsets))
