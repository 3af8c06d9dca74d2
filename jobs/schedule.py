"""The ways of training the RPN: which parts of the model learn in which phase, and from what.

joint      all at once, as in the Mask R-CNN that the paper times.
separate   an RPN on features of its own, then a detector on its proposals: the paper's ablations.
four_step  Faster R-CNN's alternating training (arXiv 1506.01497, section 3.2), after which RPN and detector share
           their features. As in its authors' code, step 3 begins with a new RPN head on the detector's features.

Every phase takes `steps` steps with a learning-rate schedule of its own. The images go on over the phases, as do the
steps that are logged.
"""

from __future__ import annotations

from dataclasses import dataclass

from jobs.config import RPNTraining, TrainConfig
from mrcnn.training_parts import Part


@dataclass(frozen=True)
class Phase:
    """One training of some modules of the model."""

    name: str
    """Also of its folder"""
    part: Part
    """Whose losses are minimised"""
    learns: tuple[str, ...]
    """The modules of the model that learn; the others stay as they are"""
    after: str | None = None
    """The phase from whose model it starts; None: from the run's initial weights"""
    proposals_of: str | None = None
    """The phase whose RPN proposes what the detector trains on"""


SCHEDULES: dict[RPNTraining, tuple[Phase, ...]] = {
    "joint": (Phase("joint", "all", learns=("backbone", "rpn", "roi_heads")),),
    "separate": (
        Phase("1-rpn", "rpn", learns=("rpn_backbone", "rpn")),
        Phase("2-detector", "detector", learns=("backbone", "roi_heads"), after="1-rpn", proposals_of="1-rpn"),
    ),
    "four_step": (
        Phase("1-rpn", "rpn", learns=("backbone", "rpn")),
        Phase("2-detector", "detector", learns=("backbone", "roi_heads"), proposals_of="1-rpn"),
        Phase("3-rpn", "rpn", learns=("rpn",), after="2-detector"),
        Phase("4-detector", "detector", learns=("roi_heads",), after="3-rpn", proposals_of="3-rpn"),
    ),
}


@dataclass(frozen=True)
class PhaseOfRun:
    """A phase in its place in a run: where its files are, and which of the run's steps are its own."""

    phase: Phase
    run_uri: str
    number: int
    """From 0"""
    steps: int
    """Of this phase"""
    is_last: bool
    """Only then the model is a whole detector, which is evaluated"""

    @property
    def uri(self) -> str:
        """Folder of its checkpoints and outcome."""
        return _folder(self.run_uri, self.phase.name)

    @property
    def model_uri(self) -> str:
        """Folder of the model that it ends with."""
        return f"{self.run_uri if self.is_last else self.uri}/model"

    @property
    def start_uri(self) -> str | None:
        """Folder of the model that it starts from, if not from the run's initial weights."""
        return f"{_folder(self.run_uri, self.phase.after)}/model" if self.phase.after else None

    @property
    def proposer_uri(self) -> str | None:
        """Folder of the model whose proposals it trains on."""
        return f"{_folder(self.run_uri, self.phase.proposals_of)}/model" if self.phase.proposals_of else None

    @property
    def first_step(self) -> int:
        """Steps of the run before it."""
        return self.number * self.steps

    @property
    def label(self) -> str:
        """What its lines begin with; nothing where there is one phase only."""
        return "" if self.number == 0 and self.is_last else f"{self.phase.name}: "


def phases_of_run(config: TrainConfig, run_uri: str) -> list[PhaseOfRun]:
    """The phases of a run, in order."""
    phases = SCHEDULES[config.rpn]
    return [PhaseOfRun(phase, run_uri, i, config.steps, phase is phases[-1]) for i, phase in enumerate(phases)]


def phase_uris(run_uri: str) -> list[str]:
    """Folders that phases of any schedule have in a run's folder."""
    names = dict.fromkeys(phase.name for phases in SCHEDULES.values() for phase in phases)
    return [_folder(run_uri, name) for name in names]


def _folder(run_uri: str, name: str) -> str:
    return run_uri if name == "joint" else f"{run_uri}/{name}"
