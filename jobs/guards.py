"""What stops a training before it spoils its weights, or says why it cannot go on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mrcnn.structures import ImageBatch, Targets

SKIPPED = "skipped"


class NonFiniteLossError(RuntimeError):
    """The loss is NaN or infinite: training on would only spoil the weights."""


class BatchTooLargeError(RuntimeError):
    """The device's memory does not hold what a batch needs."""


class SkippedSteps:
    """Steps with gradients that are not finite change neither weights nor momentum nor batch norm's statistics.

    The device decides by itself, and nobody waits for it. Under DDP all processes have the same gradients by then, so
    they decide alike. For an optimizer with the fused update.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.SGD) -> None:
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._statistics = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
        self._before: list[Tensor] = []
        for parameter in self._parameters:  # SGD would take a skipped first gradient for its first momentum
            optimizer.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))

    def begin(self) -> None:
        """A step begins: remember what its forward pass changes."""
        self._before = [buffer.clone() for buffer in self._statistics]

    def unless_finite(self, optimizer: torch.optim.SGD) -> dict[str, Tensor]:
        """Call the coming update off if need be. Returns {"skipped": 0 or 1}, on the device."""
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        norms = torch.stack(torch._foreach_norm(gradients, torch.inf))
        skipped = (~norms.isfinite().all()).float()
        optimizer.found_inf = skipped  # type: ignore[attr-defined]  # PyTorch's own name, that of its GradScaler
        for buffer, before in zip(self._statistics, self._before, strict=True):
            buffer.copy_(torch.where(skipped > 0, before, buffer))
        return {SKIPPED: skipped}


def check_losses(steps: Sequence[Mapping[str, float]], *, first_step: int, image_ids: Sequence[Sequence[int]]) -> None:
    """Raise NonFiniteLossError at the first step with a loss that is NaN or infinite, skipped ones apart.

    Args:
        steps: losses of consecutive steps, by name
        first_step: number of the first of them
        image_ids: of each step
    """
    for i, losses in enumerate(steps):
        if not losses.get(SKIPPED) and not all(map(math.isfinite, losses.values())):
            parts = ", ".join(f"{name} {value:.4g}" for name, value in losses.items() if name != SKIPPED)
            raise NonFiniteLossError(
                f"the loss is not finite at step {first_step + i} ({parts}; images {_listed(image_ids[i])}): lower "
                "--optimizer.base-lr, lengthen --optimizer.warmup-steps, set --optimizer.clip-norm, or let "
                "--on-nan skip 10 leave out up to ten such batches"
            )


def check_skipped(skipped: int, allowed: int, *, step: int, image_ids: Sequence[int]) -> None:
    """Raise NonFiniteLossError if more steps were skipped than on_nan allows."""
    if skipped > allowed:
        raise NonFiniteLossError(
            f"{skipped} batches up to step {step} had a loss that is not finite, the last one of images "
            f"{_listed(image_ids)}: on_nan allows {allowed}"
        )


def check_finite_weights(model: nn.Module, step: int) -> None:
    """Raise NonFiniteLossError if a parameter or buffer is NaN or infinite: the last update, too, can do that."""
    spoilt = [name for name, value in model.state_dict().items() if not bool(value.isfinite().all())]
    if spoilt:
        raise NonFiniteLossError(
            f"{len(spoilt)} tensors are not finite after step {step}, {spoilt[0]} first: "
            "lower --optimizer.base-lr or set --optimizer.clip-norm"
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a GPU's or the machine's memory was too short."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def too_large(images: ImageBatch, targets: Targets, image_ids: Sequence[int], step: int) -> BatchTooLargeError:
    """What was in a batch that memory was too short for, and which settings would help."""
    sizes = ", ".join(f"{width} x {height}" for height, width in images.sizes.tolist())
    objects = ", ".join(map(str, (targets.labels > 0).sum(dim=1).tolist()))
    padded = f"{images.pixels.shape[-1]} x {images.pixels.shape[-2]}"
    return BatchTooLargeError(
        f"memory is too short for the batch of step {step}: images {_listed(image_ids)} of {sizes} pixels, each padded "
        f"to {padded}, with {objects} objects. Take fewer --images-at-once (the global batch stays), smaller "
        "--model.input.shorter-side and --model.input.longer-side, a smaller --max-objects, or --precision bf16"
    )


def _listed(image_ids: Sequence[int]) -> str:
    return ", ".join(map(str, image_ids))
