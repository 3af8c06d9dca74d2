"""Test-time augmentation: several scales and mirror images of an image, merged (appendix B of the paper).

Boxes of all views are suppressed together; masks and keypoints of what is left are the mean of all views. Everything is
merged in the pixels in which `MaskRCNN.predict` sees the image, so with its own scale alone the result is `predict`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import batched_nms

from mrcnn.boxes import clip_boxes
from mrcnn.inputs import check_image, check_sizes
from mrcnn.keypoints import decode_keypoints
from mrcnn.model import MaskRCNN, evaluating
from mrcnn.preprocess import network_images, resized_size
from mrcnn.roi_heads import BoxResult
from mrcnn.settings import require
from mrcnn.structures import Detections, mirrored_keypoints


@dataclass(frozen=True)
class TTAConfig:
    """Which views of an image are merged."""

    scales: tuple[int, ...] = (600, 800, 1000)
    """Shorter sides, pixels; the paper has nine of them, 400 to 1200 in steps of 100."""
    longer_factor: float = 0.0
    """Bound of the longer side in shorter sides; 0: the model's own, 1333/800 in the paper."""
    flip: bool = True
    """Each scale is seen mirrored, too."""

    def __post_init__(self) -> None:
        bound = "one or more different positive numbers"
        good = len(self.scales) > 0 and min(self.scales) > 0 and len(set(self.scales)) == len(self.scales)
        require(good, "scales", self.scales, bound, "(600, 800, 1000) is the default")
        good = self.longer_factor == 0 or self.longer_factor >= 1
        require(good, "longer_factor", self.longer_factor, "0 or at least 1", "0 keeps the model's own")


def predict_with_tta(
    model: MaskRCNN,
    images: Sequence[np.ndarray],
    config: TTAConfig,
    *,
    source_sizes: Sequence[tuple[int, int]] | None = None,
) -> list[Detections]:
    """As `MaskRCNN.predict`, one image at a time, each in all views of `config`.

    An image's features in all views are held at once: for a pyramid and a 3:5 image 0.6 GB by default, 1.8 GB for the
    paper's nine scales with their mirror images.

    Args:
        model: which may be on any device
        images: each (H, W, 3) uint8 RGB
        config: the views
        source_sizes: (height, width) of the originals of images that were resized before; detections are in those

    Raises:
        ValueError: for an array of another shape or type, or if keypoints of unknown names are to be mirrored.
    """
    for i, image in enumerate(images):
        check_image(image, f"images[{i}]")
    sizes = [(im.shape[0], im.shape[1]) for im in images] if source_sizes is None else source_sizes
    check_sizes("source_sizes", sizes, len(images))
    if config.flip and model.config.keypoint.num_keypoints:
        _check_keypoint_names(model)
    with evaluating(model):
        return [_predict_one(model, image, config, size) for image, size in zip(images, sizes, strict=True)]


def _check_keypoint_names(model: MaskRCNN) -> None:
    most = max(len(category.keypoints) for category in model.categories)
    if most != model.config.keypoint.num_keypoints:
        raise ValueError(
            f"the model finds {model.config.keypoint.num_keypoints} keypoints, but its categories name {most}, so left "
            "and right are not known in mirror images: give Category.keypoints, or set flip to False"
        )


@dataclass(frozen=True)
class _Views:
    """An image at one scale: as it is, and mirrored if it has two rows."""

    features: list[Tensor]
    found: list[BoxResult]
    """In pixels of each view"""
    size: tuple[int, int]
    """Height and width without padding"""
    factors: Tensor
    """(4,): from pixels of the reference size to the views'"""

    def to_reference(self, reference: tuple[int, int]) -> list[BoxResult]:
        """What was found in each view, in pixels of the reference size."""
        bounds = torch.tensor([reference], device=self.factors.device)
        boxes = [_mirrored(one.boxes, self.size[1]) if i else one.boxes for i, one in enumerate(self.found)]
        boxes = [clip_boxes((each / self.factors)[None], bounds)[0] for each in boxes]
        return [replace(one, boxes=each) for one, each in zip(self.found, boxes, strict=True)]

    def from_reference(self, merged: BoxResult) -> list[BoxResult]:
        """Merged boxes in pixels of each view."""
        seen = replace(merged, boxes=merged.boxes * self.factors)
        mirrored = replace(seen, boxes=_mirrored(seen.boxes, self.size[1]))
        return [seen, mirrored][: len(self.found)]


