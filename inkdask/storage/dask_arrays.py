"""Zarr arrays as Dask reads them (`dask.array.from_array`) and writes them (`dask.array.store`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from inkdask.storage.files import absolute, decoded, explained, open_array

if TYPE_CHECKING:
    from zarr import Array


class StoredArray:
    """Zarr array that each process opens by its URI; small and picklable.

    Its metadata tell it from an earlier array at the same place, whose handle a process may hold.
    """

    def __init__(self, uri: str, array: Array[Any], remedy: str = "") -> None:
        # Absolute, because workers may run in another folder.
        self.uri, self._version, self._remedy = absolute(uri), repr(array.metadata), remedy
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.chunks, self._read_only = array.chunks, array.read_only

    def __getitem__(self, region: Any) -> np.ndarray:
        with decoded(self.uri, _place(region) + self._remedy):
            return np.asarray(self._array[region])

    def __setitem__(self, region: Any, block: np.ndarray) -> None:
        with explained(self.uri):
            self._array[region] = block

    @property
    def _array(self) -> Array[Any]:
        return open_array(self.uri, self._version, self._read_only)


def _place(region: Any) -> str:
    """Return a region in words: `` at rows 0 to 128, columns 512 to 640``."""
    named = zip(("rows", "columns"), region, strict=False)
    words = [f"{name} {it.start} to {it.stop}" for name, it in named if isinstance(it, slice)]
    return f" at {', '.join(words)}" if words else ""
