"""PNG, compressed in strips, several at a time, whatever the size of the picture."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import dask.array as da
import numpy as np
import png

from inkdask.pictures.bands import bands, in_order

STRIP = 1 << 20  # bytes compressed at a time
LEVEL = 4  # of zlib: files 5 to 10 % larger than at 6, in a quarter of the time


def write_png(
    canvas: da.Array, path: Path, text: Mapping[str, str], pixel_um: float | None = None
) -> None:
    """Write a picture, dask uint8 (y, x) or (y, x, 3), with text chunks, keyword to value.

    ``pixel_um``, the side of a pixel in micrometers, is for the pHYs chunk.
    """
    height, width = canvas.shape[:2]
    with path.open("wb") as file:
        png.Writer(width, height, greyscale=canvas.ndim == 2, bitdepth=8).write_preamble(file)
        if pixel_um:
            per_metre = round(1e6 / pixel_um)
            png.write_chunk(file, b"pHYs", struct.pack(">IIB", per_metre, per_metre, 1))
        for keyword, value in text.items():
            chunk = keyword.encode("latin-1") + b"\0\0\0\0\0" + value.encode()
            png.write_chunk(file, b"iTXt", chunk)
        # Each strip ends at a whole byte, so that all strips are one deflate stream. A header and a
        # checksum make it the single zlib stream that a PNG holds.
        png.write_chunk(file, b"IDAT", b"\x78\x9c")
        checksum = 1
        for rows, deflated in in_order(_deflate, _strips(canvas)):
            checksum = zlib.adler32(rows, checksum)
            png.write_chunk(file, b"IDAT", deflated)
        end = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS).flush()
        png.write_chunk(file, b"IDAT", end + struct.pack(">I", checksum))
        png.write_chunk(file, b"IEND")


def _strips(canvas: da.Array) -> Iterator[np.ndarray]:
    """Yield strips of rows as bytes, uint8 (y, bytes), each with the row above it."""
    above = np.zeros((1, int(np.prod(canvas.shape[1:]))), np.uint8)
    for band in bands(canvas, "PNG"):
        flat = band.reshape(len(band), -1)
        rows = max(STRIP // flat.shape[1], 1)
        for start in range(0, len(flat), rows):
            head = above if start == 0 else flat[start - 1 : start]
            yield np.concatenate([head, flat[start : start + rows]])
        above = flat[-1:].copy()
        del band, flat  # before the next band is made


def _deflate(rows: np.ndarray) -> tuple[bytes, bytes]:
    """Return rows with their filters, and the same compressed."""
    filtered = np.empty((len(rows) - 1, rows.shape[1] + 1), np.uint8)
    filtered[:, 0] = 2  # PNG filter "up": each row as its difference to the one above
    np.subtract(rows[1:], rows[:-1], out=filtered[:, 1:])
    data = filtered.tobytes()
    deflate = zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS)
    return data, deflate.compress(data) + deflate.flush(zlib.Z_FULL_FLUSH)
