"""The numerical oracles: weights by rule, four images, and what torchvision and detectron2 made of them.

The folder is found by MRCNN_ORACLE, else beside the repository; its README.md says what is in it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mrcnn import MaskRCNN
from mrcnn.weights import PeerModel, from_detectron2, from_torchvision

IMAGES = ("6818", "17627", "37777", "87038")
MODELS = (
    "tv_maskrcnn_r50_fpn",
    "tv_keypointrcnn_r50_fpn",
    "d2_mask_R_50_FPN",
    "d2_mask_R_50_C4",
    "d2_mask_R_101_FPN",
    "d2_mask_X_101_FPN",
    "d2_keypoint_R_50_FPN",
)
FULL = os.environ.get("MRCNN_ORACLE_FULL") == "1"
"""All images of all models, and all of what they store; minutes for each model."""


def oracle_folder() -> Path:
    """Where the oracles are; skips the test where they are not."""
    folder = Path(os.environ.get("MRCNN_ORACLE", Path(__file__).parents[2] / "shared/oracle"))
    if not (folder / "fill.py").exists():
        pytest.skip(f"no oracles at {folder}: set MRCNN_ORACLE")
    return folder


def read_json(name: str) -> dict[str, Any]:
    """A JSON file of the oracle folder."""
    data: dict[str, Any] = json.loads((oracle_folder() / name).read_text())
    return data


def read_npz(name: str) -> dict[str, np.ndarray]:
    """All arrays of an .npz file of the oracle folder."""
    with np.load(oracle_folder() / name) as arrays:
        return dict(arrays)


@cache
def fill_rule() -> ModuleType:
    """The oracle's own fill.py: weights from names and shapes."""
    spec = importlib.util.spec_from_file_location("oracle_fill", oracle_folder() / "fill.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def named_shapes(model: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a peer's state dict, in its order."""
    return {name: tuple(shape) for name, shape in read_json(f"{model}_names.json").items()}


def empty_state(model: str) -> dict[str, Tensor]:
    """A peer's state dict without any numbers: tensors of the meta device."""
    return {name: torch.empty(shape, device="meta") for name, shape in named_shapes(model).items()}


def filled_state(model: str) -> dict[str, Tensor]:
    """A peer's state dict with weights by rule, whose checksum is that of the weights the peer had."""
    known, digest = read_json("fill_checksums.json")[model], hashlib.sha256()
    state = {}
    for name, shape in named_shapes(model).items():
        values = fill_rule().fill(name, shape, known["stem_scale"])
        digest.update(values.tobytes())
        state[name] = torch.from_numpy(values)
    assert digest.hexdigest() == known["sha256_in_state_dict_order"], f"{model}: fill.py gives other numbers here"
    return state


def converted(model: str, norm_eps: float | None = 1e-5) -> PeerModel:
    """A peer's model with weights by rule as ours; norm_eps: of torchvision's frozen batch norm."""
    state = filled_state(model)
    return from_torchvision(state, norm_eps=norm_eps) if model.startswith("tv_") else from_detectron2(state)


def built(model: str, norm_eps: float | None = 1e-5) -> MaskRCNN:
    """The same, ready to detect."""
    return converted(model, norm_eps).build()


def image(image_id: str) -> np.ndarray:
    """An image of the oracle, (H, W, 3) uint8 RGB, to the bit as the peers saw it."""
    known = read_json("images.json")[image_id]
    with Image.open(oracle_folder() / known["file"]) as file:
        pixels = np.asarray(file.convert("RGB"))
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == known["sha256_rgb_uint8_hwc"], "another JPEG decoder"
    return pixels
