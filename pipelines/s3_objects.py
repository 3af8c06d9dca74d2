"""Whole S3 objects, each by one request that is tried again as often as it takes and no oftener.

s3fs would ask for the size before it reads one, and tries again by itself what botocore has tried again already; of a
file that it sends, only what is left of it.
"""

from __future__ import annotations

import time
from pathlib import Path

from s3fs.core import S3_RETRYABLE_ERRORS

from pipelines.filesystems import BODY_ATTEMPTS, filesystem
from pipelines.storage_errors import plain_errors

SINGLE_PUT = 5 * 2**30  # bytes, S3's bound. Parts of a larger file would stay, unseen but paid for, if its writer died


def get(path: str) -> bytes:
    """The bytes of bucket/key. Raises as `Store` does."""
    once = filesystem("s3", once=True)
    with plain_errors(f"s3://{path}"):
        for attempt in range(1, BODY_ATTEMPTS + 1):
            try:
                return once.cat_file(path, max_concurrency=1)
            except S3_RETRYABLE_ERRORS:  # botocore has tried the request again, but not to read the body of an answer
                if attempt == BODY_ATTEMPTS:
                    raise
                time.sleep(0.1 * 2**attempt)
    raise AssertionError("it has returned or raised")


def put(file: Path, path: str) -> None:
    """Send a file from the disk to bucket/key; botocore, where it tries again, sends it from its start."""
    uri = f"s3://{path}"
    if (size := file.stat().st_size) > SINGLE_PUT:
        raise ValueError(f"{uri} has {size} bytes, S3 takes 5 GiB: give fewer --rows-per-shard")
    bucket, _, key = path.partition("/")
    with plain_errors(uri), file.open("rb") as body:
        filesystem("s3", once=True).call_s3("put_object", Bucket=bucket, Key=key, Body=body)
