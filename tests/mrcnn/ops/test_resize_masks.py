"""Resizing of run-length masks against Pillow's resizing of the bitmap, and against plain products of weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mrcnn import ops
from mrcnn.ops import reference
from mrcnn.structures import RunLengthMasks

SIZE = (48, 68)  # height, width
NEW_SIZES = [(80, 113), (24, 34), (31, 90), (96, 20), (7, 5), (1, 1), (300, 425), SIZE]


def bitmaps() -> np.ndarray:
    """(I, H, W) uint8: empty, full, a box, a disc, the border, single pixels, stripes either way, a ring."""
    height, width = SIZE
    masks = np.zeros((10, height, width), np.uint8)
    masks[1] = 1
    masks[2, 10:30, 7:40] = 1
    y, x = np.ogrid[:height, :width]
    radius = np.hypot(y - 20, x - 40)
    masks[3] = radius < 15
    masks[4] = 1
    masks[4, 3:-3, 3:-3] = 0
    masks[5, [0, 0, -1, -1, 20], [0, -1, 0, -1, 30]] = 1
    masks[6, ::2] = 1
    masks[7, :, 1::3] = 1
    masks[8, :, :3] = 1
    masks[9] = (radius < 15) & (radius > 9)
    return masks


def run_lengths(masks: np.ndarray) -> RunLengthMasks:
    """The masks' runs, and a last instance without any."""
    ends, offsets = [], [0]
    for mask in masks:
        flat = mask.reshape(-1, order="F")
        changes = np.flatnonzero(np.diff(flat)) + 1
        ends.append(np.concatenate([[0][: flat[0]], changes, [flat.size]]))
        offsets.append(offsets[-1] + len(ends[-1]))
    return RunLengthMasks(torch.from_numpy(np.concatenate(ends)).int(), torch.tensor([*offsets, offsets[-1]]))


def decoded(masks: RunLengthMasks, size: tuple[int, int]) -> list[np.ndarray]:
    runs = [masks.ends[low:high] for low, high in zip(masks.offsets[:-1], masks.offsets[1:], strict=True)]
    return [reference.decode(each, *size).numpy() for each in runs if len(each)]


@pytest.mark.parametrize("new_size", NEW_SIZES)
def test_sets_the_pixels_that_pillow_sets(new_size: tuple[int, int]) -> None:
    masks = bitmaps()
    resized = ops.resize_masks(run_lengths(masks), size=SIZE, new_size=new_size)
    assert len(resized.offsets) == len(masks) + 2
    assert resized.offsets[-1] == resized.offsets[-2]  # without runs it was, and is
    for mask, ours in zip(masks, decoded(resized, new_size), strict=True):
        image = Image.fromarray(mask * np.uint8(255)).resize(new_size[::-1], Image.Resampling.BILINEAR)
        assert (ours != (np.asarray(image) >= 128)).mean() <= 0.002


@pytest.mark.parametrize("new_size", NEW_SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference(seed: int, new_size: tuple[int, int]) -> None:
    noise = np.random.default_rng(seed).random((4, *SIZE)) < np.array([0.03, 0.3, 0.6, 0.97])[:, None, None]
    masks = run_lengths(np.concatenate([noise.astype(np.uint8), bitmaps()]))
    ours = decoded(ops.resize_masks(masks, size=SIZE, new_size=new_size), new_size)
    for one, other in zip(ours, reference.resize_masks(masks, size=SIZE, new_size=new_size), strict=True):
        np.testing.assert_array_equal(one, other.numpy())


@pytest.mark.parametrize("new_size", NEW_SIZES)
def test_runs_are_those_of_the_bitmap(new_size: tuple[int, int]) -> None:
    """No run is empty but a first one of zeros, so that equal masks have equal runs."""
    resized = ops.resize_masks(run_lengths(bitmaps()), size=SIZE, new_size=new_size)
    again = run_lengths(np.stack(decoded(resized, new_size)).astype(np.uint8))
    torch.testing.assert_close(resized.ends, again.ends)
    torch.testing.assert_close(resized.offsets, again.offsets)


def test_the_same_size_changes_nothing() -> None:
    masks = run_lengths(bitmaps())
    resized = ops.resize_masks(masks, size=SIZE, new_size=SIZE)
    assert torch.equal(resized.ends, masks.ends)
    assert torch.equal(resized.offsets, masks.offsets)


def test_no_masks_at_all() -> None:
    none = RunLengthMasks(torch.zeros(0, dtype=torch.int32), torch.zeros(1, dtype=torch.int64))
    resized = ops.resize_masks(none, size=SIZE, new_size=(3, 4))
    assert resized.ends.shape == (0,)
    assert resized.offsets.tolist() == [0]


def test_output_shapes_without_data() -> None:
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        masks = run_lengths(bitmaps())
        ends, offsets = torch.ops.mrcnn.resize_masks(
            mode.from_tensor(masks.ends), mode.from_tensor(masks.offsets), *SIZE, 10, 10
        )
        assert (ends.dim(), ends.dtype, offsets.shape, offsets.dtype) == (1, torch.int32, (12,), torch.int64)


def test_wrong_arguments_are_refused() -> None:
    masks = run_lengths(bitmaps())
    with pytest.raises(ValueError, match="new_size is 0x4"):
        ops.resize_masks(masks, size=SIZE, new_size=(0, 4))
    with pytest.raises(ValueError, match=r"masks\.ends is .*int64"):
        ops.resize_masks(RunLengthMasks(masks.ends.long(), masks.offsets), size=SIZE, new_size=(3, 4))
    with pytest.raises(RuntimeError, match="runs of mask 0 do not fill 47x68"):
        ops.resize_masks(masks, size=(47, 68), new_size=(3, 4))
    with pytest.raises(RuntimeError, match="offsets of mask 1"):
        ops.resize_masks(RunLengthMasks(masks.ends[:1], masks.offsets), size=SIZE, new_size=(3, 4))
    with pytest.raises(RuntimeError, match="more than 32 bits"):
        torch.ops.mrcnn.resize_masks(masks.ends, masks.offsets, *SIZE, 1 << 16, 1 << 16)
    falling = RunLengthMasks(torch.tensor([5, 3, 48 * 68], dtype=torch.int32), torch.tensor([0, 3]))
    with pytest.raises(RuntimeError, match="do not fill"):
        ops.resize_masks(falling, size=SIZE, new_size=(3, 4))
