"""Refusals of bad input: a ValueError that names the argument, the value and the remedy.

Types and shapes are checked everywhere. Values are checked where the tensors are on the CPU: on a GPU, looking at them
would make every training step wait. So whoever makes batches for a GPU checks them before they go there, as the loader
of the shards does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mrcnn.structures import ImageBatch, Targets


def check_image(image: np.ndarray, name: str) -> None:
    """Raise ValueError unless image is (H, W, 3) uint8 with pixels in it."""
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8:
        kind = image.dtype if isinstance(image, np.ndarray) else type(image).__name__
        raise ValueError(f"{name} is {kind}, but must be a uint8 array: give RGB values of 0..255")
    if image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise ValueError(f"{name} has shape {image.shape}, but must be (height, width, 3): give an RGB image")


def check_images(images: ImageBatch) -> None:
    """Raise ValueError unless the batch is as `ImageBatch` says."""
    pixels, sizes = images.pixels, images.sizes
    _check(pixels.dim() == 4 and pixels.shape[1] == 3, "images.pixels", _shape(pixels), "(B, 3, H, W)", "give RGB")
    _check_dtype("images.pixels", pixels, torch.uint8, torch.float32, torch.float64)
    _check(tuple(sizes.shape) == (len(pixels), 2), "images.sizes", _shape(sizes), f"({len(pixels)}, 2)", "one an image")
    _check_dtype("images.sizes", sizes, torch.int64)
    if readable(sizes):
        low, high = sizes.numpy().min(initial=1), (sizes.numpy() > tuple(pixels.shape[2:])).any()
        bound = f"1 to {tuple(pixels.shape[2:])}, the padded height and width"
        _check(low >= 1 and not high, "images.sizes", sizes.tolist(), bound, "give sizes before padding")


def check_sizes(name: str, sizes: Sequence[Sequence[int]], count: int) -> None:
    """Raise ValueError unless there is a (height, width) of at least 1 for each of `count` images."""
    _check(len(sizes) == count, name, f"{len(sizes)} entries", f"{count}", "give one for each image")
    for i, size in enumerate(sizes):
        good = len(size) == 2 and min(size) >= 1
        _check(good, f"{name}[{i}]", tuple(size), "(height, width) of at least 1", "give it in pixels")


def check_proposals(boxes: Tensor, scores: Tensor, valid: Tensor, images: ImageBatch) -> None:
    """Raise ValueError unless proposals are as `Proposals` says and fit the images."""
    B, P = len(images.pixels), boxes.shape[1] if boxes.dim() == 3 else -1
    for name, tensor, shape in (("boxes", boxes, (B, P, 4)), ("scores", scores, (B, P)), ("valid", valid, (B, P))):
        _check(tuple(tensor.shape) == shape, f"proposals.{name}", _shape(tensor), f"{shape}", "pad to P proposals")
    _check_dtype("proposals.valid", valid, torch.bool)
    if readable(boxes):
        finite = bool(np.isfinite(boxes.detach().numpy()).all())
        _check(finite, "proposals.boxes", "not finite", "finite numbers", "give zeros in the padding")


def check_targets(targets: Targets, images: ImageBatch, *, num_classes: int, num_keypoints: int) -> None:
    """Raise ValueError unless targets are as `Targets` says and fit the images and the model."""
    B, N = len(images.pixels), targets.boxes.shape[1] if targets.boxes.dim() == 3 else -1
    shapes: dict[str, tuple[Tensor, tuple[int, ...], torch.dtype]] = {
        "targets.boxes": (targets.boxes, (B, N, 4), torch.float32),
        "targets.labels": (targets.labels, (B, N), torch.int64),
        "targets.iscrowd": (targets.iscrowd, (B, N), torch.bool),
        "targets.masks.offsets": (targets.masks.offsets, (B * N + 1,), torch.int64),
        "targets.seeds": (targets.seeds, (B,), torch.int64),
    }
    if targets.keypoints is not None and num_keypoints:
        shapes["targets.keypoints"] = (targets.keypoints, (B, N, num_keypoints, 3), torch.float32)
    for name, (tensor, shape, dtype) in shapes.items():
        _check(tuple(tensor.shape) == shape, name, _shape(tensor), f"{shape}", "pad all images to N objects")
        _check_dtype(name, tensor, *((dtype, torch.float64) if dtype == torch.float32 else (dtype,)))
    if N and all(readable(tensor) for tensor, _, _ in shapes.values()):
        _check_values(targets, images, num_classes)


def _check_values(targets: Targets, images: ImageBatch, num_classes: int) -> None:
    labels, boxes = targets.labels.numpy(), targets.boxes.numpy()
    bad = (labels < 0) | (labels > num_classes)
    _check(not bad.any(), "targets.labels", labels[bad][:3].tolist(), f"0 to {num_classes}", "0 is padding")
    objects = boxes[labels > 0]
    broken = ~np.isfinite(objects).all(axis=1)
    _check(not broken.any(), "targets.boxes", objects[broken][:3].tolist(), "finite", "leave such objects out")
    inverted = (objects[:, 2:] <= objects[:, :2]).any(axis=1)
    remedy = "give x1, y1, x2, y2, and leave objects without extent out"
    _check(
        not inverted.any(), "targets.boxes", objects[inverted][:3].tolist(), "boxes with x1 < x2 and y1 < y2", remedy
    )
    if targets.keypoints is not None:
        finite = np.isfinite(targets.keypoints.numpy()).all()
        _check(bool(finite), "targets.keypoints", "not finite", "finite numbers", "set unknown ones to 0, 0, 0")
    _check_masks(targets, images)


def _check_masks(targets: Targets, images: ImageBatch) -> None:
    """Every instance's runs have to fill its image exactly."""
    ends, offsets = targets.masks.ends.numpy(), targets.masks.offsets.numpy()
    _check_dtype("targets.masks.ends", targets.masks.ends, torch.int32)
    ordered = bool(offsets[0] == 0 and offsets[-1] == len(ends) and (np.diff(offsets) >= 0).all())
    _check(
        ordered,
        "targets.masks.offsets",
        offsets[[0, -1]].tolist(),
        f"0, ... rising to {len(ends)}",
        "see RunLengthMasks",
    )
    there = np.flatnonzero(np.diff(offsets))
    pixels = images.sizes.numpy().prod(axis=1)[there // targets.labels.shape[1]]
    wrong = there[ends[offsets[there + 1] - 1] != pixels]
    if len(wrong):
        covered = int(ends[offsets[wrong[0] + 1] - 1])
        image, number = divmod(int(wrong[0]), targets.labels.shape[1])
        size = images.sizes[image].numpy().tolist()
        raise ValueError(
            f"targets.masks covers {covered} pixels for object {number} of image {image}, but the image has "
            f"{size[0]} x {size[1]}: resize masks with their image"
        )


def readable(tensor: Tensor) -> bool:
    """A real tensor in the host's memory, not one of torch.compile's or FakeTensorMode's: looking does not wait."""
    return type(tensor) is Tensor and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_dtype(name: str, tensor: Tensor, *allowed: torch.dtype) -> None:
    _check(tensor.dtype in allowed, name, tensor.dtype, " or ".join(map(str, allowed)), "convert it")


def _check(holds: bool, name: str, value: object, bound: str, remedy: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}, but must be {bound}: {remedy}")
