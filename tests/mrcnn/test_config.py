import dataclasses
import json
import re

import pytest

from jobs.config import TrainConfig
from jobs.presets import PRESETS
from mrcnn.config import BackboneConfig, InputConfig, ModelConfig, RoIConfig, RPNConfig


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_survives_json(preset: str) -> None:
    config = PRESETS[preset]
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match=r"rpn\.nms is not a setting of RPNConfig.*nms_iou"):
        ModelConfig.from_dict({"rpn": {"nms": 0.5}})


@pytest.mark.parametrize(
    ("cls", "change", "words"),
    [
        (RoIConfig, {"score_threshold": 1.0}, "roi.score_threshold is 1.0, but must be in"),
        (InputConfig, {"shorter_side": 900, "longer_side": 800}, "input.shorter_side is 900"),
        (RoIConfig, {"nms_iou": 7.0}, "roi.nms_iou is 7.0"),
        (BackboneConfig, {"name": "resnet99"}, "backbone.name is 'resnet99', but must be one of resnet18, "),
        (InputConfig, {"mean": (1.0, 2.0)}, "input.mean is (1.0, 2.0), but must be three numbers"),
        (InputConfig, {"std": (1.0, 2.0, float("nan"))}, "input.std is"),
        (RoIConfig, {"box_weights": (1.0, 1.0, 1.0)}, "roi.box_weights is (1.0, 1.0, 1.0), but must be four"),
        (RPNConfig, {"nms_iou": 7.0}, "rpn.nms_iou is 7.0"),
        (RPNConfig, {"min_size": -5.0}, "rpn.min_size is -5.0"),
        (BackboneConfig, {"fpn_channels": 40, "fpn_norm": "gn"}, "backbone.fpn_channels is 40"),
        (ModelConfig, {"num_classes": 2.5}, "num_classes is 2.5"),
        (ModelConfig, {"num_classes": 0}, "num_classes is 0"),
        (TrainConfig, {"flip": 2.0}, "flip is 2.0"),
        (TrainConfig, {"steps": 0}, "steps is 0"),
        (TrainConfig, {"loader_threads": 0}, "loader_threads is 0, but must be at least 1"),
        (TrainConfig, {"pictures": -1}, "pictures is -1, but must be at least 0"),
        (TrainConfig, {"seed": 2**64}, "seed is 18446744073709551616, but must be a number of 64 bits"),
    ],
)
def test_nonsense_is_refused_by_name(cls: type, change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        cls(**change)


@pytest.mark.parametrize("cls", [ModelConfig, TrainConfig])
def test_every_setting_is_explained(cls: type) -> None:
    """Attribute docstrings become the help of the command line."""
    import inspect

    for each in [
        cls,
        *(f.default_factory for f in dataclasses.fields(cls) if isinstance(f.default_factory, type)),
    ]:
        source = inspect.getsource(each)
        for f in dataclasses.fields(each):
            after = source.split(f"    {f.name}: ", 1)[1].split("\n", 1)[1]
            assert after.lstrip().startswith('"""'), f"{each.__name__}.{f.name}"
