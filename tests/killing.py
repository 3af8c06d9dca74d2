"""kill -9 of real processes, and what is to be seen of their files afterwards."""

from __future__ import annotations

import hashlib
import os
import signal
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pipelines.storage import open_store


def checksums(out: str) -> dict[str, str]:
    store = open_store(out)
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name, _ in store.entries(hidden=True)}


def stamps(out: str, names: Iterable[str]) -> dict[str, tuple[Any, Any]]:
    """What changes when a file is written again, even with the same bytes."""
    store = open_store(out)
    if store.is_local:
        stats = {name: (store.path / name).stat() for name in names}
        return {name: (each.st_mtime_ns, each.st_ino) for name, each in stats.items()}
    infos = {name: store._fs.info(f"{out.removeprefix('s3://')}/{name}") for name in names}
    return {name: (each["ETag"], each["LastModified"]) for name, each in infos.items()}


def parents() -> dict[int, int]:
    """Of each process its parent's number."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            found[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:  # gone
            continue
    return found


def family(root: int) -> set[int]:
    """A process and all that it, or one of them, has started."""
    above, members = parents(), {root}
    while more := {pid for pid, parent in above.items() if parent in members} - members:
        members |= more
    return members


def send(pids: Iterable[int], number: signal.Signals) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def kill_all(root: int) -> None:
    """kill -9 of the driver, Ray's servers and its workers, whatever process groups they are in. They are stopped
    first, so that none starts another meanwhile."""
    stopped: set[int] = set()
    while more := family(root) - stopped:
        send(more, signal.SIGSTOP)
        stopped |= more
    send(stopped, signal.SIGKILL)


def command_of(pid: int) -> str:
    """What a process is called; empty for one that has gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        return ""
