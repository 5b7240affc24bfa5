"""What a job costs: its tiles, and their time at the pace of this machine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress

from inkdask import paces
from inkdask.cautions import is_side
from inkdask.errors import InkdaskError
from inkdask.job import Job
from inkdask.models.registry import known, shaped
from inkdask.progress import about
from inkdask.segment import Segment
from inkdask.specs import ModelSpec
from inkdask.store import GridStore
from inkdask.tiling import CHUNK, Tiling


def cost(tiles: float, pace: float | None) -> str:
    """Say how long tiles take at a pace, in seconds a tile; None for a pace that is not known."""
    if pace is None:
        return "not timed on this machine yet"
    return f"{about(tiles * pace)} ({1 / pace:,.3g} tiles/s here)"


def ready(jobs: Sequence[Job], overwrite: bool) -> str:
    """Say what the jobs of a command will run, and about how long."""
    left = total = sum(job.grid.tiling.tiles for job in jobs)
    for job in jobs:
        if not overwrite and GridStore.label(job.grid.uri):
            with suppress(InkdaskError):  # damaged, which `run` reports
                left -= int(job.grid.tiling.tiles_there(job.grid.passes_done()).sum())
    if not left:
        return "all tiles are there, and only the picture is made"
    network = jobs[0].plan.network if jobs[0].plan else None
    pace = paces.kept(network) if network and network.function is None else None
    there = f", {total - left:,} of {total:,} are there" if left < total else ""
    return f"{left:,} tiles at most to run{there}; {cost(left, pace)}"


def _fits(spec: ModelSpec, depth: int, pixel_um: float | None) -> bool:
    """Whether a model reads so many layers, of pixels of this side as far as that is known."""
    is_known = pixel_um is not None and spec.pixel_um is not None
    return spec.layers <= depth and (not is_known or is_side(spec, float(pixel_um or 0)))


def of_models(
    segment: Segment, share: float, tile: int | None = None, stride: int | None = None
) -> Iterator[str]:
    """Say what each model with a key costs that fits a segment; ``share`` of it has data."""
    seen, rows = set(), {}
    depth, height, width = segment.shape
    for spec in known().values():
        if (spec.weights, spec.filename) in seen or not _fits(spec, depth, segment.pixel_um):
            continue
        seen.add((spec.weights, spec.filename))  # because some have two keys
        with suppress(InkdaskError):  # a tile that the model cannot read
            shape, _ = shaped(spec, tile)
            tiles = (
                Tiling.of((height, width), shape.tile, stride or shape.stride, CHUNK).tiles * share
            )
            pace = paces.of_model(spec, shape.tile)
            rows[spec.key] = f"{tiles:,.0f} tiles, {cost(tiles, pace)}"
    width = max(map(len, rows), default=0)
    return (f"{key:<{width}}  {row}" for key, row in rows.items())
