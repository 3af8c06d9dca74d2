"""What fsspec, botocore and the kernel raise, in plain words: three kinds of error that name URI and remedy."""

from __future__ import annotations

import errno
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import (
    ClientConnectorCertificateError,
    ClientConnectorDNSError,
    ClientResponseError,
    InvalidURL,
    NonHttpUrlClientError,
    TooManyRedirects,
)
from aiohttp import ClientError as BodyError
from aiohttp.http_exceptions import HttpProcessingError
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    NoCredentialsError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
AWAY = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}  # of a network's file system that may come back
# What s3fs makes of answers that a second request would get, too: 400, 405, 412, 416, 501, redirections
REFUSED = {errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.EMSGSIZE, getattr(errno, "EREMCHG", errno.ENOENT)}
OF_CREDENTIALS = {"ExpiredToken", "InvalidAccessKeyId", "RequestTimeTooSkewed"}
ASK_AGAIN = {408, 425, 429}  # a web server's words for "later"
GONE = {404, 410}
NO_HOST = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}  # not EAI_AGAIN: nobody knows now
NO_ADDRESS = (InvalidURL, NonHttpUrlClientError)  # of a redirection, too
WEB_ERRORS = (BodyError, TimeoutError)  # of aiohttp, a server that cannot be reached among them
# What stands before an @ where the host should be; a colon that no port follows: a secret key may hold slashes.
LOGIN = re.compile(r"(?<![\w+.-])([A-Za-z][\w+.-]*://)(?:[^/]*@|[^/:]*:(?!\d+/).*@)")
HALF_LOGIN = re.compile(r"(://[^/:@\[]*):(?!\d+(?:/|$))[^/@]*|(?<=http)(s?:/+|s?//+)[^/@]*@", re.IGNORECASE)  # mistyped
USERINFO = re.compile(r"""://(?:[^\s/@:"']+:[^\s@"']+|[^\s/@"']+)@""")  # in a text
SIGNING = r"(?:https?|abfss?|adl|az|wasbs?)://"  # how addresses begin that a query may sign
QUERY = re.compile(rf"({SIGNING}[^?\s'\"]*)\?[^\s'\"]*", re.IGNORECASE)
# Of addresses that a query may sign, in a line of a list also behind a quote or another column; and by what it says
SIGNED = re.compile(rf"{SIGNING}[^?]*\?|\?[^?]*(?:sig|signature|token|credential|password|secret)=", re.IGNORECASE)
LONGEST_URI = 8192  # characters, as web servers have it: more is no URI, and would take long to look through


class FileRefusedError(PermissionError):
    """One file may not be read, though its folder answers: the credentials are right."""


class CredentialsError(PermissionError):
    """The credentials are refused, whichever file is asked for."""


class UnfitFileError(ValueError):
    """What a name leads to cannot be read whole; `reason` says why, in a few words."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri} cannot be read: {reason}")
        self.reason = reason


class ChangedFileError(ValueError):
    """A file is not the one any more that was looked up before."""


class UnreachableError(ValueError):
    """The storage does not answer now, and may later: an endpoint that is down, busy or wrong."""


class OddAnswerError(UnreachableError):
    """A web server answers what it should not: it may do better the next time. If not, the file is unfit."""

    def __init__(self, uri: str, reason: str) -> None:
        super().__init__(f"{uri} cannot be read: {reason}")
        self.reason = reason


def without_secrets(uri: str) -> str:
    """A URI, or a line that should be one, as it may be stored and shown: no name and password, no query that may sign
    it, and not more than is one."""
    cut = uri if len(uri) <= LONGEST_URI else f"{uri[:LONGEST_URI]}..."
    public = HALF_LOGIN.sub(lambda found: found[1] or found[2], LOGIN.sub(r"\1", cut))
    return public.partition("?")[0] if SIGNED.search(public) else public


def public_uris(text: str) -> str:
    """A text without the user and password of URIs in it, and without what follows the ? of web addresses: it may sign
    them."""
    return QUERY.sub(r"\1", USERINFO.sub("://", text))


@contextmanager
def plain_errors(uri: str) -> Iterator[None]:
    """Turn what is raised into FileNotFoundError, PermissionError (credentials, modes) or ValueError (all else; of what
    may be over in a moment, UnreachableError)."""
    uri = without_secrets(uri)
    try:
        yield
    except (UnfitFileError, ChangedFileError):
        raise
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if (answer := _web_answer(error)) is not None:
            raise _web_error(uri, answer) from None
        if s3_code(error) == "NoSuchBucket":
            bucket = "/".join(uri.split("/")[:3])
            raise FileNotFoundError(
                f"there is no bucket {bucket}{endpoint_hint(uri)}: make it, or name another"
            ) from None
        if isinstance(error, IsADirectoryError):
            raise FileNotFoundError(f"{uri} is a folder: give a file") from None
        raise FileNotFoundError(f"there is no file {uri}{endpoint_hint(uri)}") from None
    except ProfileNotFound as error:
        raise PermissionError(f"no credentials for {uri}: {error}: unset AWS_PROFILE, or name one that is") from None
    except (NoCredentialsError, PartialCredentialsError):
        raise PermissionError(f"no credentials for {uri}: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY") from None
    except PermissionError as error:
        kind = CredentialsError if s3_code(error) in OF_CREDENTIALS else PermissionError
        raise kind(_refusal(uri, error)) from None
    except ClientResponseError as error:
        raise _web_error(uri, error) from None
    except (BotoCoreError, ClientError, BodyError, OSError, TimeoutError) as error:
        raise _other_error(uri, error) from None
    except Exception as error:
        if "://" not in uri or type(error).__module__ == "builtins":  # not of a cloud's own library
            raise
        raise _other_error(uri, error) from None


@contextmanager
def full_disk_told(path: Path) -> Iterator[None]:
    """Around the writing of a local file: a full disk as ValueError, anything else as it is."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise _full(str(path), error) from None


