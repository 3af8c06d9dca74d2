"""Pasting against a plain bilinear sampler, COCO run lengths against the bitmaps."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pycocotools import mask as coco_mask

from mrcnn.postprocess import encode_masks, paste_masks

SIZE = (97, 131)


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


def test_a_box_without_area_has_an_empty_mask() -> None:
    boxes = torch.tensor([[5.0, 5, 5, 60], [9, 9, 9, 9], [20, 20, 10, 40]])
    assert not paste_masks(torch.ones(3, 28, 28), boxes, SIZE).any()


def test_run_lengths_decode_to_the_bitmaps(boxes: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    probs = torch.rand(len(boxes), 14, 14, generator=torch.Generator().manual_seed(2))
    bitmaps = paste_masks(probs, boxes, SIZE).numpy()
    monkeypatch.setattr("mrcnn.postprocess.CHUNK_PIXELS", 3 * SIZE[0] * SIZE[1])  # several chunks, the last one short
    decoded = np.stack([coco_mask.decode(rle) for rle in encode_masks(probs, boxes, SIZE)])
    np.testing.assert_array_equal(decoded.astype(bool), bitmaps)


def test_nothing_to_paste() -> None:
    assert paste_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), SIZE).shape == (0, *SIZE)
    assert encode_masks(torch.zeros(0, 28, 28), torch.zeros(0, 4), SIZE) == []
