"""Objects that tiles cut, put together again; what is known of the image decides what is right."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from mrcnn.structures import Detections
from pipelines.predict_options import PredictOptions
from pipelines.predictor import Predictor, Seen, View
from pipelines.rle import Window
from pipelines.tile_merging import Piece, merge_pieces, touches_inner_edge
from pipelines.tiling import Tiling, windows

SIZE = (300, 400)
TILES = windows(SIZE, Tiling(160, 40))


def ellipse(x: int, y: int, radius_x: int, radius_y: int) -> np.ndarray:
    rows, columns = np.mgrid[: SIZE[0], : SIZE[1]]
    return ((columns - x) / radius_x) ** 2 + ((rows - y) / radius_y) ** 2 <= 1


def row_of(bitmap: np.ndarray, *, score: float, label: int = 1, masks: bool = True) -> dict[str, Any]:
    y, x = np.nonzero(bitmap)
    rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    box = [float(v) for v in (x.min(), y.min(), x.max() + 1 - x.min(), y.max() + 1 - y.min())]
    return {
        "label": label, "category_id": 10 * label, "score": score, "box": box, "keypoints": None,
        "rle": {"size": list(SIZE), "counts": rle["counts"].decode()} if masks else None,
    }  # fmt: skip


def pieces_of(objects: list[np.ndarray], *, labels: list[int] | None = None, masks: bool = True) -> list[Piece]:
    """What a perfect model sees in each tile; the more of an object, the surer."""
    found = []
    for window in TILES:
        inside = np.zeros(SIZE, bool)
        inside[window.y : window.y + window.height, window.x : window.x + window.width] = True
        for number, bitmap in enumerate(objects):
            shown = bitmap & inside
            if shown.sum() >= 20:
                label = labels[number] if labels else 1
                row = row_of(shown, score=round(0.5 + 0.4 * shown.sum() / bitmap.sum(), 3), label=label, masks=masks)
                found.append(Piece(row, window, touches_inner_edge(row["box"], window, SIZE)))
    return found


def bitmaps(rows: list[dict[str, Any]]) -> list[np.ndarray]:
    return [coco_mask.decode(row["rle"]).astype(bool) for row in rows]


SPANNING = ellipse(200, 150, 180, 120)  # larger than any tile
CROSSING = ellipse(140, 60, 15, 12)  # whole in two tiles
CORNER = ellipse(3, 3, 10, 10)  # at the image's own edge
TWINS = [ellipse(110, 250, 24, 20), ellipse(165, 250, 24, 20)]  # side by side over the edges of tiles


def test_the_tiles_are_as_the_test_needs_them() -> None:
    assert TILES[0] == Window(0, 0, 160, 160)
    assert len(TILES) == 3 * 3
    assert len(pieces_of([SPANNING])) == 9
    assert all(piece.cut for piece in pieces_of([SPANNING]))


@pytest.mark.parametrize("objects", [[SPANNING], [CROSSING], [CORNER], TWINS, [CROSSING, CORNER, *TWINS]])
def test_each_object_comes_out_once_and_whole(objects: list[np.ndarray]) -> None:
    pieces = pieces_of(objects)
    merged = merge_pieces(pieces, SIZE, nms_iou=0.5)
    assert len(merged) == len(objects) <= len(pieces)
    for bitmap in objects:
        (same,) = [each for each in bitmaps(merged) if (each == bitmap).all()]
        assert same.any()
    scores = [row["score"] for row in merged]
    assert scores == sorted(scores, reverse=True)
    assert max(scores) == max(piece.row["score"] for piece in pieces)
    for row, bitmap in zip(merged, bitmaps(merged), strict=True):
        assert row["box"] == row_of(bitmap, score=1)["box"]
        assert row["rle"]["size"] == list(SIZE)


def test_other_categories_are_other_objects() -> None:
    """The same pixels twice, as a dog on a sofa may have."""
    merged = merge_pieces(pieces_of([SPANNING, SPANNING], labels=[1, 2]), SIZE, nms_iou=0.5)
    assert [row["label"] for row in merged] == [1, 2]
    assert all((each == SPANNING).all() for each in bitmaps(merged))


def test_of_one_tile_nothing_is_merged() -> None:
    """The model itself has left both, though they overlap."""
    pieces = [Piece(row_of(bitmap, score=0.9), TILES[0], False) for bitmap in (CORNER, ellipse(6, 6, 10, 10))]
    assert len(merge_pieces(pieces, SIZE, nms_iou=0.5)) == 2


def test_neighbours_that_do_not_agree_stay_two() -> None:
    """Two objects, each cut by another tile's edge, that meet in what both tiles show but share few pixels."""
    left, right = Window(0, 0, 160, 160), Window(0, 120, 160, 160)
    pieces = [
        Piece(row_of(ellipse(140, 60, 19, 30), score=0.8), left, True),
        Piece(row_of(ellipse(140, 118, 19, 30), score=0.7), right, True),
    ]
    assert len(merge_pieces(pieces, SIZE, nms_iou=0.5)) == 2


