"""Fixed-shape NMS against torchvision's, group by group, and the slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import nms as torchvision_nms

from mrcnn import ops
from mrcnn.ops import reference

THRESHOLDS = (0.0, 0.3, 0.5, 0.7, 0.95, 1.0)
BOXES = torch.zeros(2, 3, 4)
SCORES = torch.zeros(2, 3)
GROUPS = torch.zeros(2, 3, dtype=torch.int64)


def candidates(count: int, generator: torch.Generator, *, ties: bool) -> tuple[Tensor, Tensor, Tensor]:
    """boxes (1, P, 4), scores (1, P) and groups (1, P); `ties`: many equal boxes, IoUs and scores."""
    corner = torch.rand(1, count, 2, generator=generator) * 300
    boxes = torch.cat([corner, corner + torch.rand(1, count, 2, generator=generator) * 120], 2)
    scores = torch.randn(1, count, generator=generator)
    if ties:
        boxes, scores = (boxes / 16).round() * 16, (scores * 3).round() / 3
    return boxes, scores, torch.randint(5, (1, count), generator=generator) * 7 - 3


def torchvision_survivors(boxes: Tensor, scores: Tensor, groups: Tensor, threshold: float) -> list[int]:
    """Of one image, best first, equal scores by position."""
    kept: list[int] = []
    for group in groups.unique():
        (at,) = torch.where(groups == group)
        kept += at[torchvision_nms(boxes[at], scores[at], threshold)].tolist()
    return sorted(kept, key=lambda i: (-scores[i].item(), i))


def survivors(result: tuple[Tensor, Tensor], image: int = 0) -> list[int]:
    idxs, valid = result
    count = int(valid[image].sum())
    assert valid[image, :count].all()  # the valid ones come first
    assert not idxs[image, count:].any()
    return idxs[image, :count].tolist()


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("threshold", THRESHOLDS)
@pytest.mark.parametrize("count", [1, 17, 400, 3000])
def test_equals_torchvision_group_by_group(generator, count, threshold, ties):
    boxes, scores, groups = candidates(count, generator, ties=ties)
    expected = torchvision_survivors(boxes[0], scores[0], groups[0], threshold)
    for top_n in (1, 5, 100, count, count + 9):
        found = ops.nms(boxes, scores, groups, iou_threshold=threshold, top_n=top_n)
        assert found[0].shape == found[1].shape == (1, min(top_n, count))
        assert survivors(found) == expected[:top_n]


@pytest.mark.parametrize("ties", [False, True])
def test_equals_reference_on_a_batch(generator, ties):
    parts = [candidates(40, generator, ties=ties) for _ in range(3)]
    boxes, scores, groups = (torch.cat(part) for part in zip(*parts, strict=True))
    scores[0, ::3], scores[1, ::5], scores[2] = -torch.inf, torch.nan, -torch.inf
    for top_n in (0, 1, 10, 40, 99):
        ours = ops.nms(boxes, scores, groups, iou_threshold=0.4, top_n=top_n)
        slow = reference.nms(boxes, scores, groups, iou_threshold=0.4, top_n=top_n)
        assert torch.equal(ours[0], slow[0])
        assert torch.equal(ours[1], slow[1])


def test_by_hand():
    """b and c overlap a by 0.6; c is of another group; d is a copy of a; e takes no part though it is alone."""
    a, b, far = [0.0, 0, 10, 10], [0.0, 0, 10, 6], [50.0, 50, 60, 60]
    boxes = torch.tensor([[b, b, a, a, far]])
    scores = torch.tensor([[0.5, 0.4, 0.9, 0.9, -torch.inf]])
    groups = torch.tensor([[0, 1, 0, 0, 0]])
    assert survivors(ops.nms(boxes, scores, groups, iou_threshold=0.59, top_n=5)) == [2, 1]
    assert survivors(ops.nms(boxes, scores, groups, iou_threshold=0.61, top_n=5)) == [2, 0, 1]
    assert survivors(ops.nms(boxes, scores, groups, iou_threshold=0.61, top_n=2)) == [2, 0]


@pytest.mark.parametrize("threshold", [0.5, 0.25, 0.7, 0.3])
def test_an_iou_of_exactly_the_threshold_suppresses_as_in_torchvision(threshold):
    """Float32 0.7 is below 0.7, float32 0.3 above 0.3: the comparison must be torchvision's for either."""
    boxes = torch.tensor([[[0.0, 0, 100, 100], [0, 0, 100, 100 * threshold]]])
    scores, groups = torch.tensor([[1.0, 0.5]]), torch.zeros(1, 2, dtype=torch.int64)
    found = survivors(ops.nms(boxes, scores, groups, iou_threshold=threshold, top_n=2))
    assert found == torchvision_nms(boxes[0], scores[0], threshold).tolist()


