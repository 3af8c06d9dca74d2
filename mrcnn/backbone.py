"""ResNet and ResNeXt bodies (torchvision's blocks) as C4, C5 or with a feature pyramid (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.config import BackboneConfig, HeadNorm, Norm
from mrcnn.distributed import SyncBatchNorm

STRIDES = (4, 8, 16, 32, 64)  # of res2..res5 and P6
NormLayer = Callable[[int], nn.Module]


def norm_layer(norm: Norm | Literal["none"], eps: float = 1e-5) -> NormLayer:
    """What makes a normalisation layer for a number of channels."""
    layers: dict[str, NormLayer] = {
        "none": lambda channels: nn.Identity(),
        "frozen_bn": partial(FrozenBatchNorm2d, eps=eps),
        "bn": partial(nn.BatchNorm2d, eps=eps),
        "sync_bn": partial(SyncBatchNorm, eps=eps),
        "gn": lambda channels: nn.GroupNorm(32 if channels % 32 == 0 else 16, channels, eps=eps),
    }
    return layers[norm]


def conv_norm_relu(in_channels: int, out_channels: int, norm: HeadNorm) -> nn.Sequential:
    """3x3 convolution, optional normalisation, ReLU; weights as He et al. have them."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    normalize = [norm_layer(norm)(out_channels)] if norm != "none" else []
    return nn.Sequential(conv, *normalize, nn.ReLU(inplace=True))


def resnet(config: BackboneConfig) -> tuple[nn.Sequential, list[nn.Sequential]]:
    """The stem and the stages res2..res5 of a body, with fresh weights."""
    body = getattr(torchvision.models, config.name)(weights=None, norm_layer=norm_layer(config.norm, config.norm_eps))
    stages = [body.layer1, body.layer2, body.layer3, body.layer4]
    if config.stride_in_1x1:
        for stage in stages[1:]:
            stage[0].conv1.stride, stage[0].conv2.stride = stage[0].conv2.stride, stage[0].conv1.stride
    return nn.Sequential(body.conv1, body.bn1, body.relu, body.maxpool), stages


def stage_channels(config: BackboneConfig) -> list[int]:
    """Channels of res2..res5."""
    first = 64 if config.name in ("resnet18", "resnet34") else 256
    return [first * 2**i for i in range(4)]


class Backbone(nn.Module):
    """Images (B, 3, H, W) -> the feature levels of the heads, finest first.

    fpn: P2..P6, of which the last serves the RPN only; c4: res4; c5: res5.
    """

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.stem, stages = resnet(config)
        self.stages = nn.ModuleList(stages[:3] if config.features == "c4" else stages)
        widths = stage_channels(config) if config.features == "fpn" else []
        self.lateral = nn.ModuleList(_fpn_conv(width, config, kernel=1) for width in widths)
        self.output = nn.ModuleList(_fpn_conv(config.fpn_channels, config, kernel=3) for _ in widths)
        self.channels = config.fpn_channels if widths else stage_channels(config)[len(self.stages) - 1]
        self.strides = STRIDES if widths else (STRIDES[len(self.stages) - 1],)
        self.roi_strides = self.strides[:4]  # P2..P5
        self.frozen = [self.stem, *self.stages][: config.frozen_stages]
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Frozen stages keep their batch statistics, too."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        bottom_up = self.bottom_up(x)
        if not self.lateral:
            return bottom_up[-1:]
        top_down = [self.lateral[3](bottom_up[3])]
        for i in (2, 1, 0):
            lateral = self.lateral[i](bottom_up[i])
            top_down.insert(0, lateral + F.interpolate(top_down[0], size=lateral.shape[-2:], mode="nearest"))
        pyramid = [output(x) for output, x in zip(self.output, top_down, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """res2 .. res4 or res5."""
        features: list[Tensor] = []
        x = self.stem(x)
        for stage in self.stages:
            x = stage(x)
            features.append(x)
        return features


def _fpn_conv(in_channels: int, config: BackboneConfig, *, kernel: int) -> nn.Module:
    conv = nn.Conv2d(in_channels, config.fpn_channels, kernel, padding=kernel // 2, bias=config.fpn_norm == "none")
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is None:
        return nn.Sequential(conv, norm_layer(config.fpn_norm)(config.fpn_channels))
    nn.init.zeros_(conv.bias)
    return conv


def spatial_sizes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of every level."""
    return [(f.shape[-2], f.shape[-1]) for f in features]
