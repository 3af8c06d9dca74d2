"""Register, promote and fetch models in a real registry; and the pyfunc that it serves."""

from __future__ import annotations

import base64
import io
import json
import pickle
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import cloudpickle
import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from mlflow.models import Model
from model_runs import FakeTraining, metrics_of
from models import SMALL, small_model
from PIL import Image
from pycocotools import mask as coco_mask
from safetensors import safe_open

from jobs import tracking
from jobs.evaluations import Evaluations
from jobs.registry import (
    list_versions,
    promote,
    register,
    resolve_model,
)
from mrcnn import KeypointConfig, MaskConfig, MaskRCNN, save_model
from mrcnn.weights import model_from_files

NAME = "shapes"


@pytest.fixture(scope="module", autouse=True)
def _mlflow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")
        patch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
        yield


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    return small_model().eval()


@pytest.fixture(scope="module")
def training(model: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> FakeTraining:
    folder = tmp_path_factory.mktemp("run")
    save_model(model, folder / "model")
    return FakeTraining(folder / "model", folder / "runs")


@pytest.fixture(scope="module")
def versions(training: FakeTraining) -> dict[str, int]:
    """Versions by the name of their run: three on the same data, one on other data."""
    runs = {"good": (0.5, "d1"), "worse": (0.4, "d1"), "better": (0.6, "d1"), "elsewhere": (0.9, "d2")}
    for name, (mask_ap, digest) in runs.items():
        training.run(name, mask=mask_ap, digest=digest)
    return {name: register(name, NAME).version for name in runs}


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_a_version_tells_what_it_is(versions: dict[str, int]) -> None:
    assert list(versions.values()) == [1, 2, 3, 4]
    version = tracking.client().get_model_version(NAME, "1")
    measured = {key: float(value) for key, value in version.tags.items() if key.startswith("val/")}
    masks, boxes = ("AP", "AP50", "AP75"), ("AP", "AP50")
    assert measured == {f"val/mask_{name}": 0.5 for name in masks} | {f"val/box_{name}": 0.6 for name in boxes}
    assert version.tags[tracking.VAL_DIGEST_TAG] == "d1"
    assert (version.tags["mrcnn.run_name"], version.tags["mrcnn.step"]) == ("good", "4")
    assert len(version.tags["mrcnn.weights_sha256"]) == 64
    for words in ("run `good`, step 4", "digest `d1`", "| mask AP | 0.5000 |", "| 1 | 1 | 1 | 0.4500 |", "s3://bucket"):
        assert words in version.description, words
    run = tracking.find_run("good")
    assert version.run_id == run.info.run_id
    assert run.info.status == "FINISHED"


def test_mlflows_page_of_the_model_has_settings_and_numbers(versions: dict[str, int]) -> None:
    source = tracking.client().get_model_version(NAME, "1").source
    logged = tracking.client().get_logged_model(source.removeprefix("models:/"))
    run = tracking.find_run("good")
    assert (logged.experiment_id, logged.source_run_id) == (run.info.experiment_id, run.info.run_id)
    assert logged.params["steps"] == "4"
    assert {metric.key: metric.value for metric in logged.metrics}["val/mask_AP"] == 0.5
    assert logged.tags[tracking.VAL_DIGEST_TAG] == "d1"
    history = tracking.client().get_metric_history(run.info.run_id, "val/mask_AP")
    assert len(history) == 1  # that the model has it, too, is no second point in the run's chart


def test_the_files_of_a_version(versions: dict[str, int], tmp_path: Path) -> None:
    """What a model is, in files that anything can read; nothing is pickled."""
    mlflow.artifacts.download_artifacts(f"models:/{NAME}/1", dst_path=str(tmp_path))
    files = {str(file.relative_to(tmp_path)): file for file in tmp_path.rglob("*") if file.is_file()}
    assert set(files) - {"registered_model_meta"} == {
        "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "pyfunc_model.py", "input_example.json",
        "serving_input_example.json", "artifacts/model/model.safetensors", "artifacts/model/config.json",
        "artifacts/model/label_map.json", "artifacts/model/preprocessing.json", "artifacts/model/evaluation.json",
    }  # fmt: skip
    for name, file in files.items():
        start = file.read_bytes()[:2]
        assert start[:1] != b"\x80", f"{name} is a pickle"
        assert start not in (b"PK", b"\x1f\x8b"), f"{name} is an archive, in which a pickle could be"
    assert safe_open(files["artifacts/model/model.safetensors"], "pt").keys()
    assert Model.load(str(tmp_path)).signature.inputs.to_dict() == [{"type": "binary", "required": True}]
    contents = {name: json.loads(file.read_text()) for name, file in files.items() if name.endswith(".json")}
    labels = contents["artifacts/model/label_map.json"]
    assert labels[2] == {"label": 3, "category_id": 3, "name": "3", "keypoints": []}
    assert contents["artifacts/model/preprocessing.json"]["shorter_side"] == 96
    evaluation = contents["artifacts/model/evaluation.json"]
    assert (evaluation["step"], evaluation["data_digest"], evaluation["data"]) == (4, "d1", "s3://bucket/val")
    assert evaluation["metrics"]["val/mask_AP75"] == 0.5
    assert evaluation["per_category"]["2"]["mask_AP"] == pytest.approx(0.55)


def test_loading_unpickles_nothing(versions: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("something is unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (cloudpickle, "load"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    assert mlflow.pyfunc.load_model(f"models:/{NAME}/1").predict([png(40, 50)])


def test_the_same_model_of_a_run_is_registered_once(training: FakeTraining, versions: dict[str, int]) -> None:
    again = register("good", NAME)
    assert (again.version, again.is_new, again.uri) == (1, False, "models:/shapes/1")
    other = register("good", "others")
    assert (other.version, other.is_new) == (1, True)
    found = metrics_of(mask=0.51)  # the run went on, or was evaluated again
    assert found is not None
    Evaluations(str(training.root / "good")).add(8, found, newest=8)
    assert register("good", "others").version == 2


def test_a_version_is_fetched_by_number_and_by_alias(versions: dict[str, int], training: FakeTraining) -> None:
    tracking.client().set_registered_model_alias(NAME, "mine", "2")
    here = resolve_model(str(training.model))
    assert here.version is None
    for uri, version in (
        (f"models:/{NAME}/1", "models:/shapes/1"),
        (f"models:/{NAME}@mine", "models:/shapes/2"),
    ):
        there = resolve_model(uri)
        assert (there.uri, there.version) == (uri, version)
        assert there.sha256 == here.sha256
    assert [c.name for c in model_from_files(here.files, "here").categories] == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        (f"models:/{NAME}/77", r"has the versions \[4, 3, 2, 1\]"),
        (f"models:/{NAME}@nobody", "shapes@nobody does not exist: shapes has the versions"),
        ("models:/other@champion", r"has the models \[.*'shapes'"),
        ("models:shapes", "write models:/NAME@ALIAS"),
        ("models:/shapes/latest", "write models:/NAME@ALIAS"),
    ],
)
def test_an_unknown_model_is_refused_with_what_there_is(versions: dict[str, int], uri: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve_model(uri)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors"):
        resolve_model(str(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        resolve_model(str(tmp_path / "nowhere"))


def test_what_cannot_be_registered(training: FakeTraining) -> None:
    training.run("unfinished")
    with pytest.raises(
        ValueError, match=r"'unfinished' .* has no evaluated model: .*runs/unfinished has no evaluation"
    ):
        register("unfinished", NAME)
    training.run("lost", mask=0.5)
    shutil.rmtree(training.root / "lost/model")
    with pytest.raises(FileNotFoundError, match="lost/model"):
        register("lost", NAME)
    training.run("blind", mask=float("nan"))
    with pytest.raises(ValueError, match="on data with nothing to find"):
        register("blind", NAME)
    training.run("torn", mask=0.5)
    (training.root / "torn/model/config.json").unlink()
    (training.root / "torn/model/config.json").write_text("{}")
    with pytest.raises(ValueError, match="is not of format"):
        register("torn", "empty")
    with pytest.raises(ValueError, match=r"there is no model empty"):  # nothing is begun that cannot be ended
        list_versions("empty")
    with pytest.raises(ValueError, match="no run is named 'nobody'"):
        register("nobody", NAME)


def test_the_numbers_of_an_earlier_step_are_not_the_models(training: FakeTraining) -> None:
    """MLflow has val/mask_AP of step 4, but the model is of step 8, whose evaluation has failed."""
    run = training.run("half blind", mask=0.5)
    Evaluations(str(training.root / "half blind")).add_failure(8, "the disk was full", newest=8)
    assert tracking.client().get_run(run).data.metrics["val/mask_AP"] == 0.5
    with pytest.raises(ValueError, match=r"step 8, its last one, could not be evaluated \(the disk was full\).*--best"):
        register("half blind", NAME)


@pytest.mark.parametrize("name", ["a/b", "a:b", "", " a", "a@b", "it's", "-a", "a\nb", "a%20b"])
def test_names_that_no_uri_holds_are_refused(name: str, versions: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="but may have letters, digits"):
        register("good", name)


def test_a_name_may_have_spaces_and_letters_of_any_language(versions: dict[str, int]) -> None:
    name = "Äpfel und Birnen-1.0"
    promote(name, register("good", name).version)
    assert resolve_model(f"models:/{name}@champion").version == f"models:/{name}/1"
    assert [version.aliases for version in list_versions(name)] == [("champion",)]


def test_the_best_checkpoint_can_be_registered(training: FakeTraining) -> None:
    """With its own numbers, not those of the last step."""
    training.run("falling", mask=0.2)
    with pytest.raises(ValueError, match=r"'falling' .* has no evaluated model"):
        register("falling", "best", best=True)
    checkpoint = training.best("falling", mask=0.7, digest="d3")
    version = tracking.client().get_model_version("best", str(register("falling", "best", best=True).version))
    assert (version.tags["val/mask_AP"], version.tags["mrcnn.step"]) == ("0.7", "2")
    assert version.tags[tracking.MODEL_URI_TAG] == str(checkpoint)
    assert version.tags[tracking.VAL_DIGEST_TAG] == "d3"
    assert tracking.BEST_TAG not in version.tags
    (checkpoint / "evaluation.json").write_text(json.dumps({"step": 2, "failure": "too dark"}))
    with pytest.raises(ValueError, match="too dark"):
        register("falling", "best", best=True)


def test_the_last_step_that_is_the_best_one_is_one_version(training: FakeTraining) -> None:
    training.run("rising", mask=0.5)
    training.best("rising", mask=0.5, digest="d1", step=4)
    assert [register("rising", "risen", best=best).version for best in (False, True)] == [1, 1]


def test_credentials_do_not_get_into_a_version(training: FakeTraining, tmp_path: Path) -> None:
    training.run("secret", mask=0.5)
    run = tracking.find_run("secret").info.run_id
    tracking.client().set_tag(run, "mrcnn.mirror", "https://ada:hunter2@example.org/x")  # not by us
    made = register("secret", "secrets")
    version = tracking.client().get_model_version("secrets", "1")
    assert version.tags["mrcnn.mirror"] == "https://example.org/x"
    mlflow.artifacts.download_artifacts(made.uri, dst_path=str(tmp_path))
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hunter2" in file.read_bytes()]


def test_a_model_without_masks(tmp_path: Path) -> None:
    name = "dots"
    torch.manual_seed(0)
    keypoint = KeypointConfig(num_keypoints=3, convs=1, channels=16)
    save_model(MaskRCNN(replace(SMALL, mask=MaskConfig(head="none"), keypoint=keypoint)).eval(), tmp_path / "model")
    FakeTraining(tmp_path / "model", tmp_path / "runs").run("dots", keypoints=0.3, box=0.5)
    register("dots", name)
    version = tracking.client().get_model_version(name, "1")
    assert {key for key in version.tags if key.startswith("val/")} == {
        "val/keypoint_AP", "val/keypoint_AP50", "val/box_AP", "val/box_AP50",
    }  # fmt: skip
    assert "| label | category id | name | keypoint AP | box AP |" in version.description
    (answer,) = mlflow.pyfunc.load_model(f"models:/{name}/1").predict([png(64, 90)])
    assert answer["detections"]
    assert all(len(each["keypoints"]) == 9 and "rle" not in each for each in answer["detections"])


def test_the_pyfunc_finds_what_the_model_finds(versions: dict[str, int], model: MaskRCNN) -> None:
    served = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    data = png(64, 90)
    (answer,) = served.predict([data])
    (expected,) = model.predict([np.array(Image.open(io.BytesIO(data)))])
    assert (answer["height"], answer["width"]) == (64, 90)
    assert len(answer["detections"]) == len(expected) > 0
    first = answer["detections"][0]
    x1, y1, x2, y2 = expected.boxes[0].tolist()
    assert first["box"] == pytest.approx([x1, y1, x2 - x1, y2 - y1], abs=1e-4)
    assert first["score"] == pytest.approx(float(expected.scores[0]))
    assert first["category"] == str(first["label"]) == str(first["category_id"])
    assert coco_mask.area(first["rle"]) == coco_mask.area(expected.rles[0])


def test_the_pyfunc_takes_frames_base64_and_arrays(versions: dict[str, int]) -> None:
    served = mlflow.pyfunc.load_model(f"models:/{NAME}/1")
    data = png(40, 50)
    frame = served.predict(pd.DataFrame({"image": [data, data]}))
    text = base64.encodebytes(data).decode()
    plain = served.unwrap_python_model().predict(None, [text, np.zeros((30, 20, 3), np.uint8)])
    assert [answer["height"] for answer in [*frame, *plain]] == [40, 40, 40, 30]
    assert frame[0]["detections"] == plain[0]["detections"]
    with pytest.raises(ValueError, match="image 1 of the request is no image file"):
        served.predict([data, b"text"])
