"""`mrcnn benchmark predict`: images a second of `mrcnn predict` against a plain loop around torchvision's model.

The same weights (jobs/benchmark_peers.py) look at the same JPEGs, and both write COCO results, which have to be the
same. The loop is what one writes first: Pillow, the model, its pasting, pycocotools, one image after the other in this
process, with as many threads as ours has CPUs. Ours is the command itself with an actor on each CPU, on few images and
on more: the time between the two is that of the further images; what its processes take to start is told beside it.
"""

from __future__ import annotations

import io
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import ray
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor
from torchvision.models.detection import MaskRCNN as TorchvisionMaskRCNN
from torchvision.transforms.functional import to_tensor

from jobs.benchmark import machine_of, torch_threads
from jobs.benchmark_data import copied, jpegs_in, made_jpegs
from jobs.benchmark_names import PredictBenchmarkName
from jobs.benchmark_peers import find_objects, ours_of, torchvision_model
from jobs.cluster import ray_session
from jobs.predict import SMALLEST_CHUNK, PredictSummary, predict
from jobs.presets import PRESETS
from mrcnn.config import ModelConfig
from mrcnn.structures import Category
from mrcnn.weights import save_model
from pipelines.predict_folder import RESULTS_FILE
from pipelines.predict_options import PredictRun
from pipelines.stages import STAGES, Stopwatch

IMAGES = 8  # different ones
SAME_BOX, SAME_SCORE, SAME_MASK = 1.0, 0.02, 0.95  # pixels, difference, IoU
SAME_SHARE = 0.97  # of the detections: near ties of scores or overlaps fall either way

Results = list[dict[str, Any]]
Seconds = dict[str, float]


@dataclass(frozen=True)
class PredictCase:
    """Which model, and how much of it is timed."""

    what: str
    model: ModelConfig
    further_chunks: int
    """That each CPU gets more in the long run than the one of the short run"""


CASES: dict[PredictBenchmarkName, PredictCase] = {
    "predict": PredictCase("R-50-FPN, 800 px", replace(PRESETS["r50_fpn"].model, num_classes=90), 1),
    "predict-small": PredictCase("r18_fpn_small, 320 px", PRESETS["r18_fpn_small"].model, 4),
}
"""R-50-FPN has torchvision's 90 classes. torchvision's parts make up the small preset, too; it is converted as any
model of torchvision's, so that resizing, anchors, RoIAlign and pasting are torchvision's in both."""


@dataclass(frozen=True)
class PredictReport:
    """What `mrcnn benchmark predict` prints and writes."""

    machine: dict[str, str | int]
    what: str
    images: int
    """Different ones"""
    detections: float
    """An image"""
    ours: float
    """Images a second, of those that the long run has more"""
    torchvision: float
    start: float
    """Seconds that ours takes before and after its images, whatever their number, in a Ray that runs"""
    ours_stages: Seconds
    """An image, in an actor, of which one runs on each CPU; decoding and masks, which are made beside the model, in CPU
    seconds"""
    torchvision_stages: Seconds
    """An image, in the loop, which has all CPUs; decoding includes the resizing of both"""
    same: float
    """Share of the detections that both have"""
    repeats: int

    @property
    def ratio(self) -> float:
        """How many times as many images ours does."""
        return self.ours / self.torchvision

    def __str__(self) -> str:
        lines = [f"{name}: {value}" for name, value in self.machine.items()]
        about = f"{self.what}: {self.images} images, {self.detections:.0f} detections each, {self.same:.1%} the same"
        lines += ["", f"{about} (medians of {self.repeats})", f"{'':18}  mrcnn predict  torchvision loop  ratio"]
        lines.append(f"{'images/s':18}  {self.ours:13.3f}  {self.torchvision:16.3f}  {self.ratio:5.2f}")
        for stage in STAGES:
            ours, theirs = self.ours_stages[stage], self.torchvision_stages[stage]
            lines.append(f"{f'{stage}, s/image':18}  {ours:13.4f}  {theirs:16.4f}")
        lines += ["", f"ours: seconds of one actor of {self.machine['threads']}, an actor on each CPU"]
        lines.append(f"the loop: seconds of its process, which has {self.machine['threads']} threads")
        return "\n".join([*lines, f"ours takes {self.start:.1f} s more, whatever the number of images"])

    def write(self, file: str) -> None:
        """Write all of it as a local JSON file."""
        Path(file).write_text(json.dumps({**asdict(self), "ratio": self.ratio}, indent=2) + "\n")


