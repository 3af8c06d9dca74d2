"""`mrcnn predict`: objects in all images of a folder, of a list or of shards, as Parquet.

A plan says what a prediction is: the digests of its model and of its inputs, and the options that its bytes depend on.
A folder with another plan is refused; in one with the same, only what is missing is computed (pipelines/predict.py,
pipelines/predict_folder.py). manifest.json is written when all is there; pictures, the report and the COCO results are
made from what is finished.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tqdm import tqdm

from jobs.cluster import ClusterSize, cluster_size
from jobs.registry import ResolvedModel, resolve_model
from mrcnn.structures import Category
from mrcnn.weights import CONFIG_FILE
from pipelines.accounts import reasons_in
from pipelines.coco_file import write_coco_results
from pipelines.inputs import Chunk, Inputs, ShardInputs, open_inputs
from pipelines.manifest import check_sum
from pipelines.overlays import Chosen, DrawSettings, choose, draw
from pipelines.predict import (
    READ_THREADS,
    SCHEMA_VERSION,
    ModelPool,
    PredictSettings,
    model_pool,
    predict_chunks,
)
from pipelines.predict_folder import (
    MANIFEST,
    OVERLAYS,
    PARTS,
    REJECTS_FILE,
    REPORT,
    RESULTS_FILE,
    Plan,
    check_free,
    claim,
    conclude,
    read_json,
    tidy,
    write_chunks,
    write_model,
)
from pipelines.predict_options import PredictOptions, PredictRun
from pipelines.predictor import load_predictor
from pipelines.report import write_report
from pipelines.sources.image_files import is_list
from pipelines.stages import Stopwatch, describe
from pipelines.storage import Store, open_store

CHUNKS = 64  # wished for, within the bounds, in images, of each
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 1024
MOST_THREADS = 8  # of one actor, where there are more CPUs than actors


@dataclass(frozen=True)
class PredictSummary:
    """What a prediction found, and what of it was computed now."""

    model: str
    out: str
    images: int
    detections: int
    rejects_by_reason: dict[str, int]
    images_made: int
    """In this run; the others were there already"""
    chunks: int
    chunks_made: int
    overlays: int
    seconds: float
    stages: str
    """Where the actors' time went, in words; empty where they had nothing to do"""
    stage_seconds: dict[str, float]
    """The same by stage, of all actors together"""
    has_coco_results: bool

    def __str__(self) -> str:
        rejects = sum(self.rejects_by_reason.values())
        lines = [
            f"{self.images} images, {rejects} rejects, {self.detections} detections by {self.model}",
            f"predicted now: {self.images_made} images in {self.seconds:.1f} s, "
            f"{self.images_made / self.seconds:.1f} images/s",
            f"chunks: {self.chunks_made} made now, {self.chunks - self.chunks_made} were finished before",
        ]
        lines += [self.stages] if self.stages else []
        lines += [f"rejected images: {count} x {reason}" for reason, count in self.rejects_by_reason.items()]
        files = [f"{PARTS}/*.parquet", REJECTS_FILE, MANIFEST, *([RESULTS_FILE] if self.has_coco_results else [])]
        lines.append(f"{self.out}: {', '.join(files)}")
        lines.append(f"{self.out}/{REPORT}: what was found, as a web page with pictures")
        if self.overlays:
            lines.append(f"{self.out}/{OVERLAYS}: {self.overlays} pictures")
        return "\n".join(lines)


@dataclass
class _Made:
    """Sums over what actors have done in this run."""

    images: int = 0
    rejects: int = 0
    chunks: int = 0
    wall: float = 0.0
    watch: Stopwatch = field(default_factory=Stopwatch)

    @property
    def stages(self) -> str:
        return describe(self.watch.seconds, images=self.images, wall=self.wall) if self.wall else ""


