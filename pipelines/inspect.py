"""`mrcnn inspect-data`: what is in a folder of shards, as a table and as one picture of some of its images.

Shards are read one after another, without their pixels but for the few images in the picture, so memory does not grow
with the data set. Sizes are those of the original images, or of their tiles, before the build resized them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from tqdm import tqdm

from pipelines.accounts import REJECTED_ANNOTATIONS_FILE, REJECTS_FILE, reasons_in
from pipelines.manifest import Manifest, ShardInfo
from pipelines.prefetch import prefetched
from pipelines.schema import SHARD
from pipelines.shards import UNREADABLE
from pipelines.storage import Store, open_store
from pipelines.text import shown_name

COLUMNS = ("source_height", "source_width", "height", "width", "encoding", "instances")
SMALL, MEDIUM = 32**2, 96**2  # COCO's bounds of an object's area, in pixels
READ_THREADS, READ_AHEAD = 4, 4  # shards
BLOCK = 16 * 1024  # bytes read at least at once from S3: what lies between two images' pixels
CLASSES_TOLD = 100


@dataclass
class Tally:
    """Counts over rows, which do not grow with their number."""

    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    """Images by height and width"""
    encodings: Counter[str] = field(default_factory=Counter)
    objects_of_images: Counter[int] = field(default_factory=Counter)
    """Images by their number of objects"""
    objects: Counter[int] = field(default_factory=Counter)
    """By label"""
    images: Counter[int] = field(default_factory=Counter)
    """That have an object of the label"""
    areas: NDArray[np.int64] = field(default_factory=lambda: np.zeros(3, np.int64))
    """Small, medium and large objects"""
    crowds: int = 0
    without_mask: int = 0
    with_keypoints: int = 0
    """Objects with at least one labelled keypoint"""

    def add(self, rows: pa.Table) -> None:
        """Count the rows of a shard, of which `COLUMNS` were read."""
        height, width, *stored = (rows[name].to_numpy() for name in COLUMNS[:4])
        self.sizes.update(zip(height.tolist(), width.tolist(), strict=True))
        self.encodings.update(rows["encoding"].to_pylist())
        instances = rows["instances"].combine_chunks()
        self.objects_of_images.update(pc.list_value_length(instances).to_pylist())
        found, row = pc.list_flatten(instances), pc.list_parent_indices(instances).to_numpy()
        label = found.field("label").to_numpy()
        self.objects.update(label.tolist())
        self.images.update(each for each, _ in set(zip(label.tolist(), row.tolist(), strict=True)))
        shrunk = (height * width.astype(np.float64)) / (stored[0] * stored[1].astype(np.float64))
        area = found.field("area").to_numpy() * shrunk[row]
        self.areas += np.bincount(np.searchsorted([SMALL, MEDIUM], area, side="right"), minlength=3)
        self.crowds += int(np.count_nonzero(found.field("iscrowd").to_numpy(zero_copy_only=False)))
        self.without_mask += found.field("segmentation").null_count
        self.with_keypoints += _labelled(found.field("keypoints"))


@dataclass(frozen=True)
class DataSummary:
    """What is in a folder of shards; prints as a table."""

    uri: str
    manifest: Manifest
    tally: Tally
    rejects_by_reason: dict[str, int]
    rejected_annotations_by_reason: dict[str, int]

    def __str__(self) -> str:
        return "\n".join([*self._head(), "", *self._ranges(), "", *self._objects(), "", *self._classes()]).rstrip()

    @property
    def _row(self) -> str:
        return "a tile" if self.manifest.totals.further_tiles else "an image"

    @property
    def _rows(self) -> str:
        return "tiles" if self.manifest.totals.further_tiles else "images"

    def _head(self) -> Iterator[str]:
        manifest, tally = self.manifest, self.tally
        totals, size = manifest.totals, sum(shard.bytes for shard in manifest.shards)
        encodings = ", ".join(f"{count} {name}" for name, count in tally.encodings.most_common())
        yield f"{self.uri}: format {manifest.build.get('format', 'coco')}, from {manifest.build.get('images')}"
        one = f"{size / max(totals.rows, 1) / 1e3:.0f} kB {self._row}"
        yield f"{len(manifest.shards)} shards, {size / 1e6:.1f} MB ({one})"
        tiles = f", of which {totals.further_tiles} are further tiles" if totals.further_tiles else ""
        yield f"{totals.images} images: {totals.rows} rows ({encodings}{tiles}), {totals.rejects} rejected"
        yield from (f"{count:>9} x {reason}" for reason, count in self.rejects_by_reason.items())
        rejected = totals.rejected_annotations
        yield f"{totals.annotations} annotations: {totals.instances} objects, {rejected} rejected"
        yield from (f"{count:>9} x {reason}" for reason, count in self.rejected_annotations_by_reason.items())

    def _ranges(self) -> Iterator[str]:
        sizes = self.tally.sizes
        heights, widths, ratios = Counter[float](), Counter[float](), Counter[float]()
        for (height, width), count in sizes.items():
            heights[height] += count
            widths[width] += count
            ratios[round(width / height, 2)] += count
        objects = Counter[float](self.tally.objects_of_images)
        yield f"{f'of {self._row}':<20}{'min':>9}{'median':>9}{'max':>9}"
        for name, counts in (("height", heights), ("width", widths), ("width / height", ratios), ("objects", objects)):
            yield f"{name:<20}" + "".join(f"{each:>9g}" for each in _range(counts))
        tall = sum(count for (height, width), count in sizes.items() if height > width)
        square = sum(count for (height, width), count in sizes.items() if height == width)
        wide = sizes.total() - tall - square
        yield f"{tall} {self._rows} are taller than wide, {square} square, {wide} wider than tall"

    def _objects(self) -> Iterator[str]:
        tally, count = self.tally, max(self.tally.objects.total(), 1)
        names = ("small, under 32 x 32 pixels", "medium", "large, from 96 x 96 pixels on")
        for name, number in zip(names, tally.areas.tolist(), strict=True):
            yield f"{name:<30}{number:>9}{number / count:>8.1%}"
        yield f"{'crowds':<30}{tally.crowds:>9}"
        yield f"{'without mask':<30}{tally.without_mask:>9}"
        yield f"{'with keypoints':<30}{tally.with_keypoints:>9}"
        yield f"{f'{self._rows} without objects':<30}{tally.objects_of_images[0]:>9}"

    def _classes(self) -> Iterator[str]:
        """Most frequent first; those of which there is none last."""
        tally, count = self.tally, max(self.tally.objects.total(), 1)
        named = [(label, category) for label, category in enumerate(self.manifest.categories, start=1)]
        named.sort(key=lambda each: (-tally.objects[each[0]], each[0]))
        if named:
            yield f"{'label':>5} {'id':>5}  {'class':<24}{'objects':>9}{'share':>8}{self._rows:>9}"
        for label, category in named[:CLASSES_TOLD]:
            objects = tally.objects[label]
            yield (
                f"{label:>5} {category.id:>5}  {shown_name(category.name[:24]):<24}{objects:>9}"
                f"{objects / count:>8.1%}{tally.images[label]:>9}"
            )
        if len(named) > CLASSES_TOLD:
            rest = sum(tally.objects[label] for label, _ in named[CLASSES_TOLD:])
            yield f"and {len(named) - CLASSES_TOLD} more classes with {rest} objects"


def summarize(uri: str) -> DataSummary:
    """Count what is in a folder of shards.

    Raises FileNotFoundError, PermissionError or ValueError where there is no finished data set, or a damaged one.
    """
    store = open_store(uri)
    manifest, tally = Manifest.read(store), Tally()
    tables = prefetched(partial(_read_shard, store), manifest.shards, threads=READ_THREADS, ahead=READ_AHEAD)
    with tqdm(total=manifest.totals.rows, unit=" images", desc="inspect-data", disable=None) as bar:
        for table in tables:
            tally.add(table)
            bar.update(len(table))
    return DataSummary(
        uri=store.uri,
        manifest=manifest,
        tally=tally,
        rejects_by_reason=reasons_in(store, REJECTS_FILE),
        rejected_annotations_by_reason=reasons_in(store, REJECTED_ANNOTATIONS_FILE),
    )


def _labelled(keypoints: pa.ListArray) -> int:
    """How many of some lists of x, y, visibility hold a visibility above 0."""
    visibility = pc.list_flatten(keypoints).to_numpy()[2::3]
    which = pc.list_parent_indices(keypoints).to_numpy()[2::3]
    return len(np.unique(which[visibility > 0]))


def _range(counts: Counter[float]) -> Sequence[float]:
    """Least, (lower) median and largest of counted values; zeros where there are none."""
    if not counts:
        return 0, 0, 0
    values = sorted(counts)
    ends = np.cumsum([counts[value] for value in values])
    return values[0], values[int(np.searchsorted(ends, ends[-1] / 2))], values[-1]


def _read_shard(store: Store, shard: ShardInfo) -> pa.Table:
    """The small columns of a shard: Arrow reads no bytes of the others."""
    options = pa.ipc.IpcReadOptions(included_fields=[SHARD.get_field_index(name) for name in COLUMNS])
    try:
        source = _mapped(store, shard) if store.is_local else _RemoteFile(store, shard)
        with source, pa.ipc.open_file(source, options=options) as reader:
            table = _checked(reader)
    except FileNotFoundError:
        raise FileNotFoundError(f"{store.uri_of(shard.name)} is missing: run `mrcnn verify-data {store.uri}`") from None
    except UNREADABLE as error:
        raise ValueError(
            f"{store.uri_of(shard.name)} is damaged ({error}): run `mrcnn verify-data {store.uri}`"
        ) from None
    if len(table) != shard.rows:
        raise ValueError(f"{store.uri_of(shard.name)} has {len(table)} rows, its manifest says {shard.rows}")
    return table


def _mapped(store: Store, shard: ShardInfo) -> pa.MemoryMappedFile:
    """A shard on disk. Raises OSError or, before it opens a pipe, ValueError."""
    path = store.path / shard.name
    if (size := path.stat().st_size) != shard.bytes:
        raise ValueError(f"it has {size} bytes, its manifest says {shard.bytes}")
    return pa.memory_map(str(path))


def _checked(reader: pa.RecordBatchFileReader) -> pa.Table:
    """The rows of a shard. Raises what `UNREADABLE` names where they cannot be counted: of damaged ones Arrow would
    follow offsets that point anywhere."""
    expected = pa.schema([SHARD.field(name) for name in SHARD.names if name in COLUMNS])
    if not reader.schema.equals(expected):
        raise ValueError("its schema is not that of this version")
    batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
    for batch in batches:
        batch.validate(full=True)
    table = pa.Table.from_batches(batches, expected)
    found = pc.list_flatten(table["instances"]).combine_chunks()
    counted = [*table.columns, found, *(found.field(name) for name in ("label", "area", "iscrowd"))]
    sides = [pc.min(table[name]).as_py() for name in COLUMNS[:4]] if len(table) else []
    if any(column.null_count for column in counted) or any(side <= 0 for side in sides):
        raise ValueError("a row has no size, no label or no area")
    return table


class _RemoteFile(io.RawIOBase):
    """A shard in an object store as a file that pyarrow can read parts of, some kilobytes at least at once."""

    def __init__(self, store: Store, shard: ShardInfo) -> None:
        self._store, self._shard = store, shard
        self._place, self._start, self._block = 0, 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._shard.bytes}[whence]
        return self._place

    def tell(self) -> int:
        return self._place

    def read(self, size: int = -1) -> bytes:
        end = min(self._shard.bytes, self._place + size if size >= 0 else self._shard.bytes)
        if not (self._start <= self._place and end <= self._start + len(self._block)):
            length = min(max(end - self._place, BLOCK), self._shard.bytes - self._place)
            self._start, self._block = self._place, self._store.read_range(self._shard.name, self._place, length)
        data = self._block[self._place - self._start : end - self._start]
        self._place += len(data)
        return data
