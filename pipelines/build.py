"""`mrcnn build-data`: images and annotations -> Arrow shards, a manifest and the rejects, as a Ray Data
pipeline.

The records are cut into shards by their order in the source, before anything runs in parallel; each shard is
one task (pipelines/shard_task.py), of which only a receipt comes back: pixels never travel through Ray. So
shards are the same bytes whatever the parallelism. A shard whose receipt lies in _progress/ is not made
again; the manifest is written when all are there, and then _progress/ goes.
"""

from __future__ import annotations

import io
import json
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.data

from pipelines.config import BuildConfig
from pipelines.manifest import FILE_NAME, Manifest, Totals
from pipelines.records import (
    REJECTED_ANNOTATIONS,
    REJECTS,
    ImageRecord,
    Reject,
    RejectedAnnotation,
    SourceData,
    by_reason,
    to_parquet,
)
from pipelines.schema import SCHEMA_VERSION
from pipelines.shard_task import PROGRESS, Receipt, ShardSettings, make_shard, receipt_name
from pipelines.sources.coco import read_coco
from pipelines.storage import Store, open_store

PLAN = f"{PROGRESS}/build.json"
REJECTS_FILE = "rejects.parquet"
REJECTED_ANNOTATIONS_FILE = "rejected_annotations.parquet"
FAILURES: dict[str, type[Exception]] = {
    error.__name__: error for error in (ValueError, FileNotFoundError, PermissionError)
}

Shards = dict[str, list[ImageRecord]]


@dataclass(frozen=True)
class BuildSummary:
    """What a build made."""

    out: str
    totals: Totals
    rejects_by_reason: dict[str, int]
    rejected_annotations_by_reason: dict[str, int]
    shards: int
    shards_made: int
    """In this run; the others were there already."""
    rows_made: int
    bytes: int
    """Of all shards."""
    seconds: float
    digest: str
    """Of the manifest: the identity of the data set."""

    @property
    def images_per_second(self) -> float:
        """Of this run; 0 where nothing was left to do."""
        return self.rows_made / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        all_, rate = self.totals, f"{self.seconds:.1f} s, {self.images_per_second:.1f} images/s"
        lines = [
            f"{all_.rows} of {all_.images} images, {all_.instances} of {all_.annotations} objects",
            f"{self.out}: {self.shards} shards, {self.bytes / 1e6:.1f} MB",
            f"made now: {self.shards_made} shards, {self.rows_made} images in {rate}",
        ]
        for what, reasons in (
            ("image", self.rejects_by_reason),
            ("object", self.rejected_annotations_by_reason),
        ):
            lines += [f"rejected {what}s: {count} x {reason}" for reason, count in reasons.items()]
        return "\n".join([*lines, f"digest {self.digest}"])


def build(config: BuildConfig) -> BuildSummary:
    """Build the shards, or what is missing of them. Ray must be running.

    Raises FileNotFoundError, PermissionError or ValueError, in words for the user, where it cannot start or
    go on: no such folder, wrong credentials, annotations that are not COCO, a folder that holds another
    build.
    """
    assert ray.is_initialized(), "start Ray first, see jobs/cluster.py"
    start = time.monotonic()
    images, out = open_store(config.images).check_folder(), open_store(config.out)
    source = read_coco(config.annotations, images)
    plan = _plan(config, images, source)
    shards = _cut(source.records, config.rows_per_shard)
    names = set(out.list())
    made: dict[str, Receipt] = {}
    if not _is_finished(out, plan, names=names, shards=shards):
        receipts = _resume(out, plan, names)
        missing = {name: records for name, records in shards.items() if name not in receipts}
        made = _run(missing, ShardSettings(images, out, config.shorter_side, config.longer_side, config.encoding))
        receipts |= made
        _conclude(out, source, plan=plan, receipts=[receipts[name] for name in shards])
    _tidy(out)
    return _summary(out, made, time.monotonic() - start)


def _plan(config: BuildConfig, images: Store, source: SourceData) -> dict[str, Any]:
    """All that the shards' bytes depend on."""
    return {
        "schema_version": SCHEMA_VERSION,
        "images": images.uri,
        "annotations_sha256": source.sha256,
        "shorter_side": config.shorter_side,
        "longer_side": config.longer_side,
        "encoding": config.encoding,
        "rows_per_shard": config.rows_per_shard,
    }


def _cut(records: list[ImageRecord], rows: int) -> Shards:
    starts = range(0, len(records), rows)
    return {f"shard-{i:05d}.arrow": records[start : start + rows] for i, start in enumerate(starts)}


def _is_finished(out: Store, plan: dict[str, Any], *, names: set[str], shards: Shards) -> bool:
    """Whether this very build is complete there. Raises ValueError where another one is."""
    if FILE_NAME not in names:
        return False
    manifest = Manifest.read(out)
    _refuse_other(out, manifest.build, plan)
    return names.issuperset(shards)


