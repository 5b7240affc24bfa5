"""S3 by s3fs, with one retry policy, checked lengths, and every request counted.

`persist` is the only retry loop. Those of botocore and s3fs are switched off, because their waits
multiply: a server that never answers would hold a call for minutes.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import logging
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import botocore.session  # type: ignore[import-untyped]
import s3fs
from aiobotocore.config import AioConfig  # type: ignore[import-untyped]
from aiobotocore.session import AioSession  # type: ignore[import-untyped]
from aiohttp import ClientError as HttpError
from botocore import exceptions as boto
from fsspec.asyn import sync_wrapper
from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_exception,
    wait_random_exponential,
)

from inkdask.errors import InkdaskError, SettingsError, UnavailableError
from inkdask.storage.counting import count

log = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10  # seconds
READ_TIMEOUT = 15  # seconds without receiving a byte
TRIES = 8
TRIES_IN_SILENCE = 3  # 3 x 15 s, so that a silent server is an error within a minute

_SILENCE = (TimeoutError, boto.ConnectTimeoutError, boto.ReadTimeoutError)
_PASSING = (*_SILENCE, ConnectionError, boto.ConnectionError, boto.HTTPClientError, HttpError)
_LASTING = (boto.SSLError, boto.ProxyConnectionError)

# Rights, by the beginning of an operation's name; all others upload or copy.
_RIGHTS = {"List": "ListBucket", "Head": "GetObject", "GetO": "GetObject", "Dele": "DeleteObject"}


class S3FileSystem(s3fs.S3FileSystem):
    """S3 file system that counts, checks and retries; made by `connect`."""

    retries = 1  # because `persist` retries

    async def set_session(self, refresh: bool = False, kwargs: Any = None) -> Any:
        """Open the session.

        s3fs closes only sessions of its own event loop at exit, so those of zarr's are added.
        """
        is_new = self._s3 is None
        try:
            session = await super().set_session(refresh=refresh)
        except boto.BotoCoreError:
            raise
        except ValueError as error:  # botocore raises no more than this for a bad address
            raise SettingsError(
                f"{endpoint_variable() or 'endpoint_url'} must be a URL such as http://minio:9000, "
                f"whose host has only letters, digits, dots and hyphens: {error}."
            ) from error
        if is_new and self.asynchronous:
            atexit.register(self.close_session, asyncio.get_running_loop(), self._s3creator)
        return session

    async def _call_s3(self, method: str, *args: Any, **kwargs: Any) -> Any:
        async def call() -> Any:
            count(requests=1)
            ask = super(S3FileSystem, self)._call_s3
            try:
                return await ask(method, *args, **kwargs)
            except OSError as error:
                if method == "head_object" and _code(error) in ("400", "403"):
                    # The answer to HEAD has no room for the reason.
                    count(requests=1)
                    got = await ask("get_object", *args, **kwargs, Range="bytes=0-0")
                    got["Body"].close()
                raise

        return await persist(call, method, kwargs)

    call_s3 = sync_wrapper(_call_s3)

    async def _cat_file(
        self,
        path: str,
        version_id: str | None = None,
        start: int | None = None,
        end: int | None = None,
        etag: str = "",
        **_: Any,
    ) -> bytes:
        bucket, key, _version = self.split_path(path)
        request: dict[str, Any] = {"Bucket": bucket, "Key": key}
        if etag:
            request["IfMatch"] = etag
        if start is not None or end is not None:
            request["Range"] = await self._process_limits(path, start, end)

        async def get() -> bytes:
            count(requests=1)
            try:
                response = await super(S3FileSystem, self)._call_s3("get_object", **request)
            except FileNotFoundError as error:
                if _code(error) == "NoSuchKey" or error.filename:  # a missing token file
                    raise
                # Because zarr reads zeros for what is not there, a proxy's page included.
                raise OSError(f"no answer of S3: {error}") from error.__cause__
            async with response["Body"] as body:
                data: bytes = await body.read()
            if len(data) != response["ContentLength"]:
                size = response["ContentLength"]
                raise ConnectionError(f"s3://{path} sent {len(data)} of {size} bytes")
            count(bytes_read=len(data))
            return data

        return await persist(get, "get_object", request)

    def __reduce__(self) -> tuple[Any, ...]:
        # No credentials are pickled, because graphs travel to other machines.
        return connection, (self.asynchronous,)


_lock = threading.Lock()
_connections: dict[Any, S3FileSystem] = {}


def connection(asynchronous: bool = False) -> S3FileSystem:
    """Return this process's connection for the current ``AWS_*`` settings.

    ``asynchronous`` returns a connection for zarr, which runs its own event loop.
    """
    settings = tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))
    key = (os.getpid(), asynchronous, settings)
    with _lock:
        if key not in _connections:
            _connections[key] = connect(asynchronous)
        return _connections[key]


def connect(asynchronous: bool) -> S3FileSystem:
    """Connect to S3 by the standard ``AWS_*`` settings; without credentials, anonymously.

    ``AWS_REQUEST_PAYER=requester`` reads requester-pays buckets.
    """
    role, token = (os.environ.get(f"AWS_{it}") for it in ("ROLE_ARN", "WEB_IDENTITY_TOKEN_FILE"))
    try:
        anonymous = botocore.session.get_session().get_credentials() is None
    except boto.BotoCoreError as error:
        reason = "AWS_ROLE_ARN is not set" if token and not role else str(error).rstrip(".")
        raise SettingsError(f"The AWS credentials cannot be used: {reason}.") from error
    if anonymous and role:
        raise SettingsError("AWS_ROLE_ARN is set, and AWS_WEB_IDENTITY_TOKEN_FILE is not.")
    # aiobotocore would log the traceback of an error that is reported as a sentence.
    logging.getLogger("aiobotocore.credentials").setLevel(logging.CRITICAL)
    config = {
        "connect_timeout": CONNECT_TIMEOUT,
        "read_timeout": READ_TIMEOUT,
        "retries": {"total_max_attempts": 1, "mode": "standard"},
        "max_pool_connections": 128,
        # S3-compatible servers refuse the newer checksum headers.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    session = AioSession()
    session.set_default_client_config(AioConfig(**config))  # for STS, too
    return S3FileSystem(
        anon=anonymous,
        asynchronous=asynchronous,
        session=session,
        requester_pays=os.environ.get("AWS_REQUEST_PAYER") == "requester",
        use_listings_cache=False,
        skip_instance_cache=True,
        config_kwargs=config,
    )


def endpoint_variable(service: str = "S3") -> str | None:
    """Name of the environment variable that holds the endpoint of a service, or None."""
    variables = (f"AWS_ENDPOINT_URL_{service}", "AWS_ENDPOINT_URL")  # in the order of botocore
    return next((variable for variable in variables if os.environ.get(variable)), None)


def _code(error: BaseException) -> str:
    """Return what S3 calls an error; empty for an answer that is no error of S3."""
    return str(getattr(error.__cause__, "response", {}).get("Error", {}).get("Code", ""))


def refusal(error: BaseException, is_anonymous: bool) -> str:
    """End a sentence with the right that S3 refuses, and with its reason."""
    refused = error.__cause__
    if not isinstance(refused, boto.ClientError):
        return f": {error}"
    code, reason = (refused.response["Error"].get(key) or "" for key in ("Code", "Message"))
    if code not in ("AccessDenied", "403"):  # of wrong or expired keys
        return f": {code} {reason}".rstrip(". ") + f" (the keys are those of {_place_of_keys()})"
    keyless = "no AWS credentials were found, and it is not open to all" if is_anonymous else ""
    right = _RIGHTS.get(refused.operation_name[:4], "PutObject")
    return f" (s3:{right}): {keyless or reason or code}".rstrip(".")


def _place_of_keys() -> str:
    """Return the variable or botocore's name of the place that the credentials come from."""
    method = getattr(botocore.session.get_session().get_credentials(), "method", None)
    return "AWS_ACCESS_KEY_ID" if method == "env" else str(method)


