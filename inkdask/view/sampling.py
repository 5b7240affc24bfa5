"""Parts of single layers at the scale of a screen, within a budget of bytes and requests.

A part within the budget is read whole and averaged. Beyond it (a layer of 20,000 x 20,000 pixels
is 800 MB) some evenly spread pieces are read, and the pixels between them are interpolated. The
result is blurred, but its places and brightness are right.
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
    """Limits of a look: bytes, and pieces, because each piece is a request."""

    bytes: float
    pieces: float


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer that can be read in parts.

    Attributes
    ----------
    shape
        Height and width in pixels.
    unit
        Height and width of the largest piece that must be read whole.
    unit_bytes
        Mean bytes that reading one unit fetches.
    is_cheap
        Whether reading a part takes no more than its bytes: False where the first read decodes
        whole layers, and for dask arrays, which may compute anything.
    read
        Function that reads rows and columns, uint8 (y, x).
    """

    shape: tuple[int, int]
    unit: tuple[int, int]
    unit_bytes: float
    is_cheap: bool
    read: Callable[[slice, slice], np.ndarray]

    @classmethod
    def of_segment(cls, segment: Segment, index: int) -> Layer:
        """One layer of a segment's files, uncropped."""
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
        """Whether reading those rows and columns exceeds the budget."""
        down, across = (_pieces(s, u) for s, u in zip((rows, columns), self.unit, strict=True))
        return len(down) * len(across) > self.pieces_for(budget)

    def pieces_for(self, budget: Budget) -> float:
        """Number of pieces within the budget, at least one."""
        return max(1, min(budget.pieces, budget.bytes / max(self.unit_bytes, 1)))


def look(layer: Layer, rows: slice, columns: slice, step: int, budget: Budget) -> np.ndarray:
    """Read a part of a layer at a coarser scale.

    Parameters
    ----------
    layer
        Layer to read.
    rows, columns
        Part to read, in pixels of the layer.
    step
        Pixels of the layer for each pixel of the result, along an axis.
    budget
        Limit; a part that exceeds it is sampled.

    Returns
    -------
    numpy.ndarray
        uint8 (y, x), one pixel for each step that has begun.
    """
    if not layer.is_dear(rows, columns, budget):
        return shrink(layer.read(rows, columns), step)
    height, width = layer.unit
    count = int(layer.pieces_for(budget))
    down: Sequence[int] = _pieces(rows, height)
    across: Sequence[int] = _pieces(columns, width)
    if len(across) == 1:  # strips
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
    """Average squares of ``step`` pixels, rounded; squares at the end may be smaller."""
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
    """Positions of the pieces that meet a span of pixels."""
    return range(span.start // unit, -(-span.stop // unit))


def _span(piece: int, unit: int, within: slice) -> slice:
    return slice(max(piece * unit, within.start), min((piece + 1) * unit, within.stop))


def _spread(pieces: Sequence[int], most: int) -> Sequence[int]:
    """Choose at most ``most`` pieces, evenly spread."""
    most = max(most, 1)
    if len(pieces) <= most:
        return pieces
    return [pieces[(2 * i + 1) * len(pieces) // (2 * most)] for i in range(most)]


def _middles(pieces: Sequence[int], unit: int, span: slice, step: int) -> np.ndarray:
    """Middles of pieces, in pixels of the result."""
    ends = [_span(piece, unit, span) for piece in pieces]
    return np.array([(s.start + s.stop) / 2 - span.start for s in ends]) / step - 0.5


def _between(at: np.ndarray, values: np.ndarray, count: int, dtype: Any = np.uint8) -> np.ndarray:
    """Interpolate ``values``, whose rows lie at ``at``, to ``count`` rows."""
    where = np.clip(np.arange(count), at[0], at[-1])
    after = np.clip(np.searchsorted(at, where), 1, max(len(at) - 1, 1))
    if len(at) == 1:
        return np.repeat(values, count, axis=0).astype(dtype)
    share = ((where - at[after - 1]) / (at[after] - at[after - 1]))[:, None]
    mixed = (1 - share) * values[after - 1] + share * values[after]
    return np.rint(mixed).astype(dtype) if dtype is np.uint8 else mixed
