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
from inkdask.sharing import shared
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
    """Chunks of one grid to compute.

    Attributes
    ----------
    grid, plan
        Where they are stored, and what computes them.
    passes
        The tiles to run.
    missing
        The chunks, bool (rows, columns).
    """

    grid: GridStore
    plan: Plan
    passes: Passes
    missing: np.ndarray

    @classmethod
    def of(
        cls, grid: GridStore, plan: Plan, mine: np.ndarray | None = None, last: int | None = None
    ) -> Work:
        """Return what a grid lacks of its chunks, or of ``mine``, up to a pass, or to the last."""
        done = grid.passes_done()
        passes = Passes(done, grid.tiling.passes - 1 if last is None else last)
        missing = done < passes.last
        return cls(grid, plan, passes, missing if mine is None else missing & mine)

    @property
    def tiles(self) -> int:
        """Number of the tiles."""
        tiling = self.grid.tiling
        tiles = tiling.tiles_until(self.passes.last) - tiling.tiles_there(self.passes.done)
        return int(tiles[self.missing].sum())


def fill(work: Sequence[Work], summary: Summary) -> None:
    """Compute chunks, and store each once it is done.

    Work of one place shares what it reads (`inkdask.sharing`).

    Raises
    ------
    InkdaskError
        When chunks failed for good; the other chunks are stored.
    """
    work = [each for each in work if each.missing.any()]
    if not work:
        return
    networks: list[Network] = []  # no set, because a callable need not have a hash
    for network in (each.plan.network for each in work):
        if network not in networks:
            check_weights(network)
            networks.append(network)
    # Row, column and number of the work: chunks of one place follow each other.
    places = sorted(
        (row, column, number)
        for number, each in enumerate(work)
        for row, column in np.argwhere(each.missing).tolist()
    )
    tasks = together(places, work)
    before, ran = summary.progress, summary.ran
    total = sum(each.tiles for each in work)
    # Peek at the tiles of this process, because a chunk of thousands of tiles reports late.
    with Meter("ink", total, "tiles", peek=lambda: summary.progress - before) as meter:

        def on_report(_: int, chunk: ChunkReport) -> None:
            summary.add(chunk)
            meter.add(chunk.ran + chunk.empty)

        def again(task: int) -> Delayed:
            row, column, number = places[task]
            return alone(row, column, work[number])

        account = engine.compute_each(tasks, on_report, again)
    summary.inferring += meter.seconds
    if engine.current_client() is None and len(networks) == 1:
        paces.keep(networks.pop(), summary.ran - ran, meter.seconds)
    summary.lost += account.lost
    if account.failed:
        summary.failed = len(tasks) - account.succeeded
        grids = dict.fromkeys(work[places[task][2]].grid.uri for task in account.failed)
        summary.say("; ".join(grids))
        raise failure(account, summary)


def together(places: Sequence[tuple[int, int, int]], work: Sequence[Work]) -> list[Delayed]:
    """Return one task for each of many chunks (row, column, number of the work).

    The tasks share what they read.
    """
    plans = shared([each.plan for each in work])
    saved = [
        da.map_blocks(
            save_chunk,
            infer(plan.volume, plan.tiling, plan.network, plan.mask, each.passes).chunks,
            store=each.grid,
            passes=each.passes,
            meta=np.empty((0, 0), object),
            enforce_ndim=False,
        )
        for each, plan in zip(work, plans, strict=True)
    ]
    # At once, because a read that is fused into the tasks of one grid is no more shared.
    tasks = [each.to_delayed(optimize_graph=False) for each in optimize(*saved)]
    return [tasks[number][row, column] for row, column, number in places]


def alone(row: int, column: int, work: Work) -> Delayed:
    """Return the task of one chunk, which reads only the data of this chunk."""
    plan = work.plan
    volume, mask = plan.cut(plan.tiling.y.reading(row), plan.tiling.x.reading(column))
    blocks = [array.to_delayed().item() for array in (volume, mask) if array is not None]
    if mask is not None:
        blocks[1] = blocks[1][None]
    place = {"passes": work.passes, "block_id": (row, column)}
    chunk = delayed(infer_chunk)(*blocks, tiling=plan.tiling, network=plan.network, **place)
    return delayed(save_chunk)(chunk, work.grid, **place)


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