def _of_credentials(error: Exception) -> InkdaskError | None:
    """Return the sentence for a failure to get credentials; None for a failure of S3."""
    refused, name = error.__cause__, endpoint_variable("STS")
    # s3fs raises the KeyError where a server refuses in another way than STS.
    if isinstance(error, KeyError) or getattr(refused, "operation_name", "").startswith("Assume"):
        sts = f"STS at {os.environ[name]} ({name})" if name else "STS"
        reason = str(refused or "it is no STS").rstrip(".")
        token = os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE")
        by = f" by the token in AWS_WEB_IDENTITY_TOKEN_FILE {token}" if token else ""
        return InkdaskError(f"{sts} refuses the role of AWS_ROLE_ARN{by}: {reason}.")
    url = getattr(error, "kwargs", {}).get("endpoint_url") or ""
    if url.startswith(os.environ.get("AWS_ENDPOINT_URL_STS") or "https://sts."):
        return UnavailableError(f"STS at {url}, which AWS_ROLE_ARN needs, cannot be reached.")
    if isinstance(error, OSError) and error.filename:  # errors of S3 have none
        name = f"AWS_WEB_IDENTITY_TOKEN_FILE {error.filename}"
        return SettingsError(f"{name} cannot be read: {error.strerror}.")
    return None


async def persist(call: Callable[[], Awaitable[Any]], method: str, request: dict[str, Any]) -> Any:
    """Await ``call()``, and repeat it after temporary faults."""

    def again(state: RetryCallState) -> None:
        count(retries=1)
        log.debug("%s %s again: %r", method, request.get("Key", ""), state.outcome.exception())  # type: ignore[union-attr]

    try:
        return await AsyncRetrying(
            retry=retry_if_exception(_is_passing),
            stop=_enough,
            wait=wait_random_exponential(multiplier=0.2, max=5),
            before_sleep=again,
            reraise=True,
        )(call)
    except Exception as error:  # before s3fs takes a missing token for a missing object
        if (of_credentials := _of_credentials(error)) is None:
            raise
        raise of_credentials from error


def _enough(state: RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    return state.attempt_number >= (TRIES_IN_SILENCE if isinstance(error, _SILENCE) else TRIES)


def _is_passing(error: BaseException) -> bool:
    if isinstance(error, _LASTING):
        return False
    if isinstance(error, _PASSING):
        return True
    response = getattr(error.__cause__, "response", None) or {}
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    busy = isinstance(error, OSError) and error.errno in (errno.EBUSY, errno.EREMOTEIO)
    return busy or status >= 500 or status == 429
