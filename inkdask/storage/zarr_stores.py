"""zarr's local store with counters; on S3 the file system counts (`inkdask.storage.s3`)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zarr import storage as zarr_storage

from inkdask.storage.counting import count

if TYPE_CHECKING:
    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype


class LocalStore(zarr_storage.LocalStore):
    """Local zarr store that counts its reads."""

    async def get(
        self,
        key: str,
        prototype: BufferPrototype | None = None,
        byte_range: ByteRequest | None = None,
    ) -> Buffer | None:
        """Read a key; counts one request."""
        buffer = await super().get(key, prototype, byte_range)
        count(requests=1, bytes_read=len(buffer) if buffer is not None else 0)
        return buffer

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Read ranges of keys; counts one request for each."""
        buffers = await super().get_partial_values(prototype, key_ranges)
        read = sum(len(buffer) for buffer in buffers if buffer is not None)
        count(requests=len(buffers), bytes_read=read)
        return buffers
