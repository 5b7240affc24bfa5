"""From the ink map to files: a zarr array, then the PNG, each whole or not there.

Nothing half-written ever stands under a final name: the zarr array is filled beside its place
and moved there, the PNG is written to a scratch file, band by band so that memory does not grow
with the picture, and then put in place in one step.
"""

from __future__ import annotations

import tempfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import dask.array as da
import numpy as np
import png
import zarr

from inkdask import storage
from inkdask.storage import outputs

BAND = 4 << 20  # pixels compressed at a time


def to_uint8(ink: np.ndarray) -> np.ndarray:
    """The picture's grey values, ``floor(255 * clip(p, 0, 1))``."""
    return np.floor(255 * np.clip(ink, 0, 1)).astype(np.uint8)


def unfinished(uri: str) -> str:
    """A place beside ``uri`` for the array until it is whole; no two runs share one."""
    return f"{uri}.{uuid4().hex[:8]}.unfinished"


def lay_zarr(ink: da.Array, uri: str, attributes: Mapping[str, Any]) -> da.Array:
    """Create the array of a picture, and return the lazy writes that fill it.

    Parameters
    ----------
    ink
        Dask float32 (y, x) in [0, 1].
    uri
        Where it is written; see `unfinished`.
    attributes
        For the array's metadata.

    Returns
    -------
    Dask array with one write in each block.
    """
    side = tuple(max(sizes[:-1], default=sizes[0]) for sizes in ink.chunks)
    if any(sizes[0] < most for sizes, most in zip(ink.chunks, side, strict=True)):
        ink = ink.rechunk(side, method="tasks")  # a window begins inside a chunk
    zarr.create_array(
        storage.zarr_store(uri),
        shape=ink.shape,
        # Every Dask chunk is a whole multiple of this, so writers never share an object.
        chunks=side,
        dtype="uint8",
        fill_value=0,
        dimension_names=("y", "x"),
        attributes=dict(attributes),
        zarr_format=3,
    )
    return da.map_blocks(
        _write_block, ink, uri=uri, meta=np.empty((0, 0), object), enforce_ndim=False
    )


def _write_block(ink: np.ndarray, uri: str, block_info: Any) -> None:
    rows, columns = block_info[0]["array-location"]
    with storage.explained(uri):
        array = zarr.open_array(storage.zarr_store(uri), mode="r+")
        array[slice(*rows), slice(*columns)] = to_uint8(ink)


def publish_zarr(uri: str, final: str) -> zarr.Array:
    """Move a finished array to its final place, replacing what was there, and open it."""
    outputs.replace_tree(uri, final)
    return zarr.open_array(storage.zarr_store(final, read_only=True), mode="r")


def write_png(array: zarr.Array, uri: str, text: Mapping[str, str]) -> None:
    """Write a stored uint8 (y, x) picture as a grey PNG.

    Parameters
    ----------
    array
        The picture; it is read in bands of whole zarr chunks.
    uri
        Where the PNG goes, local or ``s3://``.
    text
        Text chunks: keyword to value.
    """
    with tempfile.TemporaryDirectory(prefix="inkdask-") as scratch:
        path = Path(scratch) / "picture.png"
        with storage.explained(str(path)), path.open("wb") as file:
            _stream_png(bands(array), array.shape, file, text)
        storage.put_file(path, uri)


def bands(array: zarr.Array) -> Iterator[np.ndarray]:
    """The rows of a stored picture from top to bottom, a few megapixels at a time."""
    height, width = array.shape
    rows = array.chunks[0]
    rows *= max(BAND // (rows * width), 1)
    for start in range(0, height, rows):
        yield np.asarray(array[start : start + rows])


def _stream_png(
    parts: Iterator[np.ndarray], shape: tuple[int, ...], file: BinaryIO, text: Mapping[str, str]
) -> None:
    height, width = shape
    png.Writer(width, height, greyscale=True, bitdepth=8).write_preamble(file)
    for keyword, value in text.items():
        chunk = keyword.encode("latin-1") + b"\0\0\0\0\0" + value.encode()
        png.write_chunk(file, b"iTXt", chunk)
    deflate = zlib.compressobj(6)
    above = np.zeros((1, width), np.uint8)
    for band in parts:
        rows = np.empty((len(band), width + 1), np.uint8)
        rows[:, 0] = 2  # PNG filter "up": each row as its difference to the one above
        np.subtract(band, np.concatenate([above, band[:-1]]), out=rows[:, 1:])
        above = band[-1:]
        if data := deflate.compress(rows.tobytes()):
            png.write_chunk(file, b"IDAT", data)
    png.write_chunk(file, b"IDAT", deflate.flush())
    png.write_chunk(file, b"IEND")
