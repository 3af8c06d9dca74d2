"""Compiled operators for the CPU and for CUDA: RoI pooling of a feature pyramid and of run-length masks, NMS,
and, for the CPU alone, what data sets need: drawing, packing and resizing of run-length masks, enlarging of images.

`mrcnn.ops.reference` has them in plain PyTorch, but for what pycocotools has. Shape letters as in `mrcnn.structures`.
"""

from __future__ import annotations

import torch

from mrcnn.ops import _library  # noqa: F401  importing it registers torch.ops.mrcnn
from mrcnn.ops.image import enlarge_image
from mrcnn.ops.multilevel import assign_levels, multilevel_roi_pool
from mrcnn.ops.nms import nms
from mrcnn.ops.rle import draw_polygons, resize_masks, rle_decode, rle_encode, rle_roi_align
from mrcnn.ops.roi import precise_roi_pool, roi_align, roi_pool, roi_warp

__all__ = [
    "assign_levels",
    "cuda_compiled",
    "draw_polygons",
    "enlarge_image",
    "multilevel_roi_pool",
    "nms",
    "precise_roi_pool",
    "resize_masks",
    "rle_decode",
    "rle_encode",
    "rle_roi_align",
    "roi_align",
    "roi_pool",
    "roi_warp",
]


def cuda_compiled() -> bool:
    """Whether the library was built with CUDA kernels, which says nothing of a GPU being there."""
    return torch.ops.mrcnn.cuda_version() > 0
