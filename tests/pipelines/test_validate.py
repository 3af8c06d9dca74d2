"""Bounds of what an annotation may say, to the number."""

from __future__ import annotations

from typing import Any

import pytest

from pipelines.validate import AnnotationError, lies_far, to_instance

SIZE = (10, 20)  # height, width


def annotation(**changed: Any) -> dict[str, Any]:
    square = [2, 1.0, 6.0, 1.0, 6, 4.0, 2.0, 4.0]
    whole = {"label": 1, "category_id": 3, "bbox": [2.0, 1, 4.0, 3.0], "segmentation": [square], "area": 12}
    return {**whole, **changed}


@pytest.mark.parametrize(
    ("point", "far"),
    [
        ([-20.0, -10.0], False), ([40.0, 20.0], False),
        ([-20.01, 5.0], True), ([40.01, 5.0], True), ([5.0, -10.01], True), ([5.0, 20.01], True),
        ([float("nan"), 5.0], True), ([5.0, float("nan")], True), ([5.0, float("inf")], True),
    ],
)  # fmt: skip
def test_a_side_of_the_image_away_is_far(point: list[float], far: bool) -> None:
    assert lies_far([1.0, 1.0, *point], SIZE) is far
    polygon = [1.0, 1.0, 5.0, 1.0, *point]
    if far:
        with pytest.raises(AnnotationError, match=r"polygon (lies far|is not a list of finite)"):
            to_instance(annotation(segmentation=[polygon]), SIZE)
    else:
        assert to_instance(annotation(segmentation=[polygon]), SIZE)["segmentation"]["polygons"] == [polygon]
    assert not lies_far([-20.1, 1.0], SIZE, tolerance=0.01)


@pytest.mark.parametrize("number", [True, None, "7", float("nan"), float("inf"), 1e9, -1e9, 10**400, [1.0]])
def test_what_is_no_finite_number_of_a_picture(number: Any) -> None:
    for changed in (
        {"bbox": [2.0, 1.0, number, 3.0]},
        {"segmentation": [[2.0, 1.0, 6.0, 1.0, 6.0, number]]},
        {"area": number},
        {"keypoints": [number, 1.0, 2]},
    ):
        if changed == {"area": None}:  # that of the box
            assert to_instance(annotation(**changed), SIZE)["area"] == 12.0
            continue
        with pytest.raises(AnnotationError, match="is not a list of finite numbers"):
            to_instance(annotation(**changed), SIZE)


def test_whole_numbers_are_stored_as_others() -> None:
    instance = to_instance(annotation(), SIZE)
    numbers = [*instance["box"], instance["area"], *instance["segmentation"]["polygons"][0]]
    assert all(type(each) is float for each in numbers)


@pytest.mark.parametrize(
    "polygon",
    [
        [3.0, 3.0] * 4,
        [1.0, 1, 2, 2, 3, 3],
        [0.1, 0.1, 0.2, 0.2, 0.1, 0.1],
        [-3.0, 8, 9, 4, 12, 3],  # drawn as one pixel, where it leaves the image
    ],
)
def test_polygons_without_area(polygon: list[float]) -> None:
    with pytest.raises(AnnotationError, match="polygon has no area"):
        to_instance(annotation(segmentation=[polygon, polygon]), SIZE)
    square = annotation()["segmentation"][0]
    assert to_instance(annotation(segmentation=[polygon, square]), SIZE)["segmentation"]["polygons"][0] == polygon


def test_a_bow_has_an_inside() -> None:
    """Its sides turn in opposite ways: as areas have signs, they sum up to nothing."""
    bow = [2.0, 1.0, 10.0, 7.0, 10.0, 1.0, 2.0, 7.0]
    assert to_instance(annotation(segmentation=[bow]), SIZE)["segmentation"]["polygons"] == [bow]
    there_and_back = [2.0, 1.0, 10.0, 1.0, 10.0, 7.0, 10.0, 1.0]
    outside = [value + 10.0 for value in bow]
    for polygon in (there_and_back, outside):
        with pytest.raises(AnnotationError, match="polygon has no area"):
            to_instance(annotation(segmentation=[polygon]), SIZE)


@pytest.mark.parametrize("counts", [[200], [200, 0], [100, 0, 100], "X6", [0, 0, 200]])
def test_run_lengths_without_a_pixel(counts: Any) -> None:
    with pytest.raises(AnnotationError, match="mask is empty"):
        to_instance(annotation(segmentation={"size": [10, 20], "counts": counts}), SIZE)
    full = {"size": [10, 20], "counts": [0, 200]}
    assert to_instance(annotation(segmentation=full), SIZE)["segmentation"]["rle"]


def test_parts_of_a_mask_that_enclose_nothing_are_left_out() -> None:
    """Not the object, whose other parts do; a part that is no list of points is a fault of it all."""
    square = [2, 1, 6, 1, 6, 4, 2, 4]
    whole = to_instance(annotation(segmentation=[square]), SIZE)["segmentation"]
    for others in ([[1, 1, 2, 2]], [[]], [[5, 5], []]):
        for given in ([square, *others], [*others, square]):
            assert to_instance(annotation(segmentation=given), SIZE)["segmentation"] == whole
    for fault in ([1, 1, 2], [1, 1, 2, 2, 3, 3, 4], [1, float("nan"), 2, 2]):
        with pytest.raises(AnnotationError):
            to_instance(annotation(segmentation=[square, fault]), SIZE)
    for only in ([[1, 1, 2, 2]], [[1, 1, 2, 2], [3, 3]]):
        with pytest.raises(AnnotationError, match="polygon has"):
            to_instance(annotation(segmentation=only), SIZE)


def test_far_keypoints_count_where_they_are_labelled() -> None:
    to_instance(annotation(keypoints=[500.0, 500.0, 0, 5.0, 5.0, 2]), SIZE)
    with pytest.raises(AnnotationError, match="keypoint lies far outside"):
        to_instance(annotation(keypoints=[5.0, 5.0, 2, 5.0, 500.0, 1]), SIZE)


def test_long_outlines() -> None:
    """2 * 10 * 20 + 100 * (10 + 20) pixels, by the longer axis of each edge."""
    zigzag = [0.0, 0.0, 20.0, 1.0] * 85
    assert to_instance(annotation(segmentation=[[*zigzag, 10.0, 9.0]]), SIZE)
    with pytest.raises(AnnotationError, match="too long an outline: 34"):
        to_instance(annotation(segmentation=[[*zigzag, *zigzag[:4], 10.0, 9.0]]), SIZE)
