"""`mrcnn build-data`: images and annotations -> Arrow shards, a manifest and the rejects, as a Ray Data
pipeline.

The records are cut into shards by their order in the source, before anything runs in parallel; each shard is
one task (pipelines/shard_task.py), of which only a receipt comes back: pixels never travel through Ray. So
shards are the same bytes whatever the parallelism. A shard whose receipt lies in _progress/ is not made
again (pipelines/build_folder.py); the manifest is written when all are there and the sums are right.
"""

from __future__ import annotations

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import PurePosixPath
from typing import Any, NoReturn

from tqdm import tqdm

from pipelines.accounts import (
    REJECTED_ANNOTATIONS_FILE,
    REJECTS_FILE,
    Accounts,
    account,
    read_accounts,
    reasons_in,
)
from pipelines.build_folder import (
    SOURCE_REJECTS,
    VERSIONS,
    Found,
    check_free,
    claim,
    clear,
    forget,
    not_as_stated,
    tidy,
)
from pipelines.config import BuildConfig
from pipelines.manifest import PROGRESS, LostError, Manifest, Totals
from pipelines.records import ImageRecord, SourceData
from pipelines.rows import Scale
from pipelines.schema import SCHEMA_VERSION
from pipelines.shard_task import Receipt, ShardSettings, make_shard
from pipelines.sources import SOURCES
from pipelines.sources.names import names_sha256, versions_sha256
from pipelines.storage import Store, open_store
from pipelines.storage_errors import without_secrets
from pipelines.tasks import run_tasks
from pipelines.text import shown_name
from pipelines.tiling import Tiling
from pipelines.transforms import PIXELS_VERSION

ENOUGH = 1000  # rejected images show what is wrong: no need to begin the others

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
    more: tuple[BuildSummary, ...] = ()
    """Of further sides, made in the same pass."""
    passed_over: tuple[str, ...] = ()
    """Files in a bare folder that are not named as images are: neither rows nor rejects"""

    @property
    def images_per_second(self) -> float:
        """Of this run; 0 where nothing was left to do."""
        return self.rows_made / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        all_, rate = self.totals, f"{self.seconds:.1f} s, {self.images_per_second:.1f} images/s"
        lines = [
            f"{all_.images - all_.rejects} of {all_.images} images, "
            f"{all_.annotations - all_.rejected_annotations} of {all_.annotations} objects",
            f"{self.out}: {self.shards} shards, {self.bytes / 1e6:.1f} MB",
            f"made now: {self.shards_made} shards, {self.rows_made} images in {rate}",
        ]
        for what, reasons in (
            ("image", self.rejects_by_reason),
            ("object", self.rejected_annotations_by_reason),
        ):
            lines += [f"rejected {what}s: {count} x {reason}" for reason, count in reasons.items()]
        if self.passed_over:
            endings = ", ".join(sorted({shown_name(PurePosixPath(name).suffix or name) for name in self.passed_over}))
            lines.append(f"passed over: {len(self.passed_over)} files that are not named as images ({endings})")
        if all_.further_tiles:
            cut = f"{all_.further_parts} further parts of objects, {all_.dropped_parts} too small ones left out"
            lines.append(f"cut into {all_.rows} tiles: {cut}")
        return "\n".join([*lines, f"digest {self.digest}", *(str(each) for each in self.more)])


@dataclass(frozen=True)
class Folder:
    """One data set of a build."""

    out: Store
    plan: dict[str, Any]
    found: Found

    def lacks(self, shard: str) -> bool:
        """Whether a shard is to be made."""
        found = self.found
        return shard in found.gone if found.receipts is None else shard not in found.receipts


@dataclass(frozen=True)
class PreparedBuild:
    """A build of which all is known but the shards that are to be made."""

    config: BuildConfig
    settings: ShardSettings
    source: SourceData
    shards: Shards
    folders: tuple[Folder, ...]
    """As the settings' scales"""
    seconds: float
    """That this took"""

    @property
    def missing(self) -> dict[str, list[int]]:
        """The shards that are to be made, and the folders they are missing in: only these need Ray."""
        where = {name: [i for i, folder in enumerate(self.folders) if folder.lacks(name)] for name in self.shards}
        return {name: folders for name, folders in where.items() if folders}


def build(config: BuildConfig) -> BuildSummary:
    """Build the shards, or what is missing of them. Ray must be running.

    A build that is finished stays as it is: rejects that were mended since need a new `config.out`. Raises
    FileNotFoundError, PermissionError or ValueError, in words for the user, where it cannot start or go on: no such
    folder, wrong credentials, annotations that are not COCO, a folder that holds another build, more rejects than the
    settings allow.
    """
    return run_build(prepare(config))


