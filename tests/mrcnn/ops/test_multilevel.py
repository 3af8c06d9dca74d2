"""Which level a RoI reads, and pooling from all levels in one call."""

from __future__ import annotations

import pytest
import torch
from roi_cases import random_rois
from torchvision.ops.poolers import LevelMapper

from mrcnn import ops

STRIDES = (4, 8, 16, 32)


def square(side: float) -> list[float]:
    return [10.0, 20.0, 10.0 + side, 20.0 + side]


def test_levels_by_hand():
    """224 pixels read stride 16; half of that is where stride 8 begins to be too coarse for the next smaller."""
    boxes = torch.tensor([square(side) for side in (0, 1, 111, 112, 223, 224, 447, 448, 2000)])
    assert ops.assign_levels(boxes, strides=STRIDES).tolist() == [0, 0, 0, 1, 1, 2, 2, 3, 3]


def test_levels_equal_torchvision(generator):
    boxes = random_rois(500, 1, generator)[:, 1:] * torch.logspace(-1, 1.6, 500)[:, None]
    corner = torch.arange(0, 200, 4, dtype=torch.float32)[:, None].expand(-1, 2)
    boxes = torch.cat([boxes, torch.cat([corner, corner + 2 ** torch.arange(50)[:, None] % 1000], 1)])
    boxes[:, 2:] = torch.maximum(boxes[:, :2], boxes[:, 2:])
    assert torch.equal(ops.assign_levels(boxes, strides=STRIDES), LevelMapper(2, 5)([boxes]))
    assert torch.equal(ops.assign_levels(boxes, strides=(8, 16)), LevelMapper(3, 4)([boxes]))
    theirs = LevelMapper(2, 5, canonical_scale=112)([boxes])
    assert torch.equal(ops.assign_levels(boxes, strides=STRIDES, canonical_size=112), theirs)


def test_one_level_serves_all_and_reversed_or_nan_boxes_have_a_level():
    boxes = torch.tensor([square(5), square(5000), [30, 30, 10, 10], [0, 0, 9, torch.nan]])
    assert ops.assign_levels(boxes, strides=[16]).tolist() == [0, 0, 0, 0]
    levels = ops.assign_levels(boxes, strides=STRIDES)
    assert ((levels >= 0) & (levels < 4)).all()
    assert ops.assign_levels(boxes[:0], strides=STRIDES).shape == (0,)


@pytest.mark.parametrize(
    ("operator", "single", "reduce"),
    [
        ("align", ops.roi_align, "mean"),
        ("align", ops.roi_align, "max"),
        ("warp", ops.roi_warp, "mean"),
        ("warp", ops.roi_warp, "max"),
        ("pool", ops.roi_pool, "mean"),
        ("precise", ops.precise_roi_pool, "mean"),
    ],
)
def test_pools_each_roi_from_its_level(generator, operator, single, reduce):
    pyramid = [torch.randn(2, 3, 100 >> i, 136 >> i, generator=generator) for i in range(4)]
    rois = random_rois(40, 2, generator)
    rois[:, 1:] *= 8
    pooled = ops.multilevel_roi_pool(
        pyramid, rois, operator=operator, reduce=reduce, output_size=7, strides=STRIDES, sampling_ratio=1
    )
    levels = ops.assign_levels(rois[:, 1:], strides=STRIDES)
    assert levels.unique().numel() > 1
    call = {"reduce": reduce, "sampling_ratio": 1} if operator in ("align", "warp") else {}
    for i, stride in enumerate(STRIDES):
        alone = single(pyramid[i], rois[levels == i], output_size=7, spatial_scale=1 / stride, **call)
        assert torch.equal(pooled[levels == i], alone)


def test_aligned_reaches_roi_align(generator):
    features, rois = [torch.randn(2, 3, 12, 17, generator=generator)], random_rois(5, 2, generator)
    for aligned in (False, True):
        pooled = ops.multilevel_roi_pool(features, rois, output_size=3, strides=[4], aligned=aligned)
        alone = ops.roi_align(features, rois, output_size=3, spatial_scale=1 / 4, aligned=aligned)
        assert torch.equal(pooled, alone)


def test_gradient_reaches_boxes_through_precise_pooling(generator):
    pyramid = [torch.randn(1, 2, 32 >> i, 32 >> i, generator=generator) for i in range(2)]
    rois = torch.tensor([[0, *square(40)], [0, *square(90)]], requires_grad=True)
    ops.multilevel_roi_pool(pyramid, rois, operator="precise", output_size=2, strides=(4, 8)).sum().backward()
    assert rois.grad is not None
    assert rois.grad[:, 1:].any()


def test_torch_compile_captures_one_graph(generator):
    pyramid = [torch.randn(2, 3, 100 >> i, 136 >> i, generator=generator) for i in range(4)]
    rois = random_rois(10, 2, generator)

    def pool(features: list[torch.Tensor], rois: torch.Tensor) -> torch.Tensor:
        return ops.multilevel_roi_pool(features, rois, operator="pool", output_size=7, strides=STRIDES)

    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pyramid, rois), pool(pyramid, rois))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operator": "crop"}, "operator is 'crop': give 'align' or 'pool' or 'warp' or 'precise'"),
        ({"strides": [4]}, "strides has 1 values for 2 feature levels"),
        ({"strides": [4, 12]}, r"strides is \[4, 12\]: give powers of two"),
        ({"strides": [0, 0]}, "strides is 0x0: give at least 1"),
        ({"rois": torch.zeros(3, 4)}, r"rois is \(3, 4\): give \(R, 5\)"),
    ],
)
def test_errors_name_argument_value_and_remedy(change, message):
    call = {"features": [torch.zeros(1, 1, 8, 8)] * 2, "rois": torch.zeros(3, 5), "output_size": 2, "strides": [4, 8]}
    with pytest.raises(ValueError, match=message):
        ops.multilevel_roi_pool(**{**call, **change})


def test_levels_of_a_wrong_shape():
    with pytest.raises(ValueError, match=r"boxes is \(3, 5\): give \(R, 4\)"):
        ops.assign_levels(torch.zeros(3, 5), strides=STRIDES)
