"""A cluster's Jobs API: finding it, asking it through broken connections, following a job to its end."""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import sys
import time
from typing import Any
from urllib.parse import urlsplit

import requests
from ray.exceptions import AuthenticationError, RayError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient

from jobs.cluster import CONNECT_SECONDS, ClusterSize, may_grow
from jobs.ship import secret_in

FIRST_ANSWER_SECONDS = 10.0
ANSWER_SECONDS = 60.0  # without a byte
GIVE_UP_SECONDS = 600.0  # without any answer
POLL_SECONDS = 1.0
MAX_POLL_SECONDS = 30.0
POLL_SHARE = 0.2  # of the time may go into fetching: a long log is fetched less often
PENDING_SECONDS = 20.0  # after which it is said why a job has not begun
LOG_ATTEMPTS = 5  # to read the log of a job that has ended
MARK = "mrcnn_submission"  # in a job's metadata: which attempt to submit made it
CHATTY = ("ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging")  # of each upload
AWAY = (502, 503, 504)  # what a proxy says while the cluster behind it is away


def note(text: str) -> None:
    """For the person who waits; standard output is for what was asked for."""
    print(f"mrcnn: {text}", file=sys.stderr, flush=True)


def api_server(address: str | None) -> str:
    """URL of the Jobs API at `address`, else RAY_API_SERVER_ADDRESS, else RAY_ADDRESS.

    Each may be the URL itself or HOST:PORT, of the API or of the cluster (which Ray's own variables use for drivers).
    Raises ValueError for no address or one of another kind.
    """
    named = {"--address": address} | {name: os.environ.get(name) for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS")}
    name, value = next(((name, value) for name, value in named.items() if value), ("", ""))
    if not value or value == "local":
        raise ValueError("say which cluster: --address http://HOST:8265, or RAY_API_SERVER_ADDRESS")
    if secret_in(value):
        raise ValueError(f"{name} holds a credential: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN instead")
    if urlsplit(value).scheme in ("http", "https") and "://" in value:
        return value.rstrip("/")
    if "://" in value:
        raise ValueError(f"{name} is {value!r}: give the address of the cluster's Jobs API, http://HOST:8265")
    return f"http://{value}" if _speaks_http(name, value) else _ask_cluster(name, value)


def _speaks_http(name: str, address: str) -> bool:
    host, _, port = address.rpartition(":")
    if address == "auto":
        return False
    if not host or not port.isdigit():
        raise ValueError(f"{name} is {address!r}: give http://HOST:8265 or HOST:PORT")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"no Ray cluster at {name} {address} ({error}): is it running, and is this its port?"
        ) from None
    try:
        requests.get(f"http://{address}/api/version", timeout=CONNECT_SECONDS)
    except requests.RequestException:
        return False
    return True


def _ask_cluster(name: str, address: str) -> str:
    """Where the Jobs API of a cluster is, from the cluster's own address or `auto`."""
    from ray.dashboard.utils import ray_address_to_api_server_url

    try:
        return str(ray_address_to_api_server_url(address))
    except (ConnectionError, RuntimeError, ValueError, RayError) as error:
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ValueError(f"no Ray cluster at {name} {address} ({reason}): give http://HOST:8265") from None


