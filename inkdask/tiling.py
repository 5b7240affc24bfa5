"""Positions of tiles and chunks: integer maths only, no data.

Along each axis of length L, tiles of side T start at 0, S, 2S, ... and a last one at L - T when
the stride S does not divide (an image smaller than a tile has one tile, zero-padded). Chunks cut
the same axis at multiples of the stride. A tile belongs to the chunk that holds its origin, so
every tile is computed exactly once, whatever the chunking:

    pixels  0        S        2S       3S  ...            edge
    chunk   |------------------ chunk i -------------------|------ chunk i + 1 ---
    tiles   [ 0 ........ T )                               |
                     [ S ........ S + T )                  |
                                             [ edge - S ...|.... halo )

So a chunk reads a halo of T - S pixels after its end and none before it. The blend of its pixels
needs the ceil(T / S) - 1 grid rows before it and none after it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from inkdask.errors import SettingsError

# Side of a chunk in pixels, by default. A GPU runs the tiles of a larger one in the time in which
# the next is read, and shares its last batch with fewer others.
CHUNK, GPU_CHUNK = 1024, 2048


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
        """First pixel of each tile, ascending, int64 (n,)."""
        last = max(self.length - self.tile, 0)
        regular = np.arange(0, last + 1, self.stride)
        return regular if regular[-1] == last else np.append(regular, last)

    @property
    def passes(self) -> int:
        """Number of passes: the first has the largest stride * 2**n that is at most a tile."""
        return (self.tile // self.stride).bit_length()

    @cached_property
    def pass_of_tile(self) -> np.ndarray:
        """First pass that has each tile, int64 (n,).

        The tiles at twice a stride are a subset of those at the stride. The last tile is in the
        first pass, because that pass must reach the border.
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
        """Number of grid rows before a chunk that reach into its pixels."""
        return -(-self.tile // self.stride) - 1

    @property
    def least(self) -> int:
        """Smallest chunk in pixels: two tiles, so that it owns `depth` grid rows."""
        return 2 * self.tile

    @property
    def step(self) -> int:
        """Distance of neighbouring chunks in pixels: the wanted side, in whole strides."""
        return -(-max(self.chunk, self.least) // self.stride) * self.stride

    @cached_property
    def edges(self) -> np.ndarray:
        """First pixel of each chunk, then the length, int64 (chunks + 1,).

        A remainder that is too short for a chunk belongs to the last one. Each edge but the last is
        the origin of a tile.
        """
        whole, rest = divmod(self.length, self.step)
        count = max(whole + (rest >= self.least), 1)
        return np.append(np.arange(count) * self.step, self.length)

    @property
    def chunks(self) -> tuple[int, ...]:
        """Number of pixels of each chunk."""
        return tuple(np.diff(self.edges).tolist())

    @cached_property
    def rows(self) -> np.ndarray:
        """First grid row of each chunk, then the number of rows, int64 (chunks + 1,)."""
        return np.append(np.searchsorted(self.origins, self.edges[:-1]), len(self.origins))

    @property
    def grid_chunks(self) -> tuple[int, ...]:
        """Number of tiles that each chunk owns."""
        return tuple(np.diff(self.rows).tolist())

    def reach(self, start: int, stop: int) -> tuple[int, int]:
        """Return first pixel and end of all tiles that touch the pixels ``start`` to ``stop``.

        An axis of these pixels alone has the same tiles there.
        """
        origins = self.origins[(self.origins < stop) & (self.origins + self.tile > start)]
        return int(origins[0]), min(int(origins[-1]) + self.tile, self.length)

    def reaching_chunks(self, start: int, stop: int) -> slice:
        """Return the chunks whose tiles touch the pixels ``start`` to ``stop``."""
        first, after = np.searchsorted(self.edges[:-1], (start, stop - 1), "right")
        return slice(max(int(first) - 2, 0), int(after))

    def reading(self, index: int) -> slice:
        """Return the pixels that chunk ``index`` reads: its own and its halo."""
        end = min(int(self.edges[index + 1]) + self.halo, self.length)
        return slice(int(self.edges[index]), end)

    def local_origins(self, index: int) -> np.ndarray:
        """Return the origins of the tiles of chunk ``index``, from its first pixel, int64 (n,)."""
        return self.origins[self.rows[index] : self.rows[index + 1]] - self.edges[index]

    def reaching_origins(self, index: int) -> np.ndarray:
        """Return the origins of the tiles that can reach into chunk ``index``, int64 (n,).

        They count from its first pixel: its own tiles and the `depth` before them, which the
        overlap of the blend delivers.
        """
        first = max(self.rows[index] - self.depth, 0)
        return self.origins[first : self.rows[index + 1]] - self.edges[index]


@dataclass(frozen=True)
class Tiling:
    """Tiles and chunks of an image, and of the grid that has one place for each tile.

    All follows from a few integers: a run's chunks depend on its settings alone, not on the layout
    of the files. So resumed, partitioned and plain runs agree on them.
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
        """Pixels per chunk along y and x, in Dask's form."""
        return self.y.chunks, self.x.chunks

    @property
    def grid_shape(self) -> tuple[int, int]:
        """Number of tiles along y and x."""
        return len(self.y.origins), len(self.x.origins)

    @property
    def passes(self) -> int:
        """Number of passes from coarse to fine; each tile is in one pass."""
        return self.y.passes

    def tiles_until(self, last: int) -> np.ndarray:
        """Number of tiles of each chunk in the passes up to ``last``, int64 (rows, columns)."""
        early = (np.add.reduceat(a.pass_of_tile <= last, a.rows[:-1]) for a in (self.y, self.x))
        return np.outer(*early)

    def tiles_there(self, done: np.ndarray) -> np.ndarray:
        """Number of tiles of chunks after pass ``done`` (-1: none), int64 (rows, columns)."""
        until = np.stack([self.tiles_until(last) for last in range(-1, self.passes)])
        return np.take_along_axis(until, done[None] + 1, axis=0)[0]

    def in_passes(self, row: int, column: int, done: int, last: int) -> np.ndarray:
        """Mask of a chunk's tiles after pass ``done`` and up to pass ``last``, bool (gy, gx)."""
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
