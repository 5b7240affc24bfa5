"""From a stored tile grid to the picture: no weights, no GPU, and no layers are needed.

A job ends with it, parts are put together by it, and an old grid gives another picture: with
another window, or of another region.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np

from inkdask import storage
from inkdask.blending import blend
from inkdask.clusters import connect, report
from inkdask.errors import InkdaskError
from inkdask.grids import OF_STORAGE, Attributes, asked, description, find, has_chunks_of, window_of
from inkdask.parts import assign
from inkdask.pictures import exporting
from inkdask.pictures.picture import is_picture, open_picture
from inkdask.pictures.pyramid import to_uint8, write_pyramid
from inkdask.plan import Window
from inkdask.preflight import check_room_for_picture
from inkdask.provenance import provenance
from inkdask.settings import Settings
from inkdask.storage import outputs
from inkdask.store import GridStore, differences

log = logging.getLogger("inkdask")

PREVIEW = "_preview"  # of a picture that is not yet final


def reduce(settings: Settings) -> str:
    """Make the picture of a stored grid, and return its URI.

    The grid is the one that the settings name, or the one under ``zarr_output_dir`` whose job is
    what they describe.

    Raises
    ------
    InkdaskError
        When there is no such grid, or parts of it are missing.
    """
    if settings.add_scale_bar:
        settings.require("pixel_resolution_um")
    if settings.grid is None:
        settings.require("s3_path", "model")
        store = find(settings)
    else:
        store = GridStore.open(settings.grid)
        if differing := differences(description(store.attributes(store.uri)), asked(settings)):
            raise InkdaskError(f"The tile grid {store.uri} is another job's: {differing}.")
    with connect(settings), report(settings.report):
        uri = picture(store, settings)
    announce(uri, settings)
    return uri


def picture(store: GridStore, settings: Settings, origin: Attributes | None = None) -> str:
    """Blend a stored grid, write the picture, and return its URI.

    Parameters
    ----------
    origin
        Of the job that the picture is for. Default: of the one that last filled the grid.

    Raises
    ------
    InkdaskError
        When chunks are missing, or the picture cannot be written.
    """
    target, window, ink, made_of = _blended(store, settings, origin)
    for place in (f"{target}.png", settings.result_file):
        outputs.check_writable(place)
    check_room_for_picture(window, target)
    check_complete(store, settings, window)
    tell_of_replaced(f"{target}.zarr", made_of)
    write(ink, target, made_of, settings)
    for ending in (".png", ".zarr"):
        outputs.remove(target + PREVIEW + ending)
    return f"{target}.png"


def announce(uri: str, settings: Settings) -> None:
    """Write the URI of the picture to the result file: the last thing that a job does."""
    storage.write_bytes(settings.result_file, uri.encode())


def preview(store: GridStore, settings: Settings, origin: Attributes) -> str:
    """Write the picture of the tiles that are there so far, beside the final one's place."""
    target, _, ink, made_of = _blended(store, settings, origin)
    write(ink, target + PREVIEW, made_of, settings)
    return f"{target}{PREVIEW}.png"


def _blended(
    store: GridStore, settings: Settings, origin: Attributes | None
) -> tuple[str, Window, da.Array, dict[str, Any]]:
    """Where the picture of a stored grid goes, its window, the picture, and its origin."""
    attributes = store.attributes(store.uri)
    identity, origin = attributes["fingerprint"], origin or attributes["origin"]
    window = window_of(settings, identity, origin)
    ink = blend(
        store.grid(), store.valid(), store.tiling, settings.blend_mode, settings.gaussian_sigma
    )
    target = output_stem(settings, origin, identity["model"])
    made_of = provenance(identity, {**origin, "ran_in": store.precisions()}, settings)
    return target, window, ink[window], made_of


def check_complete(store: GridStore, settings: Settings, window: Window) -> None:
    """Check that a stored grid lacks nothing of a window: a picture never has holes.

    Raises
    ------
    InkdaskError
        Naming the missing parts.
    """
    missing = store.tiles_run() < 0
    axes = zip((store.tiling.y, store.tiling.x), window, strict=True)
    needed = np.zeros(missing.shape, bool)
    needed[tuple(axis.reaching_chunks(pixels.start, pixels.stop) for axis, pixels in axes)] = True
    missing &= needed
    if missing.any():
        work = store.work()
        parts = assign(np.zeros(missing.shape) if work is None else work, settings.num_parts)
        lacking = ", ".join(map(str, np.unique(parts[missing])))
        chunks = f"CHUNK_SIZE={store.tiling.y.step}, "
        raise InkdaskError(
            f"{np.count_nonzero(missing)} of {np.count_nonzero(needed)} chunks are missing in "
            f"{store.uri}: run STEP=inference with "
            f"{'' if has_chunks_of(settings, store) else chunks}"
            f"NUM_PARTS={settings.num_parts} and PART_ID={lacking} first."
        )


def tell_of_replaced(uri: str, made_of: Mapping[str, Any]) -> None:
    """Say that the picture at ``uri`` is another one than is to be, where that is so."""
    try:
        there = open_picture(uri).origin if is_picture(uri) else {}
    except InkdaskError:  # damaged: no loss
        return
    if "fingerprint" in there:
        words = [
            {name: value for name, value in origin["fingerprint"].items() if name not in OF_STORAGE}
            | {name: origin.get(name) for name in ("blend_mode", "gaussian_sigma")}
            for origin in (there, made_of)
        ]
        if differing := differences(*words):
            log.info("%s is replaced: its %s", uri, differing)


def write(ink: da.Array, target: str, origin: dict[str, Any], settings: Settings) -> None:
    """Write the picture as ``<target>.zarr`` and ``<target>.png``, each whole or not at all."""
    left, top = (origin["roi_xyxy"] or (0, 0))[:2]
    grey = da.map_blocks(to_uint8, ink, dtype=np.uint8)
    write_pyramid(grey, f"{target}.zarr", origin, settings.pixel_resolution_um, (top, left))
    stored = open_picture(f"{target}.zarr")
    exporting.write(stored, f"{target}.png", exporting.Look(), settings)


def output_stem(settings: Settings, origin: Attributes, model: str) -> str:
    """Where the outputs go, without their endings: ``.../prediction_<MODEL>_<START>_<END>``."""
    folder = settings.output_path or storage.join(str(origin["source"]), "predictions")
    if storage.is_local(folder):  # whoever reads the result file may be elsewhere
        folder = str(Path(storage.filesystem(folder)[1]).absolute())
    start, end = origin["layer_range"]
    name = f"prediction_{model.replace('/', '_')}_{start:02d}_{end:02d}"
    if roi := settings.roi_xyxy or origin["roi_xyxy"]:  # a part must not take the whole's place
        name += "_{}-{}-{}-{}".format(*roi)
    return storage.join(folder, name)
