"""The folder of a build while it is made: which build it is, which shards it has, and what is tidied up at the end.

_progress/build.json says which build, and is written first, by one of perhaps several writers.
_progress/SHARD.json is a shard's receipt, written after the shard; it says of which versions of the source's files, so
that those that are mended before the end are read again. manifest.json ends the build, and then _progress/
goes. Every file appears whole, so a process may be killed at any moment; and since equal builds write equal bytes,
two of them at once do each other no harm.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from pipelines.manifest import FILE_NAME, PROGRESS, Manifest, RejectList, ShardInfo
from pipelines.prefetch import prefetched
from pipelines.shard_task import Receipt, receipt_name, unsealed
from pipelines.storage import Store

PLAN = f"{PROGRESS}/build.json"
VERSIONS = "file_versions_sha256"  # in a plan: of all files, where the source lists them
SOURCE_REJECTS = "source_rejects_sha256"  # in a plan, where there are any
SHARD = "shard-"  # how their names begin
READ_THREADS, READ_AHEAD = 16, 64  # receipts are small and perhaps many: only latency counts


@dataclass(frozen=True)
class Found:
    """What a build finds in a folder that is its own."""

    receipts: dict[str, Receipt] | None
    """Of the shards that are there already; None where it is finished"""
    gone: Mapping[str, ShardInfo] = field(default_factory=dict)
    """Shards that a finished one has lost since: they are made again, as the manifest states them"""


def check_free(out: Store, plan: dict[str, Any]) -> None:
    """Raise ValueError where another build is there. Changes nothing."""
    sizes = sizes_in(out)
    _refuse_unknown(out, sizes)
    if FILE_NAME in sizes:
        _refuse_other(out, Manifest.read(out).build, plan)
    elif PLAN in sizes and (theirs := _read_plan(out)) is not None:
        _refuse_other(out, theirs, _begun(plan))


def _begun(plan: dict[str, Any]) -> dict[str, Any]:
    """What two runs of an unfinished build have in common: files may be mended between them, see `Receipt`."""
    return {key: value for key, value in plan.items() if key not in (VERSIONS, SOURCE_REJECTS)}


def claim(out: Store, plan: dict[str, Any], shards: Mapping[str, str]) -> Found:
    """Make the folder this build's. `shards` are by name the `versions_sha256` of their records.

    Raises ValueError where another build is there.
    """
    sizes = sizes_in(out)
    if FILE_NAME not in sizes and out.is_local and (out.path / FILE_NAME).is_dir():
        raise ValueError(f"{out.uri}/{FILE_NAME} is a folder: remove it, or choose another --out")
    if finished := _finished(out, plan, sizes=sizes, shards=shards):
        return finished
    _refuse_unknown(out, sizes)
    begun = _begun(plan)
    created = out.create_bytes(PLAN, json.dumps(begun).encode())
    theirs = begun if created else _read_plan(out)
    if theirs is None or (FILE_NAME not in sizes and out.exists(FILE_NAME)):
        return _claim_again(out, plan, shards=shards, created=created)
    _refuse_other(out, theirs, begun)
    if FILE_NAME in sizes:  # lists have gone since: make the build again, and let nobody read it meanwhile
        out.remove(FILE_NAME)
    return Found(_receipts(out, sizes, shards))


def _claim_again(out: Store, plan: dict[str, Any], *, shards: Mapping[str, str], created: bool) -> Found:
    """Another process has finished its build and tidied up between two of our looks."""
    try:
        return claim(out, plan, shards)
    except ValueError:
        if created:
            out.remove_folder(PROGRESS)
        raise


def _finished(out: Store, plan: dict[str, Any], *, sizes: dict[str, int], shards: Collection[str]) -> Found | None:
    """This very build with its manifest, less the shards that it has lost since; None where it has no manifest, or has
    lost lists of rejects, which are made of what all tasks tell. Raises ValueError where another build is there."""
    if FILE_NAME not in sizes:
        return None
    manifest = Manifest.read(out)
    _refuse_other(out, manifest.build, plan)
    stated = {each.name: each for each in manifest.shards}
    if stated.keys() != set(shards) or not_as_stated(sizes, manifest.reject_lists):
        return None
    return Found(None, {name: stated[name] for name in not_as_stated(sizes, manifest.shards)})


def sizes_in(out: Store) -> dict[str, int]:
    """Files of the folder and of _progress/, with their bytes. First the latter, that no receipt is newer than what is
    known of its shard."""
    progress = {f"{PROGRESS}/{name}": size for name, size in out.join(PROGRESS).files()}
    return progress | dict(out.files())


def not_as_stated(sizes: dict[str, int], files: Collection[ShardInfo | RejectList]) -> list[str]:
    """Names of the files that are not there in their size."""
    return [file.name for file in files if sizes.get(file.name) != file.bytes]


def _refuse_unknown(out: Store, sizes: dict[str, int]) -> None:
    own = (PLAN, receipt_name(SHARD).removesuffix(".json"))
    if others := [name for name in sizes if name.startswith(f"{PROGRESS}/") and not name.startswith(own)]:
        raise ValueError(f"{out.uri} holds another program's {others[0]}: choose another --out, or empty this one")
    begun = PLAN in sizes or FILE_NAME in sizes
    if not begun and any(name.startswith(SHARD) for name in sizes):
        raise ValueError(f"{out.uri} holds shards of an unknown build: choose another --out, or empty this one")


def _different(theirs: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    return [
        f"{key} {theirs.get(key)!r} there, {ours.get(key)!r} here"
        for key in dict.fromkeys([*ours, *theirs])
        if (theirs.get(key) or None) != (ours.get(key) or None)  # what is not said is not set
    ]


def _refuse_other(out: Store, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    if different := _different(theirs, ours):
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


def _receipts(out: Store, sizes: dict[str, int], shards: Mapping[str, str]) -> dict[str, Receipt]:
    """A shard without a receipt, or not as its receipt says, or of files that have changed since, is none; such a
    receipt goes, for what it says may fit the next shard of this name."""
    names = [name for name in shards if receipt_name(name) in sizes]
    found = zip(names, prefetched(partial(_receipt, out), names, threads=READ_THREADS, ahead=READ_AHEAD), strict=True)
    good = {
        name: each
        for name, each in found
        if each and each.versions_sha256 == shards[name] and not not_as_stated(sizes, [each.info])
    }
    forget(out, [name for name in names if name not in good])
    return good


def _receipt(out: Store, shard: str) -> Receipt | None:
    try:
        return unsealed(out.read_bytes(receipt_name(shard)))
    except (FileNotFoundError, ValueError, KeyError, TypeError):  # tidied up just now, damaged, or of another version
        return None


def forget(out: Store, shards: Collection[str]) -> None:
    """Let shards be made again."""
    for name in shards:
        with suppress(FileNotFoundError):  # the same build, run twice at once, has ended
            out.remove(receipt_name(name))


def clear(out: Store) -> None:
    """Remove all shards, those without receipt, too, and all that says which build it was."""
    for name in [name for name, _ in out.files() if name.startswith(SHARD) and name.endswith(".arrow")]:
        with suppress(FileNotFoundError):  # the same build, run twice at once, does the same
            out.remove(name)
    tidy(out)


def tidy(out: Store) -> None:
    """Remove the receipts, and what tasks that were killed have left."""
    out.remove_folder(PROGRESS)
    out.remove_leftovers()
