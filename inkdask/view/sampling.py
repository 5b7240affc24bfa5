"""Papyrus on a screen: windows of single layers, as fine as they are looked at and no finer.

A window that is cheap is read whole and averaged. Of a dear one (a whole layer of 20,000 x 20,000
pixels is 800 MB) only some pieces are read, spread evenly, and what lies between them is
interpolated: blurred, but in the right place and of the right brightness.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import dask.array as da
import numpy as np

from inkdask.segment import Segment
from inkdask.storage.parallel import for_each


class Budget(NamedTuple):
    """What a look may fetch: bytes, and pieces, as each is a request, however short."""

    bytes: float
    pieces: float


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer, of which windows can be read.

    Attributes
    ----------
    shape
        Height and width in pixels.
    unit
        Height and width of the largest piece that can only be read whole.
    unit_bytes
        What reading one unit fetches, on average.
    is_cheap
        Whether a part costs no more than its bytes; not so where the first read decodes the whole
        layer, and where a dask array may compute anything.
    read
        Reads rows and columns, uint8 (y, x).
    """

    shape: tuple[int, int]
    unit: tuple[int, int]
    unit_bytes: float
    is_cheap: bool
    read: Callable[[slice, slice], np.ndarray]

    @classmethod
    def of_segment(cls, segment: Segment, index: int) -> Layer:
        """One layer of a segment's files, all of it, whatever the segment is cropped to."""
        source = segment.source.take(slice(index, index + 1))
        height, width = source.shape[1:]
        unit = min(source.unit[0], height), min(source.unit[1], width)
        units = -(-height // unit[0]) * -(-width // unit[1])
        return cls(
            (height, width),
            unit,
            source.cost(slice(0, height), slice(0, width)) / units,
            source.can_be_sampled,
            lambda rows, columns: source.block(rows, columns).read()[0],
        )

    @classmethod
    def of_array(cls, array: da.Array) -> Layer:
        """One layer of a dask volume, uint8 (y, x)."""
        height, width = array.shape
        unit = max(array.chunks[0]), max(array.chunks[1])

        def read(rows: slice, columns: slice) -> np.ndarray:
            return np.asarray(array[rows, columns].compute())

        return cls((height, width), unit, float(unit[0] * unit[1]), False, read)

    def is_dear(self, rows: slice, columns: slice, budget: Budget) -> bool:
        """Whether reading a window fetches more than the budget."""
        down, across = (_pieces(s, u) for s, u in zip((rows, columns), self.unit, strict=True))
        return len(down) * len(across) > self.pieces_for(budget)

    def pieces_for(self, budget: Budget) -> float:
        """Pieces that the budget allows, at least one."""
        return max(1, min(budget.pieces, budget.bytes / max(self.unit_bytes, 1)))


def look(layer: Layer, rows: slice, columns: slice, step: int, budget: Budget) -> np.ndarray:
    """Read a window of a layer at a coarser scale.

    Parameters
    ----------
    layer
        What to read.
    rows, columns
        The window, in pixels of the layer.
    step
        Pixels of the layer for one of the answer.
    budget
        What may be fetched; a dearer window is sampled.

    Returns
    -------
    numpy.ndarray
        uint8 (y, x), as many pixels as whole or begun steps.
    """
    if not layer.is_dear(rows, columns, budget):
        return shrink(layer.read(rows, columns), step)
    height, width = layer.unit
    count = int(layer.pieces_for(budget))
    down: Sequence[int] = _pieces(rows, height)
    across: Sequence[int] = _pieces(columns, width)
    if len(across) == 1:  # strips: all columns, some rows
        down = _spread(down, count)
        bands = for_each(lambda i: layer.read(_span(i, height, rows), columns), down)
        means = np.stack([shrink(band.mean(axis=0, keepdims=True), step)[0] for band in bands])
        return _between(_middles(down, height, rows, step), means, -(-_size(rows) // step))
    side = max(count**0.5, 1)
    tall = (len(down) / len(across)) ** 0.5
    down, across = _spread(down, int(side * tall)), _spread(across, int(side / tall))
    places = [(i, j) for i in down for j in across]
    values = for_each(
        lambda at: layer.read(_span(at[0], height, rows), _span(at[1], width, columns)).mean(),
        places,
    )
    means = np.array(values).reshape(len(down), len(across))
    means = _between(_middles(down, height, rows, step), means, -(-_size(rows) // step), float)
    return _between(_middles(across, width, columns, step), means.T, -(-_size(columns) // step)).T


def shrink(pixels: np.ndarray, step: int) -> np.ndarray:
    """Average squares of ``step`` pixels, rounded; those at the end may be smaller."""
    if step == 1:
        return np.asarray(pixels, np.uint8)
    sums = pixels
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], step)
        sums = np.add.reduceat(sums, starts, axis=axis, dtype=np.float32)
    counts = [np.minimum(step, n - np.arange(0, n, step)) for n in pixels.shape]
    return np.rint(sums / np.outer(*counts)).astype(np.uint8)


def _size(span: slice) -> int:
    return int(span.stop - span.start)


def _pieces(span: slice, unit: int) -> range:
    """Numbers of the pieces that meet a span of pixels."""
    return range(span.start // unit, -(-span.stop // unit))


def _span(piece: int, unit: int, within: slice) -> slice:
    return slice(max(piece * unit, within.start), min((piece + 1) * unit, within.stop))


def _spread(pieces: Sequence[int], most: int) -> Sequence[int]:
    """Choose at most so many pieces, evenly."""
    most = max(most, 1)
    if len(pieces) <= most:
        return pieces
    return [pieces[(2 * i + 1) * len(pieces) // (2 * most)] for i in range(most)]


def _middles(pieces: Sequence[int], unit: int, span: slice, step: int) -> np.ndarray:
    """Where the middles of pieces lie in the answer, in its pixels."""
    ends = [_span(piece, unit, span) for piece in pieces]
    return np.array([(s.start + s.stop) / 2 - span.start for s in ends]) / step - 0.5


def _between(at: np.ndarray, values: np.ndarray, count: int, dtype: Any = np.uint8) -> np.ndarray:
    """Interpolate rows of values that lie at ``at`` to all of ``count`` rows."""
    where = np.clip(np.arange(count), at[0], at[-1])
    after = np.clip(np.searchsorted(at, where), 1, max(len(at) - 1, 1))
    if len(at) == 1:
        return np.repeat(values, count, axis=0).astype(dtype)
    share = ((where - at[after - 1]) / (at[after] - at[after - 1]))[:, None]
    mixed = (1 - share) * values[after - 1] + share * values[after]
    return np.rint(mixed).astype(dtype) if dtype is np.uint8 else mixed
