"""The registry of a real MLflow server, and `mlflow models serve` of what is in it, asked over HTTP."""

from __future__ import annotations

import base64
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from model_runs import FakeTraining
from models import small_model
from PIL import Image

from jobs.cli import main
from jobs.registry import list_versions, promote, register, resolve_model, rollback
from mrcnn import save_model

START_SECONDS = 120.0


@pytest.fixture(scope="module", autouse=True)
def _mlflow(mlflow_server: int) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow_server}")
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        yield


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> str:
    """URI of a champion on the server; there were others."""
    folder = tmp_path_factory.mktemp("served")
    save_model(small_model().eval(), folder / "model")
    training = FakeTraining(folder / "model", folder / "runs")
    for run, mask, digest in (("first", 0.5, "d1"), ("second", 0.6, "d1"), ("other data", 0.7, "d2")):
        training.run(run, mask=mask, digest=digest)
        register(run, "remote")
    promote("remote", 1)
    promote("remote", 2)
    return "models:/remote@champion"


@pytest.fixture(scope="module")
def server(champion: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of the champion's own server."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    words = ["models", "serve", "-m", champion, "--env-manager", "local", "--host", "127.0.0.1", "--port", str(port)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # it starts uvicorn by its name
    environment = {**os.environ, "PATH": path}
    log = tmp_path_factory.mktemp("serve") / "serve.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words], stdout=file, stderr=file, env=environment, start_new_session=True
        )
    try:
        _wait_until_it_answers(process, f"http://127.0.0.1:{port}/ping", log)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _wait_until_it_answers(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()
        with suppress(OSError):
            urllib.request.urlopen(url).close()
            return
        time.sleep(0.2)
    raise TimeoutError(f"no server after {START_SECONDS} s: {log.read_text()}")


def ask(url: str, body: dict[str, Any]) -> tuple[int, Any]:
    """Status and JSON of the answer."""
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_the_registry_of_a_server(champion: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert resolve_model(champion).version == "models:/remote/2"
    assert register("second", "remote").is_new is False
    found = {version.number: version for version in list_versions("remote")}
    assert {number: version.aliases for number, version in found.items()} == {1: ("previous",), 2: ("champion",), 3: ()}
    assert found[2].tags["val/mask_AP"] == "0.6"
    assert main(["promote", "--name", "remote", "--version", "3"]) == 2
    assert "0.7000 on the validation data d2, the champion, version 2, has 0.6000 on d1" in capsys.readouterr().err
    for change in (lambda: rollback("remote"), lambda: promote("remote", 2)):
        change()
    assert resolve_model(champion).version == "models:/remote/2"
    with pytest.raises(ValueError, match=r"models:/remote@nobody does not exist: remote has the versions \[3, 2, 1\]"):
        resolve_model("models:/remote@nobody")
    assert main(["models", "list", "--name", "nothing"]) == 2
    assert "there is no model nothing" in capsys.readouterr().err


def test_detections_over_http(server: str, champion: str) -> None:
    small, large = png(64, 90), png(100, 70)
    expected = json.loads(json.dumps(mlflow.pyfunc.load_model(champion).predict([small, large])))
    assert [len(answer["detections"]) > 0 for answer in expected] == [True, True]
    assert expected[1]["detections"][0]["rle"]["size"] == [100, 70]
    first, second = (base64.b64encode(data).decode() for data in (small, large))
    bodies: list[dict[str, Any]] = [
        {"inputs": [first, second]},
        {"instances": [first, second]},
        {"dataframe_split": {"columns": ["image"], "data": [[first], [second]]}},
        {"dataframe_records": [{"image": first}, {"image": second}]},
    ]
    for body in bodies:
        assert ask(server, body) == (200, {"predictions": expected}), next(iter(body))


@pytest.mark.parametrize("content", ["hello", "", "R0lGODlhAQABAIAAAAUEBA==", "file:///etc/passwd"])
@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_what_is_no_image_is_refused_in_plain_words(server: str, key: str, content: str) -> None:
    status, answer = ask(server, {key: [base64.b64encode(png(9, 9)).decode(), content]})
    assert status == 400
    assert len(json.dumps(answer)) < 400
    assert "Traceback" not in json.dumps(answer)
    if key == "inputs":
        assert "image 1 of the request is no image file, as bytes or in base64" in answer["message"]


@pytest.mark.parametrize(
    "body", [{}, {"images": ["x"]}, {"inputs": [5]}, {"inputs": ["é"]}, {"inputs": [{"image": "x"}]}, {"inputs": []}]
)
def test_a_request_of_another_form_is_refused(server: str, body: dict[str, Any]) -> None:
    status, answer = ask(server, body)
    assert status == 400
    assert answer["message"]
    assert "Traceback" not in json.dumps(answer)


@pytest.mark.parametrize("key", ["inputs", "instances"])
def test_a_url_is_never_fetched(server: str, key: str) -> None:
    asked = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.5)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/i.png"

        def listen() -> None:
            with suppress(TimeoutError, OSError):
                asked.append(listener.accept())

        thread = threading.Thread(target=listen)
        thread.start()
        status, answer = ask(server, {key: [url]})
        thread.join()
    assert (status, asked) == (400, [])
    if key == "inputs":
        assert "URLs are not opened" in answer["message"]
