"""The stores of zarr: the local one, which counts, and those over a network, which retry."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zarr import storage as zarr_storage

from inkdask.storage.counting import count

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer

# Bytes have no order, but early renders say "<u1", which zarr does not take.
_ORDERED_BYTES = re.compile(rb'("dtype"\s*:\s*")[<>](?=[iu]1")')


def _readable(key: str, buffer: Buffer | None) -> Buffer | None:
    """Return metadata of zarr 2 as zarr takes them, and anything else as it is."""
    if buffer is None or not key.endswith((".zarray", ".zmetadata")):
        return buffer
    return type(buffer).from_bytes(_ORDERED_BYTES.sub(rb"\1|", buffer.to_bytes()))


class LocalStore(zarr_storage.LocalStore):
    """Local zarr store that counts its reads."""

    async def get(self, key: str, *how: Any, **named: Any) -> Buffer | None:
        """Read a key; counts one request."""
        buffer = await super().get(key, *how, **named)
        count(requests=1, bytes_read=len(buffer) if buffer is not None else 0)
        return _readable(key, buffer)


class RemoteStore(zarr_storage.FsspecStore):
    """zarr store over a network.

    A bucket that does not let its keys be listed refuses those that are not there. When the store
    only reads, a refused key is absent, if the array's header can be read right after it.
    """

    refused: PermissionError | None = None  # the last refusal that stood for an absent key
    _told: tuple[str, tuple[Any, ...], dict[str, Any]] | None = None  # a read of a header

    async def get(self, key: str, *how: Any, **named: Any) -> Buffer | None:
        """Read a key; None where it is absent."""
        is_metadata = key.rpartition("/")[2].startswith((".z", "zarr.json"))
        try:
            buffer = await super().get(key, *how, **named)
        except PermissionError as error:
            told = getattr(error.__cause__, "response", {}).get("Error", {})  # by S3
            is_right = told.get("Code", "403") in ("403", "AccessDenied")  # and no key that expired
            if not (self.read_only and is_right and (is_metadata or self._told)):
                raise
            self.refused = error
            if not is_metadata and self._told:
                again, how, named = self._told
                await super().get(again, *how, **named)
            return None
        if buffer is not None and key.endswith((".zarray", "zarr.json")):
            self._told = key, how, named
        return _readable(key, buffer)


class S3Store(RemoteStore):
    """zarr store on S3 that deletes by key; zarr's own takes the name ``[a]`` for a pattern."""

    async def delete(self, key: str) -> None:
        """Delete a key, if it is there: most empty chunks are not, and may need no right."""
        self._check_writable()
        bucket, _, name = f"{self.path}/{key}".partition("/")
        with suppress(FileNotFoundError):
            await self.fs._call_s3("head_object", Bucket=bucket, Key=name)
            await self.fs._rm_file(f"{bucket}/{name}")

    async def delete_dir(self, prefix: str) -> None:
        """Delete all keys below a prefix."""
        for path in await self.fs._find(f"{self.path}/{prefix}".rstrip("/")):
            await self.fs._rm_file(path)
