"""All RoI operators against the stored oracles, torchvision and the slow reference; gradients and operator checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from roi_cases import (
    ATOL,
    DEGENERATE,
    STRIDE,
    VARIANT_NAMES,
    VARIANTS,
    all_rois,
    assert_same,
    degenerate_rois,
    features_like,
    output_and_grad,
    random_rois,
)
from torch import Tensor

from mrcnn import ops
from mrcnn.ops import reference
from mrcnn.ops._library import Rule

ORACLE_FOLDERS = ("roi_align", "roi_align_max", "roi_pool", "roi_warp", "roi_warp_mnc", "prroi_pool")
every_variant = pytest.mark.parametrize(("name", "call"), VARIANTS, ids=VARIANT_NAMES)


def oracle_call(key: str) -> tuple[str, dict[str, Any]]:
    """What to call for a key as `roi_warp/7x7/sr2/inclusive1/max`: the operator's name and its keywords."""
    folder, size, *options = key.split("/")
    call: dict[str, Any] = {"output_size": tuple(map(int, size.split("x")))}
    for option in options:
        if option.startswith("sr"):
            call["sampling_ratio"] = int(option[2:])
        elif option.startswith("aligned"):
            call["aligned"] = option == "aligned1"
        elif option.startswith("inclusive"):
            call["variant"] = "inclusive" if option == "inclusive1" else "exclusive"
        else:
            call["reduce"] = option
    if folder == "roi_align_max":
        call["reduce"] = "max"
    if folder == "roi_warp_mnc":
        call["variant"] = "mnc"
    names = {"roi_align_max": "roi_align", "roi_warp_mnc": "roi_warp", "prroi_pool": "precise_roi_pool"}
    return names.get(folder, folder), call


@pytest.mark.parametrize("folder", ORACLE_FOLDERS)
def test_equals_every_stored_oracle(roi_oracle: Mapping[str, np.ndarray], folder):
    """Outputs and gradients for every key of the file, float64 to 1e-12 and float32 to 2e-5."""
    keys = sorted({key.rsplit("/", 1)[0] for key in roi_oracle if key.startswith(f"{folder}/")})
    assert keys
    for key in keys:
        name, call = oracle_call(key)
        for bits, dtype in ((64, torch.float64), (32, torch.float32)):
            if f"{key}/out{bits}" not in roi_oracle:
                continue
            features, rois, cotangent = (
                torch.from_numpy(roi_oracle[part]).to(dtype)
                for part in ("features", "rois", f"cotangent_{key.split('/')[1]}")
            )
            scale = float(roi_oracle["spatial_scale"])
            output, grads = output_and_grad(
                getattr(ops, name), [features], rois, cotangent=cotangent, spatial_scale=scale, **call
            )
            expected = [torch.from_numpy(roi_oracle[f"{key}/{part}{bits}"]) for part in ("out", "grad")]
            kept = [i for i, roi in enumerate(roi_oracle["roi_names"]) if bits == 64 or roi != "grid_minus_eps"]
            tolerance = {"rtol": 1e-12, "atol": 1e-12} if bits == 64 else {"rtol": 0.0, "atol": 2e-5}
            torch.testing.assert_close(
                output[kept], expected[0][kept], msg=lambda m, key=key: f"{key}: {m}", **tolerance
            )
            torch.testing.assert_close(grads[0], expected[1], msg=lambda m, key=key: f"{key}: {m}", **tolerance)


def test_every_key_of_the_oracle_is_compared(roi_oracle: Mapping[str, np.ndarray]):
    folders = {key.split("/")[0] for key in roi_oracle if "/" in key}
    assert folders == set(ORACLE_FOLDERS)
    assert {key.rsplit("/", 1)[1] for key in roi_oracle if "/" in key} == {
        "out64", "grad64", "out32", "grad32", "roi_grad64"
    }  # fmt: skip


@pytest.mark.parametrize("size", ["7x7", "14x14", "3x5"])
def test_gradient_in_the_rois_equals_stored_oracle(roi_oracle: Mapping[str, np.ndarray], size):
    features, cotangent = (torch.from_numpy(roi_oracle[key]).double() for key in ("features", f"cotangent_{size}"))
    rois = torch.from_numpy(roi_oracle["rois"]).double().requires_grad_()
    output = ops.precise_roi_pool(
        features,
        rois,
        output_size=tuple(map(int, size.split("x"))),  # type: ignore[arg-type]
        spatial_scale=float(roi_oracle["spatial_scale"]),
    )
    (grad,) = torch.autograd.grad(output, rois, cotangent)
    expected = torch.from_numpy(roi_oracle[f"prroi_pool/{size}/roi_grad64"])
    # The oracle subtracts antiderivatives, of which a bin of 0.004 pixels leaves it eleven digits; in extended
    # precision it agrees with the kernel to 4e-13 there too.
    tiny = torch.from_numpy(np.char.startswith(roi_oracle["roi_names"], "tiny"))
    torch.testing.assert_close(grad[~tiny], expected[~tiny], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad[tiny], expected[tiny], rtol=1e-12, atol=3e-11)