def prepare(config: BuildConfig) -> PreparedBuild:
    """Look at the input, and make the output folder this build's. Needs no Ray: what is wrong is told within seconds.

    Raises as `build`.
    """
    start = time.monotonic()
    if config.images.startswith(("http://", "https://")) and "?" in config.images:
        raise ValueError(
            f"{without_secrets(config.images)} has a query, which would be stored with each image's URI: give its "
            "folder without one, or a list of signed addresses with --format images"
        )
    scales = tuple(Scale(open_store(out).check_answers(), *sides) for out, *sides in config.folders())
    open_store(config.images).check_answers()
    source = SOURCES[config.format].read(config)
    shards = _cut(source.records, config.rows_per_shard)
    settings = ShardSettings(
        format=config.format,
        images=source.images_at,
        categories=source.categories,
        follow_links=config.follow_links,
        scales=scales,
        tiling=Tiling(config.tile, config.tile_overlap, config.tile_min_share),
        encoding=config.encoding,
        max_pixels=config.max_pixels,
    )
    for scale in scales if len(scales) > 1 else ():  # none is begun where another is taken
        check_free(scale.out, _plan(config, source, scale))
    folders = tuple(_folder(config, source, scale, shards) for scale in scales)
    return PreparedBuild(config, settings, source, shards, folders, time.monotonic() - start)


def _folder(config: BuildConfig, source: SourceData, scale: Scale, shards: Shards) -> Folder:
    plan, out = _plan(config, source, scale), scale.out
    found = claim(out, plan, {name: versions_sha256(records) for name, records in shards.items()})
    if found.receipts is None:
        _check_finished(out, config)
        return Folder(out, plan, found)
    receipts = found.receipts
    if excess := account(source).excess(config):
        _refuse(out, excess, account(source, receipts.values()))
    if account(source, receipts.values(), complete=len(receipts) == len(shards)).excess(config):
        receipts = _without_rejects(out, receipts)
    return Folder(out, plan, Found(receipts))


def _check_finished(out: Store, config: BuildConfig) -> None:
    """The shares may be lower than when it was built."""
    if excess := read_accounts(out, Manifest.read(out)).excess(config):
        raise ValueError(
            f"{excess}. {out.uri} is finished, and stays as it is: allow more, or mend them and give a new --out"
        )


def run_build(prepared: PreparedBuild) -> BuildSummary:
    """Make the shards that are missing, and finish. Ray must be running, unless there are none. Raises as `build`."""
    start = time.monotonic()
    made = _run(prepared)
    for folder, new in zip(prepared.folders, made, strict=True):
        if folder.found.receipts is not None:
            receipts = folder.found.receipts | new
            _conclude(prepared, folder, [receipts[name] for name in prepared.shards if name in receipts])
        _tidy_up(folder.out)
    seconds = prepared.seconds + time.monotonic() - start
    first, *more = (_summary(folder.out, new, seconds) for folder, new in zip(prepared.folders, made, strict=True))
    return replace(first, more=tuple(more), passed_over=prepared.source.passed_over)


def _tidy_up(out: Store) -> None:
    """Of a finished folder: what cannot be removed, for want of the right to, does no harm."""
    try:
        tidy(out)
    except PermissionError as error:
        print(f"warning: {error}. {out.uri} is finished; {PROGRESS}/ stays in it, and does no harm", file=sys.stderr)


def _plan(config: BuildConfig, source: SourceData, scale: Scale) -> dict[str, Any]:
    """All that the shards' bytes depend on."""
    versions = versions_sha256(source.records)
    rejects = [f"{each.uri} {each.reason}" for each in source.rejects]
    return {
        "schema_version": SCHEMA_VERSION,
        "format": config.format,
        "images": source.images_at.uri,
        "follow_links": config.follow_links,
        "annotations_sha256": source.sha256,
        **({VERSIONS: versions} if versions else {}),
        **({SOURCE_REJECTS: names_sha256(rejects)} if rejects else {}),
        "shorter_side": scale.shorter_side,
        "longer_side": scale.longer_side,
        "tile": [config.tile, config.tile_overlap, config.tile_min_share] if config.tile else [],
        "pixels_version": PIXELS_VERSION,
        "encoding": config.encoding,
        "max_pixels": config.max_pixels,
        "rows_per_shard": config.rows_per_shard,
    }