class JobClient(JobSubmissionClient):
    """Ray's own client, with time limits, and with new attempts for ten minutes when a connection is lost.

    Raises ValueError where no cluster answers, or where it refuses the token; ConnectionError when it does not answer
    any more.
    """

    def __init__(self, address: str | None, give_up_seconds: float = GIVE_UP_SECONDS) -> None:
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.WARNING)
        self.url = api_server(address)
        self.patience = 0.0  # a wrong address is told at once
        self.answer_seconds = FIRST_ANSWER_SECONDS
        os.environ["RAY_API_SERVER_ADDRESS"] = self.url  # Ray prefers the variable to what it is given
        try:
            super().__init__(self.url)
        except (ConnectionError, RuntimeError, requests.RequestException) as error:
            reason = str(error).strip().split("\n")[0]
            raise ValueError(f"no Ray cluster at {self.url} ({reason}): is it running, and is this its port?") from None
        self.patience, self.answer_seconds = give_up_seconds, ANSWER_SECONDS

    def _do_request(self, method: str, endpoint: str, **options: Any) -> requests.Response:
        options.setdefault("timeout", (CONNECT_SECONDS, self.answer_seconds))
        lost_at = None
        while True:
            answer, reason = self._try(method, endpoint, options)
            if answer is not None:
                if lost_at is not None:
                    note("connected again")
                return answer
            if lost_at is None:
                lost_at = time.monotonic()
                if self.patience:
                    note(f"{self.url} does not answer ({reason}); trying again")
            if time.monotonic() - lost_at >= self.patience:
                raise ConnectionError(f"{self.url} does not answer ({reason})")
            time.sleep(POLL_SECONDS)

    def _try(self, method: str, endpoint: str, options: dict[str, Any]) -> tuple[requests.Response | None, str]:
        """The answer; or None and why there is none at the moment."""
        try:
            answer = super()._do_request(method, endpoint, **options)
        except AuthenticationError:
            raise ValueError(
                f"{self.url} refuses this client's token: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN to the cluster's"
            ) from None
        except (requests.ConnectionError, requests.Timeout, requests.exceptions.ChunkedEncodingError) as error:
            return None, type(error).__name__
        return (None, f"status {answer.status_code}") if answer.status_code in AWAY else (answer, "")

    def cluster_size(self) -> ClusterSize:
        """Resources of the living nodes."""
        answer = self._get("/api/v0/nodes?limit=10000&filter_keys=state&filter_predicates=%3D&filter_values=ALIVE")
        status = self._get("/api/cluster_status")["clusterStatus"] or {}
        nodes = tuple(node["resources_total"] for node in answer["result"]["result"])
        return ClusterSize(nodes, may_grow=may_grow(status.get("autoscalerReport")))

    def _get(self, endpoint: str) -> dict[str, Any]:
        answer = self._do_request("GET", endpoint)
        if answer.status_code != 200:
            self._raise_error(answer)
        content: dict[str, Any] = answer.json()["data"]
        return content

    def job(self, job_id: str) -> JobDetails:
        """Raises ValueError for a job that the cluster does not know."""
        try:
            return self.get_job_info(job_id)
        except RuntimeError as error:
            if "status code 404" not in str(error):
                raise
            raise ValueError(f"{self.url} knows no job {job_id}: `mrcnn jobs list` shows those it knows") from None

    def start(self, job_id: str, **request: Any) -> None:
        """`submit_job`, which a lost answer turns neither into an error nor into a second job.

        Raises ValueError for the id of another job.
        """
        mark = secrets.token_hex(8)
        try:
            self.submit_job(submission_id=job_id, metadata={MARK: mark}, **request)
        except RuntimeError as error:
            if "already exists" not in str(error):
                raise RuntimeError(f"{self.url} refuses the job: {_last_line(error)}") from None
            if (self.job(job_id).metadata or {}).get(MARK) != mark:
                raise ValueError(f"{self.url} has a job {job_id} already: give another --name") from None


class Follower:
    """Prints a job's log as it grows.

    Not by Ray's stream, which can end while the job runs: the log is fetched again, and what is new in it printed.
    """

    def __init__(self, client: JobClient, job_id: str) -> None:
        self.client = client
        self.job_id = job_id
        self.printed = 0
        self.trouble = ""
        self.say_it_waits_at = time.monotonic() + PENDING_SECONDS

    def follow(self) -> JobDetails:
        """Until the job has ended.

        Raises ConnectionError when the cluster is gone, RuntimeError when it has forgotten the job.
        """
        job = self.client.job(self.job_id)
        while not job.status.is_terminal():
            self._say_if_it_waits(job)
            began = time.monotonic()
            self.print_new()
            spent = time.monotonic() - began
            time.sleep(min(max(POLL_SECONDS, spent / POLL_SHARE), MAX_POLL_SECONDS))
            try:
                job = self.client.job(self.job_id)
            except ValueError as error:
                raise RuntimeError(f"{error}; it did before: was the cluster restarted?") from None
        for _ in range(LOG_ATTEMPTS):  # all of it is written by now
            if self.print_new():
                return job
            time.sleep(POLL_SECONDS)
        note(f"the end of the log cannot be read ({self.trouble}): the node that has it may be gone")
        return job

    def _say_if_it_waits(self, job: JobDetails) -> None:
        if job.status == JobStatus.PENDING and time.monotonic() > self.say_it_waits_at:
            note(f"job {self.job_id} has not begun: {' '.join((job.message or 'Ray gives no reason').split())}")
            self.say_it_waits_at = math.inf

    def print_new(self) -> bool:
        """Whether the log could be read; it cannot for moments, as when its last character is half written."""
        try:
            log = self.client.get_job_logs(self.job_id)
        except RuntimeError as error:
            self.trouble = _last_line(error)
            return False
        print(log[self.printed :], end="", flush=True)
        self.printed = max(self.printed, len(log))
        return True


def _last_line(error: Exception) -> str:
    """Of the traceback that Ray's server sends as its answer."""
    return str(error).strip().rstrip(".").splitlines()[-1]


def exit_code(job: JobDetails) -> int:
    """0 for a job that succeeded, else its command's own, else 1."""
    if job.status == JobStatus.SUCCEEDED:
        return 0
    code = job.driver_exit_code or 1
    return 128 - code if code < 0 else code  # a shell's way to tell a signal
