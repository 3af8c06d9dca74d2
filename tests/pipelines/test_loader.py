"""The loader: every image once an epoch, in an order that the seed alone decides; targets that fit."""

from __future__ import annotations

import pickle
import threading
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch

from mrcnn.config import InputConfig
from mrcnn.structures import Category, RunLengthMasks
from pipelines.augment import Augmentation, network_size, resize_row
from pipelines.build import BuildConfig, build
from pipelines.collate import collate
from pipelines.dataset import Row, ShardDataset
from pipelines.loader import Batch, batches
from pipelines.manifest import Manifest
from pipelines.order import epoch_order, image_seed
from pipelines.rle import bitmap_from_ends, segmentation_ends
from pipelines.storage import open_store


@pytest.fixture(scope="module")
def dataset(toy_shards: str) -> ShardDataset:
    return ShardDataset(toy_shards)


def take(dataset: ShardDataset, steps: int, *, flip: float = 0.5, **how: int) -> list[Batch]:
    stream = batches(dataset, augmentation=Augmentation(flip), **{"seed": 3, "global_batch": 4, **how})  # type: ignore[arg-type]
    try:
        return list(islice(stream, steps))
    finally:
        stream.close()  # type: ignore[attr-defined]


def ids(taken: list[Batch]) -> list[int]:
    return [image_id for batch in taken for image_id in batch.image_ids]


def bitmaps(masks: RunLengthMasks, instance: int, size: tuple[int, int]) -> np.ndarray:
    start, end = masks.offsets[instance], masks.offsets[instance + 1]
    return bitmap_from_ends(masks.ends[start:end].numpy().astype(np.int64), *size)


def test_dataset_is_small_to_pickle_and_checks_its_index(dataset: ShardDataset) -> None:
    dataset.read(0)
    data = pickle.dumps(dataset)
    assert len(data) < 10_000
    copy = pickle.loads(data)
    assert len(copy) == 16
    np.testing.assert_array_equal(copy.read(13).image, dataset.read(13).image)
    for index in (-1, 16):
        with pytest.raises(IndexError):
            dataset.read(index)


def test_same_rows_from_s3(dataset: ShardDataset, toy_config: BuildConfig, s3: str) -> None:
    build(replace(toy_config, out=f"{s3}/loader"))
    remote = ShardDataset(f"{s3}/loader")
    assert remote.manifest == dataset.manifest
    for ours, theirs in zip(take(dataset, 5), take(remote, 5, threads=4), strict=True):
        assert ours.image_ids == theirs.image_ids
        assert torch.equal(ours.images.pixels, theirs.images.pixels)
        assert torch.equal(ours.targets.masks.ends, theirs.targets.masks.ends)
        assert torch.equal(ours.targets.boxes, theirs.targets.boxes)


