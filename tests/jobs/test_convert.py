"""`mrcnn convert-weights`: a peer's file to a model's folder and back, through the command line."""

from pathlib import Path

import pytest
import torch
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from jobs.cli import main
from mrcnn import MaskRCNN, ModelConfig, load_model, save_model
from mrcnn.config import BackboneConfig, InputConfig, MaskConfig
from mrcnn.weights import to_detectron2

CONFIG = ModelConfig(
    num_classes=2,
    backbone=BackboneConfig(name="resnet18"),
    input=InputConfig(channels="bgr", mean=(103.53, 116.28, 123.675), std=(1.0, 1.0, 1.0)),
)


@pytest.fixture(scope="module")
def torchvision_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    backbone = resnet_fpn_backbone(backbone_name="resnet18", weights=None, norm_layer=FrozenBatchNorm2d)
    file = tmp_path_factory.mktemp("peer") / "coco.pth"
    torch.save(TorchvisionMaskRCNN(backbone, 91).state_dict(), file)
    return file


def test_from_torchvision_and_back(torchvision_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, back = str(tmp_path / "model"), str(tmp_path / "back.pth")
    assert main(["convert-weights", "--from", "torchvision", "--in", str(torchvision_file), "--out", folder]) == 0
    out = capsys.readouterr().out
    for words in ("resnet18 with FPN", "frozen_bn with eps 0", "boxes, masks", "90, person", "input: RGB", folder):
        assert words in out, out
    assert load_model(folder).categories[89].name == "toothbrush"
    assert main(["convert-weights", "--to", "torchvision", "--in", folder, "--out", back]) == 0
    assert "num_classes=91" in capsys.readouterr().out
    given, found = torch.load(torchvision_file), torch.load(back)
    assert given.keys() == found.keys()
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(given[name], found[name])


def test_options_of_torchvision(torchvision_file: Path, tmp_path: Path) -> None:
    words = ["--from", "torchvision", "--in", str(torchvision_file), "--out", str(tmp_path)]
    assert main(["convert-weights", *words, "--classes", "used", "--norm-eps", "1e-5"]) == 0
    config = load_model(tmp_path).config
    assert (config.num_classes, config.backbone.norm_eps) == (80, 1e-5)


def test_from_detectron2_and_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = MaskRCNN(CONFIG)
    theirs = to_detectron2(model.state_dict(), CONFIG)
    torch.save({"model": theirs, "iteration": 9}, tmp_path / "d2.pth")
    words = ["--in", str(tmp_path / "d2.pth"), "--out", str(tmp_path / "model")]
    assert main(["convert-weights", "--from", "detectron2", *words, "--stride-in-1x1", "False"]) == 0
    assert "input: BGR" in capsys.readouterr().out
    words = ["--in", str(tmp_path / "model"), "--out", str(tmp_path / "new" / "back.pth")]
    assert main(["convert-weights", "--to", "detectron2", *words]) == 0
    out = capsys.readouterr().out
    for line in ("MODEL.ROI_HEADS.NUM_CLASSES 2", "INPUT.FORMAT BGR", "MODEL.PIXEL_STD [1.0, 1.0, 1.0]"):
        assert line in out, out
    back = torch.load(tmp_path / "new" / "back.pth")["model"]
    assert all(torch.equal(back[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--in", "a", "--out", "b"), "either --from or --to"),
        (("--from", "torchvision", "--to", "detectron2", "--in", "a", "--out", "b"), "either --from or --to"),
        (("--from", "torchvision", "--in", "none.pth", "--out", "b"), "none.pth does not exist"),
        (("--from", "detectron2", "--in", "{file}", "--out", "b"), "coco.pth: 134 tensors are no part of detectron2"),
        (("--from", "detectron2", "--in", "{file}", "--out", "b", "--norm-eps", "0"), "norm_eps is torchvision's"),
        (("--from", "detectron2", "--in", "{file}", "--out", "b", "--classes", "used"), "classes is torchvision's"),
        (
            ("--from", "torchvision", "--in", "{file}", "--out", "b", "--stride-in-1x1", "True"),
            "stride_in_1x1 is detectron2's",
        ),
        (("--from", "torchvision", "--in", "{file}", "--out", "{file}"), "coco.pth is a file"),
        (("--to", "torchvision", "--in", "nothing", "--out", "b.pth"), "does not exist"),
        (("--to", "torchvision", "--in", "nothing", "--out", "."), ". is a folder"),
        (("--to", "torchvision", "--in", "mlp", "--out", "b.pth"), "mask.head is 'mlp', but must be fcn or none"),
    ],
)
def test_what_cannot_be_converted_is_refused(
    torchvision_file: Path,
    words: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    if "mlp" in words:
        mask = MaskConfig(head="mlp", fc_channels=8)
        save_model(MaskRCNN(ModelConfig(num_classes=2, backbone=BackboneConfig(name="resnet18"), mask=mask)), "mlp")
    code = main(["convert-weights", *(word.format(file=torchvision_file) for word in words)])
    assert code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--from", "torchvision", "--in", "a.pth", "--out", "s3://bucket/model"), "s3://bucket/model is a URI"),
        (("--to", "torchvision", "--in", "s3://bucket/model", "--out", "a.pth"), "s3://bucket/model is a URI"),
        (("--to", "torchvision", "--in", "model", "--out", "a.pth", "--norm-eps", "0"), "belong to --from"),
    ],
)
def test_what_would_be_ignored_is_refused(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert-weights", *words]) == 2
    assert message in capsys.readouterr().err
