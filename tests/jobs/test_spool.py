"""What is put into a spool arrives, whatever happens to the receiver or to the process, and nobody waits for it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from jobs import spool
from jobs.spool import Item, Spool
from pipelines.storage import open_store

AT_ONCE = 2.0  # seconds; generous, for a call that waits for nobody


class Receiver:
    """Takes items, unless it is down (raises) or hangs."""

    def __init__(self) -> None:
        self.got: list[tuple[str, bytes]] = []
        self.down = False
        self.calls = 0
        self.answers = threading.Event()
        self.answers.set()
        self.callers: set[str] = set()
        self.asked = threading.Event()

    def __call__(self, items: Sequence[Item]) -> None:
        self.calls += 1
        self.callers.add(threading.current_thread().name)
        self.asked.set()
        self.answers.wait()
        if self.down:
            raise ConnectionError("http://me:planted@host is down")
        self.got += [(item.name, item.data) for item in items]

    @property
    def lines(self) -> list[bytes]:
        return [line for _, data in self.got for line in data.splitlines()]


@pytest.fixture
def receiver() -> Receiver:
    return Receiver()


def make(folder: Path, receiver: Receiver, *, parts: bool = True) -> Spool:
    return Spool(open_store(str(folder)), receiver, receiver="the receiver", parts=parts)


def line(number: int) -> Item:
    return Item("lines", b"%d\n" % number)


def numbers(count: int) -> list[bytes]:
    return [b"%d" % i for i in range(count)]


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_all_arrives_in_order_and_leaves_nothing(tmp_path: Path, receiver: Receiver) -> None:
    queue = make(tmp_path, receiver)
    for i in range(2000):
        queue.put(line(i))
        if i % 300 == 0:
            queue.keep()
    queue.close(patience=5)
    # what was on its way when it was kept arrives twice
    assert list(dict.fromkeys(receiver.lines)) == sorted(set(receiver.lines), key=int) == numbers(2000)
    assert list(tmp_path.iterdir()) == []


def test_nobody_waits_for_a_receiver_that_hangs(tmp_path: Path, receiver: Receiver) -> None:
    receiver.answers.clear()
    queue = make(tmp_path, receiver)
    started = time.monotonic()
    for i in range(100):
        queue.put(line(i))
    assert receiver.asked.wait(5)
    queue.keep()
    queue.put(line(100))
    assert time.monotonic() - started < AT_ONCE
    queue.close(patience=0.2)
    assert time.monotonic() - started < 3 * AT_ONCE + 1
    assert len(files(tmp_path)) == 2
    receiver.answers.set()
    receiver.got.clear()
    make(tmp_path, receiver).close(patience=5)
    assert sorted(set(receiver.lines), key=int) == numbers(101)
    assert files(tmp_path) == []


def test_parts_that_come_one_by_one_are_sent_together(tmp_path: Path, receiver: Receiver) -> None:
    queue = make(tmp_path, receiver)
    queue.put(line(0))
    assert receiver.asked.wait(5)
    for i in range(1, 20):
        queue.put(line(i))
        time.sleep(0.01)
    queue.close(patience=5)
    assert receiver.lines == numbers(20)
    assert receiver.calls == 2


def test_a_receiver_that_comes_back_gets_everything(
    tmp_path: Path, receiver: Receiver, capsys: pytest.CaptureFixture[str]
) -> None:
    receiver.down = True
    queue = make(tmp_path, receiver)
    for i in range(10):
        queue.put(line(i))
    assert receiver.asked.wait(5)
    while queue.error is None:
        time.sleep(0.01)
    queue.keep()
    receiver.down = False
    queue.close(patience=10)
    assert receiver.lines == numbers(10)
    assert receiver.callers == {"spool to the receiver"}
    assert queue.error is None
    said = capsys.readouterr().out
    assert said == (
        "warning: the receiver does not answer, what is logged waits: http://host is down\nthe receiver answers again\n"
    )


def test_a_receiver_that_stays_away_costs_a_bounded_time(tmp_path: Path, receiver: Receiver) -> None:
    receiver.down = True
    queue = make(tmp_path, receiver)
    queue.put(line(0), line(1))
    started = time.monotonic()
    queue.close(patience=1)
    assert 1 <= time.monotonic() - started < 10
    (kept,) = files(tmp_path)
    assert (tmp_path / kept).read_bytes() == b"0\n1\n"
    assert queue.error == "http://host is down"
    receiver.down = False
    make(tmp_path, receiver).close(patience=5)
    assert receiver.lines == numbers(2)


def test_what_was_kept_survives_the_process(tmp_path: Path, receiver: Receiver) -> None:
    script = f"""
