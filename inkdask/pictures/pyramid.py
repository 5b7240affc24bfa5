"""Stored pictures: OME-Zarr 0.5 pyramids, which viewers open.

    <picture>.zarr      group: axes, units, place in the segment ("ome"); provenance ("inkdask");
                        how many pixels have each value ("histogram")
        0               uint8 (y, x), every pixel
        1               each pixel the mean of two by two of level 0, and so on

The metadata follow https://ngff.openmicroscopy.org/0.5. Lengths are in micrometers where the size
of a pixel is known, else in pixels, and are counted from the corner of the segment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any
from uuid import uuid4

import dask.array as da
import numpy as np
import zarr
from dask.delayed import Delayed

from inkdask import engine, storage
from inkdask.errors import InkdaskError
from inkdask.identity import Provenance
from inkdask.progress import Meter
from inkdask.storage import outputs
from inkdask.storage.dask_arrays import StoredArray

SMALLEST = 512  # pixels: longer side of the coarsest level, at most
CHUNK = 1024  # pixels: side of the blocks that are halved in levels that are not stored
ORIGIN = "inkdask"  # attribute of the provenance


def write_pyramid(
    picture: da.Array,
    uri: str,
    provenance: Provenance | None,
    pixel_um: float | None = None,
    corner: tuple[int, int] = (0, 0),
    draw: Callable[[str], None] = lambda _: None,
) -> list[int]:
    """Write a picture as an OME-Zarr pyramid, whole or not at all; return its histogram.

    Where S3 lets nothing be removed, it is written in its place: no picture before its last object.

    Parameters
    ----------
    picture
        Dask uint8 (y, x).
    uri
        Place of the group; an earlier one is replaced.
    provenance
        Recipe and origin, for the group's metadata.
    pixel_um
        Side of a pixel, in micrometers.
    corner
        Row and column of the segment where the picture begins.
    draw
        Called with the place of the whole pyramid before it is moved: no other job replaces it yet.
    """
    unfinished = f"{uri}.{uuid4().hex[:8]}.unfinished"  # no two runs share a place
    place = unfinished if outputs.may_remove(unfinished) else uri
    levels = ome(_name(uri), len(level_shapes(picture.shape)), pixel_um, corner)
    attributes: Any = {"ome": levels} | ({ORIGIN: provenance.to_json()} if provenance else {})
    try:
        with storage.explained(place):
            group = zarr.open_group(storage.zarr_store(place), mode="a", zarr_format=3)
            group.attrs.put({})  # of an earlier picture
        try:
            steps, counts = list(_writes(picture, place)), list[np.ndarray]()

            def tell(_: int, some: np.ndarray) -> None:
                counts.append(some)
                meter.add(1)

            with Meter("picture", sum(map(len, steps)), "chunks") as meter:
                for step in steps:  # each level is made of the stored one before
                    engine.compute_each(step, tell).check()
            counted: list[int] = np.sum(counts[: len(steps[0])], axis=0).ravel().tolist()
        except InkdaskError:
            _check_there(place)
            raise
        _check_there(place)
        with storage.explained(place):
            group.attrs.put(attributes)
        draw(place)
        if place != uri:
            outputs.replace_tree(place, uri)
    except BaseException:
        if place != uri:
            _discard(place)
        raise
    return counted


def to_uint8(ink: np.ndarray) -> np.ndarray:
    """Return the grey values of probabilities, ``floor(255 * clip(p, 0, 1))``."""
    return np.floor(255 * np.clip(ink, 0, 1)).astype(np.uint8)


def level_shapes(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Return height and width of every level; half of an odd size is rounded up."""
    height, width = shape
    shapes = [(height, width)]
    while max(height, width) > SMALLEST:
        height, width = -(-height // 2), -(-width // 2)
        shapes.append((height, width))
    return shapes


def halve(block: np.ndarray) -> np.ndarray:
    """Average two by two pixels of uint8 (y, x, ...), rounded half up; an odd edge is repeated."""
    odd = [(0, side % 2) for side in block.shape[:2]]
    block = np.pad(block, odd + [(0, 0)] * (block.ndim - 2), mode="edge")
    pairs = block[0::2].astype(np.uint16) + block[1::2]
    return ((pairs[:, 0::2] + pairs[:, 1::2] + 2) >> 2).astype(np.uint8)


def halved(array: da.Array, times: int = 1, chunk: int | tuple[int, ...] = CHUNK) -> da.Array:
    """Halve both sides of a picture, dask uint8 (y, x), in blocks of ``chunk`` pixels, even."""
    for _ in range(times):
        even = array.rechunk(chunk, method="tasks")
        chunks = tuple(tuple(-(-side // 2) for side in sizes) for sizes in even.chunks)
        array = da.map_blocks(halve, even, chunks=chunks, dtype=np.uint8)
    return array


def ome(
    name: str, levels: int, pixel_um: float | None, corner: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """Return the metadata of a pyramid: axes, and size and place of the pixels of each level.

    The place of a level is the centre of its first pixel.
    """
    side = pixel_um or 1.0
    unit = {"unit": "micrometer"} if pixel_um else {}
    datasets = [
        {
            "path": str(level),
            "coordinateTransformations": [
                {"type": "scale", "scale": [2**level * side] * 2},
                {
                    "type": "translation",
                    "translation": [(start + (2**level - 1) / 2) * side for start in corner],
                },
            ],
        }
        for level in range(levels)
    ]
    axes = [{"name": axis, "type": "space", **unit} for axis in "yx"]
    image = {"name": name, "axes": axes, "datasets": datasets, "type": "mean"}
    return {"version": "0.5", "multiscales": [image]}


def _writes(picture: da.Array, uri: str) -> Iterator[list[Delayed]]:
    """Create each level; yield the lazy writes that fill it, from the stored level before."""
    side = tuple(map(_side, picture.chunks))
    # Every Dask chunk is a whole multiple of a zarr chunk, so writers never share an object.
    inner = zip(picture.chunks, side, strict=True)
    if any(size % most for sizes, most in inner for size in sizes[:-1]):
        picture = picture.rechunk(side, method="tasks")
    level, pair = picture, tuple(2 * most for most in side)
    for number, shape in enumerate(level_shapes(picture.shape)):
        stored: Any = _create(storage.join(uri, str(number)), shape, side)
        counts = tuple(
            tuple(size for _ in sizes) for sizes, size in zip(level.chunks, (1, 256), strict=True)
        )
        writes = da.map_blocks(
            _write, level, stored, chunks=counts, meta=np.empty((0, 0), np.int64)
        )
        yield list(writes.to_delayed().ravel())
        level = halved(da.from_array(stored, pair), chunk=pair)


def _write(block: np.ndarray, level: StoredArray, block_info: Any = None) -> np.ndarray:
    """Write a block in its place; return how many pixels have each value, int64 (1, 256)."""
    level[tuple(slice(*ends) for ends in block_info[0]["array-location"])] = block
    return np.bincount(block.ravel(), minlength=256)[np.newaxis]


def _side(sizes: tuple[int, ...]) -> int:
    """Side of the chunks along an axis, of which a crop may have cut the first and the last."""
    *others, last = sizes
    side = max(others, default=0)
    # The last may be longer than a chunk, but not twice as long.
    return last if last > 2 * side else side


def _check_there(place: str) -> None:
    """Check that no other job has taken the picture for that of a dead one (`outputs.sweep`)."""
    if not storage.exists(storage.join(place, "zarr.json")):
        raise InkdaskError(f"{place} was removed: give the same command again.")


def _discard(uri: str) -> None:
    """Try for some seconds to remove the folder of a failed job, which late writes make again."""
    end, is_there = time.monotonic() + 5, True
    while is_there and time.monotonic() < end:
        with suppress(InkdaskError):
            outputs.remove(uri)
            time.sleep(0.2)
            is_there = storage.exists(uri)


def _create(uri: str, shape: tuple[int, ...], side: tuple[int, ...]) -> StoredArray:
    with storage.explained(uri):
        array = zarr.open_array(
            storage.zarr_store(uri),
            mode="a",
            shape=shape,
            chunks=tuple(map(min, side, shape)),
            dtype="uint8",
            fill_value=0,
            dimension_names=("y", "x"),
            zarr_format=3,
        )
    if (array.shape, array.chunks) != (shape, tuple(map(min, side, shape))):
        raise InkdaskError(f"{uri} has other chunks, and is not replaced without s3:DeleteObject.")
    return StoredArray(uri, array)


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")
