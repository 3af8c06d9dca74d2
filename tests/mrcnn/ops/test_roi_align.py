"""RoIAlign against torchvision, the slow reference and stored oracles; gradients, operator checks, errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pytest
import torch
import torchvision
from roi_cases import (
    ATOL,
    SAMPLINGS,
    STRIDE,
    OutputAndGrads,
    all_rois,
    assert_same,
    degenerate_rois,
    features_like,
    output_and_grad,
    random_rois,
    that_torchvision_takes,
)
from torch import Tensor

from mrcnn import ops
from mrcnn.ops import reference
from mrcnn.ops._library import Rule


def assert_same_as_torchvision(ours: OutputAndGrads, features: Sequence[Tensor], rois: Tensor, *, atol, **sampling):
    """Outputs and gradients, where torchvision's own rounding is allowed on top.

    It adds up the gradient of a pixel one sample after the other in float32. At a corner of the map, where thousands of
    samples of a RoI that reaches beyond it fall on one pixel, its sum is wrong in the fifth digit.
    """
    theirs = output_and_grad(torchvision.ops.roi_align, features, rois, **sampling)
    doubled = [level.double() for level in features]
    exact = output_and_grad(torchvision.ops.roi_align, doubled, rois.double(), **sampling)
    rounding = [(grad - better).abs() for grad, better in zip(theirs[1], exact[1], strict=True)]
    assert_same(ours, theirs, atol=atol, rounding=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 5), (1, 1)])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [*SAMPLINGS, (4, True), (11, False)])
def test_equals_torchvision(generator, dtype, size, sampling_ratio, aligned):
    features = features_like(generator, dtype=dtype)
    rois = that_torchvision_takes(all_rois(generator, dtype), sampling_ratio=sampling_ratio, aligned=aligned)
    sampling = {"sampling_ratio": sampling_ratio, "aligned": aligned, "spatial_scale": 1 / STRIDE}
    ours = output_and_grad(ops.roi_align, [features], rois, output_size=size, **sampling)
    assert_same_as_torchvision(ours, [features], rois, atol=ATOL[dtype], output_size=size, **sampling)


@pytest.mark.parametrize("channels", [1, 2, 7, 16, 33])
def test_equals_torchvision_whatever_the_channels(generator, channels):
    features, rois = features_like(generator, channels=channels), all_rois(generator, torch.float32)
    sampling = {"output_size": 7, "sampling_ratio": 2, "aligned": True, "spatial_scale": 1 / STRIDE}
    ours = output_and_grad(ops.roi_align, [features], rois, **sampling)
    assert_same_as_torchvision(ours, [features], rois, atol=ATOL[torch.float32], **sampling)


@pytest.mark.parametrize("width", [1, 2, 3, 8, 9, 31, 64, 67])
def test_equals_torchvision_whatever_the_width(generator, width):
    features = torch.randn(2, 2, 5, width, generator=generator)
    rois = random_rois(20, 2, generator)
    rois[:, [1, 3]] *= width * STRIDE / 68
    sampling = {"output_size": 7, "sampling_ratio": 2, "aligned": True, "spatial_scale": 1 / STRIDE}
    ours = output_and_grad(ops.roi_align, [features], rois, **sampling)
    assert_same_as_torchvision(ours, [features], rois, atol=ATOL[torch.float32], **sampling)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), SAMPLINGS)
def test_equals_reference_on_a_pyramid(generator, sampling_ratio, aligned):
    pyramid = [torch.randn(2, 3, 12 >> i, 18 >> i, generator=generator, dtype=torch.float64) for i in range(3)]
    rois = random_rois(12, 2, generator, torch.float64)
    levels = torch.arange(12) % 3
    call = {
        "output_size": (2, 3),
        "spatial_scale": [1 / 4, 1 / 8, 1 / 16],
        "sampling_ratio": sampling_ratio,
        "aligned": aligned,
    }
    ours = output_and_grad(ops.roi_align, pyramid, rois, levels, **call)
    slow = output_and_grad(reference.roi_align, pyramid, rois, levels, **call)
    assert_same(ours, slow, atol=1e-12)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), SAMPLINGS)
def test_equals_reference_on_degenerate_rois(generator, sampling_ratio, aligned):
    features, rois = features_like(generator, dtype=torch.float64), degenerate_rois(2, torch.float64)
    rois = rois[(rois[:, 3] - rois[:, 1]).abs() < 200]  # of the huge ones the reference takes too many samples
    call = {"output_size": 2, "spatial_scale": 0.25, "sampling_ratio": sampling_ratio, "aligned": aligned}
    ours = output_and_grad(ops.roi_align, [features], rois, **call)
    slow = output_and_grad(reference.roi_align, [features], rois, **call)
    assert_same(ours, slow, atol=1e-12)


def test_reference_equals_torchvision(generator):
    features, every = features_like(generator, dtype=torch.float64), all_rois(generator, torch.float64)
    every = every[(every[:, 3] - every[:, 1]).abs() < 200]
    for sampling_ratio, aligned in SAMPLINGS:
        rois = that_torchvision_takes(every, sampling_ratio=sampling_ratio, aligned=aligned)
        call = {
            "output_size": (2, 3),
            "sampling_ratio": sampling_ratio,
            "aligned": aligned,
            "spatial_scale": 0.25,
        }
        torch.testing.assert_close(
            reference.roi_align(features, rois, **call),
            torchvision.ops.roi_align(features, rois, **call),
            rtol=0,
            atol=1e-12,
        )


def test_pyramid_equals_each_level_alone(generator):
    pyramid = [torch.randn(2, 4, 24 >> i, 34 >> i, generator=generator) for i in range(4)]
    scales = [1 / 4, 1 / 8, 1 / 16, 1 / 32]
    rois, levels = random_rois(30, 2, generator), torch.randint(4, (30,), generator=generator)
    together = ops.roi_align(pyramid, rois, levels, output_size=7, spatial_scale=scales)
    for i in range(4):
        alone = ops.roi_align(pyramid[i], rois[levels == i], output_size=7, spatial_scale=scales[i])
        assert torch.equal(together[levels == i], alone)


@pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 5)])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [*SAMPLINGS, (4, False), (4, True)])
def test_equals_stored_oracle(roi_oracle: Mapping[str, np.ndarray], size, sampling_ratio, aligned):
    name = f"{size[0]}x{size[1]}"
    prefix = f"roi_align/{name}/aligned{int(aligned)}/sr{sampling_ratio}"
    for bits, atol in ((64, 1e-12), (32, 2e-5))[: 1 if size == (14, 14) else 2]:  # 14x14 is there in float64 only
        dtype = torch.float64 if bits == 64 else torch.float32
        features, rois, cotangent = (
            torch.from_numpy(roi_oracle[key]).to(dtype) for key in ("features", "rois", f"cotangent_{name}")
        )
        ours = output_and_grad(
            ops.roi_align,
            [features],
            rois,
            cotangent=cotangent,
            output_size=size,
            spatial_scale=float(roi_oracle["spatial_scale"]),
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )
        expected = [torch.from_numpy(roi_oracle[f"{prefix}/{part}{bits}"]) for part in ("out", "grad")]
        assert_same(ours, (expected[0], expected[1:]), atol=atol)


def test_hand_computed_case():
    """One bin over the whole 2x2 map, one sample in its middle: the mean of the four pixels (aligned)."""
    features = torch.tensor([[[[1.0, 2.0], [3.0, 10.0]]]])
    rois = torch.tensor([[0.0, 0.0, 0.0, 2.0, 2.0]])
    call = {"output_size": 1, "spatial_scale": 1.0, "sampling_ratio": 1}
    assert ops.roi_align(features, rois, aligned=True, **call).item() == 4.0
    assert ops.roi_align(features, rois, aligned=False, **call).item() == 10.0


@pytest.mark.parametrize(("sampling_ratio", "aligned"), SAMPLINGS)
def test_gradcheck(generator, sampling_ratio, aligned):
    pyramid = [
        torch.randn(2, 2, 6 - i, 5, generator=generator, dtype=torch.float64, requires_grad=True) for i in range(2)
    ]
    rois = torch.cat([degenerate_rois(2, torch.float64)[::4], random_rois(4, 2, generator, torch.float64)])
    rois[:, 1:] /= 4
    levels = torch.arange(len(rois)) % 2

    def pool(*features: Tensor) -> Tensor:
        return ops.roi_align(
            features,
            rois,
            levels,
            output_size=(2, 3),
            spatial_scale=(0.5, 0.3),
            sampling_ratio=sampling_ratio,
            aligned=aligned,
        )

    assert torch.autograd.gradcheck(pool, pyramid, fast_mode=True)
    assert torch.autograd.gradgradcheck(pool, pyramid, fast_mode=True)


def test_gradient_reaches_only_levels_that_need_it(generator):
    frozen, trained = (
        torch.randn(1, 2, 8, 8, generator=generator),
        torch.randn(1, 2, 4, 4, requires_grad=True),
    )
    rois, levels = random_rois(6, 1, generator), torch.tensor([0, 1, 0, 1, 0, 1])
    ops.roi_align([frozen, trained], rois, levels, output_size=2, spatial_scale=[0.1, 0.05]).sum().backward()
    assert frozen.grad is None
    assert trained.grad is not None
    assert trained.grad.abs().sum() > 0


def test_torch_compile_captures_one_graph(generator):
    pyramid = [features_like(generator).requires_grad_(), features_like(generator).requires_grad_()]
    rois, levels = random_rois(6, 2, generator), torch.tensor([0, 1, 0, 1, 0, 1])

    def pool(features: list[Tensor], rois: Tensor, levels: Tensor) -> Tensor:
        return ops.roi_align(features, rois, levels, output_size=7, spatial_scale=[1 / 4, 1 / 8]) * 2

    compiled = torch.compile(pool, fullgraph=True, backend="aot_eager")
    ours, eager = compiled(pyramid, rois, levels), pool(pyramid, rois, levels)
    assert torch.equal(ours, eager)
    for actual, expected in zip(
        torch.autograd.grad(ours.sum(), pyramid), torch.autograd.grad(eager.sum(), pyramid), strict=True
    ):
        assert torch.equal(actual, expected)


def test_no_rois(generator):
    features = features_like(generator).requires_grad_()
    output = ops.roi_align(features, torch.zeros(0, 5), output_size=7, spatial_scale=1 / STRIDE)
    output.sum().backward()
    assert output.shape == (0, 3, 7, 7)
    assert features.grad is not None
    assert not features.grad.any()
    assert reference.roi_align(features, torch.zeros(0, 5), output_size=7, spatial_scale=1.0).shape == output.shape


def test_image_or_level_without_rois_gets_a_zero_gradient(generator):
    pyramid, rois = [features_like(generator), features_like(generator)], random_rois(9, 1, generator)
    levels = torch.zeros(9, dtype=torch.int64)
    _, grads = output_and_grad(ops.roi_align, pyramid, rois, levels, output_size=7, spatial_scale=[1 / 4, 1 / 8])
    assert grads[0][0].any()
    assert not grads[0][1].any()
    assert not grads[1].any()


def test_layout_does_not_matter(generator):
    features, rois = features_like(generator, channels=5), all_rois(generator, torch.float32)
    expected = output_and_grad(ops.roi_align, [features], rois, output_size=7, spatial_scale=1 / STRIDE)
    channels_last = features.to(memory_format=torch.channels_last)
    strided = torch.stack([features, features], -1)[..., 0]
    wide_rois = torch.stack([rois, rois], -1)[..., 1]
    assert not strided.is_contiguous()
    for layout in (channels_last, strided):
        actual = output_and_grad(ops.roi_align, [layout], wide_rois, output_size=7, spatial_scale=1 / STRIDE)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1][0], expected[1][0])
    output = ops.roi_align(features.requires_grad_(), rois, output_size=7, spatial_scale=1 / STRIDE)
    output.permute(3, 2, 1, 0).contiguous().sum().backward()  # a gradient that is not contiguous
    torch.testing.assert_close(
        features.grad,
        output_and_grad(
            ops.roi_align,
            [features],
            rois,
            cotangent=torch.ones_like(output),
            output_size=7,
            spatial_scale=1 / STRIDE,
        )[1][0],
    )


def test_threads_do_not_change_a_bit(generator):
    features, rois = features_like(generator, channels=64), all_rois(generator, torch.float32).repeat(4, 1)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 4):
        torch.set_num_threads(threads)
        results.append(output_and_grad(ops.roi_align, [features], rois, output_size=14, spatial_scale=1 / STRIDE))
    torch.set_num_threads(before)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1][0], results[1][1][0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu_computes_in_float32(generator, dtype):
    features, rois = features_like(generator, dtype=dtype), all_rois(generator, torch.float32)
    half = output_and_grad(ops.roi_align, [features], rois, output_size=7, spatial_scale=1 / STRIDE)
    full = output_and_grad(ops.roi_align, [features.float()], rois, output_size=7, spatial_scale=1 / STRIDE)
    assert half[0].dtype == half[1][0].dtype == dtype
    assert torch.equal(half[0], full[0].to(dtype))


@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 3e9, -1e12])
def test_wild_coordinates_read_nothing_out_of_bounds(generator, value, sampling_ratio):
    """What a diverging model may ask for: answered in finite time with finite numbers."""
    features = features_like(generator)
    rois = torch.tensor([[0, value, 0, 10, 10], [1, 0, 0, value, 10], [0, 1, value, 9, 9], [0, -3e9, -3e9, 3e9, 3e9]])
    output, (grad,) = output_and_grad(
        ops.roi_align,
        [features],
        rois,
        output_size=7,
        spatial_scale=1 / STRIDE,
        sampling_ratio=sampling_ratio,
    )
    assert torch.isfinite(output).all()
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("image", [-1.0, 2.0, float("nan")])
def test_batch_index_out_of_range(generator, image):
    rois = torch.tensor([[0, 0, 0, 9, 9], [image, 0, 0, 9, 9]])
    with pytest.raises(RuntimeError, match=r"rois\[1\] has batch index .* 2 images"):
        ops.roi_align(features_like(generator), rois, output_size=7, spatial_scale=1.0)


@pytest.mark.parametrize("level", [-1, 1])
def test_level_out_of_range(generator, level):
    with pytest.raises(RuntimeError, match=rf"levels\[0\] is {level} but there are 1 levels"):
        ops.roi_align(
            features_like(generator),
            torch.zeros(1, 5),
            torch.tensor([level]),
            output_size=7,
            spatial_scale=1.0,
        )


MAP = torch.zeros(1, 2, 4, 4)
ROIS = torch.zeros(3, 5)


@pytest.mark.parametrize(
    ("features", "rois", "levels", "change", "message"),
    [
        ([], ROIS, None, {"spatial_scale": []}, "features has 0 levels: give 1 to 8"),
        ([MAP] * 9, ROIS, None, {"spatial_scale": [1.0] * 9}, "features has 9 levels: give 1 to 8"),
        (MAP[0], ROIS, None, {}, r"features\[0\] is \(2, 4, 4\): give \(B, C, H, W\)"),
        (MAP.int(), ROIS, None, {}, r"features\[0\] is torch.int32: give float32"),
        (
            [MAP, MAP[:, :1]],
            ROIS,
            None,
            {"spatial_scale": [1, 1]},
            r"features\[1\] is \(1, 1, 4, 4\).*must agree",
        ),
        ([MAP, MAP.double()], ROIS, None, {"spatial_scale": [1, 1]}, r"features\[1\].*float64.*must agree"),
        (MAP, ROIS, None, {"spatial_scale": [1, 2]}, "spatial_scale has 2 values for 1 feature levels"),
        (MAP, ROIS[:, 1:], None, {}, r"rois is \(3, 4\): give \(R, 5\): batch index"),
        (MAP, ROIS.half(), None, {}, "rois is torch.float16: give float32"),
        (MAP, ROIS.to("meta"), None, {}, "rois is on meta: move it to cpu"),
        ([MAP, MAP], ROIS, None, {"spatial_scale": [1, 1]}, "levels is None but there are 2 feature levels"),
        (MAP, ROIS, torch.zeros(3), {}, r"levels is \(3,\) torch.float32: give \(R,\) torch.int64"),
        (MAP, ROIS, torch.zeros(2, dtype=torch.int64), {}, "levels has 2 entries for 3 RoIs"),
        (MAP, ROIS, None, {"output_size": (7, 0)}, "output_size is 7x0: give at least 1"),
    ],
)
def test_errors_name_argument_value_and_remedy(features, rois, levels, change, message):
    with pytest.raises(ValueError, match=message):
        ops.roi_align(features, rois, levels, **{"output_size": 7, "spatial_scale": 1.0, **change})


def test_raw_operator_checks_its_arguments_too():
    levels = torch.zeros(3, dtype=torch.int64)
    raw, grad = torch.ops.mrcnn, torch.zeros(3, 2, 7, 7)
    with pytest.raises(RuntimeError, match="rois must be float32"):
        raw.roi_mean([MAP], ROIS.double(), levels, [1.0], 7, 7, Rule.ALIGN, 2)
    with pytest.raises(RuntimeError, match="CPU features must be float32 or float64"):
        raw.roi_mean([MAP.half()], ROIS, levels, [1.0], 7, 7, Rule.ALIGN, 2)
    with pytest.raises(RuntimeError, match="forward output's shape"):
        raw.roi_mean_backward(grad[:2], [MAP], ROIS, levels, [1.0], Rule.ALIGN, 2)
    with pytest.raises(RuntimeError, match="no rule 7"):
        raw.roi_mean([MAP], ROIS, levels, [1.0], 7, 7, 7, 2)
    with pytest.raises(RuntimeError, match="kPool has no mean"):
        raw.roi_mean([MAP], ROIS, levels, [1.0], 7, 7, Rule.POOL, 2)
    with pytest.raises(RuntimeError, match="kPrecise has no maximum"):
        raw.roi_max([MAP], ROIS, levels, [1.0], 7, 7, Rule.PRECISE, 2)
    with pytest.raises(RuntimeError, match="too many samples in a bin"):
        raw.roi_max([MAP], ROIS, levels, [1.0], 7, 7, Rule.ALIGN, 1 << 20)
    with pytest.raises(RuntimeError, match="argmax must have grad's shape"):
        raw.roi_max_backward(grad, torch.zeros(3, 2, 7, 7), [MAP], ROIS, levels, [1.0], Rule.ALIGN, 2)
