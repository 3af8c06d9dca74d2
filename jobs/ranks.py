"""What the ranks of a training tell each other, beside gradients. With one rank nothing is sent."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from jobs.evaluate import JudgedRow


def mean_over_ranks(values: Tensor, world_size: int, device: torch.device) -> Tensor:
    """The same numbers on every rank, on the host."""
    if world_size == 1:
        return values
    sums = values.to(device)
    dist.all_reduce(sums)
    return sums.cpu() / world_size


def all_image_ids(own: list[list[int]], world_size: int) -> list[list[int]]:
    """Image ids of all ranks for each of some steps, from every rank's own."""
    if world_size == 1:
        return own
    everyones: list[Any] = [None] * world_size
    dist.all_gather_object(everyones, own)
    return [[image_id for of_rank in step for image_id in of_rank] for step in zip(*everyones, strict=True)]


def same_on_all_ranks(number: int, world_size: int, device: torch.device) -> int:
    """Rank 0's number."""
    if world_size == 1:
        return number
    shared = torch.tensor(number, device=device)
    dist.broadcast(shared, src=0)
    return int(shared)


def list_of_rank_0(numbers: list[int], world_size: int) -> list[int]:
    """Rank 0's numbers."""
    if world_size == 1:
        return numbers
    shared: list[Any] = [numbers]
    dist.broadcast_object_list(shared, src=0)
    found: list[int] = shared[0]
    return found


def gather(rows: list[JudgedRow], rank: int, world_size: int) -> list[JudgedRow]:
    """All ranks' rows on rank 0; elsewhere an empty list."""
    if world_size == 1:
        return rows
    everyone: list[Any] | None = [None] * world_size if rank == 0 else None
    dist.gather_object(rows, everyone)
    return [row for part in everyone or [] for row in part]
