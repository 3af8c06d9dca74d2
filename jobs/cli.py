"""The command line. Parses, calls, prints; what a command does stands in the module that it calls.

Exit codes: 0 done, 1 failed on the way, 2 something given to it was wrong: one line says what, and MRCNN_TRACEBACK=1
shows where; 130 and 143 ended by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial, wraps
from typing import Annotated, Any

import tyro

from jobs.benchmark_cases import AnyBenchmarkName
from jobs.config import TrainConfig, TrainJob
from jobs.config_file import config_uri, starting_point
from jobs.convert import Peer
from jobs.job_commands import Submission, list_, logs, stop
from jobs.presets import PRESETS, Preset
from jobs.stopping import Stopped
from mrcnn.peers import Classes
from pipelines.config import BuildConfig

DESCRIPTION = """Mask R-CNN on Ray: from images in an object store to masks.

A URI is a local path or s3://bucket/prefix. The S3 endpoint and credentials come from AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLflow's address from MLFLOW_TRACKING_URI, a running Ray cluster's from
RAY_ADDRESS. `mrcnn submit -- COMMAND ...` runs any command on a cluster that this machine is no part of."""


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
    print(f"{images} images with {made.instances} objects in {made.seconds:.1f} s: {made.out}")


def build_data(
    config: Annotated[BuildConfig, tyro.conf.arg(name="")],
    cpus: int | None = None,
) -> None:
    """Decode and resize images, and write them with their annotations as Arrow shards.

    Args:
        config: What to build from what.
        cpus: CPUs of the Ray that is started on this machine; by default all.
    """
    from jobs.cluster import ray_session
    from pipelines.build import prepare, run_build

    prepared = prepare(config)  # before Ray starts, so that what is wrong is told at once
    with ray_session(cpus) if prepared.missing else nullcontext():
        print(run_build(prepared))


def inspect_data(uri: Annotated[str, tyro.conf.Positional], out: str = ".", images: int = 12) -> None:
    """Say what is in a folder of shards, and draw some of its images with their masks.

    Args:
        uri: URI of shards.
        out: URI of a folder for the picture, contact_sheet.png.
        images: How many images to draw, up to 100, evenly spread over the data set.
    """
    from pipelines.contact_sheet import check_images, write_contact_sheet
    from pipelines.inspect import summarize

    check_images(images)  # before all shards are read
    print(summarize(uri))
    print(f"\npicture: {write_contact_sheet(uri, out, images)}")


def verify_data(uri: Annotated[str, tyro.conf.Positional], cpus: int | None = None) -> None:
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
    print(report)
    report.check()


def train(
    preset: Annotated[Preset, tyro.conf.Positional],
    config: str = "",
) -> None:
    """Train a model with Ray Train. `mrcnn train PRESET --help` lists all settings.

    Args:
        preset: r18_fpn_small is for laptops, toy is the demo's, all others are the paper's.
        config: In the place of a preset, the settings of an earlier run: URI of its config.json or run.json, or
            runs:/ID/config.json in MLflow.
    """
    raise ValueError(f"say what to train on: mrcnn train {preset} --data URI --val-data URI --storage URI --run NAME")


def replay_mlflow(run: Annotated[str, tyro.conf.Positional]) -> None:
    """Write into MLflow what it could not take while a run was trained. `mrcnn train --resume` does so, too.

    Args:
        run: URI of the run's folder, STORAGE/RUN.
    """
    from jobs.replay import replay_run

    print(replay_run(run))


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
        print(run(model, data, out))


def register(run: str, name: str, best: bool = False) -> None:
    """Make a version of a registered model from a training run.

    Args:
        run: The run's name or id in MLflow.
        name: Name of the registered model.
        best: Take the run's best checkpoint, not the model of its last step.
    """
    from jobs.registry import register as run_register

    version = run_register(run, name, best=best)
    print(f"registered {'the best of ' if best else ''}{run} as models:/{name}/{version}")


def promote(name: str, version: int, alias: str = "champion") -> None:
    """Let an alias point to a version, unless the present one is better on the same validation data.

    Args:
        name: Name of the registered model.
        version: The version's number.
        alias: The alias that moves.
    """
    from jobs.registry import promote as run_promote

    run_promote(name, version, alias)
    print(f"models:/{name}@{alias} is version {version} now")


def predict(model: str, images: str, out: str, overlays: int = 0, cpus: int | None = None) -> None:
    """Find objects and their masks in a folder of images.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a model's folder.
        images: URI of a folder of images.
        out: URI of a folder for the Parquet files, coco_results.json, rejects.parquet and overlays/.
        overlays: Pictures to draw, of the first images.
        cpus: CPUs of the Ray that is started on this machine; by default all.
    """
    from jobs.cluster import ray_session
    from jobs.predict import predict as run

    with ray_session(cpus):
        print(run(model, images, out, overlays=overlays))


def convert_weights(
    in_: Annotated[str, tyro.conf.arg(name="in")],
    out: str,
    from_: Annotated[Peer | None, tyro.conf.arg(name="from")] = None,
    to: Peer | None = None,
    classes: Classes = "all",
    norm_eps: float | None = None,
    stride_in_1x1: bool | None = None,
) -> None:
    """Make a model's folder from torchvision's or detectron2's weights (--from), or the other way round (--to).

    Args:
        in_: The peer's .pth or .pkl file, or the model's folder.
        out: The model's folder, or the peer's .pth file.
        from_: Whose weights to read.
        to: Whose weights to write.
        classes: used leaves out the ten of torchvision's 90 classes that COCO never uses.
        norm_eps: Epsilon of torchvision's frozen batch norm; by default 0, which it sets when it loads COCO's weights.
        stride_in_1x1: Where detectron2's bottlenecks halve the resolution; by default as its own models do.
    """
    from jobs.convert import convert_from, convert_to

    if (from_ is None) == (to is None):
        raise ValueError("say either --from or --to, and torchvision or detectron2 after it")
    if from_ is not None:
        options: dict[str, Any] = {"classes": classes, "norm_eps": norm_eps, "stride_in_1x1": stride_in_1x1}
        print(convert_from(from_, in_, out, **options))
    elif to is not None:
        if (classes, norm_eps, stride_in_1x1) != ("all", None, None):
            raise ValueError("--classes, --norm-eps and --stride-in-1x1 belong to --from: leave them out with --to")
        print(convert_to(to, in_, out))


def benchmark(
    name: Annotated[AnyBenchmarkName, tyro.conf.Positional],
    threads: int = 2,
    repeats: int = 5,
    device: str = "cpu",
    images: str | None = None,
    out: str | None = None,
    profile: bool = False,
) -> None:
    """Time the model or an operator against torchvision's, with the same weights and inputs, in turn; or the building
    of data against Pillow and Ray Data; or a training by Ray Train against a plain loop around the same step.

    Args:
        name: What to time.
        threads: CPU threads of both; CPUs of the pipelines.
        repeats: Timed calls of each, of which the median counts; trainings of each for train-overhead.
        device: cpu, or cuda where there is a GPU.
        images: For build-data: local folder of JPEGs; by default, made ones of COCO's sizes.
        out: JSON file for the numbers.
        profile: Also show where the time goes: the fifteen largest entries of torch.profiler for both.
    """
    from jobs.benchmark import Report, run_benchmark
    from jobs.benchmark_data import DataReport, run_data_benchmark
    from jobs.benchmark_train import OverheadReport, run_overhead_benchmark

    report: Report | DataReport | OverheadReport
    if profile and name in ("build-data", "train-overhead"):
        raise ValueError(f"--profile is for the model and its operators, not for {name}: leave it out")
    if images is not None and name != "build-data":
        raise ValueError(f"--images is for the benchmark build-data, not for {name}: leave it out")
    if name == "build-data":
        if device != "cpu":
            raise ValueError(f"device is {device}, but build-data uses CPUs only: leave --device out")
        report = run_data_benchmark(images, cpus=threads, repeats=repeats)
    elif name == "train-overhead":
        report = run_overhead_benchmark(threads=threads, repeats=repeats, device=device)
    else:
        report = run_benchmark(name, threads=threads, repeats=repeats, device=device, with_profile=profile)
    print(report)
    if out is not None:
        report.write(out)


def demo(out: str = "demo-run") -> None:
    """The whole way on toy data and a local S3 server, with the commands that a user types.

    Args:
        out: Local folder for everything that it makes.
    """
    from jobs.demo import run_demo

    run_demo(out)


def _parsed_only(function: Callable[..., Any]) -> Callable[..., partial[Any]]:
    """The same command line, but instead of the command being run, what would run it is returned."""

    @wraps(function)
    def parsed(*args: Any, **kwargs: Any) -> partial[Any]:
        return partial(function, *args, **kwargs)

    return parsed


def submit(submission: Annotated[Submission, tyro.conf.arg(name="")]) -> None:
    """Run any command on a Ray cluster: `mrcnn submit OPTIONS -- COMMAND ...`.

    Args:
        submission: How the command is sent.
    """
    raise ValueError(
        "say what to run: mrcnn submit -- COMMAND ..., as in mrcnn submit -- train r50_fpn --data s3://..."
    )


JobCommand = (
    Annotated[Any, tyro.conf.subcommand("list", constructor=_parsed_only(list_))]
    | Annotated[Any, tyro.conf.subcommand("logs", constructor=_parsed_only(logs))]
    | Annotated[Any, tyro.conf.subcommand("stop", constructor=_parsed_only(stop))]
)


def jobs(command: Annotated[JobCommand, tyro.conf.arg(name="")]) -> int | None:
    """Look after jobs that were submitted to a Ray cluster.

    Args:
        command: What to do.
    """
    done: int | None = command()
    return done


COMMANDS: dict[str, Any] = {
    "toy-data": toy_data,
    "build-data": build_data,
    "inspect-data": inspect_data,
    "verify-data": verify_data,
    "train": train,
    "replay-mlflow": replay_mlflow,
    "evaluate": evaluate,
    "register": register,
    "promote": promote,
    "predict": predict,
    "convert-weights": convert_weights,
    "benchmark": benchmark,
    "demo": demo,
    "submit": submit,
    "jobs": jobs,
}


def run_train(job: TrainJob, settings: TrainConfig, cpus: int | None, config: str | None) -> None:
    """`mrcnn train ...`. `config` is the file that the settings began from, if so."""
    from jobs.cluster import ray_session

    with ray_session(cpus):
        from jobs.train import train as run  # not before: Ray reads some of what the session sets when it is imported

        print(run(job, settings))


def parse_train(words: Sequence[str]) -> tuple[TrainJob, TrainConfig, int | None]:
    """The words after `mrcnn train`: what to train, its settings, and CPUs for a Ray of one's own."""
    begin, defaults, arguments = starting_point(words)

    def collect(
        job: Annotated[TrainJob, tyro.conf.arg(name="")],
        config: Annotated[TrainConfig, tyro.conf.arg(name="")] = defaults,
        cpus: int | None = None,
    ) -> tuple[TrainJob, TrainConfig, int | None]:
        """Train a model with Ray Train, from the settings of a preset or of an earlier run.

        Args:
            job: What to train on, where to keep it, with how many workers.
            config: What decides the outcome of the training.
            cpus: CPUs of the Ray that is started on this machine; by default all.
        """
        return job, config, cpus

    return tyro.cli(collect, args=arguments, prog=f"mrcnn train {begin}")


