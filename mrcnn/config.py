"""Every setting of the model and its default. No other file has a default of the model in it.

Numbers without another source are the paper's (arXiv 1703.06870v3) or, where the paper is silent, those that
torchvision and detectron2 share. Where the two differ, the setting says what each of them has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any, Literal

from mrcnn.settings import check_choices, dataclass_from_dict, require

Norm = Literal["frozen_bn", "bn", "sync_bn", "gn"]
HeadNorm = Literal["none", "bn", "gn"]
BoxCoding = Literal["continuous", "legacy"]


def _require_positive(settings: object, prefix: str, *names: str) -> None:
    for name in names:
        value = getattr(settings, name)
        require(value > 0, f"{prefix}{name}", value, "positive", "see its default")


@dataclass(frozen=True)
class BackboneConfig:
    """ResNet or ResNeXt body, and which of its features the heads see."""

    name: Literal["resnet18", "resnet34", "resnet50", "resnet101", "resnext101_32x8d", "resnext101_64x4d"] = "resnet50"
    """The body."""
    features: Literal["fpn", "c4", "c5"] = "fpn"
    """fpn: pyramid P2..P6; c4: res4 at stride 16, res5 is the RoI head; c5: res5 at stride 32 with the FPN's heads."""
    norm: Norm = "frozen_bn"
    """Normalisation of the body: frozen_bn with pretrained weights, bn, sync_bn or gn where it starts from scratch."""
    norm_eps: float = 1e-5
    """Added to the variance in normalisation; torchvision's COCO_V1 weights were trained and are read with 0."""
    frozen_stages: int = 2
    """How many stages stay as loaded, counted from the stem: 0 none, 1 the stem, 2 stem and res2, ... 5 all."""
    stride_in_1x1: bool = False
    """Bottlenecks halve the resolution in their first 1x1 convolution (MSRA's weights, detectron2's R-50 and R-101)
    or in the 3x3 (torchvision, detectron2's X-101)."""
    fpn_channels: int = 256
    """Channels of every pyramid level."""
    fpn_norm: HeadNorm = "none"
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
        grouped = self.fpn_norm != "gn" or self.fpn_channels % 16 == 0
        require(grouped, "backbone.fpn_channels", self.fpn_channels, "a multiple of 16 with fpn_norm=gn", "take 256")
        require(self.norm_eps >= 0, "backbone.norm_eps", self.norm_eps, "at least 0", "1e-5 is usual")
        require(
            not self.stride_in_1x1 or self.name not in ("resnet18", "resnet34"),
            "backbone.stride_in_1x1",
            self.stride_in_1x1,
            f"false with {self.name}",
            "its blocks have no 1x1 convolution to stride in",
        )