@every_variant
def test_equals_reference_on_a_pyramid(generator, name, call):
    pyramid = [torch.randn(2, 3, 12 >> i, 18 >> i, generator=generator, dtype=torch.float64) for i in range(3)]
    rois, levels = random_rois(9, 2, generator, torch.float64), torch.arange(9) % 3
    pooling = {"output_size": (2, 3), "spatial_scale": [1 / 4, 1 / 8, 1 / 16], **call}
    ours = output_and_grad(getattr(ops, name), pyramid, rois, levels, **pooling)
    slow = output_and_grad(getattr(reference, name), pyramid, rois, levels, **pooling)
    assert_same(ours, slow, atol=1e-12)


@every_variant
def test_equals_reference_on_degenerate_rois(generator, name, call):
    features, rois = features_like(generator, dtype=torch.float64), degenerate_rois(2, torch.float64)
    rois = rois[(rois[:, 3] - rois[:, 1]).abs() < 200]  # of the huge ones the reference takes too many samples
    pooling = {"output_size": 2, "spatial_scale": 0.25, **call}
    ours = output_and_grad(getattr(ops, name), [features], rois, **pooling)
    slow = output_and_grad(getattr(reference, name), [features], rois, **pooling)
    assert_same(ours, slow, atol=1e-11 if name == "precise_roi_pool" else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(7, 7), (14, 14), (3, 5), (1, 1), (9, 20)])
def test_roi_pool_equals_torchvision(generator, dtype, size):
    features, rois = features_like(generator, dtype=dtype), all_rois(generator, dtype)
    features = torch.where(features.abs() < 0.4, 0, features)  # ties
    ours = output_and_grad(ops.roi_pool, [features], rois, output_size=size, spatial_scale=1 / STRIDE)
    theirs = output_and_grad(torchvision.ops.roi_pool, [features], rois, output_size=size, spatial_scale=1 / STRIDE)
    assert torch.equal(ours[0], theirs[0])
    assert_same(ours, theirs, atol=ATOL[dtype])


@pytest.mark.parametrize("name", ["roi_align", "roi_warp"])
def test_maximum_is_at_least_the_mean_and_equals_it_with_one_sample(generator, name):
    features, rois = features_like(generator), random_rois(30, 2, generator)
    pooling = {"output_size": 7, "spatial_scale": 1 / STRIDE}
    mean, most = (getattr(ops, name)(features, rois, reduce=reduce, **pooling) for reduce in ("mean", "max"))
    assert (most >= mean - 1e-6).all()
    one = [
        output_and_grad(getattr(ops, name), [features], rois, reduce=reduce, sampling_ratio=1, **pooling)
        for reduce in ("mean", "max")
    ]
    assert_same(one[0], one[1], atol=1e-6)


def test_precise_pooling_is_the_limit_of_many_samples(generator):
    features = features_like(generator, dtype=torch.float64)
    rois = torch.tensor([[0, 9.0, 7, 50, 40], [1, 20, 11, 31, 44]], dtype=torch.float64)
    pooling = {"output_size": 3, "spatial_scale": 1 / STRIDE}
    exact = ops.precise_roi_pool(features, rois, **pooling)
    sampled = ops.roi_align(features, rois, sampling_ratio=512, aligned=False, **pooling)
    torch.testing.assert_close(exact, sampled, rtol=0, atol=2e-5)


def test_precise_pooling_of_a_tiny_roi_reads_the_point_it_is_at():
    """In float32 a RoI of a millionth of a pixel still gives the map's value there, and a finite gradient."""
    features = torch.arange(20.0).view(1, 1, 4, 5).requires_grad_()
    rois = torch.tensor([[0, 2.25, 1.5, 2.25 + 1e-6, 1.5 + 1e-6]], requires_grad=True)
    output = ops.precise_roi_pool(features, rois, output_size=1, spatial_scale=1.0)
    assert output.item() == pytest.approx(5 * 1.5 + 2.25, rel=1e-5)
    output.backward()
    assert torch.isfinite(features.grad).all()
    assert torch.isfinite(rois.grad).all()


