"""Anchors of the region proposal network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrcnn.config import RPNConfig


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float], *, rounded: bool) -> Tensor:
    """Anchors of area size^2 around the origin, (sizes x ratios, 4) float32: ratios (height / width) change fastest."""
    # in double precision, as detectron2: an anchor's last bit decides whether an IoU is at a threshold
    side = torch.tensor(sizes, dtype=torch.float64)[:, None]
    ratios = torch.tensor(aspect_ratios, dtype=torch.float64)[None]
    widths = (side**2 / ratios).sqrt()
    widths, heights = widths.flatten(), (widths * ratios).flatten()
    corners = (torch.stack([-widths, -heights, widths, heights], dim=1) / 2).float()
    return corners.round() if rounded else corners


def level_anchors(config: RPNConfig, levels: int) -> list[Tensor]:
    """The cell anchors of each level: one size a level, or all sizes on a single one."""
    sizes = [config.anchor_sizes] if levels == 1 else [(size,) for size in config.anchor_sizes]
    return [cell_anchors(each, config.aspect_ratios, rounded=config.round_anchors) for each in sizes]


def grid_anchors(
    cells: Sequence[Tensor], grid_sizes: Sequence[tuple[int, int]], strides: Sequence[tuple[int, int]]
) -> list[Tensor]:
    """Anchors of every level, (H * W * cell anchors, 4), ordered by row, column, cell anchor.

    The cell (row, column) of a level of stride (y, x) has its anchors centred at (column * x, row * y), as in both
    peers.
    """
    levels = []
    for cell, (height, width), (stride_y, stride_x) in zip(cells, grid_sizes, strides, strict=True):
        shift_y = torch.arange(height, device=cell.device, dtype=cell.dtype) * stride_y
        shift_x = torch.arange(width, device=cell.device, dtype=cell.dtype) * stride_x
        y, x = torch.meshgrid(shift_y, shift_x, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        levels.append((shifts + cell).reshape(-1, 4))
    return levels
