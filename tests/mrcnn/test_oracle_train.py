"""Training losses and gradients on the oracles' inputs: those of torchvision and of detectron2.

The peers draw their samples with torch.randperm, which the oracles replaced by arange, left out by taking everything
(all), or seeded (seed0); here the drawing of samples is replaced to match. Everything else is the product's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from models import run_ends
from oracle_eval import is_torchvision, network_batch
from pycocotools import mask as coco_mask
from torch import Tensor

from mrcnn import ImageBatch, MaskRCNN, RunLengthMasks, Targets
from mrcnn.matching import IGNORED, NEGATIVE, POSITIVE
from mrcnn.preprocess import network_images
from mrcnn.roi_heads import RoIHeads
from mrcnn.weights import to_detectron2, to_torchvision

TAKEN = 10**9
"""The oracle's batch_size_per_image in mode "all"."""
LOSSES = {
    "loss_classifier": "loss_cls",
    "loss_box_reg": "loss_box_reg",
    "loss_mask": "loss_mask",
    "loss_keypoint": "loss_keypoint",
    "loss_objectness": "loss_rpn_cls",
    "loss_rpn_box_reg": "loss_rpn_loc",
}


@dataclass(frozen=True)
class Case:
    name: str
    ids: tuple[str, ...]
    mode: str
    """arange, all or seed0"""

    @property
    def key(self) -> str:
        return self.ids[0] if len(self.ids) == 1 else "batch"


TV_MASK, TV_KEYPOINT = "tv_maskrcnn_r50_fpn", "tv_keypointrcnn_r50_fpn"
D2_MASK, D2_C4, D2_KEYPOINT = "d2_mask_R_50_FPN", "d2_mask_R_50_C4", "d2_keypoint_R_50_FPN"
IN_CI = [
    Case(TV_MASK, ("17627",), "arange"),
    Case(TV_MASK, ("6818",), "arange"),
    Case(TV_KEYPOINT, ("87038",), "seed0"),
    Case(D2_MASK, ("17627",), "seed0"),
    pytest.param(Case(D2_C4, ("17627",), "arange"), marks=pytest.mark.drill),
    Case(D2_KEYPOINT, ("87038",), "arange"),
]
ALL = [
    Case(name, ids, mode)
    for name, images, modes in (
        (TV_MASK, [*((i,) for i in oracle.IMAGES), oracle.IMAGES], ("arange", "all", "seed0")),
        (TV_KEYPOINT, [("87038",)], ("arange", "all", "seed0")),
        (D2_MASK, [*((i,) for i in oracle.IMAGES), oracle.IMAGES], ("arange", "seed0")),
        (D2_C4, [("17627",)], ("arange", "seed0")),
        (D2_KEYPOINT, [("87038",)], ("arange", "seed0")),
    )
    for ids in images
    for mode in modes
]


