"""The folder of a prediction: which one it is, what of it is finished, and how it ends.

_progress/plan.json says which prediction, and is written first. _progress/model/ holds the model, _progress/chunks/ the
inputs of the chunks that are missing, _progress/PART.json a chunk's receipt, written after its part. manifest.json is
written when all are there and the sums are right; then _progress/ goes. Every file appears whole, so any process may be
killed at any moment. What is made of a finished prediction (overlays/, report.html, coco_results.json) comes after, and
goes first where that is opened again. Equal predictions write equal bytes, so of two at once neither spoils the
other's parts; but the first to end removes what the other still needs, which then fails, and finds all finished when it
is run again.

The driver holds a number for each finished chunk, of the folder's listing names and sizes, some three files a chunk,
and at the end what the manifest says of each part. Rejects pass chunk by chunk.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.inputs import Chunk, Inputs
from pipelines.manifest import LostError, check_sum
from pipelines.prefetch import prefetched
from pipelines.records import REJECTS, Reject
from pipelines.storage import Store
from pipelines.tally import Tally

MANIFEST = "manifest.json"
PROGRESS = "_progress"
PLAN = f"{PROGRESS}/plan.json"
MODEL = f"{PROGRESS}/model"
REJECTS_FILE = "rejects.parquet"
RESULTS_FILE = "coco_results.json"
REPORT = "report.html"
PARTS, OVERLAYS = "predictions", "overlays"
THREADS, AHEAD = 16, 64  # small files, of which only the latency counts

Plan = dict[str, Any]


@dataclass(frozen=True)
class ChunkReceipt:
    """What became of a chunk: images = rows + rejects."""

    number: int
    rows: int
    detections: int
    size: int
    """Bytes of its part"""
    rejects: int
    versions_sha256: str = ""
    """Of its files: where these have changed, the chunk is predicted again"""
    tally: Tally = field(default_factory=Tally)
    rejected: list[Reject] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    """That each stage took; empty of one that was read back from a manifest"""
    wall: float = 0.0

    def to_json(self) -> str:
        """For _progress/ and for a row of Ray Data."""
        return json.dumps(asdict(self))

    def without_rejects(self) -> ChunkReceipt:
        """For the driver, which counts them only."""
        return replace(self, rejected=[])

    @classmethod
    def from_json(cls, text: str | bytes) -> ChunkReceipt:
        """The inverse of `to_json`."""
        content = json.loads(text)
        rejected = [Reject(**each) for each in content["rejected"]]
        return cls(**content | {"tally": Tally(**content["tally"]), "rejected": rejected})

    def lasting(self) -> dict[str, Any]:
        """What the manifest says of the part: nothing that another run would have otherwise."""
        names = ("rows", "rejects", "detections", "size", "versions_sha256")
        kept = {name: getattr(self, name) for name in names}
        return {"part": part_name(self.number), **kept, "tally": asdict(self.tally)}


def part_name(number: int) -> str:
    """Where the rows of a chunk go."""
    return f"{PARTS}/part-{number:05d}.parquet"


def receipt_name(number: int) -> str:
    """Where the receipt of a chunk lies until all are there."""
    return f"{PROGRESS}/{PurePosixPath(part_name(number)).name}.json"


def chunk_name(number: int) -> str:
    """Where the inputs of a chunk lie until all are there."""
    return f"{PROGRESS}/chunks/{number:05d}.json"


def write_model(out: Store, files: Mapping[str, bytes]) -> None:
    """Put a model where actors find it, also those that are started again when the driver's node is gone."""
    for name, data in files.items():
        out.write_bytes(f"{MODEL}/{name}", data)


def read_model(out: Store, names: Iterable[str]) -> dict[str, bytes]:
    """The model's files."""
    return {name: out.read_bytes(f"{MODEL}/{name}") for name in names}


def write_receipt(out: Store, receipt: ChunkReceipt) -> None:
    """Say that a chunk is finished: only when its part is written."""
    out.write_bytes(receipt_name(receipt.number), receipt.to_json().encode())


