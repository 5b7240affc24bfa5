"""How fast a stored grid becomes the picture, and in how much memory.

    python -m tests.benchmarks.blend [SIDE ...]

The grid is of random tiles (64 px at stride 16, 4 x 4 probabilities each), stored as a job stores
it. Each row is a process of its own that reads it and blends: once to nowhere, and once to the
picture (zarr pyramid and PNG). The plain way adds tile after tile to two float32 planes with NumPy.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import torch

from inkdask.blending import blend, taper
from inkdask.pictures.exporting import export
from inkdask.pictures.pyramid import to_uint8, write_pyramid
from inkdask.specs import InferredChunk
from inkdask.store import GridStore
from inkdask.tiling import Tiling
from tests.benchmarks._common import STRIDE, TILE, measure, scratch, size, stored, table, tell

K = 4
PLAIN_SIDE = 1024  # of the part that the plain way blends: its time is proportional to the pixels


def store_of(folder: Path, side: int) -> GridStore:
    return GridStore(str(folder / "grid.zarr"), Tiling.of((side, side), TILE, STRIDE, 1024), K)


def write_grid(store: GridStore) -> None:
    """Store random probabilities, smooth as real ones are not: the file is as large as it gets."""
    rng = np.random.default_rng(0)
    store.make_arrays()
    y, x = store.tiling.y, store.tiling.x
    for row, column in np.ndindex(store.tiling.block_shape):
        grid = rng.random((y.grid_chunks[row], x.grid_chunks[column], K, K), np.float32)
        valid = np.ones((y.chunks[row], x.chunks[column]), bool)
        store.write(InferredChunk(grid, valid), row, column)


def blend_stored(store: GridStore, folder: Path, with_picture: bool) -> float:
    """Blend, to nowhere or to the picture; returns seconds."""
    start = time.perf_counter()
    ink = blend(store.grid(), store.valid(), store.tiling)
    if with_picture:
        grey = da.map_blocks(to_uint8, ink, dtype=np.uint8)
        write_pyramid(grey, str(folder / "ink.zarr"), None)
        export(str(folder / "ink.zarr"), str(folder / "ink.png"))
    else:
        parts = [dask.delayed(np.ndarray.sum)(block) for block in ink.to_delayed().ravel()]
        assert sum(dask.compute(*parts)) > 0
    return time.perf_counter() - start


def plainly(store: GridStore) -> float:
    """Add tile after tile of a corner to two planes; returns pixels a second."""
    count = (PLAIN_SIDE - TILE) // STRIDE + 1
    grid = store.grid()[:count, :count].compute()
    window = np.outer(taper(TILE), taper(TILE)).astype(np.float32)
    start = time.perf_counter()
    total = np.zeros((PLAIN_SIDE, PLAIN_SIDE), np.float32)
    weight = np.zeros_like(total)
    for i, row in enumerate(grid):
        tiles = torch.nn.functional.interpolate(
            torch.from_numpy(row)[:, None], size=(TILE, TILE), mode="bilinear"
        ).numpy()[:, 0]
        for j, tile in enumerate(tiles):
            at = slice(i * STRIDE, i * STRIDE + TILE), slice(j * STRIDE, j * STRIDE + TILE)
            total[at] += tile * window
            weight[at] += window
    ink = total / weight
    seconds = time.perf_counter() - start
    inner = slice(PLAIN_SIDE - TILE)  # beyond it reach tiles that are left out here
    ours = blend(store.grid(), store.valid(), store.tiling)[inner, inner].compute()
    assert np.abs(ours - ink[inner, inner]).max() < 1e-4  # the same picture
    return PLAIN_SIDE**2 / seconds


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sides", nargs="*", type=int, default=[4000, 16_000], metavar="SIDE")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        what, folder = given.job
        store = store_of(Path(folder), given.sides[0])
        if what == "plain":
            tell(speed=plainly(store))
        else:
            seconds = blend_stored(store, Path(folder), what == "picture")
            tell(speed=given.sides[0] ** 2 / seconds)
        return

    def rows() -> list[tuple[str, ...]]:
        for side in given.sides:
            if side < 2 * PLAIN_SIDE:
                parser.error(f"SIDE must be at least {2 * PLAIN_SIDE}, but it is {side}")
            with scratch() as home:
                store = store_of(Path(home), side)
                write_grid(store)
                plane = 2 * 4 * side * side
                there = stored(Path(store.uri))
                plain = measure(__spec__.name, side, "--job", "plain", home).said["speed"]
                for what, words in (("blend", "blend"), ("picture", "blend, zarr, PNG")):
                    done = measure(__spec__.name, side, "--job", what, home)
                    speed = done.said["speed"]
                    yield (
                        f"{side:,} x {side:,}, {words}",
                        f"{size(there)} (two float32 planes: {plane / there:.0f} times that)",
                        f"{speed / 1e6:.1f}", f"{speed / plain:.1f}", size(done.peak),
                    )  # fmt: skip

    table(("what", "grid as stored", "Mpixel/s", "times the plain way", "peak memory"), rows())


if __name__ == "__main__":
    main()
