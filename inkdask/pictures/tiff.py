"""Tiled BigTIFF with smaller images for viewers, tile row by tile row."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO, Literal

import dask.array as da
import numpy as np
import tifffile

from inkdask import engine
from inkdask.pictures.bands import bands
from inkdask.pictures.pyramid import halve, level_shapes
from inkdask.progress import Meter
from inkdask.storage.scratch import Scratch

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

    Its sub-images (SubIFDs) are the picture at a half, a quarter, ... of its size, with the sides
    of `level_shapes`: viewers of large pictures read the one that they show.

    ``pixel_um``, the side of a pixel in micrometers, is for the resolution tags. Every reader knows
    ``deflate``; ``zstd`` is faster and smaller.
    """
    shapes = level_shapes(canvas.shape[:2])
    colours, last = canvas.shape[2:], len(shapes) - 1
    pieces: Iterator[np.ndarray] = bands(canvas, "TIFF", max(canvas.chunks[0][0] // TILE, 1) * TILE)
    with Scratch() as scratch, tifffile.TiffWriter(path, bigtiff=True) as file:
        for level, shape in enumerate(shapes):
            kept = scratch / str(level)  # the next level, as it comes: memory stays flat
            with kept.open("wb") if level < last else nullcontext() as half:
                tiles = _tiles(pieces, half)
                file.write(
                    (tile for tile in tiles),
                    shape=(*shape, *colours),
                    dtype="uint8",
                    tile=(TILE, TILE),
                    photometric="rgb" if colours else "minisblack",
                    compression="adobe_deflate" if compression == "deflate" else compression,
                    predictor=True,
                    resolution=(1e4 / (pixel_um * 2**level),) * 2 if pixel_um else None,
                    resolutionunit="CENTIMETER" if pixel_um else None,
                    description=(description or None) if level == 0 else None,
                    software=f"inkdask {version('inkdask')}" if level == 0 else None,
                    metadata=None,
                    subifds=last if level == 0 else None,
                    subfiletype=tifffile.FILETYPE.REDUCEDIMAGE if level else None,
                    maxworkers=engine.threads(),
                    buffersize=AHEAD,
                )
                # tifffile closes its iterator after the last tile, and not the bar.
                next(tiles, None)
            if level < last:
                pieces = _read(kept, (*shapes[level + 1], *colours))


def _tiles(pieces: Iterable[np.ndarray], half: BinaryIO | None) -> Iterator[np.ndarray]:
    """Yield the tiles from left to right and from top to bottom; smaller ones at the edges.

    All ``pieces`` but the last have a multiple of `TILE` rows. They are written to ``half`` at half
    their size.
    """
    for piece in pieces:
        for y in range(0, len(piece), TILE):
            strip = piece[y : y + TILE]
            if half:
                half.write(halve(strip).data)
            for x in range(0, strip.shape[1], TILE):
                yield strip[:, x : x + TILE]


def _read(path: Path, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the rows of a picture of bytes, uint8 (y, x, ...), and remove it."""
    row = int(np.prod(shape[1:]))
    with path.open("rb") as file, Meter("TIFF, smaller images", shape[0], "rows") as meter:
        for y in range(0, shape[0], TILE):
            rows = min(TILE, shape[0] - y)
            yield np.fromfile(file, np.uint8, rows * row).reshape(rows, *shape[1:])
            meter.add(rows)
    path.unlink()
