"""Pasting against both peers, torchvision live, and a plain sampler; run lengths against bitmaps."""

from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import read_json, read_npz
from pycocotools import mask as coco_mask
from torchvision.models.detection.roi_heads import paste_masks_in_image

from mrcnn.postprocess import encode_masks, paste_masks

SIZE = (97, 131)
PASTES: tuple[Literal["continuous", "padded"], ...] = ("continuous", "padded")
PEERS = {"continuous": "detectron2", "padded": "torchvision"}


def sampled(probs: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
    """What pasting means, by torch's general sampler: the mask's value at the centre of every pixel."""
    y = (torch.arange(SIZE[0]) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    x = (torch.arange(SIZE[1]) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    grid = torch.stack(
        [x[:, None].expand(-1, *SIZE), y[:, :, None].expand(-1, *SIZE)],
        dim=-1,
    )
    return F.grid_sample(probs[:, None], grid, align_corners=False)[:, 0]


@pytest.fixture(scope="module")
def boxes() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(30, 2, generator=generator) * torch.tensor([150.0, 110.0]) - 10
    side = torch.rand(30, 2, generator=generator) * 90 + 0.3
    special = torch.tensor(
        [
            [0, 0, 131, 97],
            [-40, -30, 200, 150],
            [-50, -50, -5, -5],
            [140, 20, 180, 60],
            [12.3, 4.5, 12.9, 5.2],
        ]
    )
    return torch.cat([torch.cat([corner, corner + side], dim=1), special])


def test_paste_equals_bilinear_sampling_at_pixel_centres(boxes: torch.Tensor) -> None:
    probs = torch.rand(len(boxes), 28, 28, generator=torch.Generator().manual_seed(1))
    expected = sampled(probs, boxes)
    decided = (expected - 0.5).abs() > 1e-5
    assert torch.equal(paste_masks(probs, boxes, SIZE)[decided], (expected >= 0.5)[decided])


@pytest.mark.parametrize("paste", PASTES)
@pytest.mark.parametrize("image", ["6818", "17627", "37777", "87038", "synthetic"])
def test_run_lengths_are_the_peers(image: str, paste: Literal["continuous", "padded"]) -> None:
    """Bit for bit, ties included. Both peers raise where the image has no pixel of the box; our mask is empty there."""
    stored = read_json("paste_rle.json")[image]
    if image == "synthetic":
        inputs = read_npz("paste_inputs.npz")
        probs, boxes = inputs["synthetic/masks"], inputs["synthetic/boxes"]
    else:
        inputs = read_npz("tv_maskrcnn_r50_fpn_eval.npz")
        probs, boxes = inputs[f"{image}/mask_probs28"], inputs[f"{image}/boxes"]
    found = encode_masks(torch.from_numpy(probs), torch.from_numpy(boxes), tuple(stored["size"]), paste=paste)
    expected = stored[PEERS[paste]]
    assert len(found) == len(expected) > 40
    for rle, counts in zip(found, expected, strict=True):
        if counts is None:
            assert coco_mask.area(rle) == 0
        else:
            assert rle == {"size": stored["size"], "counts": counts.encode()}


@settings(max_examples=60, deadline=None)
@given(st.data(), st.integers(2, 30), st.integers(0, 2**16))
def test_padded_equals_torchvision(data: st.DataObject, side: int, seed: int) -> None:
    """On boxes anywhere that torchvision takes, masks of few values included, where ties are common."""
    x = st.floats(0, SIZE[1] - 1, width=32) | st.integers(0, SIZE[1] - 1)
    y = st.floats(0, SIZE[0] - 1, width=32) | st.integers(0, SIZE[0] - 1)
    size = st.floats(0, 300, width=32) | st.integers(0, 300)
    low = torch.tensor([[data.draw(x), data.draw(y)] for _ in range(4)]).float()
    boxes = torch.cat([low, low + torch.tensor([[data.draw(size), data.draw(size)] for _ in range(4)])], dim=1)
    probs = torch.rand(4, side, side, generator=torch.Generator().manual_seed(seed))
    probs[2:] = (probs[2:] * 2).round() / 2
    expected = paste_masks_in_image(probs[:, None], boxes, SIZE)[:, 0] >= 0.5
    assert torch.equal(paste_masks(probs, boxes, SIZE, paste="padded"), expected)


def test_a_box_without_area_has_an_empty_mask() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 60], [9, 9, 9, 9], [20, 20, 10, 40], [torch.nan, 0, 10, 10]])
    assert not paste_masks(torch.ones(4, 28, 28), boxes, SIZE).any()


def test_a_box_of_no_size_is_one_pixel_in_torchvision() -> None:
    found = paste_masks(torch.ones(1, 28, 28), torch.tensor([[9.5, 20.5, 9.5, 20.5]]), SIZE, paste="padded")
    assert found.nonzero().tolist() == [[0, 20, 9]]


def test_a_box_far_larger_than_the_image_needs_no_memory() -> None:
    """Every pixel is a tie, which torchvision's own way would settle with 40 GB."""
    probs = torch.full((1, 28, 28), 0.5)
    for paste in PASTES:
        assert paste_masks(probs, torch.tensor([[-5e4, -5e4, 5e4, 5e4]]), SIZE, paste=paste).all()


@pytest.mark.parametrize("paste", PASTES)
def test_run_lengths_are_pycocotools_of_the_bitmaps(
    boxes: torch.Tensor, paste: Literal["continuous", "padded"]
) -> None:
    """Masks that touch each edge, or cover the image, too."""
    inside = boxes.clamp(min=0).minimum(torch.tensor([131.0, 97, 131, 97]))
    boxes = torch.cat([boxes, inside, torch.tensor([[30.0, -300, 90, 400], [-300, 20, 400, 60]])])
    for probs in (
        torch.rand(len(boxes), 14, 14, generator=torch.Generator().manual_seed(2)),
        torch.ones(len(boxes), 14, 14),
    ):
        bitmaps = paste_masks(probs, boxes, SIZE, paste=paste).numpy()
        expected: list[dict[str, Any]] = coco_mask.encode(
            np.asfortranarray(bitmaps.astype(np.uint8).transpose(1, 2, 0))
        )
        assert encode_masks(probs, boxes, SIZE, paste=paste) == expected


def test_nothing_to_paste() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), SIZE).shape == (0, *SIZE)
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), SIZE) == []


def test_an_unknown_way_of_pasting_is_refused() -> None:
    with pytest.raises(ValueError, match="paste is 'nearest'"):
        paste_masks(torch.ones(1, 28, 28), torch.ones(1, 4), SIZE, paste="nearest")  # type: ignore[arg-type]
