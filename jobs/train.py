"""`mrcnn train`: from shards to a trained model with Ray Train.

The driver checks everything that can be checked, makes the MLflow run and starts the workers (jobs/worker.py); whatever
happens to a worker, the next one goes on from the newest checkpoint below `<storage>/<run>`. A training may have
several phases (jobs/schedule.py), one after the other, with proposals made between them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError

from jobs import tracking
from jobs.beside import evaluates_beside, evaluating_beside
from jobs.checkpoint import Checkpoints
from jobs.cluster import cluster_size
from jobs.config import TrainConfig, TrainJob, WorkerRange
from jobs.evaluate import meanings
from jobs.failures import EndOfTries, plain_error
from jobs.orders import StopRequest
from jobs.ray_callbacks import NoteTermination, WatchPreemptions
from jobs.registry import resolve_model
from jobs.schedule import PhaseOfRun, phase_uris, phases_of_run
from jobs.stopping import Signals, Stopped
from jobs.summary import TrainSummary, summary_of
from jobs.tracking_log import replay, run_status, unsent
from jobs.worker import OUTCOME_FILE, Outcome, WorkerSettings, train_worker
from mrcnn.model import MaskRCNN
from mrcnn.weights import load_weights
from pipelines.dataset import ShardDataset
from pipelines.order import step_parts
from pipelines.patience import patiently
from pipelines.propose import write_proposals
from pipelines.storage import Store, open_store
from pipelines.storage_errors import UnreachableError

RUN_FILE = "run.json"

# Ray's view of which nodes there are is up to 20 s old. An elastic group that asks for a node which has just died would
# wait for it a minute by default, before it is made smaller.
START_TIMEOUT, ELASTIC_START_SECONDS = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "10"

# What may differ when a run goes on, beside optimizer.*: neither the model nor the order of images hangs on it.
MAY_CHANGE = {
    "steps", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "loader_threads", "pictures",
    "images_at_once", "on_nan", "compile",
}  # fmt: skip


def train(job: TrainJob, config: TrainConfig) -> TrainSummary:
    """Train, evaluate and export a model; Ray must be running.

    Raises:
        ValueError: for settings, data or a cluster that cannot work, before anything is started.
        RuntimeError: when the workers failed too often, with the last error.
    """
    data, val_data = ShardDataset(job.data), ShardDataset(job.val_data)
    config = _fit_to_data(config, data, val_data)
    _check_shares(config, job.worker_range)
    weights = _check_weights(job.weights, config, data)
    use_gpu = _check_cluster(job)
    run_store = open_store(job.storage).join(job.run)
    handle = _open_run(job, config, run_store, data, val_data)
    request, bars = StopRequest(handle.run_id), sys.stdout.isatty() and sys.stderr.isatty()
    beside = evaluates_beside(job, use_gpu=use_gpu)
    phases = [
        WorkerSettings(
            config, data.uri, val_data.uri, handle, weights, phase, request, bars=bars, evaluate_beside=beside
        )
        for phase in phases_of_run(config, run_store.uri)
    ]
    phases[-1].validation.retry_failures()
    started = time.monotonic()
    with run_status(handle, run_store.uri) as end, Signals() as signals:
        tracking.describe_run(handle, config.to_dict(), _datasets(data, val_data))
        for settings in phases:
            if not _is_finished(settings.phase):
                proposals = _propose(settings.phase, data, job.run)
                settings = replace(settings, proposals=proposals)
                with evaluating_beside(settings, workers=job.worker_range.most, use_gpu=use_gpu):
                    outcome = _fit(settings, _scaling(job, use_gpu), signals)
        patiently(lambda: phases[-1].validation.checkpoints.prune(config.keep_checkpoints))  # waited for until now
    seconds = time.monotonic() - started
    return summary_of(phases[-1], outcome, seconds=seconds, unsent=end.unsent)


def _is_finished(phase: PhaseOfRun) -> bool:
    """Whether there is nothing left to do; never of the last phase, which evaluates at least."""
    store = open_store(phase.uri)
    if phase.is_last or not store.exists(OUTCOME_FILE):
        return False
    outcome = _read_outcome(store)
    return outcome.step == phase.first_step + phase.steps


def _propose(phase: PhaseOfRun, data: ShardDataset, run: str) -> str | None:
    """Where the proposals are that a phase trains on: beside the shards, once they are made."""
    if phase.proposer_uri is None:
        return None
    uri = _proposals_uri(phase, data, run)
    print(f"{phase.label}proposals for {len(data)} images: {uri}", flush=True)
    return write_proposals(resolve_model(phase.proposer_uri).files, data, uri).uri


def _proposals_uri(phase: PhaseOfRun, data: ShardDataset, run: str) -> str:
    return f"{data.uri}/proposals/{run}-{phase.phase.proposals_of}"


def _check_no_proposals(phases: Sequence[PhaseOfRun], data: ShardDataset, run: str) -> None:
    """A new run would only find out after its first phase that the place is taken."""
    for phase in phases:
        uri = _proposals_uri(phase, data, run)
        if phase.proposer_uri and any(open_store(uri).list()):
            raise ValueError(f"{uri} holds the proposals of another run: remove it, or take another --run name")


def _check_weights(weights: str | None, config: TrainConfig, data: ShardDataset) -> str | None:
    """The path as a worker, which runs in another directory, finds it; tried here, where an error is plain to see."""
    if weights is None:
        if config.model.backbone.frozen_stages or config.model.backbone.norm == "frozen_bn":
            print("warning: parts of the body are frozen as they are at random: give --weights, or set", flush=True)
            print("         --model.backbone.norm gn --model.backbone.frozen-stages 0", flush=True)
        return None
    load_weights(MaskRCNN(config.model, data.categories), weights)
    return str(Path(weights).resolve())


def _fit_to_data(config: TrainConfig, data: ShardDataset, val_data: ShardDataset) -> TrainConfig:
    for each in (data, val_data):
        if len(each) == 0:
            raise ValueError(f"{each.uri} holds no images: look at its rejects.parquet")
        if not each.categories:
            raise ValueError(
                f"{each.uri} has no categories, and so no annotations: build it from images that have some"
            )
    keypoints = config.model.keypoint.num_keypoints
    ours, theirs = (meanings(d.categories, with_keypoints=keypoints > 0) for d in (data, val_data))
    if ours != theirs:
        raise ValueError(
            f"{data.uri} has the categories {ours}, but {val_data.uri} has {theirs}: build both from the same ones"
        )
    named = max(len(category.keypoints) for category in data.categories)
    if keypoints and keypoints != named:
        raise ValueError(
            f"model.keypoint.num_keypoints is {keypoints}, but the categories of {data.uri} name {named} keypoints: "
            "set it to that, or build the shards from annotations that name keypoints"
        )
    rpn = replace(config.model.rpn, features="own") if config.rpn == "separate" else config.model.rpn
    return replace(config, model=replace(config.model, num_classes=len(data.categories), rpn=rpn))


def _check_shares(config: TrainConfig, workers: WorkerRange) -> None:
    """That the images of a step can be shared between any number of workers that there may be."""
    for world_size in range(workers.fewest, workers.most + 1):
        step_parts(config.global_batch, rank=0, world_size=world_size, images_at_once=config.images_at_once)


def _check_cluster(job: TrainJob) -> bool:
    """Whether to train on GPUs. Ray would wait for ever for what the cluster never has."""
    size, fewest = cluster_size(), job.worker_range.fewest
    kind = size.worker_takes(job.device)
    total = size.total(kind)
    if fewest > total:
        lack = f"workers is {job.workers}, but the Ray cluster has {total} {kind}s"
        if not size.may_grow:
            remedy = f"ask for at most {total}" if total else f"add nodes that have some, or drop --device {job.device}"
            raise ValueError(f"{lack}: {remedy}")
        print(f"{lack}: waiting for nodes, as it may have an autoscaler", flush=True)
    return kind == "GPU"


def _open_run(
    job: TrainJob, config: TrainConfig, store: Store, data: ShardDataset, val_data: ShardDataset
) -> tracking.RunHandle:
    """A new MLflow run, or the one that is resumed; run.json in the run's folder remembers which."""
    digests = _digests(job, config, data, val_data)
    saved = {uri: steps for uri in phase_uris(store.uri) if (steps := Checkpoints(uri).steps())}
    if store.exists(RUN_FILE):
        if not job.resume:
            raise ValueError(f"{store.uri} has a run already: go on with --resume, or take another --run name")
        known = read_run_file(store)
        if saved:  # without a checkpoint nothing has been learnt that other settings could contradict
            _check_unchanged(store, known, config, digests, saved)
        handle = _reopen_run(known["run_id"], store.uri)
    else:
        if saved:
            raise ValueError(f"{store.uri} has checkpoints but no {RUN_FILE}: take another --run name")
        if job.resume:
            print(f"nothing to resume in {store.uri}: beginning a new run", flush=True)
        _check_no_proposals(phases_of_run(config, store.uri), data, job.run)
        # fails here, before MLflow has a run, where the storage cannot be written
        store.write_bytes("config.json", json.dumps(config.to_dict(), indent=2).encode())
        handle = _create_run(job, config, store, data, val_data)
    content = {"run_id": handle.run_id, "digests": digests, "config": config.to_dict()}
    store.write_bytes(RUN_FILE, json.dumps(content, indent=2).encode())
    return handle


