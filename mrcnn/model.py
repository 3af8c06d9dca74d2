"""Mask R-CNN (arXiv 1703.06870v3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from mrcnn.backbone import Backbone
from mrcnn.boxes import clip_boxes
from mrcnn.config import ModelConfig
from mrcnn.inputs import check_image, check_images, check_proposals, check_sizes, check_targets
from mrcnn.preprocess import Normalize, network_images
from mrcnn.roi_heads import BoxResult, RoIHeads
from mrcnn.rpn import RPN, Proposals
from mrcnn.structures import Category, Detections, ImageBatch, Targets


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the one it was in, whatever happens."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


class MaskRCNN(nn.Module):
    """Backbone, region proposals, and heads for boxes, masks and keypoints.

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
        self.normalize = Normalize(config.input)
        self.backbone = Backbone(config.backbone)
        self.rpn_backbone = Backbone(config.backbone) if config.rpn.features == "own" else None
        self.rpn = RPN(self.backbone.channels, self.backbone.strides, config.rpn)
        self.roi_heads = RoIHeads(self.backbone.channels, self.backbone.roi_strides, config)

    def forward(self, images: ImageBatch, targets: Targets, proposals: Proposals | None = None) -> dict[str, Tensor]:
        """The losses of a batch: loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg, loss_mask, ...

        With the proposals of an RPN that was trained apart, only the detector's losses: the RPN is not run.

        Raises:
            ValueError: for images or targets that are not as structures.py describes them.
        """
        targets = self.check(images, targets)
        if proposals is not None:
            check_proposals(proposals.boxes, proposals.scores, proposals.valid, images)
        features = self.features(images)
        rpn_losses: dict[str, Tensor] = {}
        if proposals is None:
            proposals, rpn_losses = self.propose(images, targets, features=features)
        return {**rpn_losses, **self.roi_heads.losses(features, proposals, images.sizes, targets)}

    @torch.no_grad()
    def detect(self, images: ImageBatch, source_sizes: Sequence[tuple[int, int]]) -> list[Detections]:
        """Detections of each image, in pixels of its source size (height, width) before any resizing.

        Raises:
            ValueError: for images that are not as structures.py describes them, or source sizes that do not fit.
        """
        check_images(images)
        check_sizes("source_sizes", source_sizes, len(images.pixels))
        features = self.features(images)
        proposals, _ = self.propose(images, features=features)
        boxes = self.roi_heads.detect(features, proposals, images.sizes)
        return self.detections(features, boxes, images.sizes, source_sizes)

    def features(self, images: ImageBatch) -> list[Tensor]:
        """Feature levels of the detector."""
        return self._through(self.backbone, images)

    def propose(
        self, images: ImageBatch, targets: Targets | None = None, *, features: Sequence[Tensor] | None = None
    ) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals, and with targets the RPN's two losses. features: the detector's, where they are there already."""
        levels = self._rpn_features(images, features)
        height, width = images.pixels.shape[-2:]
        found: tuple[Proposals, dict[str, Tensor]] = self.rpn(levels, images.sizes, (height, width), targets)
        return found

    def rpn_losses(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        """The RPN's two losses alone, where it is trained apart: no proposals are made."""
        targets = self.check(images, targets)
        height, width = images.pixels.shape[-2:]
        return self.rpn.losses(self._rpn_features(images, None), (height, width), targets)

    def _rpn_features(self, images: ImageBatch, features: Sequence[Tensor] | None) -> Sequence[Tensor]:
        if self.rpn_backbone is not None:
            return self._through(self.rpn_backbone, images)
        return self.features(images) if features is None else features

    def _through(self, backbone: nn.Module, images: ImageBatch) -> list[Tensor]:
        pixels = self.normalize(images).contiguous(memory_format=torch.channels_last)
        return list(backbone(pixels))

    def check(self, images: ImageBatch, targets: Targets) -> Targets:
        """The targets, fit for use. Raises ValueError for images or targets that are not as structures.py has them."""
        check_images(images)
        keypoints = self.config.keypoint.num_keypoints
        check_targets(targets, images, num_classes=self.config.num_classes, num_keypoints=keypoints)
        return targets.with_zero_padding()

    @torch.no_grad()
    def detections(
        self,
        features: Sequence[Tensor],
        boxes: Sequence[BoxResult],
        sizes: Tensor,
        source_sizes: Sequence[tuple[int, int]],
    ) -> list[Detections]:
        """Masks and keypoints of final boxes in network pixels; everything in source pixels."""
        heads = self.roi_heads
        masks = heads.masks(features, boxes) if heads.mask_head is not None else [None] * len(boxes)
        keypoints = heads.keypoints(features, boxes) if heads.keypoint_head is not None else [None] * len(boxes)
        parts = zip(boxes, masks, keypoints, sizes.tolist(), source_sizes, strict=True)
        return [self.in_source_pixels(*part) for part in parts]

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
            raise ValueError(f"batch_size is {batch_size}, but must be at least 1: 1 or 2 suit most machines")
        for i, image in enumerate(images):
            check_image(image, f"images[{i}]")
        sizes = [(im.shape[0], im.shape[1]) for im in images] if source_sizes is None else source_sizes
        check_sizes("source_sizes", sizes, len(images))
        device = next(self.parameters()).device
        found: list[Detections] = []
        with evaluating(self):
            for start in range(0, len(images), batch_size):
                some = slice(start, start + batch_size)
                batch = network_images(images[some], self.config.input)
                found += self.detect(batch.to(device, non_blocking=True), sizes[some])
        return found

    def in_source_pixels(
        self,
        found: BoxResult,
        mask_probs: Tensor | None,
        keypoints: Tensor | None,
        size: Sequence[int],
        source_size: tuple[int, int],
    ) -> Detections:
        """What was found in one network image of size (height, width), in pixels of its source."""
        source = (int(source_size[0]), int(source_size[1]))
        scale_y, scale_x = source[0] / size[0], source[1] / size[1]
        boxes = found.boxes * found.boxes.new_tensor([scale_x, scale_y, scale_x, scale_y])
        if keypoints is not None:
            keypoints = keypoints * keypoints.new_tensor([scale_x, scale_y, 1.0])
            keypoints -= keypoints.new_tensor([1.0, 1.0, 0.0]) * self.config.keypoint.pixel_offset
        return Detections(
            boxes=clip_boxes(boxes[None], torch.tensor([source], device=boxes.device))[0],
            labels=found.labels,
            scores=found.scores,
            image_size=source,
            mask_probs=mask_probs,
            mask_threshold=self.config.mask.threshold,
            mask_paste=self.config.mask.paste,
            keypoints=keypoints,
        )
