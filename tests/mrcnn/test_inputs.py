"""Bad input is refused in words: the argument, the value, the remedy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import SMALL, batch_of, small_model, with_keypoints
from torch import Tensor

from mrcnn import ImageBatch, MaskRCNN, RunLengthMasks, Targets
from mrcnn.inputs import check_images, check_targets
from mrcnn.rpn import Proposals

BOXES = [[[10, 10, 60, 70], [50, 20, 110, 60]], [[5, 30, 40, 90]]]
Change = Callable[[Tensor], Tensor]


def put(where: tuple[int, ...], value: float) -> Change:
    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[where] = value
        return tensor

    return changed


@pytest.mark.parametrize(
    ("field", "change", "words"),
    [
        ("boxes", Tensor.double, None),
        ("boxes", Tensor.half, "targets.boxes is torch.float16, but must be torch.float32"),
        ("boxes", lambda x: x[:1], r"targets.boxes is \(1, 2, 4\), but must be \(2, 2, 4\)"),
        ("boxes", lambda x: x[..., :3], r"targets.boxes is \(2, 2, 3\), but must be \(2, 2, 4\)"),
        ("boxes", put((0, 1, 2), float("nan")), r"targets.boxes is .*nan.*must be finite"),
        ("boxes", put((1, 0, 3), float("inf")), r"targets.boxes is .*inf.*must be finite"),
        ("boxes", put((0, 0, 2), 5.0), r"targets.boxes is .*10.0, 10.0, 5.0, 70.0.*x1 < x2"),
        ("boxes", put((1, 1, 2), float("nan")), None),  # padding is not looked at
        ("labels", put((0, 0), 4), r"targets.labels is .4., but must be 0 to 3"),
        ("labels", put((0, 0), -1), r"targets.labels is .-1., but must be 0 to 3"),
        ("labels", Tensor.int, "targets.labels is torch.int32, but must be torch.int64"),
        ("labels", lambda x: x[:, :1], r"targets.labels is \(2, 1\), but must be \(2, 2\)"),
        ("iscrowd", Tensor.long, "targets.iscrowd is torch.int64, but must be torch.bool"),
        ("seeds", lambda x: x[:1], r"targets.seeds is \(1,\), but must be \(2,\)"),
        ("keypoints", put((0, 0, 1, 0), float("nan")), "targets.keypoints is not finite"),
        ("keypoints", lambda x: x[:, :, :3], r"targets.keypoints is \(2, 2, 3, 3\), but must be \(2, 2, 5, 3\)"),
    ],
)
def test_targets(field: str, change: Change, words: str | None) -> None:
    images, targets = with_keypoints(*batch_of(BOXES), 5)
    changed = dataclasses.replace(targets, **{field: change(getattr(targets, field))})
    if words is None:
        check_targets(changed, images, num_classes=3, num_keypoints=5)
        return
    with pytest.raises(ValueError, match=words):
        check_targets(changed, images, num_classes=3, num_keypoints=5)


def masks(change: Callable[[RunLengthMasks], RunLengthMasks]) -> Callable[[Targets], Targets]:
    return lambda targets: dataclasses.replace(targets, masks=change(targets.masks))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            masks(lambda m: RunLengthMasks(torch.where(m.ends == 96 * 128, 96 * 127, m.ends), m.offsets)),
            "targets.masks covers 12192 pixels for object 0 of image 0, but the image has 96 x 128: resize masks",
        ),
        (masks(lambda m: RunLengthMasks(m.ends, m.offsets[:-1])), r"targets.masks.offsets is \(4,\)"),
        (masks(lambda m: RunLengthMasks(m.ends.long(), m.offsets)), "targets.masks.ends is torch.int64"),
        (masks(lambda m: RunLengthMasks(m.ends[:-1], m.offsets)), "targets.masks.offsets is .*rising to"),
    ],
)
def test_masks_of_another_size(change: Callable[[Targets], Targets], words: str) -> None:
    images, targets = batch_of(BOXES)
    with pytest.raises(ValueError, match=words):
        check_targets(change(targets), images, num_classes=3, num_keypoints=0)


@pytest.mark.parametrize(
    ("pixels", "sizes", "words"),
    [
        (torch.zeros(2, 1, 32, 32), [[32, 32]] * 2, r"images.pixels is \(2, 1, 32, 32\), but must be \(B, 3, H, W\)"),
        (torch.zeros(2, 3, 32, 32).long(), [[32, 32]] * 2, "images.pixels is torch.int64"),
        (torch.zeros(2, 3, 32, 32), [[32, 32]], r"images.sizes is \(1, 2\), but must be \(2, 2\)"),
        (torch.zeros(1, 3, 32, 32), [[32, 33]], r"images.sizes is \[\[32, 33\]\], but must be 1 to \(32, 32\)"),
        (torch.zeros(1, 3, 32, 32), [[0, 3]], r"images.sizes is \[\[0, 3\]\], but must be 1 to \(32, 32\)"),
    ],
)
def test_images(pixels: Tensor, sizes: list[list[int]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_images(ImageBatch(pixels, torch.tensor(sizes)))


def test_the_model_looks_at_what_it_is_given() -> None:
    images, targets = batch_of(BOXES)
    with pytest.raises(ValueError, match=r"targets\.labels"):
        small_model()(images, dataclasses.replace(targets, labels=targets.labels + 3))


def test_padding_counts_for_nothing() -> None:
    """Not even where every candidate is sampled, padding rows among them, and they hold NaN."""
    config = dataclasses.replace(SMALL, roi=dataclasses.replace(SMALL.roi, batch_size_per_image=512))
    torch.manual_seed(0)
    model = MaskRCNN(config)
    images, targets = batch_of(BOXES)
    spoilt = dataclasses.replace(targets, boxes=put((1, 1), float("nan"))(targets.boxes))
    clean, same = model(images, targets), model(images, spoilt)
    assert all(torch.equal(clean[name], same[name]) for name in clean)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"boxes": torch.zeros(1, 5, 4)}, r"proposals.boxes is \(1, 5, 4\), but must be \(2, 5, 4\)"),
        ({"valid": torch.ones(2, 5, dtype=torch.int64)}, "proposals.valid is torch.int64"),
        ({"scores": torch.zeros(2, 4)}, r"proposals.scores is \(2, 4\)"),
        ({"boxes": torch.full((2, 5, 4), torch.nan)}, "proposals.boxes is not finite"),
    ],
)
def test_proposals(change: dict[str, Tensor], words: str) -> None:
    proposals = Proposals(torch.zeros(2, 5, 4), torch.zeros(2, 5), torch.zeros(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match=words):
        small_model()(*batch_of(BOXES), dataclasses.replace(proposals, **change))


def test_detect() -> None:
    images, _ = batch_of(BOXES)
    model = small_model().eval()
    with pytest.raises(ValueError, match=r"images.pixels is \(2, 1, 96, 128\)"):
        model.detect(dataclasses.replace(images, pixels=images.pixels[:, :1]), [(96, 128)] * 2)
    with pytest.raises(ValueError, match="source_sizes is 1 entries, but must be 2"):
        model.detect(images, [(96, 128)])
    with pytest.raises(ValueError, match=r"source_sizes\[1\] is \(0, 128\)"):
        model.detect(images, [(96, 128), (0, 128)])


def test_a_failed_prediction_leaves_the_mode_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small_model().train()
    monkeypatch.setattr(model, "detect", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model.predict([np.zeros((9, 9, 3), np.uint8)])
    assert model.training


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"images": [np.zeros((9, 9), np.uint8)]}, r"images\[0\] has shape \(9, 9\)"),
        ({"images": [np.zeros((9, 9, 3), np.float32)]}, r"images\[0\] is float32, but must be a uint8 array"),
        ({"images": [np.zeros((0, 9, 3), np.uint8)]}, r"images\[0\] has shape \(0, 9, 3\)"),
        ({"images": [np.zeros((9, 9, 3), np.uint8)], "batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"images": [np.zeros((9, 9, 3), np.uint8)], "source_sizes": []}, "source_sizes is 0 entries, but must be 1"),
    ],
)
def test_predict(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_model().predict(**arguments)