def run_predict_benchmark(
    name: PredictBenchmarkName,
    images: str | None = None,
    *,
    cpus: int = 2,
    repeats: int = 5,
    case: PredictCase | None = None,
) -> PredictReport:
    """Time both on the first JPEGs of a local folder, or on made ones of COCO's sizes, `repeats` times in turn.

    Raises:
        ValueError: for a folder without JPEGs, or numbers below 1.
        RuntimeError: where the two do not find the same.
    """
    for argument, value in (("threads", cpus), ("repeats", repeats)):
        if value < 1:
            raise ValueError(f"{argument} is {value}, but must be at least 1: 2 CPUs and 5 repeats are the default")
    case = case or CASES[name]
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="mrcnn-benchmark-")))
        files = made_jpegs(folder / "made", IMAGES) if images is None else jpegs_in(images)[:IMAGES]
        stack.enter_context(torch_threads(cpus))
        stack.enter_context(ray_session(cpus))
        return _Benchmark(case, files, folder, cpus).run(repeats)


class _Benchmark:
    """Both sides, with all that they need in a folder."""

    def __init__(self, case: PredictCase, files: Sequence[Path], folder: Path, cpus: int) -> None:
        self.case, self.files, self.folder, self.cpus = case, files, folder, cpus
        torch.manual_seed(0)
        self.peer = torchvision_model(case.model)
        find_objects(self.peer, _read(files[0].read_bytes()))
        ours = ours_of(self.peer, case.model)
        self.categories = ours.categories
        save_model(ours, folder / "model")
        self.few = SMALLEST_CHUNK * cpus
        self.further = self.few * case.further_chunks
        counts = {"warm": 1, "short": self.few, "long": self.few + self.further}
        self.inputs = {name: copied(files, folder / name, count) for name, count in counts.items()}

    def run(self, repeats: int) -> PredictReport:
        """Warm up with an image, measure, and see that both have found the same."""
        self._loop(1)
        self._ours("warm")
        loops = list[tuple[float, Seconds]]()
        runs: dict[str, list[tuple[float, PredictSummary]]] = {"short": [], "long": []}
        for _ in range(repeats):
            for inputs, done in runs.items():
                loops.append(self._loop(len(self.files)))
                done.append(self._ours(inputs))
        same = check_same(*self._results())
        short, long = (statistics.median(seconds for seconds, _ in done) for done in runs.values())
        speed, summaries = further_speed(short, long, self.further), [summary for _, summary in runs["long"]]
        return PredictReport(
            machine=machine_of(torch.device("cpu"), self.cpus) | {"ray": ray.__version__, "Pillow": PIL.__version__},
            what=self.case.what,
            images=len(self.files),
            detections=summaries[0].detections / summaries[0].images,
            ours=speed,
            torchvision=len(self.files) / statistics.median(seconds for seconds, _ in loops),
            start=short - self.few / speed,
            ours_stages=_of_an_image([each.stage_seconds for each in summaries], summaries[0].images),
            torchvision_stages=_of_an_image([stages for _, stages in loops], len(self.files)),
            same=same,
            repeats=repeats,
        )

    def _ours(self, inputs: str) -> tuple[float, PredictSummary]:
        out = self.folder / "ours"
        shutil.rmtree(out, ignore_errors=True)
        run = PredictRun(actors=self.cpus, gpus_per_actor=0, coco_results=True)
        begun = time.perf_counter()
        summary = predict(str(self.folder / "model"), str(self.inputs[inputs]), str(out), run=run)
        return time.perf_counter() - begun, summary

    def _loop(self, images: int) -> tuple[float, Seconds]:
        files = sorted(self.inputs["long"].iterdir())[:images]
        begun = time.perf_counter()
        seconds = plain_loop(self.peer, files, self.folder / "peer.json", self.categories)
        return time.perf_counter() - begun, seconds

    def _results(self) -> tuple[Results, Results]:
        """Of each different image once; names of files are image ids, and count them."""
        files = self.folder / "ours" / RESULTS_FILE, self.folder / "peer.json"
        ours, theirs = (json.loads(file.read_text()) for file in files)
        return [each for each in ours if each["image_id"] < len(self.files)], theirs


