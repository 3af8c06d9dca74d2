"""Enlarging of images against plain arithmetic and against Pillow."""

from __future__ import annotations

import ctypes
import mmap
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from mrcnn import ops
from mrcnn.ops import reference

SIZES = [  # before and after
    ((48, 68), (80, 113)),
    ((48, 68), (48, 68)),
    ((48, 68), (48, 69)),
    ((48, 68), (49, 68)),
    ((37, 5), (370, 50)),
    ((5, 37), (31, 37)),
    ((1, 1), (1, 1)),
    ((1, 1), (7, 3)),
    ((1, 2), (1, 3)),
    ((2, 1), (5, 1)),
    ((3, 4), (301, 5)),
    ((3, 300), (4, 1333)),
]


def noise(size: tuple[int, int], seed: int) -> torch.Tensor:
    """Levels of which many are the outermost, where a product of 16 bits would first run over."""
    generator = np.random.default_rng(seed)
    pixels = generator.integers(0, 256, (*size, 3), np.uint8)
    return torch.from_numpy(np.where(generator.random(pixels.shape) < 0.3, pixels // 128 * np.uint8(255), pixels))


def enlarged(image: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """In a place of its own between marked bytes: what is written beside it is seen."""
    bytes_ = size[0] * size[1] * 3
    around = torch.full((bytes_ + 128,), 77, dtype=torch.uint8)
    out = around[64 : 64 + bytes_].view(*size, 3)
    assert ops.enlarge_image(image, out) is out
    assert (around[:64] == 77).all()
    assert (around[-64:] == 77).all()
    return out


@pytest.mark.parametrize(("before", "after"), SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_reference(seed: int, before: tuple[int, int], after: tuple[int, int]) -> None:
    image = noise(before, seed)
    assert torch.equal(enlarged(image, after), reference.enlarge_image(image, after))


@pytest.mark.parametrize("seed", range(60))
def test_equals_the_reference_at_any_size(seed: int) -> None:
    generator = np.random.default_rng(seed)
    before = tuple(generator.integers(1, 40, 2).tolist())
    after = tuple(side + int(generator.integers(0, 60)) for side in before)
    image = noise(before, seed)
    assert torch.equal(enlarged(image, after), reference.enlarge_image(image, after))


@pytest.mark.parametrize(("before", "after"), SIZES)
def test_is_pillow_s_but_for_rounding(before: tuple[int, int], after: tuple[int, int]) -> None:
    image = noise(before, 0)
    theirs = np.asarray(Image.fromarray(image.numpy()).resize(after[::-1], Image.Resampling.BILINEAR))
    difference = abs(enlarged(image, after).numpy().astype(int) - theirs)
    assert difference.max() <= 2
    assert difference.mean() <= 0.1


def test_the_same_size_changes_nothing() -> None:
    image = noise((31, 57), 0)
    assert torch.equal(enlarged(image, (31, 57)), image)


@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
@pytest.mark.parametrize("size", [(4, 341), (4, 340), (1, 1), (60, 1)])
def test_reads_no_byte_behind_the_image(size: tuple[int, int]) -> None:
    """An image may end where memory does, as of a mapped file: to read on would end this process."""
    pages = np.frombuffer(mmap.mmap(-1, 2 * mmap.PAGESIZE), np.uint8)
    behind = ctypes.c_void_p(pages.ctypes.data + mmap.PAGESIZE)
    assert ctypes.CDLL(None, use_errno=True).mprotect(behind, mmap.PAGESIZE, 0) == 0
    image = torch.from_numpy(pages[mmap.PAGESIZE - size[0] * size[1] * 3 : mmap.PAGESIZE]).view(*size, 3)
    image.copy_(noise(size, 1))
    assert torch.equal(enlarged(image, (61, 800)), reference.enlarge_image(image, (61, 800)))


def test_wrong_arguments_are_refused() -> None:
    image, out = noise((4, 5), 0), torch.zeros(8, 10, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"image is \(4, 5, 3\) torch.float32"):
        ops.enlarge_image(image.float(), out)
    with pytest.raises(ValueError, match=r"out is \(8, 10\)"):
        ops.enlarge_image(image, out[..., 0])
    with pytest.raises(ValueError, match="strides"):
        ops.enlarge_image(image, out[:, ::2])
    with pytest.raises(ValueError, match="out is 8x4, image 4x5"):
        ops.enlarge_image(image, out.view(20, 4, 3)[:8])
    with pytest.raises(RuntimeError, match="no side of out may be smaller"):
        torch.ops.mrcnn.enlarge_image(out, image)
    with pytest.raises(RuntimeError, match="contiguous"):
        torch.ops.mrcnn.enlarge_image(image, out[:, ::2])


def test_the_operator_is_registered_as_it_behaves() -> None:
    torch.library.opcheck(torch.ops.mrcnn.enlarge_image, (noise((4, 5), 0), torch.zeros(8, 10, 3, dtype=torch.uint8)))
