"""Our inference on the oracles' inputs, compared quantity by quantity with what they store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
import oracle
import torch
from torch import Tensor
from torchvision.ops import box_iou

from mrcnn import Detections, ImageBatch, MaskRCNN
from mrcnn.heads import BoxHead
from mrcnn.preprocess import network_images
from mrcnn.roi_heads import BoxResult, RoIHeads
from mrcnn.rpn import Proposals

Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Difference:
    """How far one quantity is from what a peer had."""

    oracle: str
    quantity: str
    absolute: float
    """Largest absolute difference"""
    relative: float
    """The same in standard deviations of the peer's tensor, or as a share of its value"""
    limit: float
    """What `relative` may be"""
    unit: str = "std"

    @property
    def passed(self) -> bool:
        return self.relative <= self.limit

    def __str__(self) -> str:
        verdict = "" if self.passed else f"  > {self.limit:g}"
        return f"{self.oracle:38} {self.quantity:28} {self.absolute:10.2e} {self.relative:10.2e} {self.unit}{verdict}"


class Comparison:
    """One image of one oracle: looks up what is stored and notes the differences.

    Args:
        name: of the oracle's model
        key: prefix of its arrays, such as "6818/" or "batch/6818/"
    """

    def __init__(self, name: str, arrays: Arrays, key: str) -> None:
        self.name, self.key = name, key
        self.stored = {k.removeprefix(key): v for k, v in arrays.items() if k.startswith(key)}
        self.differences: list[Difference] = []

    def note(self, quantity: str, absolute: float, relative: float, limit: float, unit: str = "std") -> None:
        source = f"{self.name}/{self.key}".rstrip("/")
        self.differences.append(Difference(source, quantity, absolute, relative, limit, unit))

    def tensor(self, quantity: str, found: Tensor, limit: float) -> None:
        """Samples of a whole tensor in the peer's layout; NaN where we have nothing to compare."""
        shape = tuple(self.stored[f"{quantity}_shape"])
        assert tuple(found.shape) == shape, f"{self.name}/{self.key}{quantity}: {tuple(found.shape)} is not {shape}"
        samples = torch.from_numpy(self.stored[f"{quantity}_sample"]).double()
        places = torch.arange(len(samples)) * found.numel() // len(samples)
        self.values(quantity, found.flatten()[places].double(), samples, limit, std=self.std(quantity))

    def std(self, quantity: str) -> float:
        return float(self.stored[f"{quantity}_stats"][1])

    def values(self, quantity: str, found: Tensor, expected: Tensor, limit: float, *, std: float = 1.0) -> None:
        compared = ~found.isnan()  # rows that we do not have: background's
        assert found.numel() == 0 or float(compared.double().mean()) >= 0.5
        assert bool(expected.isfinite().all())
        off = (found.double() - expected.double())[compared].abs()
        largest = float(off.max()) if len(off) else 0.0
        self.note(quantity, largest, largest / std, limit, "std" if std != 1.0 else "abs")

    def equal(self, quantity: str, found: object) -> None:
        expected = self.stored[quantity].tolist()
        assert found == expected, f"{self.name}/{self.key}{quantity}: {found} is not {expected}"

    def array(self, quantity: str) -> Tensor:
        return torch.from_numpy(self.stored[quantity])


def is_torchvision(name: str) -> bool:
    return name.startswith("tv_")


def network_batch(model: MaskRCNN, ids: list[str]) -> ImageBatch:
    """Images of the oracle as the network sees them, by the product's own preprocessing."""
    return network_images([oracle.image(i) for i in ids], model.config.input)


def compare_input(check: Comparison, model: MaskRCNN, batch: ImageBatch, index: int = 0) -> None:
    """Sizes, the resized bytes that detectron2 had, and the normalised tensor."""
    check.equal("resized_hw", batch.sizes[index].tolist())
    check.equal("padded_hw", list(batch.pixels.shape[-2:]))
    check.tensor("input", model.normalize(batch)[index], 1e-4)
    if "input_uint8_sample" in check.stored:
        height, width = batch.sizes[index].tolist()
        pixels = batch.pixels[index, :, :height, :width].flip(0)  # BGR
        expected, shape = check.array("input_uint8_sample"), tuple(check.stored["input_uint8_shape"])
        places = torch.arange(len(expected)) * pixels.numel() // len(expected)
        found = (pixels if shape[0] == 3 else pixels.permute(1, 2, 0)).flatten()[places]
        check.values("input_uint8", found.float(), expected, 0.0)


