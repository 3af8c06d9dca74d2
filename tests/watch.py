"""Sees on the CPU what would make a training step wait for a GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# what needs a value on the host: a number, or how many elements fulfil a condition
WAITING = {"_local_scalar_dense", "item", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


class Watched(TorchDispatchMode):
    """Notes every operator that would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        by_mask = name.startswith("index") and any(x.dtype == torch.bool for x in tensors[1:])
        devices = {x.device.type for x in [*tensors, *tree_leaves(result)] if isinstance(x, Tensor)}
        if name in WAITING or by_mask or len(devices) > 1:
            self.waits.append(f"{name} on {sorted(devices)}")
        return result
