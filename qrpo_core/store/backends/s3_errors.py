"""Retries of temporary S3 errors, and the translation of all others into our errors."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    FlexibleChecksumError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PartialCredentialsError,
    ProxyConnectionError,
)
from botocore.parsers import ResponseParserError
from urllib3.exceptions import HTTPError

from qrpo_core.common.errors import AccessError, MissingError, StoreError

T = TypeVar("T")

_CONNECTION = (
    HTTPClientError,  # time-outs, resets, connections closed in the middle of a body
    ConnectTimeoutError,
    EndpointConnectionError,
    ProxyConnectionError,
    IncompleteReadError,  # a body shorter than announced
    FlexibleChecksumError,  # a body that changed on the way
    ResponseParserError,  # an answer cut off, or a proxy's page in its place
    HTTPError,  # urllib3's own, which botocore lets through in the body of an error
    ConnectionError,
    TimeoutError,
)
_NO_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)

#: Error codes below 500 that mean "not now", or that the request was damaged on its way.
_TEMPORARY = {
    "RequestTimeout",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "RequestLimitExceeded",
    "TooManyRequests",
    "ConditionalRequestConflict",
    "IncompleteBody",
    "BadDigest",
    "XAmzContentSHA256Mismatch",
}

#: Longest pause between two attempts, and the upper bound of the first pause; seconds.
_LONGEST, _FIRST = 5.0, 0.1

#: Longest retry of a server that has never answered, since its address is probably wrong; seconds.
_UNKNOWN_SERVER = 5.0


class ExistsError(StoreError):
    """A conditional put found an object under the key."""


class NoUploadError(StoreError):
    """A multipart upload does not exist any more: it was completed or aborted."""


class Caller:
    """Retries calls after temporary errors, with growing random pauses.

    seconds : longest time of one call with its retries; 403, 404 and 412 are never retried.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._answered = False

    def __call__(self, call: Callable[[int], T], where: str, bucket: str) -> T:
        """The result of `call(number of attempts before)`; raises its last error as one of ours."""
        started = time.monotonic()
        attempt = 0
        while True:
            try:
                result = call(attempt)
            except (BotoCoreError, ClientError, *_CONNECTION) as error:
                self._answered |= isinstance(error, ClientError)
                pause = random.uniform(0, min(_LONGEST, _FIRST * 2**attempt))
                spent = time.monotonic() - started
                if not _is_temporary(error) or spent + pause > self._limit(error):
                    raise _translated(error, where, bucket, attempt + 1, spent) from error
                time.sleep(pause)
                attempt += 1
            else:
                self._answered = True
                return result

    def _limit(self, error: Exception) -> float:
        nobody = isinstance(error, EndpointConnectionError) and not self._answered
        return min(self.seconds, _UNKNOWN_SERVER) if nobody else self.seconds


def _is_temporary(error: Exception) -> bool:
    if not isinstance(error, ClientError):
        return isinstance(error, _CONNECTION)
    status = _status(error)
    return (status >= 500 and status != 501) or status in (408, 429) or _code(error) in _TEMPORARY


def _translated(error: Exception, where: str, bucket: str, attempts: int, spent: float) -> StoreError:
    if isinstance(error, _NO_CREDENTIALS):
        return AccessError(f"{error}", where=where, remedy="set the usual AWS variables or files")
    if not isinstance(error, ClientError):
        return StoreError(
            f"{error} ({_tries(attempts, spent)})",
            where=where,
            remedy="check store.endpoint_url and the network",
        )
    code, status = _code(error), _status(error)
    if status == 412:
        return ExistsError("the key has an object already", where=where)
    if code == "NoSuchBucket":
        return StoreError(f"no bucket {bucket!r}", where=where, remedy="create it or correct store.path")
    if code == "NoSuchUpload":
        return NoUploadError("the multipart upload is gone", where=where, remedy="run again")
    if code == "RequestTimeTooSkewed":
        return AccessError(f"not allowed ({code})", where=where, remedy="set this machine's clock")
    if status in (401, 403):
        return AccessError(
            f"not allowed ({code or 'AccessDenied'})",
            where=where,
            remedy="check the AWS credentials and policy",
        )
    if status == 404:
        return MissingError("no such object", where=where)
    return StoreError(f"{status} {code}: {_text(error)} ({_tries(attempts, spent)})", where=where)


def _tries(attempts: int, spent: float) -> str:
    return f"{attempts} attempts in {spent:.1f} s"


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


def _text(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Message", "")) or "no reason given"


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
