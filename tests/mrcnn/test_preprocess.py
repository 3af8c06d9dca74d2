"""Sizes as detectron2's, resampling as Pillow's, padding that the network cannot see."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from mrcnn.config import InputConfig
from mrcnn.preprocess import Normalize, batch_images, network_images, resize_image, resized_size

ORACLE = Path(os.environ.get("MRCNN_ORACLE", Path(__file__).parents[3] / "shared/oracle"))


@pytest.fixture
def picture() -> np.ndarray:
    """Smooth colours with some edges, 90 x 60."""
    y, x = np.mgrid[:60, :90]
    return np.stack([x * 2.5, y * 4, (x // 15 + y // 15) % 2 * 200 + 20], axis=2).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((480, 640), (800, 1067)),
        ((640, 480), (1067, 800)),
        ((400, 1000), (533, 1333)),
        ((800, 800), (800, 800)),
        ((1, 10_000), (1, 1333)),
    ],
)
def test_resized_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    assert resized_size(*size, shorter_side=800, longer_side=1333) == expected


def check_against_pillow(image: np.ndarray, size: tuple[int, int]) -> None:
    theirs = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    difference = abs(resize_image(image, *size).astype(int) - np.asarray(theirs))
    assert difference.mean() <= 1
    assert difference.max() <= 3


@pytest.mark.parametrize("size", [(30, 45), (17, 80), (120, 40), (60, 90), (200, 301), (61, 90)])
def test_resizes_as_pillow(picture: np.ndarray, size: tuple[int, int]) -> None:
    noise = np.random.default_rng(0).integers(0, 40, (60, 90, 3))
    check_against_pillow((picture * 0.8 + noise).astype(np.uint8), size)


@pytest.mark.parametrize("size", [(30, 45), (17, 80), (120, 40), (60, 90), (200, 301)])
def test_pillow_is_pillow_to_the_byte(picture: np.ndarray, size: tuple[int, int]) -> None:
    theirs = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BILINEAR)
    assert np.array_equal(resize_image(picture, *size, "pillow"), np.asarray(theirs))


@pytest.mark.coco100
@pytest.mark.parametrize("shorter", [160, 800])
def test_resizes_real_images_as_pillow(coco100: Path, shorter: int) -> None:
    for path in sorted((coco100 / "val2017").glob("*.jpg"))[::5]:
        image = np.asarray(Image.open(path).convert("RGB"))
        check_against_pillow(image, resized_size(*image.shape[:2], shorter_side=shorter, longer_side=1333))


def test_padding_is_zero_after_normalising(picture: np.ndarray) -> None:
    batch = batch_images([picture, picture[:40, :50]])
    assert batch.pixels.shape == (2, 3, 64, 96)
    assert batch.sizes.tolist() == [[60, 90], [40, 50]]
    mean, std = (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    pixels = Normalize(InputConfig(mean=mean, std=std))(batch)
    expected = (torch.from_numpy(picture[:40, :50].astype(np.float32)) - torch.tensor(mean)) / torch.tensor(std)
    torch.testing.assert_close(pixels[1, :, :40, :50], expected.permute(2, 0, 1))
    assert pixels[1, :, 40:].abs().sum() == pixels[1, :, :, 50:].abs().sum() == 0


def test_bgr_is_what_the_network_sees_of_rgb_images(picture: np.ndarray) -> None:
    batch, mean, std = batch_images([picture]), (100.0, 110.0, 120.0), (50.0, 60.0, 70.0)
    rgb = Normalize(InputConfig(mean=mean, std=std))(batch)
    bgr = Normalize(InputConfig(mean=mean[::-1], std=std[::-1], channels="bgr"))(batch)
    assert torch.equal(bgr, rgb.flip(1))


@pytest.mark.parametrize("size", [(60, 90), (30, 45), (61, 47), (128, 200)])
def test_bilinear_is_torchvisions_transform(picture: np.ndarray, size: tuple[int, int]) -> None:
    image = picture[: size[0], : size[1]]
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    transform = GeneralizedRCNNTransform(64, 100, list(mean), list(std))
    theirs, _ = transform([torch.from_numpy(image).permute(2, 0, 1) / 255])
    config = InputConfig(
        shorter_side=64,
        longer_side=100,
        resize="bilinear",
        mean=tuple(255 * x for x in mean),
        std=tuple(255 * x for x in std),
    )
    ours = network_images([image], config)
    assert [tuple(size) for size in ours.sizes.tolist()] == theirs.image_sizes
    torch.testing.assert_close(Normalize(config)(ours), theirs.tensors, atol=2e-5, rtol=0)


@pytest.mark.skipif(not (ORACLE / "resize_shapes.json").exists(), reason=f"no oracle at {ORACLE}: set MRCNN_ORACLE")
def test_sizes_are_the_peers() -> None:
    for row in json.loads((ORACLE / "resize_shapes.json").read_text())["table"]:
        assert list(resized_size(*row["hw"], shorter_side=800, longer_side=1333)) == row["detectron2"], row
        bilinear = resized_size(*row["hw"], shorter_side=800, longer_side=1333, resize="bilinear")
        assert list(bilinear) == row["torchvision"], row
