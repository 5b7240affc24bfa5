"""What a job will do, settled before anything is computed: network, volume, tiles that fit."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TypeAlias

import dask.array as da
import numpy as np

from inkdask.errors import InkdaskError, SettingsError
from inkdask.models.registry import resolve
from inkdask.segment import Segment, find_mask, open_segment
from inkdask.settings import Settings
from inkdask.specs import Network
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

Source: TypeAlias = "Segment | da.Array | np.ndarray | str | os.PathLike[str]"
Window = tuple[slice, slice]


@dataclass(frozen=True)
class Plan:
    """A network, the volume it reads, and the tiles it reads it in.

    Attributes
    ----------
    network
        The network, with the shape of its input settled.
    segment
        Where the volume comes from; None for an array.
    inside
        The layers and pixels of the segment that are the volume; None for an array.
    layers
        Numbers of the layers, in the order in which the network reads them.
    volume
        Dask uint8 (z, y, x): the pixels of all tiles that touch the picture.
    mask
        Dask bool (y, x), where there is papyrus; None for everywhere.
    tiling
        Tiles and chunks of the volume.
    corner
        Row and column where the volume begins, in pixels of the source.
    window
        Rows and columns of the volume that are the picture.
    """

    network: Network
    segment: Segment | None
    inside: Segment | None
    layers: tuple[int, ...]
    volume: da.Array
    mask: da.Array | None
    tiling: Tiling
    corner: tuple[int, int]
    window: Window

    @classmethod
    def of(cls, source: Source, settings: Settings) -> Plan:
        """Settle all that the settings leave open; this reads headers, and no layer.

        Raises
        ------
        InkdaskError
            When model and layers do not fit, or either cannot be used, in one sentence.
        """
        settings.require("model")
        # A model says how many layers it reads; a callable reads as many as there are.
        network = None if callable(settings.model) else _network(settings)
        opened = _open(source, settings, network)
        kept = _kept_layers(opened.shape[0], settings)
        segment = opened if isinstance(opened, Segment) else None
        given = segment.layers if segment else tuple(range(opened.shape[0]))
        layers, factor = given[kept], settings.z_downsample_mean_factor
        depth = len(layers) // factor
        network = network or _network(settings, depth)
        if depth != network.layers:
            raise InkdaskError(
                f"Channel mismatch: {depth} layers are given ({span(layers)}), but model "
                f"{network.model.key} reads {network.layers}; set START_LAYER and END_LAYER"
                + (
                    ", or MODEL_IN_CHANS to crop the range about its centre."
                    if depth > network.layers
                    else "."
                )
            )
        if 0 < len(given) - len(layers) < factor:
            log.warning(
                "Layer %s is left out: %d layers are no multiple of Z_DOWNSAMPLE_MEAN_FACTOR=%d",
                span(tuple(number for number in given if number not in layers)),
                len(given),
                factor,
            )

        stride = settings.stride or min(network.model.stride, network.tile)
        whole = Tiling.of(opened.shape[1:], network.tile, stride, settings.chunk_size)
        reach, window = _reach(whole, settings.roi_xyxy)
        if isinstance(opened, Segment):  # reads less than slices of its volume would
            inside = opened.take(kept).crop(*reach)
            volume, mask = inside.volume, inside.mask
        else:
            inside, mask = None, None
            volume = opened[kept, reach[0], reach[1]]
        volume = _average(volume, factor)
        tiling = Tiling.of(volume.shape[1:], network.tile, stride, settings.chunk_size)
        corner = reach[0].start, reach[1].start
        return cls(network, segment, inside, layers, volume, mask, tiling, corner, window)

    @property
    def middle_layer(self) -> da.Array:
        """The middle one of the layers, dask uint8 (1, y, x); no other layer is read for it."""
        middle = len(self.layers) // 2
        if self.inside is None:
            return self.volume[self.volume.shape[0] // 2][None]
        return self.inside.take(slice(middle, middle + 1)).volume

    def cut(self, rows: slice, columns: slice) -> tuple[da.Array, da.Array | None]:
        """A window of volume and mask, in one block each, that reads no more than it needs."""
        if self.inside is None:
            volume, mask = self.volume[:, rows, columns], None
        else:
            inside = self.inside.crop(rows, columns)
            factor = len(self.layers) // self.network.layers
            volume, mask = _average(inside.volume, factor), inside.mask
        return volume.rechunk(-1), None if mask is None else mask.rechunk(-1)

    @property
    def name(self) -> str:
        """What the job is about, for the names of files."""
        return self.segment.name if self.segment else "array"

    def __str__(self) -> str:
        height, width = (part.stop - part.start for part in self.window)
        averaged = len(self.layers) // self.network.layers
        count = f"{len(self.layers)} layer{'s' if len(self.layers) > 1 else ''}"
        means = f" as means of {averaged}" if averaged > 1 else ""
        mask_uri = self.segment.mask_uri if self.segment else None
        mask = f", mask {mask_uri.rsplit('/', 1)[-1]}" if mask_uri else ""
        return (
            f"{self.segment.uri if self.segment else 'array'}: {height:,} x {width:,} pixels, "
            f"{count} ({span(self.layers)}){means}, {self.tiling.tiles:,} tiles "
            f"of {self.tiling.tile} px at stride {self.tiling.stride}, model "
            f"{self.network.model.key}{mask}"
        )


def span(layers: tuple[int, ...]) -> str:
    """Layer numbers as a person says them: ``3 to 28``, ``28 to 3 in reverse``."""
    if len(layers) < 2:
        return str(*layers)
    return f"{layers[0]} to {layers[-1]}{' in reverse' if layers[0] > layers[-1] else ''}"


def _network(settings: Settings, depth: int | None = None) -> Network:
    return resolve(
        settings.model,
        model_type=settings.model_type,
        version=settings.model_version,
        layers=depth or settings.model_in_chans,
        tile=settings.tile,
        clip=settings.clip,
        divisor=settings.divisor,
        precision=settings.precision,
        batch_size=settings.batch_size,
        compile=settings.compile,
        compile_mode=settings.compile_mode,
    )


def _open(source: Source, settings: Settings, network: Network | None) -> Segment | da.Array:
    """Open a path; without a range of layers, as many as the network reads."""
    if isinstance(source, Segment):
        return source
    if isinstance(source, str | os.PathLike):
        wanted = network.layers * settings.z_downsample_mean_factor if network else None
        place, mask = os.fspath(source), settings.mask_path
        if settings.surface_volume_zarr:  # the mask stays where the segment is
            mask = mask or find_mask(place)
            place = settings.surface_volume_zarr
        return open_segment(
            place, settings.layers, window=wanted, mask=mask, level=settings.ome_zarr_level
        )
    array = source if isinstance(source, da.Array) else np.asarray(source)
    if array.ndim != 3:
        raise InkdaskError(
            f"A volume has three axes (z, y, x), but the array has the shape {array.shape}."
        )
    if not array.size:
        raise InkdaskError(f"A volume has voxels, but the array has the shape {array.shape}.")
    if array.dtype not in (np.uint8, np.uint16):
        raise InkdaskError(f"A volume is uint8 or uint16, but the array is {array.dtype}.")
    lazy = array if isinstance(array, da.Array) else da.from_array(array, chunks=(-1, 1024, 1024))
    return lazy if lazy.dtype == np.uint8 else (lazy >> 8).astype(np.uint8)


def _kept_layers(depth: int, settings: Settings) -> slice:
    """The middle layers that the network reads, of as many as there are, and their order."""
    factor, count = settings.z_downsample_mean_factor, depth
    if settings.model_in_chans:
        count = min(settings.model_in_chans * factor, depth)
    count -= count % factor  # the same layers in both directions
    first = (depth - count) // 2
    kept = range(depth)[first : first + count]
    if settings.force_reverse:
        kept = kept[::-1]
    # A range that runs down to layer 0 stops before -1, which a slice would take for the last.
    return slice(kept.start, kept.stop if kept.stop >= 0 else None, kept.step)


def _reach(whole: Tiling, roi_xyxy: tuple[int, int, int, int] | None) -> tuple[Window, Window]:
    """Pixels of all tiles that touch the region of interest; and the region, counted in them."""
    height, width = whole.shape
    x0, y0, x1, y1 = roi_xyxy or (0, 0, width, height)
    if x1 > width or y1 > height:
        raise SettingsError(
            f"ROI_XYXY {x0},{y0},{x1},{y1} reaches beyond the segment, which has {width} x "
            f"{height} pixels (x, y)."
        )
    top, bottom = whole.y.reach(y0, y1)
    left, right = whole.x.reach(x0, x1)
    return (
        (slice(top, bottom), slice(left, right)),
        (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left)),
    )


def _average(volume: da.Array, factor: int) -> da.Array:
    """Average neighbouring layers, rounded to the nearest value."""
    if factor == 1:
        return volume
    one_chunk = volume.rechunk({0: -1}, method="tasks")
    depth = volume.shape[0] // factor
    return one_chunk.map_blocks(
        average_layers, factor, dtype=np.uint8, chunks=((depth,), *one_chunk.chunks[1:])
    )


def average_layers(block: np.ndarray, factor: int) -> np.ndarray:
    """Average every ``factor`` layers of uint8 (z, y, x), rounded half up."""
    grouped = block.reshape(-1, factor, *block.shape[1:]).sum(axis=1, dtype=np.uint16)
    return ((grouped + factor // 2) // factor).astype(np.uint8)
