"""Which images come when, and the randomness of each: functions of (seed, epoch), and of (seed, epoch, image).

The stream of training images is an order of all rows for epoch 0, then one for epoch 1, and so on: every image once in
each epoch. A step takes the next `global_batch` images of it, of which each rank has its contiguous share, perhaps in
several parts; so it depends neither on threads nor, as a whole, on the number of ranks, and goes on from any count of
images. A step may span two epochs: all ranks take as many steps, and no image is dropped or repeated to fill one.

With aspect groups, landscape and portrait images do not share a global batch, which saves padding. Each kind goes on in
the order of the epoch's permutation. What is left of both kinds at the end of an epoch, fewer than two batches, comes
last and mixed; its last batch is filled with the first images of the next epoch's permutation, whatever their kind. So
at most two batches an epoch are mixed.
"""

from __future__ import annotations

import hashlib
import struct
import threading
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Rows = NDArray[np.int32]


def epoch_order(seed: int, epoch: int, n: int) -> Rows:
    """Permutation of n rows for one epoch, from (seed, epoch) alone."""
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([_unsigned(seed), epoch])))
    return generator.permutation(n).astype(np.int32)


def grouped_by_aspect(order: Rows, portrait: NDArray[np.bool_], *, first: int, batch: int) -> Rows:
    """The same rows, such that batches hold landscape images or portrait ones alone, as far as that goes.

    The first `first` rows stay where they are: they fill a batch that the epoch before has begun. A batch has the
    place at which its last row stood. `portrait` is by row number.
    """
    rest = order[first:]
    tall = portrait[rest]
    whole = np.concatenate([_in_batches(np.flatnonzero(tall == kind), batch) for kind in (False, True)])
    whole = whole[np.argsort(whole[:, -1])].ravel()
    left = np.ones(len(rest), bool)
    left[whole] = False
    return np.concatenate([order[:first], rest[whole], rest[left]])


def _in_batches(places: NDArray[np.int64], batch: int) -> NDArray[np.int64]:
    """(batches, batch), those left out that do not fill one."""
    return places[: len(places) // batch * batch].reshape(-1, batch)


@dataclass(frozen=True)
class StepPart:
    """What one rank takes at once of a step."""

    places: range
    """Among the step's images"""
    weight: float
    """Images of all ranks in their parts of this number, as a share of the step's"""
    ends_step: bool


def step_parts(global_batch: int, *, rank: int, world_size: int, images_at_once: int = 0) -> list[StepPart]:
    """A rank's share of each step, in as many parts as every other rank's: of at most `images_at_once`; 0 is no bound.

    Raises ValueError where one of them would be empty.
    """
    if global_batch < world_size:
        raise ValueError(f"global batch is {global_batch}, but must be at least 1 for each of the {world_size} workers")
    shares = _evenly(range(global_batch), world_size)
    count = -(-len(shares[0]) // images_at_once) if images_at_once else 1
    if count > len(shares[-1]):
        raise ValueError(
            f"global batch is {global_batch}, of which the {world_size} workers get {len(shares[0])} or "
            f"{len(shares[-1])} images: those cannot be taken in {count} parts alike. Give a multiple of {world_size}"
        )
    parts = [_evenly(share, count) for share in shares]
    weights = [sum(len(part[i]) for part in parts) / global_batch for i in range(count)]
    return [StepPart(parts[rank][i], weights[i], i == count - 1) for i in range(count)]


def _evenly(places: range, count: int) -> list[range]:
    """Consecutive ranges, the first ones longer by one where it does not come out even."""
    size, longer = divmod(len(places), count)
    starts = [i * size + min(i, longer) for i in range(count + 1)]
    return [places[start:end] for start, end in pairwise(starts)]


class Order:
    """Place in the stream of all epochs -> (epoch, row). Keeps the orders of two epochs; threads may share it."""

    def __init__(
        self, seed: int, rows: int, *, global_batch: int = 1, portrait: NDArray[np.bool_] | None = None
    ) -> None:
        assert portrait is None or len(portrait) == rows
        self.seed, self.rows, self.global_batch = seed, rows, global_batch
        self._portrait = portrait  # for aspect groups; None: without
        self._kept: dict[int, Rows] = {}
        self._lock = threading.Lock()

    def __call__(self, place: int) -> tuple[int, int]:
        epoch, position = divmod(place, self.rows)
        with self._lock:
            if epoch not in self._kept:
                before = {kept: order for kept, order in self._kept.items() if kept == epoch - 1}
                self._kept = before | {epoch: self.of_epoch(epoch)}
            return epoch, int(self._kept[epoch][position])

    def of_epoch(self, epoch: int) -> Rows:
        """Rows of an epoch, in order."""
        order = epoch_order(self.seed, epoch, self.rows)
        if self._portrait is None:
            return order
        begun = -epoch * self.rows % self.global_batch
        return grouped_by_aspect(order, self._portrait, first=begun, batch=self.global_batch)


def image_seed(seed: int, epoch: int, image_id: int, *, purpose: str = "targets") -> int:
    """63 random bits for one purpose on one image in one epoch; the same on every machine."""
    key = struct.pack("<QQQ", _unsigned(seed), epoch, _unsigned(image_id))
    digest = hashlib.blake2b(key, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "little") >> 1


def image_random(seed: int, epoch: int, image_id: int, *, purpose: str) -> float:
    """The same as an even draw from [0, 1)."""
    return (image_seed(seed, epoch, image_id, purpose=purpose) >> 10) / 2**53


def _unsigned(value: int) -> int:
    return value % 2**64