def test_boxes_without_area_nan_and_infinite_boxes_suppress_nothing_alike():
    boxes = torch.tensor([[5.0, 5, 5, 5], [5, 5, 5, 5], [9, 9, 2, 2], [torch.nan, 0, 9, 9], [0, 0, torch.inf, 9]])
    scores, groups = torch.arange(5.0).flip(0), torch.zeros(5, dtype=torch.int64)
    expected = torchvision_survivors(boxes, scores, groups, 0.5)
    assert survivors(ops.nms(boxes[None], scores[None], groups[None], iou_threshold=0.5, top_n=5)) == expected


def test_nothing_to_do():
    none = ops.nms(BOXES[:, :0], SCORES[:, :0], GROUPS[:, :0], iou_threshold=0.5, top_n=10)
    assert none[0].shape == none[1].shape == (2, 0)
    no_images = ops.nms(BOXES[:0], SCORES[:0], GROUPS[:0], iou_threshold=0.5, top_n=2)
    assert no_images[0].shape == no_images[1].shape == (0, 2)
    masked = ops.nms(BOXES, SCORES - torch.inf, GROUPS, iou_threshold=0.5, top_n=2)
    assert not masked[1].any()
    assert not masked[0].any()


def test_layout_dtype_and_gradient_do_not_matter(generator):
    boxes, scores, groups = candidates(200, generator, ties=False)
    expected = ops.nms(boxes, scores, groups, iou_threshold=0.5, top_n=50)
    actual = ops.nms(
        boxes.double().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_(),
        scores.repeat_interleave(2, 1)[:, ::2].requires_grad_(),
        groups.repeat_interleave(2, 1)[:, ::2],
        iou_threshold=0.5,
        top_n=50,
    )
    assert torch.equal(actual[0], expected[0])
    assert torch.equal(actual[1], expected[1])


def test_opcheck_and_one_graph(generator):
    boxes, scores, groups = candidates(30, generator, ties=False)
    torch.library.opcheck(torch.ops.mrcnn.nms.default, (boxes, groups, torch.tensor([30]), 0.5, 10))

    def suppress(boxes: Tensor, scores: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        return ops.nms(boxes, scores, groups, iou_threshold=0.5, top_n=10)

    compiled = torch.compile(suppress, fullgraph=True, backend="aot_eager")(boxes, scores, groups)
    assert torch.equal(compiled[0], suppress(boxes, scores, groups)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boxes": BOXES[0]}, r"boxes is \(3, 4\) torch.float32: give \(B, P, 4\) float32"),
        ({"boxes": BOXES.half()}, "boxes is .* torch.float16: give"),
        ({"scores": SCORES[:, :2]}, r"scores is \(2, 2\) .* but boxes is \(2, 3, 4\)"),
        ({"scores": GROUPS}, "scores is .* torch.int64"),
        ({"scores": SCORES.to("meta")}, "scores is on meta: move it to cpu"),
        ({"groups": SCORES}, r"groups is \(2, 3\) torch.float32: give \(B, P\) torch.int64"),
        ({"groups": GROUPS[:1]}, r"groups is \(1, 3\) but boxes is \(2, 3, 4\)"),
        ({"iou_threshold": 1.5}, r"iou_threshold is 1.5: give 0..1"),
        ({"iou_threshold": float("nan")}, "iou_threshold is nan"),
        ({"top_n": -1}, "top_n is -1: give at least 0"),
    ],
)
def test_errors_name_argument_value_and_remedy(change, message):
    call = {"boxes": BOXES, "scores": SCORES, "groups": GROUPS, "iou_threshold": 0.5, "top_n": 2}
    with pytest.raises(ValueError, match=message):
        ops.nms(**{**call, **change})


def test_raw_operator_checks_its_arguments_too():
    counts = torch.tensor([3, 3])
    with pytest.raises(RuntimeError, match=r"boxes must be \(B, P, 4\) float32"):
        torch.ops.mrcnn.nms(BOXES.double(), GROUPS, counts, 0.5, 2)
    with pytest.raises(RuntimeError, match=r"counts must be \(B,\) int64"):
        torch.ops.mrcnn.nms(BOXES, GROUPS, counts[:1], 0.5, 2)
    too_many = torch.ops.mrcnn.nms(BOXES, GROUPS, counts * 100, 0.5, 3)  # read no further than there are boxes
    assert too_many.shape == (2, 3)
