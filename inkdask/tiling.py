"""Where the tiles and the chunks lie: integer maths only, no data.

Along each axis of length L, tiles of side T start at 0, S, 2S, ... and a last one at L - T when
the stride S does not divide (an image smaller than a tile has one tile, zero-padded). Chunks cut
the same axis at multiples of the stride. A tile belongs to the chunk that holds its origin, so
every tile is computed exactly once, whatever the chunking:

    pixels  0        S        2S       3S  ...            edge
    chunk   |------------------ chunk i -------------------|------ chunk i + 1 ---
    tiles   [ 0 ........ T )                               |
                     [ S ........ S + T )                  |
                                             [ edge - S ...|.... halo )

which is why a chunk reads a halo of T - S pixels after its end and none before it, while the
blend of its pixels needs the ceil(T / S) - 1 grid rows before it and none after.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from inkdask.errors import SettingsError


@dataclass(frozen=True)
class Axis:
    """Tiles and chunks along one axis of the image.

    Attributes
    ----------
    length
        Pixels along the axis.
    tile, stride
        Side of a tile and distance of neighbouring tiles, in pixels.
    chunk
        Wanted side of a chunk, in pixels; `step` is the side that is used.
    """

    length: int
    tile: int
    stride: int
    chunk: int

    @cached_property
    def origins(self) -> np.ndarray:
        """First pixel of every tile, ascending, int64 (n,)."""
        last = max(self.length - self.tile, 0)
        regular = np.arange(0, last + 1, self.stride)
        return regular if regular[-1] == last else np.append(regular, last)

    @property
    def passes(self) -> int:
        """Passes from coarse to fine: the first at the largest stride, doubled, within a tile."""
        return (self.tile // self.stride).bit_length()

    @cached_property
    def pass_of_tile(self) -> np.ndarray:
        """The pass in which each tile comes first, int64 (n,).

        The tiles at twice a stride are a subset of those at the stride. The last tile is in the
        first pass, which must reach the border.
        """
        number = np.arange(len(self.origins))
        first = np.full(len(number), self.passes - 1)
        for earlier in range(self.passes - 2, -1, -1):
            first[number % (1 << (self.passes - 1 - earlier)) == 0] = earlier
        first[-1] = 0
        return first

    @property
    def halo(self) -> int:
        """Pixels that a chunk reads after its end."""
        return self.tile - self.stride

    @property
    def depth(self) -> int:
        """Grid rows before a chunk that reach into its pixels."""
        return -(-self.tile // self.stride) - 1

    @property
    def least(self) -> int:
        """Pixels that a chunk has at least: two tiles, so that it owns `depth` grid rows."""
        return 2 * self.tile

    @property
    def step(self) -> int:
        """Distance of neighbouring chunks: the wanted side, rounded up to whole strides."""
        return -(-max(self.chunk, self.least) // self.stride) * self.stride

    @cached_property
    def edges(self) -> np.ndarray:
        """First pixel of every chunk, then the length: int64 (chunks + 1,).

        A remainder that is too short for a chunk of its own stays with the last one. Each edge
        but the last is the origin of a tile.
        """
        whole, rest = divmod(self.length, self.step)
        count = max(whole + (rest >= self.least), 1)
        return np.append(np.arange(count) * self.step, self.length)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Pixels in every chunk."""
        return tuple(np.diff(self.edges).tolist())

    @cached_property
    def rows(self) -> np.ndarray:
        """First grid row of every chunk, then the number of rows: int64 (chunks + 1,)."""
        return np.append(np.searchsorted(self.origins, self.edges[:-1]), len(self.origins))

    @property
    def grid_chunks(self) -> tuple[int, ...]:
        """Tiles owned by every chunk."""
        return tuple(np.diff(self.rows).tolist())

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """First pixel, and pixel after the last, of all tiles that touch ``start`` to ``stop``.

        An axis of just these pixels has the same tiles there.
        """
        origins = self.origins[(self.origins < stop) & (self.origins + self.tile > start)]
        return int(origins[0]), min(int(origins[-1]) + self.tile, self.length)

    def reaching_chunks(self, start: int, stop: int) -> slice:
        """Chunks whose tiles touch pixels ``start`` to ``stop``: also of the one before."""
        first, after = np.searchsorted(self.edges[:-1], (start, stop - 1), "right")
        return slice(max(int(first) - 2, 0), int(after))

    def reading(self, index: int) -> slice:
        """Pixels that the tiles of chunk ``index`` cover: its own and its halo."""
        end = min(int(self.edges[index + 1]) + self.halo, self.length)
        return slice(int(self.edges[index]), end)

    def local_origins(self, index: int) -> np.ndarray:
        """Origins of the tiles that chunk ``index`` owns, counted from its first pixel."""
        return self.origins[self.rows[index] : self.rows[index + 1]] - self.edges[index]

    def reaching_origins(self, index: int) -> np.ndarray:
        """Origins of the tiles that can reach into chunk ``index``, from its first pixel.

        These are its own and the `depth` before them, as the blend's overlap delivers them.
        """
        first = max(self.rows[index] - self.depth, 0)
        return self.origins[first : self.rows[index + 1]] - self.edges[index]


