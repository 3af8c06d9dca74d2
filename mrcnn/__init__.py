"""Mask R-CNN: the model, its operators, losses, weights and evaluation. Stands alone: no Ray, no MLflow."""

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
