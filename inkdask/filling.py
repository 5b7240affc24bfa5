"""Filling a stored grid: what is missing of it is computed, chunk by chunk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import dask.array as da
import numpy as np
from dask import delayed
from dask.delayed import Delayed

from inkdask import engine
from inkdask.errors import InkdaskError
from inkdask.inference import infer, infer_chunk
from inkdask.plan import Plan
from inkdask.progress import Meter
from inkdask.specs import Network, Passes
from inkdask.store import ChunkReport, GridStore, save_chunk
from inkdask.summary import Summary

log = logging.getLogger("inkdask")


def check_weights(network: Network) -> None:
    """Fail before anything is read when the weights are not those of the network."""
    if network.function is None:
        from inkdask.models import weights  # torch: a job needs it, an import of inkdask does not

        weights.load(network)


def fill(grid: GridStore, plan: Plan, mine: np.ndarray, summary: Summary, last: int) -> None:
    """Compute what some chunks lack up to a pass, each written as soon as it is done.

    Parameters
    ----------
    mine
        The chunks, bool (rows, columns).
    last
        The pass: tiles of later ones do not run.

    Raises
    ------
    InkdaskError
        When chunks failed for good; the others are done all the same.
    """
    passes = Passes(grid.passes_done(), last)
    missing = np.argwhere((passes.done < last) & mine)
    if not len(missing):
        return
    check_weights(plan.network)
    tasks = together(missing, plan, grid, passes)
    again: list[Delayed] = []  # alone, after they failed together
    tiles = plan.tiling.tiles_until(last) - plan.tiling.tiles_there(passes.done)
    total = int(tiles[(passes.done < last) & mine].sum())
    before, finished = summary.progress, summary.finished
    # A chunk is thousands of tiles; those that run in this process are counted as they run.
    with Meter("ink", total, "tiles", peek=lambda: summary.progress - before) as meter:

        def on_report(chunk: ChunkReport) -> None:
            summary.add(chunk)
            meter.add(chunk.ran + chunk.empty)

        failed = engine.compute_each(tasks, on_report)
        if failed and summary.finished - finished + len(failed) == len(tasks):
            # What could not be read may be needed by some of them only.
            again = [
                alone(row, column, plan, grid, passes)
                for (row, column), task in zip(missing.tolist(), tasks, strict=True)
                if task.key in failed
            ]
            failed = engine.compute_each(again, on_report)
    summary.inferring += meter.seconds
    summary.lost += len(engine.lost_tasks({task.key for task in (*tasks, *again)}))
    if failed:
        summary.failed = len(tasks) - (summary.finished - finished)
        summary.say(grid.uri)
        raise failure(failed, summary)


def together(places: np.ndarray, plan: Plan, grid: GridStore, passes: Passes) -> list[Delayed]:
    """One task for each of many chunks, which read together."""
    chunks = infer(plan.volume, plan.tiling, plan.network, plan.mask, passes).chunks
    saved = da.map_blocks(
        save_chunk,
        chunks,
        store=grid,
        passes=passes,
        meta=np.empty((0, 0), object),
        enforce_ndim=False,
    ).to_delayed()
    return [saved[row, column] for row, column in places]


def alone(row: int, column: int, plan: Plan, grid: GridStore, passes: Passes) -> Delayed:
    """The task of one chunk, which reads nothing but what this chunk needs."""
    volume, mask = plan.cut(plan.tiling.y.reading(row), plan.tiling.x.reading(column))
    blocks = [array.to_delayed().item() for array in (volume, mask) if array is not None]
    if mask is not None:
        blocks[1] = blocks[1][None]
    place = {"passes": passes, "block_id": (row, column)}
    chunk = delayed(infer_chunk)(*blocks, tiling=plan.tiling, network=plan.network, **place)
    return delayed(save_chunk)(chunk, grid, **place)


def failure(failed: Mapping[Any, Exception], summary: Summary) -> InkdaskError:
    """One sentence for the chunks that failed for good."""
    first = next(iter(failed.values()))
    for error in failed.values():
        log.debug("a chunk failed", exc_info=error)
    error = InkdaskError(
        f"{engine.reason(first)} ({summary.failed} of {summary.finished + summary.failed} chunks "
        "were not computed; the others are kept, and the same command resumes with the rest)."
    )
    error.__cause__ = first
    return error
