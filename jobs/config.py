"""What to train, and the settings of a training run. What a model is made of stands in mrcnn/config.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from mrcnn.config import ModelConfig
from mrcnn.settings import check_choices, dataclass_from_dict, require

RPNTraining = Literal["joint", "separate", "four_step"]


@dataclass(frozen=True)
class WorkerRange:
    """How many workers a training may have. With more than one possible number it is elastic."""

    fewest: int
    most: int

    @classmethod
    def parse(cls, text: str) -> WorkerRange:
        """Of "4", or of "1:4". Raises ValueError for anything else."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
        fewest, most = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
        require(
            1 <= fewest <= most,
            "workers",
            text,
            "a number of at least 1, or FEWEST:MOST",
            "4 is four processes, 1:4 as many as the cluster has room for",
        )
        return cls(fewest, most)

    @property
    def is_elastic(self) -> bool:
        return self.fewest < self.most


@dataclass(frozen=True)
class TrainJob:
    """What to train on, where to keep it, with how many workers."""

    data: str
    """Shards to train on: a folder that `mrcnn build-data` wrote."""
    val_data: str
    """Shards to evaluate on."""
    storage: str
    """Folder of all runs; checkpoints and the model go to STORAGE/RUN."""
    run: str
    """Name of the run, new unless it is resumed."""
    workers: str = "1"
    """Processes that train together (DDP), one a GPU where there are GPUs, else one a CPU; or FEWEST:MOST, as 1:4: as
    many as there are nodes for, when it begins, after nodes were lost, and when nodes have come. The global batch and
    the learning rate stay."""
    device: Literal["auto", "gpu", "cpu"] = "auto"
    """What they compute on. auto: GPUs, if the cluster has any when training begins. gpu: also those that an
    autoscaler has yet to start."""
    resize_every: float = 600.0
    """Seconds between two looks for room for more workers, with FEWEST:MOST. Who finds it goes on from the newest
    checkpoint: what was done since is done again."""
    resume: bool = False
    """Go on with a run from its newest checkpoint."""
    weights: str | None = None
    """Local file to start from: an ImageNet body (torchvision's .pth, detectron2's .pkl) or a whole model (its
    .safetensors, or torchvision's or detectron2's own file)."""
    evaluate_beside: Literal["auto", "no"] = "auto"
    """auto: where the cluster has a GPU more than the workers take (a CPU, where it has no GPUs), checkpoints are
    evaluated there while training goes on; elsewhere, as with no, training waits for it. The numbers are the same."""
    experiment: str = "mask-rcnn"
    """MLflow experiment; one for each data set keeps runs comparable."""

    def __post_init__(self) -> None:
        WorkerRange.parse(self.workers)
        require(self.resize_every > 0, "resize_every", self.resize_every, "positive", "600 is ten minutes")
        require(
            bool(re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.run)),
            "run",
            self.run,
            "letters, digits, '.', '_' and '-'",
            "it names a folder",
        )

    @property
    def worker_range(self) -> WorkerRange:
        """`workers`, as numbers."""
        return WorkerRange.parse(self.workers)


