"""The order of images: a function of (seed, epoch), every image once an epoch, aspect ratios apart, resumable."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_shards import make_shards, row

from pipelines.dataset import ShardDataset
from pipelines.loader import batches
from pipelines.order import Order, epoch_order, image_random, image_seed


def portraits(rows: int, share: float) -> np.ndarray:
    return np.random.default_rng(0).random(rows) < share


def stream(order: Order, places: range) -> list[tuple[int, int]]:
    return [order(place) for place in places]


def test_epoch_order_is_a_permutation_of_its_own() -> None:
    first, second = epoch_order(1, 0, 50), epoch_order(1, 1, 50)
    assert sorted(first) == list(range(50))
    assert (first != second).any()
    assert (first != epoch_order(2, 0, 50)).any()
    np.testing.assert_array_equal(first, epoch_order(1, 0, 50))


SETS = st.tuples(st.integers(1, 60), st.integers(1, 9), st.sampled_from([0.0, 0.2, 0.5, 1.0]), st.booleans())


def order_of(rows: int, batch: int, share: float, groups: bool) -> Order:
    return Order(7, rows, global_batch=batch, portrait=portraits(rows, share) if groups else None)


@given(SETS)
def test_every_row_once_in_each_epoch(made: tuple[int, int, float, bool]) -> None:
    rows = made[0]
    seen = stream(order_of(*made), range(3 * rows))
    for epoch in range(3):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == [(epoch, i) for i in range(rows)]


@given(st.integers(1, 400), st.integers(1, 16), st.floats(0, 1), st.integers(0, 3))
def test_at_most_two_batches_an_epoch_are_mixed(rows: int, batch: int, share: float, seed: int) -> None:
    portrait = portraits(rows, share)
    order = Order(seed, rows, global_batch=batch, portrait=portrait)
    places = np.array([order(place)[1] for place in range(4 * rows // batch * batch)], int).reshape(-1, batch)
    of_batch = portrait[places].mean(axis=1)
    mixed = np.flatnonzero((of_batch > 0) & (of_batch < 1))
    first, last = mixed * batch // rows, (mixed * batch + batch - 1) // rows
    assert np.bincount(first[first == last]).max(initial=0) <= 1, "apart from the one that spans two epochs"


def test_each_kind_goes_on_in_the_order_of_the_permutation() -> None:
    portrait = portraits(64, 0.4)
    order = Order(3, 64, global_batch=4, portrait=portrait)
    plain, grouped = epoch_order(3, 0, 64), order.of_epoch(0)
    assert (plain != grouped).any()
    for kind in (False, True):
        whole = (portrait == kind).sum() // 4 * 4
        np.testing.assert_array_equal(
            plain[portrait[plain] == kind][:whole], grouped[portrait[grouped] == kind][:whole]
        )


def test_all_of_one_kind_are_in_the_plain_order() -> None:
    order = Order(3, 50, global_batch=4, portrait=np.zeros(50, bool))
    for epoch in range(3):
        np.testing.assert_array_equal(order.of_epoch(epoch), epoch_order(3, epoch, 50))


def test_seeds_and_draws() -> None:
    assert len({image_seed(s, e, i) for s in range(4) for e in range(4) for i in range(-4, 4)}) == 128
    draws = [image_random(0, e, i, purpose="flip") for e in range(20) for i in range(100)]
    assert 0 <= min(draws) < 0.01
    assert 0.99 < max(draws) < 1
    assert np.mean(draws) == pytest.approx(0.5, abs=0.02)
    assert image_random(0, 0, 0, purpose="side") != image_random(0, 0, 0, purpose="flip")


@pytest.fixture(scope="module")
def wide_and_tall(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Twelve landscape images, nine portrait ones, one square."""
    sizes = [(24, 40)] * 12 + [(40, 24)] * 9 + [(30, 30)]
    rows = [row(100 + i, size) for i, size in enumerate(sizes)]
    return ShardDataset(make_shards(tmp_path_factory.mktemp("made"), rows))


@pytest.fixture(scope="module")
def made(wide_and_tall: ShardDataset, tmp_path_factory: pytest.TempPathFactory) -> list[ShardDataset]:
    """Data sets of 22, 5 and 1 images."""
    few = [row(i, (16, 16 + 8 * (i % 3 - 1))) for i in range(5)]
    folders = [make_shards(tmp_path_factory.mktemp("few"), few[:count], rows_per_shard=3) for count in (5, 1)]
    return [wide_and_tall, *map(ShardDataset, folders)]


def test_the_manifest_says_which_are_portrait(wide_and_tall: ShardDataset) -> None:
    read = [wide_and_tall.read(i).size for i in range(22)]
    assert wide_and_tall.portrait().tolist() == [height > width for height, width in read]
    assert wide_and_tall.portrait().sum() == 9


def image_ids(dataset: ShardDataset, *, ranks: int, steps: int, **how: Any) -> list[int]:
    """What all ranks together are given, in the order of steps and ranks."""
    streams = [batches(dataset, rank=rank, world_size=ranks, threads=1, **how) for rank in range(ranks)]
    try:
        of_ranks = [list(islice(stream, steps)) for stream in streams]
    finally:
        for stream in streams:
            stream.close()  # type: ignore[attr-defined]
    return [image_id for step in zip(*of_ranks, strict=True) for batch in step for image_id in batch.image_ids]


@settings(max_examples=60, deadline=None)
@given(
    number=st.integers(0, 2),
    share=st.integers(1, 3),
    ranks=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    steps=st.integers(0, 8),
    stray=st.integers(0, 5),
    groups=st.booleans(),
)
def test_resumed_on_other_ranks_sees_exactly_the_images_that_were_not_seen(
    made: list[ShardDataset], number: int, share: int, ranks: tuple[int, int], steps: int, stray: int, groups: bool
) -> None:
    """After any number of steps, or even of images, with any numbers of ranks before and after."""
    dataset = made[number]
    how: dict[str, Any] = {"seed": 5, "global_batch": share * ranks[0] * ranks[1], "aspect_groups": groups}
    global_batch = how["global_batch"]
    before = image_ids(dataset, ranks=ranks[0], steps=steps, start_images=stray, **how)
    consumed = stray + steps * global_batch
    more = -(-(2 * len(dataset)) // global_batch)
    after = image_ids(dataset, ranks=ranks[1], steps=more, start_images=consumed, **how)
    whole = image_ids(dataset, ranks=1, steps=-(-(consumed + more * global_batch) // global_batch), **how)
    assert before + after == whole[stray : consumed + more * global_batch]
    everything = sorted(set(whole))
    assert len(everything) == len(dataset)
    for start in range(0, len(whole) - len(dataset) + 1, len(dataset)):
        assert sorted(whole[start : start + len(dataset)]) == everything


def test_the_digest_covers_which_are_portrait(wide_and_tall: ShardDataset) -> None:
    manifest = wide_and_tall.manifest
    shards = (replace(manifest.shards[0], portrait="ff"), *manifest.shards[1:])
    assert replace(manifest, shards=shards).digest != manifest.digest


def test_the_order_takes_four_bytes_a_row_for_each_of_two_epochs() -> None:
    order = Order(0, 1_000_000, global_batch=16, portrait=portraits(1_000_000, 0.3))
    order(999_999)
    order(1_000_000)
    assert sum(each.nbytes for each in order._kept.values()) == 8_000_000
    order(2_000_000)
    assert len(order._kept) == 2
