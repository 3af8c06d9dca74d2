"""S3 objects, whole or a range of them, each by one request that is tried again as often as it takes and no oftener.

botocore tries a request again, but not to read the body of an answer. s3fs tries both again, what botocore has tried
already, too; it would ask for the size before it reads an object; of a file that it sends again, only what is left.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fsspec.asyn import sync
from s3fs.core import S3_RETRYABLE_ERRORS

from pipelines.filesystems import BODY_ATTEMPTS, filesystem
from pipelines.local_files import check_bytes
from pipelines.storage_errors import ChangedFileError, UnreachableError, endpoint_hint, plain_errors, s3_code

SINGLE_PUT = 5 * 2**30  # bytes, S3's bound. Parts of a larger file would stay, unseen but paid for, if its writer died


def get(path: str, at_most: int | None = None) -> bytes:
    """The bytes of bucket/key. Raises as `Store` does."""
    return _get(path, {}, at_most=at_most)


def get_range(path: str, start: int, length: int, etag: str = "") -> bytes:
    """`length` bytes, at least one, from byte `start` on. Raises ChangedFileError where the object's ETag is given and
    it has another."""
    return _get(path, {"Range": f"bytes={start}-{start + length - 1}"}, etag=etag)


def _get(path: str, part: dict[str, str], *, at_most: int | None = None, etag: str = "") -> bytes:
    fs = filesystem("s3")
    bucket, _, key = path.partition("/")
    with plain_errors(f"s3://{path}"):
        data: bytes = sync(fs.loop, _read_object, fs, {"Bucket": bucket, "Key": key, **part}, at_most, etag)
        return data


async def _read_object(fs: Any, request: dict[str, str], at_most: int | None, etag: str) -> bytes:
    uri = f"s3://{request['Bucket']}/{request['Key']}"
    for attempt in range(1, BODY_ATTEMPTS + 1):
        try:
            answer = await fs._call_s3("get_object", **request)
        except OSError as error:
            if etag and s3_code(error) == "InvalidRange":  # it is shorter now
                raise ChangedFileError(f"{uri} was changed while it was being read") from None
            raise
        body = answer["Body"]
        try:
            check_bytes(uri, answer.get("ContentLength", 0), at_most)
            if etag and answer.get("ETag", etag) != etag:  # not asked for by If-Match, which not all servers know
                raise ChangedFileError(f"{uri} was changed while it was being read")
            data: bytes = await body.read()
            return data
        except S3_RETRYABLE_ERRORS:
            if attempt == BODY_ATTEMPTS:
                raise
        finally:
            body.close()
        await asyncio.sleep(0.1 * 2**attempt)
    raise AssertionError("it has returned or raised")


def put(file: Path, path: str) -> None:
    """Send a file from the disk to bucket/key; botocore, where it tries again, sends it from its start."""
    uri = f"s3://{path}"
    if (size := file.stat().st_size) > SINGLE_PUT:
        raise ValueError(f"{uri} has {size} bytes, S3 takes 5 GiB: give fewer --rows-per-shard")
    bucket, _, key = path.partition("/")
    with plain_errors(uri), file.open("rb") as body:
        filesystem("s3").call_s3("put_object", Bucket=bucket, Key=key, Body=body)


def listed(path: str, *, below: bool) -> Iterator[tuple[str, int, str]]:
    """Names, bytes and ETags of the objects in a bucket, or in bucket/prefix, in pages of 1000; without those of the
    folders `below`, if so."""
    uri, (bucket, _, prefix) = f"s3://{path}", path.partition("/")
    prefix = f"{prefix}/" if prefix else ""
    more = {} if below else {"Delimiter": "/"}
    while True:
        with plain_errors(uri):
            page = filesystem("s3").call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
        files = (each for each in page.get("Contents", ()) if not each["Key"].endswith("/"))
        yield from ((each["Key"][len(prefix) :], each["Size"], each.get("ETag", "")) for each in files)
        if page.get("IsTruncated") is False:
            return
        if not page.get("NextContinuationToken"):  # a proxy's own page, perhaps: what is not listed would be lost
            raise UnreachableError(f"{uri} cannot be listed{endpoint_hint(uri)}: the answer is not S3's")
        more["ContinuationToken"] = page["NextContinuationToken"]
