"""A stored picture, opened: what every export begins with."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import zarr

from inkdask import storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import Provenance
from inkdask.pictures.pyramid import ORIGIN, halve

log = logging.getLogger("inkdask")

CHUNK = 1024  # pixels: side of the chunks of levels that are not stored


@dataclass(frozen=True)
class Picture:
    """A picture on storage; only its metadata have been read.

    Attributes
    ----------
    uri
        Where it is.
    levels
        Dask uint8 (y, x), each half the size of the one before.
    pixel_um
        Side of a pixel of the first level, in micrometers; None where it is not known.
    corner
        Row and column of the segment where the picture begins.
    provenance
        Where it comes from; None where that is not known.
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

    def level(self, number: int) -> da.Array:
        """The picture at a 2 ** number-th of its size, dask uint8 (y, x)."""
        array = self.levels[min(number, len(self.levels) - 1)]
        return halved(array, number - len(self.levels) + 1)

    def crop(self, roi_xyxy: tuple[int, int, int, int]) -> Picture:
        """Keep a region ``x0, y0, x1, y1``, in pixels of the segment.

        Raises
        ------
        SettingsError
            When it reaches beyond the picture.
        """
        x0, y0, x1, y1 = roi_xyxy
        top, left = self.corner
        height, width = self.shape
        if not (left <= x0 < x1 <= left + width and top <= y0 < y1 <= top + height):
            raise SettingsError(
                f"ROI_XYXY {x0},{y0},{x1},{y1} reaches beyond {self.uri}, which shows "
                f"{left},{top},{left + width},{top + height} of its segment."
            )
        part = self.levels[0][y0 - top : y1 - top, x0 - left : x1 - left]
        chunks = self.levels[0].chunksize  # of which a window may begin with a sliver
        return replace(self, levels=(part.rechunk(chunks, method="tasks"),), corner=(y0, x0))


def open_picture(uri: str) -> Picture:
    """Open a picture that a job has stored; any zarr array or OME-Zarr of uint8 (y, x) will do.

    Raises
    ------
    InkdaskError
        When there is none.
    """
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
    levels = tuple(
        da.from_array(_Level(array, place), array.chunks) for place, array in arrays.items()
    )
    return Picture(uri, levels, pixel_um, corner, provenance_in(attributes.get(ORIGIN), uri))


def provenance_in(fields: Any, uri: str) -> Provenance | None:
    """Return what a picture says of itself; None, with a warning, where it cannot be read."""
    if not isinstance(fields, dict):
        return None
    try:
        return Provenance.from_json(fields, uri)
    except InkdaskError as error:
        log.warning("%s", error)
        return None


def is_picture(uri: str) -> bool:
    """Whether a picture is stored there, rather than a volume or a folder of layers."""
    if not storage.exists(storage.join(uri, "zarr.json")):
        return False
    node: Any = storage.zarr_node(uri)
    if isinstance(node, zarr.Group):
        attributes: dict[str, Any] = node.attrs.asdict()
        with storage.decoded(uri):
            images = attributes.get("ome", {}).get("multiscales")
            return bool(images) and len(images[0]["axes"]) == 2
    return bool(node.ndim == 2)


def halved(array: da.Array, times: int = 1) -> da.Array:
    """Halve both sides of a picture, dask uint8 (y, x), some times."""
    for _ in range(times):
        even = array.rechunk(CHUNK, method="tasks")
        chunks = tuple(tuple(-(-side // 2) for side in sizes) for sizes in even.chunks)
        array = da.map_blocks(halve, even, chunks=chunks, dtype=np.uint8)
    return array


class _Level:
    """A stored array for Dask, which says in a sentence what it cannot read."""

    def __init__(self, array: zarr.Array, uri: str) -> None:
        self._array, self._uri = array, uri
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, window: Any) -> np.ndarray:
        try:
            return np.asarray(self._array[window])
        except Exception as error:
            rows, columns = (f"{part.start} to {part.stop}" for part in window)
            raise InkdaskError(
                f"{self._uri} cannot be read at rows {rows}, columns {columns}: {error}."
            ) from error


def _multiscales(attributes: dict[str, Any], uri: str) -> dict[str, Any]:
    images = (attributes.get("ome") or attributes).get("multiscales")
    if not images:
        raise InkdaskError(f"{uri} is a zarr group without a picture: it has no multiscales.")
    image: dict[str, Any] = images[0]
    return image


def _place(image: dict[str, Any]) -> tuple[float | None, tuple[int, int]]:
    """Side of a pixel, and the corner, from the metadata of level 0."""
    told = image["datasets"][0].get("coordinateTransformations", [])
    values = {change["type"]: change[change["type"]] for change in told if change["type"] in change}
    side = float(values.get("scale", [1.0])[-1])
    y, x = (round(start / side) for start in values.get("translation", [0, 0])[-2:])
    micrometers = image["axes"][-1].get("unit") == "micrometer"
    return (side if micrometers else None), (y, x)
