"""Register, promote and fetch models in a real registry; and the pyfunc that it serves."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
from models import SMALL, small_model
from PIL import Image
from pycocotools import mask as coco_mask

from jobs import tracking
from jobs.registry import promote, register, resolve_model
from jobs.tracking_log import RunLogger
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
def folder(model: MaskRCNN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model as training leaves it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    save_model(model, folder)
    return folder


@pytest.fixture(scope="module")
def versions(folder: Path) -> dict[str, int]:
    """Versions by the name of their run: three on the same data, one on other data."""
    runs = {"good": (0.5, "d1"), "worse": (0.4, "d1"), "better": (0.6, "d1"), "elsewhere": (0.1, "d2")}
    for name, (mask_ap, digest) in runs.items():
        make_run(name, folder, mask_ap, digest)
    return {name: register(name, NAME) for name in runs}


def make_run(name: str, folder: Path, mask_ap: float | None, digest: str) -> str:
    tags = {tracking.MODEL_URI_TAG: str(folder), tracking.VAL_DIGEST_TAG: digest, "mrcnn.torch": "2"}
    handle = tracking.create_run(experiment="shapes", name=name, params={"steps": 4}, tags=tags)
    metrics = {} if mask_ap is None else {"val/mask_AP": mask_ap, "val/box_AP": mask_ap + 0.1}
    finish_run(handle, folder.parent, metrics)
    return handle.run_id


def finish_run(handle: tracking.RunHandle, folder: Path, metrics: dict[str, float]) -> None:
    logger = RunLogger(handle, str(folder / "runs" / handle.run_id))
    logger.metrics(metrics, step=4)
    logger.finish()
    logger.close()
    assert logger.unsent() is None


def alias(name: str) -> str:
    return str(tracking.client().get_model_version_by_alias(NAME, name).version)


def png(height: int, width: int) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def test_a_version_tells_what_it_is(versions: dict[str, int]) -> None:
    assert list(versions.values()) == [1, 2, 3, 4]
    version = tracking.client().get_model_version(NAME, "1")
    assert version.tags["val/mask_AP"] == "0.5"
    assert version.tags["val/box_AP"] == "0.6"
    assert version.tags[tracking.VAL_DIGEST_TAG] == "d1"
    assert len(version.tags["mrcnn.weights_sha256"]) == 64
    run = tracking.find_run("good")
    assert version.run_id == run.info.run_id
    assert run.info.status == "FINISHED"
    logged = tracking.client().get_logged_model(version.source.removeprefix("models:/"))
    assert logged.experiment_id == run.info.experiment_id


def test_a_version_is_fetched_by_number_and_by_alias(versions: dict[str, int], folder: Path) -> None:
    tracking.client().set_registered_model_alias(NAME, "mine", "2")
    here = resolve_model(str(folder))
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
        (f"models:/{NAME}/77", r"has the versions \[1, 2, 3, 4\]"),
        (f"models:/{NAME}@nobody", "shapes@nobody does not exist: shapes has the versions"),
        ("models:/other@champion", r"has the models \['shapes'\]"),
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


def test_what_cannot_be_registered(folder: Path, tmp_path: Path) -> None:
    make_run("unfinished", folder, None, "d1")
    with pytest.raises(ValueError, match=r"'unfinished' .* has no evaluated model"):
        register("unfinished", NAME)
    make_run("lost", tmp_path / "gone", 0.5, "d1")
    with pytest.raises(FileNotFoundError, match="gone"):
        register("lost", NAME)
    with pytest.raises(ValueError, match="Invalid model name"):
        register(make_run("fine", folder, 0.5, "d1"), "a/b")
    with pytest.raises(ValueError, match="no run is named 'nobody'"):
        register("nobody", NAME)


def test_the_best_checkpoint_can_be_registered(folder: Path, model: MaskRCNN, tmp_path: Path) -> None:
    """With its own numbers, not those of the last step."""
    make_run("falling", folder, 0.2, "d1")
    run = tracking.find_run("falling").info.run_id
    with pytest.raises(ValueError, match=r"'falling' .* has no evaluated model"):
        register("falling", NAME, best=True)
    checkpoint = tmp_path / "step-00000002"
    save_model(model, checkpoint)
    (checkpoint / "evaluation.json").write_text(json.dumps({"metrics": {"val/mask_AP": 0.7, "val/box_AP": None}}))
    tracking.client().set_tag(run, tracking.BEST_TAG, str(checkpoint))
    version = tracking.client().get_model_version(NAME, str(register("falling", NAME, best=True)))
    assert version.tags["val/mask_AP"] == "0.7"
    assert "val/box_AP" not in version.tags
    assert version.tags[tracking.MODEL_URI_TAG] == str(checkpoint)


def test_the_champion_gives_way_only_to_one_that_is_not_worse(versions: dict[str, int]) -> None:
    promote(NAME, versions["good"])
    with pytest.raises(ValueError, match=r"mask AP 0\.4000, the champion, version 1, has 0\.5000"):
        promote(NAME, versions["worse"])
    assert alias("champion") == "1"
    promote(NAME, versions["better"])
    assert (alias("champion"), alias("previous")) == ("3", "1")
    promote(NAME, versions["better"])  # again: nothing moves
    assert (alias("champion"), alias("previous")) == ("3", "1")
    promote(NAME, versions["elsewhere"])  # measured on other data
    promote(NAME, versions["worse"], force=True)
    assert (alias("champion"), alias("previous")) == ("2", "4")
    assert tracking.client().get_model_version(NAME, "2").tags["mrcnn.promoted_by_force"] == "champion"
    promote(NAME, versions["worse"], "staging")
    promote(NAME, versions["good"], "staging")
    assert (alias("staging"), alias("previous-staging"), alias("previous")) == ("1", "2", "4")
    with pytest.raises(ValueError, match="shapes/9 does not exist"):
        promote(NAME, 9)


def test_models_without_masks_compare_by_keypoints_or_boxes(tmp_path: Path) -> None:
    name = "dots"
    torch.manual_seed(0)
    keypoint = KeypointConfig(num_keypoints=3, convs=1, channels=16)
    model = MaskRCNN(replace(SMALL, mask=MaskConfig(head="none"), keypoint=keypoint)).eval()
    save_model(model, tmp_path)
    measured = {
        "boxes": {"val/box_AP": 0.5},
        "worse boxes": {"val/box_AP": 0.4},
        "keypoints": {"val/keypoint_AP": 0.3, "val/box_AP": 0.3},
        "worse keypoints": {"val/keypoint_AP": 0.2, "val/box_AP": 0.9},
    }
    versions = {}
    for run, metrics in measured.items():
        tags = {tracking.MODEL_URI_TAG: str(tmp_path), tracking.VAL_DIGEST_TAG: "d"}
        handle = tracking.create_run(experiment="dots", name=run, params={}, tags=tags)
        finish_run(handle, tmp_path, metrics)
        versions[run] = register(run, name)
    promote(name, versions["boxes"])
    with pytest.raises(ValueError, match=r"has box AP 0\.4000, the champion, version 1, has 0\.5000"):
        promote(name, versions["worse boxes"])
    promote(name, versions["keypoints"])  # finds more
    with pytest.raises(ValueError, match=r"has keypoint AP 0\.2000, the champion, version 3, has 0\.3000"):
        promote(name, versions["worse keypoints"])
    with pytest.raises(ValueError, match=r"has keypoint AP nan"):
        promote(name, versions["boxes"])
    assert tracking.client().get_model_version(name, "3").tags["val/keypoint_AP"] == "0.3"
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
