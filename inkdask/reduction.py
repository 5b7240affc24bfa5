"""Make the picture of a stored tile grid, without weights, GPU or layers.

Each job ends with this step, and so do parts. A stored grid also gives pictures of other regions
and blending windows.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any

import dask.array as da
import numpy as np

from inkdask.blending import blend, spread
from inkdask.coarse import so_far
from inkdask.errors import InkdaskError
from inkdask.families import Family, family_of
from inkdask.identity import Provenance, Shows, differences
from inkdask.job import Job
from inkdask.parts import assign
from inkdask.pictures import exporting
from inkdask.pictures.picture import open_picture, provenance_at
from inkdask.pictures.pyramid import to_uint8, write_pyramid
from inkdask.preflight import check_room_for_picture
from inkdask.specs import BlendMode
from inkdask.storage import outputs

log = logging.getLogger("inkdask")

PREVIEW = "_preview"  # ends the name of an unfinished picture
SPREAD = "_spread"  # ends the name of a picture of the spread of opinions
MOST_SPREAD = 0.5  # half of the opinions are 0 and half are 1


def picture(job: Job, num_parts: int) -> tuple[str, str]:
    """Blend a stored grid and write the picture; return its URI, and how much ink it shows."""
    with outputs.moved_by("OUTPUT_PATH"):
        outputs.check_writable(f"{job.target}.png")
    check_room_for_picture(job.region, job.target)
    check_complete(job, num_parts)
    tell_of_replaced(f"{job.target}.zarr", job.provenance)
    grid = job.grid
    ink = blend(grid.grid(), grid.valid(), grid.tiling, *window_of(job))
    shown = ink_of(job, write(job, job.target, ink))
    if job.rendering.spread:
        mode, sigma, _ = window_of(job)
        opinions = spread(grid.grid(), grid.valid(), grid.tiling, mode, sigma)
        write(job, job.target + SPREAD, opinions / MOST_SPREAD, shows="spread")
    for ending in (".png", ".zarr"):
        outputs.discard(job.target + PREVIEW + ending)
    job.grid.remove_earlier()
    return f"{job.target}.png", shown


def preview(job: Job) -> str:
    """Write the picture of the stored tiles beside the place of the final picture."""
    ink = so_far(job.grid, job.grid.passes_done(), *window_of(job))
    write(job, job.target + PREVIEW, ink)
    return f"{job.target}{PREVIEW}.png"


def window_of(job: Job) -> tuple[BlendMode, float, Family]:
    """Return how the tiles of a job are blended, for `blend`."""
    family = family_of(job.recipe.architecture, has_mask=job.recipe.mask is not None)
    return job.rendering.blend_mode, job.rendering.gaussian_sigma, family


def ink_of(job: Job, histogram: list[int]) -> str:
    """Say how much ink the picture of a job shows: ``0.02 % of the papyrus above 0.5, ...``."""
    counted = np.array(histogram)
    papyrus = int(job.grid.valid()[job.region.slices].sum().compute())
    share = 100 * counted[128:].sum() / max(papyrus, 1)
    strongest = np.flatnonzero(counted).max(initial=0) / 255
    percent = f"{share:.0f}" if share >= 10 else f"{share:.2g}"
    return f"{percent} % of the papyrus above 0.5, highest {strongest:.2f}"


def check_complete(job: Job, num_parts: int) -> None:
    """Check that the grid has all chunks of the region, because a picture never has holes."""
    grid, region = job.grid, job.region
    y = grid.tiling.y.reaching_chunks(region.top, region.bottom)
    x = grid.tiling.x.reaching_chunks(region.left, region.right)
    needed = np.zeros(grid.tiling.block_shape, bool)
    needed[y, x] = True
    missing = needed & ~grid.chunks_done()
    if missing.any():
        work = grid.work()
        parts = assign(np.zeros(missing.shape) if work is None else work, num_parts)
        lacking = ", ".join(map(str, np.unique(parts[missing])))
        chunks = f"CHUNK_SIZE={job.said.chunk_size}, " if job.said else ""
        raise InkdaskError(
            f"{np.count_nonzero(missing)} of {np.count_nonzero(needed)} chunks are missing in "
            f"{grid.uri}: run STEP=inference with {chunks}NUM_PARTS={num_parts} and "
            f"PART_ID={lacking} first."
        )


def tell_of_replaced(uri: str, made_of: Provenance) -> None:
    """Log how the picture at ``uri`` differs from the one that replaces it."""
    there = provenance_at(uri)
    if there and (differing := differences(_shaping(there), _shaping(made_of))):
        log.info("%s is replaced: its %s", uri, differing)


def _shaping(told: Provenance) -> dict[str, Any]:
    """Return what changes a picture, which the chunks and the extent of its grid do not."""
    recipe = told.recipe.to_json()
    for name in ("chunk", "corner", "size"):
        del recipe[name]
    return {**recipe, "blend_mode": told.blend_mode, "gaussian_sigma": told.gaussian_sigma}


def write(job: Job, target: str, values: da.Array, shows: Shows = "ink") -> list[int]:
    """Write values in [0, 1] as ``<target>.png`` and ``.zarr``, each whole or not at all.

    Returns how many pixels have each grey value.
    """
    region, how = job.region, job.rendering
    told = replace(job.provenance, shows=shows)
    grey = da.map_blocks(to_uint8, values[region.slices], dtype=np.uint8)
    corner = region.shift(*job.recipe.corner).corner

    def draw(place: str) -> None:
        exporting.write(open_picture(place), f"{target}.png", how.look)

    return write_pyramid(grey, f"{target}.zarr", told, how.pixel_um, corner, draw)
