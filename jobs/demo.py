"""`make demo`: the whole way on toy data, with the commands that a user types, against a real S3 server.

Each command runs as its own process and is printed before it runs. The server lives as long as the demo; what one
wants to look at afterwards (MLflow's database and artifacts, predictions, overlays) is in the demo's folder.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jobs.local_s3 import local_s3, make_bucket

MARK = ".mrcnn-demo"  # in a folder that a demo made, and may therefore replace
TRAIN_IMAGES, VAL_IMAGES = 600, 100
RUN, MODEL = "first-run", "toy-shapes"


@dataclass
class _Shell:
    """Runs `mrcnn ...`, shows what it prints, and remembers each command's images per second."""

    environment: Mapping[str, str]
    speeds: dict[str, float] = field(default_factory=dict)

    def mrcnn(self, stage: str, command: str) -> None:
        print(f"\n$ mrcnn {command}", flush=True)
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.cli", *shlex.split(command)],
            env={**os.environ, **self.environment},
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            found = re.findall(r"([\d.]+) images/s", line)
            if found:
                self.speeds.setdefault(stage, float(found[-1]))
        if process.wait():
            raise RuntimeError(
                f"the demo stopped: mrcnn {command.split()[0]} failed with exit code {process.returncode}"
            )


def run_demo(out: str) -> None:
    """Run the whole way below the local folder `out`, which is replaced if an earlier demo made it.

    Raises ValueError if the folder holds something else, RuntimeError if a command fails.
    """
    started = time.monotonic()
    folder = _fresh_folder(Path(out).resolve())
    print(f"The whole way on two data sets of toy images, in {folder}")
    with local_s3(folder / "s3") as server:
        bucket = make_bucket(server, "demo")
        shell = _Shell({**server, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"})
        _run_commands(shell, bucket, folder)
    _print_summary(shell, folder, time.monotonic() - started)


def _fresh_folder(folder: Path) -> Path:
    if folder.exists() and any(folder.iterdir()):
        if not (folder / MARK).exists():
            raise ValueError(f"{folder} is not empty, and no demo made it: give another --out")
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()
    return folder


def _run_commands(shell: _Shell, bucket: str, folder: Path) -> None:
    for part, images, seed in (("train", TRAIN_IMAGES, 0), ("val", VAL_IMAGES, 1)):
        toy, shards = f"{bucket}/toy/{part}", f"{bucket}/shards/{part}"
        shell.mrcnn("toy-data", f"toy-data --out {toy} --images {images} --seed {seed}")
        shell.mrcnn(
            "build-data",
            f"build-data --images {toy}/images --annotations {toy}/annotations.json --out {shards} "
            "--shorter-side 128 --longer-side 256 --rows-per-shard 100",
        )
    data = f"--data {bucket}/shards/train --val-data {bucket}/shards/val"
    shell.mrcnn("train", f"train toy {data} --storage {bucket}/runs --run {RUN} --workers 2 --experiment toy")
    model = f"{bucket}/runs/{RUN}/model"
    metrics = shlex.quote(str(folder / "metrics.json"))
    shell.mrcnn("evaluate", f"evaluate --model {model} --data {bucket}/shards/val --out {metrics}")
    shell.mrcnn("register", f"register --run {RUN} --name {MODEL}")
    shell.mrcnn("promote", f"promote --name {MODEL} --version 1")
    predictions = shlex.quote(str(folder / "predictions"))
    shell.mrcnn(
        "predict",
        f"predict --model models:/{MODEL}@champion --images {bucket}/toy/val/images --out {predictions} --overlays 8",
    )


def _print_summary(shell: _Shell, folder: Path, seconds: float) -> None:
    metrics = json.loads((folder / "metrics.json").read_text())
    ui = f"{Path(sys.executable).parent / 'mlflow'} ui --backend-store-uri sqlite:///{folder}/mlflow.db"
    print(f"\nThe demo took {seconds / 60:.1f} minutes.\n")
    for stage, speed in shell.speeds.items():
        print(f"  {stage:<12}{speed:>8.1f} images/s")
    for kind in ("box", "mask"):
        print(f"  {kind + ' AP':<12}{metrics[kind]['AP']:>8.3f}   AP50 {metrics[kind]['AP50']:.3f}")
    print(f"\n  overlays     {folder / 'predictions' / 'overlays'}")
    print(f"  predictions  {folder / 'predictions'}")
    print(f"  report       {folder / 'predictions' / 'report.html'}")
    print(f"  MLflow UI    {ui}")
