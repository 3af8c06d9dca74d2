"""The registered model as MLflow runs it: models from code, so that nothing is pickled.

MLflow copies this file beside the weights and executes it where the model is loaded, with this project
installed.
"""

from __future__ import annotations

import base64
import json
import re
from typing import Any

import numpy as np
import pandas as pd
import torch
from mlflow.exceptions import MlflowException
from mlflow.models import set_model
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc.model import PythonModel

from mrcnn import Detections, load_model
from mrcnn.evaluation import coco_results
from mrcnn.ops import cuda_compiled
from pipelines.transforms import decode

ARTIFACT = "model"
"""Name of the artifact that is the folder with model.safetensors and config.json."""

_BASE64 = re.compile(rb"[A-Za-z0-9+/=\s]+")  # no image file is text


class RefusedError(MlflowException, ValueError):
    """What is wrong with a request, in one line.

    After a ValueError MLflow's server would send a traceback, before the message of its own exception the whole
    request with its images.
    """

    def __init__(self, message: str) -> None:
        super().__init__(message, error_code=INVALID_PARAMETER_VALUE)

    def serialize_as_json(self) -> str:
        """What the server answers, with HTTP's 400."""
        return json.dumps({"error_code": self.error_code, "message": str(self)})


class MaskRCNNModel(PythonModel):
    """Images in, detections out."""

    def load_context(self, context: Any) -> None:
        """Load the weights once, to a GPU where there is one that the operators were built for."""
        on_gpu = torch.cuda.is_available() and cuda_compiled()
        self.model = load_model(context.artifacts[ARTIFACT], device="cuda" if on_gpu else "cpu")

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One entry for each image: its height, width and detections, best first.

        An image is the bytes of an image file, the same in base64, or a uint8 RGB array (H, W, 3); they are
        in a list, or in the only column of a frame, which MLflow makes of a list. A detection has label,
        category_id, category, score, box (x, y, width, height in pixels of the image) and, as far as the model finds
        them, rle (size, counts) and keypoints (x, y, score of each, in one list).

        Raises RefusedError for what is no image, with its place in the request. URLs and paths are never opened.
        """
        column = model_input.iloc[:, 0] if isinstance(model_input, pd.DataFrame) else model_input
        return [self._answer(self._find(value, i)) for i, value in enumerate(column)]

    def _find(self, value: Any, i: int) -> Detections:
        try:
            (found,) = self.model.predict([_pixels(value)])  # alone: no answer depends on what else was asked
        except ValueError as error:  # of base64, of `decode`, of the model
            raise RefusedError(
                f"image {i} of the request is no image file, as bytes or in base64 (URLs are not opened): {error}"
            ) from error
        return found

    def _answer(self, found: Detections) -> dict[str, Any]:
        height, width = found.image_size
        entries = zip(found.labels.tolist(), coco_results(0, found, self.model.categories), strict=True)
        return {"height": height, "width": width, "detections": [self._detection(*entry) for entry in entries]}

    def _detection(self, label: int, entry: dict[str, Any]) -> dict[str, Any]:
        names = {"segmentation": "rle", "keypoints": "keypoints"}
        return {
            "label": label,
            "category_id": entry["category_id"],
            "category": self.model.categories[label - 1].name,
            "score": entry["score"],
            "box": entry["bbox"],
            **{name: entry[key] for key, name in names.items() if key in entry},
        }


def _pixels(value: Any) -> np.ndarray:
    """RGB of an image file, as `mrcnn predict` sees it."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, bytes | str):
        raise ValueError(f"it is of type {type(value).__name__}")
    content = value.encode() if isinstance(value, str) else value
    if _BASE64.fullmatch(content):  # MLflow's server hands some requests on as they came
        content = base64.decodebytes(content)
    return decode(content)


set_model(MaskRCNNModel())