def test_without_masks_boxes_decide() -> None:
    merged = merge_pieces(pieces_of([SPANNING, CORNER], masks=False), SIZE, nms_iou=0.5)
    boxes = [row["box"] for row in merged]
    assert row_of(SPANNING, score=1)["box"] in boxes
    assert row_of(CORNER, score=1)["box"] in boxes
    assert len(merged) == 2
    assert all(row["rle"] is None for row in merged)


def test_the_same_whatever_came_first() -> None:
    pieces = pieces_of([SPANNING, CROSSING, *TWINS])
    expected = merge_pieces(pieces, SIZE, nms_iou=0.5)
    assert merge_pieces(pieces, SIZE, nms_iou=0.5) == expected
    key = str
    backwards = merge_pieces(pieces[::-1], SIZE, nms_iou=0.5)
    assert sorted(map(key, bitmaps(backwards))) == sorted(map(key, bitmaps(expected)))


class _Finder(Predictor):
    """Finds the bright objects of a tile, as a model would; all else is the predictor's own."""

    def _look(self, views: Any) -> list[Detections]:
        return [self._bright(view) for view in views]

    def _bright(self, view: View) -> Detections:
        import cv2

        height, width = view.source_size
        pixels = cv2.resize(view.pixels, (width, height), interpolation=cv2.INTER_NEAREST)
        count, _, stats, _ = cv2.connectedComponentsWithStats((pixels[:, :, 0] > 128).astype(np.uint8))
        boxes = torch.tensor(stats[1:, :4].reshape(-1, 4)).float()
        return Detections(
            boxes=torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1),
            labels=torch.ones(count - 1, dtype=torch.int64),
            scores=torch.linspace(0.9, 0.8, count - 1),
            image_size=(height, width),
            mask_probs=torch.ones(count - 1, 28, 28),
        )


def test_a_large_image_goes_through_in_tiles() -> None:
    """Known boxes, some of them across edges of tiles, at places of the whole image."""
    from models import small_model

    boxes = [(20, 30, 60, 50), (100, 10, 150, 290), (130, 200, 90, 60), (350, 250, 50, 50)]  # x, y, width, height
    image = np.zeros((*SIZE, 3), np.uint8)
    boxes[1] = (250, 5, 60, 280)
    for x, y, width, height in boxes:
        image[y : y + height, x : x + width] = 255
    finder = _Finder(small_model(), PredictOptions(tile="160:40", batch_size=4))
    (seen,) = finder.detect_all([View(image, SIZE)])
    assert len(seen) == 9
    rows = finder.rows(7, SIZE, seen)
    found = sorted(tuple(round(v) for v in row["box"]) for row in rows)
    assert found == sorted(boxes)
    drawn = sum(coco_mask.decode(row["rle"]) for row in rows)
    assert (drawn.astype(bool) == (image[:, :, 0] > 0)).mean() > 0.995
    whole = replace(seen[0], window=Window(0, 0, *SIZE))
    assert len(finder.rows(7, (160, 160), [Seen(None, seen[0].found)])) == len(seen[0].found)
    assert whole.window == Window(0, 0, *SIZE)


@pytest.mark.parametrize("tile", ["x", "100:", "10", "100:60", "100:0"])
def test_tiles_that_are_none_are_refused(tile: str) -> None:
    with pytest.raises(ValueError, match=r"--tile is '.*', but"):
        PredictOptions(tile=tile)
    assert PredictOptions(tile="1024").tiles == (1024, 256)
    assert PredictOptions(tile="1024:128").tiles == (1024, 128)
