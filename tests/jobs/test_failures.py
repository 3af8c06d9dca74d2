"""Which failures end a training, and what the driver says then."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.exceptions import RayActorError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from jobs.failures import MAX_FAILURES, EndOfTries, GivenUpError, final_error, plain_error
from jobs.guards import BatchTooLargeError, NonFiniteLossError
from pipelines.storage_errors import UnreachableError

DEATH = RayActorError()


def write_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "checkpoint.json").write_text("{}")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ValueError("bad row"), ValueError),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"), ValueError),
        (FileNotFoundError("no shard"), FileNotFoundError),
        (PermissionError("refused"), PermissionError),
        (NonFiniteLossError("nan"), GivenUpError),
        (BatchTooLargeError("large"), GivenUpError),
        (UnreachableError("busy"), None),
        (RuntimeError("connection closed by peer"), None),
        (DEATH, None),
    ],
)
def test_what_another_try_cannot_mend(error: Exception, expected: type[Exception] | None) -> None:
    found = final_error({0: RuntimeError("connection closed by peer"), 1: error})
    assert (found and type(found)) == expected
    assert found is None or str(found) == str(error)
    if expected:
        with pytest.raises(expected):
            EndOfTries("unused").after_exception(None, {1: error})


def test_tries_are_counted_anew_from_each_checkpoint(tmp_path: Path) -> None:
    tries = EndOfTries(str(tmp_path))
    for step in (3, 6):
        for _ in range(MAX_FAILURES):
            tries.after_exception(None, {0: DEATH})
        write_checkpoint(tmp_path, step)
    for _ in range(MAX_FAILURES):
        tries.after_exception(None, {0: DEATH})
    for _ in range(9):  # no fault of the training's
        tries.after_exception(None, {0: RuntimeError("reset"), 1: RayActorError(preempted=True)})
    with pytest.raises(GivenUpError, match=r"4 failures in a row, the last one: RayActorError"):
        tries.after_exception(None, {0: DEATH})


@pytest.mark.parametrize(
    ("error", "expected", "text"),
    [
        (ControllerError(FileNotFoundError("no shard")), FileNotFoundError, "no shard; resume"),
        (ControllerError(GivenUpError("nan")), RuntimeError, "nan; resume"),
        (ControllerError(KeyError("x")), RuntimeError, "training failed (KeyError: 'x'); resume"),
        (WorkerGroupError("", {1: OSError("gone")}), RuntimeError, "training failed (OSError: gone); resume"),
    ],
)
def test_what_the_driver_says(error: ControllerError | WorkerGroupError, expected: type[Exception], text: str) -> None:
    found = plain_error(error, "resume")
    assert (type(found), str(found)) == (expected, text)
