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

from inkdask.box import Box
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
        Function that reads a box, uint8 (y, x).
    """

    shape: tuple[int, int]
    unit: tuple[int, int]
    unit_bytes: float
    is_cheap: bool
    read: Callable[[Box], np.ndarray]

    @classmethod
    def of_segment(cls, segment: Segment, index: int) -> Layer:
        """Return one layer of a segment's files, uncropped."""
        source = segment.source.take(slice(index, index + 1))
        height, width = source.shape[1:]
        unit = min(source.unit[0], height), min(source.unit[1], width)
        units = -(-height // unit[0]) * -(-width // unit[1])
        return cls(
            (height, width),
            unit,
            source.cost(slice(0, height), slice(0, width)) / units,
            source.can_be_sampled,
            lambda box: source.block(*box.slices).read()[0],
        )

    @classmethod
    def of_array(cls, array: da.Array) -> Layer:
        """Return one layer of a dask volume, uint8 (y, x)."""
        unit = max(array.chunks[0]), max(array.chunks[1])
        bytes_ = float(unit[0] * unit[1])
        return cls(
            array.shape, unit, bytes_, False, lambda box: np.asarray(array[box.slices].compute())
        )

    def is_dear(self, box: Box, budget: Budget) -> bool:
        """Whether reading a box exceeds the budget."""
        down, across = map(pieces_in, box.slices, self.unit)
        return len(down) * len(across) > self.pieces_for(budget)

    def pieces_for(self, budget: Budget) -> float:
        """Number of pieces within the budget, at least one."""
        return max(1, min(budget.pieces, budget.bytes / max(self.unit_bytes, 1)))


def look(layer: Layer, box: Box, step: int, budget: Budget) -> np.ndarray:
    """Read a box of a layer at a coarser scale; one that exceeds the budget is sampled.

    Returns uint8 (y, x), one pixel for each ``step`` that has begun.
    """
    if not layer.is_dear(box, budget):
        return shrink(layer.read(box), step)
    (height, width), (rows, columns) = layer.unit, box.slices
    tall, wide = (-(-side // step) for side in box.shape)
    count = int(layer.pieces_for(budget))
    down: Sequence[int] = pieces_in(rows, height)
    across: Sequence[int] = pieces_in(columns, width)
    if len(across) == 1:  # strips
        down = evenly(down, count)
        bands = for_each(lambda i: layer.read(Box.of(span_of(i, height, rows), columns)), down)
        means = np.stack([shrink(band.mean(axis=0, keepdims=True), step)[0] for band in bands])
        return _between(_middles(down, height, rows, step), means, tall)
    side = max(count**0.5, 1)
    aspect = (len(down) / len(across)) ** 0.5
    down, across = evenly(down, int(side * aspect)), evenly(across, int(side / aspect))
    pieces = [
        Box.of(span_of(i, height, rows), span_of(j, width, columns)) for i in down for j in across
    ]
    values = for_each(lambda piece: layer.read(piece).mean(), pieces)
    means = np.array(values).reshape(len(down), len(across))
    means = _between(_middles(down, height, rows, step), means, tall, float)
    return _between(_middles(across, width, columns, step), means.T, wide).T


def shrink(pixels: np.ndarray, step: int, unknown: int | None = None) -> np.ndarray:
    """Average squares of ``step`` pixels, rounded; squares at the end may be smaller.

    Pixels of the value ``unknown`` do not count. A square of nothing else is unknown too.
    """
    if step == 1:
        return np.asarray(pixels, np.uint8)
    if unknown is None:
        counts = [np.minimum(step, n - np.arange(0, n, step)) for n in pixels.shape]
        return np.rint(_sums(pixels, step) / np.outer(*counts)).astype(np.uint8)
    known = pixels != unknown
    count = _sums(known, step)
    means = np.rint(_sums(np.where(known, pixels, 0), step) / np.maximum(count, 1))
    return np.where(count > 0, means, unknown).astype(np.uint8)


def _sums(pixels: np.ndarray, step: int) -> np.ndarray:
    """Add squares of ``step`` pixels, float32."""
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], step)
        pixels = np.add.reduceat(pixels, starts, axis=axis, dtype=np.float32)
    return pixels


def pieces_in(span: slice, unit: int) -> range:
    """Positions of the pieces that meet a span of pixels."""
    return range(span.start // unit, -(-span.stop // unit))


def span_of(piece: int, unit: int, within: slice) -> slice:
    """Pixels of a piece that lie within a span."""
    return slice(max(piece * unit, within.start), min((piece + 1) * unit, within.stop))


def evenly(pieces: Sequence[int], most: int) -> Sequence[int]:
    """Choose at most ``most`` pieces, evenly spread."""
    most = max(most, 1)
    if len(pieces) <= most:
        return pieces
    return [pieces[(2 * i + 1) * len(pieces) // (2 * most)] for i in range(most)]


def _middles(pieces: Sequence[int], unit: int, span: slice, step: int) -> np.ndarray:
    """Middles of pieces, in pixels of the result."""
    ends = [span_of(piece, unit, span) for piece in pieces]
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
