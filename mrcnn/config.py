"""Every setting of the model and its default. No other file has a default of the model in it.

Numbers without another source are the paper's (arXiv 1703.06870v3) or, where the paper is silent, those that
torchvision and detectron2 share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")
Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]


def require(holds: bool, name: str, value: object, bound: str, remedy: str) -> None:
    """Raise a ValueError that names the setting, its value, what it has to be, and what to do."""
    if not holds:
        raise ValueError(f"{name} is {value!r}, but must be {bound}: {remedy}")


def check_choices(settings: object, prefix: str = "") -> None:
    """Raise a ValueError for a setting that is none of its Literal's values."""
    for name, hint in get_type_hints(type(settings)).items():
        if get_origin(hint) is Literal:
            choices = ", ".join(map(str, get_args(hint)))
            value = getattr(settings, name)
            require(value in get_args(hint), f"{prefix}{name}", value, f"one of {choices}", "take one of these")


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet body and feature pyramid."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101"] = "resnet50"
    """Depth of the ResNet."""
    norm: Norm = "frozen_bn"
    """Normalisation of the body: frozen_bn with pretrained weights, bn, sync_bn or gn where it starts from scratch."""
    frozen_stages: int = 2
    """How many stages stay as loaded, counted from the stem: 0 none, 1 the stem, 2 stem and res2, ... 5 all."""
    fpn_channels: int = 256
    """Channels of every pyramid level."""
    fpn_norm: Literal["none", "bn", "gn"] = "none"
    """Normalisation after each pyramid convolution; the paper has none, training from scratch wants one."""

    def __post_init__(self) -> None:
        check_choices(self, "backbone.")
        require(
            0 <= self.frozen_stages <= 5,
            "backbone.frozen_stages",
            self.frozen_stages,
            "0 to 5",
            "5 freezes the whole body",
        )
        require(self.fpn_channels > 0, "backbone.fpn_channels", self.fpn_channels, "positive", "the paper has 256")


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor, pixels: one a level on P2..P6."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    round_anchors: bool = False
    """Round anchor corners to whole pixels, as torchvision does; detectron2 does not."""
    positive_iou: float = 0.7
    """An anchor of at least this IoU is positive, and so is the best one of each box."""
    negative_iou: float = 0.3
    """An anchor below this IoU with every box is negative; between the two it is ignored."""
    batch_size_per_image: int = 256
    """Anchors sampled for the loss."""
    positive_fraction: float = 0.5
    """Largest share of positives among them."""
    pre_nms_top_n_train: int = 2000
    """Best anchors of a level that go into NMS."""
    pre_nms_top_n_test: int = 1000
    """The same at inference."""
    post_nms_top_n_train: int = 2000
    """Proposals of an image that are left after NMS (torchvision 2000, detectron2 1000)."""
    post_nms_top_n_test: int = 1000
    """The same at inference: the paper's 1000 for FPN."""
    nms_iou: float = 0.7
    """IoU above which the weaker proposal goes."""
    min_size: float = 1e-3
    """Proposals with a shorter side, pixels, are dropped."""
    smooth_l1_beta: float = 1.0 / 9
    """Where the box loss turns from quadratic to linear."""

    def __post_init__(self) -> None:
        require(
            len(self.anchor_sizes) == 5,
            "rpn.anchor_sizes",
            self.anchor_sizes,
            "five numbers",
            "one for each of P2..P6",
        )
        require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            "rpn.negative_iou",
            self.negative_iou,
            f"between 0 and positive_iou ({self.positive_iou})",
            "the paper has 0.3 and 0.7",
        )
        require(
            0 < self.positive_fraction < 1,
            "rpn.positive_fraction",
            self.positive_fraction,
            "between 0 and 1",
            "the paper has 0.5",
        )
        require(
            self.batch_size_per_image > 0,
            "rpn.batch_size_per_image",
            self.batch_size_per_image,
            "positive",
            "256 is usual",
        )


