"""Memory of Ray Train's own workers over many epochs of a small data set.

    PYTHONPATH=.:tests python tests/scripts/measure_train_memory.py OUT [STEPS]

Not a test: 800 steps, which are fifty epochs, take some ten minutes on two cores. OUT gets toy images, their
shards and the run of `mrcnn train toy` on two workers, with jitter and checkpoints. Memory is unique set size, what
would be free if a process were gone, and anonymous memory: without the pages of mapped shards, which the kernel takes
back as it likes, and which count as unique until the other worker has read them, too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
from killing import command_of, family, kill_all

IMAGES, VAL_IMAGES = 64, 4
BATCH = 4
WORKERS = 2
WORDS = ("--global-batch", BATCH, "--jitter-sides", 96, 112, 128, "--checkpoint-every", 100, "--log-every", 10)
SECONDS = 1.0  # between two looks
ROWS = 20


def main(out: Path, steps: int) -> None:
    for name, images in (("train", IMAGES), ("val", VAL_IMAGES)):
        mrcnn("toy-data", "--out", out / name, "--images", images, "--seed", images)
        source = ("--images", out / name / "images", "--annotations", out / name / "annotations.json")
        mrcnn("build-data", *source, "--out", out / "shards" / name, "--shorter-side", 128, "--longer-side", 256)
    data = ("--data", out / "shards/train", "--val-data", out / "shards/val", "--storage", out / "runs")
    log = out / "train.log"
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{out}/mlflow.db"
    with log.open("w") as file:
        words = ("train", "toy", *data, "--run", "memory", "--workers", WORKERS, "--steps", steps, *WORDS)
        # at the end only: an evaluation needs memory of its own
        process = subprocess.Popen(command(*words, "--evaluate-every", steps), stdout=file)
    try:
        curve = watch(process, log)
    finally:
        kill_all(process.pid)
    assert process.wait() == 0, log.read_text()
    show(curve, steps)


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from jobs.cli import main; main()", *map(str, words)]


def mrcnn(*words: object) -> None:
    subprocess.run(command(*words), check=True, stdout=sys.stderr)


Sample = tuple[int, dict[int, tuple[float, float]]]
"""The step that was last logged; of each worker the unique and the anonymous megabytes"""


def watch(process: subprocess.Popen[bytes], log: Path) -> list[Sample]:
    """Look at the workers until the command ends; print a row now and then."""
    curve: list[Sample] = []
    print(f"{'step':>6}{'epoch':>7}   unique (anonymous) MB of each worker")
    printed = 0
    while process.poll() is None:
        found = re.findall(r"^step (\d+)/(\d+)", re.sub(r"^\(.*?\) ", "", log.read_text(), flags=re.M), re.M)
        step, steps = map(int, found[-1]) if found else (0, 1)
        workers = {pid: megabytes(pid) for pid in family(process.pid) if "RayTrainWorker" in command_of(pid)}
        if 0 < step < steps and len(workers) == WORKERS:
            curve.append((step, workers))
            if step >= printed + steps / ROWS:
                printed = step
                sizes = "".join(f"{own:>9.1f} ({anonymous:.1f})" for own, anonymous in workers.values())
                print(f"{step:>6}{step * BATCH / IMAGES:>7.1f}{sizes}", flush=True)
        time.sleep(SECONDS)
    return curve


def megabytes(pid: int) -> tuple[float, float]:
    try:
        own = psutil.Process(pid).memory_full_info().uss
        anonymous = re.search(r"^Anonymous:\s+(\d+) kB", Path(f"/proc/{pid}/smaps_rollup").read_text(), re.M)
    except (psutil.Error, OSError):  # gone
        return 0.0, 0.0
    return own / 2**20, int(anonymous[1]) / 1024 if anonymous else 0.0


def show(curve: list[Sample], steps: int) -> None:
    """How much each worker had in the first and in the last quarter of the steps."""
    quarters = [
        [workers for step, workers in curve if low < step / steps <= high] for low, high in ((0, 0.25), (0.75, 1))
    ]
    print(f"{steps * BATCH / IMAGES:.0f} epochs of {IMAGES} images; looks: {len(quarters[0])} and {len(quarters[1])}")
    for number, pid in enumerate(curve[-1][1]):
        for place, name in enumerate(("unique", "anonymous")):
            first, last = (float(np.median([each[pid][place] for each in some])) for some in quarters)
            print(
                f"worker {number}, {name}: {first:.1f} MB in the first quarter, {last:.1f} MB in the last (medians), "
                f"{last - first:+.1f} MB"
            )


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 800)
