"""Memory of `mrcnn predict` over many small images: the curve of all its processes.

    PYTHONPATH=.:tests python tests/scripts/measure_predict_memory.py OUT [IMAGES]

Not a test: 20,000 images take many minutes on two cores. OUT gets the images, a tiny model with random weights, and the
predictions. Memory is proportional set size: what processes share counts once among them.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import torch
from killing import command_of, family, kill_all
from models import SMALL

from mrcnn import InputConfig, MaskRCNN, save_model

SIDE = 64
DIFFERENT = 256  # images: all others are copies
SECONDS = 2.0  # between two looks
ROWS = 20


def main(out: Path, images: int) -> None:
    make_images(out / "images", images)
    torch.manual_seed(0)
    config = replace(SMALL, input=InputConfig(shorter_side=SIDE, longer_side=SIDE))
    save_model(MaskRCNN(config), out / "model")
    words = ["predict", "--model", out / "model", "--images", out / "images", "--out", out / "predictions"]
    words += ["--max-detections", "10"]  # random weights find a hundred
    process = subprocess.Popen([sys.executable, "-m", "jobs.cli", *map(str, words)], stdout=sys.stderr)
    try:
        curve = watch(process, out / "predictions", images)
    finally:
        kill_all(process.pid)
    assert process.wait() == 0
    manifest = json.loads((out / "predictions/manifest.json").read_text())
    assert manifest["totals"]["rows"] == images
    show(curve, images)


def make_images(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    chance = np.random.default_rng(0)
    files = []
    for _ in range(DIFFERENT):
        image = np.full((SIDE, SIDE, 3), chance.integers(0, 256, 3), np.uint8)
        for _ in range(3):
            x, y, radius = (int(v) for v in chance.integers(8, SIDE - 8, 3))
            cv2.circle(image, (x, y), radius // 3, [int(v) for v in chance.integers(0, 256, 3)], cv2.FILLED)
        files.append(cv2.imencode(".jpg", image)[1].tobytes())
    for i in range(count):
        (folder / f"{i:08d}.jpg").write_bytes(files[i % DIFFERENT])


Sample = tuple[int, float, float, float]
"""Images in finished parts, and megabytes of the driver, of the actors, and of all"""


def watch(process: subprocess.Popen[bytes], predictions: Path, images: int) -> list[Sample]:
    """Look at all processes until the first one ends; print a row now and then."""
    curve: list[Sample] = []
    print(f"{'images':>8}{'driver':>9}{'actors':>9}{'all':>9}   MB")
    printed = 0
    while process.poll() is None:
        sizes = {pid: megabytes(pid) for pid in family(process.pid)}
        actors = sum(size for pid, size in sizes.items() if "ChunkPredictor" in command_of(pid))
        sample = (images_done(predictions), sizes.get(process.pid, 0.0), actors, sum(sizes.values()))
        if sample[0] >= printed + images / ROWS:
            printed = sample[0]
            print(f"{sample[0]:>8}" + "".join(f"{size:>9.0f}" for size in sample[1:]), flush=True)
        curve.append(sample)
        time.sleep(SECONDS)
    return curve


def images_done(predictions: Path) -> int:
    done = 0
    for path in predictions.glob("_progress/part-*.json"):
        try:
            done += json.loads(path.read_text())["rows"]
        except (FileNotFoundError, ValueError):  # tidied up just now
            continue
    return done


def megabytes(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # gone
        return 0.0
    found = re.search(r"^Pss:\s+(\d+) kB", text, re.M)
    return int(found[1]) / 1024 if found else 0.0


def show(curve: list[Sample], images: int) -> None:
    """How much there was in the first and in the last quarter of the images."""
    at_work = [each for each in curve if each[2] > 0 and 0 < each[0] < images]
    early = [each for each in at_work if each[0] < images / 4] or at_work[:1]
    late = [each for each in at_work if each[0] > images * 3 / 4] or at_work[-1:]
    for place, name in ((1, "driver"), (2, "actors"), (3, "all")):
        first, last = (float(np.median([each[place] for each in some])) for some in (early, late))
        print(f"{name}: {first:.0f} MB in the first quarter, {last:.0f} MB in the last (medians)")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 20_000)
