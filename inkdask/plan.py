"""A plan: network, volume and tiles, settled before anything is computed."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import dask.array as da
import numpy as np

from inkdask import catalogue, isotropic
from inkdask.box import Box, cut_region
from inkdask.engine import has_gpus
from inkdask.errors import InkdaskError, SettingsError
from inkdask.failures import fallible, read_or_fail
from inkdask.families import Family, family_of
from inkdask.identity import Region
from inkdask.models.registry import resolve, who_says_layers
from inkdask.progress import size
from inkdask.segment import Segment, find_mask, home_of, open_segment
from inkdask.settings import Settings
from inkdask.specs import NO_MASK, Network
from inkdask.tiling import CHUNK, GPU_CHUNK, Tiling

log = logging.getLogger("inkdask")

MOST_CHUNKS = 200_000  # of a Dask program, made in a minute

Given: TypeAlias = "Segment | da.Array | np.ndarray | str | os.PathLike[str]"


@dataclass(frozen=True)
class Plan:
    """A network, the volume it reads, and the tiles it reads it in.

    Attributes
    ----------
    network
        The network, with the shape of its input settled.
    segment
        Segment that the volume comes from; None for an array.
    inside
        Layers and pixels of the segment that are the volume; None for an array.
    source
        The segment as it was given; ``segment.uri`` is another where the layers were prepared.
        None for an array.
    mask_path
        The mask that was asked for.
    layers
        Numbers of the layers, in the order in which the network reads them.
    layer_range
        First layer (inclusive) and last (exclusive) that were asked for, or else are read.
    is_reversed
        Whether the layers are read from the last to the first.
    volume
        Dask uint8 (z, y, x): the pixels of all tiles that touch the picture.
    mask
        Dask bool (y, x), where there is papyrus; None for everywhere.
    tiling
        Tiles and chunks of the volume.
    corner
        Row and column where the volume begins, in pixels of the segment's files.
    region
        Pixels of the volume that are the picture.
    roi_xyxy
        The same in pixels of the segment's files; None where the picture shows all of them.
    """

    network: Network
    segment: Segment | None
    inside: Segment | None
    source: str | None
    mask_path: str | None
    layers: tuple[int, ...]
    layer_range: tuple[int, int]
    is_reversed: bool
    volume: da.Array
    mask: da.Array | None
    tiling: Tiling
    corner: tuple[int, int]
    region: Box
    roi_xyxy: Region | None

    @classmethod
    def of(cls, source: Given, settings: Settings) -> Plan:
        """Settle all that the settings leave open; this reads headers, and no layer."""
        settings.require("model")
        # A model says how many layers it reads; a callable reads as many as there are.
        network = None if callable(settings.model) else _network(settings)
        path = None
        if isinstance(source, str | os.PathLike):
            source = path = home_of(catalogue.locate(os.fspath(source), settings.catalogue))
        opened = _open(source, settings, network)
        segment = opened if isinstance(opened, Segment) else None
        given = segment.layers if segment else tuple(range(opened.shape[0]))
        asked = settings.layers if path else None
        kept = _kept_layers(len(given), settings, network, is_range=asked is not None)
        layers, factor = given[kept], settings.z_downsample_mean_factor
        network = network or _network(settings, len(layers) // factor)
        _check_layers(given, layers, network, factor)

        stride = settings.stride or min(network.model.stride, network.tile)
        workers = settings.scheduler_address or settings.cluster
        chunk = settings.chunk_size or (GPU_CHUNK if has_gpus(workers) else CHUNK)
        whole = Tiling.of(opened.shape[1:], network.tile, stride, chunk)
        reach, region = _reach(whole, settings.roi_xyxy)
        tiling = Tiling.of(reach.shape, network.tile, stride, chunk)
        _check_chunks(tiling)
        if isinstance(opened, Segment):  # reads less than slices of its volume would
            inside = opened.take(kept).crop(*reach.slices)
            volume, mask = inside.lazy(read_or_fail)
        else:
            inside, volume, mask = None, opened[(kept, *reach.slices)], None
        corner = inside.box.corner if inside and inside.box else reach.corner
        return cls(
            network=network,
            segment=segment,
            inside=inside,
            source=path or (segment.uri if segment else None),
            mask_path=settings.mask_path if path else None,
            layers=layers,
            layer_range=asked or (min(layers), max(layers) + 1),
            is_reversed=settings.is_reversed,
            volume=average(volume, factor),
            mask=mask,
            tiling=tiling,
            corner=corner,
            region=region,
            roi_xyxy=(
                region.shift(*corner).xyxy
                if settings.roi_xyxy or (segment and segment.box)
                else None
            ),
        )

    @property
    def opened(self) -> tuple[int, int]:
        """First layer (inclusive) and last (exclusive) of those that were opened."""
        layers = self.segment.layers if self.segment else self.layers
        return min(layers), max(layers) + 1

    @property
    def family(self) -> Family:
        """Rules of the people of the network."""
        return family_of(self.network.model.architecture, has_mask=self.mask is not None)

    @property
    def averaged(self) -> int:
        """Neighbouring layers that are averaged to one."""
        return len(self.layers) // self.network.layers

    @property
    def middle_layer(self) -> da.Array:
        """Middle layer alone, dask uint8 (1, y, x)."""
        middle = len(self.layers) // 2
        if self.inside is None:
            return self.volume[self.volume.shape[0] // 2][None]
        return self.inside.take(slice(middle, middle + 1)).lazy(read_or_fail)[0]

    def cut(self, rows: slice, columns: slice) -> tuple[da.Array, da.Array | None]:
        """Return some rows and columns of volume and mask, in one block each; reads no more."""
        if self.inside is None:
            volume, mask = self.volume[:, rows, columns], None
        else:
            inside = self.inside.crop(rows, columns)
            volume, mask = inside.lazy(read_or_fail)
            volume = average(volume, self.averaged)
        return volume.rechunk(-1), None if mask is None else mask.rechunk(-1)

    @property
    def name(self) -> str:
        """Name of the segment, for the names of files."""
        return self.segment.name if self.segment else "array"

    def __str__(self) -> str:
        found = self.segment.found if self.segment else self.layers
        kept, first = len(self.layers), (len(found) - len(self.layers)) // 2
        middle = ", the middle" * (min(self.layers) == found[first])
        layers = f"{kept} of {count(found)}{middle}" if kept < len(found) else count(found)
        means = f" as means of {self.averaged}" if self.averaged > 1 else ""
        name = ((self.segment and self.segment.mask_uri) or NO_MASK).rsplit("/", 1)[-1]
        mask = "no mask" if name == NO_MASK else f"mask {name}"
        mirrored = ", four passes for mirror images" if self.network.tta == "mirror" else ""
        return (
            f"{self.segment.uri if self.segment else 'array'}: {size(self.region.shape)}; "
            f"{layers} ({span(self.layers)}){means}; {mask}; "
            f"{self.tiling.tiles:,} tiles of {self.tiling.tile} px at stride {self.tiling.stride}; "
            f"model {self.network.model.key}{mirrored}"
        )


def count(layers: Sequence[int]) -> str:
    """Number of layers in words: ``26 layers``."""
    return f"{len(layers)} layer{'s' if len(layers) != 1 else ''}"


def span(layers: Sequence[int]) -> str:
    """Layers as ``--layers`` names them: ``3:29``; ``3:29 in reverse``."""
    reverse = " in reverse" if len(layers) > 1 and layers[0] > layers[-1] else ""
    return f"{min(layers)}:{max(layers) + 1}{reverse}"


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
        tta=settings.tta,
        batch_size=settings.batch_size,
        compile=settings.compile,
        compile_mode=settings.compile_mode,
    )


def _open(source: Given, settings: Settings, network: Network | None) -> Segment | da.Array:
    """Open a path; without a range of layers, as many as the network reads."""
    if isinstance(source, Segment):
        return source
    if isinstance(source, str):
        factor = settings.z_downsample_mean_factor
        wanted = network.layers * factor if network else None
        # Which layers are the middle ones is for the model's family, or `isotropic`, to say.
        if factor >= isotropic.FACTOR or (
            network and family_of(network.model.architecture) != Family()
        ):
            wanted = None
        place, mask = source, settings.mask_path
        if settings.surface_volume_zarr:  # the mask stays where the segment is
            mask = mask or find_mask(place)
            place = settings.surface_volume_zarr
        segment = open_segment(
            place,
            settings.layers,
            count=wanted,
            mask=mask,
            level=settings.ome_zarr_level,
            volume=settings.volume,
            root=settings.catalogue,
        )
        return isotropic.centre(segment, settings)
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


def _kept_layers(depth: int, settings: Settings, network: Network | None, is_range: bool) -> slice:
    """Return the slice of the layers to read: the middle ones, or all of a range or callable."""
    factor, count = settings.z_downsample_mean_factor, depth
    of_model = network.layers if network and not is_range else None
    if wanted := settings.model_in_chans or of_model:
        count = min(wanted * factor, depth)
    count -= count % factor  # the same layers in both directions
    family = family_of(network.model.architecture) if network else Family()
    unit = factor if factor == isotropic.FACTOR else 1  # whole groups are left out
    groups = family.centre(depth // unit, count // unit, settings.is_reversed)
    first, last = min(groups) * unit, (max(groups) + 1) * unit
    kept = range(depth)[first:last][:: groups.step]
    # A range that runs down to layer 0 stops before -1, which a slice would take for the last.
    return slice(kept.start, kept.stop if kept.stop >= 0 else None, kept.step)


def _check_layers(
    given: tuple[int, ...], kept: tuple[int, ...], network: Network, factor: int
) -> None:
    """Check that the network reads as many layers as are kept, and tell of one that is left out."""
    depth = len(kept) // factor
    if depth != network.layers:
        crop = f"; {network.layers} crops the range about its centre"
        raise InkdaskError(
            f"Channel mismatch: {count(range(depth))} are given ({span(kept)}), but model "
            f"{network.model.key} reads {network.layers}, as {who_says_layers(network)} says. Name "
            f"{network.layers} with START_LAYER and END_LAYER, or set MODEL_IN_CHANS to the number "
            "that it was trained on"
            f"{crop if depth > network.layers else ''}."
        )
    if 0 < len(given) - len(kept) < factor:
        log.warning(
            "Layers %s are left out: %d layers are no multiple of Z_DOWNSAMPLE_MEAN_FACTOR=%d",
            span([number for number in given if number not in kept]),
            len(given),
            factor,
        )


def _check_chunks(tiling: Tiling) -> None:
    if (chunks := math.prod(tiling.block_shape)) > MOST_CHUNKS:
        raise SettingsError(
            f"CHUNK_SIZE makes {chunks:,} chunks of {tiling.y.step} x {tiling.x.step} pixels, and "
            f"at most {MOST_CHUNKS:,} can be run: choose a larger one."
        )


def _reach(whole: Tiling, roi_xyxy: Region | None) -> tuple[Box, Box]:
    """Return the pixels of all tiles that touch the region of interest; and it, counted in them.

    The part of it that lies beyond the segment is cut off.
    """
    height, width = whole.shape
    there = f"the segment, which has {size(whole.shape)}"
    roi = cut_region(roi_xyxy or (0, 0, width, height), Box.at((0, 0), whole.shape), there)
    reach = Box(*whole.y.reach(roi.top, roi.bottom), *whole.x.reach(roi.left, roi.right))
    return reach, roi.inside(reach.corner)


def average(volume: da.Array, factor: int) -> da.Array:
    """Average neighbouring layers of dask uint8 (z, y, x), rounded to the nearest value."""
    if factor == 1:
        return volume
    one_chunk = volume.rechunk({0: -1}, method="tasks")
    depth = volume.shape[0] // factor
    return one_chunk.map_blocks(
        average_layers,
        factor,
        chunks=((depth,), *one_chunk.chunks[1:]),
        meta=np.empty((0, 0, 0), np.uint8),
    )


@fallible
def average_layers(block: np.ndarray, factor: int) -> np.ndarray:
    """Average every ``factor`` layers of uint8 (z, y, x), rounded half up; half to even of four."""
    grouped = block.reshape(-1, factor, *block.shape[1:]).sum(axis=1, dtype=np.uint16)
    if factor == isotropic.FACTOR:
        return ((grouped + 1 + (grouped >> 2 & 1)) >> 2).astype(np.uint8)
    return ((grouped + factor // 2) // factor).astype(np.uint8)