def test_large_footers_are_read_from_s3(
    dataset: ShardDataset, toy_shards: str, s3: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.shards.TAIL", 16)
    copy = open_store(f"{s3}/footer")
    for name in open_store(toy_shards).list():
        copy.write_bytes(name, open_store(toy_shards).read_bytes(name))
    np.testing.assert_array_equal(ShardDataset(copy.uri).read(6).image, dataset.read(6).image)


@pytest.mark.parametrize("global_batch", [1, 4, 6, 20])
def test_every_image_once_an_epoch(dataset: ShardDataset, global_batch: int) -> None:
    seen = ids(take(dataset, 48 // global_batch + 1, global_batch=global_batch, aspect_groups=False))
    numbers = [dataset.read(i).image_id for i in range(16)]
    for epoch in range(len(seen) // 16):
        assert seen[epoch * 16 : epoch * 16 + 16] == [numbers[i] for i in epoch_order(3, epoch, 16)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_share_the_same_global_batches(dataset: ShardDataset, world_size: int) -> None:
    alone = take(dataset, 10)
    ranks = [take(dataset, 10, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step, batch in enumerate(alone):
        together = [rank[step] for rank in ranks]
        assert ids(together) == list(batch.image_ids)
        assert torch.equal(torch.cat([each.targets.seeds for each in together]), batch.targets.seeds)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_change_nothing(dataset: ShardDataset, threads: int) -> None:
    for ours, theirs in zip(take(dataset, 6), take(dataset, 6, threads=threads, prefetch=1), strict=True):
        assert ours.image_ids == theirs.image_ids
        assert torch.equal(ours.images.pixels, theirs.images.pixels)


def test_seeds_and_flips_come_from_seed_epoch_and_image(dataset: ShardDataset) -> None:
    batch = take(dataset, 5)[4]  # the first of epoch 1
    assert batch.targets.seeds.tolist() == [image_seed(3, 1, each) for each in batch.image_ids]
    flips = [Augmentation(0.5).flips((0, e, i)) for e in range(20) for i in range(100)]
    assert 900 < sum(flips) < 1100


def test_targets_fit_the_pixels(dataset: ShardDataset) -> None:
    rows = [dataset.read(i) for i in range(4)]
    images, targets = collate(rows, seeds=[1, 2, 3, 4], flips=[False] * 4)
    most = max(len(row.instances) for row in rows)
    assert images.pixels.shape[2] % 32 == images.pixels.shape[3] % 32 == 0
    assert targets.boxes.shape == (4, most, 4)
    assert targets.masks.offsets.shape == (4 * most + 1,)
    for b, row in enumerate(rows):
        height, width = images.sizes[b].tolist()
        assert (height, width) == row.image.shape[:2]
        np.testing.assert_array_equal(images.pixels[b, :, :height, :width].permute(1, 2, 0), row.image)
        assert not images.pixels[b, :, height:].any()
        assert not images.pixels[b, :, :, width:].any()
        labels = [each["label"] for each in row.instances]
        assert targets.labels[b].tolist() == labels + [0] * (most - len(labels))
        for n, instance in enumerate(row.instances):
            mask = bitmaps(targets.masks, b * most + n, (height, width))
            expected = bitmap_from_ends(segmentation_ends(instance["segmentation"], height, width), height, width)
            np.testing.assert_array_equal(mask, expected)
            x1, y1, x2, y2 = targets.boxes[b, n].int().tolist()
            assert mask[y1:y2, x1:x2].sum() == mask.sum() == instance["area"]
        for n in range(len(labels), most):
            assert targets.masks.offsets[b * most + n] == targets.masks.offsets[b * most + n + 1]


def test_flip_is_that_of_pixels_boxes_and_masks(dataset: ShardDataset) -> None:
    rows = [dataset.read(i) for i in range(8)]
    plain, plain_targets = collate(rows, seeds=[0] * 8, flips=[False] * 8)
    flipped, flipped_targets = collate(rows, seeds=[0] * 8, flips=[True] * 8)
    most = plain_targets.boxes.shape[1]
    for b, row in enumerate(rows):
        height, width = row.image.shape[:2]
        assert torch.equal(flipped.pixels[b, :, :height, :width], plain.pixels[b, :, :height, :width].flip(2))
        for n in range(len(row.instances)):
            x1, y1, x2, y2 = plain_targets.boxes[b, n].tolist()
            assert flipped_targets.boxes[b, n].tolist() == [width - x2, y1, width - x1, y2]
            before = bitmaps(plain_targets.masks, b * most + n, (height, width))
            after = bitmaps(flipped_targets.masks, b * most + n, (height, width))
            np.testing.assert_array_equal(after, before[:, ::-1])


def test_objects_without_extent_or_mask(dataset: ShardDataset) -> None:
    row = dataset.read(0)
    first = row.instances[0]
    instances = [first | {"box": [5.0, 5.0, 5.0, 9.0]}, first | {"segmentation": None, "iscrowd": True}]
    _, targets = collate([replace(row, instances=instances)], seeds=[7], flips=[True])
    assert targets.labels.tolist() == [[first["label"]]]
    assert targets.iscrowd.tolist() == [[True]]
    assert targets.masks.offsets.tolist() == [0, 0]
    _, nothing = collate([replace(row, instances=[])], seeds=[7], flips=[False])
    assert nothing.boxes.shape == (1, 0, 4)
    assert nothing.masks.offsets.tolist() == [0]


def test_flip_probability_is_obeyed(dataset: ShardDataset) -> None:
    never, always = take(dataset, 1, flip=0.0)[0], take(dataset, 1, flip=1.0)[0]
    b, (height, width) = 0, never.images.sizes[0].tolist()
    assert torch.equal(never.images.pixels[b, :, :height, :width].flip(2), always.images.pixels[b, :, :height, :width])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_pinned_batches_are_the_same(dataset: ShardDataset) -> None:
    for ours, theirs in zip(take(dataset, 5), take(dataset, 5, pin_memory=True), strict=True):
        assert theirs.images.pixels.is_pinned()
        assert theirs.targets.masks.ends.is_pinned()
        assert torch.equal(ours.images.pixels, theirs.images.pixels)


def test_errors_of_threads_reach_the_caller(dataset: ShardDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: ShardDataset, index: int) -> Row:
        raise ValueError(f"row {index} is broken")

    monkeypatch.setattr(ShardDataset, "read", read)
    with pytest.raises(ValueError, match="is broken"):
        take(dataset, 1)


def test_closing_ends_the_threads(dataset: ShardDataset) -> None:
    stream = batches(dataset, seed=0, global_batch=2)
    next(stream)
    assert any(thread.name.startswith("prefetch") for thread in threading.enumerate())
    stream.close()  # type: ignore[attr-defined]
    assert not any(thread.name.startswith("prefetch") for thread in threading.enumerate())


def test_every_worker_needs_an_image(dataset: ShardDataset) -> None:
    with pytest.raises(ValueError, match=r"global batch is 1, .* at least 1 for each of the 2 workers"):
        batches(dataset, seed=0, global_batch=1, world_size=2)


def test_missing_data_set(tmp_path: str) -> None:
    with pytest.raises(FileNotFoundError, match="run `mrcnn build-data`"):
        ShardDataset(f"{tmp_path}/nothing")


FISH = (
    Category(1, "perch", ("left_eye", "mouth", "right_eye")),
    Category(2, "shark", ("mouth",)),
    Category(3, "stone"),
)


def swimmer(label: int, keypoints: list[float] | None, *, iscrowd: bool = False) -> dict:
    box = [1.0, 1.0, 5.0, 5.0]
    return {"label": label, "box": box, "iscrowd": iscrowd, "segmentation": None, "keypoints": keypoints, "area": 16.0}


def aquarium(*instances: dict) -> Row:
    return Row(1, "1.jpg", np.zeros((8, 10, 3), np.uint8), (8, 10), list(instances))


def test_keypoints_are_padded_to_the_most_of_any_category() -> None:
    first = aquarium(
        swimmer(1, [2, 3, 2, 9, 7, 1, 5, 6, 0]),  # the last is not annotated, whatever is written there
        swimmer(2, [4, 5, 2]),
        swimmer(3, None),
        swimmer(1, [1, 1, 2, 1, 1, 2, 1, 1, 2], iscrowd=True),
        swimmer(2, None),
    )
    _, targets = collate([first, aquarium()], seeds=[0, 0], flips=[False] * 2, categories=FISH)
    assert targets.keypoints is not None
    assert targets.keypoints.dtype == torch.float32
    assert targets.keypoints.shape == (2, 5, 3, 3)
    assert targets.keypoints[0, 0].tolist() == [[2, 3, 2], [9, 7, 1], [0, 0, 0]]
    assert targets.keypoints[0, 1].tolist() == [[4, 5, 2], [0, 0, 0], [0, 0, 0]]
    assert not targets.keypoints[0, 2:].any()
    assert not targets.keypoints[1].any()
    _, without = collate([first], seeds=[0], flips=[True])
    assert without.keypoints is None
    _, nothing = collate([aquarium()], seeds=[0], flips=[True], categories=FISH)
    assert nothing.keypoints is not None
    assert nothing.keypoints.shape == (1, 0, 3, 3)


def test_mirrored_keypoints_change_sides() -> None:
    row = aquarium(swimmer(1, [2, 3, 2, 9, 7, 1, 0, 0, 0]), swimmer(2, [4, 5, 2]))
    _, targets = collate([row], seeds=[0], flips=[True], categories=FISH)
    assert targets.keypoints is not None
    assert targets.keypoints[0, 0].tolist() == [[0, 0, 0], [0, 7, 1], [7, 3, 2]]
    assert targets.keypoints[0, 1].tolist() == [[5, 5, 2], [0, 0, 0], [0, 0, 0]]


def test_the_pixel_of_a_keypoint_stays_under_it_when_mirrored() -> None:
    row = aquarium(swimmer(2, [4, 5, 2]))
    row.image[5, 4] = 255
    images, targets = collate([row], seeds=[0], flips=[True], categories=FISH)
    assert targets.keypoints is not None
    x, y, _ = targets.keypoints[0, 0, 0].int().tolist()
    assert images.pixels[0, 0, y, x] == 255


def test_keypoints_of_toy_data_from_the_file_to_the_batch(ray_cluster: None, tmp_path: str) -> None:
    from pipelines.toy import KEYPOINTS, make_toy_data

    toy = make_toy_data(f"{tmp_path}/toy", images=3, seed=1, size=64, keypoints=True)
    config = BuildConfig(
        images=toy.images_uri, annotations=toy.annotations_uri, out=f"{tmp_path}/shards",
        shorter_side=32, longer_side=64,
    )  # fmt: skip
    build(config)
    dataset = ShardDataset(config.out)
    assert {category.keypoints for category in dataset.categories} == {KEYPOINTS}
    (batch,) = take(dataset, 1, global_batch=3, flip=1.0)
    assert batch.targets.keypoints is not None
    found = batch.targets.keypoints[batch.targets.labels > 0]
    assert found.shape[1:] == (3, 3)
    left, right = found[:, 0], found[:, 1]
    seen = (left[:, 2] > 0) & (right[:, 2] > 0)
    assert seen.any()
    assert (left[seen, 0] < right[seen, 0]).all(), "the left end is at the left in a mirrored image, too"


def test_manifests_keep_keypoint_names_and_digests_of_those_without(dataset: ShardDataset) -> None:
    plain = dataset.manifest
    assert "keypoints" not in plain._content()["categories"][0]
    named = replace(plain, categories=FISH)
    assert named.digest != plain.digest
    assert [set(each) - {"label"} for each in named._content()["categories"]] == [
        set(asdict(FISH[0])),
        set(asdict(FISH[0])),
        {"id", "name"},
    ]
    assert Manifest._parse({"digest": named.digest, **named._content()}, "x").categories == FISH


def test_torchvisions_resizing_gives_floating_point_pixels(dataset: ShardDataset) -> None:
    row = dataset.read(0)
    height, width = row.image.shape[:2]
    asked = InputConfig(shorter_side=61, longer_side=1000, resize="bilinear")
    resized = resize_row(row, network_size(row, asked), asked.resize)
    assert resized.image.dtype == np.float32
    images, _ = collate([resized], seeds=[0], flips=[True])
    assert images.pixels.dtype == torch.float32
    assert min(resized.image.shape[:2]) == 61
    assert max(resized.image.shape[:2]) == int(max(height, width) * 61 / min(height, width))
