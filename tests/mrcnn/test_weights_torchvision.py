"""torchvision's models as ours and back: its own builders, rows of background, older names, COCO's labels."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import detection
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, box_iou

from mrcnn.coco_categories import COCO_CATEGORIES, PERSON_KEYPOINTS
from mrcnn.config import InputConfig, KeypointConfig, MaskConfig, RoIConfig, RPNConfig
from mrcnn.weights import from_torchvision, to_torchvision

State = dict[str, Tensor]


@pytest.fixture(scope="module")
def small_peer() -> nn.Module:
    """torchvision's Mask R-CNN on ResNet-18 with COCO's 91 classes, weights spread out."""
    torch.manual_seed(0)
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    model = detection.MaskRCNN(backbone, 91)
    with torch.no_grad():
        for value in model.state_dict().values():
            value += 0.1 * torch.rand_like(value)
    return model.eval()


def meta(build: Callable[..., nn.Module], **arguments: Any) -> State:
    """State dict of one of torchvision's builders, without numbers."""
    with torch.device("meta"):
        return build(weights=None, weights_backbone=None, **arguments).state_dict()


@pytest.mark.parametrize(
    ("build", "entries", "num_classes", "mask", "keypoints", "box_convs", "rpn_convs"),
    [
        (detection.maskrcnn_resnet50_fpn, 360, 90, "fcn", 0, 0, 1),
        (detection.maskrcnn_resnet50_fpn_v2, 432, 90, "fcn", 0, 4, 2),
        (detection.fasterrcnn_resnet50_fpn, 348, 90, "none", 0, 0, 1),
        (detection.fasterrcnn_resnet50_fpn_v2, 404, 90, "none", 0, 4, 2),
        (detection.keypointrcnn_resnet50_fpn, 366, 1, "none", 17, 0, 1),
    ],
)
def test_torchvisions_builders_are_recognised(
    build: Callable[..., nn.Module],
    entries: int,
    num_classes: int,
    mask: str,
    keypoints: int,
    box_convs: int,
    rpn_convs: int,
) -> None:
    state = meta(build)
    found = from_torchvision(state)
    config = found.config
    assert len(state) == entries
    assert (config.num_classes, config.mask.head, config.keypoint.num_keypoints) == (num_classes, mask, keypoints)
    assert (config.roi.box_convs, config.rpn.convs) == (box_convs, rpn_convs)
    assert (config.backbone.norm, config.backbone.norm_eps) == ("bn", 1e-5)
    assert shapes(to_torchvision(found.state, config)) == shapes(state)


def shapes(state: State) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


def test_there_and_back_is_exact_but_for_unread_rows(small_peer: nn.Module) -> None:
    state = small_peer.state_dict()
    found = from_torchvision(state)
    back = to_torchvision(found.build().state_dict(), found.config)
    unread = {"roi_heads.box_predictor.bbox_pred": 4, "roi_heads.mask_predictor.mask_fcn_logits": 1}
    assert back.keys() == state.keys()
    for name, value in state.items():
        first = unread.get(name.rpartition(".")[0], 0)
        assert torch.equal(back[name][first:], value[first:]), name
        assert not back[name][:first].any()


def test_older_names_are_read(small_peer: nn.Module) -> None:
    state = small_peer.state_dict()
    older = {
        "rpn.head.conv.0.0.": "rpn.head.conv.",
        **{f"fpn.{kind}_blocks.{i}.0.": f"fpn.{kind}_blocks.{i}." for kind in ("inner", "layer") for i in range(4)},
        **{f"roi_heads.mask_head.{i}.0.": f"roi_heads.mask_head.mask_fcn{i + 1}." for i in range(4)},
    }
    renamed = {}
    for name, value in state.items():
        for new, old in older.items():
            name = name.replace(new, old)
        renamed[name] = value
    assert sum(name not in state for name in renamed) == 2 * len(older)
    expected, found = from_torchvision(state), from_torchvision(renamed)
    assert found.config == expected.config
    assert all(torch.equal(found.state[name], value) for name, value in expected.state.items())


def test_epsilon_of_frozen_batch_norm(small_peer: nn.Module) -> None:
    state = small_peer.state_dict()
    assert from_torchvision(state).config.backbone.norm_eps == 0.0
    assert from_torchvision(state, norm_eps=1e-5).config.backbone.norm_eps == 1e-5


