"""From an image to the network's input: the one place that decides sizes and resampling."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mrcnn.structures import ImageBatch


def resized_size(height: int, width: int, *, shorter_side: int, longer_side: int) -> tuple[int, int]:
    """Height and width after resizing: shorter side as asked, unless the longer one would pass its bound."""
    scale = min(shorter_side / min(height, width), longer_side / max(height, width))
    return max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear with antialiasing, as Pillow's. image (h, w, 3) uint8 -> (height, width, 3) uint8."""
    if image.shape[:2] == (height, width):
        return image
    # NCHW with channels-last strides takes torch's uint8 kernel without a copy
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)[None]
    resized = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True, align_corners=False)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def batch_images(images: Sequence[np.ndarray], *, size_divisor: int = 32) -> ImageBatch:
    """Pad images (h, w, 3) uint8 RGB at the right and bottom to one size, a multiple of size_divisor."""
    sizes = torch.tensor([image.shape[:2] for image in images], dtype=torch.int64)
    height, width = (-(-int(side) // size_divisor) * size_divisor for side in sizes.max(dim=0).values)
    pixels = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for i, image in enumerate(images):
        pixels[i, :, : image.shape[0], : image.shape[1]] = torch.from_numpy(image).permute(2, 0, 1)
    return ImageBatch(pixels=pixels, sizes=sizes)


def normalize(batch: ImageBatch, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(B, 3, H, W) float32: (pixels - mean) / std, and 0 in the padding, which is the mean's colour."""
    pixels = batch.pixels.float()
    pixels = (pixels - pixels.new_tensor(mean)[:, None, None]) / pixels.new_tensor(std)[:, None, None]
    _, _, H, W = pixels.shape
    inside_y = torch.arange(H, device=pixels.device)[None] < batch.sizes[:, :1]
    inside_x = torch.arange(W, device=pixels.device)[None] < batch.sizes[:, 1:]
    return pixels * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
