"""Several jobs of one region, which read each column of voxels once.

Each job fills its own stored grid, the one that `run` with the same words fills. So a job that was
run before costs nothing, and a run that follows goes on from what is stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import dask.array as da

from inkdask.blending import blend, spread
from inkdask.filling import Work, fill
from inkdask.job import Job, plan_of
from inkdask.plan import Plan
from inkdask.reduction import window_of
from inkdask.settings import Settings
from inkdask.summary import Cost, Summary


def job_of(source: str, settings: Settings) -> Job:
    """Return the job of some settings, for `fill_together`: no record of it is kept."""
    return replace(Job.of(Plan.of(source, settings), settings), folder=None)


def pictures_of(job: Job) -> tuple[da.Array, da.Array, da.Array]:
    """Return ink and spread, dask float32 (y, x), and pixels with data, of a filled grid."""
    stored, part = (job.grid.grid(), job.grid.valid(), job.grid.tiling), job.region.slices
    how = window_of(job)
    return blend(*stored, *how)[part], spread(*stored, *how[:2])[part], stored[1][part]


def fill_together(jobs: Sequence[Job]) -> list[Cost]:
    """Compute what is missing in the grids of jobs, and return what each of them cost now.

    Each chunk is stored when it is done, so the same call goes on after an interruption.
    """
    for job in jobs:
        job.create()
    summary = Summary()
    fill([Work.of(job.grid, plan_of(job)) for job in jobs], summary)
    for job in jobs:
        if job.grid.uri in summary.costs:
            job.check_unchanged()
    costs = [summary.costs.get(job.grid.uri, Cost()) for job in jobs]
    # Of the time that passed, because chunks run side by side.
    share = summary.inferring / max(sum(cost.seconds for cost in costs), 1e-9)
    return [Cost(cost.tiles, cost.seconds * share) for cost in costs]
