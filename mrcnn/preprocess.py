"""From an image to the network's input: the one place that decides sizes and resampling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from mrcnn.config import InputConfig
from mrcnn.ops import enlarge_image
from mrcnn.structures import ImageBatch

Resize = Literal["antialias", "pillow", "bilinear"]


def resized_size(
    height: int, width: int, *, shorter_side: int, longer_side: int, resize: Resize = "antialias"
) -> tuple[int, int]:
    """Height and width after resizing: shorter side as asked, unless the longer one would pass its bound.

    antialias, pillow: rounds half up, operation by operation as detectron2 does, whose sizes these are. bilinear:
    torchvision's sizes, rounded down, by which a side of 305 pixels becomes 799 and not 800.
    """
    if resize == "bilinear":
        factor = min(shorter_side / min(height, width), longer_side / max(height, width))
        return max(int(height * factor), 1), max(int(width * factor), 1)
    scale = shorter_side / min(height, width)
    new_height, new_width = (shorter_side, scale * width) if height < width else (scale * height, shorter_side)
    longest = max(new_height, new_width)
    if longest > longer_side:
        new_height, new_width = new_height * (longer_side / longest), new_width * (longer_side / longest)
    return max(int(new_height + 0.5), 1), max(int(new_width + 0.5), 1)


def resize_image(
    image: np.ndarray, height: int, width: int, resize: Resize = "antialias", *, out: np.ndarray | None = None
) -> np.ndarray:
    """(h, w, 3) uint8 -> (height, width, 3), in `out` if that is given: of this shape and the result's type.

    antialias: uint8, antialiased bilinear, within 1/255 (mean) and 3/255 of Pillow's: by torch's uint8 kernel where a
    side shrinks, by our own, faster and the same filter, where none does. pillow: Pillow's own bytes. bilinear:
    float32 0..255, not antialiased.
    """
    resized = _resize(image, height, width, resize, out)
    if out is None or np.may_share_memory(resized, out):
        return resized
    out[...] = resized
    return out


def _resize(image: np.ndarray, height: int, width: int, resize: Resize, out: np.ndarray | None) -> np.ndarray:
    """As `resize_image`; in `out` where that costs no copy."""
    if image.shape[:2] == (height, width):
        return image.astype(np.float32) if resize == "bilinear" else image
    if resize == "pillow":
        return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    rgb = torch.from_numpy(np.require(image, requirements=["C", "W"]))
    if resize == "antialias" and height >= image.shape[0] and width >= image.shape[1]:
        enlarged = np.empty((height, width, 3), np.uint8) if out is None else out
        enlarge_image(rgb, torch.from_numpy(enlarged))
        return enlarged
    pixels = rgb.permute(2, 0, 1)[None]  # NCHW with channels-last strides takes torch's uint8 kernel without a copy
    if resize == "bilinear":
        resized = F.interpolate(pixels.float(), size=(height, width), mode="bilinear", align_corners=False)
    else:
        resized = F.interpolate(pixels, size=(height, width), mode="bilinear", antialias=True)
    return np.ascontiguousarray(resized[0].permute(1, 2, 0).numpy())


def network_images(images: Sequence[np.ndarray], config: InputConfig) -> ImageBatch:
    """RGB images (h, w, 3) uint8 of any size as a batch in the size that the network sees."""
    bounds = {"shorter_side": config.shorter_side, "longer_side": config.longer_side}
    sizes = [resized_size(*image.shape[:2], **bounds, resize=config.resize) for image in images]
    resized = [resize_image(image, *size, config.resize) for image, size in zip(images, sizes, strict=True)]
    return batch_images(resized, size_divisor=config.size_divisor)


def batch_images(images: Sequence[np.ndarray], *, size_divisor: int = 32) -> ImageBatch:
    """Pad images (h, w, 3), all uint8 or all float32, at the right and bottom to a common multiple of size_divisor."""
    sizes = np.array([image.shape[:2] for image in images], np.int64)
    height, width = -(-sizes.max(axis=0) // size_divisor) * size_divisor
    pixels = np.zeros((len(images), 3, height, width), images[0].dtype)
    for padded, image in zip(pixels, images, strict=True):
        padded[:, : image.shape[0], : image.shape[1]] = image.transpose(2, 0, 1)
    return ImageBatch(pixels=torch.from_numpy(pixels), sizes=torch.from_numpy(sizes))


class Normalize(torch.nn.Module):
    """ImageBatch -> (B, 3, H, W): (pixels - mean) / std in the network's order of channels, 0 in the padding."""

    def __init__(self, config: InputConfig) -> None:
        super().__init__()
        self.bgr = config.channels == "bgr"
        # buffers: made from Python numbers in every step they would be copied to the device, which waits for it
        self.register_buffer("mean", torch.tensor(config.mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(config.std)[:, None, None], persistent=False)
        self.mean: Tensor
        self.std: Tensor

    def forward(self, batch: ImageBatch) -> Tensor:
        pixels = batch.pixels.to(self.mean.dtype)
        if self.bgr:
            pixels = pixels.flip(1)
        pixels = (pixels - self.mean) / self.std
        _, _, H, W = pixels.shape
        inside_y = torch.arange(H, device=pixels.device)[None] < batch.sizes[:, :1]
        inside_x = torch.arange(W, device=pixels.device)[None] < batch.sizes[:, 1:]
        return pixels * (inside_y[:, None, :, None] & inside_x[:, None, None, :])
