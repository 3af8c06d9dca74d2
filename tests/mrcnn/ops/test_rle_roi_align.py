"""RoIAlign of run-length masks against pycocotools' decoding followed by torchvision's RoIAlign."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch
import torchvision
from pycocotools import mask as coco_mask
from roi_cases import degenerate_rois, random_rois, that_torchvision_takes
from torch import Tensor

from mrcnn import ops
from mrcnn.ops import reference
from mrcnn.structures import RunLengthMasks

SAMPLINGS = list(product((0, 1, 2), (False, True)))  # sampling_ratio, aligned
SIZE = (48, 68)  # height, width


def bitmaps(generator: torch.Generator) -> np.ndarray:
    """(I, H, W) uint8: noise, empty, full, a box, a disc, single pixels, stripes either way."""
    height, width = SIZE
    masks = np.zeros((9, height, width), np.uint8)
    masks[0] = (torch.rand(SIZE, generator=generator) > 0.5).numpy()
    masks[2] = 1
    masks[3, 10:30, 7:40] = 1
    y, x = np.ogrid[:height, :width]
    masks[4] = (y - 20) ** 2 + (x - 40) ** 2 < 15**2
    masks[5, [0, 0, -1, -1, 20], [0, -1, 0, -1, 30]] = 1
    masks[6, ::2] = 1
    masks[7, :, 1::2] = 1
    masks[8, :, :3] = 1
    return masks


def run_lengths(masks: np.ndarray) -> RunLengthMasks:
    """The masks' COCO run lengths, read from pycocotools' own encoding, and a last instance without any."""
    ends, offsets = [], [0]
    for mask in masks:
        encoded = coco_mask.encode(np.asfortranarray(mask))
        ends.append(np.cumsum(counts_of(encoded["counts"])))
        offsets.append(offsets[-1] + len(ends[-1]))
    offsets.append(offsets[-1])
    return RunLengthMasks(torch.from_numpy(np.concatenate(ends)).int(), torch.tensor(offsets))


def counts_of(packed: bytes) -> list[int]:
    """Unpacks COCO's run-length string: 5 bits a character, the runs from the third on as differences."""
    counts: list[int] = []
    value = shift = 0
    for character in packed:
        bits = character - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if not bits & 0x20:
            value -= (bits & 0x10) << (shift - 4)
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def all_rois(generator: torch.Generator) -> Tensor:
    return torch.cat([degenerate_rois(1), random_rois(40, 1, generator)])[:, 1:]


def expected_targets(masks: np.ndarray, rois: Tensor, instances: Tensor, **call) -> Tensor:
    """torchvision's RoIAlign of pycocotools' decoded masks."""
    encoded = [coco_mask.encode(np.asfortranarray(mask)) for mask in masks]
    decoded = torch.from_numpy(np.stack([coco_mask.decode(rle) for rle in encoded]))[:, None].double()
    decoded = torch.cat([decoded, torch.zeros_like(decoded[:1])])
    indexed = torch.cat([instances[:, None].double(), rois.double()], 1)
    return torchvision.ops.roi_align(decoded, indexed, spatial_scale=1.0, **call)[:, 0]


@pytest.mark.parametrize("output_size", [28, 14, 7, 1])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), SAMPLINGS)
def test_equals_pycocotools_and_torchvision(generator, output_size, sampling_ratio, aligned):
    bits = bitmaps(generator)
    boxes = that_torchvision_takes(all_rois(generator), sampling_ratio=sampling_ratio, aligned=aligned)
    # In float32 the just_off_grid RoI may round to one more sample than in float64.
    boxes = boxes[(boxes - torch.tensor([3.999, 7.999, 31.999, 35.999])).abs().sum(1) > 1e-3]
    rois = boxes.repeat(len(bits) + 1, 1)
    instances = torch.arange(len(bits) + 1).repeat_interleave(len(boxes))
    call = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    sizes = torch.tensor([SIZE]).expand(len(rois), 2)
    actual = ops.rle_roi_align(run_lengths(bits), rois, instances, sizes, **call)
    assert actual.dtype == torch.float32
    expected = expected_targets(bits, rois, instances, **call)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("sampling_ratio", "aligned"), SAMPLINGS)
def test_equals_roi_align_of_the_bitmap(generator, sampling_ratio, aligned):
    """Both compiled operators sample in float32, so they agree to rounding, sample counts and all."""
    bits = bitmaps(generator)
    rois = all_rois(generator)
    instances = torch.randint(len(bits), (len(rois),), generator=generator)
    call = {"output_size": 14, "sampling_ratio": sampling_ratio, "aligned": aligned}
    actual = ops.rle_roi_align(run_lengths(bits), rois, instances, torch.tensor([SIZE]).expand(len(rois), 2), **call)
    planes = torch.from_numpy(bits)[:, None].float()
    expected = ops.roi_align(planes, torch.cat([instances[:, None].float(), rois], 1), spatial_scale=1.0, **call)
    torch.testing.assert_close(actual, expected[:, 0], rtol=0, atol=3e-6)


