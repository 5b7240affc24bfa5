"""Tiled BigTIFF, tile row by tile row."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import dask.array as da
import numpy as np
import tifffile

from inkdask import engine
from inkdask.pictures.bands import bands

TILE = 512  # pixels
AHEAD = 16 << 20  # bytes that wait to be compressed

Compression = Literal["deflate", "zstd"]


def write_tiff(
    canvas: da.Array,
    path: Path,
    description: str,
    pixel_um: float | None = None,
    compression: Compression = "deflate",
) -> None:
    """Write a picture, dask uint8 (y, x) or (y, x, 3), as a tiled BigTIFF.

    ``pixel_um``, the side of a pixel in micrometers, is for the resolution tags. Every reader knows
    ``deflate``; ``zstd`` is faster and smaller.
    """
    resolution = (1e4 / pixel_um,) * 2 if pixel_um else None
    tiles = _tiles(canvas)
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            (tile for tile in tiles),
            shape=canvas.shape,
            dtype="uint8",
            tile=(TILE, TILE),
            photometric="rgb" if canvas.ndim == 3 else "minisblack",
            compression="adobe_deflate" if compression == "deflate" else compression,
            predictor=True,
            resolution=resolution,
            resolutionunit="CENTIMETER" if pixel_um else None,
            description=description or None,
            software=f"inkdask {version('inkdask')}",
            metadata=None,
            maxworkers=engine.threads(),
            buffersize=AHEAD,
        )
    next(tiles, None)  # because tifffile closes its iterator after the last tile, and not the bar


def _tiles(canvas: da.Array) -> Iterator[np.ndarray]:
    """Yield the tiles from left to right and from top to bottom; smaller ones at the edges."""
    rows = max(canvas.chunks[0][0] // TILE, 1) * TILE
    for band in bands(canvas, "TIFF", rows):
        for y in range(0, len(band), TILE):
            for x in range(0, band.shape[1], TILE):
                yield band[y : y + TILE, x : x + TILE]
