"""The options of `mrcnn submit`, and the commands of `mrcnn jobs`. Imports Ray only when a command runs."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Literal

Ship = Literal["auto", "all", "code", "nothing"]


@dataclass(frozen=True)
class Submission:
    """How a command is sent."""

    address: str | None = None
    """Of the cluster's Jobs API, http://HOST:8265; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS."""
    wait: bool = True
    """Show the job's log until it ends, and end with its exit code. --no-wait prints the job's id and ends."""
    name: str | None = None
    """Id of the job, new to the cluster; by default the command's name and random digits."""
    ship: Ship = "auto"
    """What is sent: all is this code with its compiled operators; code leaves those to the ones installed on the nodes;
    nothing uses the code installed there; auto is all where the operators fit the cluster, else code."""
    driver_cpus: float = 0.0
    """CPUs of one node that the command itself reserves, beside those of its workers."""
    driver_gpus: float = 0.0
    """GPUs of the same."""
    driver_resources: dict[str, float] = field(default_factory=dict)
    """Other resources of the same, NAME AMOUNT ...; a resource that few nodes have puts the command there."""

    def __post_init__(self) -> None:
        if self.name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", self.name):
            raise ValueError(f"name is {self.name!r}, but may have letters, digits, '.', '_' and '-' only")
        for name, amount in self.driver_needs().items():
            if not amount > 0:
                raise ValueError(f"{name} for the driver is {amount}, but must be positive: leave it out for none")

    def driver_needs(self) -> dict[str, float]:
        """Resources that one node must have."""
        own = {"CPU": self.driver_cpus, "GPU": self.driver_gpus}
        return {name: amount for name, amount in own.items() if amount} | self.driver_resources


def list_(address: str | None = None) -> None:
    """List the jobs of a cluster, the newest last.

    Args:
        address: Of the cluster's Jobs API, http://HOST:8265; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
    """
    from jobs.submit import list_jobs

    list_jobs(address)


def logs(job: str, /, follow: bool = False, address: str | None = None) -> int:
    """Print a job's log.

    Args:
        job: The job's id.
        follow: Go on until the job has ended, and end with its exit code.
        address: Of the cluster's Jobs API, http://HOST:8265; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
    """
    from jobs.submit import show_logs

    return show_logs(job, address, until_end=follow)


def stop(job: str, /, address: str | None = None) -> None:
    """Stop a job: SIGTERM, a minute to end by itself, then SIGKILL.

    Args:
        job: The job's id.
        address: Of the cluster's Jobs API, http://HOST:8265; by default RAY_API_SERVER_ADDRESS or RAY_ADDRESS.
    """
    from jobs.submit import stop_job

    stop_job(job, address)