@dataclass(frozen=True)
class Tiling:
    """Tiles and chunks of an image, and of the grid that has one place for each tile.

    Everything follows from six integers, so a run's chunks depend on its settings alone, not on
    the layout of the files; resumed, partitioned and plain runs agree on them.
    """

    y: Axis
    x: Axis

    @classmethod
    def of(
        cls, shape: tuple[int, int], tile: int, stride: int, chunk: int | tuple[int, int]
    ) -> Tiling:
        """Tile an image of ``shape`` (y, x) pixels; ``chunk`` is a side, or height and width.

        Raises
        ------
        SettingsError
            When the stride is larger than the tile: pixels would be left out.
        """
        if not 0 < stride <= tile:
            raise SettingsError(
                f"STRIDE must be between 1 and TILE_SIZE ({tile}), but it is {stride}."
            )
        sides = chunk if isinstance(chunk, tuple) else (chunk, chunk)
        axes = zip(shape, sides, strict=True)
        return cls(*(Axis(int(length), tile, stride, side) for length, side in axes))

    @property
    def tile(self) -> int:
        """Side of a tile in pixels."""
        return self.y.tile

    @property
    def stride(self) -> int:
        """Distance of neighbouring tiles in pixels."""
        return self.y.stride

    @property
    def shape(self) -> tuple[int, int]:
        """Image size (y, x) in pixels."""
        return self.y.length, self.x.length

    @property
    def chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Pixels per chunk along y and x, as Dask writes them."""
        return self.y.chunks, self.x.chunks

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Number of tiles along y and x."""
        return len(self.y.origins), len(self.x.origins)

    @property
    def passes(self) -> int:
        """Passes from coarse to fine; each tile comes in one of them."""
        return self.y.passes

    def tiles_until(self, last: int) -> np.ndarray:
        """Tiles of each chunk in the passes up to ``last``, int64 (rows, columns)."""
        early = (np.add.reduceat(a.pass_of_tile <= last, a.rows[:-1]) for a in (self.y, self.x))
        return np.outer(*early)

    def tiles_there(self, done: np.ndarray) -> np.ndarray:
        """Tiles of chunks that have the passes up to ``done`` (-1: none), both (rows, columns)."""
        until = np.stack([self.tiles_until(last) for last in range(-1, self.passes)])
        return np.take_along_axis(until, done[None] + 1, axis=0)[0]

    def in_passes(self, row: int, column: int, done: int, last: int) -> np.ndarray:
        """Which tiles of a chunk come after pass ``done`` and up to ``last``, bool (gy, gx)."""
        ys, xs = (
            axis.pass_of_tile[axis.rows[index] : axis.rows[index + 1]]
            for axis, index in ((self.y, row), (self.x, column))
        )
        pass_of_tile = np.maximum(ys[:, None], xs[None])
        return (pass_of_tile > done) & (pass_of_tile <= last)

    @property
    def grid_chunks(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Tiles per chunk along y and x."""
        return self.y.grid_chunks, self.x.grid_chunks

    @property
    def block_shape(self) -> tuple[int, int]:
        """Number of chunks along y and x."""
        return len(self.y.chunks), len(self.x.chunks)

    @property
    def tiles(self) -> int:
        """Number of tiles, empty ones included."""
        return self.grid_shape[0] * self.grid_shape[1]
