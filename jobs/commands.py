"""The commands of `mrcnn`: what each is given, and what it prints. Their docstrings are the command line's help.

What a command needs is imported when it runs, so that help and mistakes are told at once.
"""

from __future__ import annotations

from typing import Literal

from jobs.benchmark_names import AnyBenchmarkName
from jobs.output import tell


def toy_data(out: str, images: int = 600, seed: int = 0, size: int = 128, keypoints: bool = False) -> None:
    """Make a COCO-format data set of overlapping shapes, to try everything on.

    Args:
        out: URI of a folder; it gets images/ and annotations.json.
        images: How many images.
        seed: The same seed makes the same images; take another one for validation.
        size: Shorter side in pixels.
        keypoints: Annotate keypoints of each shape, too; the images stay the same.
    """
    from pipelines.toy import make_toy_data

    made = make_toy_data(out, images=images, seed=seed, size=size, keypoints=keypoints)
    tell(f"{images} images with {made.instances} objects in {made.seconds:.1f} s: {made.out}")


def inspect_data(uri: str, /, out: str = ".", images: int = 12) -> None:
    """Say what is in a folder of shards, and draw some of its images with their masks.

    Args:
        uri: URI of shards.
        out: URI of a folder for the picture, contact_sheet.png.
        images: How many images to draw, up to 100, evenly spread over the data set.
    """
    from pipelines.contact_sheet import check_images, write_contact_sheet
    from pipelines.inspect import summarize

    check_images(images)  # before all shards are read
    tell(summarize(uri))
    tell(f"\npicture: {write_contact_sheet(uri, out, images)}")


def verify_data(uri: str, /, cpus: int | None = None) -> None:
    """Check a folder of shards: checksums, counts, schema, and that every image and mask can be used.

    Args:
        uri: URI of shards.
        cpus: CPUs of the Ray that is started on this machine; by default all.
    """
    from jobs.cluster import ray_session
    from pipelines.manifest import Manifest
    from pipelines.storage import open_store
    from pipelines.verify import verify

    Manifest.read(open_store(uri).check_answers())  # before Ray starts, so that a wrong folder is told at once
    with ray_session(cpus):
        report = verify(uri)
    tell(report)
    report.check()


def replay_mlflow(run: str, /) -> None:
    """Write into MLflow what it could not take while a run was trained. `mrcnn train --resume` does so, too.

    Args:
        run: URI of the run's folder, STORAGE/RUN.
    """
    from jobs.replay import replay_run

    tell(replay_run(run))


def evaluate(model: str, data: str, out: str | None = None, cpus: int | None = None) -> None:
    """Measure a model on validation shards: COCO's numbers for boxes, and for the masks and keypoints that it finds.

    Args:
        model: A model's folder or models:/NAME@ALIAS.
        data: URI of shards.
        out: JSON file for the numbers.
        cpus: CPUs of the Ray that is started on this machine; by default all.
    """
    from jobs.cluster import ray_session
    from jobs.evaluate import evaluate as run

    with ray_session(cpus):
        tell(run(model, data, out))


def register(run: str, name: str, best: bool = False) -> None:
    """Make a version of a registered model from a training run.

    Args:
        run: The run's name or id in MLflow.
        name: Name of the registered model.
        best: Take the run's best checkpoint, not the model of its last step.
    """
    from jobs.registry import register as run_register

    made = run_register(run, name, best=best)
    what = f"{'the best of ' if best else ''}{run}"
    tell(f"registered {what} as {made.uri}" if made.is_new else f"{what} is {made.uri} already")


def promote(name: str, version: int, alias: str = "champion", force: bool = False) -> None:
    """Let an alias point to a version that is not worse on the same validation data than the one it points to.

    Args:
        name: Name of the registered model.
        version: The version's number.
        alias: The alias that moves; the version that had it becomes `previous` (previous-ALIAS but for champion).
        force: Move it whatever was measured; a tag of the version will tell.
    """
    from jobs.registry import promote as run_promote

    tell(run_promote(name, version, alias, force=force))


def rollback(name: str, alias: str = "champion") -> None:
    """Let an alias point to the version again that the last promotion took it from: one step back, not more.

    Args:
        name: Name of the registered model.
        alias: The alias that moves.
    """
    from jobs.registry import rollback as run_rollback

    tell(run_rollback(name, alias))


def models(action: Literal["list"], /, name: str | None = None) -> None:
    """Show the registered models: versions, aliases, what was measured on which validation data, and their runs.

    Args:
        action: What to do.
        name: Of one registered model; by default all.
    """
    from jobs.model_list import table
    from jobs.registry import list_versions

    versions = list_versions(name)
    tell(table(versions) if versions else "no model is registered: make one with mrcnn register")


def benchmark(
    name: AnyBenchmarkName,
    /,
    threads: int | None = None,
    repeats: int = 5,
    device: str = "cpu",
    images: str | None = None,
    out: str | None = None,
    profile: bool = False,
) -> None:
    """Time the model or an operator against torchvision's, with the same weights and inputs, in turn; or the building
    of data against Pillow and Ray Data; or a training by Ray Train against a plain loop around the same step; or a
    prediction against a plain loop around torchvision's model.

    Args:
        name: What to time.
        threads: CPU threads of both, CPUs of the pipelines; by default 2, for train-overhead a CPU worker's 1.
        repeats: Timed calls of each, of which the median counts; trainings or predictions where these are timed.
        device: cpu, or cuda where there is a GPU.
        images: For build-data and predict: local folder of JPEGs; by default, made ones of COCO's sizes.
        out: JSON file for the numbers.
        profile: Also show where the time goes: the fifteen largest entries of torch.profiler for both.
    """
    from jobs.benchmark import Report, run_benchmark
    from jobs.benchmark_data import DataReport, run_data_benchmark
    from jobs.benchmark_predict import PredictReport, run_predict_benchmark
    from jobs.benchmark_train import OverheadReport, run_overhead_benchmark

    report: Report | DataReport | OverheadReport | PredictReport
    if threads is None:
        threads = 1 if name == "train-overhead" else 2
    _check_benchmark(name, device=device, images=images, profile=profile)
    if name == "build-data":
        report = run_data_benchmark(images, cpus=threads, repeats=repeats)
    elif name == "train-overhead":
        report = run_overhead_benchmark(threads=threads, repeats=repeats, device=device)
    elif name == "predict" or name == "predict-small":
        report = run_predict_benchmark(name, images, cpus=threads, repeats=repeats)
    else:
        report = run_benchmark(name, threads=threads, repeats=repeats, device=device, with_profile=profile)
    tell(report)
    if out is not None:
        report.write(out)


def _check_benchmark(name: AnyBenchmarkName, *, device: str, images: str | None, profile: bool) -> None:
    """Raise ValueError for an option that this benchmark has no use for."""
    on_images = ("build-data", "predict", "predict-small")
    if profile and name in (*on_images, "train-overhead"):
        raise ValueError(f"--profile is for the model and its operators, not for {name}: leave it out")
    if images is not None and name not in on_images:
        raise ValueError(f"--images is for the benchmarks {', '.join(on_images)}, not for {name}: leave it out")
    if device != "cpu" and name in on_images:
        raise ValueError(f"device is {device}, but {name} uses CPUs only: leave --device out")


def demo(out: str = "demo-run") -> None:
    """The whole way on toy data and a local S3 server, with the commands that a user types.

    Args:
        out: Local folder for everything that it makes.
    """
    from jobs.demo import run_demo

    run_demo(out)
