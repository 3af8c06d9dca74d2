"""coco_results.json of a finished prediction: COCO's results format, one part at a time."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import pyarrow.parquet as pq

from pipelines.manifest import check_sum
from pipelines.predict_folder import RESULTS_FILE
from pipelines.storage import Store


def write_coco_results(out: Store, parts: Sequence[str], detections: int) -> None:
    """Write all detections of the parts. Raises LostError unless they are as many as they should be."""
    written = 0
    with out.new_file(RESULTS_FILE) as path, path.open("w") as file:
        file.write("[")
        for name in parts:
            written += _write_part(out, name, file, first=written == 0)
        file.write("]\n")
        check_sum("detections", detections, written, 0)


def _write_part(out: Store, name: str, file: TextIO, *, first: bool) -> int:
    count = 0
    with out.local_copy(name) as path, pq.ParquetFile(path) as part:
        for batch in part.iter_batches(batch_size=64):
            for entry in coco_entries(batch.to_pylist()):
                file.write(("" if first and count == 0 else ",\n") + json.dumps(entry))
                count += 1
    return count


def coco_entries(rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Entries of a COCO results file for rows of a part."""
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