@dataclass(frozen=True)
class PreparedPrediction:
    """A prediction of which all is known but the chunks that are to be made."""

    resolved: ResolvedModel
    categories: tuple[Category, ...]
    inputs: Inputs
    out: Store
    options: PredictOptions
    run: PredictRun
    plan: Plan
    finished: set[int] | None
    """Numbers of chunks; None where all is"""
    chosen: Chosen
    seconds: float
    """That this took"""

    @property
    def chunk_size(self) -> int:
        """Images of each chunk but the last."""
        return int(self.plan["chunk_size"])

    @property
    def chunks(self) -> int:
        """How many there are."""
        return -(-self.inputs.count // self.chunk_size)

    @property
    def needs_ray(self) -> bool:
        """Whether there may be something to compute."""
        return self.finished is not None or bool(self.chosen)

    def missing(self) -> Iterator[Chunk]:
        """The chunks that are to be made."""
        finished = range(self.chunks) if self.finished is None else self.finished
        return (chunk for chunk in self.inputs.chunks(self.chunk_size) if chunk.number not in finished)


def predict(
    model: str,
    images: str,
    out: str,
    *,
    options: PredictOptions | None = None,
    run: PredictRun | None = None,
) -> PredictSummary:
    """Find objects in all images, or in those that are missing in `out`; Ray must be running.

    `model` is a folder or models:/..., `images` a folder, a .txt file of URIs or a folder of shards.

    Raises:
        FileNotFoundError, PermissionError, ValueError: for a model, images or an output folder that cannot be
            used, such as one with the predictions of another model.
        RuntimeError: if results and rejects do not add up to the inputs.
    """
    return run_prediction(prepare(model, images, out, options=options, run=run))


def prepare(
    model: str,
    images: str,
    out: str,
    *,
    options: PredictOptions | None = None,
    run: PredictRun | None = None,
) -> PreparedPrediction:
    """List the inputs, and make the output folder this prediction's. Needs no Ray: what is wrong is told at once.

    Raises as `predict`.
    """
    options, run, started = options or PredictOptions(), run or PredictRun(), time.monotonic()
    store = open_store(out).check_answers()
    if not is_list(images) and f"{store.uri}/".startswith(f"{open_store(images).uri}/"):
        raise ValueError(f"--out {store.uri} lies in --images: its pictures would be taken for images")
    resolved = resolve_model(model)
    predictor = load_predictor(resolved.files, model, options)
    inputs = open_inputs(images, max_pixels=options.max_pixels)
    if options.tile and isinstance(inputs, ShardInputs):
        raise ValueError(f"--tile is for images in their own size, but {images} holds shards: give the images")
    size = min(max(-(-inputs.count // CHUNKS), SMALLEST_CHUNK), LARGEST_CHUNK)
    plan = {
        "schema_version": SCHEMA_VERSION,
        "model_sha256": resolved.sha256,
        "images": inputs.uri,
        "inputs_sha256": inputs.sha256,
        **predictor.plan,
        "chunk_size": size,
    }
    check_free(store, plan)
    chosen = choose(inputs, run, size)
    return PreparedPrediction(
        resolved=resolved,
        categories=predictor.model.categories,
        inputs=inputs,
        out=store,
        options=options,
        run=run,
        plan=plan,
        finished=claim(store, plan, inputs, size),
        chosen=chosen,
        seconds=time.monotonic() - started,
    )


def run_prediction(prepared: PreparedPrediction) -> PredictSummary:
    """Make the chunks that are missing, and finish. Ray must be running where `needs_ray`. Raises as `predict`."""
    started, out = time.monotonic(), prepared.out
    made = _Made()
    if prepared.finished is not None:
        made = _predict_missing(prepared)
        conclude(out, prepared.plan, _about(prepared), images=prepared.inputs.count, chunks=prepared.chunks)
    manifest = read_json(out, MANIFEST)
    drawn = DrawSettings(prepared.inputs.reader, out, prepared.categories, prepared.options.max_pixels)
    overlays = draw(prepared.chosen, drawn) if prepared.chosen else 0
    if prepared.run.coco_results and not out.exists(RESULTS_FILE):
        write_coco_results(out, [part["part"] for part in manifest["parts"]], manifest["totals"]["detections"])
    tidy(out)
    if not out.exists(REPORT):
        write_report(prepared.inputs, manifest, drawn)
    return PredictSummary(
        model=prepared.resolved.version or prepared.resolved.uri,
        out=out.uri,
        images=manifest["totals"]["images"],
        detections=manifest["totals"]["detections"],
        rejects_by_reason=reasons_in(out, REJECTS_FILE),
        images_made=made.images,
        chunks=prepared.chunks,
        chunks_made=made.chunks,
        overlays=overlays,
        seconds=prepared.seconds + time.monotonic() - started,
        stages=made.stages,
        stage_seconds=made.watch.seconds,
        has_coco_results=out.exists(RESULTS_FILE),
    )


def _predict_missing(prepared: PreparedPrediction) -> _Made:
    """Give the actors their chunks, and add up what they say of them."""
    made, run, numbers = _Made(), prepared.run, write_chunks(prepared.out, prepared.missing())
    if not numbers:
        return made
    pool = model_pool(len(numbers), actors=run.actors, gpus_per_actor=run.gpus_per_actor)
    size = cluster_size()
    _check_room(run, pool, size)
    write_model(prepared.out, prepared.resolved.files)
    threads = min(max(size.total("CPU") // pool.actors, READ_THREADS), MOST_THREADS)
    settings = PredictSettings(prepared.inputs.reader, prepared.out, prepared.options, threads)
    last = prepared.inputs.count - prepared.chunk_size * (prepared.chunks - 1)
    total = sum(last if number == prepared.chunks - 1 else prepared.chunk_size for number in numbers)
    with tqdm(total=total, unit="image", desc="predict", disable=None) as bar:
        for receipt in predict_chunks(numbers, settings, pool):
            made.images += receipt.rows + receipt.rejects
            made.rejects += receipt.rejects
            made.chunks += 1
            made.wall += receipt.wall
            made.watch.add(receipt.seconds)
            bar.set_postfix(rejects=made.rejects, refresh=False)
            bar.update(receipt.rows + receipt.rejects)
    check_sum("images", total, made.images - made.rejects, made.rejects)
    return made


def _check_room(run: PredictRun, pool: ModelPool, size: ClusterSize) -> None:
    """Raise ValueError for more actors than there is room for: Ray would wait for ever."""
    wanted = run.actors or 1
    if wanted > pool.room and not size.may_grow:
        takes = f"{pool.gpus_per_actor:g} GPUs" if pool.gpus_per_actor else "a CPU"
        raise ValueError(f"--actors {wanted} of {takes} each, but Ray has {size}: ask for at most {pool.room}")


def _about(prepared: PreparedPrediction) -> dict[str, Any]:
    """What the manifest says beside the plan and the sums."""
    model = prepared.resolved
    return {
        "model": {"uri": model.uri, "version": model.version, "config": json.loads(model.files[CONFIG_FILE])},
        "categories": [{"label": i, **asdict(each)} for i, each in enumerate(prepared.categories, start=1)],
    }
