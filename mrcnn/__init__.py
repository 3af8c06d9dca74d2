"""Mask R-CNN: the model, its operators, losses, weights and evaluation. Stands alone: no Ray, no MLflow.

Names are imported when they are first used (PEP 562): settings and categories alone don't cost the time that PyTorch
and torchvision take to start.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mrcnn.config import (
        BackboneConfig,
        InputConfig,
        KeypointConfig,
        MaskConfig,
        ModelConfig,
        RoIConfig,
        RPNConfig,
    )
    from mrcnn.model import MaskRCNN
    from mrcnn.preprocess import batch_images, network_images, resize_image, resized_size
    from mrcnn.structures import Category, Detections, ImageBatch, RunLengthMasks, Targets
    from mrcnn.weights import load_model, load_weights, save_model

_MODULES = {
    "mrcnn.config": (
        "BackboneConfig",
        "InputConfig",
        "KeypointConfig",
        "MaskConfig",
        "ModelConfig",
        "RPNConfig",
        "RoIConfig",
    ),
    "mrcnn.model": ("MaskRCNN",),
    "mrcnn.preprocess": ("batch_images", "network_images", "resize_image", "resized_size"),
    "mrcnn.structures": ("Category", "Detections", "ImageBatch", "RunLengthMasks", "Targets"),
    "mrcnn.weights": ("load_model", "load_weights", "save_model"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}

__all__ = [
    "BackboneConfig",
    "Category",
    "Detections",
    "ImageBatch",
    "InputConfig",
    "KeypointConfig",
    "MaskConfig",
    "MaskRCNN",
    "ModelConfig",
    "RPNConfig",
    "RoIConfig",
    "RunLengthMasks",
    "Targets",
    "batch_images",
    "load_model",
    "load_weights",
    "network_images",
    "resize_image",
    "resized_size",
    "save_model",
]

if not TYPE_CHECKING:  # to whom every name would be one of ours then

    def __getattr__(name: str) -> Any:
        if name not in _MODULE_OF:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return getattr(import_module(_MODULE_OF[name]), name)
