"""ResNet bodies (torchvision's) with a feature pyramid (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from mrcnn.config import BackboneConfig, Norm

NORMS: dict[Norm, Callable[[int], nn.Module]] = {
    "frozen_bn": FrozenBatchNorm2d,
    "bn": nn.BatchNorm2d,
    "sync_bn": nn.SyncBatchNorm,
    "gn": lambda channels: nn.GroupNorm(32 if channels % 32 == 0 else 16, channels),
}


def conv_norm_relu(in_channels: int, out_channels: int, norm: str, *, relu: bool = True) -> nn.Sequential:
    """3x3 convolution, optional normalisation, optional ReLU; weights as He et al. have them."""
    conv = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=norm == "none")
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    layers: list[nn.Module] = [conv]
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    if norm != "none":
        layers.append(NORMS[norm](out_channels))  # type: ignore[index]
    if relu:
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


class ResNetFPN(nn.Module):
    """Images (B, 3, H, W), H and W multiples of 32 -> P2..P6, strides 4..64, `fpn_channels` each."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        resnet = getattr(torchvision.models, config.name)(weights=None, norm_layer=NORMS[config.norm])
        self.stem = nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu, resnet.maxpool)
        self.stages = nn.ModuleList([resnet.layer1, resnet.layer2, resnet.layer3, resnet.layer4])
        widths = [resnet.fc.in_features // 8 * 2**i for i in range(4)]
        self.lateral = nn.ModuleList(_fpn_conv(width, config, kernel=1) for width in widths)
        self.output = nn.ModuleList(_fpn_conv(config.fpn_channels, config, kernel=3) for _ in widths)
        self.frozen = [self.stem, *self.stages][: config.frozen_stages]
        for part in self.frozen:
            part.requires_grad_(False)

    def train(self, mode: bool = True) -> ResNetFPN:
        """Frozen stages keep their batch statistics, too."""
        super().train(mode)
        for part in self.frozen:
            part.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        bottom_up = self.bottom_up(x)
        top_down = [self.lateral[3](bottom_up[3])]
        for i in (2, 1, 0):
            lateral = self.lateral[i](bottom_up[i])
            top_down.insert(0, lateral + F.interpolate(top_down[0], size=lateral.shape[-2:], mode="nearest"))
        pyramid = [output(x) for output, x in zip(self.output, top_down, strict=True)]
        return [*pyramid, F.max_pool2d(pyramid[-1], kernel_size=1, stride=2)]  # P6 serves the RPN only

    def bottom_up(self, x: Tensor) -> list[Tensor]:
        """C2..C5."""
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
        return nn.Sequential(conv, NORMS[config.fpn_norm](config.fpn_channels))  # type: ignore[index]
    nn.init.zeros_(conv.bias)
    return conv


def spatial_sizes(features: Sequence[Tensor]) -> list[tuple[int, int]]:
    """Height and width of every level."""
    return [(f.shape[-2], f.shape[-1]) for f in features]
