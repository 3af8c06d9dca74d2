"""A small model and small batches for the tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mrcnn import (
    BackboneConfig,
    ImageBatch,
    InputConfig,
    MaskConfig,
    MaskRCNN,
    ModelConfig,
    RoIConfig,
    RPNConfig,
    RunLengthMasks,
    Targets,
)
from mrcnn.config import Norm

SMALL = ModelConfig(
    num_classes=3,
    backbone=BackboneConfig(name="resnet18", norm="gn", frozen_stages=0, fpn_channels=32, fpn_norm="gn"),
    rpn=RPNConfig(
        anchor_sizes=(8, 16, 32, 64, 128),
        pre_nms_top_n_train=100,
        pre_nms_top_n_test=100,
        post_nms_top_n_train=80,
        post_nms_top_n_test=50,
        batch_size_per_image=64,
    ),
    roi=RoIConfig(batch_size_per_image=32, box_channels=64),
    mask=MaskConfig(channels=32, convs=1, norm="gn"),
    input=InputConfig(shorter_side=96, longer_side=128),
)


def small_model(norm: Norm = "gn", seed: int = 0) -> MaskRCNN:
    """SMALL with another norm of the body, initial weights by seed."""
    import dataclasses

    torch.manual_seed(seed)
    return MaskRCNN(dataclasses.replace(SMALL, backbone=dataclasses.replace(SMALL.backbone, norm=norm)))


def batch_of(
    boxes: Sequence[Sequence[Sequence[float]]], *, crowd: bool = False, size: tuple[int, int] = (96, 128)
) -> tuple[ImageBatch, Targets]:
    """Random images with elliptic objects in the given boxes (one list an image)."""
    B, N = len(boxes), max(len(each) for each in boxes)
    generator = torch.Generator().manual_seed(B)
    pixels = torch.randint(0, 256, (B, 3, *size), generator=generator, dtype=torch.uint8)
    padded, labels = torch.zeros(B, N, 4), torch.zeros(B, N, dtype=torch.int64)
    ends, offsets = [], [0]
    for b in range(B):
        for n in range(N):
            if n < len(boxes[b]):
                padded[b, n] = torch.tensor(boxes[b][n])
                labels[b, n] = n % 3 + 1
                ends += run_ends(ellipse(boxes[b][n], size))
            offsets.append(len(ends))
    masks = RunLengthMasks(torch.tensor(ends, dtype=torch.int32), torch.tensor(offsets))
    targets = Targets(padded, labels, (labels > 0) & crowd, masks, torch.arange(B) + 11)
    return ImageBatch(pixels, torch.tensor([size] * B)), targets


def with_keypoints(images: ImageBatch, targets: Targets, count: int) -> tuple[ImageBatch, Targets]:
    """The batch with `count` keypoints in each object, on a line through its box; the first one is not annotated."""
    import dataclasses

    if count == 0:
        return images, targets
    share = torch.linspace(0.1, 0.9, count)[:, None]
    low, high = targets.boxes[:, :, None, :2], targets.boxes[:, :, None, 2:]
    points = low + share * (high - low)
    visible = ((torch.arange(count) > 0) & (targets.labels > 0)[..., None] & ~targets.iscrowd[..., None]).float() * 2
    keypoints = torch.cat([points * (visible > 0)[..., None], visible[..., None]], dim=-1)
    return images, dataclasses.replace(targets, keypoints=keypoints)


def ellipse(box: Sequence[float], size: tuple[int, int]) -> np.ndarray:
    """Bitmap of the ellipse that a box holds."""
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    radius_x, radius_y = max((box[2] - box[0]) / 2, 0.5), max((box[3] - box[1]) / 2, 0.5)
    return ((x - (box[0] + box[2]) / 2) / radius_x) ** 2 + ((y - (box[1] + box[3]) / 2) / radius_y) ** 2 <= 1


def run_ends(bitmap: np.ndarray) -> list[int]:
    """Running sums of the run lengths of a bitmap, column by column."""
    flat = bitmap.T.reshape(-1).astype(np.int8)
    return [*np.flatnonzero(np.diff(flat, prepend=0)).tolist(), flat.size]