@dataclass(frozen=True)
class RoIConfig:
    """RoI sampling, the box head, the mask head and what becomes of their outputs."""

    batch_size_per_image: int = 512
    """RoIs sampled for training; the paper's N: 512 for FPN, 64 for C4."""
    positive_fraction: float = 0.25
    """Largest share of positives among them: the paper's 1:3."""
    positive_iou: float = 0.5
    """A RoI of at least this IoU with a box is positive, any other is negative."""
    box_pool: int = 7
    """Side of the RoI feature of the box head."""
    box_channels: int = 1024
    """Width of the box head's two fully connected layers."""
    mask_pool: int = 14
    """Side of the RoI feature of the mask head; masks come out twice as large."""
    mask_channels: int = 256
    """Channels of the mask head."""
    mask_convs: int = 4
    """3x3 convolutions of the mask head."""
    mask_norm: Literal["none", "bn", "gn"] = "none"
    """Normalisation after each of them."""
    canonical_size: float = 224.0
    """Side, pixels, of a RoI that is read from P4; half of it goes to P3, and so on (224 as ImageNet's crops)."""
    sampling_ratio: int = 2
    """RoIAlign samples along each side of a bin; 0: as many as the RoI has feature pixels there."""
    aligned: bool = True
    """RoIAlign with pixel centres at half pixels (detectron2); False as torchvision has it."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scales of dx, dy, dw, dh in the regression targets."""
    smooth_l1_beta: float = 1.0 / 9
    """Where the box loss turns from quadratic to linear."""
    score_threshold: float = 0.05
    """Detections below it are dropped before NMS."""
    min_size: float = 1e-2
    """Detections with a shorter side, pixels, are dropped."""
    nms_iou: float = 0.5
    """IoU above which the weaker detection of a class goes."""
    max_detections: int = 100
    """Best detections of an image, over all classes, that get a mask."""
    binary_mask_targets: bool = True
    """Mask targets are 0 or 1 (detectron2); False leaves the resampled values between (torchvision)."""
    mask_threshold: float = 0.5
    """A pixel belongs to the object from this probability on."""

    def __post_init__(self) -> None:
        check_choices(self, "roi.")
        for name in ("box_pool", "box_channels", "mask_pool", "mask_channels", "canonical_size"):
            require(getattr(self, name) > 0, f"roi.{name}", getattr(self, name), "positive", "see its default")
        for name in ("positive_iou", "nms_iou", "mask_threshold"):
            require(0 < getattr(self, name) <= 1, f"roi.{name}", getattr(self, name), "in (0, 1]", "0.5 is usual")
        require(min(self.box_weights) > 0, "roi.box_weights", self.box_weights, "positive", "10, 10, 5, 5 are usual")
        require(
            self.batch_size_per_image > 0,
            "roi.batch_size_per_image",
            self.batch_size_per_image,
            "positive",
            "the paper has 512",
        )
        require(
            0 < self.positive_fraction <= 1,
            "roi.positive_fraction",
            self.positive_fraction,
            "in (0, 1]",
            "the paper has 0.25",
        )
        require(
            0 <= self.score_threshold < 1,
            "roi.score_threshold",
            self.score_threshold,
            "in [0, 1)",
            "0.05 is usual",
        )
        require(
            self.max_detections > 0,
            "roi.max_detections",
            self.max_detections,
            "positive",
            "the paper has 100",
        )


@dataclass(frozen=True)
class InputConfig:
    """From an RGB image to what the network sees."""

    shorter_side: int = 800
    """Pixels of the shorter side after resizing."""
    longer_side: int = 1333
    """Bound of the longer side, which wins over `shorter_side`."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted, RGB, 0..255 (ImageNet's)."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divided by, RGB."""
    size_divisor: int = 32
    """Height and width are padded to a multiple of it."""

    def __post_init__(self) -> None:
        require(
            0 < self.shorter_side <= self.longer_side,
            "input.shorter_side",
            self.shorter_side,
            f"positive and at most longer_side ({self.longer_side})",
            "the paper has 800 and 1333",
        )
        require(
            self.size_divisor % 32 == 0,
            "input.size_divisor",
            self.size_divisor,
            "a multiple of 32",
            "the deepest stage has stride 32",
        )


@dataclass(frozen=True)
class ModelConfig:
    """A whole Mask R-CNN."""

    num_classes: int = 80
    """Classes without background."""
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    """ResNet body and feature pyramid."""
    rpn: RPNConfig = field(default_factory=RPNConfig)
    """Region proposal network."""
    roi: RoIConfig = field(default_factory=RoIConfig)
    """RoI heads."""
    input: InputConfig = field(default_factory=InputConfig)
    """From an RGB image to what the network sees."""

    def __post_init__(self) -> None:
        require(
            self.num_classes >= 1,
            "num_classes",
            self.num_classes,
            "at least 1",
            "it counts classes without background",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError for a setting that does not exist."""
        return dataclass_from_dict(cls, data)


def dataclass_from_dict(cls: type[T], data: Mapping[str, Any], path: str = "") -> T:
    """Build a (nested) dataclass of settings from plain JSON data; missing settings keep their defaults.

    Raises ValueError for a key that is not a setting, naming it.
    """
    if not isinstance(data, Mapping):
        raise ValueError(f"{path.rstrip('.') or cls.__name__} is {data!r}, but must be settings by name")
    hints = get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key not in hints:
            known = ", ".join(hints)
            raise ValueError(f"{path}{key} is not a setting of {cls.__name__}: the settings are {known}")
        if is_dataclass(hints[key]):
            value = dataclass_from_dict(hints[key], value, f"{path}{key}.")
        elif isinstance(value, list):
            value = tuple(value)
        values[key] = value
    return cls(**values)
