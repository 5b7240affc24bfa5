"""What the viewer shows, cut into tiles of `SIDE` pixels at scales 1, 1/2, 1/4, ...

A tile (level, row, column) is a square of ``SIDE << level`` pixels. Tiles of coarse levels come
from an overview of the whole picture, which stays; finer ones from blocks that are kept as long as
there is room.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence

import dask.array as da
import numpy as np

from inkdask.plan import Plan
from inkdask.segment import Segment
from inkdask.storage.parallel import for_each
from inkdask.view.kept import Kept
from inkdask.view.sampling import Budget, Layer, look, shrink

SIDE = 256  # pixels of a tile on the screen
OVERVIEW = 1024  # pixels: the longest side of an overview
UNKNOWN = 255  # of an ink picture: not computed yet; probabilities are 0 to 254
MOST = 254
KEPT_BYTES = 256 << 20  # of one picture
TILE_BUDGET, OVERVIEW_BUDGET = Budget(48 << 20, 512), Budget(64 << 20, 1024)

Window = tuple[slice, slice]


def overview_level(shape: tuple[int, int]) -> int:
    """The finest level at which the whole picture is at most `OVERVIEW` pixels wide and tall."""
    return max((max(shape) - 1) // OVERVIEW, 0).bit_length()


def window_of(shape: tuple[int, int], level: int, row: int, column: int) -> Window:
    """Rows and columns of a tile, in pixels of the picture."""
    side = SIDE << level
    return (
        slice(row * side, min((row + 1) * side, shape[0])),
        slice(column * side, min((column + 1) * side, shape[1])),
    )


class Papyrus:
    """The layers of a segment or of a volume, one of which is looked at.

    Attributes
    ----------
    shape
        Height and width in pixels.
    numbers
        Numbers of the layers, in the order of their indices.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        shape: tuple[int, int],
        corner: tuple[int, int],
        open_layer: Callable[[int], Layer],
    ) -> None:
        self.numbers, self.shape = tuple(numbers), shape
        self._corner, self._open = corner, open_layer
        self._layers: dict[int, Layer] = {}
        self._kept = Kept(KEPT_BYTES)
        self._level = overview_level(shape)

    @classmethod
    def of_segment(cls, segment: Segment) -> Papyrus:
        """The layers of a segment, cropped as it is."""
        corner = (segment.window[0].start, segment.window[1].start) if segment.window else (0, 0)
        return cls(
            segment.layers,
            segment.shape[1:],
            corner,
            lambda index: Layer.of_segment(segment, index),
        )

    @classmethod
    def of_plan(cls, plan: Plan) -> Papyrus:
        """What lies under a prediction: the layers that the network reads."""
        region, segment = plan.region, plan.segment
        if segment is None:
            volume = plan.volume
            numbers: Sequence[int] = range(volume.shape[0])
            return cls(
                numbers,
                region.shape,
                region.corner,
                lambda index: Layer.of_array(volume[index]),
            )
        place = {number: index for index, number in enumerate(segment.layers)}
        return cls(
            plan.layers,
            region.shape,
            region.shift(*plan.corner).corner,
            lambda index: Layer.of_segment(segment, place[plan.layers[index]]),
        )

    @property
    def is_cheap(self) -> bool:
        """Whether a part costs no more than its bytes (see `Layer`)."""
        return self.layer(0).is_cheap

    def layer(self, index: int) -> Layer:
        """One of the layers."""
        if index not in self._layers:
            self._layers[index] = self._open(index)
        return self._layers[index]

    def tile(self, index: int, level: int, row: int, column: int) -> np.ndarray:
        """One tile of a layer, uint8 (y, x)."""
        if level >= self._level:
            rows, columns = window_of(self.shape, level, row, column)
            step, more = 1 << self._level, level - self._level
            part = self.overview(index)[
                rows.start // step : -(-rows.stop // step),
                columns.start // step : -(-columns.stop // step),
            ]
            return shrink(part, 1 << more)
        layer = self.layer(index)
        rows, columns = self._on_file(window_of(self.shape, level, row, column))
        if layer.is_dear(rows, columns, TILE_BUDGET):
            return look(layer, rows, columns, 1 << level, TILE_BUDGET)
        return shrink(self._read(index, rows, columns), 1 << level)

    def overview(self, index: int, budget: Budget = OVERVIEW_BUDGET) -> np.ndarray:
        """A whole layer, uint8 (y, x), at most `OVERVIEW` pixels wide and tall."""

        def make() -> np.ndarray:
            whole = self._on_file((slice(0, self.shape[0]), slice(0, self.shape[1])))
            return look(self.layer(index), *whole, 1 << self._level, budget)

        return self._kept.get(("overview", index, budget), make)

    def _on_file(self, window: Window) -> Window:
        (rows, columns), (top, left) = window, self._corner
        return (
            slice(rows.start + top, rows.stop + top),
            slice(columns.start + left, columns.stop + left),
        )

    def _read(self, index: int, rows: slice, columns: slice) -> np.ndarray:
        """Put a window together from blocks that are kept."""
        layer = self.layer(index)
        height, width = (unit * -(-SIDE // unit) for unit in layer.unit)
        out = np.empty((rows.stop - rows.start, columns.stop - columns.start), np.uint8)

        def paste(place: tuple[int, int]) -> None:
            (y0, y1), (x0, x1) = (
                (piece * side, min((piece + 1) * side, length))
                for piece, side, length in zip(place, (height, width), layer.shape, strict=True)
            )
            block = self._kept.get(
                (index, *place), lambda: layer.read(slice(y0, y1), slice(x0, x1))
            )
            top, bottom = max(y0, rows.start), min(y1, rows.stop)
            left, right = max(x0, columns.start), min(x1, columns.stop)
            out[
                top - rows.start : bottom - rows.start, left - columns.start : right - columns.start
            ] = block[top - y0 : bottom - y0, left - x0 : right - x0]

        # In the pool of readers also when it is one block: who waits there for another's block
        # waits for a thread that needs no further one.
        for_each(
            paste,
            itertools.product(
                range(rows.start // height, -(-rows.stop // height)),
                range(columns.start // width, -(-columns.stop // width)),
            ),
        )
        return out


class Ink:
    """An ink map that becomes known chunk by chunk.

    Subclasses know the chunks: `known`, `_chunk`.

    Attributes
    ----------
    shape
        Height and width in pixels.
    edges
        First pixel of every chunk, then the length, along y and x.
    observers
        Called with the window that has changed, from any thread.
    """

    def __init__(self, ink: da.Array) -> None:
        height, width = ink.shape
        self.shape = (height, width)
        self.edges = [np.cumsum([0, *sizes]) for sizes in ink.chunks]
        self.observers: list[Callable[[Window], None]] = []
        self._kept = Kept(KEPT_BYTES)
        self._level = overview_level(self.shape)
        step = 1 << self._level
        self._overview = np.full((-(-height // step), -(-width // step)), UNKNOWN, np.uint8)
        self._drawing = threading.Lock()

    @property
    def known(self) -> np.ndarray:
        """Which chunks can be shown, bool (rows, columns)."""
        raise NotImplementedError

    def _chunk(self, row: int, column: int) -> np.ndarray:
        """The pixels of a chunk that is known: float32 (y, x) in [0, 1]."""
        raise NotImplementedError

    @property
    def status(self) -> str:
        """How far it is, in words."""
        return f"{np.count_nonzero(self.known):,} of {self.known.size:,} chunks computed"

    @property
    def is_busy(self) -> bool:
        """Whether chunks are being computed."""
        return False

    def see(self, window: Window) -> None:
        """Take note of what is in sight."""

    def focus(self, window: Window) -> None:
        """Compute a window before all others."""

    def tile(self, level: int, row: int, column: int) -> np.ndarray:
        """One tile, uint8 (y, x): 254 times the probability, or `UNKNOWN`."""
        rows, columns = window_of(self.shape, level, row, column)
        if level < self._level:
            return _shrink_known(self._read(rows, columns), 1 << level)
        step = 1 << self._level
        part = self._overview[
            rows.start // step : -(-rows.stop // step),
            columns.start // step : -(-columns.stop // step),
        ]
        return _shrink_known(part, 1 << (level - self._level))

    @property
    def overview(self) -> np.ndarray:
        """The whole picture as `tile` has it, at most `OVERVIEW` pixels wide and tall."""
        return self._overview.copy()

    def chunks_in(self, window: Window) -> list[tuple[int, int]]:
        """Rows and columns of the chunks that meet a window, those about its middle first."""
        spans = [
            range(
                max(int(np.searchsorted(edges, span.start, "right")) - 1, 0),
                min(int(np.searchsorted(edges, span.stop, "left")), len(edges) - 1),
            )
            for edges, span in zip(self.edges, window, strict=True)
        ]
        middle = [(span.start + span.stop) / 2 for span in window]

        def distance(place: tuple[int, int]) -> float:
            centre = [
                (edges[i] + edges[i + 1]) / 2 for edges, i in zip(self.edges, place, strict=True)
            ]
            return float(np.hypot(centre[0] - middle[0], centre[1] - middle[1]))

        return sorted(itertools.product(spans[0], spans[1]), key=distance)

    def pixels_of(self, row: int, column: int) -> Window:
        """The window of a chunk."""
        y, x = self.edges
        return slice(int(y[row]), int(y[row + 1])), slice(int(x[column]), int(x[column + 1]))

    def refresh(self, row: int, column: int) -> None:
        """Show a chunk anew, after it was computed."""
        self._kept.drop((row, column))
        window = self.pixels_of(row, column)
        step = 1 << self._level
        rows, columns = (
            slice(span.start // step * step, min(-(-span.stop // step) * step, length))
            for span, length in zip(window, self.shape, strict=True)
        )
        with self._drawing:
            part = _shrink_known(self._read(rows, columns), step)
            top, left = rows.start // step, columns.start // step
            self._overview[top : top + part.shape[0], left : left + part.shape[1]] = part
        for observer in list(self.observers):
            observer(window)

    def _read(self, rows: slice, columns: slice) -> np.ndarray:
        """Put a window together from the chunks that are known."""
        out = np.full((rows.stop - rows.start, columns.stop - columns.start), UNKNOWN, np.uint8)
        known = self.known
        for row, column in self.chunks_in((rows, columns)):
            if not known[row, column]:
                continue
            chunk = self._kept.get(
                (row, column),
                lambda at=(row, column): encode(self._chunk(*at)),  # type: ignore[misc]
            )
            ys, xs = self.pixels_of(row, column)
            top, bottom = max(ys.start, rows.start), min(ys.stop, rows.stop)
            left, right = max(xs.start, columns.start), min(xs.stop, columns.stop)
            out[
                top - rows.start : bottom - rows.start, left - columns.start : right - columns.start
            ] = chunk[top - ys.start : bottom - ys.start, left - xs.start : right - xs.start]
        return out


def encode(ink: np.ndarray) -> np.ndarray:
    """Probabilities to the values of a tile, uint8."""
    return np.rint(np.clip(ink, 0, 1) * MOST).astype(np.uint8)


def _shrink_known(pixels: np.ndarray, step: int) -> np.ndarray:
    """Average squares of ``step`` pixels, of those that are known."""
    if step == 1:
        return pixels
    known = pixels != UNKNOWN
    sums = [np.where(known, pixels, 0), known]
    for axis in (0, 1):
        starts = np.arange(0, pixels.shape[axis], step)
        sums = [np.add.reduceat(s, starts, axis=axis, dtype=np.float32) for s in sums]
    mean = np.rint(sums[0] / np.maximum(sums[1], 1))
    return np.where(sums[1] > 0, mean, UNKNOWN).astype(np.uint8)