def test_equals_reference_on_masks_of_different_sizes(generator):
    sizes = [(5, 9), (48, 68), (31, 1), (1, 20)]
    bits = [(torch.rand(size, generator=generator) > 0.4).numpy().astype(np.uint8) for size in sizes]
    parts = [run_lengths(mask[None]).ends for mask in bits]
    offsets = torch.tensor([0, *np.cumsum([len(part) for part in parts])])
    masks = RunLengthMasks(torch.cat(parts), offsets)
    instances = torch.randint(4, (30,), generator=generator)
    image_sizes = torch.tensor(sizes)[instances]
    rois = random_rois(30, 1, generator)[:, 1:]
    call = {"output_size": 5, "sampling_ratio": 2}
    actual = ops.rle_roi_align(masks, rois, instances, image_sizes, **call)
    expected = reference.rle_roi_align(masks, rois, instances, image_sizes, **call)
    torch.testing.assert_close(actual.double(), expected, rtol=0, atol=1e-4)


def test_reference_decodes_as_pycocotools(generator):
    bits = bitmaps(generator)
    masks = run_lengths(bits)
    for i, mask in enumerate(bits):
        ends = masks.ends[masks.offsets[i] : masks.offsets[i + 1]]
        assert np.array_equal(reference.decode(ends, *SIZE).numpy(), mask.astype(bool))


def test_a_box_of_the_mask_itself_is_all_ones(generator):
    masks = run_lengths(bitmaps(generator))
    target = ops.rle_roi_align(
        masks,
        torch.tensor([[7.0, 10.0, 40.0, 30.0]]),
        torch.tensor([3]),
        torch.tensor([SIZE]),
        output_size=28,
    )
    inner = target[0, 1:-1, 1:-1]
    torch.testing.assert_close(inner, torch.ones_like(inner))


