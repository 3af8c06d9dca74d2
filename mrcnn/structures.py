"""The tensors that travel between the parts of the model.

Shape letters, here and in every tensor comment of this package:
B images, N ground-truth boxes of an image (padded), A anchors, P proposals, R RoIs of the batch,
D detections, C channels, H W height and width, K classes, M mask side, T runs of all masks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Category:
    """What one label means outside the model. `id` is the data set's own, perhaps with gaps."""

    id: int
    name: str


class _OnDevice:
    """`.to(device)` for a dataclass of tensors."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        def move(value: Any) -> Any:
            return value.to(device, non_blocking=non_blocking) if isinstance(value, Tensor) else value

        return type(self)(**{f.name: move(getattr(self, f.name)) for f in fields(self)})  # type: ignore[arg-type]


@dataclass(frozen=True)
class ImageBatch(_OnDevice):
    """Images of one batch, padded at the right and at the bottom to a common size."""

    pixels: Tensor
    """(B, 3, H, W) uint8 RGB; what lies beyond `sizes` is ignored."""
    sizes: Tensor
    """(B, 2) int64: height and width of each image before padding."""


@dataclass(frozen=True)
class RunLengthMasks(_OnDevice):
    """Binary masks of many instances as COCO run lengths, flattened: no bitmap is ever stored.

    A mask is read column by column (Fortran order) over its whole image; runs alternate 0, 1, 0, ...
    Instance i owns `ends[offsets[i]:offsets[i + 1]]`, each the running sum of its run lengths, so its last
    entry is height x width. An instance without a mask owns no runs and reads as empty.
    """

    ends: Tensor
    """(T,) int32"""
    offsets: Tensor
    """(instances + 1,) int64"""


@dataclass(frozen=True)
class Targets:
    """Ground truth of one batch, padded to the largest number N of objects in an image."""

    boxes: Tensor
    """(B, N, 4) float32 xyxy in pixels of the (resized) image"""
    labels: Tensor
    """(B, N) int64: 1..K, 0 where there is only padding"""
    iscrowd: Tensor
    """(B, N) bool: a crowd region; anchors and proposals in it are neither positive nor negative"""
    masks: RunLengthMasks
    """Of B x N instances in row-major order, over each image's size before padding"""
    seeds: Tensor
    """(B,) int64: one seed an image, from (seed, epoch, image id), which alone decides what is sampled from it"""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Targets:
        moved = {f.name: getattr(self, f.name).to(device, non_blocking=non_blocking) for f in fields(self)}
        return Targets(**moved)


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first, in pixels of the image that was given (its source size)."""

    boxes: Tensor
    """(D, 4) float32 xyxy"""
    labels: Tensor
    """(D,) int64, 1..K"""
    scores: Tensor
    """(D,) float32, 0..1"""
    mask_probs: Tensor
    """(D, M, M) float32: probability of the predicted class over each box"""
    image_size: tuple[int, int]
    """height, width"""
    mask_threshold: float = 0.5

    def __len__(self) -> int:
        return self.boxes.shape[0]

    @cached_property
    def masks(self) -> Tensor:
        """(D, H, W) bool over the whole image. Made when first asked for: 100 masks of 1333x800 are 107 MB."""
        from mrcnn.postprocess import paste_masks

        return paste_masks(self.mask_probs, self.boxes, self.image_size, threshold=self.mask_threshold)

    @cached_property
    def rles(self) -> list[dict[str, Any]]:
        """COCO run lengths of the masks: `[{"size": [H, W], "counts": bytes}, ...]`."""
        from mrcnn.postprocess import encode_masks

        return encode_masks(self.mask_probs, self.boxes, self.image_size, threshold=self.mask_threshold)

    def numpy(self) -> dict[str, np.ndarray]:
        """Boxes, labels and scores as arrays."""
        return {name: getattr(self, name).cpu().numpy() for name in ("boxes", "labels", "scores")}
