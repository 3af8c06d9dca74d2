"""The networks on top of RoI features: boxes, masks, keypoints. Shape letters as in structures.py."""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from mrcnn.backbone import conv_norm_relu
from mrcnn.config import HeadNorm, KeypointConfig, MaskConfig, RoIConfig
from mrcnn.structures import full_precision


def _convs(channels: int, width: int, count: int, norm: HeadNorm) -> tuple[nn.Sequential, int]:
    """`count` 3x3 convolutions, and the channels that come out."""
    widths = [channels] + [width] * count
    return nn.Sequential(*(conv_norm_relu(a, b, norm) for a, b in pairwise(widths))), widths[-1]


def _fcs(inputs: int, width: int, count: int) -> tuple[nn.ModuleList, int]:
    """`count` fully connected layers, and the features that come out."""
    widths = [inputs] + [width] * count
    layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
    for layer in layers:
        nn.init.kaiming_uniform_(layer.weight, a=1)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layers, widths[-1]


class BoxHead(nn.Module):
    """RoI features (R, C, side, side) -> class_logits (R, K + 1), background first, and box_deltas (R, K, 4)."""

    def __init__(self, channels: int, side: int, num_classes: int, config: RoIConfig) -> None:
        super().__init__()
        self.convs, channels = _convs(channels, config.box_conv_channels, config.box_convs, config.box_norm)
        self.average = config.head == "res5"
        fcs = 0 if self.average else config.box_fcs
        self.fcs, width = _fcs(channels * (1 if self.average else side**2), config.box_channels, fcs)
        self.class_logits = nn.Linear(width, num_classes + 1)
        self.box_deltas = nn.Linear(width, 4 * num_classes)
        nn.init.normal_(self.class_logits.weight, std=0.01)
        nn.init.normal_(self.box_deltas.weight, std=0.001)
        for layer in (self.class_logits, self.box_deltas):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(x)
        x = x.mean(dim=(2, 3)) if self.average else x.flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        deltas = self.box_deltas(x)
        return full_precision(self.class_logits(x)), full_precision(deltas.reshape(deltas.shape[0], -1, 4))


class FCNMaskHead(nn.Module):
    """RoI features -> 3x3 convolutions -> deconvolution -> mask_logits (R, outputs, M, M), M twice the side."""

    def __init__(self, channels: int, outputs: int, config: MaskConfig) -> None:
        super().__init__()
        self.convs, channels = _convs(channels, config.channels, config.convs, config.norm)
        self.deconv = nn.ConvTranspose2d(channels, config.channels, 2, stride=2)
        self.mask_logits = nn.Conv2d(config.channels, outputs, 1)
        for layer in (self.deconv, self.mask_logits):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return full_precision(self.mask_logits(F.relu(self.deconv(self.convs(x)))))


class MLPMaskHead(nn.Module):
    """RoI features -> fully connected layers -> mask_logits (R, outputs, M, M), M twice the side (Table 2e)."""

    def __init__(self, channels: int, side: int, outputs: int, config: MaskConfig) -> None:
        super().__init__()
        self.side = 2 * side
        self.fcs, width = _fcs(channels * side**2, config.fc_channels, config.fcs)
        self.mask_logits = nn.Linear(width, outputs * self.side**2)
        nn.init.normal_(self.mask_logits.weight, std=0.001)
        nn.init.zeros_(self.mask_logits.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        for layer in self.fcs:
            x = F.relu(layer(x))
        return full_precision(self.mask_logits(x).reshape(x.shape[0], -1, self.side, self.side))


class KeypointHead(nn.Module):
    """RoI features -> 3x3 convolutions -> deconvolution -> 2x upsampling -> heatmaps (R, keypoints, 4 side, 4 side)."""

    def __init__(self, channels: int, config: KeypointConfig) -> None:
        super().__init__()
        self.convs, channels = _convs(channels, config.channels, config.convs, "none")
        self.deconv = nn.ConvTranspose2d(channels, config.num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.deconv.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        heatmaps = full_precision(self.deconv(self.convs(x)))
        return F.interpolate(heatmaps, scale_factor=2.0, mode="bilinear", align_corners=False)