def test_torchvisions_settings(small_peer: nn.Module) -> None:
    config = from_torchvision(small_peer.state_dict()).config
    assert config.rpn == RPNConfig(round_anchors=True, strides_from_grid=True)
    assert config.roi == RoIConfig(aligned=False)
    assert config.mask == MaskConfig(binary_targets=False, paste="padded")
    assert config.input == InputConfig(resize="bilinear")
    assert config.keypoint == KeypointConfig(score="logit")


def test_labels_are_cocos_with_its_gaps(small_peer: nn.Module) -> None:
    state = small_peer.state_dict()
    found = from_torchvision(state)
    assert [category.id for category in found.categories] == list(range(1, 91))
    assert (found.categories[17].name, found.categories[11].name) == ("dog", "unused 12")
    used = from_torchvision(state, classes="used")
    assert used.categories == COCO_CATEGORIES
    assert used.config.num_classes == 80
    logits = state["roi_heads.box_predictor.cls_score.weight"]
    deltas = state["roi_heads.box_predictor.bbox_pred.bias"]
    masks = state["roi_heads.mask_predictor.mask_fcn_logits.weight"]
    assert torch.equal(used.state["roi_heads.box_head.class_logits.weight"][0], logits[0])
    for label, category in enumerate(COCO_CATEGORIES, start=1):
        row = category.id
        assert torch.equal(used.state["roi_heads.box_head.class_logits.weight"][label], logits[row])
        box = used.state["roi_heads.box_head.box_deltas.bias"][4 * label - 4 : 4 * label]
        assert torch.equal(box, deltas[4 * row : 4 * row + 4])
        assert torch.equal(used.state["roi_heads.mask_head.mask_logits.weight"][label - 1], masks[row])
    assert used.build().categories == COCO_CATEGORIES


def test_a_person_has_named_keypoints() -> None:
    (person,) = from_torchvision(meta(detection.keypointrcnn_resnet50_fpn)).categories
    assert (person.id, person.name, person.keypoints) == (1, "person", PERSON_KEYPOINTS)
    with pytest.raises(ValueError, match="classes is 'used', but must be all for a model of 1 classes"):
        from_torchvision(meta(detection.keypointrcnn_resnet50_fpn), classes="used")


@torch.no_grad()
def test_version_2_detects_what_torchvision_does() -> None:
    """Trained batch norm everywhere, convolutions in the box head, two in the RPN: no oracle has these."""
    torch.manual_seed(1)
    sizes = {"min_size": 160, "max_size": 320, "rpn_post_nms_top_n_test": 100, "box_detections_per_img": 20}
    peer = detection.maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, num_classes=6, **sizes).eval()
    peer.roi_heads.box_predictor.cls_score.weight.mul_(10)
    found = from_torchvision(peer.state_dict())
    config = replace(
        found.config,
        input=replace(found.config.input, shorter_side=160, longer_side=320),
        rpn=replace(found.config.rpn, post_nms_top_n_test=100),
        roi=replace(found.config.roi, max_detections=20),
    )
    image = torch.nn.functional.interpolate(torch.rand(1, 3, 10, 14), size=(150, 210), mode="bicubic").clamp(0, 1)
    pixels = (image[0] * 255).to(torch.uint8)
    (expected,) = peer([pixels.float() / 255])
    (ours,) = replace(found, config=config).build().predict([pixels.permute(1, 2, 0).numpy()])
    iou = box_iou(expected["boxes"], ours.boxes) * (expected["labels"][:, None] == ours.labels)
    best, match = iou.max(dim=1)
    assert iou.shape == (20, 20)
    assert (best > 0.99).sum() >= 19
    pairs = best > 0.99
    torch.testing.assert_close(ours.scores[match][pairs], expected["scores"][pairs], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (detection.retinanet_resnet50_fpn, r"no part of torchvision's.*backbone\.fpn\.extra_blocks\.p6\.weight"),
        (detection.fasterrcnn_mobilenet_v3_large_fpn, r"no part of torchvision's.*backbone\.body\.0\.0\.weight"),
    ],
)
def test_other_models_of_torchvision_are_refused_by_name(build: Callable[..., nn.Module], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        from_torchvision(meta(build))


def test_other_bodies_are_refused_by_name() -> None:
    with torch.device("meta"):
        backbone = resnet_fpn_backbone(backbone_name="resnet152", weights=None)
        state = detection.FasterRCNN(backbone, 3).state_dict()
    with pytest.raises(ValueError, match=r"the body has 36 blocks in res4.*none of resnet18"):
        from_torchvision(state)
