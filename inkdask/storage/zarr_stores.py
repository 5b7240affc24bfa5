"""zarr's stores: the local one with counters, and that on S3, whose file system counts."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from zarr import storage as zarr_storage

from inkdask.storage.counting import count

if TYPE_CHECKING:
    from zarr.core.buffer import Buffer


class LocalStore(zarr_storage.LocalStore):
    """Local zarr store that counts its reads."""

    async def get(self, key: str, *how: Any, **named: Any) -> Buffer | None:
        """Read a key; counts one request."""
        buffer = await super().get(key, *how, **named)
        count(requests=1, bytes_read=len(buffer) if buffer is not None else 0)
        return buffer


class S3Store(zarr_storage.FsspecStore):
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
