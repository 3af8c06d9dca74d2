"""Inputs and comparisons of the RoI operators' tests. Images are 68x48 pixels, the feature map has stride 4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor

OutputAndGrads = tuple[Tensor, Sequence[Tensor]]

SAMPLINGS = list(product((0, 1, 2), (False, True)))  # sampling_ratio, aligned
ATOL = {torch.float64: 1e-11, torch.float32: 2e-5}
STRIDE = 4
MAP_SIZE = (12, 17)
DEGENERATE = {
    "full_image": (0, 0, 68, 48),
    "tiny_0.1px": (30, 20, 30.1, 20.1),
    "sub_pixel": (13.37, 27.77, 15, 29),
    "zero_size": (22, 14, 22, 14),
    "zero_width": (22, 5, 22, 41),
    "zero_size_at_origin": (0, 0, 0, 0),
    "reversed": (40, 30, 10, 8),
    "reversed_x": (40, 8, 10, 30),
    "over_left": (-20, 5, 18, 21),
    "over_top": (5, -13, 30, 21),
    "over_right": (50, 5, 95, 30),
    "over_bottom": (5, 30, 30, 77),
    "over_corner": (50, 30, 95, 77),
    "outside_left": (-60, 5, -10, 30),
    "outside_top": (5, -50, 30, -12),
    "outside_right": (100, 5, 160, 30),
    "outside_bottom": (5, 80, 30, 120),
    "at_far_edge": (68, 48, 80, 60),
    "last_pixel": (64, 44, 68, 48),
    "huge": (-300, -250, 700, 600),
    "huge_from_origin": (0, 0, 1000, 800),
    "thin_horizontal": (3, 20, 65, 21),
    "thin_vertical": (31, 2, 31.5, 47),
    "half_grid": (2, 2, 30, 30),
    "quarter_grid": (4, 8, 32, 36),
    "just_off_grid": (3.999, 7.999, 31.999, 35.999),
    "one_feature_pixel": (12, 16, 16, 20),
}

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *(
        ("roi_align", {"sampling_ratio": ratio, "aligned": aligned, "reduce": reduce})
        for ratio, aligned, reduce in product((0, 2), (False, True), ("mean", "max"))
    ),
    *(
        ("roi_warp", {"sampling_ratio": ratio, "variant": variant, "reduce": reduce})
        for ratio, variant, reduce in product((0, 1, 2), ("inclusive", "exclusive"), ("mean", "max"))
    ),
    ("roi_warp", {"variant": "mnc"}),
    ("roi_pool", {}),
    ("precise_roi_pool", {}),
]
"""Every RoI operator in every way it can be called: its name in `mrcnn.ops`, and keywords."""
VARIANT_NAMES = ["-".join([name, *map(str, call.values())]) for name, call in VARIANTS]


def degenerate_rois(images: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """(R, 5), dealt out to the images in turn."""
    boxes = torch.tensor(list(DEGENERATE.values()), dtype=dtype)
    index = torch.arange(len(boxes), dtype=dtype) % images
    return torch.cat([index[:, None], boxes], 1)


def random_rois(count: int, images: int, generator: torch.Generator, dtype: torch.dtype = torch.float32) -> Tensor:
    """(R, 5), most inside the image, some over an edge."""
    corner = torch.rand(count, 2, generator=generator, dtype=dtype) * torch.tensor([68, 48], dtype=dtype) - 4
    side = torch.rand(count, 2, generator=generator, dtype=dtype) * 40
    index = torch.randint(images, (count, 1), generator=generator).to(dtype)
    return torch.cat([index, corner, corner + side], 1)


def that_torchvision_takes(rois: Tensor, *, sampling_ratio: int, aligned: bool) -> Tensor:
    """Without RoIs reversed along one axis alone, of which torchvision takes a negative number of samples."""
    if sampling_ratio > 0 or not aligned:
        return rois
    x1, y1, x2, y2 = rois[:, -4:].unbind(1)
    return rois[(x1 <= x2) == (y1 <= y2)]


def all_rois(generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.cat([degenerate_rois(2, dtype), random_rois(24, 2, generator, dtype)])


def features_like(generator: torch.Generator, *, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, channels, *MAP_SIZE, generator=generator, dtype=torch.float64).to(dtype)


def output_and_grad(
    operator: Callable[..., Tensor],
    features: Sequence[Tensor],
    *args: Any,
    cotangent: Tensor | None = None,
    **kwargs: Any,
) -> OutputAndGrads:
    """The output, and the gradient of a fixed random functional of it for each feature map."""
    leaves = [level.detach().requires_grad_() for level in features]
    output = operator(leaves if len(leaves) > 1 else leaves[0], *args, **kwargs)
    if cotangent is None:
        cotangent = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
    return output.detach(), torch.autograd.grad(output, leaves, cotangent)


def assert_same(
    actual: OutputAndGrads, expected: OutputAndGrads, *, atol: float, rounding: Sequence[Tensor] | None = None
) -> None:
    """Both outputs and all gradients; a gradient is a sum over many RoIs, so it is judged by the largest.

    `rounding`: by how much each gradient of `expected` may itself be wrong, element by element.
    """
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=atol)
    for level, (ours, theirs) in enumerate(zip(actual[1], expected[1], strict=True)):
        allowed = max(10.0, theirs.abs().max().item()) * atol + (rounding[level] if rounding else 0)
        excess = ((ours - theirs).abs() - allowed).max().item()
        assert excess <= 0, f"gradient of map {level} differs by {excess} more than is allowed"
