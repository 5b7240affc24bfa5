"""From a stored tile grid to the picture: no weights, no GPU, and no layers are needed.

A job ends with it, parts are put together by it, and an old grid gives another picture: with
another blending window, or of another region.
"""

from __future__ import annotations

import logging
from dataclasses import replace

import dask.array as da
import numpy as np

from inkdask import storage
from inkdask.blending import blend
from inkdask.errors import InkdaskError
from inkdask.identity import Provenance, differences
from inkdask.job import Job
from inkdask.parts import assign
from inkdask.pictures import exporting
from inkdask.pictures.picture import is_picture, open_picture
from inkdask.pictures.pyramid import to_uint8, write_pyramid
from inkdask.preflight import check_room_for_picture
from inkdask.provenance import provenance_of
from inkdask.settings import Settings
from inkdask.storage import outputs
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

PREVIEW = "_preview"  # of a picture that is not yet final


def picture(job: Job, settings: Settings) -> str:
    """Blend a stored grid, write the picture, and return its URI."""
    region = job.region
    for place in (f"{job.target}.png", settings.result_file):
        outputs.check_writable(place)
    check_room_for_picture(region, job.target)
    check_complete(job, settings)
    made_of = provenance_of(job.recipe, job.origin, job.grid.precisions(), settings)
    tell_of_replaced(f"{job.target}.zarr", made_of)
    write(job, job.target, made_of, settings)
    for ending in (".png", ".zarr"):
        outputs.remove(job.target + PREVIEW + ending)
    job.grid.remove_earlier()
    return f"{job.target}.png"


def preview(job: Job, settings: Settings) -> str:
    """Write the picture of the tiles that are there so far, beside the final one's place."""
    made_of = provenance_of(job.recipe, job.origin, job.grid.precisions(), settings)
    write(job, job.target + PREVIEW, made_of, settings)
    return f"{job.target}{PREVIEW}.png"


def announce(uri: str, settings: Settings) -> None:
    """Write the URI of the picture to the result file: the last thing that a job does."""
    storage.write_bytes(settings.result_file, uri.encode())


def check_complete(job: Job, settings: Settings) -> None:
    """Check that the grid lacks nothing of the region: a picture never has holes."""
    grid, region = job.grid, job.region
    y = grid.tiling.y.reaching_chunks(region.top, region.bottom)
    x = grid.tiling.x.reaching_chunks(region.left, region.right)
    needed = np.zeros(grid.tiling.block_shape, bool)
    needed[y, x] = True
    missing = needed & ~grid.chunks_done()
    if missing.any():
        work = grid.work()
        parts = assign(np.zeros(missing.shape) if work is None else work, settings.num_parts)
        lacking = ", ".join(map(str, np.unique(parts[missing])))
        tiling = grid.tiling
        usual = Tiling.of(tiling.shape, tiling.tile, tiling.stride, settings.chunk_size)
        chunks = "" if usual.x.step == tiling.x.step else f"CHUNK_SIZE={tiling.x.step}, "
        raise InkdaskError(
            f"{np.count_nonzero(missing)} of {np.count_nonzero(needed)} chunks are missing in "
            f"{grid.uri}: run STEP=inference with {chunks}NUM_PARTS={settings.num_parts} and "
            f"PART_ID={lacking} first."
        )


def tell_of_replaced(uri: str, made_of: Provenance) -> None:
    """Say that the picture at ``uri`` is another one than is to be, where that is so."""
    try:
        there = open_picture(uri).provenance if is_picture(uri) else None
    except InkdaskError:  # damaged: no loss
        return
    if there is not None:
        # The same tiles may lie in other chunks, and have run elsewhere.
        alike = replace(
            there.recipe,
            chunk=made_of.recipe.chunk,
            corner=made_of.recipe.corner,
            size=made_of.recipe.size,
        )
        apart = (
            differences(alike, made_of.recipe),
            differences(
                {"blend_mode": there.blend_mode, "gaussian_sigma": there.gaussian_sigma},
                {"blend_mode": made_of.blend_mode, "gaussian_sigma": made_of.gaussian_sigma},
            ),
        )
        if differing := ", ".join(filter(None, apart)):
            log.info("%s is replaced: its %s", uri, differing)


def write(job: Job, target: str, made_of: Provenance, settings: Settings) -> None:
    """Write the picture as ``<target>.zarr`` and ``<target>.png``, each whole or not at all."""
    region, grid = job.region, job.grid
    ink = blend(
        grid.grid(), grid.valid(), grid.tiling, settings.blend_mode, settings.gaussian_sigma
    )[region.slices]
    grey = da.map_blocks(to_uint8, ink, dtype=np.uint8)
    corner = region.shift(*job.recipe.corner).corner
    write_pyramid(grey, f"{target}.zarr", made_of, settings.pixel_resolution_um, corner)
    stored = open_picture(f"{target}.zarr")
    exporting.write(stored, f"{target}.png", exporting.Look.of(settings))
