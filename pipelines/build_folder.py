"""The folder of a build while it is made: which build it is, which shards it has, and what is tidied up at the end.

_progress/build.json says which build, and is written first, by one of perhaps several writers.
_progress/SHARD.json is a shard's receipt, written after the shard. manifest.json ends the build, and then _progress/
goes. Every file appears whole, so a process may be killed at any moment; and since equal builds write equal bytes,
two of them at once do each other no harm.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import partial
from typing import Any

from pipelines.manifest import FILE_NAME, Manifest, ShardInfo
from pipelines.prefetch import prefetched
from pipelines.shard_task import PROGRESS, Receipt, receipt_name
from pipelines.storage import Store

PLAN = f"{PROGRESS}/build.json"
READ_THREADS, READ_AHEAD = 16, 64  # receipts are small and perhaps many: only latency counts


def claim(out: Store, plan: dict[str, Any], shards: Collection[str]) -> dict[str, Receipt] | None:
    """Make the folder this build's. Returns the receipts of the shards that are there; None where all is finished.

    Raises ValueError where another build is there.
    """
    sizes = dict(out.entries())
    if _is_finished(out, plan, sizes=sizes, shards=shards):
        return None
    begun = PLAN in sizes or FILE_NAME in sizes
    if not begun and any(name.startswith("shard-") for name in sizes):
        raise ValueError(f"{out.uri} holds shards of an unknown build: choose another --out, or empty this one")
    created = out.create_bytes(PLAN, json.dumps(plan).encode())
    theirs = plan if created else _read_plan(out)
    if theirs is None or (FILE_NAME not in sizes and out.exists(FILE_NAME)):
        return _claim_again(out, plan, shards=shards, created=created)
    _refuse_other(out, theirs, plan)
    if FILE_NAME in sizes:  # shards have gone since: make the build again, and let nobody read it meanwhile
        out.remove(FILE_NAME)
    return _receipts(out, sizes, shards)


def _claim_again(
    out: Store, plan: dict[str, Any], *, shards: Collection[str], created: bool
) -> dict[str, Receipt] | None:
    """Another process has finished its build and tidied up between two of our looks."""
    try:
        return claim(out, plan, shards)
    except ValueError:
        if created:
            out.remove_folder(PROGRESS)
        raise


def _is_finished(out: Store, plan: dict[str, Any], *, sizes: dict[str, int], shards: Collection[str]) -> bool:
    """Whether this very build is complete there. Raises ValueError where another one is."""
    if FILE_NAME not in sizes:
        return False
    manifest = Manifest.read(out)
    _refuse_other(out, manifest.build, plan)
    return len(manifest.shards) == len(shards) and not not_as_stated(sizes, manifest.shards)


def not_as_stated(sizes: dict[str, int], shards: Collection[ShardInfo]) -> list[str]:
    """Names of the shards that are not there in their size."""
    return [shard.name for shard in shards if sizes.get(shard.name) != shard.bytes]


def _refuse_other(out: Store, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    different = [f"{key} {theirs.get(key)!r} there, {ours[key]!r} here" for key in ours if theirs.get(key) != ours[key]]
    if different:
        raise ValueError(
            f"{out.uri} holds another build ({'; '.join(different)}): choose another --out, or empty this one"
        )


def _read_plan(out: Store) -> dict[str, Any] | None:
    """None if it has gone."""
    try:
        return dict(json.loads(out.read_bytes(PLAN)))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        raise ValueError(f"{out.uri}/{PLAN} is damaged: choose another --out, or empty this one") from None


def _receipts(out: Store, sizes: dict[str, int], shards: Collection[str]) -> dict[str, Receipt]:
    """A shard without a receipt, or not as its receipt says, is none."""
    names = [name for name in shards if name in sizes and receipt_name(name) in sizes]
    found = zip(names, prefetched(partial(_receipt, out), names, threads=READ_THREADS, ahead=READ_AHEAD), strict=True)
    return {name: each for name, each in found if each and not not_as_stated(sizes, [each.info])}


def _receipt(out: Store, shard: str) -> Receipt | None:
    try:
        return Receipt.from_json(out.read_bytes(receipt_name(shard)))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # tidied up just now, or of another version
        return None


def forget(out: Store, shards: Collection[str]) -> None:
    """Let shards be made again."""
    for name in shards:
        out.remove(receipt_name(name))


def tidy(out: Store) -> None:
    """Remove the receipts, and what tasks that were killed have left."""
    out.remove_folder(PROGRESS)
    out.remove_leftovers()