@every_variant
def test_gradcheck(generator, name, call):
    pyramid = [
        torch.randn(2, 2, 6 - i, 5, generator=generator, dtype=torch.float64, requires_grad=True) for i in range(2)
    ]
    rois = torch.cat([degenerate_rois(2, torch.float64)[::4], random_rois(4, 2, generator, torch.float64)])
    rois[:, 1:] /= 4
    levels = torch.arange(len(rois)) % 2

    def pool(*features: Tensor) -> Tensor:
        return getattr(ops, name)(features, rois, levels, output_size=(2, 3), spatial_scale=(0.5, 0.3), **call)

    assert torch.autograd.gradcheck(pool, pyramid, fast_mode=True)
    if name == "precise_roi_pool" or (call.get("reduce", "mean") == "mean" and name != "roi_pool"):
        assert torch.autograd.gradgradcheck(pool, pyramid, fast_mode=True)


def test_gradcheck_in_the_rois(generator):
    pyramid = [
        torch.randn(2, 2, 6 - i, 5, generator=generator, dtype=torch.float64, requires_grad=True) for i in range(2)
    ]
    rois = random_rois(6, 2, generator, torch.float64)
    rois[:, 1:] = rois[:, 1:] / 4 + torch.tensor([0, 0, 2, 2])  # none so small that a difference would leave it
    image, boxes, levels = rois[:, :1], rois[:, 1:].requires_grad_(), torch.arange(6) % 2

    def pool(boxes: Tensor, *features: Tensor) -> Tensor:
        rois = torch.cat([image, boxes], 1)
        return ops.precise_roi_pool(features, rois, levels, output_size=(2, 3), spatial_scale=(0.5, 0.3))

    assert torch.autograd.gradcheck(pool, [boxes, *pyramid])


def test_gradient_in_the_rois_equals_autograd_through_the_reference(generator):
    features, rois = features_like(generator, dtype=torch.float64), random_rois(20, 2, generator, torch.float64)
    grads = []
    for module in (ops, reference):
        leaf = rois.clone().requires_grad_()
        output = module.precise_roi_pool(features, leaf, output_size=(3, 4), spatial_scale=1 / STRIDE)
        grads.append(torch.autograd.grad(output, leaf, torch.ones_like(output).cumsum(3))[0])
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-8, atol=1e-8)
    assert not grads[0][:, 0].any()


def test_rois_keep_their_dtype_and_other_operators_give_them_no_gradient(generator):
    features = features_like(generator)
    rois = random_rois(5, 2, generator, torch.float64).requires_grad_()
    ops.precise_roi_pool(features, rois, output_size=2, spatial_scale=1 / STRIDE).sum().backward()
    assert rois.grad is not None
    assert rois.grad.dtype == torch.float64
    assert rois.grad.any()
    assert not ops.roi_align(features, rois, output_size=2, spatial_scale=1 / STRIDE).requires_grad


@pytest.mark.parametrize("name", ["roi_pool", "roi_align"])
def test_no_second_derivative_of_a_maximum(generator, name):
    features = features_like(generator, dtype=torch.float64).requires_grad_()
    call = {"reduce": "max"} if name == "roi_align" else {}
    output = getattr(ops, name)(features, random_rois(3, 2, generator), output_size=2, spatial_scale=0.25, **call)
    (grad,) = torch.autograd.grad(output.square().sum(), features, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        grad.sum().backward()


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's
@pytest.mark.parametrize("rule", list(Rule))
def test_opcheck(generator, rule):
    pyramid = [torch.randn(2, 3, 6, 7, generator=generator, requires_grad=True) for _ in range(2)]
    detached = [level.detach() for level in pyramid]
    rois, levels = random_rois(5, 2, generator), torch.tensor([0, 1, 0, 1, 1])
    grad, raw = torch.randn(5, 3, 2, 3, generator=generator), torch.ops.mrcnn
    call = (rois.requires_grad_(rule == Rule.PRECISE), levels, [0.1, 0.05])
    if rule != Rule.POOL:
        torch.library.opcheck(raw.roi_mean.default, (pyramid, *call, 2, 3, rule, 2))
        arguments = (grad.clone().requires_grad_(rule != Rule.PRECISE), detached, rois.detach(), *call[1:])
        torch.library.opcheck(raw.roi_mean_backward.default, (*arguments, rule, 2))
    if rule != Rule.PRECISE:
        torch.library.opcheck(raw.roi_max.default, (pyramid, *call, 2, 3, rule, 2))
        argmax = raw.roi_max(detached, *call, 2, 3, rule, 2)[1]
        torch.library.opcheck(raw.roi_max_backward.default, (grad, argmax, detached, *call, rule, 2))
    else:
        torch.library.opcheck(raw.precise_roi_grad.default, (grad, detached, rois.detach(), *call[1:]))


@every_variant
def test_no_rois(generator, name, call):
    features, nothing = features_like(generator).requires_grad_(), torch.zeros(0, 5, requires_grad=True)
    for module in (ops, reference):
        output = getattr(module, name)(features, nothing, output_size=7, spatial_scale=1 / STRIDE, **call)
        (grad,) = torch.autograd.grad(output.sum(), features)
        assert output.shape == (0, 3, 7, 7)
        assert not grad.any()


@every_variant
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 3e9, -1e12])
def test_wild_coordinates_read_nothing_out_of_bounds(generator, name, call, value):
    """What a diverging model may ask for: answered in finite time with finite numbers."""
    features = features_like(generator)
    rois = torch.tensor([[0, value, 0, 10, 10], [1, 0, 0, value, 10], [0, 1, value, 9, 9], [0, -3e9, -3e9, 3e9, 3e9]])
    rois = rois.requires_grad_(name == "precise_roi_pool")
    output, (grad,) = output_and_grad(
        getattr(ops, name), [features], rois, output_size=7, spatial_scale=1 / STRIDE, **call
    )
    assert torch.isfinite(output).all()
    assert torch.isfinite(grad).all()
    if rois.requires_grad:
        again = ops.precise_roi_pool(features, rois, output_size=7, spatial_scale=1 / STRIDE)
        assert torch.isfinite(torch.autograd.grad(again.sum(), rois)[0]).all()


