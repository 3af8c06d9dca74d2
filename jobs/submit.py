"""`mrcnn submit -- COMMAND ...` sends a command to a Ray cluster; `mrcnn jobs` looks after what was sent.

What can be known before the job runs is checked here, so that it is told at once: the command line itself (by cli.py,
with the parser that the job will use), credentials and local paths in it, and whether the cluster is large enough.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import is_dataclass
from datetime import UTC, datetime
from typing import Any

from ray.job_submission import JobDetails, JobStatus, JobType

from jobs.cluster import ClusterSize
from jobs.config import WorkerRange
from jobs.job_client import POLL_SECONDS, Follower, JobClient, exit_code, note
from jobs.job_commands import Submission
from jobs.ship import (
    ROOT,
    STOP_SECONDS,
    check_locations,
    check_no_secrets,
    job_environment,
    operators_fit,
    staged_code,
)

ENTRYPOINT = "python -m jobs.cli "  # in the shipped code's folder; needs no `mrcnn` script on the nodes
MLFLOW = "MLFLOW_TRACKING_URI"
MLFLOW_COMMANDS = ("train", "register", "promote")


def submit(submission: Submission, words: Sequence[str], arguments: Mapping[str, Any]) -> int:
    """Send a command, whose words were parsed as these arguments, and follow it. Returns the exit code.

    Raises:
        ValueError: for what cannot work: a credential or a relative path in the words, no cluster, one too small.
        ConnectionError: when the cluster does not answer any more.
    """
    check_no_secrets([*words, submission.name or ""])
    settings = flat_settings(arguments)
    paths = check_locations(settings)
    client = JobClient(submission.address)
    size = client.cluster_size()
    _check_size(client, size, submission, settings)
    if paths:
        note(f"{', '.join(paths)}: taken as on the cluster's nodes, not here")
    job_id = submission.name or f"{words[0]}-{secrets.token_hex(4)}"
    _send(client, job_id, submission, words, size)
    if not submission.wait:
        note(_hints(job_id, submission.address))
        print(job_id)
        return 0
    return follow(client, job_id, submission.address)


def flat_settings(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All settings by name, those in dataclasses too."""
    settings: dict[str, Any] = {}
    for name, value in arguments.items():
        settings |= vars(value) if is_dataclass(value) else {name: value}
    return settings


def _check_size(client: JobClient, size: ClusterSize, submission: Submission, settings: Mapping[str, Any]) -> None:
    """Ray would wait for ever for what a cluster does not have."""
    missing = _missing(size, submission, settings)
    if missing and size.may_grow:
        note(f"{client.url} has {size} now, but {'; '.join(missing)}: waiting for nodes, as it may have an autoscaler")
    elif missing:
        raise ValueError(f"{client.url} has {size}, but {'; '.join(missing)}: ask for less, or add nodes")


def _missing(size: ClusterSize, submission: Submission, settings: Mapping[str, Any]) -> list[str]:
    missing = []
    needs = submission.driver_needs()
    if not size.fits_a_node(needs):
        missing.append(
            f"no node has {', '.join(f'{amount:g} {name}' for name, amount in needs.items())} for the driver"
        )
    workers = WorkerRange.parse(settings["workers"]).fewest if "workers" in settings else 0
    kind = size.worker_takes(settings.get("device", "auto"))
    if workers > size.total(kind):
        missing.append(f"--workers {settings['workers']} needs {workers} {kind}s")
    cpus = settings.get("cpus")
    if cpus is not None and cpus > size.total("CPU"):
        missing.append(f"--cpus {cpus} needs {cpus} CPUs")
    elif "cpus" in settings and not missing and not size.total("CPU"):
        missing.append("the command needs CPUs")
    return missing