@dataclass(frozen=True)
class OptimizerConfig:
    """SGD with the paper's schedule: linear warm-up, then steps down."""

    base_lr: float = 0.02
    """Learning rate for a global batch of 16; the rate in use is in proportion to the batch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """L2 penalty on weights; normalisation layers and biases have none."""
    warmup_steps: int = 1000
    """Steps in which the rate rises linearly from warmup_factor times its value."""
    warmup_factor: float = 1e-3
    """Where the warm-up starts."""
    decay_at: tuple[float, ...] = (0.75,)
    """Shares of all steps after which the rate is cut: the paper cuts at 120k of 160k."""
    decay_factor: float = 0.1
    """What it is multiplied by then."""
    clip_norm: float = 0.0
    """Gradients are scaled down to this norm; 0 leaves them."""

    def __post_init__(self) -> None:
        require(self.base_lr > 0, "optimizer.base_lr", self.base_lr, "positive", "the paper has 0.02")
        require(0 <= self.momentum < 1, "optimizer.momentum", self.momentum, "in [0, 1)", "the paper has 0.9")
        require(self.warmup_steps >= 0, "optimizer.warmup_steps", self.warmup_steps, "at least 0", "0 is none")
        require(
            all(0 < share <= 1 for share in self.decay_at),
            "optimizer.decay_at",
            self.decay_at,
            "shares of all steps in (0, 1]",
            "0.75 cuts the rate after three quarters of the training",
        )
        require(self.clip_norm >= 0, "optimizer.clip_norm", self.clip_norm, "at least 0", "0 clips nothing")


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides what comes out of a training, given the data."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """The model."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """SGD and its schedule."""
    rpn: RPNTraining = "joint"
    """How the RPN is trained: joint, with the detector; separate, before it and on features of its own, as in the
    paper's ablations; four_step, in turns, on features that are shared in the end (arXiv 1506.01497, section 3.2)."""
    steps: int = 160_000
    """Optimizer steps; the paper has 160k. Each phase has as many: separate has two, four_step four."""
    global_batch: int = 16
    """Images of a step over all workers."""
    seed: int = 0
    """Decides the initial weights, the order of images, flips, jitter, and what is sampled from each."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter_sides: tuple[int, ...] = ()
    """Shorter sides in pixels of which each image gets one at random in training, as 640 672 704 736 768 800; none:
    always model.input.shorter_side. Shards should be built at the largest: what is stored smaller is enlarged."""
    large_jitter: tuple[float, ...] = ()
    """Large-scale jitter: each image gets a random size between two factors, as 0.1 2.0 (arXiv 2012.07177), times its
    usual one; a window of at most the usual size is cut at random from what is larger. None: no such jitter."""
    aspect_groups: bool = True
    """Do not mix landscape and portrait images in a step, but for at most two steps of an epoch: less padding."""
    max_objects: int = 256
    """An image with more objects trains on as many, drawn anew in each epoch, so that a crowd fits into memory; the
    others are background in that epoch. Of crowd regions it keeps as many again. 0: no bound."""
    images_at_once: int = 0
    """Most images that a worker takes through the network at a time; gradients of its share of the global batch add up
    over so many passes. 0: the whole share. Losses are divided by the samples of each pass, batch norm sees one."""
    on_nan: tuple[str, ...] = ("stop",)
    """What to do where the loss is NaN or infinite: stop, or skip N: leave out up to N such batches, then stop."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16 runs convolutions and matrix products in bfloat16 (autocast); weights and losses stay float32."""
    compile: bool = False
    """torch.compile the backbone: minutes at the start for faster steps, most of all on GPUs; needs a C++ compiler."""
    log_every: int = 20
    """Steps between two reports of losses; only then does the host wait for the device."""
    evaluate_every: int = 5000
    """Steps between two evaluations on the validation data, each of a checkpoint; there is always one at the end."""
    checkpoint_every: int = 1000
    """Steps between two checkpoints; there is always one at the end."""
    keep_checkpoints: int = 3
    """How many of the newest checkpoints stay; so do the best one, and those that wait for their evaluation."""
    loader_threads: int = 2
    """Threads that read and decode images in each worker."""
    pictures: int = 4
    """Validation images drawn with their detections at each evaluation."""

    def __post_init__(self) -> None:
        check_choices(self)
        for name in (
            "steps",
            "global_batch",
            "log_every",
            "evaluate_every",
            "checkpoint_every",
            "keep_checkpoints",
            "loader_threads",
        ):
            value = getattr(self, name)
            require(value >= 1, name, value, "at least 1", "give a positive number")
        require(self.pictures >= 0, "pictures", self.pictures, "at least 0", "0 draws none")
        require(-(2**63) <= self.seed < 2**64, "seed", self.seed, "a number of 64 bits", "0 is as good as any")
        require(0 <= self.flip <= 1, "flip", self.flip, "a probability", "0.5 flips every other image")
        self._check_augmentation()
        require(self.images_at_once >= 0, "images_at_once", self.images_at_once, "at least 0", "0 is no bound")
        require(
            self.on_nan == ("stop",) or (self.on_nan[:1] == ("skip",) and self.skips_allowed > 0),
            "on_nan",
            " ".join(self.on_nan),
            "stop, or skip and a number of at least 1",
            "skip 10 leaves out up to ten batches",
        )
        require(
            self.rpn == "separate" or self.model.rpn.features == "shared",
            "model.rpn.features",
            self.model.rpn.features,
            f"shared with rpn={self.rpn}",
            "only rpn=separate trains features of the RPN's own, and sets this by itself",
        )

    def _check_augmentation(self) -> None:
        sides, factors, longer_side = self.jitter_sides, self.large_jitter, self.model.input.longer_side
        require(
            all(0 < side <= longer_side for side in sides),
            "jitter_sides",
            sides,
            f"positive and at most model.input.longer_side ({longer_side})",
            "the paper's keypoints have 640 to 800",
        )
        require(
            not factors or (len(factors) == 2 and 0 < factors[0] <= factors[1] <= 4),
            "large_jitter",
            factors,
            "two factors, the smaller one first, of more than 0 and at most 4",
            "0.1 2.0 is usual",
        )
        require(not (sides and factors), "large_jitter", factors, "empty with jitter_sides", "choose one of them")
        require(
            not factors or self.rpn == "joint",
            "large_jitter",
            factors,
            f"empty with rpn={self.rpn}",
            "stored proposals are of whole images: train with rpn=joint",
        )
        require(self.max_objects >= 0, "max_objects", self.max_objects, "at least 0", "0 is no bound")

    @property
    def skips_allowed(self) -> int:
        """Batches with a loss that is not finite that may be left out."""
        words = self.on_nan[1:]
        return int(words[0]) if len(words) == 1 and words[0].isdecimal() else 0

    def to_dict(self) -> dict[str, Any]:
        """Plain nested dict for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TrainConfig:
        """The inverse of `to_dict`. Raises ValueError for a setting that does not exist."""
        return dataclass_from_dict(cls, data)