def _mirrored(boxes: Tensor, width: int) -> Tensor:
    x1, y1, x2, y2 = boxes.unbind(dim=1)
    return torch.stack([width - x2, y1, width - x1, y2], dim=1)


@torch.no_grad()
def _predict_one(model: MaskRCNN, image: np.ndarray, config: TTAConfig, source_size: tuple[int, int]) -> Detections:
    bounds = model.config.input
    reference = resized_size(
        *image.shape[:2], shorter_side=bounds.shorter_side, longer_side=bounds.longer_side, resize=bounds.resize
    )
    views = [_look(model, image, config, scale, reference) for scale in config.scales]
    merged = _merge(model, [found for view in views for found in view.to_reference(reference)])
    masks = _mean_masks(model, views, merged) if model.roi_heads.mask_head is not None else None
    keypoints = _keypoints(model, views, merged) if model.roi_heads.keypoint_head is not None else None
    return model.in_source_pixels(merged, masks, keypoints, reference, source_size)


def _look(model: MaskRCNN, image: np.ndarray, config: TTAConfig, scale: int, reference: tuple[int, int]) -> _Views:
    """Features and boxes of the image at one scale."""
    bounds = model.config.input
    factor = config.longer_factor or bounds.longer_side / bounds.shorter_side
    bounds = replace(bounds, shorter_side=scale, longer_side=max(round(scale * factor), scale))
    seen = [image, np.ascontiguousarray(image[:, ::-1])] if config.flip else [image]
    batch = network_images(seen, bounds)
    height, width = batch.sizes[0].tolist()
    batch = batch.to(next(model.parameters()).device, non_blocking=True)
    features = model.features(batch)
    proposals, _ = model.propose(batch, features=features)
    factors = features[0].new_tensor([width / reference[1], height / reference[0]] * 2)
    return _Views(features, model.roi_heads.detect(features, proposals, batch.sizes), (height, width), factors)


def _merge(model: MaskRCNN, found: Sequence[BoxResult]) -> BoxResult:
    """Boxes of all views, without those of which a view has a better one; best first."""
    roi = model.config.roi
    boxes, labels, scores = (torch.cat([getattr(one, name) for one in found]) for name in ("boxes", "labels", "scores"))
    keep = batched_nms(boxes, scores, labels, roi.nms_iou)[: roi.max_detections]
    return BoxResult(boxes=boxes[keep], labels=labels[keep], scores=scores[keep])


def _mean_masks(model: MaskRCNN, views: Sequence[_Views], merged: BoxResult) -> Tensor:
    """(D, M, M): the mean of the probabilities of all views."""
    return _mean(views, merged, model.roi_heads.masks, lambda masks: masks.flip(2))


def _keypoints(model: MaskRCNN, views: Sequence[_Views], merged: BoxResult) -> Tensor:
    """(D, keypoints, 3) in pixels of the reference size: peaks of the mean of the heatmaps of all views."""
    count = model.config.keypoint.num_keypoints
    places = torch.arange(count, device=merged.labels.device).repeat(len(model.categories), 1)
    for row, category in zip(places, model.categories, strict=True):
        row[: len(category.keypoints)] = row.new_tensor(mirrored_keypoints(category.keypoints))
    of_label = places[merged.labels - 1]

    def unmirrored(heatmaps: Tensor) -> Tensor:
        return heatmaps.flip(3).gather(1, of_label[:, :, None, None].expand_as(heatmaps))

    heatmaps = _mean(views, merged, model.roi_heads.heatmaps, unmirrored)
    return decode_keypoints(heatmaps, merged.boxes, score=model.config.keypoint.score)


def _mean(
    views: Sequence[_Views],
    merged: BoxResult,
    head: Callable[[Sequence[Tensor], Sequence[BoxResult]], list[Tensor]],
    unmirrored: Callable[[Tensor], Tensor],
) -> Tensor:
    """The mean of what a head says of merged boxes in each view."""
    said = [head(view.features, view.from_reference(merged)) for view in views]
    straight = [unmirrored(one) if i else one for each in said for i, one in enumerate(each)]
    return torch.stack(straight).mean(dim=0)
