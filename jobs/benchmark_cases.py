"""What `mrcnn benchmark` measures: the same work by us and by torchvision.

Inputs are made from fixed seeds; no file is read. Weights are random, spread so widely that an image has as many
detections as a trained model's fullest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign, batched_nms

from jobs.benchmark_names import BenchmarkName
from mrcnn.model import MaskRCNN
from mrcnn.ops import multilevel_roi_pool, nms
from mrcnn.peers import from_torchvision
from mrcnn.postprocess import encode_masks
from mrcnn.preprocess import network_images, resized_size
from mrcnn.structures import RunLengthMasks, Targets
from pipelines.rle import ends_from_bitmap

STRIDES = (4, 8, 16, 32)


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are; the defaults are those of a usual COCO image."""

    image: tuple[int, int] = (480, 640)
    """Height and width of the image"""
    shorter_side: int = 800
    """Of the image that the network sees"""
    longer_side: int = 1333
    objects: int = 8
    """In the image of a training step; a second one has as many as there may be positives"""
    rois: int = 512
    """Sampled in a training step, or pooled"""
    channels: int = 256
    candidates: tuple[int, ...] = (4819, 8819)
    """Boxes that go into NMS, of five levels: an image's at inference and in training"""
    detections: int = 100
    """At most in an image, or masks that are pasted into one of `shorter_side` x `longer_side`"""


@dataclass(frozen=True)
class Case:
    """One thing to measure."""

    what: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]


def model_eval(sizes: Sizes, device: torch.device) -> list[Case]:
    """R-50-FPN from a uint8 image in memory to masks of its size."""
    ours, peer = _models(sizes, device)
    ours.eval()
    peer.eval()
    image = _image(sizes.image)

    def run_ours() -> Tensor:
        return ours.predict([image])[0].masks

    @torch.no_grad()
    def run_peer() -> Tensor:
        return peer([_peer_image(image, device)])[0]["masks"] >= 0.5

    return [Case("predict one image", run_ours, run_peer)]


