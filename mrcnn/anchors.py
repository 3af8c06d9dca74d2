"""Anchors of the region proposal network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mrcnn.config import RPNConfig

STRIDES = (4, 8, 16, 32, 64)  # P2..P6


def cell_anchors(size: float, aspect_ratios: Sequence[float], *, rounded: bool) -> Tensor:
    """Anchors of area size^2 around the origin, one for each ratio (height / width): (ratios, 4) float32."""
    ratios = torch.tensor(aspect_ratios, dtype=torch.float32)
    heights, widths = size * ratios.sqrt(), size / ratios.sqrt()
    corners = torch.stack([-widths, -heights, widths, heights], dim=1) / 2
    return corners.round() if rounded else corners


def grid_anchors(grid_sizes: Sequence[tuple[int, int]], config: RPNConfig, device: torch.device) -> list[Tensor]:
    """Anchors of every pyramid level, (H * W * ratios, 4), ordered by row, column, ratio.

    The cell (row, column) of a level of stride s has its anchors centred at (column * s, row * s), as in both peers.
    """
    levels = []
    for (height, width), stride, size in zip(grid_sizes, STRIDES, config.anchor_sizes, strict=True):
        cells = cell_anchors(size, config.aspect_ratios, rounded=config.round_anchors).to(device)
        shift_y = torch.arange(height, device=device, dtype=torch.float32) * stride
        shift_x = torch.arange(width, device=device, dtype=torch.float32) * stride
        y, x = torch.meshgrid(shift_y, shift_x, indexing="ij")
        shifts = torch.stack([x, y, x, y], dim=-1).reshape(-1, 1, 4)
        levels.append((shifts + cells).reshape(-1, 4))
    return levels
