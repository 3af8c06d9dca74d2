"""Our `predict` against torchvision's model on real photographs: reading sizes, resizing and pasting included."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.detection import KeypointRCNN
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou

from mrcnn import Detections, MaskRCNN
from mrcnn.weights import from_torchvision

SHORTER, LONGER, DETECTIONS = 240, 400, 30
PROPOSALS = 300
SIZES = {
    "min_size": SHORTER,
    "max_size": LONGER,
    "rpn_post_nms_top_n_test": PROPOSALS,
    "box_detections_per_img": DETECTIONS,
}


def lively(peer: nn.Module) -> nn.Module:
    """The peer with scores and boxes spread out, so that a random network finds things."""
    with torch.no_grad():
        peer.roi_heads.box_predictor.cls_score.weight.mul_(30)
        peer.roi_heads.box_predictor.bbox_pred.weight.mul_(5)
    return peer.eval()


def backbone() -> nn.Module:
    return resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)


def ours(peer: nn.Module) -> MaskRCNN:
    found = from_torchvision(peer.state_dict(), norm_eps=1e-5)
    given = replace(found.config.input, shorter_side=SHORTER, longer_side=LONGER)
    rpn = replace(found.config.rpn, post_nms_top_n_test=PROPOSALS)
    roi = replace(found.config.roi, max_detections=DETECTIONS)
    return replace(found, config=replace(found.config, input=given, rpn=rpn, roi=roi)).build()


def photographs(folder: Path, count: int) -> Iterator[np.ndarray]:
    """Some of the fifty validation images."""
    for path in sorted((folder / "val2017").glob("*.jpg"))[:: 50 // count]:
        yield np.asarray(Image.open(path).convert("RGB"))


@torch.no_grad()
def both(peer: nn.Module, model: MaskRCNN, image: np.ndarray) -> tuple[dict[str, Tensor], Detections, Tensor, Tensor]:
    """What the peer and ours find in an image, and which rows of them belong together: class and IoU > 0.99."""
    (theirs,) = peer([torch.from_numpy(image.copy()).permute(2, 0, 1).float() / 255])
    (found,) = model.predict([image])
    assert len(found) == len(theirs["boxes"])
    iou = box_iou(theirs["boxes"], found.boxes) * (theirs["labels"][:, None] == found.labels)
    best, match = iou.max(dim=1)
    rows = (best > 0.99).nonzero().squeeze(1)
    assert len(rows) >= 0.97 * len(found)
    torch.testing.assert_close(found.scores[match[rows]], theirs["scores"][rows], atol=1e-3, rtol=0)
    return theirs, found, rows, match[rows]


@pytest.mark.coco100
def test_masks(coco100: Path) -> None:
    torch.manual_seed(3)
    peer = lively(TorchvisionMaskRCNN(backbone(), 91, **SIZES))
    model = ours(peer)
    for image in photographs(coco100, 5):
        theirs, found, rows, match = both(peer, model, image)
        expected, masks = theirs["masks"][rows, 0] >= 0.5, found.masks[match]
        union = (expected | masks).sum(dim=(1, 2))
        overlap = (expected & masks).sum(dim=(1, 2)) / union.clamp(min=1)
        assert ((overlap > 0.98) | (union == 0)).float().mean() >= 0.97


@pytest.mark.coco100
def test_keypoints(coco100: Path) -> None:
    torch.manual_seed(3)
    peer = lively(KeypointRCNN(backbone(), 2, **SIZES))
    model = ours(peer)
    for image in photographs(coco100, 2):
        theirs, found, rows, match = both(peer, model, image)
        assert found.keypoints is not None
        away = (theirs["keypoints"][rows, :, :2] - found.keypoints[match, :, :2]).abs().amax(-1)
        assert (away < 0.5).float().mean() >= 0.99