@dataclass(frozen=True)
class RPNConfig:
    """Region proposal network."""

    features: Literal["shared", "own"] = "shared"
    """shared: the detector's backbone; own: a second backbone, for the paper's ablations with an RPN trained apart."""
    anchor_sizes: tuple[float, ...] = (32.0, 64.0, 128.0, 256.0, 512.0)
    """Side of the square anchor, pixels: one a level on P2..P6, all of them on the single map of c4 and c5."""
    aspect_ratios: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Height over width."""
    round_anchors: bool = False
    """Round anchor corners to whole pixels, as torchvision does; detectron2 does not."""
    strides_from_grid: bool = False
    """Take each level's stride as image size // grid size (torchvision) and not as 4..64 (detectron2)."""
    convs: int = 1
    """3x3 convolutions before the outputs; torchvision's v2 has two."""
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
    """The same at inference: the paper's 1000 for FPN, 300 for C4."""
    nms_iou: float = 0.7
    """IoU above which the weaker proposal goes."""
    min_size: float = 1e-3
    """Proposals with a shorter side, pixels, are dropped; 0 drops only those without area (detectron2)."""
    smooth_l1_beta: float = 1.0 / 9
    """Where the box loss turns from quadratic to linear; 0 is plain L1 (detectron2)."""
    loss_normalizer: Literal["sampled", "batch_size"] = "sampled"
    """What both losses are divided by: the anchors that were sampled (torchvision), or batch_size_per_image for every
    image, however few there were (detectron2)."""
    box_coding: BoxCoding = "continuous"
    """legacy counts a box's last pixel into its width (+1) where boxes are encoded, decoded and clipped, as Detectron's
    first weights want it."""

    def __post_init__(self) -> None:
        check_choices(self, "rpn.")
        require(bool(self.anchor_sizes), "rpn.anchor_sizes", self.anchor_sizes, "not empty", "the paper has five")
        require(min(self.anchor_sizes) > 0, "rpn.anchor_sizes", self.anchor_sizes, "positive", "they are pixels")
        require(
            bool(self.aspect_ratios) and min(self.aspect_ratios) > 0,
            "rpn.aspect_ratios",
            self.aspect_ratios,
            "positive numbers",
            "the paper has 0.5, 1, 2",
        )
        require(
            0 <= self.negative_iou <= self.positive_iou <= 1,
            "rpn.negative_iou",
            self.negative_iou,
            f"between 0 and positive_iou ({self.positive_iou})",
            "the paper has 0.3 and 0.7",
        )
        require(
            0 < self.positive_fraction <= 1,
            "rpn.positive_fraction",
            self.positive_fraction,
            "in (0, 1]",
            "the paper has 0.5",
        )
        _require_positive(
            self,
            "rpn.",
            "batch_size_per_image",
            "convs",
            "pre_nms_top_n_train",
            "pre_nms_top_n_test",
            "post_nms_top_n_train",
            "post_nms_top_n_test",
        )
        require(0 < self.nms_iou <= 1, "rpn.nms_iou", self.nms_iou, "in (0, 1]", "the paper has 0.7")
        require(self.min_size >= 0, "rpn.min_size", self.min_size, "at least 0", "0 drops only boxes without area")
        require(self.smooth_l1_beta >= 0, "rpn.smooth_l1_beta", self.smooth_l1_beta, "at least 0", "0 is plain L1")


@dataclass(frozen=True)
class RoIConfig:
    """How RoIs are sampled and pooled, the box head, and what becomes of its outputs."""

    batch_size_per_image: int = 512
    """RoIs sampled for training; the paper's N: 512 for FPN, 64 for C4."""
    positive_fraction: float = 0.25
    """Largest share of positives among them: the paper's 1:3."""
    positive_iou: float = 0.5
    """A RoI of at least this IoU with a box is positive, any other is negative."""
    operator: Literal["align", "pool", "warp", "precise"] = "align"
    """How RoI features are read: RoIAlign, RoIPool, RoIWarp or PrRoIPool; every head uses the same."""
    reduce: Literal["mean", "max"] = "mean"
    """What RoIAlign and RoIWarp make of the samples of a bin; RoIPool is always max, PrRoIPool always mean."""
    sampling_ratio: int = 2
    """Samples along each side of a bin; 0: as many as the RoI has feature pixels there (detectron2)."""
    aligned: bool = True
    """RoIAlign with pixel centres at half pixels (detectron2); False as torchvision has it."""
    canonical_size: float = 224.0
    """Side, pixels, of a RoI that is read from P4; half of it goes to P3, and so on (224 as ImageNet's crops)."""
    head: Literal["separate", "res5"] = "separate"
    """separate: the FPN's heads; res5: the body's last stage, shared by box and mask, for c4 features."""
    box_pool: int = 7
    """Side of the RoI feature of the box head; with head=res5 of what goes into res5, for all heads (paper: 14)."""
    box_convs: int = 0
    """3x3 convolutions of the box head before its fully connected layers; torchvision's v2 has 4."""
    box_conv_channels: int = 256
    """Their channels."""
    box_norm: HeadNorm = "none"
    """Normalisation after each of them."""
    box_fcs: int = 2
    """Fully connected layers of the box head."""
    box_channels: int = 1024
    """Width of them."""
    box_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0)
    """Scales of dx, dy, dw, dh in the regression targets."""
    box_coding: BoxCoding = "continuous"
    """legacy counts a box's last pixel into its width (+1) where boxes are encoded, decoded and clipped, as Detectron's
    first weights want it."""
    smooth_l1_beta: float = 1.0 / 9
    """Where the box loss turns from quadratic to linear; 0 is plain L1 (detectron2)."""
    score_threshold: float = 0.05
    """Detections have to be above it to go into NMS."""
    min_size: float = 1e-2
    """Detections with a shorter side, pixels, are dropped; 0 drops only those without area (detectron2)."""
    nms_iou: float = 0.5
    """IoU above which the weaker detection of a class goes."""
    max_detections: int = 100
    """Best detections of an image, over all classes, that get a mask."""

    def __post_init__(self) -> None:
        check_choices(self, "roi.")
        _require_positive(self, "roi.", "batch_size_per_image", "canonical_size", "box_pool", "box_channels")
        _require_positive(self, "roi.", "box_conv_channels", "max_detections")
        for name in ("positive_iou", "nms_iou", "positive_fraction"):
            require(0 < getattr(self, name) <= 1, f"roi.{name}", getattr(self, name), "in (0, 1]", "see its default")
        for name in ("box_convs", "box_fcs", "smooth_l1_beta", "min_size", "sampling_ratio"):
            require(getattr(self, name) >= 0, f"roi.{name}", getattr(self, name), "at least 0", "see its default")
        four = len(self.box_weights) == 4 and min(self.box_weights) > 0
        require(four, "roi.box_weights", self.box_weights, "four positive numbers", "10, 10, 5, 5 are usual")
        require(
            0 <= self.score_threshold < 1,
            "roi.score_threshold",
            self.score_threshold,
            "in [0, 1)",
            "0.05 is usual",
        )
        require(
            self.reduce == "mean" or self.operator in ("align", "warp"),
            "roi.reduce",
            self.reduce,
            f"mean with operator={self.operator}",
            "RoIPool is a maximum and PrRoIPool a mean by definition",
        )
        require(
            self.operator != "warp" or self.sampling_ratio > 0,
            "roi.sampling_ratio",
            self.sampling_ratio,
            "positive with operator=warp",
            "1 or 2 samples along each side of a bin are usual",
        )