def further_speed(short: float, long: float, further: int) -> float:
    """Images a second of those that the long run has more. Raises RuntimeError where they seem to take no time."""
    if long <= short:
        raise RuntimeError(
            f"{further} further images take {long - short:.1f} s: something else runs on this machine; "
            "measure again, with more --repeats"
        )
    return further / (long - short)


@torch.inference_mode()
def plain_loop(peer: TorchvisionMaskRCNN, files: Sequence[Path], out: Path, categories: Sequence[Category]) -> Seconds:
    """COCO results of images, one after the other; file names are image ids. Returns seconds of each stage.

    The parts of the model are called as its `forward` calls them, so that each can be timed.
    """
    watch, results = Stopwatch(), Results()
    for file in files:
        with watch("reading"):
            data = file.read_bytes()
        with watch("decoding"):
            image = _read(data)
            batch, _ = peer.transform([image])
        with watch("model"):
            features = peer.backbone(batch.tensors)
            proposals, _ = peer.rpn(batch, features)
            found, _ = peer.roi_heads(features, proposals, batch.image_sizes)
        with watch("masks"):
            (whole,) = peer.transform.postprocess(found, batch.image_sizes, [(image.shape[1], image.shape[2])])
            results += _entries(int(file.stem), whole, categories)
    with watch("writing"):
        out.write_text(json.dumps(results))
    return watch.seconds


def _read(data: bytes) -> Tensor:
    with Image.open(io.BytesIO(data)) as image:
        pixels: Tensor = to_tensor(image.convert("RGB"))
    return pixels


def _entries(image_id: int, found: Mapping[str, Tensor], categories: Sequence[Category]) -> Results:
    """What torchvision's model found, as COCO has it; its pasting is done."""
    masks = (found["masks"][:, 0] >= 0.5).to(torch.uint8).numpy()
    rles = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0)))
    boxes = torch.cat([found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]], dim=1)
    rows = zip(found["labels"].tolist(), boxes.tolist(), found["scores"].tolist(), rles, strict=True)
    return [
        {
            "image_id": image_id,
            "category_id": categories[label - 1].id,
            "bbox": box,
            "score": score,
            "segmentation": {"size": rle["size"], "counts": rle["counts"].decode()},
        }
        for label, box, score, rle in rows
    ]


def check_same(ours: Results, theirs: Results) -> float:
    """The share of detections that have a partner on the other side: of the same class, with nearly the same box, score
    and mask.

    Raises RuntimeError where they are too few: a comparison of different work is worth nothing.
    """
    shares = [_share(ours, theirs), _share(theirs, ours)]
    if not min(shares) >= SAME_SHARE:
        raise RuntimeError(
            f"of {len(ours)} detections of ours and {len(theirs)} of torchvision's only {shares[0]:.1%} and "
            f"{shares[1]:.1%} are the same, and {SAME_SHARE:.0%} have to be: their speeds cannot be compared"
        )
    return min(shares)


def _share(some: Results, others: Results) -> float:
    """Of `some` that have a partner among the others; not a number where there are none."""
    partners: dict[tuple[int, int], Results] = {}
    for each in others:
        partners.setdefault((each["image_id"], each["category_id"]), []).append(each)
    found = [any(_is_same(x, y) for y in partners.get((x["image_id"], x["category_id"]), ())) for x in some]
    return sum(found) / len(found) if found else math.nan


def _is_same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    away = max(abs(a - b) for a, b in zip(one["bbox"], other["bbox"], strict=True))
    if away > SAME_BOX or abs(one["score"] - other["score"]) > SAME_SCORE:
        return False
    masks = [one["segmentation"], other["segmentation"]]
    both, either = (float(coco_mask.area(coco_mask.merge(masks, intersect=intersect))) for intersect in (True, False))
    return both >= SAME_MASK * either


def _of_an_image(runs: Sequence[Mapping[str, float]], images: int) -> Seconds:
    """Medians of several runs over so many images, for one of them."""
    return {stage: statistics.median(seconds.get(stage, 0.0) for seconds in runs) / images for stage in STAGES}
