"""Mask R-CNN (arXiv 1703.06870v3)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from mrcnn.backbone import ResNetFPN
from mrcnn.boxes import clip_boxes
from mrcnn.config import ModelConfig
from mrcnn.preprocess import batch_images, normalize, resize_image, resized_size
from mrcnn.roi_heads import BoxResult, RoIHeads
from mrcnn.rpn import RPN
from mrcnn.structures import Category, Detections, ImageBatch, Targets


class MaskRCNN(nn.Module):
    """Backbone, region proposals, box and mask heads.

    Args:
        config: every setting
        categories: what labels 1..K mean, in their order; by default "1" .. "K"
    """

    def __init__(self, config: ModelConfig, categories: Sequence[Category] | None = None) -> None:
        super().__init__()
        if categories is None:
            categories = [Category(id=i, name=str(i)) for i in range(1, config.num_classes + 1)]
        if len(categories) != config.num_classes:
            raise ValueError(
                f"num_classes is {config.num_classes}, but there are {len(categories)} categories: make them equal"
            )
        self.config = config
        self.categories = tuple(categories)
        self.backbone = ResNetFPN(config.backbone)
        self.rpn = RPN(config.backbone.fpn_channels, config.rpn)
        self.roi_heads = RoIHeads(config.backbone.fpn_channels, config.num_classes, config.roi)

    def forward(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        """The losses of a batch: loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, loss_mask."""
        features = self.features(images)
        proposals, rpn_losses = self.rpn(features, images.sizes, targets)
        return {**rpn_losses, **self.roi_heads.losses(features, proposals, images.sizes, targets)}

    @torch.no_grad()
    def detect(self, images: ImageBatch, source_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections of each image, in pixels of its source size (height, width) before any resizing."""
        features = self.features(images)
        proposals, _ = self.rpn(features, images.sizes)
        boxes = self.roi_heads.detect(features, proposals, images.sizes)
        masks = self.roi_heads.masks(features, boxes)
        sizes = images.sizes.tolist()
        return [self._in_source_pixels(*one) for one in zip(boxes, masks, sizes, source_sizes, strict=True)]

    def features(self, images: ImageBatch) -> list[Tensor]:
        """P2..P6 of the normalised images."""
        pixels = normalize(images, self.config.input.mean, self.config.input.std)
        return self.backbone(pixels.contiguous(memory_format=torch.channels_last))

    def predict(
        self,
        images: Sequence[np.ndarray],
        *,
        source_sizes: Sequence[tuple[int, int]] | None = None,
        batch_size: int = 1,
    ) -> list[Detections]:
        """Detect objects in images, each (H, W, 3) uint8 RGB, of any size: they are resized here where they have to be.

        Images of a batch are padded together, which moves results a little, as in every Mask R-CNN; with
        batch_size 1 an image's result does not depend on the others.

        Args:
            images: what to look at
            source_sizes: (height, width) of the originals of images that were resized before; detections are in those
            batch_size: images that the network sees at a time

        Raises:
            ValueError: for an array of another shape or type.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1")
        for i, image in enumerate(images):
            check_image(image, f"images[{i}]")
        sizes = [(im.shape[0], im.shape[1]) for im in images] if source_sizes is None else source_sizes
        device = next(self.parameters()).device
        was_training = self.training
        self.eval()
        found: list[Detections] = []
        for start in range(0, len(images), batch_size):
            some = slice(start, start + batch_size)
            network_images = [self._network_image(image) for image in images[some]]
            batch = batch_images(network_images, size_divisor=self.config.input.size_divisor)
            found += self.detect(batch.to(device, non_blocking=True), sizes[some])
        self.train(was_training)
        return found

    def _network_image(self, image: np.ndarray) -> np.ndarray:
        bounds = self.config.input
        height, width = image.shape[:2]
        size = resized_size(height, width, shorter_side=bounds.shorter_side, longer_side=bounds.longer_side)
        return resize_image(image, *size)

    def _in_source_pixels(
        self, found: BoxResult, mask_probs: Tensor, size: Sequence[int], source_size: tuple[int, int]
    ) -> Detections:
        source = (int(source_size[0]), int(source_size[1]))
        scale_y, scale_x = source[0] / size[0], source[1] / size[1]
        boxes = found.boxes * found.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        return Detections(
            boxes=clip_boxes(boxes[None], torch.tensor([source], device=boxes.device))[0],
            labels=found.labels,
            scores=found.scores,
            mask_probs=mask_probs,
            image_size=source,
            mask_threshold=self.config.roi.mask_threshold,
        )


def check_image(image: np.ndarray, name: str) -> None:
    """Raise ValueError unless image is (H, W, 3) uint8 with pixels in it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{name} is {kind}, but must be a uint8 array: give RGB values of 0..255")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {image.shape}, but must be (height, width, 3): give an RGB image")
