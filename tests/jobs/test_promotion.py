"""Aliases of versions: promote, roll back, and list them. The versions here are tags without models."""

from __future__ import annotations

import re
import socket
from pathlib import Path
from typing import Any

import pytest

from jobs import tracking
from jobs.cli import main
from jobs.model_list import table
from jobs.promotion import Candidate, Objection, objection
from jobs.registry import FORCED_TAG, ROLLED_BACK_TAG, list_versions, promote, rollback
from jobs.registry_store import aliases_of, ensure_model

pytestmark = pytest.mark.usefixtures("mlflow_store")


def make(name: str, *masks: float | None, digest: str = "d1") -> None:
    """Make the next versions of a model, by their mask AP; box AP is 0.1 more. None: it was never evaluated."""
    make_measured(name, *({} if ap is None else {"mask": ap, "box": ap + 0.1} for ap in masks), digest=digest)


def make_measured(name: str, *measured: dict[str, float], digest: str = "d1") -> None:
    store = tracking.client()
    ensure_model(store, name)
    for numbers in measured:
        tags = {f"val/{kind}_AP": f"{ap:.4f}" for kind, ap in numbers.items()}
        tags |= {tracking.VAL_DIGEST_TAG: digest, tracking.RUN_NAME_TAG: "tour"} if numbers else {}
        store.create_model_version(name, source="s3://bucket/model", tags=tags)


def aliases(name: str) -> dict[str, str]:
    return aliases_of(tracking.client(), name)


def test_the_champion_gives_way_only_to_one_that_is_not_worse() -> None:
    make("shapes", 0.5, 0.4999, 0.5, 0.6)
    assert str(promote("shapes", 1)) == "models:/shapes@champion is version 1 now"
    worse = (
        r"version 2 of shapes has mask AP 0\.4999, the champion, version 1, has 0\.5000 on the same .* d1: .*--force"
    )
    with pytest.raises(ValueError, match=worse):
        promote("shapes", 2)
    assert aliases("shapes") == {"champion": "1"}
    assert str(promote("shapes", 3)) == "models:/shapes@champion is version 3 now, it was 1"  # as good
    promote("shapes", 4)
    assert aliases("shapes") == {"champion": "4", "previous": "3"}
    assert str(promote("shapes", 4)) == "models:/shapes@champion is version 4 already"
    assert aliases("shapes") == {"champion": "4", "previous": "3"}
    with pytest.raises(ValueError, match=r"shapes/99 does not exist: shapes has the versions \[4, 3, 2, 1\]"):
        promote("shapes", 99)


def test_numbers_on_other_data_do_not_count() -> None:
    make("moved", 0.5, digest="0123456789abcdef")
    make("moved", 0.9, digest="fedcba9876543210")
    promote("moved", 1)
    other = (
        r"version 2 of moved has mask AP 0\.9000 on the validation data fedcba987654, the champion, version 1, has "
        r"0\.5000 on 0123456789ab, .*mrcnn evaluate; --force"
    )
    with pytest.raises(ValueError, match=other):
        promote("moved", 2)
    assert aliases("moved") == {"champion": "1"}


def test_force_says_so_in_a_tag() -> None:
    make("forced", 0.5, 0.4, 0.6)
    make("forced", 0.9, digest="d2")
    promote("forced", 1)
    assert "forced, although version 2 of forced has mask AP 0.4000" in str(promote("forced", 2, force=True))
    promote("forced", 4, force=True)
    promote("forced", 3, "staging", force=True)
    found = [tracking.client().get_model_version("forced", version).tags.get(FORCED_TAG) for version in "1234"]
    assert found[0] is None
    assert found[1].startswith("champion: version 2 of forced has mask AP 0.4000, the champion, version 1, has 0.5000")
    assert "--force" not in found[1]
    assert found[2] == "staging: nothing stood against it"
    assert found[3].startswith("champion: version 4 of forced has mask AP 0.9000 on the validation data d2")
    assert aliases("forced") == {"champion": "4", "previous": "2", "staging": "3"}


