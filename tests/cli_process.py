"""`mrcnn` in processes of their own that need no time to import it: forked from one that has it imported."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path


@dataclass(frozen=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str
    seconds: float


@dataclass(frozen=True)
class Running:
    """A command on its way."""

    process: BaseProcess
    folder: Path
    started: float

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text() if (self.folder / "out").exists() else ""

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text() if (self.folder / "err").exists() else ""

    def wait(self, seconds: float = 300.0) -> Done:
        self.process.join(seconds)
        assert self.process.exitcode is not None, (self.out, self.err)
        return Done(self.process.exitcode, self.out, self.err, time.monotonic() - self.started)

    def interrupt(self) -> None:
        """As Ctrl-C does."""
        os.kill(self.process.pid or 0, signal.SIGINT)


def _main(words: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    from jobs.cli import main

    for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), stream.fileno())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.exit(main(words))


class Commands:
    """Starts commands; each has its own working directory."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder = folder
        self.environment = dict(environment)
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(["jobs.cli"])  # not Ray, which reads its environment when it is imported
        self.started: list[Running] = []

    def start(self, *words: str, **environment: str) -> Running:
        """`mrcnn WORDS`, with further environment variables."""
        folder = self.folder / f"{len(self.started):03d}-{words[0]}"
        folder.mkdir()
        process = self.context.Process(target=_main, args=(words, self.environment | environment, folder))
        running = Running(process, folder, time.monotonic())
        self.started.append(running)
        process.start()
        return running

    def run(self, *words: str, **environment: str) -> Done:
        return self.start(*words, **environment).wait()


@contextlib.contextmanager
def commands(folder: Path, environment: Mapping[str, str]) -> Iterator[Commands]:
    """A way to run `mrcnn` with an environment; ends what still runs."""
    made = Commands(folder, environment)
    try:
        yield made
    finally:
        for running in made.started:
            running.process.kill()
            running.process.join()
