"""The CUDA kernels of all RoI operators and of NMS against the CPU kernels and the reference."""

from __future__ import annotations

import pytest
import torch
from roi_cases import (
    ATOL,
    STRIDE,
    VARIANT_NAMES,
    VARIANTS,
    all_rois,
    assert_same,
    features_like,
    output_and_grad,
    random_rois,
)

from mrcnn import ops
from mrcnn.ops import reference

pytestmark = pytest.mark.gpu
every_variant = pytest.mark.parametrize(("name", "call"), VARIANTS, ids=VARIANT_NAMES)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (3, 5), (1, 1)])
def test_cuda_equals_cpu(cuda, generator, name, call, dtype, size):
    features, rois = features_like(generator, channels=7, dtype=dtype), all_rois(generator, dtype)
    pooling = {"output_size": size, "spatial_scale": 1 / STRIDE, **call}
    expected = output_and_grad(getattr(ops, name), [features], rois, **pooling)
    actual = output_and_grad(getattr(ops, name), [features.to(cuda)], rois.to(cuda), **pooling)
    assert_same((actual[0].cpu(), [grad.cpu() for grad in actual[1]]), expected, atol=ATOL[dtype])


@every_variant
def test_cuda_equals_reference_on_a_pyramid(cuda, generator, name, call):
    pyramid = [torch.randn(2, 3, 12 >> i, 18 >> i, generator=generator, dtype=torch.float64) for i in range(3)]
    rois, levels = random_rois(9, 2, generator, torch.float64), torch.arange(9) % 3
    pooling = {"output_size": (2, 3), "spatial_scale": [1 / 4, 1 / 8, 1 / 16], **call}
    expected = output_and_grad(getattr(reference, name), pyramid, rois, levels, **pooling)
    on_gpu = [level.to(cuda) for level in pyramid]
    actual = output_and_grad(getattr(ops, name), on_gpu, rois.to(cuda), levels.to(cuda), **pooling)
    assert_same((actual[0].cpu(), [grad.cpu() for grad in actual[1]]), expected, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_cuda_gradient_in_the_rois_equals_cpu(cuda, generator, dtype, tolerance):
    features, rois = features_like(generator, channels=9, dtype=dtype), random_rois(30, 2, generator, dtype)
    grads = []
    for device in (torch.device("cpu"), cuda):
        leaf = rois.to(device).requires_grad_()
        output = ops.precise_roi_pool(features.to(device), leaf, output_size=(7, 5), spatial_scale=1 / STRIDE)
        grads.append(torch.autograd.grad(output.sum(), leaf)[0].cpu())
    scale = grads[0].abs().max().item()
    torch.testing.assert_close(grads[1], grads[0], rtol=0, atol=tolerance * scale)


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_cuda_half_precision_computes_in_float32(cuda, generator, name, call, dtype):
    features, rois = features_like(generator, dtype=dtype), random_rois(20, 2, generator)
    pooling = {"output_size": 7, "spatial_scale": 1 / STRIDE, **call}
    half = getattr(ops, name)(features.to(cuda), rois.to(cuda), **pooling)
    full = getattr(ops, name)(features.float(), rois, **pooling)
    assert half.dtype == dtype
    torch.testing.assert_close(half.float().cpu(), full, rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


@every_variant
def test_cuda_is_deterministic(cuda, generator, name, call):
    pyramid = [torch.randn(2, 64, 50 >> i, 68 >> i, generator=generator).to(cuda) for i in range(2)]
    rois, levels = random_rois(300, 2, generator).to(cuda), torch.randint(2, (300,), generator=generator).to(cuda)
    rois = rois.requires_grad_(name == "precise_roi_pool")
    runs = []
    for _ in range(3):
        leaves = [level.detach().requires_grad_() for level in pyramid]
        output = getattr(ops, name)(leaves, rois, levels, output_size=14, spatial_scale=[1 / 4, 1 / 8], **call)
        wanted = [*leaves, rois] if rois.requires_grad else leaves
        runs.append([output, *torch.autograd.grad(output.square().sum(), wanted)])
    for run in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(run, runs[0], strict=True))


@every_variant
def test_cuda_rois_out_of_range_give_zero_and_nothing_waits(cuda, generator, name, call):
    features = features_like(generator).to(cuda)
    rois = torch.tensor([0.0, 4, 4, 40, 40]).repeat(4, 1)
    rois[1, 0], rois[2, 0] = 2, -1
    rois, levels = rois.to(cuda), torch.tensor([0, 0, 0, 5], device=cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, (grad,) = output_and_grad(
            getattr(ops, name), [features], rois, levels, output_size=7, spatial_scale=1 / STRIDE, **call
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output[0].any()
    assert not output[1:].any()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("operator", ["align", "pool", "warp", "precise"])
def test_cuda_multilevel_pooling_never_waits(cuda, generator, operator):
    pyramid = [torch.randn(2, 3, 100 >> i, 136 >> i, generator=generator) for i in range(4)]
    rois = random_rois(40, 2, generator)
    rois[:, 1:] *= 8
    call = {"operator": operator, "output_size": 7, "strides": (4, 8, 16, 32)}
    expected = ops.multilevel_roi_pool(pyramid, rois, **call)
    on_gpu, gpu_rois = [level.to(cuda).requires_grad_() for level in pyramid], rois.to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = ops.multilevel_roi_pool(on_gpu, gpu_rois, **call)
        output.square().sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(output.cpu(), expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("count", [1, 63, 64, 65, 1000, 5000])
def test_cuda_nms_equals_cpu_and_never_waits(cuda, generator, count, ties):
    corner = torch.rand(3, count, 2, generator=generator) * 600
    boxes = torch.cat([corner, corner + torch.rand(3, count, 2, generator=generator) * 120], 2)
    scores, groups = torch.randn(3, count, generator=generator), torch.randint(5, (3, count), generator=generator)
    if ties:
        boxes, scores = (boxes / 16).round() * 16, (scores * 3).round() / 3
    scores[1, ::3], scores[2] = -torch.inf, torch.nan
    on_gpu = [tensor.to(cuda) for tensor in (boxes, scores, groups)]
    for top_n in (1, 100, count):
        expected = ops.nms(boxes, scores, groups, iou_threshold=0.6, top_n=top_n)
        torch.cuda.set_sync_debug_mode("error")
        try:
            found = ops.nms(on_gpu[0], on_gpu[1], on_gpu[2], iou_threshold=0.6, top_n=top_n)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(found[0].cpu(), expected[0])
        assert torch.equal(found[1].cpu(), expected[1])


def test_cuda_no_rois_and_no_candidates(cuda, generator):
    features = features_like(generator).to(cuda)
    for name, call in VARIANTS:
        output, (grad,) = output_and_grad(
            getattr(ops, name), [features], torch.zeros(0, 5, device=cuda), output_size=7, spatial_scale=0.25, **call
        )
        assert output.shape == (0, 3, 7, 7)
        assert not grad.any()
    nothing = torch.zeros(2, 0, device=cuda)
    idxs, valid = ops.nms(nothing[..., None].expand(2, 0, 4), nothing, nothing.long(), iou_threshold=0.5, top_n=4)
    assert idxs.shape == valid.shape == (2, 0)
