"""A training step in one process. Knows no Ray: a test or a plain loop can run it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from jobs.config import OptimizerConfig, TrainConfig
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


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.SGD:
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
    return torch.optim.SGD(groups, lr=config.base_lr, momentum=config.momentum)


class Engine:
    """Model, optimizer and the count of steps done. `model` maps a batch to its losses; it may be wrapped in DDP."""

    def __init__(self, model: nn.Module, config: TrainConfig, device: torch.device) -> None:
        self.model = model.train()
        self.config = config
        self.device = device
        self.optimizer = build_optimizer(model, config.optimizer)
        self.step = 0

    def train_step(self, images: ImageBatch, targets: Targets, proposals: Proposals | None = None) -> Losses:
        """One optimizer step. Returns the losses, their sum under "loss", on the device: reading them waits for it.

        `proposals` are for a detector that is trained apart from its RPN.
        """
        rate = learning_rate(self.step, self.config)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        images = images.to(self.device, non_blocking=True)
        targets = targets.to(self.device, non_blocking=True)
        if proposals is not None:
            proposals = proposals.to(self.device, non_blocking=True)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
            losses: Losses = self.model(images, targets, proposals)
        total = torch.stack(list(losses.values())).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        if self.config.optimizer.clip_norm:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_norm)
        self.optimizer.step()
        self.step += 1
        return {"loss": total.detach(), **{name: value.detach() for name, value in losses.items()}}

    @property
    def images_seen(self) -> int:
        """Images consumed by all workers together, which alone fixes where the stream of batches goes on."""
        return self.step * self.config.global_batch


def read_losses(losses: list[Losses]) -> dict[str, float]:
    """Mean of each loss over some steps. The one place where training waits for the device."""
    names = list(losses[0])
    means = torch.stack([torch.stack([step[name] for name in names]) for step in losses]).mean(dim=0)
    return dict(zip(names, means.tolist(), strict=True))


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite: training on would only spoil the weights."""


def check_finite(losses: dict[str, float], step: int) -> None:
    """Raise NonFiniteLossError with the step and the parts of the loss if one of them is NaN or infinite."""
    if not all(torch.isfinite(torch.tensor(list(losses.values()))).tolist()):
        parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items())
        raise NonFiniteLossError(
            f"the loss is not finite at step {step} ({parts}): lower --optimizer.base-lr, lengthen "
            "--optimizer.warmup-steps or set --optimizer.clip-norm"
        )


def check_finite_weights(model: nn.Module, step: int) -> None:
    """Raise NonFiniteLossError if a parameter or buffer is NaN or infinite: the last update, too, can do that."""
    spoilt = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if spoilt:
        raise NonFiniteLossError(
            f"{len(spoilt)} tensors are not finite after step {step}, {spoilt[0]} first: "
            "lower --optimizer.base-lr or set --optimizer.clip-norm"
        )
