"""Jitter, windows and the bound on objects: from (seed, epoch, image id) alone, and right for masks and boxes."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_shards import instance, make_shards, row
from pycocotools import mask as coco_mask

from jobs.config import TrainConfig
from jobs.presets import PRESETS
from jobs.stream import augmentation_of
from mrcnn.config import InputConfig
from pipelines.augment import Augmentation, crop_row, random_window, resize_row, with_fewer_objects
from pipelines.dataset import Row, ShardDataset
from pipelines.loader import Batch, batches
from pipelines.rle import Window, bitmap_from_ends, segmentation_ends

SIDES = (48, 56, 64, 72)
USUAL = InputConfig(shorter_side=64, longer_side=96)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ShardDataset:
    """Sixteen images of 72 x 90, and four turned ones, with an object or two."""
    sizes = [(72, 90)] * 16 + [(90, 72)] * 4
    rows = [row(i, size, [instance([4, 6, 50, 60]), instance([30, 2, 60, 70])]) for i, size in enumerate(sizes)]
    return ShardDataset(make_shards(tmp_path_factory.mktemp("made"), rows))


def take(dataset: ShardDataset, augmentation: Augmentation, steps: int, **how: Any) -> list[Batch]:
    how = {"seed": 3, "global_batch": 1, "network_input": USUAL, **how}
    stream = batches(dataset, augmentation=augmentation, **how)
    try:
        return list(islice(stream, steps))
    finally:
        stream.close()  # type: ignore[attr-defined]


def sizes(taken: list[Batch]) -> dict[int, tuple[int, ...]]:
    return {
        image_id: tuple(batch.images.sizes[b].tolist()) for batch in taken for b, image_id in enumerate(batch.image_ids)
    }


def test_sides_are_drawn_for_each_image_in_each_epoch(dataset: ShardDataset) -> None:
    jitter = Augmentation(jitter_sides=SIDES)
    taken = take(dataset, jitter, 40)
    first, second = sizes(taken[:20]), sizes(taken[20:])
    assert {min(size) for size in first.values()} == set(SIDES)
    assert first != second
    for size in first.values():
        assert max(size) == pytest.approx(min(size) * 90 / 72, abs=1)


@pytest.mark.parametrize(
    "how", [Augmentation(0.5, SIDES), Augmentation(0.5, (), (0.3, 2.0)), Augmentation(0.5, (), (), 1)]
)
def test_neither_batches_nor_ranks_nor_threads_change_an_image(dataset: ShardDataset, how: Augmentation) -> None:
    alone = {batch.image_ids[0]: batch for batch in take(dataset, how, 20)}
    together = take(dataset, how, 2, global_batch=12, rank=1, world_size=3, threads=3)
    assert len(together) == 2
    for batch in together:
        for b, image_id in enumerate(batch.image_ids):
            one = alone[image_id]
            height, width = one.images.sizes[0].tolist()
            assert batch.images.sizes[b].tolist() == [height, width]
            assert torch.equal(batch.images.pixels[b, :, :height, :width], one.images.pixels[0, :, :height, :width])
            objects = one.targets.boxes.shape[1]
            assert torch.equal(batch.targets.boxes[b, :objects], one.targets.boxes[0])


def test_the_longer_side_stays_bounded(dataset: ShardDataset) -> None:
    bounded = InputConfig(shorter_side=64, longer_side=72)
    for size in sizes(take(dataset, Augmentation(jitter_sides=SIDES[:3]), 20, network_input=bounded)).values():
        assert max(size) <= 72


def test_large_jitter_gives_sizes_between_its_factors_and_never_more_than_usual(dataset: ShardDataset) -> None:
    taken = sizes(take(dataset, Augmentation(large_jitter=(0.25, 2.0)), 200))
    assert all(max(size) <= 80 and min(size) <= 64 for size in taken.values())
    assert all(min(size) >= 16 for size in taken.values())
    assert len(set(taken.values())) > 5
    (same,) = set(map(sorted_tuple, sizes(take(dataset, Augmentation(large_jitter=(1.0, 1.0)), 20)).values()))
    assert same == (64, 80)


def sorted_tuple(size: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(size))


def test_windows_reach_every_edge() -> None:
    windows = [random_window((50, 80), (40, 100), (0, e, 1)) for e in range(200)]
    assert {window.y for window in windows} == set(range(11))
    assert {window.x for window in windows} == {0}
    assert {(window.height, window.width) for window in windows} == {(40, 80)}


def bitmap(each: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    return bitmap_from_ends(segmentation_ends(each["segmentation"], *size), *size)


def picture() -> Row:
    """Polygons that lie wholly inside, across the edge and outside of WINDOW, run lengths, and two keypoints."""
    star = [20, 5, 26, 30, 44, 24, 30, 36, 40, 58, 20, 44, 2, 56, 10, 34, 1, 20, 14, 28]
    ring = np.zeros((60, 50), np.uint8)
    ring[10:50, 5:45] = 1
    ring[20:40, 15:35] = 0
    counts = coco_mask.encode(np.asfortranarray(ring))["counts"].decode()
    polygon = {**instance([1, 5, 44, 58]), "segmentation": {"polygons": [star], "rle": None}}
    runs = {
        **instance([5, 10, 45, 50]),
        "segmentation": {"polygons": None, "rle": {"size": [60, 50], "counts": counts}},
    }
    outside = instance([0, 0, 9, 11])
    pointed = {**instance([10, 12, 40, 40]), "keypoints": [15.0, 20.0, 2.0, 5.0, 20.0, 1.0, 0.0, 0.0, 0.0]}
    image = np.random.default_rng(0).integers(0, 256, (60, 50, 3), np.uint8)
    boxless = {**instance([12, 14, 20, 20], iscrowd=True), "segmentation": None}
    return Row(1, "1.png", image, (60, 50), [polygon, runs, outside, pointed, boxless])


WINDOW = Window(y=12, x=10, height=40, width=32)


def test_a_window_shows_the_same_pixels_and_masks() -> None:
    whole = picture()
    cropped = crop_row(whole, WINDOW)
    np.testing.assert_array_equal(cropped.image, whole.image[12:52, 10:42])
    kept = [whole.instances[i] for i in (0, 1, 3, 4)]
    assert len(cropped.instances) == len(kept), "what lies outside goes"
    for before, after in zip(kept[:3], cropped.instances[:3], strict=True):
        expected = bitmap(before, (60, 50))[12:52, 10:42]
        found = bitmap(after, (40, 32))
        np.testing.assert_array_equal(found, expected)
        ys, xs = np.nonzero(found)
        assert after["box"] == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    assert cropped.instances[2]["keypoints"] == [5.0, 8.0, 2.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    assert cropped.instances[3] == {**kept[3], "box": [2.0, 2.0, 10.0, 8.0]}, "without a mask, the box alone"


def test_an_object_whose_box_is_seen_but_not_its_mask_goes() -> None:
    whole = picture()
    ring = whole.instances[1]
    assert crop_row(replace(whole, instances=[ring]), Window(22, 17, 10, 10)).instances == []


def test_a_window_of_the_whole_is_the_row_itself() -> None:
    whole = picture()
    assert crop_row(whole, Window(0, 0, 60, 50)) is whole


def test_jittered_masks_lie_on_their_pixels(dataset: ShardDataset) -> None:
    """The object is painted white before: after resizing and cutting, the white is the mask."""
    stored = dataset.read(0)
    image = np.zeros_like(stored.image)
    image[6:60, 4:50] = 255
    painted = replace(stored, image=image, instances=stored.instances[:1])
    for epoch in range(20):
        key = (0, epoch, 0)
        found = Augmentation(large_jitter=(0.4, 2.0))(painted, key, USUAL)
        white = found.image[..., 0] >= 128
        mask = bitmap(found.instances[0], found.size).astype(bool) if found.instances else np.zeros_like(white)
        assert (white & mask).sum() >= 0.9 * (white | mask).sum()


def crowd(count: int, size: int = 64) -> list[dict[str, Any]]:
    chance = np.random.default_rng(0)
    corners = chance.integers(0, size - 8, (count, 2)).tolist()
    return [instance([x, y, x + 8, y + 8]) for x, y in corners]


def test_objects_are_bounded_and_drawn_anew_in_each_epoch() -> None:
    whole = Row(1, "1.png", np.zeros((64, 64, 3), np.uint8), (64, 64), [{"n": i, "iscrowd": False} for i in range(500)])
    seen: set[int] = set()
    for epoch in range(20):
        kept = [each["n"] for each in with_fewer_objects(whole, (0, epoch, 1), 100).instances]
        assert len(kept) == 100
        assert kept == sorted(kept)
        assert kept == [each["n"] for each in with_fewer_objects(whole, (0, epoch, 1), 100).instances]
        seen |= set(kept)
    assert len(seen) > 480
    assert with_fewer_objects(whole, (0, 0, 1), 500) is whole
    assert with_fewer_objects(whole, (0, 0, 1), 0) is whole


def test_crowd_regions_stay_beside_fewer_objects() -> None:
    """What lies in them would be background."""
    crowds = {3, 400, 450}
    objects = [{"n": i, "iscrowd": i in crowds} for i in range(500)]
    whole = Row(1, "1.png", np.zeros((64, 64, 3), np.uint8), (64, 64), objects)
    for epoch in range(20):
        kept = [each["n"] for each in with_fewer_objects(whole, (0, epoch, 1), 100).instances]
        assert kept == sorted(kept)
        assert len(kept) == 103
        assert crowds < set(kept)
    regions = Row(1, "1.png", whole.image, (64, 64), [{"n": i, "iscrowd": True} for i in range(500)])
    assert len(with_fewer_objects(regions, (0, 0, 1), 100).instances) == 100


def test_a_crowd_of_thousands_takes_no_more_than_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (
        ShardDataset(make_shards(tmp_path / "few", [row(1, (64, 64), crowd(256))])),
        ShardDataset(make_shards(tmp_path / "many", [row(1, (64, 64), crowd(5000))])),
    )
    bound = augmentation_of(TrainConfig())
    assert bound.max_objects == 256
    (small,), (large,) = take(few, bound, 1), take(many, bound, 1)
    assert large.targets.labels.shape == small.targets.labels.shape == (1, 256)
    assert (large.targets.labels > 0).all()
    ends = [len(each.targets.masks.ends) for each in (small, large)]
    assert ends[1] < 1.2 * ends[0]

    scaled: list[Any] = []
    monkeypatch.setattr("pipelines.augment.scale_instances", lambda these, _: scaled.extend(these) or these)
    bound(many.read(0), (0, 0, 1), InputConfig(shorter_side=32, longer_side=64))
    assert len(scaled) == 256  # the others are not even scaled


def test_by_default_nothing_is_changed(dataset: ShardDataset) -> None:
    stored = dataset.read(3)
    assert Augmentation()(stored, (0, 0, 3), None) is stored
    resized = resize_row(stored, stored.size, "antialias")
    assert resized.image is stored.image
    assert resized.instances == stored.instances


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"jitter_sides": (800, 1400)}, r"jitter_sides is \(800, 1400\), but must be positive and at most model.input"),
        ({"jitter_sides": (0,)}, "jitter_sides is"),
        ({"large_jitter": (0.5,)}, r"large_jitter is \(0.5,\), but must be two factors"),
        ({"large_jitter": (2.0, 0.1)}, "two factors, the smaller one first"),
        ({"large_jitter": (0.0, 1.0)}, "more than 0"),
        ({"large_jitter": (0.1, 2.0), "jitter_sides": (640,)}, "empty with jitter_sides: choose one of them"),
        ({"large_jitter": (0.1, 2.0), "rpn": "separate"}, "empty with rpn=separate: stored proposals"),
        ({"max_objects": -1}, "max_objects is -1, but must be at least 0"),
    ],
)
def test_nonsense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)


@pytest.mark.parametrize("name", ["keypoint_rcnn_r50_fpn", "keypoint_mask_rcnn_r50_fpn"])
def test_keypoints_train_at_the_papers_sizes(name: str) -> None:
    """Shorter side from 640 to 800 in training, 800 at test."""
    assert PRESETS[name].jitter_sides == (640, 672, 704, 736, 768, 800)
    assert PRESETS[name].model.input.shorter_side == 800
    assert PRESETS["r50_fpn"].jitter_sides == ()


def test_all_settings_of_training_reach_the_loader() -> None:
    config = TrainConfig(flip=0.25, jitter_sides=(640, 800), max_objects=7)
    assert augmentation_of(config) == Augmentation(0.25, (640, 800), (), 7)
    assert augmentation_of(TrainConfig(large_jitter=(0.1, 2.0))).large_jitter == (0.1, 2.0)