def test_no_rois_and_no_masks():
    nothing = RunLengthMasks(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    index = torch.zeros(0, dtype=torch.int64)
    empty = ops.rle_roi_align(nothing, torch.zeros(0, 4), index, index.view(0, 2), output_size=28)
    assert empty.shape == (0, 28, 28)


def test_layout_does_not_matter(generator):
    masks, rois = run_lengths(bitmaps(generator)), all_rois(generator)
    instances = torch.randint(9, (len(rois),), generator=generator)
    sizes = torch.tensor([SIZE]).repeat(len(rois), 1)
    expected = ops.rle_roi_align(masks, rois, instances, sizes, output_size=14)
    strided = RunLengthMasks(masks.ends.repeat_interleave(2)[::2], masks.offsets.repeat_interleave(2)[1::2])
    actual = ops.rle_roi_align(
        strided,
        rois.T.contiguous().T,
        instances.repeat_interleave(2)[::2],
        sizes.T.contiguous().T,
        output_size=14,
    )
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("sampling_ratio", [0, 2])
def test_wild_coordinates_read_nothing_out_of_bounds(generator, sampling_ratio):
    wild = [float("nan"), float("inf"), -float("inf"), 1e30, 3e9]
    rois = torch.tensor([[0, 0, value, 10] for value in wild] + [[value, value, 10, 10] for value in wild])
    sizes = torch.tensor([SIZE]).repeat(len(rois), 1)
    sizes[-1] = 0
    instances = torch.zeros(len(rois), dtype=torch.int64)
    instances[-1] = 9  # without runs, over an image without pixels
    targets = ops.rle_roi_align(
        run_lengths(bitmaps(generator)), rois, instances, sizes, output_size=7, sampling_ratio=sampling_ratio
    )
    assert torch.isfinite(targets).all()


def test_opcheck_and_fake_kernel(generator):
    masks, rois = run_lengths(bitmaps(generator)), random_rois(4, 1, generator)[:, 1:]
    args = (masks.ends, masks.offsets, rois, torch.tensor([0, 3, 4, 9]), torch.tensor([SIZE] * 4), 7, 0, True)
    torch.library.opcheck(torch.ops.mrcnn.rle_roi_align.default, args)


def test_rois_that_need_a_gradient_get_none(generator):
    rois = random_rois(4, 1, generator)[:, 1:].requires_grad_()
    targets = ops.rle_roi_align(
        run_lengths(bitmaps(generator)), rois, torch.arange(4), torch.tensor([SIZE] * 4), output_size=7
    )
    assert not targets.requires_grad


ENDS = torch.tensor([10, 20], dtype=torch.int32)
OFFSETS = torch.tensor([0, 2])
ROIS = torch.zeros(1, 4)
INDEX = torch.zeros(1, dtype=torch.int64)
IMAGE = torch.tensor([[4, 5]])


@pytest.mark.parametrize(
    ("arguments", "output_size", "message"),
    [
        (
            (ENDS.long(), OFFSETS, ROIS, INDEX, IMAGE),
            7,
            r"masks.ends is \(2,\) torch.int64: give \(T,\) torch.int32",
        ),
        (
            (ENDS, OFFSETS.int(), ROIS, INDEX, IMAGE),
            7,
            r"masks.offsets is .*int32: give \(I \+ 1,\) torch.int64",
        ),
        ((ENDS, OFFSETS[:0], ROIS, INDEX, IMAGE), 7, "masks.offsets is empty"),
        ((ENDS, OFFSETS, torch.zeros(1, 5), INDEX, IMAGE), 7, r"rois is \(1, 5\): give \(R, 4\)"),
        ((ENDS, OFFSETS, ROIS, INDEX.float(), IMAGE), 7, "instances is .* give"),
        ((ENDS, OFFSETS, ROIS, INDEX[:0], IMAGE), 7, "instances has 0 entries for 1 RoIs"),
        ((ENDS, OFFSETS, ROIS, INDEX, IMAGE[0]), 7, r"sizes is \(2,\) torch.int64: give \(R, 2\)"),
        ((ENDS, OFFSETS, ROIS, INDEX, IMAGE[:, :1]), 7, r"sizes is \(1, 1\) but rois is \(1, 4\)"),
        ((ENDS, OFFSETS, ROIS, INDEX, IMAGE.to("meta")), 7, "sizes is on meta: move it to cpu"),
        ((ENDS, OFFSETS, ROIS, INDEX, IMAGE), 0, "output_size is 0: give at least 1"),
    ],
)
def test_errors_name_argument_value_and_remedy(arguments, output_size, message):
    ends, offsets, *rest = arguments
    with pytest.raises(ValueError, match=message):
        ops.rle_roi_align(RunLengthMasks(ends, offsets), *rest, output_size=output_size)


@pytest.mark.parametrize(
    ("offsets", "instance", "size", "message"),
    [
        ([0, 2], 1, (4, 5), r"instances\[0\] is 1 but there are 1 masks"),
        ([0, 2], -1, (4, 5), r"instances\[0\] is -1 but there are 1 masks"),
        ([0, 3], 0, (4, 5), "offsets of mask 0 do not lie in its 2 runs"),
        ([2, 0], 0, (4, 5), "offsets of mask 0 do not lie in its 2 runs"),
        ([0, 2], 0, (4, 6), r"do not fill the 4x6 pixels of sizes\[0\]"),
        ([0, 2], 0, (-4, -5), r"sizes\[0\] is negative"),
    ],
)
def test_values_out_of_range_on_the_cpu(offsets, instance, size, message):
    masks = RunLengthMasks(ENDS, torch.tensor(offsets))
    with pytest.raises(RuntimeError, match=message):
        ops.rle_roi_align(masks, ROIS, torch.tensor([instance]), torch.tensor([size]), output_size=7)


# What follows runs the CUDA kernel.


@pytest.mark.gpu
@pytest.mark.parametrize("output_size", [28, 7])
@pytest.mark.parametrize(("sampling_ratio", "aligned"), [*SAMPLINGS, (12, True)])
def test_cuda_equals_cpu(cuda, generator, output_size, sampling_ratio, aligned):
    masks, boxes = run_lengths(bitmaps(generator)), all_rois(generator)
    rois, instances = boxes.repeat(10, 1), torch.arange(10).repeat_interleave(len(boxes))
    sizes = torch.tensor([SIZE]).repeat(len(rois), 1)
    call = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    expected = ops.rle_roi_align(masks, rois, instances, sizes, **call)
    actual = ops.rle_roi_align(masks.to(cuda), rois.to(cuda), instances.to(cuda), sizes.to(cuda), **call)
    torch.testing.assert_close(actual.cpu(), expected, rtol=0, atol=1e-4)


@pytest.mark.gpu
def test_cuda_bad_indices_give_zero_without_a_sync(cuda, generator):
    masks = run_lengths(bitmaps(generator)).to(cuda)
    rois = torch.tensor([[0.0, 0.0, 60.0, 40.0]]).repeat(4, 1).to(cuda)
    instances, sizes = torch.tensor([2, 10, -1, 9]).to(cuda), torch.tensor([SIZE] * 4).to(cuda)
    torch.cuda.set_sync_debug_mode("error")
    try:
        targets = ops.rle_roi_align(masks, rois, instances, sizes, output_size=7)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.testing.assert_close(targets[0], torch.ones_like(targets[0]))
    assert not targets[1:].any()
