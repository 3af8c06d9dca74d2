import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection._utils import Matcher
from torchvision.ops import box_iou

from mrcnn.matching import IGNORED, NEGATIVE, POSITIVE, match, priorities, sample
from mrcnn.structures import RunLengthMasks, Targets

THRESHOLDS = {"positive_iou": 0.7, "negative_iou": 0.3}


def objects(boxes: Tensor, labels: Tensor, iscrowd: Tensor | None = None) -> Targets:
    """Targets of (B, N, 4) boxes without masks."""
    crowd = torch.zeros_like(labels, dtype=torch.bool) if iscrowd is None else iscrowd
    masks = RunLengthMasks(torch.zeros(0, dtype=torch.int32), torch.zeros(labels.numel() + 1, dtype=torch.int64))
    return Targets(boxes, labels, crowd, masks, torch.arange(len(labels)))


def test_kinds_by_iou_and_the_best_of_an_object() -> None:
    gt = torch.tensor([[0.0, 0, 10, 10], [100, 100, 110, 110]])
    candidates = torch.tensor([[[0.0, 0, 10, 9], [0, 0, 10, 5], [50, 50, 60, 60], [100, 100, 120, 120]]])
    targets = objects(gt[None], torch.tensor([[1, 2]]))
    idxs, kinds = match(candidates, targets, keep_best=True, **THRESHOLDS)
    # IoU 0.9; 0.5; none; 0.25, but the second object's best
    assert kinds.tolist() == [[POSITIVE, IGNORED, NEGATIVE, POSITIVE]]
    assert idxs[0, [0, 1, 3]].tolist() == [0, 0, 1]
    _, kinds = match(candidates, targets, keep_best=False, **THRESHOLDS)
    assert kinds.tolist() == [[POSITIVE, IGNORED, NEGATIVE, NEGATIVE]]


def test_padding_and_absence_of_objects_make_negatives() -> None:
    candidates = torch.tensor([[[0.0, 0, 10, 10], [5, 5, 9, 9]]])
    for n in (0, 3):
        padding = objects(torch.zeros(2, n, 4), torch.zeros(2, n, dtype=torch.int64))
        _, kinds = match(candidates, padding, keep_best=True, **THRESHOLDS)
        assert kinds.tolist() == [[NEGATIVE, NEGATIVE]] * 2


def test_a_crowd_is_neither_matched_nor_background() -> None:
    crowd = objects(torch.tensor([[[0.0, 0, 50, 50]]]), torch.tensor([[1]]), torch.tensor([[True]]))
    candidates = torch.tensor([[[0.0, 0, 50, 50], [10, 10, 20, 20], [40, 40, 90, 90]]])
    _, kinds = match(candidates, crowd, keep_best=True, **THRESHOLDS)
    assert kinds.tolist() == [[IGNORED, IGNORED, NEGATIVE]]


@pytest.mark.parametrize("chunk", [1, 3000, 1 << 25], ids=["one object at a time", "some", "all at once"])
@pytest.mark.parametrize("keep_best", [True, False])
def test_matches_as_torchvision_whatever_the_chunks(
    chunk: int, keep_best: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrcnn.matching.CHUNK_OVERLAPS", chunk)
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        corner = torch.rand(*shape, 2, generator=generator) * 90
        return torch.cat([corner, corner + torch.rand(*shape, 2, generator=generator) * 40 + 1], dim=-1)

    targets, candidates = objects(boxes(2, 9), torch.ones(2, 9, dtype=torch.int64)), boxes(2, 400)
    idxs, kinds = match(candidates, targets, keep_best=keep_best, **THRESHOLDS)
    for i in range(2):
        theirs = Matcher(0.7, 0.3, allow_low_quality_matches=keep_best)(box_iou(targets.boxes[i], candidates[i]))
        expected = torch.where(theirs >= 0, POSITIVE, torch.where(theirs == -1, NEGATIVE, IGNORED))
        assert torch.equal(kinds[i], expected)
        assert torch.equal(idxs[i][theirs >= 0], theirs[theirs >= 0])


def test_priorities_depend_on_the_images_seed_alone() -> None:
    together = priorities(torch.tensor([5, 7]), 1000)
    assert torch.equal(together[1], priorities(torch.tensor([7]), 1000)[0])
    assert not torch.equal(together[0], together[1])
    assert together.min() >= 0
    assert together.max() < 2**32


def test_priorities_are_spread_evenly() -> None:
    values = priorities(torch.tensor([0, 1, 2**40, -1]), 50_000).double() / 2**32
    assert (values.mean(dim=1) - 0.5).abs().max() < 0.01
    histogram = torch.histc(values[0], bins=10, min=0, max=1)
    assert (histogram / 5000 - 1).abs().max() < 0.06
    # seeds that differ in their upper half only give other numbers
    assert not torch.equal(values[0], values[2])


@settings(max_examples=60, deadline=None)
@given(
    kinds=st.lists(st.sampled_from([POSITIVE, NEGATIVE, IGNORED]), min_size=1, max_size=60),
    size=st.integers(1, 40),
    seed=st.integers(0, 2**62),
)
def test_sampling_keeps_its_promises(kinds: list[int], size: int, seed: int) -> None:
    tensor = torch.tensor([kinds])
    idxs, found = sample(tensor, priorities(torch.tensor([seed]), len(kinds)), size=size, positive_fraction=0.25)
    assert idxs.shape == (1, min(size, len(kinds)))
    chosen = found[0] != IGNORED
    assert torch.equal(found[0][chosen], tensor[0][idxs[0]][chosen])
    assert len(set(idxs[0][chosen].tolist())) == int(chosen.sum())
    positives = int((found == POSITIVE).sum())
    assert positives == min(kinds.count(POSITIVE), max(int(size * 0.25), 1))
    assert int((found == NEGATIVE).sum()) == min(kinds.count(NEGATIVE), idxs.shape[1] - positives)
    assert (found[0, :positives] == POSITIVE).all()
