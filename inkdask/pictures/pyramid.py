"""The stored picture: an OME-Zarr 0.5 pyramid, which viewers open as it is.

    <picture>.zarr      group: axes, units, place in the segment ("ome"); origin ("inkdask")
        0               uint8 (y, x), every pixel
        1               each pixel the mean of two by two of level 0, and so on

The metadata follow https://ngff.openmicroscopy.org/0.5: lengths are in micrometers where the size
of a pixel is known, else in pixels, and are counted from the corner of the segment.
"""

from __future__ import annotations

import itertools
import time
from typing import Any
from uuid import uuid4

import dask
import dask.array as da
import numpy as np
import zarr
from dask.delayed import Delayed
from tenacity import (
    retry,
    retry_if_exception_type,
    retry_if_result,
    stop_after_delay,
    wait_fixed,
)

from inkdask import engine, storage
from inkdask.errors import InkdaskError
from inkdask.identity import Provenance
from inkdask.progress import Meter
from inkdask.storage import outputs

SMALLEST = 512  # pixels: a level that is no larger has no coarser one
ORIGIN = "inkdask"  # the attribute that says where a picture comes from


def write_pyramid(
    picture: da.Array,
    uri: str,
    provenance: Provenance | None,
    pixel_um: float | None = None,
    corner: tuple[int, int] = (0, 0),
) -> None:
    """Write a picture as an OME-Zarr pyramid, which is there whole or not at all.

    Parameters
    ----------
    picture
        Dask uint8 (y, x).
    uri
        Where the group goes; what was there is replaced.
    provenance
        For the group's metadata.
    pixel_um
        Side of a pixel, in micrometers.
    corner
        Row and column of the segment where the picture begins.
    """
    unfinished = f"{uri}.{uuid4().hex[:8]}.unfinished"  # no two runs share a place
    shapes = level_shapes(picture.shape)
    try:
        attributes = {"ome": ome(_name(uri), len(shapes), pixel_um, corner)}
        if provenance:
            attributes[ORIGIN] = provenance.to_json()
        with storage.explained(unfinished):
            zarr.create_group(storage.zarr_store(unfinished), zarr_format=3, attributes=attributes)
        writes = _fill(picture, unfinished)
        steps = [_coarsen(unfinished, level, shape) for level, shape in enumerate(shapes[1:], 1)]
        with Meter("picture", len(writes) + sum(map(len, steps)), "chunks") as meter:
            for step in (writes, *steps):  # each level is made of the one before
                engine.raise_any(engine.compute_each(step, lambda _: meter.add(1)))
        outputs.replace_tree(unfinished, uri)
    except BaseException:
        _discard(unfinished)
        raise


def to_uint8(ink: np.ndarray) -> np.ndarray:
    """The picture's grey values, ``floor(255 * clip(p, 0, 1))``."""
    return np.floor(255 * np.clip(ink, 0, 1)).astype(np.uint8)


def level_shapes(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Height and width of every level; odd sizes are rounded up, so that no pixel is lost."""
    height, width = shape
    shapes = [(height, width)]
    while max(height, width) > SMALLEST:
        height, width = -(-height // 2), -(-width // 2)
        shapes.append((height, width))
    return shapes


def halve(block: np.ndarray) -> np.ndarray:
    """Average two by two pixels of uint8 (y, x), rounded half up; at an odd edge, what is there."""
    block = np.pad(block, [(0, side % 2) for side in block.shape], mode="edge")
    pairs = block[0::2].astype(np.uint16) + block[1::2]
    return ((pairs[:, 0::2] + pairs[:, 1::2] + 2) >> 2).astype(np.uint8)


def ome(
    name: str, levels: int, pixel_um: float | None, corner: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """The metadata of a pyramid: its axes, and the size and place of the pixels of each level.

    A place is that of the centre of the first pixel, which moves inwards from level to level.
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


def _fill(picture: da.Array, uri: str) -> list[Delayed]:
    """Create level 0; return the lazy writes that fill it."""
    side = tuple(map(_side, picture.chunks))
    if any(sizes[0] < most for sizes, most in zip(picture.chunks, side, strict=True)):
        picture = picture.rechunk(side, method="tasks")  # a window begins inside a chunk
    # Every Dask chunk is a whole multiple of a zarr chunk, so writers never share an object.
    _create(uri, 0, picture.shape, side)
    writes = da.map_blocks(
        _write_block, picture, uri=uri, meta=np.empty((0, 0), object), enforce_ndim=False
    )
    return list(writes.to_delayed().ravel())


def _side(sizes: tuple[int, ...]) -> int:
    """Side of the chunks along an axis, of which a window may have cut the first and the last."""
    first, *inner, last = sizes if len(sizes) > 1 else (*sizes, 0)
    # The last may be longer than a chunk, but not twice as long.
    return max(first, *inner, last if last > 2 * first else 0)


def _coarsen(uri: str, level: int, shape: tuple[int, int]) -> list[Delayed]:
    """Create a level; return the lazy writes that fill it from the one below."""
    side = tuple(storage.open_array(storage.join(uri, "0")).chunks)
    _create(uri, level, shape, side)
    starts = itertools.product(
        *(range(0, length, step) for length, step in zip(shape, side, strict=True))
    )
    write = dask.delayed(_halve_block, pure=False)
    return [write(uri, level, y, x) for y, x in starts]


@retry(
    retry=retry_if_result(bool) | retry_if_exception_type(InkdaskError),
    wait=wait_fixed(0.2),
    stop=stop_after_delay(5),
    retry_error_callback=lambda _: None,
)
def _discard(uri: str) -> bool:
    """Remove what a failed job left, though its last writes may still be going on.

    Returns whether they have begun it anew; what is there after some seconds stays there, because
    the failure itself is what must be told.
    """
    outputs.remove(uri)
    time.sleep(0.2)
    return storage.exists(uri)


def _create(uri: str, level: int, shape: tuple[int, ...], side: tuple[int, ...]) -> None:
    with storage.explained(uri):
        zarr.create_array(
            storage.zarr_store(storage.join(uri, str(level))),
            shape=shape,
            chunks=tuple(map(min, side, shape)),
            dtype="uint8",
            fill_value=0,
            dimension_names=("y", "x"),
            zarr_format=3,
        )


def _write_block(block: np.ndarray, uri: str, block_info: Any) -> None:
    rows, columns = block_info[0]["array-location"]
    with storage.explained(uri):
        storage.open_array(storage.join(uri, "0"))[slice(*rows), slice(*columns)] = block


def _halve_block(uri: str, level: int, y: int, x: int) -> None:
    with storage.explained(uri):
        finer = storage.open_array(storage.join(uri, str(level - 1)))
        array = storage.open_array(storage.join(uri, str(level)))
        height, width = array.chunks
        block = np.asarray(finer[2 * y : 2 * (y + height), 2 * x : 2 * (x + width)])
        array[y : y + height, x : x + width] = halve(block)


def _name(uri: str) -> str:
    return uri.rstrip("/").rsplit("/", 1)[-1].removesuffix(".zarr")
