"""The command line. Parses, calls, prints; what a command does stands in the module that it calls.

Exit codes: 0 done, 1 failed on the way, 2 something given to it was wrong: one line says what, and MRCNN_TRACEBACK=1
shows where; 130 and 143 ended by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stderr, redirect_stdout, suppress
from functools import partial, wraps
from inspect import signature
from typing import Annotated, Any

import tyro

from jobs import commands
from jobs.config import TrainConfig, TrainJob
from jobs.config_file import config_uri, starting_point
from jobs.job_commands import Submission, list_, logs, stop
from jobs.output import tell
from jobs.presets import PRESETS, Preset
from jobs.stopping import Stopped
from mrcnn.peer_names import Classes, Peer
from pipelines.config import BuildConfig
from pipelines.predict_options import PredictOptions, PredictRun
from pipelines.text import shown

DESCRIPTION = """Mask R-CNN on Ray: from images in an object store to masks.

A URI is a local path or s3://bucket/prefix. The S3 endpoint and credentials come from AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLflow's address from MLFLOW_TRACKING_URI, a running Ray cluster's from
RAY_ADDRESS. `mrcnn submit -- COMMAND ...` runs any command on a cluster that this machine is no part of."""


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
        tell(run_build(prepared))


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


def predict(
    model: str,
    images: str,
    out: str,
    options: Annotated[PredictOptions, tyro.conf.arg(name="")],
    run: Annotated[PredictRun, tyro.conf.arg(name="")],
    cpus: int | None = None,
) -> None:
    """Find objects and their masks in many images, each once. The same command goes on where one was stopped.

    Args:
        model: models:/NAME@ALIAS, models:/NAME/VERSION or a model's folder.
        images: URI of a folder of images, of a .txt file with a URI a line, or of a folder of shards.
        out: URI of a folder for predictions/*.parquet, rejects.parquet, manifest.json, report.html and overlays/.
        options: What the predictions depend on.
        run: How they are made, and what else of them.
        cpus: CPUs of the Ray that is started on this machine; by default all.
    """
    from jobs.cluster import ray_session
    from jobs.predict import prepare, run_prediction

    prepared = prepare(model, images, out, options=options, run=run)  # before Ray starts: what is wrong is told at once
    with ray_session(cpus) if prepared.needs_ray else nullcontext():
        tell(run_prediction(prepared))


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
        tell(convert_from(from_, in_, out, **options))
    elif to is not None:
        if (classes, norm_eps, stride_in_1x1) != ("all", None, None):
            raise ValueError("--classes, --norm-eps and --stride-in-1x1 belong to --from: leave them out with --to")
        tell(convert_to(to, in_, out))


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
    "toy-data": commands.toy_data,
    "build-data": build_data,
    "inspect-data": commands.inspect_data,
    "verify-data": commands.verify_data,
    "train": train,
    "replay-mlflow": commands.replay_mlflow,
    "evaluate": commands.evaluate,
    "register": commands.register,
    "promote": commands.promote,
    "rollback": commands.rollback,
    "models": commands.models,
    "predict": predict,
    "convert-weights": convert_weights,
    "benchmark": commands.benchmark,
    "demo": commands.demo,
    "submit": submit,
    "jobs": jobs,
}


def run_train(job: TrainJob, settings: TrainConfig, cpus: int | None, config: str | None) -> None:
    """`mrcnn train ...`. `config` is the file that the settings began from, if so."""
    from jobs.cluster import ray_session

    with ray_session(cpus, dashboard=True):
        from jobs.train import train as run  # not before: Ray reads some of what the session sets when it is imported

        tell(run(job, settings))


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

    return partial(run, submission, words, arguments_of(command))


def arguments_of(command: partial[Any]) -> dict[str, Any]:
    """What `parse` has understood, by the names of the command's parameters."""
    return signature(command.func).bind(*command.args, **command.keywords).arguments


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
        return _parse_in_public(words)() or 0
    except (ValueError, FileNotFoundError, PermissionError) as error:
        return _fail(error, code=2)
    except (OSError, RuntimeError) as error:
        return _fail(error, code=1)
    except MemoryError as error:
        return _fail(RuntimeError(f"memory is short ({error}): give smaller files, or a machine with more"), code=1)
    except Stopped as stopped:
        print(f"mrcnn: {stopped}", file=sys.stderr)
        return stopped.exit_code
    except KeyboardInterrupt:
        print("mrcnn: interrupted", file=sys.stderr)
        return 130


def _parse_in_public(words: Sequence[str]) -> partial[Any]:
    """`parse`, but what is wrong is told without the secrets in the words, which tyro shows, in lines of its width."""
    from pipelines.storage_errors import public_uris, without_secrets

    public = [without_secrets(public_uris(word)) for word in words]
    if public == [*words]:
        return parse(words)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            return parse(words)
    except SystemExit:
        with suppress(ValueError, OSError, RuntimeError):  # a configuration cannot be read without its secrets
            parse(public)
        print("mrcnn: error: the words are wrong, and not shown, for there are secrets in them", file=sys.stderr)
        raise


def _fail(error: Exception, *, code: int) -> int:
    from pipelines.storage_errors import public_uris

    if os.environ.get("MRCNN_TRACEBACK"):
        raise error
    cause = getattr(error, "cause", None) or error  # what Ray brings from a worker has its whole traceback in its text
    print(f"mrcnn: error: {shown(public_uris(' '.join(str(cause).split())))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
