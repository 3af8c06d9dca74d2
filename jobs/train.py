"""`mrcnn train`: from shards to a trained model with Ray Train.

The driver checks everything that can be checked, makes the MLflow run and starts the workers (jobs/worker.py); whatever
happens to a worker, the next one goes on from the newest checkpoint below `<storage>/<run>`.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ray
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError, WorkerGroupError

from jobs import tracking
from jobs.checkpoint import Checkpoints
from jobs.config import TrainConfig, TrainJob
from jobs.worker import OUTCOME_FILE, Outcome, WorkerSettings, train_worker
from pipelines.loader import ShardDataset
from pipelines.storage import Store, open_store

RUN_FILE = "run.json"
MAX_FAILURES = 3  # restarts of the workers before the run is given up

# Settings that may differ when a run goes on: they change neither what was learnt nor the order of images.
FREE_TO_CHANGE = {
    "steps", "log_every", "evaluate_every", "checkpoint_every", "keep_checkpoints", "loader_threads", "pictures",
}  # fmt: skip


@dataclass(frozen=True)
class TrainSummary:
    """What came of a training."""

    run_id: str
    model_uri: str
    outcome: Outcome
    seconds: float

    def __str__(self) -> str:
        ap = "  ".join(f"{name.removeprefix('val/')} {value:.3f}" for name, value in self.outcome.metrics.items())
        return (
            f"trained to step {self.outcome.step} in {self.seconds:.0f} s, "
            f"{self.outcome.images_per_second:.1f} images/s\n"
            f"{ap}\nmodel       {self.model_uri}\nMLflow run  {self.run_id}"
        )


def train(job: TrainJob, config: TrainConfig) -> TrainSummary:
    """Train, evaluate and export a model; Ray must be running.

    Raises:
        ValueError: for settings, data or a cluster that cannot work, before anything is started.
        RuntimeError: when the workers failed too often, with the last error.
    """
    data, val_data = ShardDataset(job.data), ShardDataset(job.val_data)
    config = _fit_to_data(config, data, val_data)
    if config.global_batch % job.workers:
        raise ValueError(
            f"global_batch is {config.global_batch}, which {job.workers} workers cannot share equally: "
            "change one of them"
        )
    weights = _absolute(job.weights)
    use_gpu = _check_cluster(job.workers)
    run_store = open_store(job.storage).join(job.run)
    handle = _open_run(job, config, run_store, data, val_data)
    settings = WorkerSettings(
        config=config,
        data=data.uri,
        val_data=val_data.uri,
        run_uri=run_store.uri,
        run=handle,
        weights=weights,
        resume=job.resume,
    )
    logger = tracking.RunLogger(handle)
    started = time.monotonic()
    try:
        outcome = _fit(settings, workers=job.workers, use_gpu=use_gpu)
    except BaseException:
        logger.finish("FAILED")
        raise
    logger.finish("FINISHED")
    seconds = time.monotonic() - started
    return TrainSummary(handle.run_id, run_store.uri_of("model"), outcome, seconds)


def _absolute(weights: str | None) -> str | None:
    """The path as a worker, which runs in another directory, finds it."""
    if weights is None:
        return None
    if not Path(weights).is_file():
        raise FileNotFoundError(f"--weights: {weights} does not exist: give a .safetensors or .pth file")
    return str(Path(weights).resolve())


def _fit_to_data(config: TrainConfig, data: ShardDataset, val_data: ShardDataset) -> TrainConfig:
    if data.categories != val_data.categories:
        ours, theirs = ([c.name for c in d.categories] for d in (data, val_data))
        raise ValueError(
            f"{data.uri} has the categories {ours}, but {val_data.uri} has {theirs}: build both from the same ones"
        )
    if len(val_data) == 0:
        raise ValueError(f"{val_data.uri} holds no images: look at its rejects.parquet")
    return replace(config, model=replace(config.model, num_classes=len(data.categories)))


def _check_cluster(workers: int) -> bool:
    """Whether to train on GPUs. Ray would wait for ever for what the cluster does not have."""
    resources = ray.cluster_resources()
    gpus, cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    if gpus and workers > gpus:
        raise ValueError(f"workers is {workers}, but the Ray cluster has {gpus} GPUs: ask for at most {gpus}")
    if workers > cpus:
        raise ValueError(f"workers is {workers}, but the Ray cluster has {cpus} CPUs: ask for at most {cpus}")
    return gpus > 0


def _open_run(
    job: TrainJob, config: TrainConfig, store: Store, data: ShardDataset, val_data: ShardDataset
) -> tracking.RunHandle:
    """A new MLflow run, or the one that is resumed; run.json in the run's folder remembers which."""
    digests = {"data": data.manifest.digest, "val_data": val_data.manifest.digest}
    if store.exists(RUN_FILE):
        known = json.loads(store.read_bytes(RUN_FILE))
        if not job.resume:
            raise ValueError(f"{store.uri} has a run already: go on with --resume, or take another --run name")
        _check_unchanged(store, known, config, digests)
        handle = tracking.reopen_run(known["run_id"])
    else:
        handle = tracking.create_run(
            experiment=job.experiment,
            name=job.run,
            params={**config.to_dict(), "workers": job.workers, "data": data.uri, "val_data": val_data.uri},
            tags={
                **tracking.standard_tags(),
                tracking.MODEL_URI_TAG: store.uri_of("model"),
                tracking.VAL_DIGEST_TAG: digests["val_data"],
                "mrcnn.data_digest": digests["data"],
            },
        )
    content = {"run_id": handle.run_id, "digests": digests, "config": config.to_dict()}
    store.write_bytes(RUN_FILE, json.dumps(content, indent=2).encode())
    tracking.RunLogger(handle).json(config.to_dict(), "config.json")
    return handle