def _digests(job: TrainJob, config: TrainConfig, data: ShardDataset, val_data: ShardDataset) -> dict[str, str]:
    """Of what a run may not change on the way, beside its settings."""
    digests = {"data": data.manifest.digest, "val_data": val_data.manifest.digest}
    if config.rpn == "four_step":  # whose second phase, too, starts from the initial weights
        file = Path(job.weights).read_bytes() if job.weights else b""
        digests["weights"] = hashlib.sha256(file).hexdigest()
    return digests


def _create_run(
    job: TrainJob, config: TrainConfig, store: Store, data: ShardDataset, val_data: ShardDataset
) -> tracking.RunHandle:
    where = {"workers": job.workers, "weights": job.weights, "data": data.uri, "val_data": val_data.uri}
    return tracking.create_run(
        experiment=job.experiment,
        name=job.run,
        params={**config.to_dict(), **where},
        tags={**tracking.standard_tags(), tracking.MODEL_URI_TAG: store.uri_of("model")},
    )


def _reopen_run(run_id: str, run_uri: str) -> tracking.RunHandle:
    """Go on with a run in MLflow, which first gets what it has missed."""
    handle = tracking.reopen_run(run_id)
    if missed := unsent(run_uri, "not tried yet"):
        print(f"writing to MLflow what it has missed: {missed.counts}", flush=True)
        replay(handle, run_uri)
        tracking.reopen_run(run_id)  # how the run had ended may have been among it
    return handle


