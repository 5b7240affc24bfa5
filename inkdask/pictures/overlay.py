"""Ink on papyrus: the prediction over a picture of the layers."""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass
from typing import Literal

import dask.array as da
import numpy as np

from inkdask.box import Box
from inkdask.errors import InkdaskError
from inkdask.pictures.picture import Picture
from inkdask.pictures.pyramid import halved
from inkdask.progress import size
from inkdask.segment import Segment, open_segment
from inkdask.specs import NO_MASK

log = logging.getLogger("inkdask")

Flattening = Literal["max", "mean"]

DARK, LIGHT = np.array([58, 44, 32], np.float32), np.array([244, 231, 204], np.float32)  # papyrus
BLACK = np.array([16, 11, 8], np.float32)  # ink
SAMPLES, SAMPLE = 5, 64  # pieces a side, and pixels a side of one, that settle the contrast


@dataclass(frozen=True)
class Ground:
    """Papyrus under a prediction.

    Attributes
    ----------
    pixels
        Dask uint8 (y, x), of the size of the picture.
    low, high
        Values that are shown darkest and lightest.
    """

    pixels: da.Array
    low: float
    high: float


def open_ground(picture: Picture, how: Flattening, segment: str | None = None) -> Ground:
    """Flatten the layers that a prediction was made of, lazily.

    ``segment`` is where they are now. Default: where they were.
    """
    told = picture.provenance
    place = segment or (told and told.origin.volume)
    if not place:
        raise InkdaskError(
            f"{picture.uri} does not say what segment it was made of: name it by --segment."
        )
    opened = open_segment(
        place,
        told.origin.opened if told else None,
        mask=NO_MASK,
        level=told.origin.ome_zarr_level if told else "0",
    )
    if told:  # because the network may have read the middle layers only
        first = opened.layers.index(min(told.recipe.layers))
        opened = opened.take(slice(first, first + len(told.recipe.layers)))
        if not segment and opened.identity != told.recipe.input:
            log.warning("%s is not what it was when the prediction was made", place)
    box = picture.box
    if not Box.at((0, 0), opened.shape[1:]).holds(box):
        raise InkdaskError(
            f"{place} has {size(opened.shape[1:])}, but {picture.uri} shows "
            f"rows {box.top} to {box.bottom} and columns {box.left} to {box.right}."
        )
    part = opened.crop(*box.slices)
    low, high = _contrast(part, how)
    volume = part.volume
    pixels = da.map_blocks(
        flatten, volume, how, drop_axis=0, chunks=volume.chunks[1:], dtype=np.uint8
    )
    return Ground(pixels, low, high)


def laid_over(
    ink: da.Array, ground: Ground, level: int, opacity: float, table: np.ndarray | None = None
) -> da.Array:
    """Lay a prediction over its papyrus: dask uint8 (y, x, 3).

    Parameters
    ----------
    ink
        Dask uint8 (y, x), at a 2 ** level-th of the size of the ground.
    ground, level
        The papyrus, and how often it is halved.
    opacity
        Of the strongest ink, in [0, 1].
    table
        Colours of the ink, uint8 (256, 3). Default: black, as it was written.
    """
    under = halved(ground.pixels, level).rechunk(ink.chunks)
    return da.map_blocks(
        _mix, ink, under, ground.low, ground.high, opacity, table,
        new_axis=2, chunks=(*ink.chunks, (3,)), dtype=np.uint8,
    )  # fmt: skip


def flatten(block: np.ndarray, how: Flattening) -> np.ndarray:
    """Return the maximum or mean of uint8 (z, y, x) over the layers, uint8 (y, x)."""
    if how == "max" or not block.size:
        return block.max(axis=0, initial=0)
    return np.rint(block.sum(axis=0, dtype=np.uint32) / len(block)).astype(np.uint8)


def _mix(
    ink: np.ndarray,
    under: np.ndarray,
    low: float,
    high: float,
    opacity: float,
    table: np.ndarray | None,
) -> np.ndarray:
    """Mix ink and papyrus, uint8 (y, x, 3), by a table of the 256 colours of each."""
    values = np.arange(256, dtype=np.float32)
    papyrus = papyrus_colours(low, high)
    papyrus[0] = 0  # no papyrus
    probability = values / 255
    share = opacity * probability**2 * (3 - 2 * probability)  # weakens doubtful ink
    colours = BLACK if table is None else table.astype(np.float32)
    inked = share[:, None] * colours
    mixed = (1 - share)[ink][..., None] * papyrus[under]
    mixed += inked[ink]
    return np.rint(mixed).astype(np.uint8)


def papyrus_colours(low: float, high: float) -> np.ndarray:
    """Colours of the 256 values of layers, of which low and high are darkest and lightest."""
    light = np.clip((np.arange(256, dtype=np.float32) - low) / max(high - low, 1), 0, 1)
    return (DARK + light[:, None] * (LIGHT - DARK)).astype(np.float32)


def _contrast(segment: Segment, how: Flattening) -> tuple[float, float]:
    """Return the 1st and 99.5th percentile of the papyrus, from some pieces of a segment."""
    height, width = segment.shape[1:]
    in_one_piece = segment.source.unit[1] >= segment.source.shape[2]  # strips are read whole
    rows, columns = (spread(side, min(SAMPLE, side), SAMPLES) for side in (height, width))
    found = []
    for piece in itertools.product(rows, [slice(0, width)] if in_one_piece else columns):
        flat = flatten(np.asarray(segment.crop(*piece).volume), how)
        found.append(flat[flat > 0])
    values = np.concatenate(found)
    if not values.size:
        return 0, 255
    low, high = np.percentile(values, [1, 99.5])
    return float(low), float(high)


def spread(length: int, piece: int, count: int) -> list[slice]:
    """Spread pieces evenly over a length."""
    starts = ((length - piece) * (2 * n + 1) // (2 * count) for n in range(count))
    return [slice(start, start + piece) for start in starts]
