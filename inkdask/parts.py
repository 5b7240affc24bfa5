"""Static parts: the chunks that each of several machines computes.

A part is a run of chunks in reading order, so a part reads few rows of the layers beside its own.
The parts have about equal work, and the work of a chunk is its number of tiles with data. This
number is estimated from the middle layer alone, because reading that layer costs a few per cent of
the job. The first part stores the estimate with the grid, so that all parts agree.
"""

from __future__ import annotations

import logging

import numpy as np

from inkdask import engine
from inkdask.failures import fallible
from inkdask.inference import over_chunks, tiles_with_data
from inkdask.plan import Plan
from inkdask.store import GridStore
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

IDLE = (
    "%d of NUM_PARTS=%d parts have no work, because parts have whole chunks, and the number of "
    "chunks is %d; a smaller CHUNK_SIZE makes more."
)


def assign(work: np.ndarray, num_parts: int) -> np.ndarray:
    """Part of each chunk, int (rows, columns); a warning tells of parts without any.

    Parameters
    ----------
    work
        Estimated work in each chunk, (rows, columns).
    num_parts
        Number of parts.
    """
    cost = work.ravel() + 1.0  # because an empty chunk is read too
    middle = np.cumsum(cost) - cost / 2
    parts = (middle * num_parts / cost.sum()).astype(int)
    if idle := num_parts - len(np.unique(parts)):
        log.warning(IDLE, idle, num_parts, work.size)
    return parts.reshape(work.shape)


def agreed_work(store: GridStore, plan: Plan) -> np.ndarray:
    """Return the estimate that all parts share, (rows, columns); the first part makes it."""
    work = store.work()
    if work is None:
        work = estimate(plan)
        store.plan_work(work)  # safe for two parts at once, because both store the same values
    return work


def estimate(plan: Plan) -> np.ndarray:
    """Estimate the tiles with data of each chunk, int32 (rows, columns)."""
    tiling = plan.tiling
    source = plan.segment.source if plan.segment else None
    if source and source.occupancy:
        return _from_known(np.asarray(source.occupancy.share), source.occupancy.side, plan)
    if source and source.reads_all_layers:
        return np.outer(*tiling.grid_chunks).astype(np.int32)
    work = np.zeros(tiling.block_shape, np.int32)

    def count(chunk: int, tiles: int) -> None:
        work.flat[chunk] = tiles

    counts = over_chunks(_count_tiles, tiling, plan.middle_layer, plan.mask)
    engine.compute_each(counts.to_delayed().ravel().tolist(), count).check()
    return work


@fallible
def _count_tiles(
    block: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    tiling: Tiling,
    block_id: tuple[int, int],
) -> int:
    """Return the number of tiles with data of a chunk."""
    row, column = block_id
    seen = (block[0] != 0) if mask is None else (block[0] != 0) & mask[0]
    ys, xs = tiling.y.local_origins(row), tiling.x.local_origins(column)
    missing = [max(tiling.tile - side, 0) for side in seen.shape]
    seen = np.pad(seen, [(0, pixels) for pixels in missing])
    return int(np.count_nonzero(tiles_with_data(seen, ys, xs, tiling.tile)))


def _from_known(share: np.ndarray, side: int, plan: Plan) -> np.ndarray:
    """Estimate the work from the share of pixels with data in squares of ``side`` pixels."""
    tiling = plan.tiling
    places = [
        np.minimum((axis.origins + corner + tiling.tile // 2) // side, len_ - 1)
        for axis, corner, len_ in zip((tiling.y, tiling.x), plan.corner, share.shape, strict=True)
    ]
    tiles = share[np.ix_(*places)]
    for axis, along in enumerate((tiling.y, tiling.x)):
        tiles = np.add.reduceat(tiles, along.rows[:-1], axis=axis)
    return np.rint(tiles).astype(np.int32)