@dataclass(frozen=True)
class MaskConfig:
    """The mask head, its loss and what becomes of its output."""

    head: Literal["fcn", "mlp", "none"] = "fcn"
    """fcn: convolutions; mlp: fully connected layers (Table 2e); none: Faster R-CNN."""
    pool: int = 14
    """Side of the RoI feature; masks come out twice as large. Without meaning for roi.head=res5."""
    convs: int = 4
    """3x3 convolutions of the fcn head before its deconvolution; 0 on res5 features."""
    fcs: int = 2
    """Hidden layers of the mlp head: Table 2e has 2 and 3."""
    fc_channels: int = 1024
    """Width of them."""
    channels: int = 256
    """Channels of the convolutions."""
    norm: HeadNorm = "none"
    """Normalisation after each convolution. bn counts RoIs that are not positive, too: gn does not mix RoIs."""
    class_agnostic: bool = False
    """One mask for all classes instead of one for each."""
    loss: Literal["sigmoid", "softmax"] = "sigmoid"
    """sigmoid: the true class's mask alone; softmax: classes and background compete for every pixel (Table 2b)."""
    binary_targets: bool = True
    """Targets are 0 or 1 (detectron2); False leaves the resampled values between (torchvision)."""
    paste: Literal["continuous", "padded"] = "continuous"
    """continuous: masks are read at pixel centres (detectron2); padded: torchvision's padded, whole-pixel boxes."""
    threshold: float = 0.5
    """A pixel belongs to the object from this probability on."""

    def __post_init__(self) -> None:
        check_choices(self, "mask.")
        _require_positive(self, "mask.", "pool", "fcs", "fc_channels", "channels")
        require(self.convs >= 0, "mask.convs", self.convs, "at least 0", "the paper has 4")
        require(0 < self.threshold <= 1, "mask.threshold", self.threshold, "in (0, 1]", "0.5 is usual")


