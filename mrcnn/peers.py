"""torchvision's and detectron2's detectors as ours, and back.

What tensors tell is read off them, never off a file's name; what they do not tell is the peer's default. Converted
models give the peer's output: tests hold them to numbers computed with both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mrcnn.architecture import State, architecture, check_complete, norm_of
from mrcnn.bodies import TORCHVISION_INPUT, adapt_stem, add_statistics
from mrcnn.coco_categories import COCO_CATEGORIES, COCO_CATEGORIES_WITH_GAPS, PERSON, PERSON_KEYPOINTS
from mrcnn.config import InputConfig, ModelConfig
from mrcnn.model import MaskRCNN
from mrcnn.peer_names import (
    Classes,
    detectron2_parts,
    inverse,
    modern_torchvision_name,
    parts_for_detectron2,
    parts_for_torchvision,
    rename,
    torchvision_parts,
)
from mrcnn.peer_settings import detectron2_config, detectron2_pixels, torchvision_config
from mrcnn.settings import require
from mrcnn.structures import Category

LOGITS, DELTAS = "roi_heads.box_head.class_logits", "roi_heads.box_head.box_deltas"
MASK_LOGITS = "roi_heads.mask_head.mask_logits"


@dataclass(frozen=True)
class PeerModel:
    """A peer's model in our terms."""

    config: ModelConfig
    categories: tuple[Category, ...]
    state: dict[str, Tensor]
    """State dict of `MaskRCNN(config, categories)`"""

    def build(self) -> MaskRCNN:
        """The model itself, in evaluation mode."""
        model = MaskRCNN(self.config, self.categories)
        model.load_state_dict(self.state)
        return model.eval()


def is_torchvision(state: State) -> bool:
    """It is a detector of torchvision.models.detection."""
    return any(name.startswith("backbone.body.") for name in state)


def is_detectron2(state: State) -> bool:
    """It is a detector of detectron2."""
    return any(name.startswith(("backbone.bottom_up.", "backbone.stem.conv1.")) for name in state)


def from_torchvision(state: State, *, norm_eps: float | None = None, classes: Classes = "all") -> PeerModel:
    """torchvision's Mask, Keypoint or Faster R-CNN with a ResNet and FPN, version 1 or 2, as ours.

    Weights of 91 rows are COCO's with its gaps: 90 classes whose category id is their row. Background has a row of
    class logits with us, too, but none of boxes and masks, where torchvision's are never read.

    Args:
        state: its state dict, with present or older names
        norm_eps: of frozen batch norm; by default the 0 that torchvision sets when it loads its COCO weights, though
            the layer's own is 1e-5. Trained batch norm has 1e-5.
        classes: "used" drops the ten of the 90 classes that COCO never uses

    Raises:
        ValueError: for tensors that are no part of such a model, naming the first.
    """
    state = {modern_torchvision_name(name): value for name, value in state.items()}
    parts = torchvision_parts(
        fpn_norm="backbone.fpn.inner_blocks.0.1.weight" in state,
        box_convs=sum(f"roi_heads.box_head.{i}.0.weight" in state for i in range(16)),
    )
    ours, unknown = rename(state, inverse(parts))
    _refuse_unknown(unknown, "torchvision's Mask, Keypoint or Faster R-CNN with a ResNet and FPN")
    ours = _edit_rows(ours, {DELTAS: lambda rows: rows[4:], MASK_LOGITS: lambda rows: rows[1:]})
    config = torchvision_config(architecture(ours), norm_eps=norm_eps)
    check_complete(ours, config, parts)
    found = PeerModel(config, coco_categories(config), ours)
    return only_used_classes(found) if classes == "used" else found


def to_torchvision(state: State, config: ModelConfig) -> dict[str, Tensor]:
    """Our model's state dict for torchvision's MaskRCNN, KeypointRCNN or FasterRCNN; the inverse of `from_torchvision`.

    Rows of background in box regression and mask logits, which we do not have, are zeros. The first convolution is
    changed for torchvision's input (RGB, ImageNet's std) where ours differs. Other settings of the model, such as
    RoIAlign's or batch norm's epsilon, are not in a state dict: torchvision's own apply.

    Raises:
        ValueError: for a model that torchvision does not have.
    """
    _require_ordinary(config, "torchvision", ("fpn",))
    stride = config.backbone.stride_in_1x1
    require(not stride, "backbone.stride_in_1x1", stride, "false for torchvision", "its ResNets stride in the 3x3")
    agnostic = config.mask.class_agnostic
    require(not agnostic, "mask.class_agnostic", agnostic, "false for torchvision", "its masks are class-specific")
    stem = "backbone.stem.0.weight"
    state = {**state, stem: adapt_stem(state[stem], config.input, TORCHVISION_INPUT)}
    state = _edit_rows(
        state, {DELTAS: lambda rows: _zeros_first(rows, 4), MASK_LOGITS: lambda rows: _zeros_first(rows, 1)}
    )
    return _renamed(state, parts_for_torchvision(config))


