"""Overfit eight real images with the small preset: mask AP on those images has to reach 0.9.

    python tests/scripts/overfit_coco8.py OUT [STEPS]

Not a test: it takes some twenty minutes on two cores. The images are the eight of coco100's training half whose
smallest object is largest, without crowds: at 320 pixels, what is smaller than a few feature cells cannot be learnt to
IoU 0.95 by any Mask R-CNN. OUT gets the data set, its shards and the run; pictures are in MLflow's artifacts there.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

IMAGES = 8
COCO100 = Path(os.environ.get("MRCNN_COCO100", Path(__file__).parents[3] / "shared/data/coco100"))


def main(out: Path, steps: int) -> None:
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{out}/mlflow.db"
    from jobs.cluster import ray_session
    from jobs.config import TrainJob
    from jobs.presets import PRESETS
    from jobs.train import train
    from pipelines.build import build
    from pipelines.config import BuildConfig

    annotations, images = write_subset(out / "data")
    shards = str(out / "shards")
    config = replace(PRESETS["r18_fpn_small"], steps=steps, flip=0.0, evaluate_every=max(steps // 4, 1))
    job = TrainJob(data=shards, val_data=shards, storage=str(out / "runs"), run=f"overfit-{steps}")
    with ray_session(dashboard=True):
        print(build(BuildConfig(annotations=str(annotations), images=str(images), out=shards)))
        print(train(job, config))


def write_subset(folder: Path) -> tuple[Path, Path]:
    """The eight images with their annotations; only the categories that are in them."""
    content = json.loads((COCO100 / "annotations/instances_train2017.json").read_text())
    of_image: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for annotation in content["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    listed = {image["id"]: image for image in content["images"]}

    def smallest_side(image_id: int) -> float:
        image, found = listed[image_id], of_image[image_id]
        if any(annotation["iscrowd"] for annotation in found):
            return 0.0
        return float(min(a["area"] for a in found) ** 0.5 / min(image["height"], image["width"]))

    chosen = sorted(of_image, key=smallest_side, reverse=True)[:IMAGES]
    kept = [annotation for image_id in chosen for annotation in of_image[image_id]]
    used = {annotation["category_id"] for annotation in kept}
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for image_id in chosen:
        name = listed[image_id]["file_name"]
        shutil.copy(COCO100 / "train2017" / name, folder / "images" / name)
    subset = {
        "images": [listed[i] for i in chosen],
        "annotations": kept,
        "categories": [category for category in content["categories"] if category["id"] in used],
    }
    (folder / "annotations.json").write_text(json.dumps(subset))
    return folder / "annotations.json", folder / "images"


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), int(sys.argv[2]) if len(sys.argv) > 2 else 1000)
