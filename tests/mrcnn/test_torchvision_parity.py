"""Our model against torchvision's with the same weights: proposals, detections, masks and the five losses.

The random network is scaled up so that its outputs spread widely: any difference in anchors, coding, sampling or
pooling shows. The inputs are multiples of 64, where torchvision's stride of P6 (image // grid) is the true one.
"""

import dataclasses

import numpy as np
import pytest
import torch
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, box_iou

from mrcnn import ImageBatch, MaskRCNN, ModelConfig, RunLengthMasks, Targets
from mrcnn.weights import from_torchvision

SIZE = (192, 256)
K = 5


@pytest.fixture(scope="module")
def peer() -> TorchvisionMaskRCNN:
    torch.manual_seed(3)
    backbone = resnet_fpn_backbone(
        backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3
    )
    model = TorchvisionMaskRCNN(backbone, K + 1, box_score_thresh=0.05)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("roi_heads.box_predictor.cls_score"):
                parameter.mul_(30)
            elif name.startswith("roi_heads.box_predictor.bbox_pred"):
                parameter.mul_(5)
    return model.eval()


@pytest.fixture(scope="module")
def ours(peer: TorchvisionMaskRCNN) -> MaskRCNN:
    config = ModelConfig(num_classes=K)
    config = dataclasses.replace(
        config,
        rpn=dataclasses.replace(config.rpn, round_anchors=True),
        roi=dataclasses.replace(config.roi, aligned=False),
        mask=dataclasses.replace(config.mask, binary_targets=False),
    )
    model = MaskRCNN(config)
    model.load_state_dict(from_torchvision(peer.state_dict()).state)
    return model.eval()


@pytest.fixture(scope="module")
def images() -> ImageBatch:
    generator = torch.Generator().manual_seed(5)
    coarse = torch.rand(2, 3, 12, 16, generator=generator) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=SIZE, mode="bicubic").clamp(0, 255).to(torch.uint8)
    return ImageBatch(pixels=pixels, sizes=torch.tensor([SIZE, SIZE]))


@pytest.fixture(scope="module")
def truth() -> tuple[Targets, list[dict[str, torch.Tensor]]]:
    """Two images: three objects, and one (padded)."""
    boxes = torch.tensor(
        [[[10, 20, 90, 140], [60, 5, 200, 100], [130, 90, 180, 150]], [[30, 30, 220, 180], [0] * 4, [0] * 4]]
    ).float()
    labels = torch.tensor([[1, 4, 2], [5, 0, 0]])
    masks = np.zeros((2, 3, *SIZE), dtype=np.uint8)
    yy, xx = np.mgrid[: SIZE[0], : SIZE[1]]
    for i in range(2):
        for j in range(3):
            x1, y1, x2, y2 = boxes[i, j].tolist()
            inside = ((xx - (x1 + x2) / 2) / max((x2 - x1) / 2, 1)) ** 2 + (
                (yy - (y1 + y2) / 2) / max((y2 - y1) / 2, 1)
            ) ** 2 < 1
            masks[i, j] = inside & bool(labels[i, j])
    peers = [
        {"boxes": boxes[i, :n], "labels": labels[i, :n], "masks": torch.from_numpy(masks[i, :n])}
        for i, n in enumerate((3, 1))
    ]
    targets = Targets(
        boxes=boxes,
        labels=labels,
        iscrowd=torch.zeros_like(labels, dtype=torch.bool),
        masks=run_lengths(masks.reshape(6, *SIZE)),
        seeds=torch.tensor([1, 2]),
    )
    return targets, peers


def run_lengths(masks: np.ndarray) -> RunLengthMasks:
    ends, offsets = [], [0]
    for mask in masks:
        flat = mask.T.reshape(-1)
        changes = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        ends += [*changes.tolist(), flat.size]
        offsets.append(len(ends))
    return RunLengthMasks(torch.tensor(ends, dtype=torch.int32), torch.tensor(offsets))


def peer_input(ours: MaskRCNN, images: ImageBatch) -> ImageList:
    return ImageList(ours.normalize(images), [SIZE, SIZE])


@torch.no_grad()
def test_proposals(peer: TorchvisionMaskRCNN, ours: MaskRCNN, images: ImageBatch) -> None:
    inputs = peer_input(ours, images)
    expected, _ = peer.rpn(inputs, peer.backbone(inputs.tensors))
    found, _ = ours.propose(images)
    for i in range(2):
        boxes = found.boxes[i][found.valid[i]]
        assert boxes.shape == expected[i].shape
        assert (box_iou(boxes, expected[i]).max(dim=0).values > 0.99).float().mean() > 0.995


@torch.no_grad()
def test_detections(peer: TorchvisionMaskRCNN, ours: MaskRCNN, images: ImageBatch) -> None:
    inputs = peer_input(ours, images)
    features = peer.backbone(inputs.tensors)
    proposals, _ = peer.rpn(inputs, features)
    expected, _ = peer.roi_heads(features, proposals, inputs.image_sizes)
    found = ours.detect(images, [SIZE, SIZE])
    for theirs, one in zip(expected, found, strict=True):
        assert len(one) == len(theirs["boxes"]) == 100
        iou = box_iou(theirs["boxes"], one.boxes) * (theirs["labels"][:, None] == one.labels)
        best, match = iou.max(dim=1)
        assert (best > 0.99).sum() >= 97
        same = best > 0.99
        torch.testing.assert_close(one.scores[match][same], theirs["scores"][same], atol=1e-3, rtol=0)
        probs = theirs["masks"][:, 0]
        torch.testing.assert_close(one.mask_probs[match][same], probs[same], atol=2e-2, rtol=0)


def test_losses(
    peer: TorchvisionMaskRCNN,
    ours: MaskRCNN,
    images: ImageBatch,
    truth: tuple[Targets, list[dict[str, torch.Tensor]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Both samplers take the lowest indices first, so both see the same anchors and RoIs."""
    monkeypatch.setattr(torch, "randperm", lambda n, device=None: torch.arange(n, device=device))

    def lowest_first(seeds: torch.Tensor, count: int) -> torch.Tensor:
        return torch.arange(count, 0, -1).expand(len(seeds), -1)

    monkeypatch.setattr("mrcnn.rpn.priorities", lowest_first)
    monkeypatch.setattr("mrcnn.roi_sampling.priorities", lowest_first)
    inputs = peer_input(ours, images)
    targets, peer_targets = truth
    peer.train()
    ours.train()
    try:
        features = peer.backbone(inputs.tensors)
        proposals, expected = peer.rpn(inputs, features, peer_targets)
        _, head_losses = peer.roi_heads(features, proposals, inputs.image_sizes, peer_targets)
        found = ours(images, targets)
    finally:
        peer.eval()
        ours.eval()
    expected = {**expected, **head_losses}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