def _cut(records: list[ImageRecord], rows: int) -> Shards:
    starts = range(0, len(records), rows)
    return {f"shard-{i:05d}.arrow": records[start : start + rows] for i, start in enumerate(starts)}


def _without_rejects(out: Store, receipts: dict[str, Receipt]) -> dict[str, Receipt]:
    """Only what was rejected may have been mended since: those shards are made again."""
    again = [name for name, each in receipts.items() if each.rejects or each.rejected_annotations]
    forget(out, again)
    return {name: each for name, each in receipts.items() if name not in again}


def _run(prepared: PreparedBuild) -> list[dict[str, Receipt]]:
    """Make the missing shards in parallel, one task each; not all of them where too many images are rejected, but to
    its end each that has begun, so that it writes nothing later. The receipts, by shard, of each folder."""
    missing = prepared.missing
    there = {name: each for folder in prepared.folders for name, each in (folder.found.receipts or {}).items()}
    before = account(prepared.source, [each for name, each in there.items() if name not in missing])
    rejects, share = len(before.rejects), prepared.config.max_reject_share
    made: list[dict[str, Receipt]] = [{} for _ in prepared.folders]
    images = sum(len(prepared.shards[name]) for name in missing)
    with tqdm(total=images, unit=" images", desc="build-data", disable=None) as bar:
        # asked as tasks are begun, and `rejects` grows
        begun = takewhile(lambda _: rejects <= ENOUGH or rejects / before.images <= share, missing.items())
        tasks = (_task(prepared, name, folders) for name, folders in begun)
        for row in run_tasks(partial(make_shard, settings=prepared.settings), tasks) if missing else ():
            receipts = [Receipt.from_json(each) for each in row["receipts"]]
            for folder, receipt in zip(missing[row["name"]], receipts, strict=True):
                made[folder][row["name"]] = receipt
            rejects += len(receipts[0].rejects)
            bar.set_postfix(rejects=rejects, refresh=False)
            bar.update(len(prepared.shards[row["name"]]))
    return made


def _task(prepared: PreparedBuild, name: str, folders: list[int]) -> dict[str, str]:
    stated = [prepared.folders[i].found.gone.get(name) for i in folders]
    return {
        "name": name,
        "records": json.dumps([record.to_dict() for record in prepared.shards[name]]),
        "scales": json.dumps(folders),
        "stated": json.dumps([each and asdict(each) for each in stated]),
    }


def _conclude(prepared: PreparedBuild, folder: Folder, receipts: list[Receipt]) -> None:
    """Write the rejects, see whether nothing was lost, and write the manifest last."""
    out, accounts = folder.out, account(prepared.source, receipts, complete=True)
    if excess := accounts.excess(prepared.config):
        _refuse(out, excess, accounts)
    lists = accounts.write_rejects(out)
    shards = tuple(receipt.info for receipt in receipts)
    totals = accounts.totals()
    missing = not_as_stated(dict(out.files()), shards)
    if missing or len(shards) != len(prepared.shards):
        raise LostError(f"{out.uri}: {missing or 'shards'} are not as they were written: run the same command again")
    Manifest(prepared.source.categories, folder.plan, shards, totals, reject_lists=lists).write(out)


def _refuse(out: Store, excess: str, accounts: Accounts) -> NoReturn:
    """Leave the lists of rejects to read, and shards with rows for the next try."""
    accounts.write_rejects(out)
    kept = "shards without rejects are kept"
    if accounts.rows == 0:
        kept = "nothing else is kept"
        clear(out)
    raise ValueError(
        f"{excess}. All are in {out.uri}/{REJECTS_FILE} and {REJECTED_ANNOTATIONS_FILE}: mend them or allow more, and "
        f"run the same command again ({kept})"
    )


def _summary(out: Store, made: dict[str, Receipt], seconds: float) -> BuildSummary:
    manifest = Manifest.read(out)
    return BuildSummary(
        out=out.uri,
        totals=manifest.totals,
        rejects_by_reason=reasons_in(out, REJECTS_FILE),
        rejected_annotations_by_reason=reasons_in(out, REJECTED_ANNOTATIONS_FILE),
        shards=len(manifest.shards),
        shards_made=len(made),
        rows_made=sum(receipt.info.rows for receipt in made.values()),
        bytes=sum(shard.bytes for shard in manifest.shards),
        seconds=seconds,
        digest=manifest.digest,
    )
