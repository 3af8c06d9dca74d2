"""`mrcnn replay-mlflow`: give MLflow what it could not take while a run was trained."""

from __future__ import annotations

from jobs import tracking
from jobs.tracking_log import replay, unsent
from jobs.train import read_run_file
from pipelines.storage import open_store


def replay_run(run: str) -> str:
    """Write what is kept in a run's folder into its run in MLflow. Returns what was done, in words.

    Doing it twice is harmless. Raises ValueError where MLflow is not there or does not know the run, RuntimeError where
    something could not be written.
    """
    store = open_store(run).check_folder()
    run_id = read_run_file(store)["run_id"]
    missed = unsent(store.uri, "not tried yet")
    if missed is None:
        return f"MLflow has all of {store.uri}"
    tracking.find_run(run_id)
    left = replay(tracking.RunHandle(run_id, tracking.tracking_uri()), store.uri)
    if left:
        raise RuntimeError(str(left))
    return f"written to MLflow run {run_id}: {missed.counts}"