def _resume(out: Store, plan: dict[str, Any], names: set[str]) -> dict[str, Receipt]:
    """Receipts of the shards that are there, or the start of a new build."""
    if PLAN in names:
        _refuse_other(out, json.loads(out.read_bytes(PLAN)), plan)
    elif FILE_NAME not in names and any(name.startswith("shard-") for name in names):
        raise ValueError(f"{out.uri} holds shards of an unknown build: choose another --out, or empty this one")
    out.write_bytes(PLAN, json.dumps(plan).encode())
    if FILE_NAME in names:  # shards have gone since: make the build again, and let nobody read it meanwhile
        out.remove(FILE_NAME)
    finished = [name for name in names if name.endswith(".arrow") and receipt_name(name) in names]
    return {name: Receipt.from_json(out.read_bytes(receipt_name(name))) for name in finished}


def _refuse_other(out: Store, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [f"{key} {theirs.get(key)!r} there, {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]]
    if different:
        raise ValueError(
            f"{out.uri} holds another build ({'; '.join(different)}): choose another --out, or empty this one"
        )


def _run(shards: Shards, settings: ShardSettings) -> dict[str, Receipt]:
    """Make shards in parallel, one task each."""
    if not shards:
        return {}
    tasks = [
        {"name": name, "records": json.dumps([record.to_dict() for record in records])}
        for name, records in shards.items()
    ]
    dataset = ray.data.from_items(tasks, override_num_blocks=len(tasks))
    results = dataset.map(partial(make_shard, settings=settings), num_cpus=1)
    receipts: dict[str, Receipt] = {}
    for row in results.iter_rows():
        if row["failure"]:
            raise FAILURES[row["failure"]](row["message"])
        receipts[row["name"]] = Receipt.from_json(row["receipt"])
    return receipts


def _conclude(out: Store, source: SourceData, *, plan: dict[str, Any], receipts: list[Receipt]) -> None:
    """Write the rejects, and last the manifest."""
    rejects: list[Reject] = [*source.rejects, *(each for receipt in receipts for each in receipt.rejects)]
    rejected: list[RejectedAnnotation] = [
        *source.rejected_annotations,
        *(each for receipt in receipts for each in receipt.rejected_annotations),
    ]
    totals = Totals(
        images=source.images,
        rows=sum(receipt.info.rows for receipt in receipts),
        rejects=len(rejects),
        annotations=source.annotations,
        instances=sum(receipt.instances for receipt in receipts),
        rejected_annotations=len(rejected),
    )
    out.write_bytes(REJECTS_FILE, to_parquet(rejects, REJECTS))
    out.write_bytes(REJECTED_ANNOTATIONS_FILE, to_parquet(rejected, REJECTED_ANNOTATIONS))
    if totals.rows == 0:
        _discard(out, receipts)
        reasons = ", ".join(
            f"{count} x {reason}" for reason, count in by_reason((each.stage, each.reason) for each in rejects).items()
        )
        raise ValueError(f"not one image of {plan['images']} could be used ({reasons}): see {out.uri}/{REJECTS_FILE}")
    Manifest(source.categories, plan, tuple(receipt.info for receipt in receipts), totals).write(out)


def _tidy(out: Store) -> None:
    """Remove the receipts, and what tasks that were killed have left."""
    out.remove_folder(PROGRESS)
    if out.is_local:
        for part in out.path.glob(".shard-*.part"):
            part.unlink(missing_ok=True)


def _discard(out: Store, receipts: list[Receipt]) -> None:
    """Remove shards without rows, so that the same command tries anew."""
    for receipt in receipts:
        out.remove(receipt.info.name)
    _tidy(out)


def _summary(out: Store, made: dict[str, Receipt], seconds: float) -> BuildSummary:
    manifest = Manifest.read(out)
    return BuildSummary(
        out=out.uri,
        totals=manifest.totals,
        rejects_by_reason=by_reason(_stages(out, REJECTS_FILE)),
        rejected_annotations_by_reason=by_reason(_stages(out, REJECTED_ANNOTATIONS_FILE)),
        shards=len(manifest.shards),
        shards_made=len(made),
        rows_made=sum(receipt.info.rows for receipt in made.values()),
        bytes=sum(shard.bytes for shard in manifest.shards),
        seconds=seconds,
        digest=manifest.digest,
    )


def _stages(out: Store, name: str) -> list[tuple[str, str]]:
    table = pq.read_table(io.BytesIO(out.read_bytes(name)), columns=["stage", "reason"])
    return list(zip(table["stage"].to_pylist(), table["reason"].to_pylist(), strict=True))