def _datasets(data: ShardDataset, val_data: ShardDataset) -> list[tracking.DatasetOfRun]:
    return [
        tracking.DatasetOfRun(each.uri, each.manifest.digest, len(each), context)
        for each, context in ((data, "training"), (val_data, "validation"))
    ]


def read_run_file(store: Store) -> dict[str, Any]:
    """run_id, digests and config from `RUN_FILE` in a run's folder. Raises ValueError if it is damaged."""
    try:
        known = json.loads(store.read_bytes(RUN_FILE))
        return {key: known[key] for key in ("run_id", "digests", "config")}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{store.uri_of(RUN_FILE)} is damaged ({error!r}): take another --run name") from error


def _check_unchanged(
    store: Store, known: dict[str, Any], config: TrainConfig, digests: dict[str, str], saved: dict[str, list[int]]
) -> None:
    for name, digest in digests.items():
        if known["digests"].get(name) != digest:
            raise ValueError(f"{name} of {store.uri} was another one: resume with what it was begun with")
    newest = max(steps[-1] for steps in saved.values())
    if config.steps < newest:
        raise ValueError(f"steps is {config.steps}, but {store.uri} is at step {newest}: ask for at least as many")
    # through JSON, as tuples come back from it as lists
    before, now = (tracking.flat_params(json.loads(json.dumps(c))) for c in (known["config"], config.to_dict()))
    changed = sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name))
    details = {name: f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed}
    # a phase that is finished has had its steps
    may_change = MAY_CHANGE if config.rpn == "joint" else MAY_CHANGE - {"steps"}
    forbidden = [name for name in changed if name not in may_change and not name.startswith("optimizer.")]
    if forbidden:
        raise ValueError(
            f"{store.uri} was begun with other settings ({', '.join(details[name] for name in forbidden)}): "
            "resume with the same, or start a new run"
        )
    for line in details.values():
        print(f"changed on resuming: {line}", flush=True)


