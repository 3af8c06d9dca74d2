"""Every phase of every schedule, in one process: what learns, that nothing else moves, and where its files are."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

import pytest
import torch
from made_shards import make_shards, row
from models import SMALL

from jobs.cli import parse_train
from jobs.config import OptimizerConfig, RPNTraining, TrainConfig, TrainJob
from jobs.engine import Engine
from jobs.schedule import SCHEDULES, Phase, phase_uris, phases_of_run
from jobs.train import train
from jobs.worker import read_model
from mrcnn import MaskRCNN, ModelConfig, save_model
from mrcnn.rpn import Proposals
from mrcnn.structures import ImageBatch, Targets
from mrcnn.training_parts import TrainedPart
from pipelines import patience
from pipelines.dataset import ShardDataset
from pipelines.storage import Store, open_store
from pipelines.storage_errors import UnreachableError

PHASES = {f"{mode} {phase.name}": (mode, phase) for mode, phases in SCHEDULES.items() for phase in phases}
Batch = tuple[ImageBatch, Targets]


def model_for(mode: RPNTraining) -> MaskRCNN:
    """SMALL, but with batch norm, whose statistics would move, and a frozen stem."""
    config: ModelConfig = replace(
        SMALL,
        backbone=replace(SMALL.backbone, norm="bn", fpn_norm="bn", frozen_stages=1),
        rpn=replace(SMALL.rpn, features="own" if mode == "separate" else "shared"),
        # canonical_size: the proposals below come from all levels
        roi=replace(SMALL.roi, box_convs=1, box_conv_channels=32, box_norm="bn", canonical_size=40),
    )
    torch.manual_seed(0)
    return MaskRCNN(config)


def engine_for(model: MaskRCNN, phase: Phase) -> Engine:
    config = TrainConfig(optimizer=OptimizerConfig(warmup_steps=0, base_lr=0.01))
    return Engine(TrainedPart(model, phase.part, phase.learns), config, torch.device("cpu"))


def test_a_phase_waits_for_the_storage_of_the_model_that_it_starts_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model_for("joint"), tmp_path)
    away, read = [1, 2], Store.read_bytes

    def stumbling(self: Store, name: str) -> bytes:
        if away:
            away.pop()
            raise UnreachableError("s3://bucket cannot be reached")
        return read(self, name)

    monkeypatch.setattr(patience, "BETWEEN_TRIES", 0.01)
    monkeypatch.setattr(Store, "read_bytes", stumbling)
    assert read_model(str(tmp_path)).config == model_for("joint").config
    assert not away


@pytest.mark.parametrize("which", ["data", "val_data"])
def test_data_that_nothing_can_be_learnt_from_is_refused_before_anything_begins(tmp_path: Path, which: str) -> None:
    uris = {name: make_shards(tmp_path / name, [row(1, (32, 32))]) for name in ("data", "val_data")}
    bare = ShardDataset(make_shards(tmp_path / "bare", [row(1, (32, 32))]))
    empty = make_shards(tmp_path / "empty", [])
    with pytest.raises(ValueError, match=f"{empty} holds no images: look at its rejects.parquet"):
        train(TrainJob(**{"storage": str(tmp_path), "run": "r", **uris, which: empty}), TrainConfig())
    replace(bare.manifest, categories=()).write(open_store(bare.uri))
    with pytest.raises(ValueError, match=f"{bare.uri} has no categories, and so no annotations: build it from"):
        train(TrainJob(**{"storage": str(tmp_path), "run": "r", **uris, which: bare.uri}), TrainConfig())


def proposals_for(phase: Phase) -> Proposals | None:
    """For two images, one for each level of features."""
    if phase.part != "detector":
        return None
    boxes = torch.tensor([[4.0, 2.0, 4.0 + side, 2.0 + side] for side in (8, 22, 45, 90)]).expand(2, -1, -1)
    return Proposals(boxes=boxes, scores=torch.zeros(2, 4), valid=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", PHASES)
def test_what_learns_gets_gradients_and_nothing_else_moves(name: str, small_batch: Batch) -> None:
    mode, phase = PHASES[name]
    model = model_for(mode)
    proposals = proposals_for(phase)
    engine = engine_for(model, phase)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    losses = engine.train_step(*small_batch, proposals)
    model.train()  # as an evaluation in between leaves it
    engine.model.train()
    engine.train_step(*small_batch, proposals)
    parameters = dict(model.named_parameters())
    for key, value in model.state_dict().items():
        learns = key.split(".")[0] in phase.learns and not key.startswith(("backbone.stem.", "rpn_backbone.stem."))
        assert torch.equal(value, before[key]) != learns, key
        if key in parameters:
            gradient = parameters[key].grad
            assert (gradient is not None and bool(gradient.any())) == learns, key
    rpn_losses = {"loss_objectness", "loss_rpn_box_reg"}
    detector_losses = {"loss_classifier", "loss_box_reg", "loss_mask"}
    expected = {"all": rpn_losses | detector_losses, "rpn": rpn_losses, "detector": detector_losses}[phase.part]
    assert set(losses) == {"loss", *expected}


def test_all_of_a_model_is_the_model(small_model: MaskRCNN, small_batch: Batch) -> None:
    (phase,) = SCHEDULES["joint"]
    losses = TrainedPart(small_model, phase.part, phase.learns)(*small_batch)
    expected = small_model(*small_batch)
    assert losses.keys() == expected.keys()
    assert all(torch.equal(losses[key], expected[key]) for key in expected)
    assert all(parameter.requires_grad for parameter in small_model.parameters())


def test_a_detector_needs_proposals(small_model: MaskRCNN, small_batch: Batch) -> None:
    part = TrainedPart(small_model, "detector", ("backbone", "roi_heads"))
    with pytest.raises(ValueError, match="proposals is None, but a detector trained apart needs them"):
        part(*small_batch)


@pytest.mark.parametrize("mode", get_args(RPNTraining))
def test_a_schedule_trains_everything_on_what_there_is(mode: RPNTraining) -> None:
    phases = SCHEDULES[mode]
    model = model_for(mode)
    modules = {name for name, _ in model.named_children() if list(model.get_submodule(name).parameters())}
    assert {name for phase in phases for name in phase.learns} == modules
    for i, phase in enumerate(phases):
        earlier = {each.name for each in phases[:i]}
        assert {phase.after, phase.proposals_of} - {None} <= earlier
        assert (phase.proposals_of is not None) == (phase.part == "detector")


def test_phases_have_their_own_folders_and_steps() -> None:
    (joint,) = phases_of_run(TrainConfig(steps=10), "s3://runs/a")
    assert (joint.uri, joint.model_uri, joint.first_step, joint.label) == ("s3://runs/a", "s3://runs/a/model", 0, "")
    first, *_, last = phases_of_run(TrainConfig(steps=10, rpn="four_step"), "r")
    assert (first.uri, first.model_uri, first.start_uri) == ("r/1-rpn", "r/1-rpn/model", None)
    assert (last.uri, last.model_uri, last.start_uri) == ("r/4-detector", "r/model", "r/3-rpn/model")
    assert (last.proposer_uri, last.first_step, last.label) == ("r/3-rpn/model", 30, "4-detector: ")
    assert phase_uris("r") == ["r", "r/1-rpn", "r/2-detector", "r/3-rpn", "r/4-detector"]


def test_the_command_line_has_the_ways() -> None:
    words = ["--data", "d", "--val-data", "v", "--storage", "s", "--run", "r"]
    assert parse_train(["toy", *words])[1].rpn == "joint"
    assert parse_train(["toy", *words, "--rpn", "four_step"])[1].rpn == "four_step"


def test_features_of_its_own_are_for_a_separate_rpn() -> None:
    own = replace(SMALL, rpn=replace(SMALL.rpn, features="own"))
    for mode in ("joint", "four_step"):
        with pytest.raises(ValueError, match=rf"model\.rpn\.features is 'own', but must be shared with rpn={mode}"):
            TrainConfig(model=own, rpn=mode)
    assert TrainConfig(model=own, rpn="separate").model.rpn.features == "own"
