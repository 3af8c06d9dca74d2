"""The CUDA kernels of RoIAlign against the CPU kernels, which test_roi_align.py holds against the world."""

from __future__ import annotations

import pytest
import torch
from roi_cases import (
    ATOL,
    SAMPLINGS,
    STRIDE,
    all_rois,
    assert_same,
    features_like,
    output_and_grad,
    random_rois,
)

from mrcnn import ops
from mrcnn.ops._library import Rule

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 5), (1, 1)])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [*SAMPLINGS, (4, True), (11, False)])
def test_cuda_equals_cpu(cuda, generator, dtype, size, sampling_ratio, aligned):
    features, rois = features_like(generator, channels=7, dtype=dtype), all_rois(generator, dtype)
    call = {
        "output_size": size,
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
        "spatial_scale": 1 / STRIDE,
    }
    expected = output_and_grad(ops.roi_align, [features], rois, **call)
    actual = output_and_grad(ops.roi_align, [features.to(cuda)], rois.to(cuda), **call)
    assert_same((actual[0].cpu(), [grad.cpu() for grad in actual[1]]), expected, atol=ATOL[dtype])


@pytest.mark.parametrize(("sampling_ratio", "aligned"), SAMPLINGS)
def test_cuda_equals_cpu_on_a_pyramid(cuda, generator, sampling_ratio, aligned):
    pyramid = [torch.randn(2, 9, 100 >> i, 134 >> i, generator=generator) for i in range(4)]
    rois, levels = random_rois(64, 2, generator), torch.randint(4, (64,), generator=generator)
    rois[:, 1:] *= 8
    call = {
        "output_size": 7,
        "spatial_scale": [1 / 4, 1 / 8, 1 / 16, 1 / 32],
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
    }
    expected = output_and_grad(ops.roi_align, pyramid, rois, levels, **call)
    on_gpu = [level.to(cuda) for level in pyramid]
    actual = output_and_grad(ops.roi_align, on_gpu, rois.to(cuda), levels.to(cuda), **call)
    assert_same((actual[0].cpu(), [grad.cpu() for grad in actual[1]]), expected, atol=5e-5)


@pytest.mark.parametrize(("dtype", "epsilon"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_cuda_half_precision_sums_in_float32(cuda, generator, dtype, epsilon):
    features, rois = features_like(generator, dtype=dtype), all_rois(generator, torch.float32)
    half = output_and_grad(ops.roi_align, [features.to(cuda)], rois.to(cuda), output_size=7, spatial_scale=1 / STRIDE)
    full = output_and_grad(
        ops.roi_align,
        [features.float()],
        rois,
        cotangent=torch.linspace(-1, 1, half[0].numel(), device=cuda, dtype=dtype).cpu().float().view(half[0].shape),
        output_size=7,
        spatial_scale=1 / STRIDE,
    )
    assert half[0].dtype == half[1][0].dtype == dtype
    torch.testing.assert_close(half[0].float().cpu(), full[0], rtol=2 * epsilon, atol=1e-4)
    torch.testing.assert_close(half[1][0].float().cpu(), full[1][0], rtol=2 * epsilon, atol=1e-3)


def test_cuda_backward_is_deterministic(cuda, generator):
    pyramid = [torch.randn(2, 64, 50 >> i, 68 >> i, generator=generator).to(cuda) for i in range(2)]
    rois, levels = (
        random_rois(500, 2, generator).to(cuda),
        torch.randint(2, (500,), generator=generator).to(cuda),
    )
    torch.use_deterministic_algorithms(True)
    try:
        runs = [
            output_and_grad(ops.roi_align, pyramid, rois, levels, output_size=14, spatial_scale=[1 / 4, 1 / 8])[1]
            for _ in range(5)
        ]
    finally:
        torch.use_deterministic_algorithms(False)
    for run in runs[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "strided"])
def test_cuda_layout_does_not_matter(cuda, generator, layout):
    features, rois = (
        features_like(generator, channels=5).to(cuda),
        all_rois(generator, torch.float32).to(cuda),
    )
    if layout == "channels_last":
        other = features.to(memory_format=torch.channels_last)
    else:
        other = torch.stack([features, features], -1)[..., 0]
    expected = output_and_grad(ops.roi_align, [features], rois, output_size=7, spatial_scale=1 / STRIDE)
    actual = output_and_grad(ops.roi_align, [other], rois, output_size=7, spatial_scale=1 / STRIDE)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0], expected[1][0])


def test_cuda_rois_out_of_range_give_zero_without_a_sync(cuda, generator):
    features = features_like(generator).to(cuda)
    inside = torch.tensor([0.0, 4, 4, 40, 40])
    rois = torch.stack([inside, inside, inside, inside])
    rois[1, 0], rois[2, 0] = 2, -1
    levels = torch.tensor([0, 0, 0, 5])
    rois, levels = rois.to(cuda), levels.to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        output, (grad,) = output_and_grad(
            ops.roi_align, [features], rois, levels, output_size=7, spatial_scale=1 / STRIDE
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert output[0].any()
    assert not output[1:].any()
    assert torch.isfinite(grad).all()


def test_cuda_no_rois(cuda, generator):
    features = features_like(generator).to(cuda).requires_grad_()
    output = ops.roi_align(features, torch.zeros(0, 5, device=cuda), output_size=7, spatial_scale=1 / STRIDE)
    output.sum().backward()
    assert output.shape == (0, 3, 7, 7)
    assert features.grad is not None
    assert not features.grad.any()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's
def test_cuda_gradcheck_and_opcheck(cuda, generator):
    features = torch.randn(2, 2, 6, 5, generator=generator, dtype=torch.float64).to(cuda).requires_grad_()
    rois = random_rois(4, 2, generator, torch.float64).to(cuda)
    levels = torch.zeros(4, dtype=torch.int64, device=cuda)
    assert torch.autograd.gradcheck(
        lambda level: ops.roi_align(level, rois, output_size=2, spatial_scale=0.1, sampling_ratio=0),
        [features],
    )
    torch.library.opcheck(torch.ops.mrcnn.roi_mean.default, ([features], rois, levels, [0.1], 2, 3, Rule.ALIGN, 2))


def test_cuda_autocast_keeps_the_features_dtype(cuda, generator):
    features, rois = (
        features_like(generator, dtype=torch.bfloat16).to(cuda),
        random_rois(4, 2, generator).to(cuda),
    )
    with torch.autocast("cuda", torch.bfloat16):
        assert ops.roi_align(features, rois, output_size=7, spatial_scale=1 / STRIDE).dtype == torch.bfloat16
