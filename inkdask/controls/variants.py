"""Several jobs of one region as one graph, which reads each column of voxels once.

Each job fills its own stored grid, the one that `run` with the same words fills. So a job that was
run before costs nothing, and a run that follows goes on from what is stored.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask
import dask.array as da
import numpy as np
from dask.delayed import Delayed

from inkdask import engine
from inkdask.blending import blend, spread
from inkdask.box import Box
from inkdask.failures import Failure, fallible, read_or_fail
from inkdask.filling import check_weights
from inkdask.inference import infer_chunk, over_chunks
from inkdask.job import Job, plan_of
from inkdask.plan import Plan
from inkdask.progress import Meter
from inkdask.reduction import window_of
from inkdask.segment import open_segment
from inkdask.settings import Settings
from inkdask.specs import NO_MASK, Network, Passes
from inkdask.storage.counting import counters
from inkdask.store import GridStore, save_chunk
from inkdask.tiling import Tiling


@dataclass(frozen=True)
class Cost:
    """Tiles that ran for a job now, and its share of the time, in seconds."""

    tiles: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Done:
    """A chunk that was stored: number of its job, tiles, and seconds in its task."""

    number: int
    ran: int
    tiles: int
    seconds: float


def job_of(source: str, settings: Settings) -> Job:
    """Return the job of some settings, for `fill_together`: no record of it is kept."""
    return replace(Job.of(Plan.of(source, settings), settings), folder=None)


def pictures_of(job: Job) -> tuple[da.Array, da.Array, da.Array]:
    """Return ink and spread, dask float32 (y, x), and pixels with data, of a filled grid."""
    stored, part = (job.grid.grid(), job.grid.valid(), job.grid.tiling), job.region.slices
    how = window_of(job)
    return blend(*stored, *how)[part], spread(*stored, *how[:2])[part], stored[1][part]


def fill_together(jobs: Sequence[Job]) -> list[Cost]:
    """Compute what is missing in the grids of jobs, and return what each of them cost.

    Jobs of one place read it once. Each chunk is stored when it is done, so the same call goes on
    after an interruption.
    """
    for job in jobs:
        job.create()
    missing = [job.grid.passes_done() < job.grid.tiling.passes - 1 for job in jobs]
    busy = [number for number, chunks in enumerate(missing) if chunks.any()]
    for network in {plan_of(jobs[number]).network for number in busy}:
        check_weights(network)
    tasks, total = _tasks(jobs, busy, missing)
    spent = np.zeros((len(jobs), 2))  # tiles and seconds
    if not tasks:
        return [Cost() for _ in jobs]
    before = counters().tiles
    with Meter("ink", total, "tiles", peek=lambda: counters().tiles - before) as meter:

        def on_done(done: _Done) -> None:
            spent[done.number] += done.ran, done.seconds
            meter.add(done.tiles)

        engine.compute_each(tasks, on_done).check()
    for number in busy:
        jobs[number].check_unchanged()
    scale = meter.seconds / max(spent[:, 1].sum(), 1e-9)  # because tasks run side by side
    return [Cost(int(tiles), float(seconds * scale)) for tiles, seconds in spent]


def _tasks(
    jobs: Sequence[Job], busy: Sequence[int], missing: Sequence[np.ndarray]
) -> tuple[list[Delayed], int]:
    """Return one task for each missing chunk, and the number of their tiles."""
    arrays = {}
    for together in _of_one_place(jobs, busy):
        whole = _whole([plan_of(jobs[number]) for number in together])
        volume = whole.lazy(read_or_fail)[0]
        for number in together:
            job = jobs[number]
            plan = plan_of(job).over(whole, volume)
            passes = Passes(job.grid.passes_done(), plan.tiling.passes - 1)
            arrays[number] = over_chunks(
                _run_chunk, plan.tiling, plan.volume, plan.mask,
                network=plan.network, passes=passes, store=job.grid, number=number,
            )  # fmt: skip
    # Optimised as one graph, because alone each would get a name of its own for what it reads.
    shared: Any = dask.optimize(*arrays.values())
    tasks, total = [], 0
    for number, array in zip(arrays, shared, strict=True):
        blocks, grid = array.to_delayed(optimize_graph=False), jobs[number].grid
        tasks += [blocks[tuple(place)] for place in np.argwhere(missing[number])]
        left = grid.tiling.tiles_until(grid.tiling.passes - 1)
        total += int((left - grid.tiling.tiles_there(grid.passes_done()))[missing[number]].sum())
    return tasks, total


def _of_one_place(jobs: Sequence[Job], busy: Sequence[int]) -> list[list[int]]:
    """Group jobs, by their numbers, that show the same region of the same layers."""
    groups: dict[Any, list[int]] = {}
    for number in busy:
        plan = plan_of(jobs[number])
        segment = plan.segment
        place = segment and (segment.uri, segment.level)
        groups.setdefault((place, plan.roi_xyxy), []).append(number)
    return list(groups.values())


def _whole(plans: Sequence[Plan]) -> Any:
    """Return the segment with the layers and pixels that any of the plans reads."""
    boxes = [Box.at(plan.corner, plan.tiling.shape) for plan in plans]
    numbers = [number for plan in plans for number in plan.layers]
    first: Any = plans[0].segment
    whole = open_segment(
        first.uri, (min(numbers), max(numbers) + 1), mask=NO_MASK, level=first.level
    )
    rows = slice(min(box.top for box in boxes), max(box.bottom for box in boxes))
    columns = slice(min(box.left for box in boxes), max(box.right for box in boxes))
    return whole.crop(rows, columns)


@fallible
def _run_chunk(
    block: np.ndarray,
    mask: np.ndarray | None = None,
    *,
    tiling: Tiling,
    network: Network,
    passes: Passes,
    store: GridStore,
    number: int,
    block_id: tuple[int, int],
) -> _Done | Failure:
    """Run and store the missing tiles that one chunk of a job owns."""
    began = time.perf_counter()
    place: Any = {"passes": passes, "block_id": block_id}
    chunk: Any = infer_chunk(block, mask, tiling=tiling, network=network, **place)
    report = save_chunk(chunk, store, **place)
    if isinstance(report, Failure):
        return report
    seconds = time.perf_counter() - began
    return _Done(number, report.ran, report.ran + report.empty, seconds)