def test_a_version_without_an_evaluation_is_not_promoted() -> None:
    """Such as one that somebody has registered in MLflow's UI."""
    make("foreign", None, 0.5)
    with pytest.raises(ValueError, match="version 1 of foreign has no evaluation: register a run"):
        promote("foreign", 1)
    assert aliases("foreign") == {}
    promote("foreign", 1, force=True)
    with pytest.raises(ValueError, match=r"the champion, version 1, has no evaluation that version 2 .* --force"):
        promote("foreign", 2)
    make("foreign", 0.5, digest="")
    with pytest.raises(ValueError, match="version 3 of foreign has no evaluation"):
        promote("foreign", 3)


def test_models_without_masks_compare_by_keypoints_or_boxes() -> None:
    make_measured("dots", {"box": 0.5}, {"box": 0.4}, {"keypoint": 0.3, "box": 0.5}, {"keypoint": 0.2, "box": 0.9})
    promote("dots", 1)
    with pytest.raises(ValueError, match=r"has box AP 0\.4000, the champion, version 1, has 0\.5000"):
        promote("dots", 2)
    promote("dots", 3)  # as good, and finds more
    with pytest.raises(ValueError, match=r"has keypoint AP 0\.2000, the champion, version 3, has 0\.3000"):
        promote("dots", 4)
    with pytest.raises(ValueError, match=r"has keypoint AP none, the champion, version 3, has 0\.3000"):
        promote("dots", 1)
    lines = table(list_versions("dots")).splitlines()
    assert "keypoint AP" in lines[1]
    assert lines[-1].split()[:5] == ["1", "previous", "-", "-", "0.5000"]


@pytest.mark.parametrize(
    ("ours", "theirs", "words"),
    [
        ("0.4", "0.4", None),
        ("0.40000001", "0.4", None),
        ("0.4", "0.40000001", "has mask AP 0.4, the champion, version 1, has 0.40000001 on"),
        ("nan", "0.4", "has mask AP nan"),
        ("0.4", "nan", "version 1, has nan"),
    ],
)
def test_close_numbers_and_none(ours: str, theirs: str, words: str | None) -> None:
    candidate, champion = (
        Candidate("n", version, {"val/mask_AP": value, tracking.VAL_DIGEST_TAG: "d"})
        for version, value in (("2", ours), ("1", theirs))
    )
    against = objection(candidate, champion, "champion")
    assert against is None if words is None else words in str(against)


def test_a_spoilt_tag_is_named() -> None:
    make("spoilt", 0.5, 0.6)
    promote("spoilt", 1)
    tracking.client().set_model_version_tag("spoilt", "2", "val/mask_AP", "high")
    with pytest.raises(ValueError, match="version 2 of spoilt has the tag val/mask_AP 'high', which is no number"):
        promote("spoilt", 2)
    assert "high" in table(list_versions("spoilt"))


def test_other_aliases_have_a_previous_of_their_own() -> None:
    make("staged", 0.5, 0.6)
    for version in (1, 2):
        promote("staged", version, "staging")
    assert aliases("staged") == {"staging": "2", "previous-staging": "1"}
    rollback("staged", "staging")
    assert aliases("staged") == {"staging": "1"}
    with pytest.raises(ValueError, match="alias is 'previous', but"):
        promote("staged", 2, "previous")
    for bad in ("latest", "v1", "a/b", ""):
        with pytest.raises(ValueError, match="alias"):
            promote("staged", 2, bad)
    assert aliases("staged") == {"staging": "1"}


def test_rollback_goes_back_one_promotion() -> None:
    make("rolled", 0.4, 0.5, 0.6)
    for version in (1, 2, 3):
        promote("rolled", version)
    assert str(rollback("rolled")) == "models:/rolled@champion is version 2 now, it was 3"
    assert aliases("rolled") == {"champion": "2"}
    assert tracking.client().get_model_version("rolled", "3").tags[ROLLED_BACK_TAG] == "champion"
    with pytest.raises(ValueError, match=r"rolled has no previous version to go back to.*\[3, 2, 1\].*'champion': '2'"):
        rollback("rolled")
    promote("rolled", 3)
    assert aliases("rolled") == {"champion": "3", "previous": "2"}
    tracking.client().delete_model_version("rolled", "2")
    with pytest.raises(ValueError, match=r"or that one was deleted; rolled has the versions \[3, 1\]"):
        rollback("rolled")
    assert aliases("rolled") == {"champion": "3"}
    with pytest.raises(ValueError, match="there is no model unknown"):
        rollback("unknown")


