"""From the volume to the tile grid: every tile through the network once.

The strategy, in the order of the graph:

    volume (z, y, x) uint8     in the blocks in which it is read
      rechunk                  to the chunks that own tiles
      map_overlap              each with the tile - stride pixels after its end, into which its last
                               tiles reach: which pixels have data, which tiles are not empty, and
                               those through the process's network (`infer_chunk`)
      grid, valid              the two parts of the result, each an array of its own

The validity of a pixel comes from the task that feeds the network, so nothing is read twice, and
blending never needs the volume.

For the halo, a row of chunks waits in memory for the row below. A graph written by hand, which cut
each chunk's pieces out of the blocks, took 1.4 GB where this takes 1.1 GB (16,000 pixels wide, in
strips), and 56,006 tasks where this takes 20,042 (``python -m tests.benchmarks.memory
4096x16000`` and ``python -m tests.benchmarks.graph``).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

from inkdask.failures import Failure, fallible, unwrap
from inkdask.specs import InferredChunk, Network, Passes
from inkdask.tiling import Tiling


@dataclass(frozen=True)
class Inference:
    """The lazy result of `infer`: one task a chunk, and its two parts as arrays.

    Attributes
    ----------
    chunks
        Dask array of one `InferredChunk` a block, or the `Failure` in its place; shaped like the
        grid of tiles.
    grid
        Probabilities, dask float32 (gy, gx, k, k), NaN where no tile ran.
    valid
        Dask bool (y, x).
    """

    chunks: da.Array
    grid: da.Array
    valid: da.Array


def infer(
    volume: da.Array,
    tiling: Tiling,
    network: Network,
    mask: da.Array | None = None,
    passes: Passes | None = None,
) -> Inference:
    """Run every tile of a volume that is not empty, lazily.

    Parameters
    ----------
    volume
        Dask array uint8 (z, y, x); z in the order in which the network reads the layers.
    tiling
        Tiles and chunks of its (y, x).
    network
        The network every worker builds for itself.
    mask
        Dask bool (y, x), where there is papyrus: tiles without any do not run, and other pixels
        are not valid. None is everywhere.
    passes
        The tiles to run; None for all.
    """
    chunks = over_chunks(
        infer_chunk, tiling, volume, mask, network=network, passes=passes, chunks=tiling.grid_chunks
    )
    k = network.k
    grid = da.map_blocks(
        _grid,
        chunks,
        new_axis=(2, 3),
        chunks=(*tiling.grid_chunks, (k,), (k,)),
        meta=np.empty((0, 0, 0, 0), np.float32),
    )
    valid = da.map_blocks(_valid, chunks, chunks=tiling.chunks, meta=np.empty((0, 0), bool))
    return Inference(chunks, grid, valid)


def over_chunks(
    function: Callable[..., Any],
    tiling: Tiling,
    volume: da.Array,
    mask: da.Array | None = None,
    *,
    chunks: Any = None,
    **options: Any,
) -> da.Array:
    """Map a function over the chunks that own tiles, each with the halo after its end.

    Parameters
    ----------
    function
        Called with a block uint8 (z, h, w), a mask bool (1, h, w) where there is one, ``tiling``,
        ``block_id`` (row, column), and the options.
    chunks
        Sizes of the result's blocks along y and x. Default: one element a block.

    Returns
    -------
    Dask array of objects (rows, columns): what the function returned.
    """
    arrays = [volume] if mask is None else [volume, mask[None]]
    depth = {
        axis: (0, along.halo if len(along.chunks) > 1 else 0)
        for axis, along in enumerate((tiling.y, tiling.x), 1)
    }
    return da.map_overlap(
        function,
        *(array.rechunk((-1, *tiling.chunks), method="tasks") for array in arrays),
        depth=depth,
        boundary="none",
        trim=False,
        align_arrays=False,
        allow_rechunk=False,
        drop_axis=0,
        chunks=chunks or tuple((1,) * count for count in tiling.block_shape),
        meta=np.empty((0, 0), object),
        enforce_ndim=False,
        tiling=tiling,
        **options,
    )


@fallible
def infer_chunk(
    block: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    tiling: Tiling,
    network: Network,
    passes: Passes | None = None,
    block_id: tuple[int, int],
) -> InferredChunk:
    """Run the tiles that one chunk owns.

    Parameters
    ----------
    block
        The chunk with its halo, uint8 (z, h, w).
    mask
        Where there is papyrus, bool (1, h, w).
    passes
        Which of them; None for all.
    block_id
        Row and column of the chunk.
    """
    began = time.perf_counter()
    row, column = block_id
    ys, xs = tiling.y.local_origins(row), tiling.x.local_origins(column)
    seen = np.bitwise_or.reduce(block, axis=0) != 0  # (h, w)
    if mask is not None:
        seen &= mask[0]
    valid = seen[: tiling.y.chunks[row], : tiling.x.chunks[column]]

    missing = [max(tiling.tile - side, 0) for side in seen.shape]
    if any(missing):  # the image is smaller than a tile
        after = [(0, pixels) for pixels in missing]
        block, seen = np.pad(block, [(0, 0), *after]), np.pad(seen, after)

    grid = np.full((len(ys), len(xs), network.k, network.k), np.nan, np.float32)
    precision = runs = ""
    occupied = tiles_with_data(seen, ys, xs, tiling.tile)  # (gy, gx)
    if passes is not None:
        occupied &= tiling.in_passes(row, column, int(passes.done[row, column]), passes.last)
    if occupied.any():
        from inkdask.predictor import predictor  # torch: workers only, and only when needed

        rows, columns = np.nonzero(occupied)
        origins = np.stack([ys[rows], xs[columns]], axis=1)
        ours = predictor(network)
        grid[occupied] = ours.predict(block, origins, to_come=tiling.tiles)
        precision, runs = ours.precision, ours.runs
    seconds = time.perf_counter() - began
    return InferredChunk(grid, np.ascontiguousarray(valid), precision, runs, seconds)


def tiles_with_data(seen: np.ndarray, ys: np.ndarray, xs: np.ndarray, tile: int) -> np.ndarray:
    """Which tiles hold a pixel with data: bool (len(ys), len(xs)) from bool (h, w)."""
    total = np.zeros((seen.shape[0] + 1, seen.shape[1] + 1), np.int32)
    total[1:, 1:] = seen.cumsum(axis=0, dtype=np.int32).cumsum(axis=1)
    corners = total[np.ix_(np.concatenate([ys, ys + tile]), np.concatenate([xs, xs + tile]))]
    n, m = len(ys), len(xs)
    return corners[n:, m:] - corners[:n, m:] - corners[n:, :m] + corners[:n, :m] > 0


def _grid(chunk: InferredChunk | Failure) -> np.ndarray:
    return unwrap(chunk).grid


def _valid(chunk: InferredChunk | Failure) -> np.ndarray:
    return unwrap(chunk).valid