@every_variant
def test_boxes_outside_and_empty_maps_read_as_zero(generator, name, call):
    outside = torch.tensor([[0.0, *DEGENERATE[key]] for key in DEGENERATE if key.startswith("outside")])
    pooling = {"output_size": 3, "spatial_scale": 1 / STRIDE, **call}
    output, (grad,) = output_and_grad(getattr(ops, name), [features_like(generator)], outside, **pooling)
    assert not output.any()
    assert not grad.any()
    empty = torch.zeros(1, 2, 0, 5)
    assert not getattr(ops, name)(empty, torch.tensor([[0.0, 0, 0, 9, 9]]), **pooling).any()


def test_roi_pool_shows_a_nan():
    features = torch.zeros(1, 1, 4, 4)
    features[0, 0, 1, 2] = torch.nan
    output = ops.roi_pool(features, torch.tensor([[0.0, 0, 0, 3, 3]]), output_size=2, spatial_scale=1.0)
    assert output.isnan().flatten().tolist() == [False, True, False, False]


@every_variant
def test_threads_and_layout_do_not_change_a_bit(generator, name, call):
    features, rois = features_like(generator, channels=48), all_rois(generator, torch.float32).repeat(3, 1)
    pooling = {"output_size": 7, "spatial_scale": 1 / STRIDE, **call}
    expected = output_and_grad(getattr(ops, name), [features], rois, **pooling)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    wide_rois = torch.stack([rois, rois], -1)[..., 1]
    actual = output_and_grad(getattr(ops, name), [features.to(memory_format=torch.channels_last)], wide_rois, **pooling)
    torch.set_num_threads(before)
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1][0], expected[1][0])


def test_gradient_in_the_rois_does_not_depend_on_threads(generator):
    features, rois = features_like(generator, channels=16), random_rois(40, 2, generator).requires_grad_()
    before, grads = torch.get_num_threads(), []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        output = ops.precise_roi_pool(features, rois, output_size=7, spatial_scale=1 / STRIDE)
        grads.append(torch.autograd.grad(output.sum(), rois)[0])
    torch.set_num_threads(before)
    assert torch.equal(grads[0], grads[1])


@every_variant
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_on_the_cpu_computes_in_float32(generator, name, call, dtype):
    features, rois = features_like(generator, dtype=dtype), random_rois(20, 2, generator)
    pooling = {"output_size": 7, "spatial_scale": 1 / STRIDE, **call}
    half = output_and_grad(getattr(ops, name), [features], rois, **pooling)
    full = output_and_grad(getattr(ops, name), [features.float()], rois, **pooling)
    assert half[0].dtype == half[1][0].dtype == dtype
    assert torch.equal(half[0], full[0].to(dtype))


@pytest.mark.parametrize(
    ("name", "call", "message"),
    [
        ("roi_align", {"reduce": "sum"}, "reduce is 'sum': give 'mean' or 'max'"),
        ("roi_warp", {"reduce": "min"}, "reduce is 'min': give 'mean' or 'max'"),
        ("roi_warp", {"variant": "caffe"}, "variant is 'caffe': give 'inclusive' or 'exclusive' or 'mnc'"),
        ("roi_pool", {"output_size": 0}, "output_size is 0x0: give at least 1"),
        ("precise_roi_pool", {"spatial_scale": []}, "spatial_scale has 0 values for 1 feature levels"),
    ],
)
def test_errors_name_argument_value_and_remedy(name, call, message):
    with pytest.raises(ValueError, match=message):
        getattr(ops, name)(
            torch.zeros(1, 2, 4, 4), torch.zeros(3, 5), **{"output_size": 7, "spatial_scale": 1.0, **call}
        )
