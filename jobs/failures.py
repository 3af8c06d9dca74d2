"""Which failures of workers another try may mend, and what the driver says when none may."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, NoReturn

from ray.exceptions import RayActorError
from ray.train import UserCallback
from ray.train.v2.api.exceptions import ControllerError, TrainingFailedError, WorkerGroupError

from jobs.guards import BatchTooLargeError, NonFiniteLossError
from pipelines.storage_errors import UnreachableError

MAX_FAILURES = 3  # one after the other without a new checkpoint
PLAIN = (FileNotFoundError, PermissionError, ValueError)  # what a user can cause: data, settings, a full disk


class GivenUpError(RuntimeError):
    """Another try would end the same."""


class EndOfTries(UserCallback):
    """Ends a training where Ray would try again in vain; lives in Ray's controller, which is told to try for ever.

    A training of days may lose any number of workers, so failures are counted anew from each checkpoint. Nodes that are
    taken away are no failure.
    """

    def __init__(self, phase_uri: str) -> None:
        self._phase_uri = phase_uri
        self._failures = 0
        self._newest = -1

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Raises what ends the training, if something does."""
        if final := final_error(worker_exceptions):
            _end_quietly(final)
        if any(_was_taken_away(error) for error in worker_exceptions.values()):
            return
        newest = self._newest_step()
        self._failures = 1 if newest > self._newest else self._failures + 1
        self._newest = newest
        if self._failures > MAX_FAILURES:
            told = f"{self._failures} failures in a row, the last one: {_first_told(worker_exceptions)}"
            _end_quietly(GivenUpError(told))

    def _newest_step(self) -> int:
        # not at the top: every training waits for the controller to import this module, and for the model's beyond it
        from jobs.checkpoint import Checkpoints

        try:
            return max(Checkpoints(self._phase_uri).steps(), default=0)
        except UnreachableError:
            return self._newest


def final_error(failures: Mapping[int, Exception]) -> Exception | None:
    """The error that the next try would meet again, if one of these is such."""
    for error in failures.values():
        if isinstance(error, (BatchTooLargeError, NonFiniteLossError)):
            return GivenUpError(str(error))
        if isinstance(error, UnreachableError):
            continue
        for kind in PLAIN:
            if isinstance(error, kind):
                return kind(str(error))
    return None


def plain_error(error: TrainingFailedError, advice: str) -> Exception:
    """What ended a training, in few words, and what to do: a user's error as it is, all else as RuntimeError."""
    if isinstance(error, ControllerError):
        cause = error.controller_failure
        if isinstance(cause, PLAIN):
            return type(cause)(f"{cause}; {advice}")
        told = str(cause) if isinstance(cause, GivenUpError) else f"training failed ({_told(cause)})"
        return RuntimeError(f"{told}; {advice}")
    if isinstance(error, WorkerGroupError) and error.worker_failures:
        return RuntimeError(f"training failed ({_first_told(error.worker_failures)}); {advice}")
    return RuntimeError(f"training failed ({error}); {advice}")


def _end_quietly(error: Exception) -> NoReturn:
    """The driver tells it; Ray's controller would print how it came to be raised here."""
    logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    raise error


def _was_taken_away(error: Exception) -> bool:
    cause = getattr(error, "health_check_failure", error)
    return isinstance(cause, RayActorError) and bool(cause.preempted)


def _first_told(failures: Mapping[int, Exception]) -> str:
    return _told(next(iter(failures.values())))


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
