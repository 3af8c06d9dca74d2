"""The whole model on small inputs: what must hold for any weights."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from models import SMALL, batch_of, small_model
from safetensors.torch import load_file, save_file
from torchvision.models import resnet18

from mrcnn import Category, MaskRCNN, load_model, load_weights, save_model

LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}
TWO_IMAGES = [[[10, 10, 60, 70], [50, 20, 110, 60]], [[5, 30, 40, 90]]]


def test_every_trainable_parameter_learns() -> None:
    model = small_model().train()
    torch.stack(list(model(*batch_of(TWO_IMAGES)).values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_frozen_stages_do_not_learn() -> None:
    config = dataclasses.replace(SMALL, backbone=dataclasses.replace(SMALL.backbone, frozen_stages=2))
    model = MaskRCNN(config)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen
    assert all(name.startswith(("backbone.stem.", "backbone.stages.0.")) for name in frozen)


def test_frozen_stages_keep_their_batch_statistics() -> None:
    backbone = dataclasses.replace(SMALL.backbone, norm="bn", frozen_stages=2)
    model = MaskRCNN(dataclasses.replace(SMALL, backbone=backbone)).train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running_mean" in name}
    model(*batch_of(TWO_IMAGES))
    moved = {name for name, value in before.items() if not torch.equal(model.state_dict()[name], value)}
    assert moved == {name for name in before if not name.startswith(("backbone.stem.", "backbone.stages.0."))}


def test_an_object_without_a_mask_teaches_none() -> None:
    model = small_model().train()
    images, targets = batch_of(TWO_IMAGES)
    with_masks = model(images, targets)
    none = dataclasses.replace(targets.masks, ends=targets.masks.ends[:0], offsets=targets.masks.offsets * 0)
    without = model(images, dataclasses.replace(targets, masks=none))
    assert with_masks["loss_mask"] > 0
    assert without["loss_mask"] == 0
    assert without["loss_box_reg"] == with_masks["loss_box_reg"]


@pytest.mark.parametrize(
    ("boxes", "crowd"),
    [
        ([[], []], False),
        ([[[10, 10, 60, 70]], []], False),
        ([[[0, 0, 128, 96]]], True),
        ([[[20, 20, 21, 21], [0, 0, 0.01, 0.01]]], False),
        ([[[i % 11 * 10, i // 11 * 2, i % 11 * 10 + 20, i // 11 * 2 + 9] for i in range(300)]], False),
    ],
    ids=["no objects", "one image without", "only crowds", "tiny boxes", "300 objects"],
)
def test_hard_batches_give_finite_losses_and_gradients(boxes: list[list[list[float]]], crowd: bool) -> None:
    model = small_model().train()
    losses = model(*batch_of(boxes, crowd=crowd))
    assert losses.keys() == LOSSES
    assert all(value.isfinite() for value in losses.values()), losses
    torch.stack(list(losses.values())).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, f"{name}: DDP would wait for its gradient"
        assert parameter.grad.isfinite().all(), name
    if not any(boxes) or crowd:
        assert losses["loss_mask"] == losses["loss_box_reg"] == losses["loss_rpn_box_reg"] == 0


def test_the_same_seeds_give_the_same_losses_and_others_do_not() -> None:
    model = small_model().train()
    images, targets = batch_of(TWO_IMAGES)
    first, again = model(images, targets), model(images, targets)
    assert all(torch.equal(first[name], again[name]) for name in LOSSES)
    other = model(images, dataclasses.replace(targets, seeds=targets.seeds + 1))
    assert other["loss_objectness"] != first["loss_objectness"]


def test_an_image_is_sampled_alike_in_any_batch() -> None:
    """Two workers with one image each see what one worker with both sees (group norm: no statistics between images)."""
    model = small_model().train()
    images, targets = batch_of([[[10, 10, 60, 70], [50, 20, 110, 60]], [[5, 30, 40, 90], [60, 60, 90, 90]]])
    both = model(images, targets)
    alone = []
    for i in range(2):
        one = slice(i, i + 1)
        first, last = targets.masks.offsets[2 * i], targets.masks.offsets[2 * i + 2]
        masks = dataclasses.replace(
            targets.masks,
            ends=targets.masks.ends[first:last],
            offsets=targets.masks.offsets[2 * i : 2 * i + 3] - first,
        )
        part = dataclasses.replace(
            targets,
            boxes=targets.boxes[one],
            labels=targets.labels[one],
            iscrowd=targets.iscrowd[one],
            masks=masks,
            seeds=targets.seeds[one],
        )
        alone.append(model(dataclasses.replace(images, pixels=images.pixels[one], sizes=images.sizes[one]), part))
    for name in ("loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg"):
        mean = (alone[0][name] + alone[1][name]) / 2
        torch.testing.assert_close(mean, both[name], rtol=1e-4, atol=1e-6)


def test_a_few_steps_learn_two_images() -> None:
    model = small_model().train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    batch = batch_of(TWO_IMAGES)
    totals = []
    for _ in range(25):
        loss = torch.stack(list(model(*batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert np.mean(totals[-5:]) < 0.6 * np.mean(totals[:3])


def test_predictions_are_in_source_pixels_and_sorted() -> None:
    model = lively(small_model())
    images = [
        np.random.default_rng(i).integers(0, 256, (*size, 3), np.uint8)
        for i, size in enumerate([(50, 200), (300, 240)])
    ]
    for image, found in zip(images, model.predict(images), strict=True):
        assert len(found) > 0
        assert found.image_size == image.shape[:2]
        assert found.masks.shape == (len(found), *image.shape[:2])
        assert found.masks.dtype == torch.bool
        assert (found.boxes >= 0).all()
        assert (found.boxes[:, 2] <= image.shape[1]).all()
        assert (found.boxes[:, 3] <= image.shape[0]).all()
        assert (found.scores.diff() <= 0).all()
        assert found.labels.min() >= 1
        assert found.labels.max() <= 3
        assert len(found) <= model.config.roi.max_detections
        assert [rle["size"] for rle in found.rles] == [list(image.shape[:2])] * len(found)


def test_a_prediction_does_not_depend_on_the_other_images() -> None:
    model = lively(small_model())
    images = [np.random.default_rng(i).integers(0, 256, (70 + 30 * i, 90, 3), np.uint8) for i in range(2)]
    together, alone = model.predict(images)[1], model.predict(images[1:])[0]
    assert torch.equal(together.boxes, alone.boxes)
    assert torch.equal(together.mask_probs, alone.mask_probs)


def test_an_image_where_nothing_is_found() -> None:
    model = small_model()
    config = dataclasses.replace(SMALL, roi=dataclasses.replace(SMALL.roi, score_threshold=0.99))
    model = MaskRCNN(config)
    found = model.predict([np.zeros((64, 64, 3), np.uint8)])[0]
    assert len(found) == 0
    assert found.masks.shape == (0, 64, 64)
    assert found.rles == []


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (np.zeros((5, 5, 3), np.float32), r"images\[0\] is float32, but must be a uint8 array"),
        (np.zeros((5, 5), np.uint8), r"images\[0\] has shape \(5, 5\)"),
        (np.zeros((5, 0, 3), np.uint8), r"images\[0\] has shape \(5, 0, 3\)"),
        ("cat.jpg", r"images\[0\] is str"),
    ],
)
def test_wrong_images_are_refused(image: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_model().predict([image])  # type: ignore[list-item]


def test_a_saved_model_comes_back_the_same(tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = MaskRCNN(SMALL, [Category(1, "cat"), Category(7, "dog"), Category(90, "cow")]).eval()
    save_model(model, tmp_path / "m")
    loaded = load_model(tmp_path / "m")
    assert loaded.config == model.config
    assert loaded.categories == model.categories
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_damaged_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"model\.safetensors does not exist"):
        load_model(tmp_path)
    save_model(small_model(), tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    save_file({k: v for k, v in state.items() if k != "rpn.convs.0.weight"}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"1 tensors are missing \['rpn\.convs\.0\.weight'\]"):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_model(tmp_path)
    for damaged in ('{"format": "mrcnn-2"}', '{"format": "mrcnn-2", "model": {"backbone": "x"}, "categories": []}'):
        save_model(small_model(), tmp_path)
        (tmp_path / "config.json").write_text(damaged)
        with pytest.raises(ValueError, match=r"config\.json is damaged|config\.json: backbone is 'x'"):
            load_model(tmp_path)
    (tmp_path / "config.json").write_text('{"format": "other"}')
    with pytest.raises(ValueError, match=r"not of format 'mrcnn-2'"):
        load_model(tmp_path)


def test_a_torchvision_body_starts_the_backbone(tmp_path: Path) -> None:
    body = resnet18(weights=None)
    torch.save(body.state_dict(), tmp_path / "resnet18.pth")
    model = small_model(norm="frozen_bn")
    load_weights(model, tmp_path / "resnet18.pth")
    state = model.state_dict()
    assert torch.equal(state["backbone.stem.0.weight"], body.state_dict()["conv1.weight"])
    assert torch.equal(state["backbone.stages.3.1.bn2.weight"], body.state_dict()["layer4.1.bn2.weight"])
    with pytest.raises(ValueError, match=r"check backbone\.name and backbone\.norm"):
        load_weights(small_model(norm="gn"), tmp_path / "resnet18.pth")


def test_pickled_objects_are_never_loaded(tmp_path: Path) -> None:
    torch.save({"model": Path("/")}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as weights"):
        load_weights(small_model(), tmp_path / "evil.pth")


def lively(model: MaskRCNN) -> MaskRCNN:
    """The model with scores spread out, so that it finds things with random weights."""
    with torch.no_grad():
        model.roi_heads.box_head.class_logits.weight.mul_(20)
        model.roi_heads.box_head.box_deltas.weight.mul_(20)
    return model
