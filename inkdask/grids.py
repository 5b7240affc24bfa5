"""Stored tile grids: which one a job means, and what part of it its picture shows.

Grids are found by what they are of, not by their names: those who ask need neither the weights nor
the layers, from which the name is made.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np

from inkdask import storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.models import registry
from inkdask.provenance import absolute
from inkdask.segment import open_segment
from inkdask.settings import Settings
from inkdask.store import ENDING, FORMAT, GridStore, differences
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

OF_STORAGE = ("chunk", "corner", "shape")  # in a fingerprint: the same tiles have other ones, too
SHOWN = 3  # grids that are named when none is the job's

Attributes = Mapping[str, Any]  # of a stored grid: its fingerprint and its origin


def find(settings: Settings) -> GridStore:
    """The grid under ``zarr_output_dir`` that is the settings' job.

    Raises
    ------
    InkdaskError
        When there is none, or it is not clear which; saying what is there and how it differs.
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
        if attributes.get("fingerprint", {}).get("format") == FORMAT  # others say other things
    }
    matching = {uri: found[uri] for uri, difference in differing.items() if not difference}
    if matching:
        return GridStore.open(choose(matching, settings))
    nearest = sorted(differing.items(), key=lambda item: (item[1].count(" there and "), item[1]))
    there = "; ".join(f"in {uri}, {difference}" for uri, difference in nearest[:SHOWN])
    if len(nearest) > SHOWN:
        there += f"; and {len(nearest) - SHOWN} that differ more"
    missing = ", ".join(map(str, range(settings.num_parts)))
    raise InkdaskError(
        f"No tile grid in {folder} is of this job: "
        + (f"{there}; run" if there else "it has none; run")
        + f" STEP=inference with NUM_PARTS={settings.num_parts} and PART_ID={missing} first."
    )


def choose(grids: Mapping[str, Attributes], settings: Settings) -> str:
    """Choose the grid that is meant, of some that are all of one job.

    They may differ in what they cover, how they are cut, and whether the layers were prepared. Then
    it is one that covers the region (or else the most of the segment), has the chunks that were
    asked for, is complete, and comes from what was named; as far as there is one.

    Raises
    ------
    InkdaskError
        When they differ in more.
    """
    most = max(np.prod(attributes["fingerprint"]["shape"]) for attributes in grids.values())

    def has_chunks(uri: str) -> bool:
        named = "chunk_size" in settings.model_fields_set
        return not named or has_chunks_of(settings, GridStore.open(uri))

    def has_volume(uri: str) -> bool:
        origin = grids[uri]["origin"]
        return bool(settings.surface_volume_zarr) or origin["volume"] == origin["source"]

    def covers(uri: str) -> bool:
        identity, origin = grids[uri]["fingerprint"], grids[uri]["origin"]
        if settings.roi_xyxy is None:
            return bool(np.prod(identity["shape"]) == most)
        with suppress(SettingsError):
            return bool(window_of(settings, identity, origin))
        return False

    def is_complete(uri: str) -> bool:
        return bool((GridStore.open(uri).tiles_run() >= 0).all())

    first, *others = grids
    for other in others:
        if apart := _difference(grids[first], grids[other]):
            raise InkdaskError(
                f"{len(grids)} tile grids are of this job, {', '.join(grids)}: "
                f"{apart.replace(' there', ' in the first').replace(' here', ' in the second')}; "
                "name one with --grid."
            )
    left = list(grids)
    for test in (covers, has_chunks, is_complete, has_volume):
        if len(left) > 1:
            left = [uri for uri in left if _passes(test, uri)] or left
    return left[0]


def _passes(test: Callable[[str], bool], uri: str) -> bool:
    try:
        return test(uri)
    except InkdaskError:  # damaged, or of another version
        return False


def _difference(one: Attributes, other: Attributes) -> str:
    """What tells the pictures of two grids apart, in words; not how their tiles are stored."""
    # The same layers have another digest where they were prepared.
    alike = {"input"} if one["origin"]["volume"] != other["origin"]["volume"] else set()
    identities = [
        {name: value for name, value in grid["fingerprint"].items() if name not in alike}
        | {name: grid["origin"][name] for name in ("mask", "ome_zarr_level")}
        for grid in (one, other)
    ]
    stored = [{name: identity.pop(name) for name in OF_STORAGE} for identity in identities]
    apart = differences(*identities)
    return ", ".join(filter(None, (apart, differences(*stored)))) if apart else ""


def has_chunks_of(settings: Settings, store: GridStore) -> bool:
    """Whether a stored grid has the chunks that a job with these settings would make."""
    y, x = store.tiling.y, store.tiling.x
    wanted = Tiling.of((y.length, x.length), y.tile, y.stride, settings.chunk_size)
    return (y.step, x.step) == (wanted.y.step, wanted.x.step)


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
        "ome_zarr_level": origin["ome_zarr_level"],
        "mask_path": origin["mask"],
        **{name: identity[name] for name in ("model", "weights", "tile", "stride", "clip")},
        **{name: identity[name] for name in ("divisor", "precision")},
    }


def asked(settings: Settings, defaults: bool = False) -> dict[str, Any]:
    """What the settings ask of a grid: what was given, and with ``defaults`` what goes unsaid.

    What is left to the model is not asked for: without its weights nobody knows it.
    """
    names = (
        "s3_path", "model_in_chans", "tile", "stride", "clip", "divisor", "precision",
        "ome_zarr_level",
    )  # fmt: skip
    silent = ("force_reverse", "z_downsample_mean_factor")
    given: dict[str, Any] = {
        name: getattr(settings, name)
        for name in (*names, *silent)
        if name in settings.model_fields_set or (defaults and name in silent)
    }
    given["s3_path"] = absolute(settings.s3_path)
    for name in ("surface_volume_zarr", "mask_path"):
        given[name] = absolute(getattr(settings, name))
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
            level=origin["ome_zarr_level"],
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
