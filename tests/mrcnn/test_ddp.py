"""Two ranks of DDP, one of which has no objects to learn from: nobody hangs, and both end with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from models import batch_of, small_model
from torch.nn.parallel import DistributedDataParallel

STEPS = 2
WITHOUT_POSITIVES: dict[str, tuple[list[list[list[float]]], bool]] = {
    "no objects": ([[]], False),
    "only crowds": ([[[0, 0, 128, 96]]], True),
}


def train_rank(rank: int, folder: str, case: str) -> None:
    """One process: two steps on objects (rank 0) or on what has none (rank 1)."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    model = DistributedDataParallel(small_model().train())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    boxes, crowd = ([[[10, 10, 60, 70]]], False) if rank == 0 else WITHOUT_POSITIVES[case]
    for _ in range(STEPS):
        losses = model(*batch_of(boxes, crowd=crowd))
        optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        optimizer.step()
    assert (losses["loss_mask"] > 0) == (rank == 0)
    torch.save([p.detach() for p in model.parameters()], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("case", WITHOUT_POSITIVES)
def test_a_rank_without_positives_trains_along(case: str, tmp_path: Path) -> None:
    context = mp.start_processes(train_rank, args=(str(tmp_path), case), nprocs=2, join=False, start_method="spawn")
    assert context is not None
    try:
        for _ in range(60):
            if context.join(timeout=2):
                break
        else:
            pytest.fail("the ranks wait for each other")
    finally:
        for process in context.processes:
            process.kill()
    ours, theirs = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert all(p.isfinite().all() for p in ours)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    start = list(small_model().parameters())
    assert not any(torch.equal(a, b) for a, b in zip(ours, start, strict=True) if b.dim() > 1)
