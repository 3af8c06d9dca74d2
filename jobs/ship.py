"""What a submitted job takes along: the code, addresses, and nothing that is secret or means this machine only.

Ray keeps a job's command and its environment in clear, in its logs and for all who can ask its API. So credentials
have to be in the nodes' own environment, and an argument that holds one is refused.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlsplit

from jobs.cluster import SHIPPED

PACKAGES = ("mrcnn", "pipelines", "jobs")
ROOT = Path(__file__).resolve().parent.parent
GIT_COMMIT = "MRCNN_GIT_COMMIT"  # of the shipped code, which has no .git beside it
STOP_SECONDS = 60  # from SIGTERM to SIGKILL when a job is stopped; Ray's default is 3

# user:password@ or user@ before the host; a password may hold slashes, but host:port/path@x has no password
USER_IN_URI = re.compile(r"://[^/:@\s]+(:(?!\d+/)[^@\s]*)?@")
SIGNED_URI = re.compile(r"[?&](x-amz-(signature|credential|security-token)|signature|sig|token|password|secret)=", re.I)
SECRET_NAME = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL")
SECRET_LENGTH = 8  # shorter values of such variables are found in harmless words, too

# Arguments that are URIs or paths. models:/NAME@ALIAS is none, nor is what has a scheme.
LOCATIONS = {
    "annotations", "config", "data", "images", "in_", "model", "out", "storage", "uri", "val_data", "weights",
}  # fmt: skip


def check_no_secrets(words: Sequence[str]) -> None:
    """Raises ValueError, without the secret in its message, for a word that holds a credential."""
    for index, word in enumerate(words):
        reason = secret_in(word)
        if reason:
            before = words[index - 1] if index and words[index - 1].startswith("--") else f"word {index + 1}"
            name = word.partition("=")[0] if word.startswith("--") else before
            raise ValueError(
                f"{name} after -- holds {reason}, and Ray keeps a job's command in clear: "
                "leave it out, and put credentials into the environment of the cluster's nodes"
            )


def secret_in(text: str) -> str | None:
    """What credential a text holds, in words that do not give it away."""
    if USER_IN_URI.search(text):
        return "a URI with a user or password"
    if SIGNED_URI.search(text):
        return "a signed URI"
    for name, value in os.environ.items():
        if SECRET_NAME.search(name) and len(value) >= SECRET_LENGTH and value in text:
            return f"the value of {name}"
    return None


def check_locations(settings: Mapping[str, object]) -> list[str]:
    """Local paths among a command's settings, all absolute.

    Raises ValueError for a relative one, which would be read, or written and lost, in a folder of the job's own.
    """
    local = {name: value for name, value in settings.items() if name in LOCATIONS and _is_local(value)}
    for name, value in local.items():
        if not os.path.isabs(str(value)):
            raise ValueError(
                f"--{name.strip('_').replace('_', '-')} is {str(value)!r}, a path relative to this folder, and the job "
                "runs elsewhere: give an s3:// URI, or the absolute path of a folder that all nodes share"
            )
    return list(dict.fromkeys(str(value) for value in local.values()))


def _is_local(value: object) -> bool:
    return isinstance(value, str) and "://" not in value and not value.startswith("models:/")


def job_environment() -> tuple[dict[str, str], list[str]]:
    """Variables for the job, and the names of those that stay here: they hold a credential or name this machine."""
    found = {name: os.environ[name] for name in (*SHIPPED, "MRCNN_TRACEBACK") if os.environ.get(name)}
    kept = [name for name, value in found.items() if secret_in(value) or _only_here(value)]
    sent = {name: value for name, value in found.items() if name not in kept}
    commit = git_commit()
    return sent | ({GIT_COMMIT: commit} if commit else {}) | {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}, kept


def _only_here(value: str) -> bool:
    """Whether an address is a file's or a loopback one."""
    host = urlsplit(value).hostname
    if host is None:
        return "/" in value
    return host in ("localhost", "::1") or host.startswith("127.")


@contextmanager
def staged_code(*, operators: bool) -> Iterator[str]:
    """A folder with the packages of this program and nothing else, to be sent as a job's working directory.

    Not the checkout itself: its .gitignore would keep the compiled operators back, and its data would go along.
    """
    left_out = shutil.ignore_patterns("__pycache__", "csrc", *([] if operators else ["*.so"]))
    with TemporaryDirectory(prefix="mrcnn-code-") as folder:
        for package in PACKAGES:
            shutil.copytree(ROOT / package, Path(folder, package), ignore=left_out)
        yield folder


def operators_fit(*, with_gpus: bool) -> bool:
    """Whether the compiled operators of this machine can serve nodes that run Linux on the same kind of CPU."""
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return False
    from mrcnn.ops import cuda_compiled

    return cuda_compiled() or not with_gpus


def git_commit() -> str | None:
    """Of the working tree that this code is in, or that it was shipped from.

    None where there is no git, or where this file lies in somebody else's repository (a venv in one).
    """
    here = Path(__file__).resolve()

    def git(*words: str) -> str | None:
        answer = subprocess.run(["git", *words], cwd=here.parent, capture_output=True, text=True, check=False)
        return answer.stdout.strip() if answer.returncode == 0 else None

    if shutil.which("git") is None or git("ls-files", "--error-unmatch", here.name) is None:
        return os.environ.get(GIT_COMMIT)
    return git("rev-parse", "HEAD")
