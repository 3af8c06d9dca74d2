import pytest
import torch
import torchvision

from mrcnn.anchors import cell_anchors, grid_anchors, level_anchors
from mrcnn.boxes import MAX_LOG_RATIO, box_iou, clip_boxes, decode_boxes, encode_boxes
from mrcnn.config import RPNConfig

WEIGHTS = (10.0, 10.0, 5.0, 5.0)


def random_boxes(n: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    corner = torch.rand(n, 2, generator=generator) * 100
    return torch.cat([corner, corner + torch.rand(n, 2, generator=generator) * 60 + 1], dim=1)


def test_iou_is_torchvisions() -> None:
    a, b = random_boxes(20, 0), random_boxes(30, 1)
    torch.testing.assert_close(box_iou(a, b), torchvision.ops.box_iou(a, b))


def test_iou_of_empty_boxes_is_zero() -> None:
    empty = torch.zeros(1, 4)
    assert box_iou(empty, empty).item() == 0
    assert box_iou(empty, random_boxes(3, 0)).abs().sum() == 0


def test_decoding_inverts_encoding() -> None:
    anchors, gt = random_boxes(50, 2), random_boxes(50, 3)
    deltas = encode_boxes(gt, anchors, WEIGHTS)
    torch.testing.assert_close(decode_boxes(deltas, anchors, WEIGHTS), gt, atol=1e-3, rtol=1e-5)


def test_a_hand_computed_delta() -> None:
    # a 10 x 20 anchor at the origin and a 20 x 20 box moved right by half of the anchor's width
    deltas = encode_boxes(torch.tensor([[0.0, 0, 20, 20]]), torch.tensor([[0.0, 0, 10, 20]]), (1, 1, 1, 1))
    torch.testing.assert_close(deltas, torch.tensor([[0.5, 0, 0.6931472, 0]]))


def test_growth_is_bounded() -> None:
    box = decode_boxes(torch.tensor([[0.0, 0, 1000, 0]]), torch.tensor([[0.0, 0, 16, 16]]), (1, 1, 1, 1))
    assert (box[0, 2] - box[0, 0]).item() == pytest.approx(1000, rel=1e-4)
    assert MAX_LOG_RATIO < 5


def test_padding_rows_encode_to_finite_numbers() -> None:
    assert encode_boxes(torch.zeros(2, 4), torch.zeros(2, 4), WEIGHTS).isfinite().all()


def test_clipping_each_image_to_its_own_size() -> None:
    boxes = torch.tensor([[[-5.0, -5, 500, 500]], [[-5.0, 10, 30, 500]]])
    clipped = clip_boxes(boxes, torch.tensor([[40, 60], [100, 20]]))
    assert clipped.tolist() == [[[0, 0, 60, 40]], [[0, 10, 20, 100]]]


def test_cell_anchors_have_the_asked_area_and_ratio() -> None:
    anchors = cell_anchors([64], (0.5, 1, 2), rounded=False)
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    torch.testing.assert_close(width * height, torch.full((3,), 64.0**2))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2]))
    assert cell_anchors([32], (0.5,), rounded=True).tolist() == [[-23, -11, 23, 11]]


def test_several_sizes_on_one_map_come_size_by_size() -> None:
    anchors = level_anchors(RPNConfig(anchor_sizes=(32.0, 64.0)), levels=1)[0]
    width, height = anchors[:, 2] - anchors[:, 0], anchors[:, 3] - anchors[:, 1]
    torch.testing.assert_close((width * height).sqrt(), torch.tensor([32.0, 32, 32, 64, 64, 64]))
    torch.testing.assert_close(height / width, torch.tensor([0.5, 1, 2] * 2))


def test_grid_anchors_are_ordered_by_row_column_ratio() -> None:
    cells = level_anchors(RPNConfig(), levels=5)
    levels = grid_anchors(cells, [(2, 3), (1, 1), (1, 1), (1, 1), (1, 1)], [(s, s) for s in (4, 8, 16, 32, 64)])
    centers = (levels[0][:, :2] + levels[0][:, 2:]) / 2
    assert centers[::3].tolist() == [[0, 0], [4, 0], [8, 0], [0, 4], [4, 4], [8, 4]]
    assert [len(level) for level in levels] == [18, 3, 3, 3, 3]


def test_legacy_coding_counts_the_last_pixel() -> None:
    # pixels 0..9 by 0..19 and 0..19 by 0..19: the numbers of the continuous case above
    legacy = encode_boxes(torch.tensor([[0.0, 0, 19, 19]]), torch.tensor([[0.0, 0, 9, 19]]), (1, 1, 1, 1), "legacy")
    torch.testing.assert_close(legacy, torch.tensor([[0.5, 0, 0.6931472, 0]]))
    anchors, gt = random_boxes(50, 2), random_boxes(50, 3)
    deltas = encode_boxes(gt, anchors, WEIGHTS, "legacy")
    torch.testing.assert_close(decode_boxes(deltas, anchors, WEIGHTS, "legacy"), gt, atol=1e-3, rtol=1e-5)
    clipped = clip_boxes(torch.tensor([[[-5.0, -5, 500, 500]]]), torch.tensor([[40, 60]]), "legacy")
    assert clipped.tolist() == [[[0, 0, 59, 39]]]
