"""Run lengths against bitmaps and against pycocotools."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from pycocotools import mask as coco_mask

from pipelines.rle import (
    Window,
    bitmap_from_ends,
    box_from_ends,
    counts_from_ends,
    crop_ends,
    ends_from_bitmap,
    ends_from_counts,
    flip_ends,
    pixels_in,
    segmentation_ends,
)

sides = st.tuples(st.integers(1, 24), st.integers(1, 24))
bitmaps = st.one_of(
    hnp.arrays(np.uint8, sides, elements=st.integers(0, 1)),
    hnp.arrays(np.uint8, sides, elements=st.just(1)),
    hnp.arrays(np.uint8, sides, elements=st.integers(0, 1), fill=st.just(1)),
)


@given(bitmaps)
@settings(deadline=None, max_examples=300)
def test_runs_are_those_of_pycocotools(bitmap: np.ndarray) -> None:
    ends = ends_from_counts(coco_mask.encode(np.asfortranarray(bitmap))["counts"])
    np.testing.assert_array_equal(ends, ends_from_bitmap(bitmap))
    np.testing.assert_array_equal(bitmap_from_ends(ends, *bitmap.shape), bitmap)


@given(bitmaps)
@settings(deadline=None, max_examples=300)
def test_flip_is_that_of_the_bitmap(bitmap: np.ndarray) -> None:
    flipped = flip_ends(ends_from_bitmap(bitmap), *bitmap.shape)
    np.testing.assert_array_equal(flipped, ends_from_bitmap(bitmap[:, ::-1]))


def test_long_runs() -> None:
    bitmap = np.zeros((1200, 1300), np.uint8)
    bitmap[:, 700:] = 1
    bitmap[600, 650] = 1
    ends = ends_from_counts(coco_mask.encode(np.asfortranarray(bitmap))["counts"])
    np.testing.assert_array_equal(ends, ends_from_bitmap(bitmap))
    np.testing.assert_array_equal(flip_ends(ends, 1200, 1300), ends_from_bitmap(bitmap[:, ::-1]))


@pytest.mark.parametrize("counts", [b"", b"\xff\xff", b" ", b"P", b"PPPPPPPPPPPPPPPP0", b"0" + b"oooooooo9" * 60_000])
def test_damaged_counts(counts: bytes) -> None:
    with pytest.raises(ValueError, match=r"^not a compressed COCO run-length string$"):
        ends_from_counts(counts)


@pytest.mark.parametrize("polygon", [None, [], [1.0, None, 2.0, 3.0, 4.0, 5.0], [1.0, 2.0, 3.0, 4.0], [1.0] * 7])
def test_stored_polygons_that_are_none(polygon: Any) -> None:
    """As a damaged shard may have them: Arrow takes them."""
    with pytest.raises(ValueError, match="polygon"):
        segmentation_ends({"polygons": [[1.0, 1.0, 5.0, 1.0, 5.0, 5.0], polygon], "rle": None}, 9, 9)


def test_segmentations() -> None:
    square = [2.0, 1.0, 6.0, 1.0, 6.0, 4.0, 2.0, 4.0]
    ends = segmentation_ends({"polygons": [square], "rle": None}, 8, 10)
    expected = np.zeros((8, 10), np.uint8)
    expected[1:4, 2:6] = 1
    np.testing.assert_array_equal(bitmap_from_ends(ends, 8, 10), expected)
    assert len(segmentation_ends(None, 8, 10)) == 0
    counts = coco_mask.encode(np.asfortranarray(expected))["counts"].decode()
    rle = {"polygons": None, "rle": {"size": [8, 10], "counts": counts}}
    np.testing.assert_array_equal(segmentation_ends(rle, 8, 10), ends)
    with pytest.raises(ValueError, match="80 pixels"):
        segmentation_ends(rle, 8, 11)


@settings(deadline=None)
@given(
    height=st.integers(1, 40), width=st.integers(1, 40), share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
    corner=st.tuples(st.floats(0, 0.99), st.floats(0, 0.99)), extent=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_cutting_measuring_and_packing_are_those_of_the_bitmap(
    height: int, width: int, share: float, corner: tuple[float, float], extent: tuple[float, float], seed: int
) -> None:
    bitmap = (np.random.default_rng(seed).random((height, width)) < share).astype(np.uint8)
    ends = ends_from_bitmap(bitmap)
    assert counts_from_ends(ends) == coco_mask.encode(np.asfortranarray(bitmap))["counts"]
    assert pixels_in(ends) == bitmap.sum()
    rows, columns = np.nonzero(bitmap)
    expected = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1] if bitmap.any() else None
    assert box_from_ends(ends, height) == expected
    y, x = int(corner[0] * height), int(corner[1] * width)
    window = Window(y, x, max(1, int(extent[0] * (height - y))), max(1, int(extent[1] * (width - x))))
    part = bitmap[y : y + window.height, x : x + window.width]
    np.testing.assert_array_equal(crop_ends(ends, height, window), ends_from_bitmap(part))