@pytest.mark.parametrize("case", ALL if oracle.FULL else IN_CI, ids=lambda c: f"{c.name}-{c.key}-{c.mode}")
def test_losses_and_gradients(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model(case)
    images = batch_of(case, model)
    objects = [objects_of(case, i, size) for i, size in zip(case.ids, images.sizes.tolist(), strict=True)]
    targets = padded(objects)
    monkeypatch.setattr("mrcnn.rpn.sample", peers_sampler(case.mode))
    monkeypatch.setattr("mrcnn.roi_sampling.sample", peers_sampler(case.mode))
    if not is_torchvision(case.name):
        monkeypatch.setattr(RoIHeads, "mask_targets", rasterized(objects))
    torch.manual_seed(0)
    if is_torchvision(case.name):
        for _ in case.ids:
            torch.empty(1).uniform_(0, 1)  # torchvision draws its shorter side, even when there is one only
    stored_gradients = oracle.read_npz(f"{case.name}_grads.npz")
    names = {key.split("/")[1] for key in stored_gradients if key.startswith(f"{case.key}/")}
    gradients = case.mode == "arange" and bool(names)
    with torch.set_grad_enabled(gradients):
        losses = model(images, targets)
    expected = oracle.read_json(f"{case.name}_train.json")[f"{case.key}/{case.mode}"]
    for ours, theirs in LOSSES.items():
        stored = expected.get(ours if is_torchvision(case.name) else theirs)
        assert (ours in losses) == (stored is not None)
        if stored is not None:
            assert losses[ours].item() == pytest.approx(stored, rel=tolerance(case, ours), abs=1e-7), ours
    if case.name == D2_MASK and not gradients:  # our own mask targets, which differ on outlines
        monkeypatch.undo()
        own = float(model(images, targets)["loss_mask"].detach())
        assert own == pytest.approx(float(losses["loss_mask"]), rel=5e-3)
    if gradients:
        torch.stack(list(losses.values())).sum().backward()
        compare_gradients(case, model, names)


def tolerance(case: Case, loss: str) -> float:
    """1e-4, the oracle's advice. But seed0 draws proposals by rank, and rounding swaps near ties among 2000 ranks: some
    other negative RoIs are drawn then, which only the classifier sees."""
    return 5e-3 if case.mode == "seed0" and loss == "loss_classifier" else 1e-4


def trained_model(case: Case) -> MaskRCNN:
    """The peer's model as ours, with the settings of the oracle's mode."""
    model = cached_model(case.name)
    model.zero_grad(set_to_none=True)
    config = model.config
    if case.mode == "all":
        rpn = replace(config.rpn, batch_size_per_image=TAKEN)
        roi = replace(config.roi, batch_size_per_image=TAKEN, positive_fraction=128 / TAKEN)
        config = replace(config, rpn=rpn, roi=roi)
    model.rpn.config, model.roi_heads.config = config.rpn, config
    return model.train()


@cache
def cached_model(name: str) -> MaskRCNN:
    return oracle.built(name)


def batch_of(case: Case, model: MaskRCNN) -> ImageBatch:
    """What the peer's network saw; torchvision's keypoint model drew 704 as its shorter side."""
    if case.name == TV_KEYPOINT:
        return network_images([oracle.image(i) for i in case.ids], replace(model.config.input, shorter_side=704))
    return network_batch(model, list(case.ids))


@dataclass(frozen=True)
class Objects:
    """What is in one image, in pixels of the network's input."""

    boxes: Tensor
    labels: list[int]
    masks: list[np.ndarray]
    polygons: list[list[np.ndarray]]
    keypoints: Tensor | None


def objects_of(case: Case, image_id: str, size: list[int]) -> Objects:
    """An image's annotations without crowds, resized as the peer does it."""
    kind = "person_keypoints" if "keypoint" in case.name else "instances"
    truth = oracle.read_json(f"coco_{kind}_val2017_tiny.json")
    (image,) = (each for each in truth["images"] if each["id"] == int(image_id))
    found = [a for a in truth["annotations"] if a["image_id"] == int(image_id) and not a["iscrowd"]]
    source, scale = (image["height"], image["width"]), (size[1] / image["width"], size[0] / image["height"])
    boxes = torch.tensor([a["bbox"] for a in found], dtype=torch.float64)
    boxes[:, 2:] += boxes[:, :2]
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor(source[::-1] * 2))
    if is_torchvision(case.name):  # to the last bit: it decides how many anchors are near enough, and so what is drawn
        ratios = torch.tensor(size[::-1] * 2).float() / torch.tensor(source[::-1] * 2).float()
        boxes = boxes.float() * ratios
    else:
        boxes = (boxes * torch.tensor(scale * 2, dtype=torch.float64)).float()
    polygons = [[np.array(p).reshape(-1, 2) for p in a["segmentation"]] for a in found]
    contiguous = {category["id"]: i for i, category in enumerate(truth["categories"], start=1)}
    labels = [a["category_id"] if is_torchvision(case.name) else contiguous[a["category_id"]] for a in found]
    if is_torchvision(case.name):
        masks = [resized_nearest(decoded(each, source), size) for each in polygons]
    else:
        polygons = [[p * scale for p in each] for each in polygons]
        masks = [decoded(each, (size[0], size[1])) for each in polygons]
    keypoints = keypoints_of(case, found, scale) if kind == "person_keypoints" else None
    return Objects(boxes, labels, masks, polygons, keypoints)


def keypoints_of(case: Case, annotations: list[dict[str, object]], scale: tuple[float, float]) -> Tensor:
    """torchvision scales the pixel index, detectron2 the pixel's centre, which our model has half a pixel from it."""
    keypoints = torch.tensor([a["keypoints"] for a in annotations], dtype=torch.float64).reshape(
        len(annotations), -1, 3
    )
    offset = 0.0 if is_torchvision(case.name) else 0.5
    keypoints[..., :2] = (keypoints[..., :2] + offset) * torch.tensor(scale, dtype=torch.float64) - offset
    return keypoints.float()


def decoded(polygons: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    return coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([p.ravel().tolist() for p in polygons], *size)))


def resized_nearest(bitmap: np.ndarray, size: list[int]) -> np.ndarray:
    resized = F.interpolate(torch.from_numpy(bitmap)[None, None].float(), size=size)
    return resized[0, 0].numpy().astype(np.uint8)


