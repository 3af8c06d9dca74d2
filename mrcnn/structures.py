"""The tensors that travel between the parts of the model.

Shape letters, here and in every tensor comment of this package:
B images, N ground-truth boxes of an image (padded), A anchors, P proposals, R RoIs of the batch,
D detections, S sampled RoIs of an image, C channels, H W height and width, K classes, M mask side,
T runs of all masks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Category:
    """What one label means outside the model. `id` is the data set's own, perhaps with gaps."""

    id: int
    name: str
    keypoints: tuple[str, ...] = ()
    """Names of its keypoints, in order; left_x and right_x change places where an image is mirrored"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "keypoints", tuple(self.keypoints))  # JSON gives a list


def mirrored_keypoints(names: Sequence[str]) -> list[int]:
    """For each keypoint the place of the one that takes its name in a mirrored image: left_eye for right_eye."""
    places = {name: i for i, name in enumerate(names)}
    swap = {"left_": "right_", "right_": "left_"}
    mirrored = []
    for i, name in enumerate(names):
        side = next((s for s in swap if name.startswith(s)), None)
        mirrored.append(i if side is None else places.get(swap[side] + name.removeprefix(side), i))
    return mirrored


def full_precision(x: Tensor) -> Tensor:
    """float32 of what autocast made half precision: scores, boxes and losses are computed in it."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _OnDevice:
    """`.to(device)` and `.pin_memory()` for a dataclass of tensors, and of such dataclasses."""

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        return self._each(lambda value: value.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in page-locked memory, from where copies to a GPU do not make the host wait."""
        return self._each(lambda value: value.pin_memory())

    def _each(self, change: Callable[[Any], Any]) -> Self:
        values = {f.name: getattr(self, f.name) for f in fields(self)}  # type: ignore[arg-type]
        return type(self)(**{n: change(v) if isinstance(v, (Tensor, _OnDevice)) else v for n, v in values.items()})


@dataclass(frozen=True)
class ImageBatch(_OnDevice):
    """Images of one batch, padded at the right and at the bottom to a common size."""

    pixels: Tensor
    """(B, 3, H, W) RGB, uint8 or float32, 0..255; what lies beyond `sizes` is ignored."""
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
class Targets(_OnDevice):
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
    keypoints: Tensor | None = None
    """(B, N, keypoints, 3) float32: x, y, visibility (0 not annotated, 1 hidden, 2 visible); None without keypoints"""

    def with_zero_padding(self) -> Targets:
        """The same with zeros in the boxes of padding rows: times a weight of 0, a NaN there would still be one."""
        return replace(self, boxes=self.boxes.masked_fill((self.labels == 0)[..., None], 0.0))


@dataclass(frozen=True)
class Detections:
    """What was found in one image, best first, in pixels of the image that was given (its source size)."""

    boxes: Tensor
    """(D, 4) float32 xyxy"""
    labels: Tensor
    """(D,) int64, 1..K"""
    scores: Tensor
    """(D,) float32, 0..1"""
    image_size: tuple[int, int]
    """height, width"""
    mask_probs: Tensor | None = None
    """(D, M, M) float32: probability of the predicted class over each box; None from a model without a mask head"""
    mask_threshold: float = 0.5
    mask_paste: Literal["continuous", "padded"] = "continuous"
    """As `MaskConfig.paste`"""
    keypoints: Tensor | None = None
    """(D, keypoints, 3) float32: x, y, score; None from a model without a keypoint head"""

    def __len__(self) -> int:
        return self.boxes.shape[0]

    @cached_property
    def masks(self) -> Tensor:
        """(D, H, W) bool over the whole image. Made when first asked for: 100 masks of 1333x800 are 107 MB."""
        from mrcnn.postprocess import paste_masks

        threshold, paste = self.mask_threshold, self.mask_paste
        return paste_masks(self._probs(), self.boxes, self.image_size, threshold=threshold, paste=paste)

    @cached_property
    def rles(self) -> list[dict[str, Any]]:
        """COCO run lengths of the masks: `[{"size": [H, W], "counts": bytes}, ...]`."""
        from mrcnn.postprocess import encode_masks

        threshold, paste = self.mask_threshold, self.mask_paste
        return encode_masks(self._probs(), self.boxes, self.image_size, threshold=threshold, paste=paste)

    def _probs(self) -> Tensor:
        if self.mask_probs is None:
            raise ValueError("these detections have no masks: the model has mask.head=none, take one with a mask head")
        return self.mask_probs

    def numpy(self) -> dict[str, np.ndarray]:
        """Boxes, labels and scores as arrays."""
        return {name: getattr(self, name).cpu().numpy() for name in ("boxes", "labels", "scores")}
