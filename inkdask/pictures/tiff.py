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
    """Write a picture as a tiled BigTIFF.

    Parameters
    ----------
    canvas
        Dask uint8 (y, x) or (y, x, 3).
    path
        A local file.
    description
        For the tag ImageDescription.
    pixel_um
        Side of a pixel in micrometers, for the resolution tags.
    compression
        Every reader knows deflate; zstd is faster and smaller.
    """
    resolution = (1e4 / pixel_um,) * 2 if pixel_um else None
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        file.write(
            _tiles(canvas),
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


def _tiles(canvas: da.Array) -> Iterator[np.ndarray]:
    """The tiles from left to right and from top to bottom; those at the edges are smaller."""
    rows = max(canvas.chunks[0][0] // TILE, 1) * TILE
    for band in bands(canvas, "TIFF", rows):
        for y in range(0, len(band), TILE):
            for x in range(0, band.shape[1], TILE):
                yield band[y : y + TILE, x : x + TILE]