def padded(objects: list[Objects]) -> Targets:
    """Targets of the batch, with masks as run lengths."""
    B, N = len(objects), max(len(each.labels) for each in objects)
    boxes, labels = torch.zeros(B, N, 4), torch.zeros(B, N, dtype=torch.int64)
    ends: list[int] = []
    offsets = [0]
    for b, each in enumerate(objects):
        boxes[b, : len(each.labels)], labels[b, : len(each.labels)] = each.boxes, torch.tensor(each.labels)
        for n in range(N):
            ends += run_ends(each.masks[n]) if n < len(each.masks) else []
            offsets.append(len(ends))
    keypoints = objects[0].keypoints
    return Targets(
        boxes=boxes,
        labels=labels,
        iscrowd=torch.zeros_like(labels, dtype=torch.bool),
        masks=RunLengthMasks(torch.tensor(ends, dtype=torch.int32), torch.tensor(offsets)),
        seeds=torch.arange(B),
        keypoints=None if keypoints is None else keypoints[None],
    )


def peers_sampler(mode: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """`mrcnn.matching.sample` as both peers draw: a permutation of all positives, then one of all negatives."""

    def permutation(n: int) -> Tensor:
        return torch.randperm(n) if mode == "seed0" else torch.arange(n)

    def sample(kinds: Tensor, priority: Tensor, *, size: int, positive_fraction: float) -> tuple[Tensor, Tensor]:
        del priority
        size = min(size, kinds.shape[1])
        idxs = torch.zeros(len(kinds), size, dtype=torch.int64)
        sampled = torch.full_like(idxs, IGNORED)
        for b, one in enumerate(kinds):
            positives, negatives = (one == POSITIVE).nonzero()[:, 0], (one == NEGATIVE).nonzero()[:, 0]
            share = TAKEN if mode == "all" else int(size * positive_fraction)
            positives = positives[permutation(len(positives))[:share]]
            negatives = negatives[permutation(len(negatives))[: size - len(positives)]]
            chosen = torch.cat([positives, negatives])
            idxs[b, : len(chosen)], sampled[b, : len(chosen)] = chosen, one[chosen]
        return idxs, sampled

    return sample


def rasterized(objects: list[Objects]) -> Callable[..., Tensor]:
    """`RoIHeads.mask_targets` as detectron2 makes them of polygons: drawn into the m x m grid over the RoI's box.

    Ours are exact shares of the pixel mask, thresholded: they differ in pixels of the outline only, which is held to
    here, too.
    """
    original = RoIHeads.mask_targets

    def mask_targets(
        self: RoIHeads, boxes: Tensor, instances: Tensor, sizes: Tensor, targets: Targets, *, side: int
    ) -> Tensor:
        ours = original(self, boxes, instances, sizes, targets, side=side)
        theirs = torch.zeros_like(ours)
        for i, (box, instance) in enumerate(
            zip(boxes.flatten(0, 1).double().tolist(), instances.tolist(), strict=True)
        ):
            image, number = divmod(instance, targets.labels.shape[1])
            if number < len(objects[image].polygons):
                theirs[i] = torch.from_numpy(drawn(objects[image].polygons[number], box, side))
        there = theirs.flatten(1).any(dim=1)
        assert float((ours[there] - theirs[there]).abs().mean()) < 0.05
        return theirs

    return mask_targets


def drawn(polygons: list[np.ndarray], box: list[float], side: int) -> np.ndarray:
    scale = side / max(box[2] - box[0], 0.1), side / max(box[3] - box[1], 0.1)
    return decoded([(p - box[:2]) * scale for p in polygons], (side, side))


def compare_gradients(case: Case, model: MaskRCNN, names: set[str]) -> None:
    """Norms to 5e-3 (the oracle's advice), samples to 3 % of the largest one."""
    gradients = {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        for name, parameter in model.named_parameters()
    }
    # the peers' names are made from whole state dicts: what does not learn stands in as zeros
    gradients = {**{name: torch.zeros_like(value) for name, value in model.state_dict().items()}, **gradients}
    back = to_torchvision if is_torchvision(case.name) else to_detectron2
    theirs = back(gradients, model.config)
    stored = oracle.read_npz(f"{case.name}_grads.npz")
    for name in names:
        norm, samples = stored[f"{case.key}/{name}/norm"], stored[f"{case.key}/{name}/sample16"]
        found = theirs[name].flatten().double()
        assert float(found.norm()) == pytest.approx(float(norm), rel=5e-3), name
        places = torch.arange(len(samples)) * len(found) // len(samples)
        largest = abs(samples).max()
        assert abs(found[places].numpy() - samples).max() <= 0.03 * largest, name
