"""`mrcnn predict`: objects in all images of a folder, as Parquet and as a COCO results file.

A plan says what a prediction is: the digests of its model and of its list of images. A folder with
another plan is refused; in one with the same, only what is missing is computed (see
pipelines/predict.py). manifest.json is written last.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow.parquet as pq
from ray.data import DataContext
from tqdm import tqdm

from jobs.registry import ResolvedModel, resolve_model
from mrcnn.structures import Category
from mrcnn.weights import CONFIG_FILE, model_from_files
from pipelines.predict import (
    PROGRESS,
    SCHEMA_VERSION,
    Chunk,
    ChunkReceipt,
    PredictSettings,
    cut,
    overlay_name,
    predict_chunks,
    read_receipt,
    receipt_name,
    write_receipt,
)
from pipelines.records import REJECTS, Reject, by_reason, to_parquet
from pipelines.sources.names import SUFFIXES
from pipelines.storage import Store, open_store

MANIFEST = "manifest.json"
PLAN = f"{PROGRESS}/plan.json"
REJECTS_FILE = "rejects.parquet"
RESULTS_FILE = "coco_results.json"
CHUNKS = 64  # wished for, within the bounds, in images, of each
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 1024


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
    overlays: int
    seconds: float

    def __str__(self) -> str:
        rejects = sum(self.rejects_by_reason.values())
        lines = [
            f"{self.images} images, {rejects} rejects, {self.detections} detections by {self.model}",
            f"predicted now: {self.images_made} images in {self.seconds:.1f} s, "
            f"{self.images_made / self.seconds:.1f} images/s",
        ]
        lines += [f"rejected images: {count} x {reason}" for reason, count in self.rejects_by_reason.items()]
        lines.append(f"{self.out}: predictions/*.parquet, {RESULTS_FILE}, {REJECTS_FILE}, {MANIFEST}")
        if self.overlays:
            lines.append(f"{self.out}/overlays: {self.overlays} pictures")
        return "\n".join(lines)


def predict(model: str, images: str, out: str, *, overlays: int = 0) -> PredictSummary:
    """Find objects in all images below a URI, or in those that are missing there; Ray must be running.

    `model` is a folder or models:/...; the first `overlays` images are also drawn.

    Raises:
        FileNotFoundError, PermissionError, ValueError: for a model, images or an output folder that cannot be
            used, such as one with the predictions of another model.
        RuntimeError: if results and rejects do not add up to the inputs.
    """
    if overlays < 0:
        raise ValueError(f"--overlays is {overlays}, but must be 0 or more")
    started = time.monotonic()
    source, out_store = open_store(images).check_folder(), open_store(out)
    if f"{out_store.uri}/".startswith(f"{source.uri}/"):
        raise ValueError(f"--out {out_store.uri} lies in --images: its pictures would be taken for images")
    resolved = resolve_model(model)
    categories = model_from_files(resolved.files, model).categories
    chunks = _list_chunks(source)
    drawn = [name for chunk in chunks for name in chunk.names][:overlays]
    plan = _plan(resolved, source, chunks)
    settings = PredictSettings(source, out_store, frozenset(drawn))
    receipts = _finished(out_store, plan, settings=settings, chunks=chunks)
    missing = [chunk for chunk in chunks if chunk.part not in receipts]
    if missing or not out_store.exists(MANIFEST):
        _begin(out_store, plan, receipts.values())
        receipts |= _run(missing, resolved, settings)
        _conclude(out_store, plan, [receipts[chunk.part] for chunk in chunks], resolved, categories)
    rejects = [reject for receipt in receipts.values() for reject in receipt.rejects]
    return PredictSummary(
        model=resolved.version or model,
        out=out_store.uri,
        images=sum(len(chunk.names) for chunk in chunks),
        detections=sum(receipt.detections for receipt in receipts.values()),
        rejects_by_reason=by_reason((each.stage, each.reason) for each in rejects),
        images_made=sum(len(chunk.names) for chunk in missing),
        overlays=sum(len(_files_of(chunk, receipts[chunk.part], settings)) - 1 for chunk in chunks),
        seconds=time.monotonic() - started,
    )


def _list_chunks(source: Store) -> list[Chunk]:
    """The images of a folder in chunks that depend on nothing but their names."""
    names = sorted(source.list(SUFFIXES))
    if not names:
        raise FileNotFoundError(f"{source.uri} holds no images ({', '.join(SUFFIXES)}): give the folder that does")
    return cut(names, min(max(-(-len(names) // CHUNKS), SMALLEST_CHUNK), LARGEST_CHUNK))


def _plan(resolved: ResolvedModel, source: Store, chunks: Sequence[Chunk]) -> dict[str, Any]:
    """All that the predictions' bytes depend on."""
    names = json.dumps([chunk.names for chunk in chunks])
    return {
        "schema_version": SCHEMA_VERSION,
        "model_sha256": resolved.sha256,
        "images": source.uri,
        "names_sha256": hashlib.sha256(names.encode()).hexdigest(),
    }


def _finished(
    out: Store, plan: dict[str, Any], *, settings: PredictSettings, chunks: Sequence[Chunk]
) -> dict[str, ChunkReceipt]:
    """Receipts of the chunks that need not be predicted again. Raises ValueError where another plan was."""
    names = set(out.list())
    if MANIFEST in names:
        manifest = _read_json(out, MANIFEST)
        _refuse_other(out, manifest["plan"], plan)
        receipts = _receipts_of(out, manifest, settings.images, chunks)
    elif PLAN in names:
        _refuse_other(out, _read_json(out, PLAN), plan)
        receipts = {c.part: read_receipt(out, c.part) for c in chunks if receipt_name(c.part) in names}
    elif any(name.startswith("predictions/") for name in names):
        raise ValueError(f"{out.uri} holds predictions of unknown origin: choose another --out, or empty this one")
    else:
        receipts = {}
    return {
        chunk.part: receipts[chunk.part]
        for chunk in chunks
        if chunk.part in receipts and names.issuperset(_files_of(chunk, receipts[chunk.part], settings))
    }


