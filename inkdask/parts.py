"""Static parts: which chunks each of several machines computes.

Parts are runs of chunks in reading order, so that a part reads its own rows of the layers and few
others. They are cut where the work is even, and the work is the tiles that are not empty. How many
these are nobody knows before the layers are read; the middle layer alone, a few per cent of the
reading, tells it well enough. The first part estimates, and keeps the estimate in the grid's store,
so that all parts agree.
"""

from __future__ import annotations

import dask.array as da
import numpy as np

from inkdask import engine
from inkdask.halo import with_halo
from inkdask.inference import tiles_with_data
from inkdask.plan import Plan
from inkdask.store import GridStore
from inkdask.tiling import Tiling


def assign(work: np.ndarray, num_parts: int) -> np.ndarray:
    """Which part each chunk belongs to, int (rows, columns).

    Parameters
    ----------
    work
        Estimated work in each chunk, (rows, columns).
    num_parts
        Parts; where there are more than chunks, some have none.
    """
    cost = work.ravel() + 1.0  # an empty chunk must be read too
    middle = np.cumsum(cost) - cost / 2
    return (middle * num_parts / cost.sum()).astype(int).reshape(work.shape)


def agreed_work(store: GridStore, plan: Plan) -> np.ndarray:
    """The estimate that all parts share, (rows, columns); made by the first that asks."""
    work = store.work()
    if work is None:
        work = estimate(plan)
        store.plan_work(work)  # two that ask at once keep the same
    return work


def estimate(plan: Plan) -> np.ndarray:
    """Tiles of each chunk that probably have data, int32 (rows, columns)."""
    tiling = plan.tiling
    source = plan.segment.source if plan.segment else None
    if source and source.occupancy:
        return _from_known(np.asarray(source.occupancy.share), source.occupancy.side, plan)
    if source and source.reads_all_layers:
        return np.outer(*tiling.grid_chunks).astype(np.int32)
    work = np.zeros(tiling.block_shape, np.int32)

    def count(found: tuple[int, int, int]) -> None:
        row, column, tiles = found
        work[row, column] = tiles

    counts = da.map_blocks(
        _count_tiles,
        with_halo(plan.middle_layer, tiling),
        *([] if plan.mask is None else [with_halo(plan.mask[None], tiling)]),
        tiling=tiling,
        meta=np.empty((0, 0, 0), object),
        enforce_ndim=False,
    )
    engine.raise_any(engine.compute_each(counts.to_delayed().ravel().tolist(), count))
    return work


def _count_tiles(
    block: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    tiling: Tiling,
    block_id: tuple[int, int, int],
) -> tuple[int, int, int]:
    """Row and column of a chunk, and how many of its tiles have data."""
    _, row, column = block_id
    seen = (block[0] != 0) if mask is None else (block[0] != 0) & mask[0]
    ys, xs = tiling.y.local_origins(row), tiling.x.local_origins(column)
    missing = [max(tiling.tile - side, 0) for side in seen.shape]
    seen = np.pad(seen, [(0, pixels) for pixels in missing])
    return row, column, int(np.count_nonzero(tiles_with_data(seen, ys, xs, tiling.tile)))


def _from_known(share: np.ndarray, side: int, plan: Plan) -> np.ndarray:
    """The same from the share of pixels with data in squares of ``side`` pixels."""
    tiling = plan.tiling
    places = [
        np.minimum((axis.origins + corner + tiling.tile // 2) // side, len_ - 1)
        for axis, corner, len_ in zip((tiling.y, tiling.x), plan.corner, share.shape, strict=True)
    ]
    tiles = share[np.ix_(*places)]
    for axis, along in enumerate((tiling.y, tiling.x)):
        tiles = np.add.reduceat(tiles, along.rows[:-1], axis=axis)
    return np.rint(tiles).astype(np.int32)
