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
from inkdask.models import registry
from inkdask.parts import assign
from inkdask.pictures import exporting
from inkdask.pictures.picture import open_picture
from inkdask.pictures.pyramid import to_uint8, write_pyramid
from inkdask.plan import Window
from inkdask.preflight import check_room_for_picture
from inkdask.provenance import absolute, provenance
from inkdask.segment import open_segment
from inkdask.settings import Settings
from inkdask.storage import outputs
from inkdask.store import ENDING, GridStore, differences
from inkdask.types import InkdaskError, SettingsError

log = logging.getLogger("inkdask")

PREVIEW = "_preview"  # of a picture that is not yet final

Attributes = Mapping[str, Any]  # of a stored grid: its fingerprint and its origin


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
    check_complete(store, settings)
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


def find(settings: Settings) -> GridStore:
    """The one grid under ``zarr_output_dir`` that is the settings' job.

    Raises
    ------
    InkdaskError
        When there is none, or more than one; saying which are there and how they differ.
    """
    folder, wanted = settings.zarr_output_dir, asked(settings, defaults=True)
    found = {}
    for entry in storage.list_folder(folder) if storage.exists(folder) else []:
        uri = storage.join(folder, entry.name)
        if entry.name.endswith(ENDING) and (attributes := GridStore.attributes(uri)):
            found[uri] = attributes
    differing = {
        uri: differences(description(attributes), wanted) or changed_input(attributes)
        for uri, attributes in found.items()
        if "fingerprint" in attributes
    }
    matching = [uri for uri, difference in differing.items() if not difference]
    if len(matching) == 1:
        return GridStore.open(matching[0])
    if matching:
        first, *others = matching
        apart = differences(found[first]["fingerprint"], found[others[0]]["fingerprint"])
        raise InkdaskError(
            f"{len(matching)} tile grids in {folder} are of this job, {', '.join(matching)}: "
            f"{apart.replace(' there', ' in the first').replace(' here', ' in the second')}; "
            "name one with --grid."
        )
    there = "; ".join(f"in {uri}, {difference}" for uri, difference in differing.items())
    missing = ", ".join(map(str, range(settings.num_parts)))
    raise InkdaskError(
        f"No tile grid in {folder} is of this job: "
        + (f"{there}; run" if there else "it has none; run")
        + f" STEP=inference with NUM_PARTS={settings.num_parts} and PART_ID={missing} first."
    )


def description(attributes: Attributes) -> dict[str, Any]:
    """What a user can ask of a stored grid, in the words of the settings."""
    identity, origin = attributes["fingerprint"], attributes["origin"]
    return {
        "s3_path": origin["source"],
        "surface_volume_zarr": origin["volume"],
        "layers": origin["layer_range"],
        "model_in_chans": len(identity["layers"]) // identity["averaged"],
        "force_reverse": identity["layers"][0] > identity["layers"][-1],
        "z_downsample_mean_factor": identity["averaged"],
        **{name: identity[name] for name in ("model", "weights", "tile", "stride", "clip")},
        **{name: identity[name] for name in ("divisor", "precision")},
    }


def asked(settings: Settings, defaults: bool = False) -> dict[str, Any]:
    """What the settings ask of a grid: what was given, and with ``defaults`` what goes unsaid.

    What is left to the model is not asked for: without its weights nobody knows it.
    """
    names = ("s3_path", "model_in_chans", "tile", "stride", "clip", "divisor", "precision")
    silent = ("force_reverse", "z_downsample_mean_factor")
    given: dict[str, Any] = {
        name: getattr(settings, name)
        for name in (*names, *silent)
        if name in settings.model_fields_set or (defaults and name in silent)
    }
    given["s3_path"] = absolute(settings.s3_path)
    if settings.surface_volume_zarr:
        given["surface_volume_zarr"] = absolute(settings.surface_volume_zarr)
    if settings.layers:
        given["layers"] = settings.layers
    if settings.model is not None:
        given |= registry.known_of(settings.model)
    return {name: value for name, value in given.items() if value is not None}


def changed_input(attributes: Attributes) -> str:
    """How the segment has changed since a grid was made; empty when it has not, or is gone."""
    origin, then = attributes["origin"], attributes["fingerprint"]["input"]
    try:
        now = open_segment(
            origin["volume"],
            tuple(origin["layer_range"]),
            mask=origin["mask"],
            level=origin.get("ome_zarr_level", "0"),
        ).identity
    except InkdaskError as error:
        log.info("The input of the grid cannot be compared: %s", error)
        return ""
    return "" if now == then else "the input was another (size, ETag or modification time)"


def window_of(settings: Settings, identity: Attributes, origin: Attributes) -> tuple[slice, slice]:
    """Rows and columns of a stored grid's volume that are the picture.

    Raises
    ------
    SettingsError
        When the region of interest is not inside what the grid covers.
    """
    top, left = identity["corner"]
    height, width = identity["shape"]
    if (wanted := settings.roi_xyxy or origin["roi_xyxy"]) is None:
        return slice(0, height), slice(0, width)
    x0, y0, x1, y1 = wanted
    if x0 < left or y0 < top or x1 > left + width or y1 > top + height:
        raise SettingsError(
            f"ROI_XYXY {x0},{y0},{x1},{y1} reaches beyond the tile grid, which covers "
            f"{left},{top},{left + width},{top + height}."
        )
    return slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)


def check_complete(store: GridStore, settings: Settings) -> None:
    """Check that a stored grid lacks nothing: a picture never has holes.

    Raises
    ------
    InkdaskError
        Naming the missing parts.
    """
    missing = store.tiles_run() < 0
    if missing.any():
        work = store.work()
        parts = assign(np.zeros(missing.shape) if work is None else work, settings.num_parts)
        lacking = ", ".join(map(str, np.unique(parts[missing])))
        raise InkdaskError(
            f"{np.count_nonzero(missing)} of {missing.size} chunks are missing in {store.uri}: run "
            f"STEP=inference with NUM_PARTS={settings.num_parts} and PART_ID={lacking} first."
        )


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
