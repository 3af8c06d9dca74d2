"""Keypoints against torchvision's functions and the numbers of both peers."""

from typing import Literal

import numpy as np
import pytest
import torch
from oracle import read_npz
from torchvision.models.detection.roi_heads import heatmaps_to_keypoints, keypointrcnn_loss, keypoints_to_heatmap

from mrcnn.keypoints import decode_keypoints, keypoint_loss, keypoint_targets

R, KP, SIDE = 24, 17, 56


def random_rois(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    low = torch.rand(count, 2, generator=generator) * 300
    return torch.cat([low, low + torch.rand(count, 2, generator=generator) * 200 + 0.3], dim=1)


@pytest.fixture(scope="module")
def rois() -> torch.Tensor:
    return random_rois(R, seed=0)


@pytest.fixture(scope="module")
def keypoints(rois: torch.Tensor) -> torch.Tensor:
    """In and around each RoI, on its corners and edges, one in three invisible."""
    generator = torch.Generator().manual_seed(1)
    share = torch.rand(R, KP, 2, generator=generator) * 1.4 - 0.2
    points = rois[:, None, :2] + share * (rois[:, None, 2:] - rois[:, None, :2])
    points[:, 0], points[:, 1] = rois[:, :2], rois[:, 2:]
    points[:, 2, 0], points[:, 3, 1] = rois[:, 2], rois[:, 3]
    visibility = torch.randint(0, 3, (R, KP, 1), generator=generator)
    return torch.cat([points, visibility.float()], dim=2)


def test_targets_equal_torchvisions(keypoints: torch.Tensor, rois: torch.Tensor) -> None:
    cells, valid = keypoint_targets(keypoints, rois, SIDE)
    expected_cells, expected_valid = keypoints_to_heatmap(keypoints, rois, SIDE)
    assert torch.equal(valid, expected_valid.bool())
    assert torch.equal(cells[valid], expected_cells[valid])
    assert 0.2 < valid.float().mean() < 0.6
    assert cells.dtype == torch.int64
    assert cells.min() >= 0
    assert cells.max() < SIDE**2


def test_a_keypoint_on_the_far_corner_is_in_the_last_cell() -> None:
    rois = torch.tensor([[10.0, 20, 66, 132]])
    points = torch.tensor([[[66.0, 132, 2], [10, 20, 1], [38, 76, 2], [66.01, 100, 2], [38, 76, 0]]])
    cells, valid = keypoint_targets(points, rois, SIDE)
    assert valid.tolist() == [[True, True, True, False, False]]
    assert cells.tolist() == [[SIDE**2 - 1, 0, 28 * SIDE + 28, 0, 0]]


def test_rois_without_extent_and_nan_have_cells_within_bounds() -> None:
    rois = torch.tensor([[5.0, 5, 5, 5], [0, 0, 10, 10], [torch.nan] * 4])
    points = torch.tensor([[[6.0, 6, 2]], [[torch.nan, torch.inf, 2]], [[1, 1, 2]]])
    cells, valid = keypoint_targets(points, rois, SIDE)
    assert not valid.any()
    assert not cells.any()


def test_loss_and_gradient_equal_torchvisions(keypoints: torch.Tensor, rois: torch.Tensor) -> None:
    """RoIs with weight 0 count as if they were not there."""
    logits = torch.randn(R, KP, SIDE, SIDE, generator=torch.Generator().manual_seed(2)).requires_grad_()
    positive = torch.arange(R) % 4 > 0
    cells, valid = keypoint_targets(keypoints, rois, SIDE)
    counted = (valid & positive[:, None]).float()
    loss = keypoint_loss(logits, cells, counted, count=counted.sum())
    (gradient,) = torch.autograd.grad(loss, logits)
    each = torch.arange(int(positive.sum()))
    expected = keypointrcnn_loss(logits[positive], [rois[positive]], [keypoints[positive]], [each])
    (expected_gradient,) = torch.autograd.grad(expected, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, expected_gradient)


@pytest.mark.parametrize("count", [0, R])
def test_no_keypoint_gives_a_loss_of_zero_with_its_graph(count: int) -> None:
    logits = torch.randn(count, KP, SIDE, SIDE, requires_grad=True)
    nothing = torch.zeros(count, KP, dtype=torch.int64)
    loss = keypoint_loss(logits, nothing, nothing.float(), count=torch.ones(()))
    loss.backward()
    assert loss == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def heatmaps(count: int, seed: int) -> torch.Tensor:
    """Smooth, as a head's are after its own bilinear upsampling."""
    coarse = torch.randn(count, KP, 28, 28, generator=torch.Generator().manual_seed(seed)) * 4
    return torch.nn.functional.interpolate(coarse, scale_factor=2, mode="bilinear", align_corners=False)


def test_decoding_equals_torchvisions() -> None:
    """Boxes smaller than a pixel, without area, and larger than the heatmap among them."""
    special = torch.tensor([[3.0, 4, 3.4, 4.2], [7, 7, 7, 7], [0, 0, 56, 56], [0, 0, 700, 90.5]])
    boxes = torch.cat([random_rois(20, seed=3), special])
    logits = heatmaps(len(boxes), seed=4)
    expected, scores = heatmaps_to_keypoints(logits, boxes)
    found = decode_keypoints(logits, boxes, score="logit")
    torch.testing.assert_close(found[..., :2], expected[..., :2], rtol=0, atol=1e-3)
    torch.testing.assert_close(found[..., 2], scores)


def test_large_heatmaps_are_made_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes, logits = random_rois(3, seed=5), heatmaps(3, seed=6)
    whole = decode_keypoints(logits, boxes, score="logit")
    monkeypatch.setattr("mrcnn.keypoints.CHUNK_PIXELS", 200 * 200)
    torch.testing.assert_close(decode_keypoints(logits, boxes, score="logit"), whole)


def test_a_probability_is_that_of_the_softmax() -> None:
    """In a box as large as the heatmap nothing is interpolated."""
    logits = heatmaps(2, seed=7)
    boxes = torch.tensor([[0.0, 0, SIDE, SIDE], [10, 20, 10 + SIDE, 20 + SIDE]])
    found = decode_keypoints(logits, boxes, score="probability")
    probability, cell = logits.flatten(2).softmax(dim=2).max(dim=2)
    torch.testing.assert_close(found[..., 2], probability)
    cells = torch.stack([cell % SIDE, cell // SIDE], dim=2) + 0.5
    torch.testing.assert_close(found[..., :2], cells + boxes[:, None, :2])


def test_nothing_to_decode() -> None:
    assert decode_keypoints(torch.zeros(0, KP, SIDE, SIDE), torch.zeros(0, 4), score="logit").shape == (0, KP, 3)


@pytest.mark.parametrize("image", ["6818", "17627", "37777", "87038"])
@pytest.mark.parametrize(
    ("peer", "maps", "score"),
    [
        ("d2_keypoint_R_50_FPN", "kp_heatmaps_first1", "probability"),
        ("tv_keypointrcnn_r50_fpn", "kp_logits_first1", "logit"),
    ],
)
def test_decoding_gives_the_peers_numbers(
    image: str, peer: str, maps: str, score: Literal["probability", "logit"]
) -> None:
    stored = read_npz(f"{peer}_eval.npz")
    box, source_box = (torch.from_numpy(stored[f"{image}/{name}"][:1]) for name in ("boxes_net", "boxes"))
    found = decode_keypoints(torch.from_numpy(stored[f"{image}/{maps}"])[None], box, score=score)[0].numpy()
    scale = (source_box[0, 2:] / box[0, 2:]).numpy()
    keypoints = stored[f"{image}/keypoints"][0]
    np.testing.assert_allclose(found[:, :2] * scale, keypoints[:, :2], rtol=0, atol=1e-2)
    scores = keypoints[:, 2] if score == "probability" else stored[f"{image}/keypoints_scores"][0]
    np.testing.assert_allclose(found[:, 2], scores, rtol=1e-5, atol=0)