def compare_features(check: Comparison, model: MaskRCNN, batch: ImageBatch) -> list[Tensor]:
    """Body, pyramid, RPN outputs and anchors; returns the feature levels."""
    body: list[Tensor] = []
    hooks = [stage.register_forward_hook(lambda *passed: body.append(passed[2])) for stage in model.backbone.stages]
    features = model.features(batch)
    for hook in hooks:
        hook.remove()
    body_name, pyramid_name = ("C", "P") if is_torchvision(check.name) else ("res", "p")
    has_pyramid = len(features) > 1
    for level, feature in enumerate(body, start=2):
        if has_pyramid or level == 4:  # of C4 the last is stored
            check.tensor(f"{body_name}{level}", feature[0], 1e-4)
    logits, deltas = model.rpn.head(features)
    for level, feature, logit, delta in zip(range(2, 7) if has_pyramid else [4], features, logits, deltas, strict=True):
        height, width = feature.shape[-2:]
        if has_pyramid:
            check.tensor(f"{pyramid_name}{level}", feature[0], 1e-4)
        maps = logit[0].unflatten(0, (height, width, -1)).permute(2, 0, 1)
        check.tensor(f"rpn_objectness{level}", maps, 1e-4)
        check.tensor(f"rpn_deltas{level}", delta[0].reshape(height, width, -1).permute(2, 0, 1), 1e-4)
    compare_anchors(check, torch.cat(model.rpn.anchors(features, (batch.pixels.shape[-2], batch.pixels.shape[-1]))))
    return features


def compare_anchors(check: Comparison, anchors: Tensor) -> None:
    check.equal("anchors_count", len(anchors))
    for quantity in check.stored:
        if quantity.startswith("anchors_first"):
            check.values("anchors, pixels", anchors[: len(check.array(quantity))], check.array(quantity), 1e-3)
    check.values("anchors, pixels", anchors[-6:], check.array("anchors_last6"), 1e-3)
    places = torch.arange(64) * len(anchors) // 64
    check.values("anchors, pixels", anchors[places], check.array("anchors_sample"), 1e-3)


def compare_proposals(check: Comparison, found: Proposals, index: int = 0) -> None:
    """Shares of proposals without a partner of IoU > 0.99, in both directions, and the logits of the others."""
    valid, expected = found.valid[index], check.array("proposals").float()
    iou = box_iou(found.boxes[index][valid], expected)
    lost = max(float((iou.max(dim=axis).values <= 0.99).float().mean()) for axis in (0, 1))
    check.note("proposals without partner", lost * len(expected), lost, 0.01, "share")
    if "proposals_objectness" in check.stored:
        best, matched = iou.max(dim=1)
        stored = check.array("proposals_objectness").float()
        logits, std = found.scores[index][valid][best > 0.99], float(stored.std())
        check.values("proposals_objectness", logits, stored[matched[best > 0.99]], 1e-3, std=std)


def compare_heads(check: Comparison, model: MaskRCNN, features: list[Tensor], *, whole: bool) -> None:
    """Box head on the stored proposals, mask and keypoint heads on the stored final boxes.

    whole: all stored proposals, else the first 100, whose outputs are stored row by row.
    """
    heads, roi = model.roi_heads, model.config.roi
    proposals = check.array("proposals")
    rois = _rois(proposals if whole else proposals[:100])
    box_features = heads.roi_features(features, rois, side=roi.box_pool)
    logits, deltas = heads.box_head(box_features)
    logits, regression = peer_outputs(check.name, logits, deltas)
    std = check.std("class_logits"), check.std("box_regression")
    check.values("class_logits", logits[:100], check.array("class_logits_first100"), 1e-3, std=std[0])
    check.values("box_regression", regression[:20], check.array("box_regression_first20"), 1e-3, std=std[1])
    if whole:
        check.tensor("box_pool", heads.pool(features, rois, side=roi.box_pool), 1e-3)
        check.tensor("class_logits", logits, 1e-3)
        check.tensor("box_regression", regression, 1e-3)
        if "box_head_shape" in check.stored:
            check.tensor("box_head", hidden_of(heads.box_head, box_features), 1e-3)
        compare_counts(check, heads, features, logits, proposals.float())
        if heads.res5 is not None:
            check.tensor("res5", box_features, 1e-3)
    final = _rois(check.array("boxes_net"))
    if heads.mask_head is not None:
        compare_masks(check, model, features, final)
    if heads.keypoint_head is not None:
        compare_keypoint_head(check, model, features, final)


def hidden_of(head: BoxHead, box_features: Tensor) -> Tensor:
    """What the last two layers of a box head see."""
    seen: list[Tensor] = []
    hook = head.class_logits.register_forward_hook(lambda *passed: seen.append(passed[1][0]))
    head(box_features)
    hook.remove()
    return seen[0]