@dataclass(frozen=True)
class KeypointConfig:
    """The keypoint head."""

    num_keypoints: int = 0
    """Keypoints of an object: 17 for COCO's persons; 0: there is no keypoint head."""
    pool: int = 14
    """Side of the RoI feature; heatmaps come out four times as large."""
    convs: int = 8
    """3x3 convolutions."""
    channels: int = 512
    """Their channels."""
    pixel_offset: float = 0.0
    """Added to annotated x and y in training and subtracted from found ones: 0.5 in detectron2, where annotations are
    pixel indices; 0 in torchvision."""
    score: Literal["probability", "logit"] = "probability"
    """A found keypoint's score: its softmax probability (detectron2) or its raw logit (torchvision)."""

    def __post_init__(self) -> None:
        check_choices(self, "keypoint.")
        _require_positive(self, "keypoint.", "pool", "channels")
        for name in ("num_keypoints", "convs"):
            require(getattr(self, name) >= 0, f"keypoint.{name}", getattr(self, name), "at least 0", "0 is none")


@dataclass(frozen=True)
class InputConfig:
    """From an RGB image to what the network sees."""

    shorter_side: int = 800
    """Pixels of the shorter side after resizing."""
    longer_side: int = 1333
    """Bound of the longer side, which wins over `shorter_side`."""
    resize: Literal["antialias", "pillow", "bilinear"] = "antialias"
    """antialias: 8-bit, sizes rounded. pillow: the same by Pillow (detectron2), whose bytes differ by a grey level here
    and there, at twenty times the cost. bilinear: in floating point, not antialiased, sizes rounded down
    (torchvision)."""
    channels: Literal["rgb", "bgr"] = "rgb"
    """Order of the channels that the network sees; images are given as RGB always."""
    mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    """Subtracted, 0..255, in the order of `channels` (ImageNet's)."""
    std: tuple[float, float, float] = (58.395, 57.12, 57.375)
    """Divided by, in the order of `channels`."""
    size_divisor: int = 32
    """Height and width are padded to a multiple of it."""

    def __post_init__(self) -> None:
        check_choices(self, "input.")
        require(
            0 < self.shorter_side <= self.longer_side,
            "input.shorter_side",
            self.shorter_side,
            f"positive and at most longer_side ({self.longer_side})",
            "the paper has 800 and 1333",
        )
        require(self.size_divisor > 0, "input.size_divisor", self.size_divisor, "positive", "32 is usual")
        for name in ("mean", "std"):
            three = len(getattr(self, name)) == 3 and all(map(isfinite, getattr(self, name)))
            require(three, f"input.{name}", getattr(self, name), "three numbers", "one for each channel")
        require(min(self.std) > 0, "input.std", self.std, "positive", "pixels are divided by it")


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
    """RoIs and the box head."""
    mask: MaskConfig = field(default_factory=MaskConfig)
    """Mask head."""
    keypoint: KeypointConfig = field(default_factory=KeypointConfig)
    """Keypoint head."""
    input: InputConfig = field(default_factory=InputConfig)
    """From an RGB image to what the network sees."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.num_classes, int) and self.num_classes >= 1,
            "num_classes",
            self.num_classes,
            "a whole number of at least 1",
            "it counts classes without background",
        )
        self._check_features()

    def _check_features(self) -> None:
        features = self.backbone.features
        require(
            (self.roi.head == "res5") == (features == "c4"),
            "roi.head",
            self.roi.head,
            "res5 with backbone.features=c4, and only with it",
            "res5 is either the RoI head or part of the backbone",
        )
        require(
            features != "fpn" or len(self.rpn.anchor_sizes) == 5,
            "rpn.anchor_sizes",
            self.rpn.anchor_sizes,
            "five numbers with backbone.features=fpn",
            "one for each of P2..P6",
        )
        require(
            features != "fpn" or self.input.size_divisor % 32 == 0,
            "input.size_divisor",
            self.input.size_divisor,
            "a multiple of 32 with backbone.features=fpn",
            "the deepest stage has stride 32",
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict of numbers, strings and lists, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The inverse of `to_dict`. Raises ValueError for a setting that does not exist."""
        return dataclass_from_dict(cls, data)
