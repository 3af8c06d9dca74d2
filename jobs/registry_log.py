"""A model as MLflow stores it: files, and a pyfunc made from code with its signature and an example."""

from __future__ import annotations

import io
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version as installed_version
from pathlib import Path

import mlflow
from mlflow.entities import Run
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property
from PIL import Image

from jobs import tracking

PYFUNC = Path(__file__).with_name("pyfunc_model.py")
ARTIFACT = "model"  # as in pyfunc_model.py
REQUIREMENTS = (
    "mrcnn-on-ray",
    "torch",
    "torchvision",
    "numpy",
    "pandas",
    "pillow",
    "pycocotools",
    "safetensors",
)

logging.getLogger("mlflow.pyfunc").setLevel(logging.WARNING)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # MLflow warns of type hints of its own
    import mlflow.pyfunc


def log_model(files: Mapping[str, bytes], *, run: Run, step: int, tags: Mapping[str, str]) -> str:
    """Put the files and the pyfunc into MLflow as a model of the run, with the run's settings and what it has logged at
    the step. Returns MLflow's id of it."""
    mlflow.set_tracking_uri(tracking.tracking_uri())
    mlflow.set_experiment(experiment_id=run.info.experiment_id)
    with tempfile.TemporaryDirectory(prefix="mrcnn-") as temporary:
        folder = Path(temporary, ARTIFACT)
        folder.mkdir()
        for name, data in files.items():
            (folder / name).write_bytes(data)
        with _no_bytecode():
            logged = Model.log(
                artifact_path=None,
                name=ARTIFACT,
                flavor=mlflow.pyfunc,
                run_id=run.info.run_id,
                step=step,
                tags=dict(tags),
                python_model=str(PYFUNC),
                artifacts={ARTIFACT: str(folder)},
                signature=_signature(),
                input_example=[_example_image()],
                # given, because MLflow would otherwise run the model to find out
                pip_requirements=[f"{package}=={installed_version(package)}" for package in REQUIREMENTS],
            )
    return logged.model_id


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """MLflow runs the pyfunc's copy in the folder that it then stores, and Python would leave __pycache__ there."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


def _example_image() -> bytes:
    """A gray PNG; MLflow tries the model on it."""
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(file, "png")
    return file.getvalue()


def _signature() -> ModelSignature:
    """Of jobs/pyfunc_model.py: image files in; size and detections out."""
    rle = Object([Property("size", Array(DataType.long)), Property("counts", DataType.string)])
    detection = Object(
        [
            Property("label", DataType.long),
            Property("category_id", DataType.long),
            Property("category", DataType.string),
            Property("score", DataType.double),
            Property("box", Array(DataType.double)),
            Property("rle", rle, required=False),
            Property("keypoints", Array(DataType.double), required=False),
        ]
    )
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary)]),
        outputs=Schema(
            [
                ColSpec(DataType.long, "height"),
                ColSpec(DataType.long, "width"),
                ColSpec(Array(detection), "detections"),
            ]
        ),
    )
