"""Measure the loader on the coco100 images: speed, waiting, padding, memory.

    python tests/scripts/measure_loader.py OUT [speed] [padding] [memory]

Not a test: its numbers are for the README. OUT keeps the shards, raw and jpeg at 800 pixels. This process runs on one
core; the S3 server, which it starts, on the others. A step of 150 ms is a device that works while the host sleeps, or
for half of the time computes itself, which is what launching a model's kernels takes.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch

from jobs.cluster import ray_session
from jobs.local_s3 import local_s3, make_bucket
from mrcnn.config import InputConfig
from pipelines.augment import Augmentation
from pipelines.build import build
from pipelines.config import BuildConfig, Encoding
from pipelines.dataset import ShardDataset
from pipelines.loader import Batch, batches
from pipelines.order import Order
from pipelines.storage import open_store

COCO100 = Path(os.environ.get("MRCNN_COCO100", Path(__file__).parents[3] / "shared/data/coco100"))
ENCODINGS: tuple[Encoding, ...] = ("raw", "jpeg")
BATCH = 2
STEP_SECONDS = 0.15
STEPS = 60
EPOCHS = 20
SIDES = (640, 672, 704, 736, 768, 800)


def main(out: Path, what: list[str]) -> None:
    make_data(out)
    with s3_copies(out) as remote:
        cores = os.sched_getaffinity(0)
        os.sched_setaffinity(0, {max(cores)})
        cv2.setNumThreads(1)
        torch.set_num_threads(1)
        places = {f"{encoding}, disk": str(out / encoding) for encoding in ENCODINGS} | remote
        for measure in (speed, padding, memory):
            if not what or measure.__name__ in what:
                measure(places)


def make_data(out: Path) -> None:
    with ray_session(None):
        for encoding in ENCODINGS:
            annotations, images = COCO100 / "annotations/instances_train2017.json", COCO100 / "train2017"
            target = str(out / encoding)
            build(BuildConfig(images=str(images), annotations=str(annotations), out=target, encoding=encoding))


@contextmanager
def s3_copies(out: Path) -> Iterator[dict[str, str]]:
    with local_s3(out / "s3") as environment:
        os.environ.update(environment)
        bucket = make_bucket(environment, "loader")
        for encoding in ENCODINGS:
            store = open_store(f"{bucket}/{encoding}")
            for name in open_store(str(out / encoding)).list():
                store.write_bytes(name, (out / encoding / name).read_bytes())
        yield {f"{encoding}, S3": f"{bucket}/{encoding}" for encoding in ENCODINGS}


def stream(uri: str, augmentation: Augmentation) -> Iterator[Batch]:
    return batches(
        ShardDataset(uri), seed=0, global_batch=BATCH, augmentation=augmentation, network_input=InputConfig()
    )


def speed(places: dict[str, str]) -> None:
    print(f"{'':20} {'images/s':>9} {'CPU ms/image':>13} {'wait, host sleeps':>18} {'wait, host works':>17}")
    for name, uri in places.items():
        for jitter, sides in (("", ()), (", jitter", SIDES)):
            augmentation = Augmentation(0.5, sides)
            rate, cpu = flat_out(uri, augmentation)
            asleep, works = (wait_share(uri, augmentation, busy) for busy in (0.0, 0.5))
            print(f"{name + jitter:20} {rate:9.1f} {cpu * 1e3:13.1f} {asleep:18.2%} {works:17.2%}", flush=True)


def flat_out(uri: str, augmentation: Augmentation) -> tuple[float, float]:
    """Images a second, and CPU seconds of one, where nothing else is done."""
    with closing(stream(uri, augmentation)) as taken:  # type: ignore[type-var]
        for _ in islice(taken, 25):  # an epoch: files are open and in memory
            pass
        start, cpu = time.monotonic(), time.process_time()
        for _ in islice(taken, 100):
            pass
        return 100 * BATCH / (time.monotonic() - start), (time.process_time() - cpu) / 100 / BATCH


def wait_share(uri: str, augmentation: Augmentation, busy: float) -> float:
    """Share of time for which steps wait for their batch; for `busy` of a step the host computes."""
    waited = 0.0
    with closing(stream(uri, augmentation)) as taken:  # type: ignore[type-var]
        next(taken)
        start = time.monotonic()
        for _ in range(STEPS):
            step = time.monotonic()
            next(taken)
            waited += time.monotonic() - step
            working = time.thread_time()
            while time.thread_time() < working + busy * STEP_SECONDS:
                pass
            time.sleep((1 - busy) * STEP_SECONDS)
        return waited / (time.monotonic() - start)


def padding(places: dict[str, str]) -> None:
    """Share of the network's input that is padding, with the images as they are and as one of 20 times as many."""
    dataset = ShardDataset(next(iter(places.values())))
    once = np.array([dataset.read(i).size for i in range(len(dataset))])
    print(f"{'padded pixels':40} {'mixed':>8} {'groups':>8}")
    for times in (1, 20):
        sizes = np.tile(once, (times, 1))
        for ranks, share in ((1, 2), (8, 2), (1, 16)):
            shares = [padded_share(sizes, ranks, share, groups) for groups in (False, True)]
            what = f"{len(sizes)} images, {ranks} workers of {share} images"
            print(f"{what:40} {shares[0]:8.1%} {shares[1]:8.1%}")


def padded_share(sizes: np.ndarray, ranks: int, share: int, groups: bool) -> float:
    tall = sizes[:, 0] > sizes[:, 1]
    order = Order(0, len(sizes), global_batch=ranks * share, portrait=tall if groups else None)
    epochs = 4
    rows = np.concatenate([order.of_epoch(epoch) for epoch in range(epochs)])
    of_rank = sizes[rows[: len(rows) // (ranks * share) * ranks * share]].reshape(-1, share, 2)
    padded = -(-of_rank.max(axis=1) // 32) * 32
    return float(1 - of_rank.prod(axis=2).sum() / (padded.prod(axis=1).sum() * share))


def memory(places: dict[str, str]) -> None:
    """MB after each epoch: what the process has for itself, and pages of mapped files, which the kernel may take."""
    for name, uri in places.items():
        with closing(stream(uri, Augmentation(0.5, SIDES))) as taken:  # type: ignore[type-var]
            at_end = []
            for _ in range(EPOCHS):
                for _ in islice(taken, 25):
                    pass
                at_end.append(resident())
        own, mapped = zip(*at_end, strict=True)
        told = " ".join(f"{each:.0f}" for each in own)
        print(f"{name:12} own {told}   mapped {mapped[0]:.0f} ... {mapped[-1]:.0f}", flush=True)


def resident() -> tuple[float, float]:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) / 1024, int(fields["RssFile"].split()[0]) / 1024


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2:])
