"""The command line: words, help, and one clear line for what a user got wrong."""

from pathlib import Path

import pytest

from jobs.cli import COMMANDS, main
from jobs.presets import PRESETS


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    try:
        code = main(words)
    except SystemExit as end:  # tyro's own way to end after help and after a flag that it does not know
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, command, "--help")
    assert code == 0
    assert f"mrcnn {command}" in out


def test_a_presets_help_shows_its_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "train", "toy", "--help")
    assert code == 0
    for words in (
        "--data",
        "--val-data",
        "--resume",
        "--model.backbone.name",
        "--optimizer.base-lr",
        "resnet18",
    ):
        assert words in out, words


TRAIN = ("--val-data", "v", "--storage", "s", "--run", "r")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("build-data", "--images", "no/such", "--annotations", "none.json", "--out", "o"), "no/such"),
        (("build-data", "--images", "foo://x/y", "--annotations", "foo://x/a.json", "--out", "o"), "foo"),
        (("train", "toy", "--data", "no/such", *TRAIN), "no/such"),
        (
            ("train", "toy", "--data", "d", "--val-data", "v", "--storage", "s", "--run", "a/b"),
            "run is 'a/b'",
        ),
        (("train", "toy", "--data", "d", *TRAIN, "--optimizer.momentum", "2"), "momentum is 2.0"),
        (("evaluate", "--model", "no/model", "--data", "no/data"), "no/"),
        (("predict", "--model", "no/model", "--images", "no/images", "--out", "o"), "no/"),
        (("toy-data", "--out", "t", "--images", "-1"), "-1"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    code, out, err = run(capsys, *words)
    assert code == 2, (out, err)
    assert message in err + out
    assert "Traceback" not in err + out


@pytest.mark.parametrize("content", ["", "{", '{"images": []}', "[1, 2]", '"' * 9, "[" * 100_000])
def test_annotations_that_are_not_coco(
    ray_cluster: None, content: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "a.json").write_text(content)
    code, _, err = run(
        capsys, "build-data", "--images", str(tmp_path), "--annotations", str(tmp_path / "a.json"), "--out", "o"
    )
    assert code == 2
    assert "a.json" in err
    assert len(err.strip().splitlines()) == 1


def test_an_unknown_preset_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "train", "r50", "--data", "d")
    assert (code, out) == (2, "")
    assert err == f"mrcnn: error: 'r50' is no preset: take one of {', '.join(PRESETS)}\n"


@pytest.mark.parametrize(
    "words",
    [("train", "r50"), ("train", "toy", "--data", "d", *TRAIN, "--optimizer.base-lrr", "1"), ("trian",), ()],
)
def test_what_does_not_exist_is_refused(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, _ = run(capsys, *words)
    assert code == 2


def test_a_folder_without_shards_is_told_before_ray_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.cluster.ray_session", pytest.fail)
    code, _, err = run(capsys, "verify-data", str(tmp_path))
    assert (code, len(err.splitlines())) == (2, 1)
    assert str(tmp_path) in err


def test_short_memory_is_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def short(words: list[str]) -> None:
        raise MemoryError("of the test")

    monkeypatch.setattr("jobs.cli.parse", short)
    assert main(["verify-data", "a"]) == 1
    assert capsys.readouterr().err.startswith("mrcnn: error: memory is short (of the test): give ")


def test_secrets_in_words_that_are_wrong_are_not_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """A parser of command lines shows them as they are."""
    login, signed = "s3://KEY:SECRET@bucket/x", "https://host.example/a?sig=SECRET"
    for words in (
        ["--imags", login, "--out", "o"], ["--images", "a", "--out", "o", "--max-reject-share", login],
        ["--images", "a", "--out", "o", "--format", signed],
        ["--imags", "az://host.example/x?sig=SECRET", "--out", "o"],
    ):  # fmt: skip
        with pytest.raises(SystemExit) as raised:
            main(["build-data", *words])
        assert raised.value.code == 2
        told = capsys.readouterr()
        assert "SECRET" not in told.err + told.out
        assert "bucket/x" in told.err or "host.example" in told.err
    shared = tmp_path / "shared.json?sig=SECRET"  # read as a file; without what signs an address it is none
    shared.write_text("{}")
    with pytest.raises(SystemExit):
        main(["train", "--config", str(shared), "--trian-data", login])
    told = capsys.readouterr()
    assert "SECRET" not in told.err + told.out
    assert told.err == "mrcnn: error: the words are wrong, and not shown, for there are secrets in them\n"


def test_what_signs_a_web_address_is_not_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    address = "http://127.0.0.1:9/data?token=SECRET"
    assert main(["verify-data", address]) == 2
    command = ["build-data", "--annotations", f"{address}/coco.json", "--out", str(tmp_path / "out"), "--images"]
    for images in (str(tmp_path), address):
        assert main([*command, images]) == 2
    told = capsys.readouterr().err
    assert told.count("http://127.0.0.1:9/data") == 3
    assert "has a query, which would be stored with each image" in told
    assert "SECRET" not in told
