"""A build that ends anywhere goes on from there, and two at once do no harm: the same bytes come out."""

from __future__ import annotations

import hashlib
import os
import pathlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import ray
from inline import run_inline
from PIL import Image

from jobs.cluster import ray_session
from pipelines import build as build_module
from pipelines import build_folder
from pipelines.attempts import Task
from pipelines.build import BuildConfig, build, prepare, run_build
from pipelines.manifest import PROGRESS, LostError
from pipelines.storage import Store, open_store
from pipelines.tasks import run_tasks

# What changes a folder: on disk, and the calls of a store that do so on S3.
ON_DISK = [(os, "replace"), (os, "link"), (os, "rmdir"), (pathlib.Path, "unlink"), (pathlib.Path, "write_bytes")]
ON_S3 = [(Store, each) for each in ("write_bytes", "create_bytes", "remove", "remove_folder", "remove_leftovers")]


class Crash(BaseException):
    """The process is gone."""


def checksums(out: str) -> dict[str, str]:
    """Of all files, hidden ones, too."""
    store = open_store(out)
    return {name: hashlib.sha256(store.read_bytes(name)).hexdigest() for name, _ in store.entries(hidden=True)}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks one after another in this process."""
    monkeypatch.setattr(build_module, "run_tasks", run_inline)


@contextmanager
def crashing(calls: list[tuple[Any, str]], number: int, *, after: bool) -> Iterator[list[str]]:
    """The call of that number, counted over all, is the last that does something: it ends before or after its work."""
    made: list[str] = []

    def wrapped(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if len(made) > number:
                return None  # on the way out, which a killed process has not
            made.append(original.__name__)
            if len(made) > number and not after:
                raise Crash
            result = original(*args, **kwargs)
            if len(made) > number:
                raise Crash
            return result

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in calls:
            patch.setattr(owner, name, wrapped(getattr(owner, name)))
        yield made


def crash_everywhere(config: BuildConfig, out: str, calls: list[tuple[Any, str]]) -> Iterator[str]:
    """Build into a new folder for each place where it can end, and yield the folder as the crash leaves it."""
    for number in count():
        for after in (False, True):
            folder = f"{out}/{number}-{after}"
            try:
                with crashing(calls, number, after=after) as made:
                    build(replace(config, out=folder))
            except Crash:
                yield folder
            if len(made) <= number:
                return


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_goes_on_wherever_it_ends(
    toy_config: BuildConfig, toy_shards: str, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = str(tmp_path) if where == "disk" else f"{request.getfixturevalue('s3')}/crashes"
    expected = checksums(toy_shards)
    crashes = 0
    for folder in crash_everywhere(toy_config, out, ON_DISK if where == "disk" else ON_S3):
        crashes += 1
        left = checksums(folder)
        visible = {name: each for name, each in left.items() if not name.startswith((".", PROGRESS))}
        assert visible.items() <= expected.items(), "what has its name is complete"
        assert "manifest.json" not in visible or len(visible) == len(expected)
        done = [name for name in visible if f"{PROGRESS}/{name}.json" in left]
        prepared = prepare(replace(toy_config, out=folder))
        assert not prepared.missing.keys() & set(done)
        run_build(prepared)
        assert checksums(folder) == expected, folder
    assert crashes > (30 if where == "disk" else 10)


def build_inside(patch: pytest.MonkeyPatch, owner: Any, name: str, other: Callable[[], Any]) -> None:
    """Once, before a function does its work, another process does something."""
    original, done = getattr(owner, name), []

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if not done:
            done.append(True)
            other()
        return original(*args, **kwargs)

    patch.setattr(owner, name, wrapped)


PLACES = [
    (build_folder, "_finished"),
    (Store, "create_bytes"),
    (build_folder, "_read_plan"),
    (build_folder, "_receipts"),
    (build_module, "_run"),
    (build_module, "_conclude"),
    (build_module, "tidy"),
]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("place", range(len(PLACES)))
def test_the_same_build_twice_at_once(
    toy_config: BuildConfig, toy_shards: str, where: str, place: int, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One begins and ends while the other is at some place."""
    out = str(tmp_path / "out") if where == "disk" else f"{request.getfixturevalue('s3')}/twice-{place}"
    config = replace(toy_config, out=out)
    open_store(out).write_bytes(build_folder.PLAN, _plan_of(config))
    build_inside(monkeypatch, *PLACES[place], lambda: build(config))
    build(config)
    assert checksums(out) == checksums(toy_shards)


def _plan_of(config: BuildConfig) -> bytes:
    """As a build that has just begun leaves it."""
    other = replace(config, out=f"{config.out}-other")
    prepare(other)
    return open_store(other.out).read_bytes(build_folder.PLAN)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["disk", "s3"])