def train_step(sizes: Sizes, device: torch.device) -> list[Case]:
    """R-50-FPN, batch 1: forward, backward and the optimizer's step, from an image of the network's size on.

    An untrained RPN finds next to no object, so that of 512 RoIs hardly more than the objects' own boxes are positive
    and have a mask, where a trained one fills the quarter that may be. As many objects fill it here.
    """
    most = max(sizes.rois // 4, 1)
    return [_train_case(objects, sizes, device) for objects in (min(sizes.objects, most), most)]


def _train_case(objects: int, sizes: Sizes, device: torch.device) -> Case:
    ours, peer = _models(sizes, device)
    peer.transform._skip_resize = True  # our batch has the network's size already
    bounds = ours.config.input
    size = resized_size(
        *sizes.image, shorter_side=bounds.shorter_side, longer_side=bounds.longer_side, resize=bounds.resize
    )
    image = _image(size)
    batch = network_images([image], bounds).to(device)
    targets, peer_targets = _targets(size, objects, device)
    peer_image = _peer_image(image, device)
    run_ours = _training(ours, lambda: ours(batch, targets))
    run_peer = _training(peer, lambda: peer([peer_image], [peer_targets]))
    return Case(f"one step, {objects} objects", run_ours, run_peer)


def _training(model: torch.nn.Module, losses: Callable[[], dict[str, Tensor]]) -> Callable[[], None]:
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # a rate of 0: the optimizer does all of its work, and every repeat starts from the same weights
    optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9, weight_decay=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        torch.stack(list(losses().values())).sum().backward()
        optimizer.step()

    return step


def roi_align(sizes: Sizes, device: torch.device) -> list[Case]:
    """RoIAlign of four levels with 2 x 2 samples, all levels at once, against MultiScaleRoIAlign."""
    generator = torch.Generator().manual_seed(0)
    height, width = (-(-side // 32) * 32 for side in (sizes.shorter_side, sizes.longer_side))
    shapes = [(1, sizes.channels, height // stride, width // stride) for stride in STRIDES]
    features = [torch.randn(shape, generator=generator).to(device).requires_grad_() for shape in shapes]
    boxes = _boxes(sizes.rois, (height, width), generator).to(device)
    rois = torch.cat([boxes.new_zeros(len(boxes), 1), boxes], dim=1)

    def cases(side: int) -> list[Case]:
        pool = MultiScaleRoIAlign([str(i) for i in range(len(STRIDES))], side, sampling_ratio=2)
        by_name = {str(i): level for i, level in enumerate(features)}

        def ours() -> Tensor:
            return multilevel_roi_pool(features, rois, output_size=side, strides=STRIDES, aligned=False)

        def peer() -> Tensor:
            pooled: Tensor = pool(by_name, [boxes], [(height, width)])
            return pooled

        gradient = torch.randn(ours().shape, generator=generator).to(device)
        no_grad = torch.no_grad()
        what = f"{len(rois)} RoIs x {sizes.channels} channels, {side} x {side}"
        return [
            Case(f"{what}, forward", no_grad(ours), no_grad(peer)),
            Case(f"{what}, forward and backward", *(_with_backward(f, features, gradient) for f in (ours, peer))),
        ]

    return [*cases(7), *cases(14)]


def _with_backward(forward: Callable[[], Tensor], inputs: list[Tensor], gradient: Tensor) -> Callable[[], Any]:
    return lambda: torch.autograd.grad(forward(), inputs, gradient)


def non_maximum_suppression(sizes: Sizes, device: torch.device) -> list[Case]:
    """The best 1000 proposals of an image: a fixed shape against batched_nms and a slice."""
    return [_nms_case(count, (sizes.shorter_side, sizes.longer_side), device) for count in sizes.candidates]


def _nms_case(count: int, size: tuple[int, int], device: torch.device) -> Case:
    generator = torch.Generator().manual_seed(count)
    objects = _boxes(30, size, generator)[torch.randint(30, (count,), generator=generator)]
    extent = objects[:, 2:] - objects[:, :2]
    jitter = torch.randn(count, 4, generator=generator) * extent.repeat(1, 2) * 0.15
    boxes, scores = (objects + jitter).to(device), torch.randn(count, generator=generator).to(device)
    levels = torch.randint(5, (count,), generator=generator).to(device)

    def ours() -> tuple[Tensor, Tensor]:
        return nms(boxes[None], scores[None], levels[None], iou_threshold=0.7, top_n=1000)

    def peer() -> Tensor:
        return batched_nms(boxes, scores, levels, 0.7)[:1000]

    return Case(f"{count} boxes in 5 levels", ours, peer)


def masks(sizes: Sizes, device: torch.device) -> list[Case]:
    """From 28 x 28 probabilities to COCO run lengths of the whole image, which are the same."""
    generator = torch.Generator().manual_seed(0)
    size = (sizes.shorter_side, sizes.longer_side)
    coarse = torch.rand(sizes.detections, 1, 7, 7, generator=generator)
    probs = torch.nn.functional.interpolate(coarse, size=28, mode="bilinear")[:, 0].to(device)
    boxes = _boxes(sizes.detections, size, generator).to(device)

    def ours() -> list[dict[str, Any]]:
        return encode_masks(probs, boxes, size, paste="padded")

    def peer() -> list[dict[str, Any]]:
        pasted = (paste_masks_in_image(probs[:, None], boxes, size)[:, 0] >= 0.5).to(torch.uint8).cpu().numpy()
        encoded: list[dict[str, Any]] = coco_mask.encode(np.asfortranarray(pasted.transpose(1, 2, 0)))
        return encoded

    return [Case(f"paste and encode {sizes.detections} masks, {size[1]} x {size[0]}", ours, peer)]


BENCHMARKS: dict[BenchmarkName, Callable[[Sizes, torch.device], list[Case]]] = {
    "model-eval": model_eval,
    "train-step": train_step,
    "roi-align": roi_align,
    "nms": non_maximum_suppression,
    "masks": masks,
}


def _models(sizes: Sizes, device: torch.device) -> tuple[MaskRCNN, TorchvisionMaskRCNN]:
    """Our R-50-FPN and torchvision's with the same weights and settings, 90 classes."""
    torch.manual_seed(0)
    body = resnet_fpn_backbone(backbone_name="resnet50", weights=None, norm_layer=FrozenBatchNorm2d, trainable_layers=3)
    peer = TorchvisionMaskRCNN(
        body,
        91,
        min_size=sizes.shorter_side,
        max_size=sizes.longer_side,
        box_batch_size_per_image=sizes.rois,
        box_detections_per_img=sizes.detections,
    )
    with torch.no_grad():
        predictor: Any = peer.roi_heads.box_predictor
        predictor.cls_score.weight.mul_(30)
        predictor.bbox_pred.weight.mul_(5)
    ours = from_torchvision(peer.state_dict(), norm_eps=1e-5)
    bounds = replace(ours.config.input, shorter_side=sizes.shorter_side, longer_side=sizes.longer_side)
    roi = replace(ours.config.roi, batch_size_per_image=sizes.rois, max_detections=sizes.detections)
    return replace(ours, config=replace(ours.config, input=bounds, roi=roi)).build().to(device), peer.to(device)


def _image(size: tuple[int, int]) -> np.ndarray:
    """Blots of colour, (H, W, 3) uint8."""
    coarse = torch.rand(1, 3, 12, 16, generator=torch.Generator().manual_seed(0)) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=size, mode="bicubic").clamp(0, 255).to(torch.uint8)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).numpy())


def _peer_image(image: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(image).permute(2, 0, 1).to(device).float() / 255


def _boxes(count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """(count, 4) boxes in an image of (height, width), sides a fortieth to half of its shorter one, evenly in log."""
    bounds = torch.tensor([size[1], size[0]])
    sides = min(size) / 40 * 20 ** torch.rand(count, 2, generator=generator)
    low = torch.rand(count, 2, generator=generator) * (bounds - sides)
    return torch.cat([low, low + sides], dim=1)


def _targets(size: tuple[int, int], objects: int, device: torch.device) -> tuple[Targets, dict[str, Tensor]]:
    """Ellipses as ground truth, for us and for torchvision."""
    generator = torch.Generator().manual_seed(1)
    boxes = _boxes(objects, size, generator)
    labels = torch.randint(1, 91, (objects,), generator=generator)
    y, x = np.mgrid[: size[0], : size[1]] + 0.5
    low, high = boxes[:, :2].numpy()[:, :, None, None], boxes[:, 2:].numpy()[:, :, None, None]
    offset = (np.stack([x, y]) - (low + high) / 2) / ((high - low) / 2)
    bitmaps = (offset**2).sum(axis=1) <= 1
    ends = [ends_from_bitmap(bitmap) for bitmap in bitmaps]
    runs = RunLengthMasks(
        torch.from_numpy(np.concatenate(ends)).int(), torch.tensor([0, *np.cumsum([len(each) for each in ends])])
    )
    none = torch.zeros(1, objects, dtype=torch.bool)
    ours = Targets(boxes[None], labels[None], none, runs, torch.tensor([0]))
    peers = {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(bitmaps).to(torch.uint8)}
    return ours.to(device), {name: value.to(device) for name, value in peers.items()}
