"""A storage that is away is waited for; nothing else is."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable

import pytest

from pipelines import patience
from pipelines.patience import patiently
from pipelines.storage_errors import UnreachableError, plain_errors


def failing(*errors: Exception) -> Callable[[], str]:
    left = list(errors)

    def call() -> str:
        if left:
            raise left.pop(0)
        return "read"

    return call


def test_it_waits_and_says_so_once(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    assert patiently(failing(*[UnreachableError("s3://b/k cannot be reached")] * 3)) == "read"
    first, last = capsys.readouterr().out.splitlines()
    assert first == "warning: s3://b/k cannot be reached; trying again for up to 10 min"
    assert last == "the storage answers again, after 0 s"
    assert patiently(failing()) == "read"
    assert capsys.readouterr().out == ""


def test_it_gives_up_and_does_not_wait_for_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    with pytest.raises(UnreachableError, match="away"):
        patiently(failing(*[UnreachableError("away")] * 1000), seconds=0.1)
    with pytest.raises(ValueError, match="damaged"):
        patiently(failing(ValueError("damaged"), AssertionError("called again")))


def test_it_does_not_wait_for_what_nobody_wants() -> None:
    unwanted = threading.Event()
    unwanted.set()
    with pytest.raises(UnreachableError, match="away"):
        patiently(failing(UnreachableError("away"), AssertionError("called again")), unwanted=unwanted)


@pytest.mark.parametrize(
    ("uri", "error", "is_away"),
    [
        ("s3://b/k", OSError(errno.EBUSY, "busy"), True),
        ("s3://b/k", TimeoutError(), True),
        ("/shared/f", OSError(errno.ESTALE, "stale"), True),
        ("/shared/f", OSError(errno.ENOSPC, "full"), False),
        ("/shared/f", OSError(errno.EMFILE, "too many"), False),
    ],
)
def test_what_may_be_over_in_a_moment(uri: str, error: OSError, is_away: bool) -> None:
    with pytest.raises(ValueError, match=uri) as caught, plain_errors(uri):
        raise error
    assert isinstance(caught.value, UnreachableError) == is_away