def from_detectron2(state: State, *, stride_in_1x1: bool | None = None) -> PeerModel:
    """detectron2's Mask, Keypoint or Faster R-CNN with a ResNet or ResNeXt, FPN or C4 head, as ours.

    pixel_mean and pixel_std, where they are among the tensors, set the input: RGB if the mean is ImageNet's in that
    order, else BGR. Without them it is BGR with the mean and std of detectron2's own models.

    Args:
        state: its state dict
        stride_in_1x1: where bottlenecks halve the resolution, which tensors do not tell; by default in the 1x1 for
            ResNets with frozen batch norm (MSRA's), in the 3x3 for others

    Raises:
        ValueError: for tensors that are no part of such a model (DC5, Cascade, ...), naming the first.
    """
    tensors = {name: v for name, v in state.items() if "cell_anchors" not in name and not name.startswith("pixel_")}
    rpn_convs = sum(f"proposal_generator.rpn_head.conv.conv{i}.weight" in tensors for i in range(16))
    parts = detectron2_parts(
        fpn=any(name.startswith("backbone.bottom_up.") for name in tensors),
        fpn_norm="backbone.fpn_lateral2.norm.weight" in tensors,
        rpn_convs=rpn_convs or 1,
    )
    ours, unknown = rename(tensors, inverse(parts))
    _refuse_unknown(unknown, "detectron2's Mask, Keypoint or Faster R-CNN with FPN or C4 heads")
    ours = _edit_rows(ours, {LOGITS: lambda rows: rows.roll(1, 0)})
    if norm_of(ours, "backbone.stem.1") == "gn" and norm_of(ours, "backbone.lateral.0.1") != "gn":
        add_statistics(ours, eps=1e-5)  # frozen batch norm that was stored as a scale and a shift
    config = detectron2_config(architecture(ours), stride_in_1x1=stride_in_1x1, pixels=_pixels(state))
    check_complete(ours, config, parts)
    return PeerModel(config, coco_categories(config), ours)


def to_detectron2(state: State, config: ModelConfig) -> dict[str, Tensor]:
    """Our model's state dict for detectron2's GeneralizedRCNN; the inverse of `from_detectron2`.

    `peer_settings.detectron2_settings` has what its configuration has to say. Frozen batch norm has an epsilon of 1e-5
    there, whatever ours has.

    Raises:
        ValueError: for a model that detectron2 does not have.
    """
    _require_ordinary(config, "detectron2", ("fpn", "c4"))
    state = _edit_rows(state, {LOGITS: lambda rows: rows.roll(-1, 0)})
    return _renamed(state, parts_for_detectron2(config))


def coco_categories(config: ModelConfig) -> tuple[Category, ...]:
    """What the labels of a peer's model mean by their number: 80 and 90 are COCO's, 17 keypoints a person's."""
    if config.num_classes == 1 and config.keypoint.num_keypoints == len(PERSON_KEYPOINTS):
        return (PERSON,)
    for categories in (COCO_CATEGORIES, COCO_CATEGORIES_WITH_GAPS):
        if config.num_classes == len(categories):
            return categories
    return tuple(Category(id=i, name=str(i)) for i in range(1, config.num_classes + 1))


def only_used_classes(model: PeerModel) -> PeerModel:
    """A model of COCO's 90 numbers without those that stand for nothing: 80 classes, as detectron2 has them."""
    require(
        model.categories == COCO_CATEGORIES_WITH_GAPS,
        "classes",
        "used",
        f"all for a model of {len(model.categories)} classes",
        "only COCO's 90 have unused ones",
    )
    keep = [category.id - 1 for category in COCO_CATEGORIES]
    logits = [0, *(row + 1 for row in keep)]
    state = _edit_rows(
        model.state,
        {
            LOGITS: lambda rows: rows[logits],
            DELTAS: lambda rows: rows.unflatten(0, (-1, 4))[keep].flatten(0, 1),
            MASK_LOGITS: lambda rows: rows[keep],
        },
    )
    return PeerModel(replace(model.config, num_classes=len(keep)), COCO_CATEGORIES, state)


def _pixels(state: State) -> InputConfig | None:
    """The input that detectron2's models stored among their tensors once."""
    if "pixel_mean" not in state or "pixel_std" not in state:
        return None
    return detectron2_pixels(state["pixel_mean"].flatten().tolist(), state["pixel_std"].flatten().tolist())


def _refuse_unknown(unknown: Sequence[str], expected: str) -> None:
    if unknown:
        raise ValueError(
            f"{len(unknown)} tensors are no part of {expected}, such as {', '.join(unknown[:3])}: "
            "give the checkpoint of such a model"
        )


def _require_ordinary(config: ModelConfig, peer: str, features: Sequence[str]) -> None:
    """Raise ValueError for a variant of ours that the peer does not have."""
    for name, value, ordinary in (
        ("backbone.features", config.backbone.features, features),
        ("rpn.features", config.rpn.features, ("shared",)),
        ("mask.head", config.mask.head, ("fcn", "none")),
        ("mask.loss", config.mask.loss, ("sigmoid",)),
    ):
        require(value in ordinary, name, value, f"{' or '.join(ordinary)} for {peer}", "it has no other variant")


def _edit_rows(state: State, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> dict[str, Tensor]:
    """The state with weight and bias of some parts changed, row by row of outputs."""
    edited = {}
    for name, value in state.items():
        edit = edits.get(name.rpartition(".")[0])
        edited[name] = value if edit is None else edit(value)
    return edited


def _zeros_first(rows: Tensor, count: int) -> Tensor:
    return torch.cat([rows.new_zeros(count, *rows.shape[1:]), rows])


def _renamed(state: State, parts: Mapping[str, str]) -> dict[str, Tensor]:
    renamed, unknown = rename(state, parts)
    if unknown:
        raise ValueError(f"{', '.join(unknown[:3])}: not the state dict of a model with these settings, or with any")
    return renamed