def test_rollback_from_a_champion_that_was_deleted() -> None:
    make("gone", 0.4, 0.5)
    for version in (1, 2):
        promote("gone", version)
    tracking.client().delete_model_version("gone", "2")
    assert str(rollback("gone")) == "models:/gone@champion is version 1 now"
    assert aliases("gone") == {"champion": "1"}


def test_a_promotion_that_was_killed_between_its_aliases() -> None:
    make("torn", 0.4, 0.5)
    promote("torn", 1)
    tracking.client().set_registered_model_alias("torn", "previous", "1")  # the first of two
    with pytest.raises(ValueError, match="no previous version to go back to"):
        rollback("torn")
    promote("torn", 2)
    assert aliases("torn") == {"champion": "2", "previous": "1"}


def test_who_promotes_at_the_same_time_is_measured_with_the_new_champion(monkeypatch: pytest.MonkeyPatch) -> None:
    make("contested", 0.4, 0.6, 0.5)
    promote("contested", 1)

    def judge_while_another_promotes(*arguments: Any) -> Objection | None:
        monkeypatch.undo()
        promote("contested", 2)
        return objection(*arguments)

    monkeypatch.setattr("jobs.registry.objection", judge_while_another_promotes)
    with pytest.raises(ValueError, match=r"0\.5000, the champion, version 2, has 0\.6000"):
        promote("contested", 3)
    assert aliases("contested") == {"champion": "2", "previous": "1"}


def test_the_list_of_versions(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    make("listed", *[0.1] * 9, 0.6)
    make("listed", 0.9, digest="0123456789abcdef")
    make("it's", 0.5)  # a name that is hard to search for
    for version in (1, 10):
        promote("listed", version)
    promote("listed", 10, "latest-good")
    monkeypatch.setattr("jobs.registry_store.PAGE", 2)  # as if there were thousands
    assert main(["models", "list", "--name", "listed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == [
        "models:/listed",
        "  version  aliases                mask AP  box AP  measured on   made              run",
    ]
    assert [int(line.split()[0]) for line in lines[2:]] == list(range(11, 0, -1))
    assert re.fullmatch(r" +10 +champion, latest-good +0\.6000 +0\.7000 +d1 +\d{4}-\d\d-\d\d \d\d:\d\d +tour", lines[3])
    assert "0.9000   1.0000  0123456789ab  " in lines[2]
    assert main(["models", "list"]) == 0
    out = capsys.readouterr().out
    assert "\n\nmodels:/listed\n" in out
    assert out.startswith("models:/")
    assert "models:/it's\n" in out
    assert main(["models", "list", "--name", "no such"]) == 2
    assert "there is no model no such: MLflow at " in capsys.readouterr().err


def test_an_error_names_the_newest_of_many_versions() -> None:
    make("many", *[0.1] * 25)
    with pytest.raises(ValueError, match=r"many has the versions \[25, 24, .*, 7, 6\] and 5 more and the aliases \{\}"):
        promote("many", 26)


def test_an_empty_registry_is_said_in_a_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    assert main(["models", "list"]) == 0
    assert capsys.readouterr().out == "no model is registered: make one with mrcnn register\n"


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    def run(line: str) -> str:
        code = main(line.split())
        out, err = capsys.readouterr()
        assert len(err.splitlines()) == (code != 0), err
        return f"{code} {out}{err}"

    make("typed", 0.5, 0.4)
    assert run("promote --name typed --version 1") == "0 models:/typed@champion is version 1 now\n"
    assert run("promote --name typed --version 2").startswith("2 mrcnn: error: version 2 of typed has mask AP 0.4000")
    assert "is version 2 now, it was 1\nforced, although" in run("promote --name typed --version 2 --force")
    assert run("rollback --name typed") == "0 models:/typed@champion is version 1 now, it was 2\n"
    assert run("rollback --name typed").startswith("2 mrcnn: error: typed has no previous version")


@pytest.mark.parametrize(
    "line", ["register --run r --name n", "promote --name n --version 1", "rollback --name n", "models list"]
)
def test_mlflow_that_does_not_answer_is_a_plain_error(
    line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:hunter2@127.0.0.1:{port}")
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert f"MLflow (MLFLOW_TRACKING_URI: http://127.0.0.1:{port})" in err
    assert "hunter2" not in err