def compare_counts(
    check: Comparison, heads: RoIHeads, features: list[Tensor], class_logits: Tensor, proposals: Tensor
) -> None:
    """How many scores of the stored proposals pass the threshold, and how many boxes NMS leaves where none is cut."""
    background = 0 if is_torchvision(check.name) else -1
    probs = class_logits.softmax(dim=1)
    probs[:, background] = 0.0
    everything = Proposals(proposals[None], torch.zeros(1, len(proposals)), torch.ones(1, len(proposals)).bool())
    config = heads.config
    heads.config = replace(config, roi=replace(config.roi, max_detections=10**6))
    kept = heads.detect(features, everything, torch.tensor([check.stored["resized_hw"].tolist()]))[0]
    heads.config = config
    counts = int((probs > config.roi.score_threshold).sum()), len(kept.boxes)
    for quantity, count in zip(("n_scores_over_thresh", "n_after_nms"), counts, strict=True):
        if quantity in check.stored:
            expected = int(check.stored[quantity])
            check.note(quantity, abs(count - expected), abs(count - expected) / expected, 0.01, "share")


def compare_masks(check: Comparison, model: MaskRCNN, features: list[Tensor], final: Tensor) -> None:
    heads = model.roi_heads
    side = model.config.mask.pool if heads.res5 is None else model.config.roi.box_pool
    pooled = heads.roi_features(features, final, side=side)
    assert heads.mask_head is not None
    logits = heads.mask_head(pooled)
    if heads.res5 is None:
        check.tensor("mask_pool", pooled, 1e-3)
    nothing = torch.full_like(logits[:, :1], torch.nan)
    check.tensor("mask_logits", torch.cat([nothing, logits], 1) if is_torchvision(check.name) else logits, 1e-3)
    rows = torch.arange(len(logits))
    probs = logits[rows, labels_of(check) - 1].sigmoid()
    stored = check.array("mask_probs28" if "mask_probs28" in check.stored else "mask_probs_first20")
    check.values("mask_probs", probs[: len(stored)], stored, 2e-3)


def compare_keypoint_head(check: Comparison, model: MaskRCNN, features: list[Tensor], final: Tensor) -> None:
    heads, config = model.roi_heads, model.config.keypoint
    found = BoxResult(final[:, 1:], labels_of(check), check.array("scores").float())
    check.tensor("kp_pool", heads.pool(features, final, side=config.pool), 1e-3)
    heatmaps = heads.heatmaps(features, [found])[0]
    name = "kp_logits" if "kp_logits_sample" in check.stored else "kp_heatmaps"
    check.tensor(name, heatmaps, 1e-3)
    points = heads.keypoints(features, [found])[0]
    source = model.in_source_pixels(found, None, points, check.stored["resized_hw"].tolist(), source_size(check.key))
    assert source.keypoints is not None
    compare_keypoints(check, source.keypoints, torch.arange(len(points)), config.pixel_offset)


def compare_keypoints(check: Comparison, found: Tensor, matched: Tensor, offset: float) -> None:
    """Keypoints of found rows against those of the stored rows `matched`: 99 of 100 within half a pixel.

    offset: what the peer subtracts only when it evaluates, and we at once
    """
    expected = check.array("keypoints")[matched]
    scores = check.array("keypoints_scores")[matched] if "keypoints_scores" in check.stored else expected[..., 2]
    away = (found[..., :2] + offset - expected[..., :2]).abs().amax(-1)
    far = float((away > 0.5).float().mean())
    check.note("keypoints over 0.5 px away", float(away.median()), far, 0.01, "share")
    near = away <= 0.5
    # heatmaps follow their box: between float32 and float64, which move boxes by 0.06 px, peaks change by 0.03 std
    limit = 0.1 if check.key.startswith("f64/") else 0.02
    check.values("keypoint scores", found[..., 2][near], scores[near], limit, std=float(scores.std()))


def labels_of(check: Comparison) -> Tensor:
    """Our labels of the stored detections: 1..K."""
    return check.array("labels") if "labels" in check.stored else check.array("classes") + 1


def peer_outputs(name: str, class_logits: Tensor, box_deltas: Tensor) -> tuple[Tensor, Tensor]:
    """The box head's outputs in the peer's layout; NaN for torchvision's background boxes."""
    if not is_torchvision(name):
        return class_logits.roll(-1, 1), box_deltas.flatten(1)
    background = torch.full((len(box_deltas), 4), torch.nan)
    return class_logits, torch.cat([background, box_deltas.flatten(1)], 1)