def _says_what_to_train(words: Sequence[str]) -> bool:
    """Whether there is more to parse than `mrcnn train --help` shows."""
    if words[:1] != ["train"] or len(words) == 1:
        return False
    is_help = words[1].startswith("-") and config_uri(words) is None
    return not is_help and (words[1] not in PRESETS or len(words) > 2)


def parse_submit(options: Sequence[str], words: Sequence[str]) -> partial[int]:
    """`mrcnn submit OPTIONS -- WORDS`. The words are parsed here, as they will be on the cluster."""

    def collect(submission: Annotated[Submission, tyro.conf.arg(name="")]) -> Submission:
        return submission

    submission = tyro.cli(collect, args=options, prog="mrcnn submit", description=submit.__doc__)
    if words[:1] in (["submit"], ["jobs"]):
        raise ValueError(f"mrcnn {words[0]} is for this machine: give a command for the cluster after --")
    command = parse(words)
    if command.func is train:
        command()  # says what is missing
    from jobs.submit import submit as run

    return partial(run, submission, words, command.keywords)


def parse(words: Sequence[str]) -> partial[Any]:
    """What a command line asks for, not yet done.

    Raises ValueError for an unknown preset; for all else that is wrong tyro prints what, and raises SystemExit.
    """
    words = list(words)
    if words[:1] == ["submit"] and "--" in words:
        cut = words.index("--")
        return parse_submit(words[1:cut], words[cut + 1 :])
    if _says_what_to_train(words):
        job, settings, cpus = parse_train(words[1:])
        return partial(run_train, job=job, settings=settings, cpus=cpus, config=config_uri(words))
    commands = {name: _parsed_only(function) for name, function in COMMANDS.items()}
    parsed: partial[Any] = tyro.extras.subcommand_cli_from_dict(
        commands, args=words, prog="mrcnn", description=DESCRIPTION
    )
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `mrcnn`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a pipe, too, progress is seen as it is made
    try:
        return parse(words)() or 0
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return _fail(error, code=2)
    except (OSError, RuntimeError) as error:
        return _fail(error, code=1)
    except Stopped as stopped:
        print(f"mrcnn: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("mrcnn: interrupted", file=sys.stderr)
        return 130


def _fail(error: Exception, *, code: int) -> int:
    if os.environ.get("MRCNN_TRACEBACK"):
        raise error
    cause = getattr(error, "cause", None) or error  # what Ray brings from a worker has its whole traceback in its text
    print(f"mrcnn: error: {' '.join(str(cause).split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
