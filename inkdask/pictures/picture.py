"""Stored pictures, opened for exports."""

from __future__ import annotations

import logging
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import zarr

from inkdask import storage
from inkdask.box import Box, cut_region
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import Provenance
from inkdask.pictures.pyramid import ORIGIN, halved
from inkdask.reading.volume import check_size
from inkdask.storage.dask_arrays import StoredArray

log = logging.getLogger("inkdask")


@dataclass(frozen=True)
class Picture:
    """Picture on storage, whose metadata have been read.

    Attributes
    ----------
    uri
        Place of the picture.
    levels
        Dask uint8 (y, x), each half the size of the one before.
    pixel_um
        Side of a pixel of the first level, in micrometers; None where unknown.
    corner
        Row and column of the segment where the picture begins.
    provenance
        Recipe and origin of the picture; None where unknown.
    """

    uri: str
    levels: tuple[da.Array, ...]
    pixel_um: float | None
    corner: tuple[int, int]
    provenance: Provenance | None

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        height, width = self.levels[0].shape
        return height, width

    @property
    def box(self) -> Box:
        """Pixels of the segment that are shown."""
        return Box.at(self.corner, self.shape)

    def level(self, number: int) -> da.Array:
        """Return the picture at a 2 ** number-th of its size, dask uint8 (y, x)."""
        array = self.levels[min(number, len(self.levels) - 1)]
        return halved(array, number - len(self.levels) + 1)

    def crop(self, roi_xyxy: tuple[int, int, int, int]) -> Picture:
        """Keep a region ``x0, y0, x1, y1``, in pixels of the segment, as far as it is shown."""
        shown = ",".join(map(str, self.box.xyxy))
        box = cut_region(roi_xyxy, self.box, f"{self.uri}, which shows {shown} of its segment")
        part = self.levels[0][box.inside(self.corner).slices]
        chunks = self.levels[0].chunksize  # because the region may begin with a sliver of one
        return replace(self, levels=(part.rechunk(chunks, method="tasks"),), corner=box.corner)


def open_picture(uri: str) -> Picture:
    """Open the stored picture of a job, or any zarr array or OME-Zarr of uint8 (y, x)."""
    if not uri.strip():
        raise SettingsError("The path is empty: name the prediction_*.zarr that a job leaves.")
    beside = re.sub(r"\.(png|tiff?|jpe?g)$", ".zarr", uri, flags=re.IGNORECASE)
    if beside != uri:
        there = f"is beside it: {beside}" if storage.exists(beside) else "a job leaves beside it"
        raise InkdaskError(f"{uri} is no pyramid of zarr; name the one that {there}.")
    node: Any = storage.zarr_node(uri)
    attributes: dict[str, Any] = node.attrs.asdict()
    arrays, pixel_um, corner = {uri: node}, None, (0, 0)
    if isinstance(node, zarr.Group):
        with storage.decoded(uri):
            if "recipe" in attributes:
                raise InkdaskError(
                    f"{uri} is a tile grid, which `inkdask reduce --grid` turns into a picture; "
                    "name the prediction_*.zarr that it writes."
                )
            image = _multiscales(attributes, uri)
            places = [storage.join(uri, dataset["path"]) for dataset in image["datasets"]]
            pixel_um, corner = _place(image)
        arrays = {place: storage.zarr_array(place) for place in places}
    for array in arrays.values():
        if array.ndim != 2 or array.dtype != np.uint8:
            raise InkdaskError(
                f"{uri} is no picture of uint8 (y, x): it has {array.dtype} of shape {array.shape}."
            )
        check_size(uri, (1, *array.shape))
    with storage.decoded(uri):  # because chunks may have no pixels
        levels = tuple(
            da.from_array(StoredArray(place, array), array.chunks)
            for place, array in arrays.items()
        )
    return Picture(uri, levels, pixel_um, corner, provenance_in(attributes.get(ORIGIN), uri))


def note(uri: str, name: str, digest: str) -> None:
    """Add a digest to what a stored picture says of itself, where it may be written."""
    with suppress(InkdaskError), storage.explained(uri):
        group: Any = zarr.open_group(storage.zarr_store(uri), mode="r+")
        told = Provenance.from_json(dict(group.attrs[ORIGIN]), uri)
        noted: Any = {name: (*(it for it in getattr(told, name) if it != digest), digest)}
        group.attrs[ORIGIN] = replace(told, **noted).to_json()


def provenance_at(uri: str) -> Provenance | None:
    """Return the provenance of the picture at ``uri``; None for a damaged one, or without any."""
    with suppress(InkdaskError):
        return open_picture(uri).provenance if is_picture(uri) else None
    return None


def provenance_in(fields: Any, uri: str) -> Provenance | None:
    """Return the provenance of a picture; None, with a warning, where it cannot be read."""
    if not isinstance(fields, dict):
        return None
    try:
        return Provenance.from_json(fields, uri)
    except InkdaskError as error:
        log.warning("%s", error)
        return None


def is_picture(uri: str) -> bool:
    """Whether a stored picture is at ``uri``, not a volume or a folder of layers."""
    if not storage.exists(storage.join(uri, "zarr.json")):
        return False
    node: Any = storage.zarr_node(uri)
    if isinstance(node, zarr.Group):
        attributes: dict[str, Any] = node.attrs.asdict()
        with storage.decoded(uri):
            images = attributes.get("ome", {}).get("multiscales")
            return bool(images) and len(images[0]["axes"]) == 2
    return bool(node.ndim == 2)


def _multiscales(attributes: dict[str, Any], uri: str) -> dict[str, Any]:
    images = (attributes.get("ome") or attributes).get("multiscales")
    if not images:
        raise InkdaskError(f"{uri} is a zarr group without a picture: it has no multiscales.")
    return images[0]


def _place(image: dict[str, Any]) -> tuple[float | None, tuple[int, int]]:
    """Return the side of a pixel, and the corner, from the metadata of level 0."""
    told = image["datasets"][0].get("coordinateTransformations", [])
    values = {change["type"]: change[change["type"]] for change in told if change["type"] in change}
    side = float(values.get("scale", [1.0])[-1])
    y, x = (round(start / side) for start in values.get("translation", [0, 0])[-2:])
    micrometers = image["axes"][-1].get("unit") == "micrometer"
    return (side if micrometers else None), (y, x)