def receipt_if_there(out: Store, number: int) -> ChunkReceipt | None:
    """The receipt of a chunk that is finished; None where there is none that this version can read."""
    try:
        return ChunkReceipt.from_json(out.read_bytes(receipt_name(number)))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def read_chunk(out: Store, number: int) -> Chunk:
    """The inputs of a chunk."""
    return Chunk.from_json(number, out.read_bytes(chunk_name(number)))


def check_free(out: Store, plan: Plan) -> None:
    """Raise ValueError where another prediction is there. Changes nothing."""
    sizes = dict(out.entries())
    theirs = _plan_there(out, sizes)
    if theirs is not None:
        refuse_other(out, theirs, plan)
    elif any(name.startswith(f"{PARTS}/") for name in sizes):
        raise ValueError(f"{out.uri} holds predictions of unknown origin: choose another --out, or empty this one")


def claim(out: Store, plan: Plan, inputs: Inputs, size: int) -> set[int] | None:
    """Make the folder this prediction's. Returns the numbers of the chunks that are finished; None where all is.

    Raises ValueError where another one is there.
    """
    check_free(out, plan)
    sizes = dict(out.entries())
    if MANIFEST in sizes:
        manifest = read_json(out, MANIFEST)
        good = _good_parts(manifest, sizes, inputs, size)
        if len(good) == len(manifest["parts"]):
            return None
        _open_again(out, manifest, good)
        sizes = dict(out.entries())
    if not out.create_bytes(PLAN, json.dumps(plan).encode()):
        refuse_other(out, read_json(out, PLAN), plan)
    return _finished(out, sizes, inputs, size)


def _plan_there(out: Store, sizes: Mapping[str, int]) -> Plan | None:
    if MANIFEST in sizes:
        plan: Plan = read_json(out, MANIFEST)["plan"]
        return plan
    return read_json(out, PLAN) if PLAN in sizes else None


IN_WORDS = {
    "model_sha256": "another model",
    "images": "other images",
    "inputs_sha256": "another list of images",
    "schema_version": "another version of this program",
}


def refuse_other(out: Store, theirs: Plan, ours: Plan) -> None:
    """Raise ValueError unless two plans are the same, saying which setting is not."""
    for key, value in ours.items():
        if theirs.get(key) != value:
            option = f"--{key.replace('_', '-')}"
            what = IN_WORDS.get(key, f"another {option}: {theirs.get(key)} there, {value} here")
            raise ValueError(f"{out.uri} holds predictions of {what}: choose another --out, or empty this one")


def _good_parts(manifest: Mapping[str, Any], sizes: Mapping[str, int], inputs: Inputs, size: int) -> set[int]:
    """Those that are there in their size, and of files that have not changed since."""
    if REJECTS_FILE not in sizes:  # which nothing but the receipts could bring back
        return set()
    pairs = zip(manifest["parts"], inputs.chunks(size), strict=True)
    return {
        chunk.number
        for part, chunk in pairs
        if sizes.get(part["part"]) == part["size"] and part["versions_sha256"] == chunk.versions_sha256
    }


def _open_again(out: Store, manifest: Mapping[str, Any], good: set[int]) -> None:
    """From here until the new manifest, the plan and the receipts say what the folder is."""
    out.write_bytes(PLAN, json.dumps(manifest["plan"]).encode())
    for name in (RESULTS_FILE, REPORT):  # of what is to be predicted again
        with suppress(FileNotFoundError):
            out.remove(name)
    out.remove_folder(OVERLAYS)
    receipts = (each for each in _receipts_of(out, manifest) if each.number in good) if good else iter(())
    for _ in prefetched(partial(write_receipt, out), receipts, threads=THREADS, ahead=AHEAD):
        pass
    out.remove(MANIFEST)


