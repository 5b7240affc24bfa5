"""Files over HTTP and HTTPS: read by name alone, with the retries and counters of S3.

Nothing is listed and nothing is written. A name that is not there answers 404, or 403 from a bucket
that does not let its keys be listed.
"""

from __future__ import annotations

import asyncio
import atexit
import errno
import os
import threading
from typing import Any

import aiohttp
from fsspec.asyn import sync_wrapper
from fsspec.implementations.http import HTTPFileSystem

from inkdask.errors import InkdaskError
from inkdask.storage.counting import count
from inkdask.storage.s3 import CONNECT_TIMEOUT, READ_TIMEOUT, persist


class HttpFileSystem(HTTPFileSystem):
    """HTTP file system that counts, checks and retries; made by `connection`."""

    async def set_session(self) -> Any:
        """Open the session; fsspec closes only those of its own event loop at exit."""
        is_new = self._session is None
        session = await super().set_session()
        if is_new and self.asynchronous:
            atexit.register(self.close_session, asyncio.get_running_loop(), session)
        return session

    async def _ask(self, method: str, url: str, headers: dict[str, str]) -> tuple[Any, bytes]:
        """Return an answer and its body, which is as long as the answer says."""

        async def ask() -> tuple[Any, bytes]:
            count(requests=1)
            session = await self.set_session()
            async with session.request(method, self.encode_url(url), headers=headers) as answer:
                body = await answer.read()
            said = f"HTTP {answer.status} {answer.reason}"
            if answer.status in (404, 410):
                raise FileNotFoundError(url)
            if answer.status == 401:
                raise InkdaskError(f"{url} asks for a user and a password: give them in ~/.netrc.")
            if answer.status == 403:
                raise PermissionError(said)
            if answer.status == 412:
                raise OSError(errno.ESTALE, said)
            if answer.status == 429 or answer.status >= 500:
                raise ConnectionError(said)
            if answer.status not in (200, 206):  # not what was asked for, though perhaps no error
                raise OSError(said)
            count(bytes_read=len(body))
            return answer, body

        answer: tuple[Any, bytes] = await persist(ask, method, {"Key": url})
        return answer

    async def _cat_file(
        self,
        url: str,
        start: int | None = None,
        end: int | None = None,
        etag: str = "",
        **_: Any,
    ) -> bytes:
        is_strong = etag and not etag.startswith("W/")  # a weak one matches nothing
        headers = {"If-Match": etag} if is_strong else {}
        is_range = start is not None or end is not None
        if is_range:
            headers["Range"] = await self._process_limits(url, start, end)
        answer, body = await self._ask("GET", url, headers)
        if etag and answer.headers.get("ETag") != etag:  # not all servers know If-Match
            raise OSError(errno.ESTALE, "another ETag")
        return body[start:end] if is_range and answer.status == 200 else body

    async def _info(self, url: str, **_: Any) -> dict[str, Any]:
        said = (await self._ask("HEAD", url, {}))[0].headers
        if "Content-Length" not in said:
            raise OSError("the server does not say its length")
        return {
            "name": url,
            "size": int(said["Content-Length"]),
            "ETag": said.get("ETag"),
            "LastModified": said.get("Last-Modified"),
            "type": "file",
        }

    async def _exists(self, url: str, **_: Any) -> bool:
        try:
            await self._info(url)
        except (FileNotFoundError, PermissionError):
            return False
        return True

    async def _ls(self, url: str, **_: Any) -> list[Any]:
        raise FileNotFoundError(url)  # no page is taken for a listing

    ls = sync_wrapper(_ls)

    def __reduce__(self) -> tuple[Any, ...]:
        return connection, (self.asynchronous,)


_lock = threading.Lock()
_connections: dict[Any, HttpFileSystem] = {}


def connection(asynchronous: bool = False) -> HttpFileSystem:
    """Return this process's connection; ``asynchronous`` is for zarr, with an event loop."""
    key = os.getpid(), asynchronous
    with _lock:
        if key not in _connections:
            limits = {"sock_connect": CONNECT_TIMEOUT, "sock_read": READ_TIMEOUT}
            _connections[key] = HttpFileSystem(
                asynchronous=asynchronous,
                skip_instance_cache=True,
                client_kwargs={
                    "timeout": aiohttp.ClientTimeout(total=None, **limits),
                    "headers": {"Accept-Encoding": "identity"},  # lengths are those of the file
                    "trust_env": True,
                },
            )
        return _connections[key]
