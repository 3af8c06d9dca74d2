"""Masks as COCO has them: polygons drawn, and run lengths packed and unpacked, against pycocotools."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mrcnn import ops
from mrcnn.ops import reference
from mrcnn.structures import RunLengthMasks

INT32_MAX = 2**31 - 1


def masks_of(ends: list[list[int]]) -> RunLengthMasks:
    offsets = np.cumsum([0, *map(len, ends)])
    return RunLengthMasks(torch.tensor([each for mask in ends for each in mask]).int(), torch.from_numpy(offsets))


def expected_counts(polygons: list[list[float]], size: tuple[int, int]) -> bytes:
    return coco_mask.merge(coco_mask.frPyObjects(polygons, *size))["counts"]


@st.composite
def polygon_masks(draw: st.DrawFn) -> tuple[tuple[int, int], list[list[list[float]]]]:
    """A size and masks of polygons: of any numbers or on pixels, halves and fifths of them, within the image or far
    beyond it, also without extent."""
    size = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    part = draw(st.sampled_from([0, 1, 2, 5]))
    beyond = draw(st.sampled_from([0, 3, 200]))

    def coordinate(side: int) -> st.SearchStrategy[float]:
        if part == 0:
            return st.floats(-beyond, side + beyond)
        return st.integers(-beyond * part, (side + beyond) * part).map(lambda number: number / part)

    corner = st.tuples(coordinate(size[1]), coordinate(size[0]))
    polygon = st.lists(corner, min_size=3, max_size=8).map(lambda corners: [each for pair in corners for each in pair])
    return size, draw(st.lists(st.lists(polygon, min_size=1, max_size=3), min_size=1, max_size=3))


@settings(deadline=None, max_examples=500)
@given(polygon_masks())
def test_polygons_are_drawn_and_packed_as_pycocotools_does_it(
    drawn: tuple[tuple[int, int], list[list[list[float]]]],
) -> None:
    size, masks = drawn
    counts = ops.rle_encode(ops.draw_polygons(masks, size=size))
    assert counts == [expected_counts(polygons, size) for polygons in masks]


def test_real_polygons(coco100: Path) -> None:
    objects = COCO(coco100 / "annotations/instances_val2017.json")
    drawn = 0
    for image in objects.loadImgs(objects.getImgIds()):
        size = image["height"], image["width"]
        annotations = objects.loadAnns(objects.getAnnIds(imgIds=[image["id"]], iscrowd=False))
        masks = ops.draw_polygons([each["segmentation"] for each in annotations], size=size)
        expected = [objects.annToRLE(each)["counts"] for each in annotations]
        assert ops.rle_encode(masks) == expected
        if expected:
            unpacked = ops.rle_decode(expected)
            assert torch.equal(unpacked.ends, masks.ends)
            assert torch.equal(unpacked.offsets, masks.offsets)
        drawn += len(expected)
    assert drawn > 300


def test_masks_without_polygons_have_no_runs() -> None:
    triangle = [1.0, 1.0, 8.0, 1.0, 4.0, 7.0]
    masks = ops.draw_polygons([[], [triangle], []], size=(9, 9))
    assert masks.offsets.tolist() == [0, 0, len(masks.ends), len(masks.ends)]
    assert ops.rle_encode(masks) == [b"", expected_counts([triangle], (9, 9)), b""]
    nothing = ops.draw_polygons([], size=(9, 9))
    assert (nothing.ends.tolist(), nothing.offsets.tolist()) == ([], [0])
    assert ops.rle_encode(nothing) == []


@pytest.mark.parametrize(
    ("polygon", "word"),
    [
        ([1.0, 1, 5, 5], "three points"),
        ([1.0, 1, 5, 5, 2, 1, 3], "odd count"),
        ([1.0, 1, 5, float("nan"), 2, 1], "coordinate"),
        ([1.0, 1, 5, float("inf"), 2, 1], "coordinate"),
        ([1.0, 1, 5, -1.1e6, 2, 1], "coordinate"),
    ],
)
def test_what_is_no_polygon_is_refused(polygon: list[float], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        ops.draw_polygons([[[0.0, 0, 4, 0, 4, 4]], [polygon]], size=(9, 9))


def test_sizes_without_pixels_or_with_too_many_are_refused() -> None:
    triangle = [[[1.0, 1, 8, 1, 4, 7]]]
    with pytest.raises(ValueError, match="size"):
        ops.draw_polygons(triangle, size=(0, 9))
    with pytest.raises(ValueError, match="2\\^31"):
        ops.draw_polygons(triangle, size=(1 << 16, 1 << 15))


def test_operators_refuse_offsets_that_point_elsewhere() -> None:
    points, ends = torch.rand(6, 2, dtype=torch.float64), torch.tensor([3, 9], dtype=torch.int32)
    good, draw = torch.tensor([0, 3, 6]), torch.ops.mrcnn.draw_polygons
    draw(points, good, torch.tensor([0, 1, 2]), 9, 9)
    for polygons, masks in (([0, 3, 7], [0, 2]), ([0, 4, 3], [0, 2]), ([-1, 3], [0, 1]), ([0, 6], [0, 2])):
        with pytest.raises(RuntimeError, match="offset"):
            draw(points, torch.tensor(polygons), torch.tensor(masks), 9, 9)
    with pytest.raises(RuntimeError, match="points"):
        draw(points.float(), good, torch.tensor([0, 2]), 9, 9)
    with pytest.raises(RuntimeError, match="coordinate"):
        draw(points * 1e7, good, torch.tensor([0, 2]), 9, 9)
    for offsets in ([0, 3], [2, 1], [-1, 2]):
        with pytest.raises(RuntimeError, match="offsets"):
            torch.ops.mrcnn.rle_encode(ends, torch.tensor(offsets))
        with pytest.raises(RuntimeError, match="offsets"):
            torch.ops.mrcnn.rle_decode(ends.byte(), torch.tensor(offsets))


@settings(deadline=None, max_examples=300)
@given(st.lists(st.lists(st.integers(0, 3 * 10**8), min_size=1, max_size=7), min_size=1, max_size=4))
def test_packing_is_that_of_pycocotools_and_is_undone(lengths: list[list[int]]) -> None:
    masks = masks_of([np.cumsum(each).tolist() for each in lengths])
    counts = ops.rle_encode(masks)
    for packed, each in zip(counts, lengths, strict=True):
        assert packed == coco_mask.frPyObjects({"size": [sum(each), 1], "counts": each}, sum(each), 1)["counts"]
    unpacked = ops.rle_decode(counts)
    assert torch.equal(unpacked.ends, masks.ends)
    assert torch.equal(unpacked.offsets, masks.offsets)


def test_largest_mask() -> None:
    masks = masks_of([[0, INT32_MAX - 1, INT32_MAX]])
    assert ops.rle_decode(ops.rle_encode(masks)).ends.tolist() == [0, INT32_MAX - 1, INT32_MAX]


DAMAGED = [b"", b"\xff\xff", b" ", b"P", b"PPPPPPPPPPPPPPPP0", b"00" + b"ooooooo0", b"ooooooo0", b"O", b"55A"]


@pytest.mark.parametrize("counts", DAMAGED)
def test_damaged_strings_are_refused(counts: bytes) -> None:
    with pytest.raises(ValueError, match=r"^string 1 is not one of compressed COCO run lengths$"):
        ops.rle_decode([b"9", counts])


def test_runs_are_the_bitmaps() -> None:
    generator = np.random.default_rng(0)
    for share in (0.1, 0.5, 0.95):
        bitmap = (generator.random((37, 41)) < share).astype(np.uint8)
        masks = ops.rle_decode([coco_mask.encode(np.asfortranarray(bitmap))["counts"]])
        np.testing.assert_array_equal(reference.decode(masks.ends, 37, 41).numpy(), bitmap)
