"""Pictures for the viewer, cut into tiles of `SIDE` pixels at scales 1, 1/2, 1/4, ...

A tile (level, row, column) is a square of ``SIDE << level`` pixels. Tiles of coarse levels come
from an overview of the whole picture, which stays. Finer tiles come from blocks that are kept as
long as there is room.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from inkdask.background import Place
from inkdask.box import Box
from inkdask.coarse import blend_stored, spread_stored
from inkdask.plan import Plan
from inkdask.segment import Segment
from inkdask.storage.parallel import for_each
from inkdask.view.kept import Kept
from inkdask.view.sampling import Budget, Layer, look, shrink

if TYPE_CHECKING:
    from inkdask.inkmap import InkMap

SIDE = 256  # pixels of a tile on the screen
OVERVIEW = 1024  # pixels: the longest side of an overview
UNKNOWN = 255  # of an ink picture: not computed yet; probabilities are 0 to 254
MOST = 254
KEPT_BYTES = 256 << 20  # of one picture
TILE_BUDGET, OVERVIEW_BUDGET = Budget(48 << 20, 512), Budget(64 << 20, 1024)

_turn = threading.Lock()


class _Picture:
    """A picture of a shape (y, x) in pixels, and the level of its overview."""

    def __init__(self, shape: tuple[int, int]) -> None:
        self.shape, self.whole = shape, Box.at((0, 0), shape)
        self._kept = Kept(KEPT_BYTES)
        # The finest level at which all of it is at most `OVERVIEW` pixels wide and tall.
        self._level = max((max(shape) - 1) // OVERVIEW, 0).bit_length()

    def _box_of(self, level: int, row: int, column: int) -> Box:
        """Pixels of a tile."""
        side = SIDE << level
        return Box.at((row * side, column * side), (side, side)).intersect(self.whole)


class Papyrus(_Picture):
    """Layers of a segment or of a volume, of which the viewer shows one.

    Attributes
    ----------
    numbers
        Numbers of the layers, in the order of their indices.
    corner
        First row and column, in pixels of the files.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        shape: tuple[int, int],
        corner: tuple[int, int],
        open_layer: Callable[[int], Layer],
    ) -> None:
        super().__init__(shape)
        self.numbers = tuple(numbers)
        self.corner, self._open = corner, open_layer
        self._layers: dict[int, Layer] = {}

    @classmethod
    def of_segment(cls, segment: Segment) -> Papyrus:
        """Return the layers of a segment, cropped as it is."""
        corner = segment.box.corner if segment.box else (0, 0)
        return cls(
            segment.layers, segment.shape[1:], corner, lambda i: Layer.of_segment(segment, i)
        )

    @classmethod
    def of_plan(cls, plan: Plan) -> Papyrus:
        """Return the layers that the network of a prediction reads."""
        region, segment = plan.region, plan.segment
        if segment is None:
            return cls(
                range(plan.volume.shape[0]),
                region.shape,
                region.corner,
                lambda index: Layer.of_array(plan.volume[index]),
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
        """Return one of the layers."""
        if index not in self._layers:
            self._layers[index] = self._open(index)
        return self._layers[index]

    def tile(self, index: int, level: int, row: int, column: int) -> np.ndarray:
        """Return a tile of a layer, uint8 (y, x)."""
        box = self._box_of(level, row, column)
        if level >= self._level:
            part = self.overview(index)[_coarser(box, self._level).slices]
            return shrink(part, 1 << (level - self._level))
        layer, box = self.layer(index), box.shift(*self.corner)
        if layer.is_dear(box, TILE_BUDGET):
            return look(layer, box, 1 << level, TILE_BUDGET)
        return shrink(self._read(index, box), 1 << level)

    def overview(self, index: int, budget: Budget = OVERVIEW_BUDGET) -> np.ndarray:
        """Return a whole layer, uint8 (y, x), at most `OVERVIEW` pixels wide and tall."""

        def make() -> np.ndarray:
            box = self.whole.shift(*self.corner)
            return look(self.layer(index), box, 1 << self._level, budget)

        return self._kept.get(("overview", index, budget), make)

    def _read(self, index: int, box: Box) -> np.ndarray:
        """Put a box of a layer together from blocks that are kept."""
        layer = self.layer(index)
        height, width = (unit * -(-SIDE // unit) for unit in layer.unit)
        out = np.empty(box.shape, np.uint8)

        def paste(place: Place) -> None:
            block = Box.at((place[0] * height, place[1] * width), (height, width))
            block = block.intersect(Box.at((0, 0), layer.shape))
            block.paste(self._kept.get((index, *place), lambda: layer.read(block)), out, box)

        # Always use the pool, because a waiting thread must not block another read.
        for_each(
            paste,
            itertools.product(
                range(box.top // height, -(-box.bottom // height)),
                range(box.left // width, -(-box.right // width)),
            ),
        )
        return out


class Ink(_Picture):
    """Picture of what the background of a prediction has computed, or of the spread of opinions.

    Attributes
    ----------
    background
        Runner that computes the chunks.
    observers
        Called, from any thread, with each box that has changed, and with None when the background
        has ended.
    """

    def __init__(self, ink: InkMap, is_spread: bool = False) -> None:
        super().__init__(ink.map.shape)
        self.background, self._is_spread = ink.background, is_spread
        self.observers: list[Callable[[Box | None], None]] = []
        self._region = ink.plan.region
        self._window = ink.blend_mode, ink.gaussian_sigma, ink.plan.family
        self._overview = np.full(_coarser(self.whole, self._level).shape, UNKNOWN, np.uint8)
        self._drawing = threading.Lock()
        self.background.observers.append(self._on_chunk)
        for place in np.argwhere(self.background.known).tolist():
            self._refresh(*place)

    @classmethod
    def of(cls, ink: InkMap, is_spread: bool = False) -> Ink:
        """Return the picture of a prediction, the same for equal predictions of this process."""
        pictures, name = ink.background.attached, (ink.map.name, is_spread)
        with _turn:
            if name not in pictures:
                pictures[name] = cls(ink, is_spread)
            return pictures[name]

    def tile(self, level: int, row: int, column: int) -> np.ndarray:
        """Return a tile, uint8 (y, x): 254 times the probability or twice the spread, or `UNKNOWN`.

        The spread is at most a half.
        """
        box = self._box_of(level, row, column)
        if level < self._level:
            return shrink(self._read(box), 1 << level, UNKNOWN)
        part = self._overview[_coarser(box, self._level).slices]
        return shrink(part, 1 << (level - self._level), UNKNOWN)

    @property
    def overview(self) -> np.ndarray:
        """The whole picture in the values of `tile`, at most `OVERVIEW` pixels wide and tall."""
        return self._overview.copy()

    def _on_chunk(self, place: Place | None) -> None:
        """Show a chunk anew, and those about it, into which its tiles reach."""
        if place is None:
            self._tell(None)
            return
        passes, finest = self.background.passes, self.background.finest
        for row, column in itertools.product(*(range(max(i - 1, 0), i + 2) for i in place)):
            if row >= passes.shape[0] or column >= passes.shape[1] or passes[row, column] < 0:
                continue
            is_before = row < place[0] or column < place[1]
            if passes[row, column] < finest or not is_before:
                self._refresh(row, column)

    def _refresh(self, row: int, column: int) -> None:
        self._kept.drop((row, column))
        box, step = self._pixels_of((row, column)), 1 << self._level
        coarse = _coarser(box, self._level)
        fine = Box(
            *(edge * step for edge in (coarse.top, coarse.bottom, coarse.left, coarse.right))
        )
        with self._drawing:
            part = self._read(fine.intersect(self.whole))
            self._overview[coarse.slices] = shrink(part, step, UNKNOWN)
        self._tell(box)

    def _tell(self, box: Box | None) -> None:
        for observer in list(self.observers):
            observer(box)

    def _pixels_of(self, place: Place) -> Box:
        return self.background.pixels_of(place).inside(self._region.corner).intersect(self.whole)

    def _read(self, box: Box) -> np.ndarray:
        """Put a box together from the chunks that are known."""
        out, known = np.full(box.shape, UNKNOWN, np.uint8), self.background.known
        for place in self.background.chunks_in(box):
            if known[place]:
                pixels = self._kept.get(place, lambda at=place: self._chunk(at))  # type: ignore[misc]
                self._pixels_of(place).paste(pixels, out, box)
        return out

    def _chunk(self, place: Place) -> np.ndarray:
        """Blend a chunk that is known, uint8 (y, x)."""
        runner, pixels = self.background, self.background.pixels_of(place)
        if self._is_spread:
            ink = 2 * spread_stored(runner.grid, place, *self._window[:2])
        else:
            ink = blend_stored(runner.grid, place, int(runner.passes[place]), *self._window)
        shown, _ = pixels.common(self._region)
        return encode(ink[shown])


def encode(ink: np.ndarray) -> np.ndarray:
    """Turn probabilities into the values of a tile, uint8."""
    return np.rint(np.clip(ink, 0, 1) * MOST).astype(np.uint8)


def _coarser(box: Box, level: int) -> Box:
    """Pixels of a coarser level that cover a box."""
    step = 1 << level
    return Box(box.top // step, -(-box.bottom // step), box.left // step, -(-box.right // step))
