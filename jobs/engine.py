"""A training step in one process. Knows no Ray: a test or a plain loop can run it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from jobs.config import OptimizerConfig, TrainConfig
from jobs.guards import SkippedSteps
from mrcnn.rpn import Proposals
from mrcnn.structures import ImageBatch, Targets

Losses = dict[str, Tensor]


def learning_rate(step: int, config: TrainConfig) -> float:
    """The rate of a step (the first is 0): in proportion to the global batch, warmed up, cut in steps."""
    optimizer = config.optimizer
    rate = optimizer.base_lr * config.global_batch / 16
    if step < optimizer.warmup_steps:
        progress = step / optimizer.warmup_steps
        rate *= optimizer.warmup_factor + (1 - optimizer.warmup_factor) * progress
    cuts = sum(step >= share * config.steps for share in optimizer.decay_at)
    return rate * optimizer.decay_factor**cuts


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool = False) -> torch.optim.SGD:
    """SGD on what is not frozen; no weight decay on biases and normalisation, as their scale means nothing."""
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for parameter in model.parameters():
        if parameter.requires_grad:
            (decayed if parameter.dim() > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    return torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum, fused=fused)


class Engine:
    """Model, optimizer and the count of steps done. `model` maps a batch to its losses; it may be wrapped in DDP."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model = model.train()
        self.config = config
        self.device = device
        # only the fused update can be called off by the device itself
        self.optimizer = build_optimizer(model, config.optimizer, fused=config.skips_allowed > 0)
        self.step = 0
        self._parts: list[Losses] = []  # of the step that is going on
        self._skip = SkippedSteps(model, self.optimizer) if config.skips_allowed else None

    def train_step(self, images: ImageBatch, targets: Targets, proposals: Proposals | None = None) -> Losses:
        """One optimizer step. Returns the losses, their sum under "loss", on the device: reading them waits for it.

        `proposals` are for a detector that is trained apart from its RPN.
        """
        self.accumulate(images, targets, proposals)
        return self.update()

    def accumulate(
        self,
        images: ImageBatch,
        targets: Targets,
        proposals: Proposals | None = None,
        *,
        weight: float = 1.0,
        ends_step: bool = True,
    ) -> None:
        """Add the gradients of a part of a step, whose losses count as `weight`; the weights of a step are 1 in all.

        With the part that ends the step the processes of DDP exchange their gradients.
        """
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if proposals is not None:
            proposals = proposals.to(self.device, non_blocking=True)
        if not self._parts:
            self.optimizer.zero_grad(set_to_none=True)
            if self._skip:
                self._skip.begin()
        with self._exchange(ends_step):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                losses: Losses = self.model(images, targets, proposals)
            total = torch.stack(list(losses.values())).sum()
            (total * weight).backward()
        part = {"loss": total, **losses}
        self._parts.append({name: value.detach() * weight for name, value in part.items()})

    def _exchange(self, ends_step: bool) -> AbstractContextManager[None]:
        if isinstance(self.model, DistributedDataParallel) and not ends_step:
            return self.model.no_sync()
        return nullcontext()

    def update(self) -> Losses:
        """Take the step. Returns its losses as `train_step` does.

        With on_nan skip there is also "skipped", 0 or 1: a step whose gradients are not finite changes nothing.
        """
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        skipped = self._skip.unless_finite(self.optimizer) if self._skip else {}
        self.optimizer.step()
        self.step += 1
        parts, self._parts = self._parts, []
        losses = {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}
        return losses | skipped

    @property
    def images_seen(self) -> int:
        """Images consumed by all workers together, which alone fixes where the stream of batches goes on."""
        return self.step * self.config.global_batch


def read_losses(steps: Sequence[Losses]) -> Tensor:
    """(steps, losses) float32 on the host, in the order of their names. The one place where training waits for the
    device."""
    return torch.stack([torch.stack(list(step.values())) for step in steps]).float().cpu()
