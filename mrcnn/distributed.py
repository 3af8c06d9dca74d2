"""Several processes that train as one would with all of their images.

DDP averages the gradients of the processes. That is the gradient of the whole batch only if all of them divide their
losses by the same counts, and if batch norm takes its statistics over all images.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Count(nn.Module):
    """What a loss is divided by: a count of samples, at least 1; its mean over the processes, once they share it.

    So the mean of the processes' losses is the loss of all their images, however unequal the shares are.
    """

    def __init__(self) -> None:
        super().__init__()
        self.group: dist.ProcessGroup | None = None

    def forward(self, count: Tensor) -> Tensor:
        """Count () -> divisor () float32, on the same device, without waiting for it."""
        total = count.detach().float().clone()
        if self.group is not None:
            dist.all_reduce(total, group=self.group)
        total = total.clamp(min=1)
        return total if self.group is None else total / dist.get_world_size(self.group)


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes' pixels, once they train together.

    This is the way on the CPU, for which PyTorch has none; on a GPU its own layer takes the place of this one.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(channels, eps=eps)
        self.group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """(B, C, H, W) -> the same, normalised."""
        if self.group is None or not self.training:
            return super().forward(input)
        sums = torch.cat([input.sum(dim=(0, 2, 3)), input.new_tensor([input[:, 0].numel()])])
        sums = _Sum.apply(sums, self.group)
        count = sums[-1].detach()
        mean = sums[:-1] / count
        centered = input - mean[:, None, None]
        # not from the sums of squares, which would cancel
        variance = _Sum.apply(centered.square().sum(dim=(0, 2, 3)), self.group) / count
        self._remember(mean.detach(), variance.detach() * (count / (count - 1)))
        scale = (variance + self.eps).rsqrt() * self.weight
        return torch.addcmul(self.bias[:, None, None], centered, scale[:, None, None])

    @torch.no_grad()
    def _remember(self, mean: Tensor, variance: Tensor) -> None:
        buffers, momentum = dict(self.named_buffers()), self.momentum
        assert momentum is not None
        buffers["num_batches_tracked"].add_(1)
        buffers["running_mean"].lerp_(mean, momentum)
        buffers["running_var"].lerp_(variance, momentum)


class _Sum(torch.autograd.Function):
    """Sum of a tensor over the processes; every process has it, so gradients are summed, too."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        total = value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


def train_together(model: nn.Module, group: dist.ProcessGroup) -> None:
    """From now on the processes of a group, which have the same model, divide their losses by common counts, and
    SyncBatchNorm takes its statistics over all of them. They have to compute losses equally often.

    Call it before the model is wrapped in DDP, on the device where it is to train.
    """
    for module in list(model.modules()):
        if isinstance(module, Count):
            module.group = group
        for name, child in list(module.named_children()):
            if isinstance(child, SyncBatchNorm):
                child.group = group
                if child.weight.is_cuda:
                    setattr(module, name, nn.SyncBatchNorm.convert_sync_batchnorm(child, group))