def _files_of(chunk: Chunk, receipt: ChunkReceipt, settings: PredictSettings) -> list[str]:
    """The part of a chunk, and the pictures of those of its images that are to be drawn and could be read."""
    rejected = {reject.uri for reject in receipt.rejects}
    drawn = (n for n in chunk.names if n in settings.overlays and settings.images.uri_of(n) not in rejected)
    return [chunk.part, *map(overlay_name, drawn)]


def _receipts_of(
    out: Store, manifest: dict[str, Any], images: Store, chunks: Sequence[Chunk]
) -> dict[str, ChunkReceipt]:
    """The receipts that a finished prediction was made of, from what it left."""
    parts = {images.uri_of(name): chunk.part for chunk in chunks for name in chunk.names}
    rejects: dict[str, list[Reject]] = {}
    for row in pq.read_table(io.BytesIO(out.read_bytes(REJECTS_FILE))).to_pylist():
        rejects.setdefault(parts[row["uri"]], []).append(Reject(**row))
    return {each["part"]: ChunkReceipt(**each, rejects=rejects.get(each["part"], [])) for each in manifest["parts"]}


def _refuse_other(out: Store, theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    what = {
        "model_sha256": "another model",
        "images": "other images",
        "names_sha256": "another list of images",
    }
    for key, ours_value in ours.items():
        if theirs.get(key) != ours_value:
            raise ValueError(
                f"{out.uri} holds predictions of {what.get(key, 'another version of this program')}: "
                "choose another --out, or empty this one"
            )


def _begin(out: Store, plan: dict[str, Any], receipts: Iterable[ChunkReceipt]) -> None:
    """From here until the new manifest, the plan and the receipts say what the folder is."""
    out.write_bytes(PLAN, json.dumps(plan).encode())
    if out.exists(MANIFEST):  # something has gone since, or more pictures are wanted
        for receipt in receipts:
            write_receipt(out, receipt)
        out.remove(MANIFEST)


def _run(chunks: Sequence[Chunk], resolved: ResolvedModel, settings: PredictSettings) -> dict[str, ChunkReceipt]:
    receipts: dict[str, ChunkReceipt] = {}
    if not chunks:
        return receipts
    total = sum(len(chunk.names) for chunk in chunks)
    DataContext.get_current().enable_progress_bars = False  # ours counts images
    with tqdm(total=total, unit="image", desc="predict", disable=None) as bar:
        for receipt in predict_chunks(chunks, resolved.files, settings):
            receipts[receipt.part] = receipt
            bar.update(receipt.rows + len(receipt.rejects))
    _check_sum(sum(r.rows + len(r.rejects) for r in receipts.values()), total)
    return receipts


def _conclude(
    out: Store,
    plan: dict[str, Any],
    receipts: Sequence[ChunkReceipt],
    resolved: ResolvedModel,
    categories: Sequence[Category],
) -> None:
    """Write the rejects, the COCO results, and last the manifest."""
    rejects = [reject for receipt in receipts for reject in receipt.rejects]
    out.write_bytes(REJECTS_FILE, to_parquet(rejects, REJECTS))
    rows = _write_results(out, receipts)
    _check_sum(rows, sum(receipt.rows for receipt in receipts))
    content = {
        "plan": plan,
        "model": {
            "uri": resolved.uri,
            "version": resolved.version,
            "config": json.loads(resolved.files[CONFIG_FILE]),
        },
        "categories": [{"label": i, **asdict(each)} for i, each in enumerate(categories, start=1)],
        "totals": {
            "images": rows + len(rejects),
            "rows": rows,
            "rejects": len(rejects),
            "detections": sum(receipt.detections for receipt in receipts),
        },
        "parts": [{"part": r.part, "rows": r.rows, "detections": r.detections} for r in receipts],
    }
    out.write_bytes(MANIFEST, json.dumps(content, indent=1).encode())
    out.remove_folder(PROGRESS)
    if out.is_local:  # what processes that were killed have left
        for part in out.path.glob("predictions/.*.part"):
            part.unlink(missing_ok=True)


def _write_results(out: Store, receipts: Sequence[ChunkReceipt]) -> int:
    """All parts as one COCO results file, a part in memory at a time. Returns the number of rows."""
    rows, separator = 0, ""
    with out.new_file(RESULTS_FILE) as path, path.open("w") as file:
        file.write("[")
        for receipt in receipts:
            table = pq.read_table(io.BytesIO(out.read_bytes(receipt.part)))
            rows += table.num_rows
            for entry in _coco_entries(table.to_pylist()):
                file.write(f"{separator}{json.dumps(entry)}")
                separator = ",\n"
        file.write("]\n")
    return rows


def _coco_entries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for row in rows:
        for found in row["detections"]:
            entry = {
                "image_id": row["image_id"],
                "category_id": found["category_id"],
                "bbox": found["box"],
                "score": found["score"],
                "segmentation": found["rle"],
                "keypoints": found["keypoints"],
            }
            yield {key: value for key, value in entry.items() if value is not None}


def _check_sum(have: int, expected: int) -> None:
    if have != expected:
        raise RuntimeError(f"predictions and rejects are {have} images, but {expected} were to be predicted")


def _read_json(out: Store, name: str) -> dict[str, Any]:
    try:
        return json.loads(out.read_bytes(name))
    except ValueError as error:
        raise ValueError(f"{out.uri}/{name} is damaged ({error}): empty the folder, or choose another --out") from error