def make_folder(folder: Path) -> None:
    """Make a folder and those above it. Raises PermissionError or ValueError."""
    with plain_errors(str(folder)):
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError(f"{folder} cannot be a folder, a file is in its way: choose another one") from None
        except FileNotFoundError as error:  # such as in /proc
            raise PermissionError(error.strerror) from None


def endpoint_hint(uri: str) -> str:
    """Where an s3:// URI was looked for; empty for others."""
    if not uri.startswith("s3://"):
        return ""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    return (
        f" at AWS_ENDPOINT_URL={endpoint.rpartition('@')[2]}" if endpoint else " on AWS (AWS_ENDPOINT_URL is not set)"
    )


def s3_code(error: OSError) -> str:
    """What S3 calls the error; empty where it is not from S3."""
    answer = error.__cause__
    return str(answer.response.get("Error", {}).get("Code", "")) if isinstance(answer, ClientError) else ""


def _web_answer(error: OSError) -> Exception | None:
    """What a web server has answered, or that it has not, where fsspec says of it that there is no file."""
    answer = error.__cause__
    is_gone = isinstance(answer, ClientResponseError) and answer.status in GONE
    return answer if isinstance(answer, WEB_ERRORS) and not is_gone else None


def _web_error(uri: str, error: Exception) -> Exception:
    if isinstance(error, TooManyRedirects):
        return UnfitFileError(uri, "the server sends from one address to the next")
    if not isinstance(error, ClientResponseError):
        return _other_error(uri, error)
    if isinstance(error.__cause__, HttpProcessingError):
        return OddAnswerError(uri, "the server's answer is not HTTP")
    if error.status >= 500 or error.status in ASK_AGAIN:
        return UnreachableError(f"{uri} cannot be read: the server answers {error.status}")
    return PermissionError(f"{uri} was refused: the server answers {error.status}")


def _refusal(uri: str, error: PermissionError) -> str:
    if not uri.startswith("s3://"):
        return f"no permission for {uri}: check its owner and mode"
    return f"{uri} was refused ({error}): check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy"


def _other_error(uri: str, error: Exception) -> Exception:
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:
        return FileNotFoundError(f"there is no file {uri}: the name is too long")
    if isinstance(error, ClientConnectorDNSError) and error.os_error.errno in NO_HOST:
        return UnfitFileError(uri, "there is no such host")
    if isinstance(error, ClientConnectorCertificateError):
        return UnfitFileError(uri, "the server's certificate is none that is trusted")
    if isinstance(error, NO_ADDRESS):
        return UnfitFileError(uri, "the server sends to what is no web address")
    if isinstance(error, ParamValidationError):
        return ValueError(f"{uri} is not a valid URI: write s3://bucket/prefix")
    if isinstance(error, OSError) and error.errno in FULL:
        return _full(uri, error)
    if isinstance(error, OSError) and error.errno == errno.EROFS:
        return ValueError(f"{uri} cannot be written: its file system is read-only: choose another place")
    if not uri.startswith("s3://"):
        kind, told = f"{type(error).__name__}: " if "://" in uri else "", QUERY.sub(r"\1", str(error))
        is_away = "://" in uri or (isinstance(error, OSError) and error.errno in AWAY)
        return (UnreachableError if is_away else ValueError)(f"{uri} cannot be used: {kind}{told}")
    is_refused = isinstance(error, OSError) and error.errno in REFUSED
    remedy = ": check AWS_ENDPOINT_URL, AWS_REGION and the name of the bucket" if is_refused else ""
    longer = " (MRCNN_S3_READ_SECONDS is how long it is waited)" if isinstance(error, ReadTimeoutError) else ""
    return (ValueError if is_refused else UnreachableError)(
        f"{uri} cannot be reached{endpoint_hint(uri)}: {type(error).__name__}: {error}{longer}{remedy}"
    )


def _full(where: str, error: OSError) -> ValueError:
    reason = os.strerror(error.errno or 0)
    return ValueError(f"{where} cannot be written ({reason}): make room, then run the same command again")