def source_size(key: str) -> tuple[int, int]:
    """Height and width of the image that a key is about."""
    height, width = oracle.read_json("images.json")[key.strip("/").split("/")[-1]]["hw"]
    return height, width


def compare_detections(check: Comparison, found: Detections, offset: float) -> None:
    """Pairs by class and IoU > 0.99: how many have none, and how far scores, boxes and mask areas are in the others."""
    boxes, scores = check.array("boxes").float(), check.array("scores").float()
    iou = box_iou(found.boxes, boxes) * (found.labels[:, None] == labels_of(check))
    best, matched = iou.max(dim=1)
    pairs = best > 0.99
    lost = len(boxes) - int(pairs.sum())
    check.note("detections without partner", lost, lost / len(boxes), 0.03, "share")
    matched = matched[pairs]
    check.values("scores", found.scores[pairs], scores[matched], 1e-3)
    check.values("boxes, pixels", found.boxes[pairs], boxes[matched], 0.1)
    if "mask_areas" in check.stored:
        expected = check.array("mask_areas")[matched].float()
        off = (found.masks.sum(dim=(1, 2))[pairs] - expected).abs()
        check.note("mask_areas", float(off.max()), float((off / expected.clamp(min=50)).max()), 0.02, "share")
    if found.keypoints is not None:
        compare_keypoints(check, found.keypoints[pairs], matched, offset)


def _rois(boxes: Tensor) -> Tensor:
    """Boxes of one image as RoIs."""
    return torch.cat([torch.zeros(len(boxes), 1), boxes.float()], 1)


@torch.inference_mode()
def compare_image(name: str, model: MaskRCNN, arrays: Arrays, image_id: str, *, whole: bool) -> list[Difference]:
    """Everything about one image alone in its batch."""
    check = Comparison(name, arrays, f"{image_id}/")
    batch = network_batch(model, [image_id])
    compare_input(check, model, batch)
    features = compare_features(check, model, batch)
    proposals, _ = model.propose(batch, features=features)
    compare_proposals(check, proposals)
    compare_heads(check, model, features, whole=whole)
    boxes = model.roi_heads.detect(features, proposals, batch.sizes)
    found = model.detections(features, boxes, batch.sizes, [source_size(image_id)])
    compare_detections(check, found[0], model.config.keypoint.pixel_offset)
    return check.differences


@torch.inference_mode()
def compare_batch(name: str, model: MaskRCNN, arrays: Arrays, prefix: str, ids: list[str]) -> list[Difference]:
    """Images that share a batch (or one alone in a variant, stored without intermediate tensors)."""
    batch = network_batch(model, ids)
    features = model.features(batch)
    proposals, _ = model.propose(batch, features=features)
    boxes = model.roi_heads.detect(features, proposals, batch.sizes)
    found = model.detections(features, boxes, batch.sizes, [source_size(i) for i in ids])
    differences = []
    for index, image_id in enumerate(ids):
        check = Comparison(name, arrays, f"{prefix}{image_id}/")
        compare_input(check, model, batch, index)
        for level, feature in enumerate(features, start=2):
            if f"P{level}_shape" in check.stored:
                check.tensor(f"P{level}", feature[index], 1e-4)
        compare_proposals(check, proposals, index)
        compare_detections(check, found[index], model.config.keypoint.pixel_offset)
        differences += check.differences
    return differences


def compare_variants(name: str, arrays: Arrays, *, eps0: bool) -> Iterator[Difference]:
    """torchvision with a batch norm epsilon of 0, and in float64."""
    model = oracle.built(name, norm_eps=0.0 if eps0 else 1e-5)
    kind = "eps0/" if eps0 else "f64/"
    for image_id in dict.fromkeys(key.split("/")[1] for key in arrays if key.startswith(kind)):
        yield from compare_batch(name, model, arrays, kind, [image_id])


def compare_all(name: str) -> Iterator[Difference]:
    """Everything that is stored of a model."""
    arrays, model = oracle.read_npz(f"{name}_eval.npz"), oracle.built(name)
    for image_id in oracle.IMAGES:
        yield from compare_image(name, model, arrays, image_id, whole=True)
    if any(key.startswith("batch/") for key in arrays):
        yield from compare_batch(name, model, arrays, "batch/", list(oracle.IMAGES))
    if is_torchvision(name):
        variants = oracle.read_npz(f"{name}_variants.npz")
        yield from compare_variants(name, variants, eps0=True)
        yield from compare_variants(name, variants, eps0=False)