def _receipts_of(out: Store, manifest: Mapping[str, Any]) -> Iterator[ChunkReceipt]:
    """The receipts that a finished prediction was made of: rejects lie in the order of the parts."""
    with out.local_copy(REJECTS_FILE) as path, pq.ParquetFile(path) as file:
        rejects = (Reject(**row) for batch in file.iter_batches() for row in batch.to_pylist())
        for number, part in enumerate(manifest["parts"]):
            content = {name: value for name, value in part.items() if name != "part"} | {
                "tally": Tally(**part["tally"])
            }
            yield ChunkReceipt(number, **content, rejected=[next(rejects) for _ in range(part["rejects"])])


def _finished(out: Store, sizes: Mapping[str, int], inputs: Inputs, size: int) -> set[int]:
    """Chunks with a receipt that is true of their part and of their files; others lose it."""
    begun = (chunk for chunk in inputs.chunks(size) if receipt_name(chunk.number) in sizes)
    kept: set[int] = set()
    for number, is_true in prefetched(partial(_is_true, out, sizes), begun, threads=THREADS, ahead=AHEAD):
        if is_true:
            kept.add(number)
        else:
            out.remove(receipt_name(number))
    return kept


def _is_true(out: Store, sizes: Mapping[str, int], chunk: Chunk) -> tuple[int, bool]:
    receipt = receipt_if_there(out, chunk.number)
    is_true = (
        receipt is not None
        and sizes.get(part_name(chunk.number)) == receipt.size
        and receipt.versions_sha256 == chunk.versions_sha256
    )
    return chunk.number, is_true


def write_chunks(out: Store, chunks: Iterable[Chunk]) -> list[int]:
    """Put the inputs of chunks where actors find them. Returns their numbers."""
    return list(prefetched(partial(_write_chunk, out), chunks, threads=THREADS, ahead=AHEAD))


def _write_chunk(out: Store, chunk: Chunk) -> int:
    out.write_bytes(chunk_name(chunk.number), chunk.to_json().encode())
    return chunk.number


def conclude(out: Store, plan: Plan, about: Mapping[str, Any], *, images: int, chunks: int) -> None:
    """Write the rejects, see whether nothing was lost, and write the manifest last.

    Raises LostError where parts and rejects are not all that there is to be.
    """
    parts, tally = [], Tally()
    read = prefetched(partial(receipt_if_there, out), range(chunks), threads=THREADS, ahead=AHEAD)
    with out.new_file(REJECTS_FILE) as path, pq.ParquetWriter(path, REJECTS) as writer:
        for receipt in read:
            if receipt is None:
                break
            parts.append(receipt.lasting())
            tally += receipt.tally
            if receipt.rejected:
                writer.write_table(pa.Table.from_pylist([asdict(each) for each in receipt.rejected], schema=REJECTS))
    read.close()
    sizes = dict(out.entries())
    if len(parts) < chunks or any(sizes.get(part["part"]) != part["size"] for part in parts):
        raise LostError(f"{out.uri}: parts are not as they were written: run the same command again")
    totals = {name: sum(part[name] for part in parts) for name in ("rows", "rejects", "detections")}
    check_sum("images", images, totals["rows"], totals["rejects"])
    content = {"plan": plan, **about, "totals": {"images": images, **totals}, "tally": asdict(tally)}
    out.write_bytes(MANIFEST, _to_json(content, parts).encode())


def _to_json(content: Mapping[str, Any], parts: Iterable[Mapping[str, Any]]) -> str:
    """The manifest, with a line for each part."""
    lines = ",\n  ".join(json.dumps(part) for part in parts)
    return f'{json.dumps(content, indent=1)[:-2]},\n "parts": [\n  {lines}\n ]\n}}\n'


def tidy(out: Store) -> None:
    """Remove the receipts, and what processes that were killed have left."""
    out.remove_folder(PROGRESS)
    for store in (out, out.join(PARTS), out.join(OVERLAYS)):
        store.remove_leftovers()


def read_json(out: Store, name: str) -> dict[str, Any]:
    """A file of the folder. Raises ValueError where it is damaged."""
    try:
        return dict(json.loads(out.read_bytes(name)))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{out.uri}/{name} is damaged ({error}): empty the folder, or choose another --out") from error
