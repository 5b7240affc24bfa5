"""Which job is this? Frozen values: what shapes tiles, where they come from, what was asked.

A leaf: nothing here reads files, settings or layers. All values travel as JSON, in the attributes
of a stored grid, in the metadata of a picture, and in the records of jobs.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from inkdask.errors import InkdaskError
from inkdask.specs import BlendMode, Precision, Tta

FORMAT = 5  # of stored grids; a grid of another number is never resumed
Count = Annotated[int, Field(ge=1, le=10_000_000)]
Place = Annotated[int, Field(ge=0, le=10_000_000)]
Direction = Literal["forward", "reverse"]
Shows = Literal["ink", "spread"]
Region = tuple[int, int, int, int]  # x0, y0, x1, y1 in pixels of the segment


class _Value:
    """A frozen dataclass that JSON holds whole."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON has them: lists for tuples."""
        kind: Any = type(self)
        return dict(_adapter(kind).dump_python(self, mode="json"))

    @classmethod
    def from_json(cls, fields: Any, uri: str) -> Self:
        """Read the fields that ``uri`` holds; a missing or unknown one is an `InkdaskError`."""
        kind: Any = cls
        try:
            return _adapter(kind).validate_python(fields)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            place = ".".join(map(str, first["loc"]))
            raise InkdaskError(
                f"{uri} does not say what it was made of as this version of inkdask does: "
                f"{cls.__name__.lower()} {place}: {first['msg'].lower()}."
            ) from error

    @property
    def digest(self) -> str:
        """SHA-256 of the fields, in hexadecimal."""
        return digest(self.to_json())


@dataclass(frozen=True)
class Recipe(_Value):
    """What shapes the tiles of a grid, and the chunks that hold them.

    Two jobs with equal recipes share a stored grid. The blending window is not in it, because a
    grid can be blended again with another one.

    Attributes
    ----------
    input, mask
        Identities of the layers and of the mask (`Segment.identity`, `Segment.mask_identity`); None
        for an array, and where there is no mask.
    layers
        Numbers of the layers, in the order in which the network reads them.
    direction
        The order that was asked for; a single layer shows none.
    averaged
        Neighbouring layers that are averaged to one.
    corner, size
        First row and column of the volume, in pixels of the segment's files; its height and width.
        (No field is a ``shape``: tifffile takes a description that has one for its own.)
    model, architecture, weights
        Key, architecture, and SHA-256 of the weights.
    clip, divisor, precision, tta
        As in `Network`: the precision is the one that was asked for.
    tile, stride, k
        Tiles in pixels, and side of a tile's probabilities.
    chunk
        Height and width of a chunk, in pixels.
    """

    input: str | None
    mask: str | None
    layers: Annotated[tuple[Place, ...], Field(min_length=1)]
    direction: Direction
    averaged: Count
    corner: tuple[Place, Place]
    size: tuple[Count, Count]
    model: str
    architecture: str
    weights: str
    clip: float | None
    divisor: float | None
    precision: Precision
    tta: Tta
    tile: Count
    stride: Count
    k: Count
    chunk: tuple[Count, Count]


@dataclass(frozen=True)
class Origin(_Value):
    """Where tiles come from, for people: it shapes nothing.

    Attributes
    ----------
    segment
        Name of the segment.
    source, volume
        URI of the segment, and of the layers that were read; None for an array.
    ome_zarr_level
        Level of an OME-Zarr group.
    mask
        URI of the mask, ``none`` when none was wanted; None when there is none.
    layer_range
        First layer (inclusive) and last (exclusive), as file names say them.
    opened
        The same of the layers that were opened, of which the network may read the middle ones.
    weights_from
        Where the weights are; None for a callable.
    roi_xyxy
        What the picture shows of the segment; None for all.
    software
        Versions, by package.
    command
        Words of the command that makes it again; None for a callable.
    offset
        Layers from the middle of the segment to that of the layers read; None where unknown.
    pixel_um
        Side of a pixel in micrometers, where the segment tells it.
    """

    segment: str
    source: str | None
    volume: str | None
    ome_zarr_level: str
    mask: str | None
    layer_range: tuple[int, int]
    opened: tuple[int, int]
    weights_from: str | None
    roi_xyxy: Region | None
    software: dict[str, str]
    command: tuple[str, ...] | None
    offset: float | None = None
    pixel_um: float | None = None


@dataclass(frozen=True)
class Said(_Value):
    """What was asked for, in the names of the settings, with all that was left open settled.

    ``surface_volume_zarr`` is None where the layers themselves were read.
    """

    s3_path: str
    surface_volume_zarr: str | None
    ome_zarr_level: str
    mask_path: str | None
    layers: tuple[int, int]
    force_reverse: bool
    z_downsample_mean_factor: int
    model: str
    model_in_chans: int
    clip: float | None
    divisor: float | None
    precision: str
    tta: str
    tile: int
    stride: int
    roi_xyxy: Region | None
    chunk_size: int


@dataclass(frozen=True)
class Label(_Value):
    """Attributes of a stored grid.

    ``generation`` counts how often the grid was started anew (`GridStore.restart`).
    """

    format: int
    generation: int
    recipe: Recipe
    origin: Origin
    said: Said | None


@dataclass(frozen=True)
class Provenance(_Value):
    """What a picture says of itself.

    Attributes
    ----------
    recipe, origin
        Of the tile grid; the region and the command are those of the picture.
    blend_mode, gaussian_sigma
        The blending window.
    ran_in
        Arithmetic in which tiles ran.
    created
        Time, in ISO 8601.
    export
        Words of the command that exported the picture, without the file; None for a job's own.
    shows
        The ink, or the spread of opinions, of which 255 is 0.5.
    window_um
        Side of the network's window, in micrometers; None where the size of a pixel is unknown.
    evidence, sweeps
        Digests of the pages of evidence that were made of it, and of the sweeps that have it among
        their variants.
    """

    recipe: Recipe
    origin: Origin
    blend_mode: BlendMode
    gaussian_sigma: float
    ran_in: tuple[str, ...]
    created: str
    export: tuple[str, ...] | None = None
    shows: Shows = "ink"
    window_um: float | None = None
    evidence: tuple[str, ...] = ()
    sweeps: tuple[str, ...] = ()


def differences(there: _Value | Mapping[str, Any], here: _Value | Mapping[str, Any]) -> str:
    """Say what ``here`` has otherwise than ``there``, in words; empty when nothing is."""
    before, now = (
        json.loads(json.dumps(each.to_json() if isinstance(each, _Value) else dict(each)))
        for each in (there, here)
    )
    return ", ".join(
        f"{name} is {_short(before.get(name))} there and {_short(value)} here"
        for name, value in now.items()
        if before.get(name) != value
    )


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, in hexadecimal."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
