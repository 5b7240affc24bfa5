"""Fill a stored grid: compute its missing chunks."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import dask.array as da
import numpy as np
from dask import delayed, optimize
from dask.delayed import Delayed

from inkdask import engine, paces
from inkdask.errors import InkdaskError
from inkdask.inference import infer, infer_chunk
from inkdask.plan import Plan
from inkdask.progress import Meter
from inkdask.specs import Network, Passes
from inkdask.store import ChunkReport, GridStore, save_chunk
from inkdask.summary import Summary

log = logging.getLogger("inkdask")


def check_weights(network: Network) -> None:
    """Check that the weights fit the network, before any layer is read."""
    if network.function is None:
        from inkdask.models import weights  # here, because it imports torch

        weights.load(network)


@dataclass(frozen=True, eq=False)
class Work:
    """Chunks to compute.

    Attributes
    ----------
    grid, plan
        Where they are stored, and what computes them.
    mine
        The chunks, bool (rows, columns).
    """

    grid: GridStore
    plan: Plan
    mine: np.ndarray


def fill(work: Sequence[Work], summary: Summary, last: int) -> None:
    """Compute the missing tiles of some chunks up to a pass; store each chunk once it is done.

    Parameters
    ----------
    work
        Grids of one tiling; those of both directions share what they read.
    last
        The last pass to run.

    Raises
    ------
    InkdaskError
        When chunks failed for good; the other chunks are stored.
    """
    passes = [Passes(each.grid.passes_done(), last) for each in work]
    missing = np.stack([(p.done < last) & w.mine for p, w in zip(passes, work, strict=True)])
    if not missing.any():
        return
    check_weights(work[0].plan.network)
    places = np.argwhere(missing.transpose(1, 2, 0))  # row, column, number of the grid
    tasks = together(places, work, passes)
    tiling = work[0].plan.tiling
    tiles = np.stack([tiling.tiles_until(last) - tiling.tiles_there(p.done) for p in passes])
    total = int(tiles[missing].sum())
    before, ran = summary.progress, summary.ran
    # Peek at the tiles of this process, because a chunk of thousands of tiles reports late.
    with Meter("ink", total, "tiles", peek=lambda: summary.progress - before) as meter:

        def on_report(chunk: ChunkReport) -> None:
            summary.add(chunk)
            meter.add(chunk.ran + chunk.empty)

        def again(number: int) -> Delayed:
            row, column, which = places[number].tolist()
            return alone(row, column, work[which].plan, work[which].grid, passes[which])

        account = engine.compute_each(tasks, on_report, again)
    summary.inferring += meter.seconds
    if engine.current_client() is None:
        paces.keep(work[0].plan.network, summary.ran - ran, meter.seconds)
    summary.lost += account.lost
    if account.failed:
        summary.failed = len(tasks) - account.succeeded
        summary.say(work[0].grid.uri)
        raise failure(account, summary)


def together(places: np.ndarray, work: Sequence[Work], passes: Sequence[Passes]) -> list[Delayed]:
    """Return one task for each of many chunks (row, column, number of the work).

    The tasks share what they read.
    """
    saved = [
        da.map_blocks(
            save_chunk,
            infer(plan.volume, plan.tiling, plan.network, plan.mask, some).chunks,
            store=each.grid,
            passes=some,
            meta=np.empty((0, 0), object),
            enforce_ndim=False,
        )
        for each, some in zip(work, passes, strict=True)
        for plan in [each.plan]
    ]
    # At once, because a read that is fused into the tasks of one grid is no more shared.
    tasks = [each.to_delayed(optimize_graph=False) for each in optimize(*saved)]
    return [tasks[which][row, column] for row, column, which in places]


def alone(row: int, column: int, plan: Plan, grid: GridStore, passes: Passes) -> Delayed:
    """Return the task of one chunk, which reads only the data of this chunk."""
    volume, mask = plan.cut(plan.tiling.y.reading(row), plan.tiling.x.reading(column))
    blocks = [array.to_delayed().item() for array in (volume, mask) if array is not None]
    if mask is not None:
        blocks[1] = blocks[1][None]
    place = {"passes": passes, "block_id": (row, column)}
    chunk = delayed(infer_chunk)(*blocks, tiling=plan.tiling, network=plan.network, **place)
    return delayed(save_chunk)(chunk, grid, **place)


def failure(account: engine.Account, summary: Summary) -> InkdaskError:
    """Return one error for all chunks that failed for good."""
    first = next(iter(account.failed.values()))
    for failed in account.failed.values():
        log.debug("a chunk failed:\n%s", failed.trace)
    error = InkdaskError(
        f"{first.reason} ({summary.failed} of {summary.finished + summary.failed} chunks "
        "were not computed; the others are kept, and the same command resumes with the rest)."
    )
    error.__cause__ = first.error
    return error
