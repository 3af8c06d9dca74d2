"""The registered model as MLflow runs it: models from code, so that nothing is pickled.

MLflow copies this file beside the weights and executes it where the model is loaded, with this project
installed.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import pandas as pd
from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel

from mrcnn import Detections, load_model
from mrcnn.evaluation import coco_results
from pipelines.transforms import DecodeError, decode

ARTIFACT = "model"
"""Name of the artifact that is the folder with model.safetensors and config.json."""

_BASE64 = re.compile(rb"[A-Za-z0-9+/=\s]+")  # no image file is text


class MaskRCNNModel(PythonModel):
    """Images in, detections out."""

    def load_context(self, context: Any) -> None:
        """Load the weights once."""
        self.model = load_model(context.artifacts[ARTIFACT])

    def predict(
        self, context: Any, model_input: pd.DataFrame, params: dict[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """One entry for each image: its height, width and detections, best first.

        An image is the bytes of an image file, the same in base64, or a uint8 RGB array (H, W, 3); they are
        in a list, or in the only column of a frame, which MLflow makes of a list. A detection has label,
        category_id, category, score, box (x, y, width, height in pixels of the image) and, as far as the model finds
        them, rle (size, counts) and keypoints (x, y, score of each, in one list).
        """
        column = model_input.iloc[:, 0] if isinstance(model_input, pd.DataFrame) else model_input
        return [self._answer(found) for found in self.model.predict(list(_images(column)))]

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


def _images(column: Iterable[Any]) -> Iterable[np.ndarray]:
    for i, value in enumerate(column):
        yield value if isinstance(value, np.ndarray) else _decode(value, i)


def _decode(data: bytes | str, i: int) -> np.ndarray:
    """RGB of an image file, as `mrcnn predict` sees it. Raises ValueError with the place in the request."""
    content = data.encode() if isinstance(data, str) else data
    try:
        if _BASE64.fullmatch(content):  # MLflow's server hands some requests on as they came
            content = base64.decodebytes(content)
        return decode(content)
    except (binascii.Error, DecodeError) as error:
        raise ValueError(f"image {i} of the request is no image file, as bytes or base64: {error}") from error


set_model(MaskRCNNModel())
