"""How a step's images are shared between ranks, and in how many parts each takes its share."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.order import step_parts


@given(global_batch=st.integers(1, 40), world_size=st.integers(1, 9), images_at_once=st.integers(0, 7))
def test_each_image_once_and_all_ranks_alike(global_batch: int, world_size: int, images_at_once: int) -> None:
    how = {"world_size": world_size, "images_at_once": images_at_once}
    try:
        ranks = [step_parts(global_batch, rank=rank, **how) for rank in range(world_size)]
    except ValueError:
        assert global_batch < world_size or global_batch % world_size
        return
    assert len({len(parts) for parts in ranks}) == 1  # they exchange gradients and counts in each
    assert [place for parts in ranks for part in parts for place in part.places] == list(range(global_batch))
    sizes = [len(part.places) for parts in ranks for part in parts]
    assert min(sizes) >= 1
    assert not images_at_once or max(sizes) <= images_at_once
    for i, parts in enumerate(zip(*ranks, strict=True)):
        images = sum(len(part.places) for part in parts)
        assert {part.weight for part in parts} == {images / global_batch}
        assert all(part.ends_step == (i == len(ranks[0]) - 1) for part in parts)
    shares = [sum(len(part.places) for part in parts) for parts in ranks]
    assert max(shares) - min(shares) <= 1


def test_by_hand() -> None:
    first, second = step_parts(5, rank=0, world_size=2, images_at_once=2)
    assert (first.places, second.places) == (range(2), range(2, 3))
    assert (first.weight, second.weight) == (3 / 5, 2 / 5)
    first, second = step_parts(5, rank=1, world_size=2, images_at_once=2)
    assert (first.places, second.places) == (range(3, 4), range(4, 5))
    assert (first.ends_step, second.ends_step) == (False, True)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"global_batch": 3, "world_size": 4}, "global batch is 3, but must be at least 1 for each of the 4 workers"),
        (
            {"global_batch": 5, "world_size": 2, "images_at_once": 1},
            "the 2 workers get 3 or 2 images: those cannot be taken in 3 parts alike. Give a multiple of 2",
        ),
    ],
)
def test_what_cannot_be_shared(how: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_parts(how.pop("global_batch"), rank=0, **how)
