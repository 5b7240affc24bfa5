"""From the volume to the tile grid: every tile through the network once.

The strategy, in the order of the graph:

    volume (z, y, x) uint8     in the blocks in which it is read
      with_halo                one block for each chunk that owns tiles, with the tile - stride
                               pixels after its end that its last tiles reach into
      infer_chunk              one task a chunk: which pixels have data, which tiles are not
                               empty, and those through the process's network
      grid, valid              the two parts of its result, each an array of its own

The validity of a pixel comes from the task that feeds the network, so nothing is read twice, and
blending never needs the volume.
"""

from __future__ import annotations

from dataclasses import dataclass
from operator import attrgetter

import dask.array as da
import numpy as np

from inkdask.halo import with_halo
from inkdask.specs import InferredChunk, Network, Passes
from inkdask.tiling import Tiling


@dataclass(frozen=True)
class Inference:
    """The lazy result of `infer`: one task a chunk, and its two parts as arrays.

    Attributes
    ----------
    chunks
        Dask array of one `InferredChunk` a block, shaped like the grid of tiles; for writers
        that want both parts of a chunk in one task.
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
    chunks = da.map_blocks(
        infer_chunk,
        with_halo(volume, tiling),
        *([] if mask is None else [with_halo(mask[None], tiling)]),
        tiling=tiling,
        network=network,
        passes=passes,
        drop_axis=0,
        chunks=tiling.grid_chunks,
        meta=np.empty((0, 0), object),
        enforce_ndim=False,
    )
    k = network.k
    grid = da.map_blocks(
        attrgetter("grid"),
        chunks,
        new_axis=(2, 3),
        chunks=(*tiling.grid_chunks, (k,), (k,)),
        meta=np.empty((0, 0, 0, 0), np.float32),
    )
    valid = da.map_blocks(
        attrgetter("valid"), chunks, chunks=tiling.chunks, meta=np.empty((0, 0), bool)
    )
    return Inference(chunks, grid, valid)


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

    grid, precision = np.full((len(ys), len(xs), network.k, network.k), np.nan, np.float32), ""
    occupied = tiles_with_data(seen, ys, xs, tiling.tile)  # (gy, gx)
    if passes is not None:
        occupied &= tiling.in_passes(row, column, int(passes.done[row, column]), passes.last)
    if occupied.any():
        from inkdask.predictor import predictor  # torch: workers only, and only when needed

        rows, columns = np.nonzero(occupied)
        origins = np.stack([ys[rows], xs[columns]], axis=1)
        ours = predictor(network)
        grid[occupied] = ours.predict(block, origins, to_come=tiling.tiles)
        precision = ours.precision
    return InferredChunk(grid, np.ascontiguousarray(valid), precision)


def tiles_with_data(seen: np.ndarray, ys: np.ndarray, xs: np.ndarray, tile: int) -> np.ndarray:
    """Which tiles hold a pixel with data: bool (len(ys), len(xs)) from bool (h, w)."""
    total = np.zeros((seen.shape[0] + 1, seen.shape[1] + 1), np.int32)
    total[1:, 1:] = seen.cumsum(axis=0, dtype=np.int32).cumsum(axis=1)
    corners = total[np.ix_(np.concatenate([ys, ys + tile]), np.concatenate([xs, xs + tile]))]
    n, m = len(ys), len(xs)
    return corners[n:, m:] - corners[:n, m:] - corners[n:, :m] + corners[:n, :m] > 0