def _check_unchanged(store: Store, known: dict[str, Any], config: TrainConfig, digests: dict[str, str]) -> None:
    for name, digest in digests.items():
        if known["digests"][name] != digest:
            raise ValueError(f"{name} of {store.uri} was another data set: resume with the one it was begun with")
    # through JSON, as tuples come back from it as lists
    before, now = (tracking.flat_params(json.loads(json.dumps(c))) for c in (known["config"], config.to_dict()))
    changed = [name for name in before.keys() | now.keys() if before.get(name) != now.get(name)]
    forbidden = sorted(set(changed) - FREE_TO_CHANGE)
    if forbidden:
        details = ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in forbidden)
        raise ValueError(
            f"{store.uri} was begun with other settings ({details}): resume with the same, or start a new run"
        )


def _fit(settings: WorkerSettings, *, workers: int, use_gpu: bool) -> Outcome:
    # Ray keeps its own small notes under a name of this attempt: ours is the state that training resumes from, so
    # neither a finished attempt nor another version of Ray stands in the way.
    store = open_store(settings.run_uri)
    if store.exists(OUTCOME_FILE):
        store.remove(OUTCOME_FILE)
    logging.getLogger("ray.train").setLevel(logging.WARNING)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"settings": settings},
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=use_gpu),
        run_config=RunConfig(
            name=f"attempt-{time.time_ns() // 1_000_000}",
            storage_path=f"{settings.run_uri}/ray",
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            logging_config=LoggingConfig(log_level="WARNING"),  # type: ignore[call-arg]  # Train v2 has it
        ),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        raise _plain_error(error, settings) from error
    outcome = Outcome(**json.loads(store.read_bytes(OUTCOME_FILE)))
    if outcome.failure:
        raise RuntimeError(f"{outcome.failure}; {_newest_checkpoint(settings)}")
    return outcome


def _plain_error(error: TrainingFailedError, settings: WorkerSettings) -> Exception:
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {}
    for failure in failures.values():
        cause = failure.__cause__ or failure
        if isinstance(cause, ValueError):
            return ValueError(str(cause))
        return RuntimeError(f"training failed ({type(cause).__name__}: {cause}); {_newest_checkpoint(settings)}")
    return RuntimeError(f"training failed ({error}); {_newest_checkpoint(settings)}")


def _newest_checkpoint(settings: WorkerSettings) -> str:
    saved = Checkpoints(settings.run_uri).steps()
    if not saved:
        return f"{settings.run_uri} has no checkpoint"
    return f"the newest checkpoint in {settings.run_uri} is of step {saved[-1]}: go on with --resume"
