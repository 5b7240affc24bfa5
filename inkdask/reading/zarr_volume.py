"""Surface volumes in zarr arrays: prepared ones, and OME-Zarr.

zarr 2 or 3, (z, y, x) or (y, x, z), alone or as a level of an OME-Zarr group (0.4 or 0.5,
https://ngff.openmicroscopy.org).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import zarr

from inkdask import storage
from inkdask.errors import InkdaskError, reason
from inkdask.memory import map_large_blocks
from inkdask.reading.pixel_size import of_ome, of_prepared
from inkdask.reading.volume import WHOLE_BYTES, MadeOf, Occupied, check_size, whole_units

# Attributes of a prepared array.
LAYERS_ATTRIBUTE = "layers"  # numbers of the layers
PREPARED_ATTRIBUTE = "prepared_from"  # see `MadeOf`
OCCUPIED_ATTRIBUTE = "occupied"  # see `Occupied`
PIXEL_ATTRIBUTE = "pixel_um"  # side of a pixel in micrometers, or null
FINISHED_ATTRIBUTE = "finished"  # False until the last block is written

_DEPTHS = ("z", "depth", "layer", "c", "channel")  # names of the axis of the layers
SAMPLED = (16, 512)  # chunks that are asked for, to find out whether an array has any
MOST_LAYERS = 256  # where axes have no names: a longer axis is rows or columns


@dataclass(frozen=True)
class ZarrSource:
    """Zarr array of a volume.

    Attributes
    ----------
    name
        URI of the array.
    identity
        Digest of place, metadata, their times, and a part of the middle chunk.
    shape
        Layers, height and width.
    dtype
        uint8 or uint16.
    first
        Index of the first layer that is read.
    stride
        Distance of neighbouring layers; negative for layers in reverse.
    axes
        Axes of layers, rows and columns among the last three.
    unit, inner, thickness
        Height and width of the chunks or shards that are read whole, those of the smallest part
        that can be read alone, and layers of both.
    numbers
        Numbers of all layers.
    may_be_one_range
        Whether the layers may be a range whose numbers nothing tells: those of an array (y, x, z),
        as the reference tool writes it. Then `numbers` count from 0.
    words
        Human-readable layout.
    occupancy
        Where data are, when the array says so.
    made_of
        Segment that the array was prepared from, when it says so.
    oddity
        What was guessed, for a warning; mostly empty.
    level
        Position of the array among the levels of its group, from the finest.
    pixel_um
        Side of a pixel in micrometers, where the metadata tell it and it is plausible.
    prepared_as
        Format of an array of means of layers (`inkdask.isotropic`); mostly empty.
    """

    name: str
    identity: str
    shape: tuple[int, int, int]
    dtype: np.dtype[Any]
    first: int
    stride: int
    axes: tuple[int, int, int]
    unit: tuple[int, int]
    inner: tuple[int, int]
    thickness: int
    numbers: tuple[int, ...]
    may_be_one_range: bool
    words: str
    occupancy: Occupied | None = None
    made_of: MadeOf | None = None
    oddity: str = ""
    level: int = 0
    pixel_um: float | None = None
    prepared_as: str = ""

    can_be_sampled = True
    decoding_bytes = scratch_bytes = 0.0

    @property
    def reads_all_layers(self) -> bool:
        """Whether one chunk holds as many layers as are read."""
        return self.thickness >= self.shape[0]

    def cost(self, rows: slice, columns: slice) -> float:
        """Bytes of the chunks that meet those rows and columns, before compression."""
        span = self.span
        read = range(span.start, span.stop, span.step)
        layers = len({layer // self.thickness for layer in read}) * self.thickness
        pixels = whole_units(rows, columns, self.unit, self.shape)
        return float(layers * pixels * self.dtype.itemsize)

    @property
    def span(self) -> slice:
        """Positions of the layers in the array, ascending."""
        ends = (self.first, self.first + self.stride * (self.shape[0] - 1))
        return slice(min(ends), max(ends) + 1, abs(self.stride))

    def block(self, rows: slice, columns: slice) -> ZarrBlock:
        """Cut out rows and columns; reads nothing."""
        return ZarrBlock(self, rows, columns)

    def take(self, layers: slice) -> ZarrSource:
        """Keep some layers, in the order of the slice."""
        chosen = range(self.shape[0])[layers]
        first = self.first + self.stride * chosen.start
        return replace(
            self,
            shape=(len(chosen), *self.shape[1:]),
            first=first,
            stride=self.stride * chosen.step,
            numbers=self.numbers[layers],
        )


@dataclass(frozen=True)
class ZarrBlock:
    """Rows and columns of an array, in pixels; read in a task."""

    source: ZarrSource
    rows: slice
    columns: slice

    def read(self, dtype: Any = np.uint8) -> np.ndarray:
        """Read the block, ``dtype`` (z, y, x): high bytes, or values as stored."""
        map_large_blocks()
        source = self.source
        with storage.decoded(source.name):
            array = storage.open_array(source.name, source.identity, read_only=True)
        spans = dict(zip(source.axes, (source.span, self.rows, self.columns), strict=True))
        index = (0,) * (array.ndim - 3) + tuple(spans[axis] for axis in range(3))
        try:
            pixels = np.asarray(array[index])
        except Exception as error:
            raise InkdaskError(
                f"{source.name} cannot be read at rows "
                f"{self.rows.start} to {self.rows.stop}, columns {self.columns.start} to "
                f"{self.columns.stop}: {reason(error)}."
            ) from error
        pixels = np.transpose(pixels, source.axes)[:: 1 if source.stride > 0 else -1]
        if pixels.dtype.itemsize > np.dtype(dtype).itemsize:
            pixels = pixels >> 8
        return np.ascontiguousarray(pixels, dtype)


def open_zarr(uri: str, level: str = "0", wanted: range = range(0)) -> ZarrSource:
    """Describe the array at ``uri``, or the level ``level`` of an OME-Zarr group.

    Axes without names are guessed such that there are the ``wanted`` layers.
    """
    with storage.decoded(uri):  # because attributes may hold anything
        return _open(uri, level, wanted)


def _open(uri: str, level: str, wanted: range) -> ZarrSource:
    node: Any = storage.zarr_node(uri)
    names: Any = None
    name, path, index, attributes = uri, "", 0, node.attrs.asdict()
    if isinstance(node, zarr.Group):
        path, index, names = _level(node, uri, level)
        name = storage.join(uri, path)
        node = storage.zarr_array(name)
    elif LAYERS_ATTRIBUTE not in node.attrs and (group := _group_of(uri)) is not None:
        attributes = group.attrs.asdict() | attributes
        _, index, names = _level(group, uri, uri.rstrip("/").rpartition("/")[2])
    if node.attrs.get(FINISHED_ATTRIBUTE) is False:
        raise InkdaskError(f"{name} is not finished: run inkdask prepare again, and it resumes.")
    shape = node.shape[-3:]
    if node.ndim < 3 or any(length != 1 for length in node.shape[:-3]):
        raise InkdaskError(f"{name} is no volume: its shape is {node.shape}.")
    if node.dtype.newbyteorder("=") not in (np.uint8, np.uint16):
        raise InkdaskError(f"{name} is no array of uint8 or uint16, but {node.dtype}.")
    names = names or getattr(node.metadata, "dimension_names", None)
    kept: Any = node.attrs.get(LAYERS_ATTRIBUTE)
    wanted = range(len(kept)) if kept else wanted
    axes, oddity = _axes(shape, names or node.attrs.get("_ARRAY_DIMENSIONS") or (), wanted)
    depth, height, width = (shape[axis] for axis in axes)
    check_size(name, (depth, height, width))
    pieces = (node.shards or node.chunks)[-3:]
    if depth * math.prod(pieces) // pieces[axes[0]] > WHOLE_BYTES:
        pieces = node.chunks[-3:]
    said = str(attributes.get("format") or "")
    numbers = [*(kept or range(depth))]
    is_counted = all(type(number) is int and number >= 0 for number in numbers)
    if len(numbers) != depth or not is_counted or numbers != sorted({*numbers}):
        raise InkdaskError(f"{name} does not number its {depth} layers: run inkdask prepare again.")
    chunks = " x ".join(str(length) for length in node.chunks)
    return ZarrSource(
        name=name,
        identity=_identity(name, node),
        shape=(depth, height, width),
        dtype=np.dtype(node.dtype).newbyteorder("="),
        first=0,
        stride=1,
        axes=axes,
        unit=(pieces[axes[1]], pieces[axes[2]]),
        inner=(node.chunks[-3:][axes[1]], node.chunks[-3:][axes[2]]),
        thickness=min(pieces[axes[0]], depth),
        numbers=tuple(numbers),
        may_be_one_range=not (path or kept) and axes[0] == 2,
        words=f"zarr {node.metadata.zarr_format} of {depth:,} x {height:,} x {width:,} (z, y, x), "
        f"{chunks} chunks" + (" in shards" if node.shards else ""),
        occupancy=_occupied(node.attrs.get(OCCUPIED_ATTRIBUTE)),
        made_of=_made_of(node.attrs.get(PREPARED_ATTRIBUTE)),
        oddity=oddity,
        level=index,
        pixel_um=attributes.get(PIXEL_ATTRIBUTE)
        or of_prepared(attributes)
        or of_ome(attributes, index),
        prepared_as=said if re.match(r"level\d+-zmean\d+-", said) else "",
    )


def _group_of(uri: str) -> zarr.Group | None:
    """Return the OME-Zarr group above an array that is one of its levels, else None."""
    folder, _, name = uri.rstrip("/").rpartition("/")
    # There is none, or it cannot be read, or says something else: the array is read as it is.
    with suppress(InkdaskError, LookupError, TypeError, AttributeError):
        group = storage.zarr_node(folder)
        if isinstance(group, zarr.Group) and name in _levels(group):
            return group
    return None


def _made_of(kept: Any) -> MadeOf | None:
    if not isinstance(kept, dict) or not {"uri", "identity", "layers"} <= kept.keys():
        return None
    return MadeOf(str(kept["uri"]), str(kept["identity"]), tuple(map(int, kept["layers"])))


def _occupied(kept: Any) -> Occupied | None:
    if not kept:
        return None
    return Occupied(int(kept["side"]), tuple(tuple(map(float, row)) for row in kept["share"]))


def _images(group: zarr.Group) -> Any:
    """Return the images of an OME-Zarr group; nothing of another group."""
    attributes: Any = group.attrs.asdict()
    return (attributes.get("ome") or attributes).get("multiscales")


def _levels(group: zarr.Group) -> list[str]:
    """Return the paths of the levels of an OME-Zarr group, from the finest."""
    return [dataset["path"] for dataset in (_images(group) or [{"datasets": ()}])[0]["datasets"]]


def _level(group: zarr.Group, uri: str, level: str) -> tuple[str, int, tuple[str, ...] | None]:
    """Return the path of a level of an OME-Zarr group, its position, and the names of the axes."""
    images, levels = _images(group), _levels(group)
    if not images:
        if storage.find_entries(storage.join(uri, level), (".zarray", ".zgroup", "zarr.json")):
            return level, int(level) if level.isdecimal() else 0, None
        raise InkdaskError(f"{uri} is a zarr group without an array {level!r}.")
    if level not in levels and level.isdecimal() and int(level) < len(levels):
        level = levels[int(level)]  # The finest comes first, whatever its name.
    if level not in levels:
        raise InkdaskError(f"{uri} has no level {level!r}; it has {', '.join(levels)}.")
    axes = [axis["name"] if isinstance(axis, dict) else axis for axis in images[0].get("axes", [])]
    return level, levels.index(level), tuple(axes) or None


def _axes(shape: Sequence[int], names: Any, wanted: range) -> tuple[tuple[int, int, int], str]:
    """Find the axes of layers, rows and columns by their names, or guess, and say what in words."""
    places, oddity = {str(name).lower(): axis for axis, name in enumerate(names[-3:])}, ""
    depth = next((places[name] for name in _DEPTHS if name in places), None)
    y, x = places.get("y", 1), places.get("x", 2)
    if depth is None and {"y", "x"} <= places.keys():
        depth = 3 - y - x
    if depth is None:  # the first axis; the last of arrays (y, x, z)
        first, last = shape[0], shape[2]
        depth, other = (2, 0) if 3 * last < 2 * first else (0, 2)
        # Arrays of the reference tool hold the wanted layers alone, without their numbers.
        if len(wanted) != shape[depth] < wanted.stop <= shape[other] <= MOST_LAYERS:
            depth = other
        if max(first, last) <= MOST_LAYERS:
            place = "last" if depth else "first"
            oddity = f"axes without names: the {place}, of {shape[depth]}, is taken for the layers"
    rows, columns = (axis for axis in range(3) if axis != depth)
    return (depth, columns, rows) if x < y else (depth, rows, columns), oddity


def _identity(name: str, array: zarr.Array) -> str:
    """Digest of the array's place, metadata, their times, and a part of its middle chunk.

    Times and not ETags, because an array written anew in the same shape has equal metadata.
    """
    written = [
        entry.modified or entry.etag
        for entry in storage.find_entries(name, ("zarr.json", ".zarray", ".zattrs"))
    ]
    pieces = array.shards or array.chunks
    counts = [-(-side // piece) for side, piece in zip(array.shape, pieces, strict=True)]
    chunk = storage.join(name, _chunk(array, [count // 2 for count in counts]))
    sample = b""
    if storage.exists(chunk):
        sample = storage.read_middle(chunk, storage.entry(chunk).size)
    else:
        _check_filled(name, array, counts)
    parts = [storage.absolute(name), array.metadata.to_dict(), written, sample.hex()]
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_filled(name: str, array: zarr.Array, counts: Sequence[int]) -> None:
    """Refuse an array of headers alone, which zarr reads as zeros.

    Over HTTP only some of its chunks are asked for, because they cannot be listed.
    """
    if array.attrs.get(FINISHED_ATTRIBUTE) is not None:  # ours, of a segment without data
        return
    if not storage.is_http(name):
        entries = (entry.name for entry in storage.list_folder(name))
        there = any(not entry.startswith((".", "zarr.json")) for entry in entries)
    else:
        ends = (np.linspace(0, math.prod(counts) - 1, most).astype(int) for most in SAMPLED)
        keys = ([_chunk(array, np.unravel_index(it, counts)) for it in end] for end in ends)
        there = any(storage.find_entries(name, {*some}) for some in keys)
    if not there:
        raise InkdaskError(f"{name} has a header and no chunks: name another volume or level.")


def _chunk(array: zarr.Array, place: Any) -> str:
    return str(array.metadata.encode_chunk_key(tuple(map(int, place))))
