"""Start or join a Ray cluster, quietly and explicitly. Imports Ray only when asked to."""

from __future__ import annotations

import json
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

CONNECT_SECONDS = 5
API_ADDRESS = "RAY_API_SERVER_ADDRESS"
LOCAL = (None, "local")  # values of RAY_ADDRESS with which a Ray is started here

# Where buckets and MLflow are, and how long to wait, for workers on other machines. No credential is among them: Ray
# writes a runtime_env into its logs in clear. Those have to be in the nodes' own environment.
SHIPPED = (
    "AWS_REGION", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "MLFLOW_TRACKING_URI",
    "MLFLOW_S3_ENDPOINT_URL", "MRCNN_S3_READ_SECONDS",
)  # fmt: skip

QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # its coming default; unset, Ray warns of it in every worker
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS": "1",
    "RAY_DEDUP_LOGS_ALLOW_REGEX": r"\b(step \d+|going on from)\b",  # progress: similar lines of others do not hide it
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",  # jobs/ray_callbacks.py has it without an error at every start
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # it makes every print a log line too, and overrides redirect_stdout
}


@contextmanager
def ray_session(cpus: int | None = None, *, dashboard: bool = False) -> Iterator[None]:
    """A Ray to work with: the one at RAY_ADDRESS, else one on this machine with `cpus` CPUs (default: all of
    them), with a dashboard, which takes a tenth of a CPU even where nothing happens, only for Ray Train, which asks it.

    It ends with the block. Within a process that has a Ray already this does nothing. Raises ValueError for a
    bad number of CPUs or a cluster that cannot be reached.
    """
    if cpus is not None and cpus < 1:
        raise ValueError(f"--cpus is {cpus}, but must be at least 1")
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not sys.stdout.isatty():
        os.environ.setdefault("RAY_COLOR_PREFIX", "0")  # workers' lines in a log file
    address = os.environ.get("RAY_ADDRESS")
    if address in LOCAL:
        _authenticate_locally()
    import ray

    if ray.is_initialized():
        yield
        return
    with ExitStack() as stack:
        dashboard_port = stack.enter_context(_own_dashboard()) if dashboard and address in LOCAL else None
        _connect(address, cpus, dashboard_port)
        stack.callback(ray.shutdown)
        _quiet_progress()
        yield


@contextmanager
def _own_dashboard() -> Iterator[int]:
    """A port for the dashboard of a Ray that is started here, by which its processes find it.

    Ray Train asks the dashboard for its actors, and would take another cluster's: the one that this variable names for
    `mrcnn submit`, or, where several run on this machine, none.
    """
    before = os.environ.get(API_ADDRESS)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    os.environ[API_ADDRESS] = f"http://127.0.0.1:{port}"
    try:
        yield port
    finally:
        del os.environ[API_ADDRESS]
        if before is not None:
            os.environ[API_ADDRESS] = before


def _connect(address: str | None, cpus: int | None, dashboard_port: int | None) -> None:
    import ray

    common: dict[str, Any] = {"logging_level": logging.ERROR, "configure_logging": True}
    if address in LOCAL:
        dashboard: dict[str, Any] = {"include_dashboard": dashboard_port is not None}
        if dashboard_port is not None:
            dashboard |= {"dashboard_host": "127.0.0.1", "dashboard_port": dashboard_port}
        ray.init(address="local", num_cpus=cpus, **dashboard, **common)
        return
    _check_reachable(address)
    try:
        ray.init(address=address, runtime_env={"env_vars": _shipped_environment()}, **common)
    except (ConnectionError, RuntimeError, ValueError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(
            f"no Ray cluster at RAY_ADDRESS={address} ({reason}): start it, or unset RAY_ADDRESS"
        ) from None


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes before it gives up on a wrong host or port."""
    host, separator, port = address.rpartition("://")[2].rpartition(":")
    if not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(f"no Ray cluster at RAY_ADDRESS={address} ({error}): start it, or unset RAY_ADDRESS") from None


def _shipped_environment() -> dict[str, str]:
    """Addresses for the workers, but not one with a password in it."""
    if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ:  # a submitted job: its own runtime_env has reached the workers
        return {}
    return {name: os.environ[name] for name in SHIPPED if "@" not in os.environ.get(name, "@")}


def _authenticate_locally() -> None:
    """A token for this session alone, in the environment that all its processes inherit.

    A local Ray turns token authentication on by itself. Without a token it would write one to the home
    directory, and a later `ray start` on this machine would then ask for it from clients that know nothing of
    it. (Setting RAY_AUTH_MODE=token here is too late where Ray was imported before: the driver would go
    without.)
    """
    if "RAY_AUTH_MODE" not in os.environ and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _quiet_progress() -> None:
    """Ray Data's bars only where someone watches them; its log lines only where they warn."""
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = sys.stderr.isatty()
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # warns that the bars are off


@dataclass(frozen=True)
class ClusterSize:
    """What a cluster has: resources of its living nodes, and whether it may get more of them."""

    nodes: tuple[Mapping[str, float], ...]
    may_grow: bool

    def total(self, resource: str) -> int:
        """How many workers with one each would fit into all nodes."""
        return sum(int(node.get(resource, 0)) for node in self.nodes)

    def worker_takes(self, device: str) -> str:
        """The resource that a training worker takes one of, for a `TrainJob.device`."""
        if device == "auto":
            return "GPU" if self.total("GPU") else "CPU"
        return device.upper()

    def fits_a_node(self, wanted: Mapping[str, float]) -> bool:
        return any(all(node.get(name, 0) >= amount for name, amount in wanted.items()) for node in self.nodes)

    def __str__(self) -> str:
        return f"{self.total('CPU')} CPUs and {self.total('GPU')} GPUs on {len(self.nodes)} nodes"


def cluster_size() -> ClusterSize:
    """Of the cluster that this process has joined."""
    import ray
    from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
    from ray.experimental.internal_kv import _internal_kv_get  # what Ray's own /api/cluster_status reads

    nodes = tuple(node["Resources"] for node in ray.nodes() if node["Alive"])
    if os.environ.get("RAY_ADDRESS") in LOCAL:  # one that was started here, perhaps a moment ago
        return ClusterSize(nodes, may_grow=False)
    status = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    return ClusterSize(nodes, may_grow=may_grow(status.get("autoscaler_report")))


def may_grow(autoscaler_report: Mapping[str, Any] | None) -> bool:
    """Whether a cluster may get nodes, from what its monitor reports.

    Without an autoscaler Ray's monitor reports each node as a kind of its own, "node_ID". All else, no report included
    (the second version of the autoscaler writes none), may be a cluster that grows.
    """
    report = autoscaler_report or {}
    kinds = report.get("nodeTypeMapping") or dict(report.get("node_type_mapping") or ())
    return not kinds or any(kind != f"node_{node}" for node, kind in kinds.items())