def _scaling(job: TrainJob, use_gpu: bool) -> ScalingConfig:
    workers = job.worker_range
    if not workers.is_elastic:
        return ScalingConfig(num_workers=workers.most, use_gpu=use_gpu)
    os.environ.setdefault(START_TIMEOUT, ELASTIC_START_SECONDS)
    return ScalingConfig(  # Train v2 has both
        num_workers=(workers.fewest, workers.most),  # type: ignore[arg-type]
        elastic_resize_monitor_interval_s=job.resize_every,  # type: ignore[call-arg]
        use_gpu=use_gpu,
    )


def _fit(settings: WorkerSettings, scaling: ScalingConfig, signals: Signals) -> Outcome:
    # Ray keeps its own small notes under a name of this attempt: ours is the state that training resumes from, so
    # neither a finished attempt nor another version of Ray stands in the way.
    store = open_store(settings.phase.uri)
    if patiently(lambda: store.exists(OUTCOME_FILE)):
        patiently(lambda: store.remove(OUTCOME_FILE))
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings},
        scaling_config=scaling,
        run_config=RunConfig(
            name=f"attempt-{time.time_ns() // 1_000_000}",
            storage_path=f"{settings.phase.run_uri}/ray",
            failure_config=FailureConfig(max_failures=-1),
            # of controller and workers; what Train v2 takes
            callbacks=[EndOfTries(settings.phase.uri), NoteTermination(), WatchPreemptions()],  # type: ignore[list-item]
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Train v2 has it
        ),
    )
    settings.request.withdraw()
    try:
        signals.wait_for(trainer.fit, settings.request.make)
    except TrainingFailedError as error:
        raise plain_error(error, _newest_checkpoint(settings.phase)) from error
    finally:
        settings.request.withdraw()
    outcome = patiently(lambda: _read_outcome(store))
    has_more = outcome.stopped or settings.evaluate_beside or not settings.phase.is_last
    if signals.received and has_more:
        raise Stopped(signals.received, _newest_checkpoint(settings.phase))
    return outcome


def _read_outcome(store: Store) -> Outcome:
    return Outcome(**json.loads(store.read_bytes(OUTCOME_FILE)))


def _newest_checkpoint(phase: PhaseOfRun) -> str:
    try:
        saved = Checkpoints(phase.uri).steps()
    except UnreachableError:  # which what went wrong first has told
        return f"once {phase.uri} answers, go on with --resume"
    if not saved:
        return f"{phase.uri} has no checkpoint"
    return f"the newest checkpoint in {phase.uri} is of step {saved[-1]}: go on with --resume"