import os, signal, time
from jobs.spool import Item, Spool
from pipelines.storage import open_store

def never(items):
    time.sleep(1000)

queue = Spool(open_store({str(tmp_path)!r}), never, receiver="nobody", parts=True)
for i in range(5):
    queue.put(Item("lines", b"%d\\n" % i))
queue.keep()
queue.put(Item("lines", b"5\\n"))
os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    make(tmp_path, receiver).close(patience=5)
    assert receiver.lines == numbers(5)


def test_memory_is_bounded(tmp_path: Path, receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "MEMORY", 1000)
    receiver.answers.clear()
    queue = make(tmp_path, receiver)
    for i in range(1000):
        queue.put(line(i))
        assert sum(len(item.data) for item in queue._waiting) <= 1000
    assert sum((tmp_path / name).stat().st_size for name in files(tmp_path)) > 2000
    receiver.answers.set()
    queue.close(patience=5)
    assert sorted(set(receiver.lines), key=int) == numbers(1000)


def test_of_whole_files_the_newest_one_of_a_name_counts(tmp_path: Path, receiver: Receiver) -> None:
    receiver.down = True
    queue = make(tmp_path, receiver, parts=False)
    queue.put(Item("a/table", b"old"), Item("b", b"1"))
    queue.put(Item("a/table", b"new"))
    queue.close(patience=0)
    assert [(tmp_path / name).read_bytes() for name in files(tmp_path)] == [b"new", b"1"]
    receiver.down = False
    make(tmp_path, receiver, parts=False).close(patience=5)
    assert receiver.got == [("a/table", b"new"), ("b", b"1")]
    assert list(tmp_path.iterdir()) == []


def test_a_receiver_whose_own_file_is_missing_has_not_got_it(tmp_path: Path) -> None:
    """FileNotFoundError has another meaning where it comes from the folder: somebody else has sent the file."""

    def refuse(items: Sequence[Item]) -> None:
        raise FileNotFoundError("no folder for artifacts")

    queue = Spool(open_store(str(tmp_path)), refuse, receiver="the receiver")
    queue.put(Item("a", b"1"))
    queue.keep()
    queue.close(patience=0.5)
    assert len(files(tmp_path)) == 1


def test_two_may_empty_a_folder_at_once(tmp_path: Path, receiver: Receiver) -> None:
    receiver.down = True
    queue = make(tmp_path, receiver, parts=False)
    for i in range(200):
        queue.put(Item(f"{i}", b"%d" % i))
    queue.close(patience=0)
    receiver.down = False
    both = [make(tmp_path, receiver, parts=False) for _ in range(2)]
    for each in both:
        each.close(patience=5)
    assert {data for _, data in receiver.got} == set(numbers(200))
    assert files(tmp_path) == []


def test_what_another_is_writing_stays(tmp_path: Path) -> None:
    """Two processes of a run log at once, each with a spool: one of them may find the files that the other keeps before
    the last of them is written."""
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "a").write_bytes(b"a")
    received: list[bytes] = []

    def receive(items: Sequence[Item]) -> None:
        if not received:
            (tmp_path / "1" / "b").write_bytes(b"b")
        received.extend(item.data for item in items)

    Spool(open_store(str(tmp_path)), receive, receiver="the receiver").close(patience=5)
    assert received == [b"a"]
    assert files(tmp_path) == ["1/b"]
    Spool(open_store(str(tmp_path)), receive, receiver="the receiver").close(patience=5)
    assert received == [b"a", b"b"]
    assert list(tmp_path.iterdir()) == []