def _send(client: JobClient, job_id: str, submission: Submission, words: Sequence[str], size: ClusterSize) -> None:
    environment, kept = job_environment()
    for name in kept:
        note(f"{name} is not sent, as it holds a credential or names this machine: the nodes' own counts")
    if words[0] in MLFLOW_COMMANDS and MLFLOW not in environment and MLFLOW not in kept:
        note(f"{MLFLOW} is not set here: without one of the nodes', what MLflow records is lost with the job's folder")
    runtime_env: dict[str, Any] = {"env_vars": environment}
    with ExitStack() as stack:
        if submission.ship != "nothing":
            may_have_gpus = size.may_grow or size.total("GPU") > 0
            operators = submission.ship == "all" or (
                submission.ship == "auto" and operators_fit(with_gpus=may_have_gpus)
            )
            runtime_env["working_dir"] = stack.enter_context(staged_code(operators=operators))
            note(f"sending the code of {ROOT} {'with' if operators else 'without'} its compiled operators")
        client.start(
            job_id,
            entrypoint=ENTRYPOINT + shlex.join(words),
            runtime_env=runtime_env,
            entrypoint_num_cpus=submission.driver_cpus or None,
            entrypoint_num_gpus=submission.driver_gpus or None,
            entrypoint_resources=submission.driver_resources or None,
        )
    note(f"job {job_id} is at {client.url}")


def follow(client: JobClient, job_id: str, address: str | None) -> int:
    """Show a job's log until it ends. Returns its exit code; after Ctrl-C, which leaves the job alone, 130."""
    try:
        job = Follower(client, job_id).follow()
    except KeyboardInterrupt:
        note(f"job {job_id} goes on; {_hints(job_id, address)}")
        return 130
    except ConnectionError as error:
        raise ConnectionError(f"{error}, and job {job_id} may go on; {_hints(job_id, address)}") from None
    note(f"job {job_id}: {_outcome(job)}")
    return exit_code(job)


def _hints(job_id: str, address: str | None) -> str:
    where = f" --address {address}" if address else ""
    return f"follow it: mrcnn jobs logs {job_id} --follow{where}   stop it: mrcnn jobs stop {job_id}{where}"


def _outcome(job: JobDetails) -> str:
    took = f" after {_duration(job)}"
    if job.status != JobStatus.FAILED:
        return job.status.lower() + took
    if job.driver_exit_code is not None:
        return f"failed with exit code {job.driver_exit_code}{took}"
    return f"failed{took}: {(job.message or 'Ray gives no reason').strip()}"


def _duration(job: JobDetails) -> str:
    if not job.start_time:
        return "0 s"
    seconds = (job.end_time or time.time() * 1000) // 1000 - job.start_time // 1000
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def list_jobs(address: str | None) -> None:
    """Print the jobs that were submitted to a cluster, the newest last."""
    jobs = [job for job in JobClient(address).list_jobs() if job.type == JobType.SUBMISSION]
    rows = [("JOB", "STATUS", "BEGUN (UTC)", "TIME", "COMMAND")]
    for job in sorted(jobs, key=lambda job: job.start_time or 0):
        begun = datetime.fromtimestamp((job.start_time or 0) / 1000, UTC).strftime("%Y-%m-%d %H:%M:%S")
        command = job.entrypoint.replace(ENTRYPOINT, "mrcnn ")
        rows.append((job.submission_id or "", job.status.value, begun, _duration(job), command))
    widths = [max(len(row[column]) for row in rows) for column in range(4)] + [0]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))


def show_logs(job_id: str, address: str | None, *, until_end: bool) -> int:
    """Print a job's log. Returns the exit code: the job's own where its end is waited for.

    Raises ValueError for a job that the cluster does not know.
    """
    client = JobClient(address)
    client.job(job_id)
    if until_end:
        return follow(client, job_id, address)
    print(client.get_job_logs(job_id), end="")
    return 0


def stop_job(job_id: str, address: str | None) -> None:
    """Stop a job and wait for its end.

    Raises ValueError for a job that the cluster does not know, RuntimeError for one that does not end.
    """
    client = JobClient(address)
    if client.job(job_id).status.is_terminal():
        print(f"job {job_id} had ended: {_outcome(client.job(job_id))}")
        return
    client.stop_job(job_id)
    until = time.monotonic() + STOP_SECONDS + 30
    while not (job := client.job(job_id)).status.is_terminal():
        if time.monotonic() > until:
            raise RuntimeError(f"job {job_id} was told to stop, but is {job.status.value} still")
        time.sleep(POLL_SECONDS)
    print(f"job {job_id}: {_outcome(job)}")