@pytest.mark.parametrize("place", range(2))
def test_another_build_begins_first(
    toy_config: BuildConfig, toy_shards: str, where: str, place: int, tmp_path: Path, request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of builds that differ one wins, even where both have found the folder empty; the winner's files stay."""
    out = str(tmp_path / "out") if where == "disk" else f"{request.getfixturevalue('s3')}/first-{place}"
    config = replace(toy_config, out=out)
    build_inside(monkeypatch, *PLACES[place], lambda: build(config))
    with pytest.raises(ValueError, match=r"holds another build .*rows_per_shard 5 there, 4 here"):
        build(replace(config, rows_per_shard=4))
    assert checksums(out) == checksums(toy_shards)


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("taken_by", ["a finished build", "a begun build", "shards of nobody"])
def test_of_several_sides_none_is_begun_where_one_is_taken(
    toy_config: BuildConfig, taken_by: str, tmp_path: Path
) -> None:
    config = replace(toy_config, out=str(tmp_path), more_sides=(32,))
    theirs = replace(toy_config, out=f"{tmp_path}/32", rows_per_shard=4)
    if taken_by == "shards of nobody":
        open_store(theirs.out).write_bytes("shard-00000.arrow", b"")
    else:
        (build if taken_by == "a finished build" else prepare)(theirs)
    before = checksums(str(tmp_path))
    with pytest.raises(ValueError, match=r"/32 holds (another build|shards of an unknown build)"):
        prepare(config)
    assert checksums(str(tmp_path)) == before


def test_two_threads_build_the_same_with_ray(
    toy_config: BuildConfig, toy_shards: str, ray_cluster: None, tmp_path: Path
) -> None:
    config = replace(toy_config, out=str(tmp_path / "out"))
    with ThreadPoolExecutor(2) as pool:
        summaries = list(pool.map(build, [config, config]))
    assert summaries[0].digest == summaries[1].digest
    assert checksums(config.out) == checksums(toy_shards)


@pytest.mark.usefixtures("here")
def test_a_shard_that_is_gone_or_cut_is_made_again(toy_config: BuildConfig, toy_shards: str, tmp_path: Path) -> None:
    """And no other: the manifest stands, and says what it has to become."""
    config = replace(toy_config, out=str(tmp_path))
    build(config)
    others = [path for path in tmp_path.iterdir() if path.name != "shard-00001.arrow"]
    before = [path.stat() for path in others]
    for spoil in (lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-8])):
        spoil(tmp_path / "shard-00001.arrow")
        summary = build(config)
        assert (summary.shards_made, summary.shards) == (1, 4)
        assert checksums(config.out) == checksums(toy_shards)
        assert [(each.st_ino, each.st_mtime_ns) for each in before] == [
            (path.stat().st_ino, path.stat().st_mtime_ns) for path in others
        ]
    assert build(config).shards_made == 0


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("where", ["disk", "s3"])
def test_lost_shards_are_made_wherever_that_ends(
    toy_config: BuildConfig, toy_shards: str, where: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    out = str(tmp_path) if where == "disk" else f"{request.getfixturevalue('s3')}/lost"
    expected, config = checksums(toy_shards), replace(toy_config, out=out)
    build(config)
    for number in range(40):
        for name in ("shard-00000.arrow", "shard-00002.arrow"):
            open_store(out).remove(name)
        try:
            with crashing(ON_DISK if where == "disk" else ON_S3, number, after=bool(number % 2)) as made:
                build(config)
        except Crash:
            pass
        assert checksums(out)["manifest.json"] == expected["manifest.json"]
        build(config)
        assert checksums(out) == expected
        if len(made) <= number:
            break
    assert number > (5 if where == "disk" else 3)


@pytest.mark.usefixtures("here")
def test_a_lost_shard_that_would_become_another_is_told(
    toy_config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of COCO's images, which are taken as unchanging. It has no name at any moment: the build may end then."""
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(toy_config.images, source)
    config = replace(toy_config, images=str(source), out=str(out))
    build(config)
    manifest = (out / "manifest.json").read_bytes()
    (out / "shard-00001.arrow").unlink()
    for path in source.iterdir():
        with Image.open(path) as image:
            size = image.size
        Image.new("RGB", size, "red").save(path)
    monkeypatch.setattr("pipelines.build.run_tasks", _first_alone)
    with pytest.raises(ValueError, match=r"shard-00001\.arrow cannot be made again as the manifest states it: its ima"):
        build(config)
    assert (out / "manifest.json").read_bytes() == manifest
    assert not (out / "shard-00001.arrow").exists()
    assert not [*out.glob(".*")]


def _first_alone(function: Callable[[Task], Task], tasks: Iterable[Task]) -> Iterator[Task]:
    yield from run_inline(function, islice(tasks, 1))
    raise Crash


@pytest.mark.usefixtures("here")
def test_who_may_not_remove_has_a_finished_build(
    toy_config: BuildConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As buckets are where all is kept."""
    config = replace(toy_config, out=str(tmp_path))

    def refused(self: Store, name: str) -> None:
        raise PermissionError(f"{self.uri}/{name} was refused")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "remove_folder", refused)
        for made in (4, 0):
            assert build(config).shards_made == made
            told = f"{tmp_path} is finished; _progress/ stays in it, and does no harm"
            assert told in capsys.readouterr().err
    assert (tmp_path / PROGRESS).is_dir()
    assert build(config).shards_made == 0
    assert not (tmp_path / PROGRESS).exists()


@pytest.mark.usefixtures("here")
def test_one_size_of_several_may_lose_shards(toy_config: BuildConfig, tmp_path: Path) -> None:
    config = replace(toy_config, out=str(tmp_path), more_sides=(32,))
    build(config)
    expected = checksums(config.out)
    (tmp_path / "32/shard-00003.arrow").unlink()
    summary = build(config)
    assert (summary.shards_made, summary.more[0].shards_made) == (0, 1)
    assert checksums(config.out) == expected


@pytest.mark.usefixtures("here")
def test_a_list_of_rejects_that_is_gone_or_damaged(toy_config: BuildConfig, toy_shards: str, tmp_path: Path) -> None:
    config, out = replace(toy_config, out=str(tmp_path / "out")), tmp_path / "out"
    build(config)
    (out / "rejects.parquet").unlink()
    assert build(config).shards_made == 4
    assert checksums(config.out) == checksums(toy_shards)
    (out / "rejects.parquet").write_bytes(bytes((out / "rejects.parquet").stat().st_size))
    with pytest.raises(ValueError, match=r"rejects\.parquet is damaged .*: remove it and build the data again"):
        build(config)


@pytest.mark.usefixtures("here")
def test_a_shard_that_goes_while_others_are_made_is_told(toy_config: BuildConfig, tmp_path: Path) -> None:
    def losing(function: Any, tasks: Any) -> Iterator[Any]:
        yield from run_inline(function, tasks)
        (tmp_path / "shard-00001.arrow").unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "run_tasks", losing)
        with pytest.raises(LostError, match=r"shard-00001\.arrow"):
            build(replace(toy_config, out=str(tmp_path)))
    assert not (tmp_path / "manifest.json").exists()
    assert build(replace(toy_config, out=str(tmp_path))).shards_made == 1


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(("field", "what"), [("rows", "images"), ("instances", "annotations")])
def test_sums_are_checked_at_the_end(toy_config: BuildConfig, tmp_path: Path, field: str, what: str) -> None:
    config = replace(toy_config, out=str(tmp_path))
    account = build_module.account

    def miscounting(*args: Any, **kwargs: Any) -> Any:
        accounts = account(*args, **kwargs)
        return replace(accounts, **{field: getattr(accounts, field) - 1})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build_module, "account", miscounting)
        with pytest.raises(LostError, match=rf"\d+ {what} went in, \d+ were used and 0 rejected"):
            build(config)
    assert not (tmp_path / "manifest.json").exists()
    assert build(config).totals.rows == 16


def test_a_living_writer_keeps_its_part(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    (tmp_path / f".dead.arrow.{'0' * 32}.part").write_bytes(b"of a killed task")
    with store.new_file("living.arrow") as part:
        part.write_bytes(b"half")
        store.remove_leftovers()
        assert not list(tmp_path.glob(".dead*"))
        assert part.read_bytes() == b"half"
    assert store.read_bytes("living.arrow") == b"half"


@pytest.mark.parametrize("cpus", [1, 2])
def test_the_same_bytes_with_any_number_of_cpus(
    toy_config: BuildConfig, toy_shards: str, ray_cluster: None, cpus: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """That Ray has 2. A task that asks for both has them alone, as on a machine with one."""
    with ray_session():
        assert ray.cluster_resources()["CPU"] == 2
    dataset_map = ray.data.Dataset.map

    def greedy(self: Any, function: Any, **options: Any) -> Any:
        return dataset_map(self, function, **{**options, "num_cpus": 3 - cpus})

    monkeypatch.setattr(ray.data.Dataset, "map", greedy)
    monkeypatch.setattr(build_module, "run_tasks", run_tasks)
    build(replace(toy_config, out=str(tmp_path)))
    assert checksums(str(tmp_path)) == checksums(toy_shards)
