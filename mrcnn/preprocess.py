"""From an image to the network's input: the one place that decides sizes and resampling."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnn.structures import ImageBatch


def resized_size(height: int, width: int, *, shorter_side: int, longer_side: int) -> tuple[int, int]:
    """Height and width after resizing: shorter side as asked, unless the longer one would pass its bound.

    Rounds half up, operation by operation as detectron2 does, whose sizes these are.
    """
    scale = shorter_side / min(height, width)
    new_height, new_width = (shorter_side, scale * width) if height < width else (scale * height, shorter_side)
    longer = max(new_height, new_width)
    if longer > longer_side:
        new_height, new_width = new_height * (longer_side / longer), new_width * (longer_side / longer)
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Antialiased bilinear, (h, w, 3) uint8 -> (height, width, 3) uint8, within 1/255 (mean) and 3/255 of Pillow's.

    torch's uint8 kernel where a side shrinks; OpenCV's, faster and the same filter, where none does.
    """
    if image.shape[:2] == (height, width):
        return image
    if height >= image.shape[0] and width >= image.shape[1]:
        return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)
    # NCHW with channels-last strides takes torch's uint8 kernel without a copy
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def batch_images(images: Sequence[np.ndarray], *, size_divisor: int = 32) -> ImageBatch:
    """Pad images (h, w, 3) uint8 RGB at the right and bottom to one size, a multiple of size_divisor."""
    sizes = np.array([image.shape[:2] for image in images], np.int64)
    height, width = -(-sizes.max(axis=0) // size_divisor) * size_divisor
    pixels = np.zeros((len(images), 3, height, width), np.uint8)
    for padded, image in zip(pixels, images, strict=True):
        padded[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return ImageBatch(pixels=torch.from_numpy(pixels), sizes=torch.from_numpy(sizes))


def normalize(batch: ImageBatch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) float32: (pixels - mean) / std, and 0 in the padding, which is the mean's colour."""
    pixels = batch.pixels.float()
    pixels = (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
    _, _, H, W = pixels.shape
    inside_y = torch.arange(H, device=pixels.device)[None] < batch.sizes[:, :1]
    inside_x = torch.arange(W, device=pixels.device)[None] < batch.sizes[:, 1:]
    return pixels * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
