"""Test-time augmentation against `predict`, and against itself on mirror images."""

import dataclasses

import numpy as np
import pytest
import torch
from models import SMALL

from mrcnn import Category, Detections, KeypointConfig, MaskRCNN
from mrcnn.tta import TTAConfig, predict_with_tta

NAMES = ("nose", "left_eye", "right_eye")
OWN = SMALL.input.shorter_side


@pytest.fixture(scope="module")
def model() -> MaskRCNN:
    """With every head, and outputs that are spread so widely that there are many detections."""
    torch.manual_seed(0)
    keypoint = KeypointConfig(num_keypoints=3, convs=1, channels=16)
    categories = [Category(id=i, name=str(i), keypoints=NAMES) for i in range(1, 4)]
    model = MaskRCNN(dataclasses.replace(SMALL, keypoint=keypoint), categories)
    with torch.no_grad():
        model.roi_heads.box_head.class_logits.weight.mul_(30)
        model.roi_heads.box_head.box_deltas.weight.mul_(30)
    return model


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    generator = torch.Generator().manual_seed(4)
    coarse = torch.rand(1, 3, 9, 11, generator=generator) * 255
    pixels = torch.nn.functional.interpolate(coarse, size=(100, 120), mode="bicubic").clamp(0, 255)
    return np.ascontiguousarray(pixels[0].permute(1, 2, 0).byte().numpy())


def assert_same(one: Detections, other: Detections, atol: float) -> None:
    assert len(one) == len(other) > 10
    assert torch.equal(one.labels, other.labels)
    for name in ("boxes", "scores", "mask_probs", "keypoints"):
        torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=0, atol=atol, msg=name)


def test_the_models_own_scale_alone_gives_what_predict_gives(model: MaskRCNN, image: np.ndarray) -> None:
    images = [image, np.ascontiguousarray(image[:70])]
    found = predict_with_tta(model, images, TTAConfig(scales=(OWN,), flip=False), source_sizes=[(200, 240), (70, 120)])
    for one, expected in zip(found, model.predict(images, source_sizes=[(200, 240), (70, 120)]), strict=True):
        assert one.image_size == expected.image_size
        assert_same(one, expected, atol=0)


def test_a_mirror_image_gives_mirrored_results(model: MaskRCNN, image: np.ndarray) -> None:
    config = TTAConfig(scales=(80, OWN))
    mirror_image = np.ascontiguousarray(image[:, ::-1])
    straight, mirrored = predict_with_tta(model, [image, mirror_image], config)
    width = image.shape[1]
    x1, y1, x2, y2 = mirrored.boxes.unbind(dim=1)
    assert mirrored.keypoints is not None
    assert mirrored.mask_probs is not None
    keypoints = mirrored.keypoints[:, [0, 2, 1]] * torch.tensor([-1.0, 1, 1]) + torch.tensor([width, 0.0, 0])
    back = dataclasses.replace(
        mirrored,
        boxes=torch.stack([width - x2, y1, width - x1, y2], dim=1),
        mask_probs=mirrored.mask_probs.flip(2),
        keypoints=keypoints,
    )
    assert_same(back, straight, atol=1e-2)


def test_masks_and_keypoints_are_means_over_the_views(
    model: MaskRCNN, image: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each view's masks are its number; a view's heatmaps peak in one cell of the second keypoint."""
    views = iter([1.0, 2.0, 6.0, 7.0])
    side = 8

    def masks(features: list[torch.Tensor], found: list) -> list[torch.Tensor]:
        return [torch.full((len(one.boxes), 4, 4), next(views)) for one in found]

    def heatmaps(features: list[torch.Tensor], found: list) -> list[torch.Tensor]:
        straight, mirrored = (torch.zeros(len(one.boxes), 3, side, side) for one in found)
        straight[:, 1, 2, 1] = 1.0  # left eye, at the image's left
        mirrored[:, 2, 2, side - 2] = 1.0  # in the mirror the right eye, at the right
        return [straight, mirrored]

    monkeypatch.setattr(model.roi_heads, "masks", masks)
    monkeypatch.setattr(model.roi_heads, "heatmaps", heatmaps)
    found = predict_with_tta(model, [image], TTAConfig(scales=(80, OWN)))[0]
    assert found.mask_probs is not None
    assert found.keypoints is not None
    assert torch.equal(found.mask_probs, torch.full_like(found.mask_probs, 4.0))
    large = ((found.boxes[:, 2:] - found.boxes[:, :2]) > 16).all(dim=1)
    assert large.any()
    share = (found.keypoints[:, 1, :2] - found.boxes[:, :2]) / (found.boxes[:, 2:] - found.boxes[:, :2])
    torch.testing.assert_close(share[large], torch.tensor([1.5 / side, 2.5 / side]).expand(share[large].shape), rtol=0,
                               atol=0.5 / side)  # fmt: skip
    assert (found.keypoints[:, 1, 2] > found.keypoints[:, 2, 2]).all()  # nothing was left on the right eye


def test_more_views_are_merged_without_duplicates(model: MaskRCNN, image: np.ndarray) -> None:
    from torchvision.ops import box_iou

    found = predict_with_tta(model, [image], TTAConfig(scales=(64, OWN, 128)))[0]
    assert 10 < len(found) <= SMALL.roi.max_detections
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    overlap = box_iou(found.boxes, found.boxes) * (found.labels[:, None] == found.labels)
    assert overlap.fill_diagonal_(0).max() <= SMALL.roi.nms_iou + 1e-4


def test_training_mode_is_kept(model: MaskRCNN, image: np.ndarray) -> None:
    model.train()
    predict_with_tta(model, [image], TTAConfig(scales=(OWN,)))
    assert model.training
    model.eval()


def test_nothing_found(model: MaskRCNN, image: np.ndarray) -> None:
    config = dataclasses.replace(model.config, roi=dataclasses.replace(model.config.roi, score_threshold=0.9999))
    picky = MaskRCNN(config, model.categories)
    found = predict_with_tta(picky, [image], TTAConfig(scales=(64, OWN)))[0]
    assert len(found) == 0
    assert found.masks.shape == (0, *image.shape[:2])
    assert found.keypoints is not None
    assert found.keypoints.shape == (0, 3, 3)


def test_a_model_without_masks_and_keypoints(image: np.ndarray) -> None:
    config = dataclasses.replace(SMALL, mask=dataclasses.replace(SMALL.mask, head="none"))
    found = predict_with_tta(MaskRCNN(config), [image], TTAConfig(scales=(OWN,)))[0]
    assert found.mask_probs is None
    assert found.keypoints is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scales": ()}, "scales is ()"),
        ({"scales": (0, 800)}, "scales is"),
        ({"scales": (800, 800)}, "different"),
        ({"longer_factor": 0.5}, "longer_factor is 0.5"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
        TTAConfig(**settings)


def test_bad_arguments_are_refused(model: MaskRCNN, image: np.ndarray) -> None:
    config = TTAConfig(scales=(OWN,))
    with pytest.raises(ValueError, match=r"images\[0\] is float64"):
        predict_with_tta(model, [image / 255.0], config)
    with pytest.raises(ValueError, match="source_sizes is 2 entries, but must be 1"):
        predict_with_tta(model, [image], config, source_sizes=[(1, 1), (2, 2)])
    with pytest.raises(ValueError, match=r"its categories name 0, so left.*flip to False"):
        predict_with_tta(MaskRCNN(model.config), [image], config)
