"""Blend the tile grid to the ink map: overlap-add as two small matrix products.

After the sigmoid, each step is linear and separable: bilinear upsampling of k x k probabilities to
T x T pixels, the blending window, and the sum over tiles. With u the bilinear basis and w the
window,

    ink[y, x] = sum_{i,a,j,b} By[y, (i,a)] P[i,a,j,b] Bx[x, (j,b)] / weight[y, x]
    weight[y, x] = sum_{i,j} wy[y, i] M[i, j] wx[x, j]

where By[y, (i,a)] = w(y - y_i) u_a(y - y_i), Bx likewise, and M is 1 where a tile ran. Any origin
y_i works, so the last tile touches the border. The windows of other programs are not separable, and
`overlap_add` takes tile after tile. The same code runs on NumPy, and on CuPy where the
process computes on a GPU and CuPy has built its kernels; a task returns NumPy arrays.

The spread of the opinions needs the mean of their squares, too. At a pixel at most two neighbours
u_a and u_b of the basis are not zero, so the square of an opinion is linear in products of
neighbouring probabilities, in the basis u_a^2, 2 u_a u_b: the same overlap-add, with 2k - 1 values
a tile in place of k.
"""

from __future__ import annotations

import importlib.util
import logging
import threading
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import dask.array as da
import numpy as np
from dask.array.overlap import overlap
from einops import rearrange

from inkdask.families import Family
from inkdask.specs import BlendMode
from inkdask.tiling import Axis, Tiling

log = logging.getLogger(__name__)

STRIP = 256  # pixels whose products are made at a time
FLOOR = 1e-6  # least weight of a window whose largest weight is 1

_warming = threading.Lock()  # locked for good by the first `warm_up` of this process
_cupy_is_ready = threading.Event()


def blend(
    grid: da.Array,
    valid: da.Array,
    tiling: Tiling,
    window: BlendMode = "hann",
    sigma: float = 0.0,
    family: Family = Family(),  # noqa: B008  it is frozen
) -> da.Array:
    """Blend tile probabilities to the ink map, a lazy float32 (y, x) in [0, 1].

    Parameters
    ----------
    grid
        Dask float (gy, gx, k, k), NaN where no tile ran; chunked as ``tiling.grid_chunks``.
    valid
        Dask bool (y, x), chunked as ``tiling.chunks``; the map is 0 where it is False.
    tiling
        Places of the tiles.
    window, sigma
        As in `taper`; ``upstream`` is that of the ``family``.
    family
        Rules of the people of the network.
    """
    return _over_chunks(blend_chunk, grid, valid, tiling, window, sigma, family=family)


def spread(
    grid: da.Array, valid: da.Array, tiling: Tiling, window: BlendMode = "hann", sigma: float = 0.0
) -> da.Array:
    """Return the standard deviation of a pixel's opinions, a lazy float32 (y, x) in [0, 0.5].

    The opinions are those of the tiles that hold the pixel, weighted by the blending window as in
    `blend`, whose parameters these are.
    """
    return _over_chunks(spread_chunk, grid, valid, tiling, window, sigma)


def _over_chunks(
    function: Callable[..., np.ndarray],
    grid: da.Array,
    valid: da.Array,
    tiling: Tiling,
    window: BlendMode,
    sigma: float,
    **options: Any,
) -> da.Array:
    before = {
        axis: (along.depth if len(along.chunks) > 1 else 0, 0)
        for axis, along in enumerate((tiling.y, tiling.x))
    }
    reaching = overlap(grid, depth=before, boundary="none", allow_rechunk=False)
    rows, columns = (da.arange(count, chunks=1) for count in tiling.block_shape)
    return da.blockwise(
        function, "yx",
        reaching, "yxab",
        valid, "yx",
        rows, "y",
        columns, "x",
        tiling=tiling,
        window=window,
        sigma=sigma,
        **options,
        adjust_chunks={"y": tiling.chunks[0], "x": tiling.chunks[1]},
        align_arrays=False,
        concatenate=True,
        meta=np.empty((0, 0), np.float32),
    )  # fmt: skip


def blend_chunk(
    grid: np.ndarray,
    valid: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    tiling: Tiling,
    window: BlendMode,
    sigma: float,
    family: Family = Family(),  # noqa: B008  it is frozen
) -> np.ndarray:
    """Blend the pixels of one chunk: float32 (y, x).

    Parameters
    ----------
    grid
        Tiles of the chunk and of the chunks before it that overlap it, (gy, gx, k, k).
    valid
        Pixels of the chunk with data, bool (y, x).
    row, column
        Place of the chunk, int (1,) each.
    """
    if window == "upstream":
        places = tiling.y.reaching_origins(int(row[0])), tiling.x.reaching_origins(int(column[0]))
        return overlap_add(grid, valid, *places, tiling.tile, family)
    y = strips(tiling.y, int(row[0]), grid.shape[-1], window, sigma)
    x = strips(tiling.x, int(column[0]), grid.shape[-1], window, sigma)
    return multiply(grid, valid, y, x)


def multiply(grid: np.ndarray, valid: np.ndarray, y: Strips, x: Strips) -> np.ndarray:
    """Multiply the grid of `blend_chunk` by the matrices of both axes: float32 (y, x)."""
    return _on_device(_products, grid, valid, y, x)


def spread_chunk(
    grid: np.ndarray,
    valid: np.ndarray,
    row: np.ndarray,
    column: np.ndarray,
    tiling: Tiling,
    window: BlendMode,
    sigma: float,
) -> np.ndarray:
    """Return the spread of the pixels of one chunk: float32 (y, x); parameters of `blend_chunk`."""
    window = "hann" if window == "upstream" else window  # which is not separable
    along = [
        strips(axis, int(index[0]), grid.shape[-1], window, sigma, is_squared=is_squared)
        for is_squared in (False, True)
        for axis, index in ((tiling.y, row), (tiling.x, column))
    ]
    return _on_device(_deviation, grid, valid, *along)


def _on_device(function: Callable[..., Any], *arguments: Any) -> np.ndarray:
    """Call a function of ``xp`` and the arguments with CuPy, or with NumPy where that fails."""
    xp = array_library()
    if xp is not np:
        try:
            return np.asarray(function(xp, *arguments).get())
        except Exception as error:  # for example lack of memory
            _cupy_is_ready.clear()
            log.warning("CuPy cannot blend, NumPy does: %s", error)
    return np.asarray(function(np, *arguments))


def _deviation(
    xp: Any, grid: Any, valid: Any, ys: Strips, xs: Strips, squared_ys: Strips, squared_xs: Strips
) -> Any:
    """Return the standard deviation of the opinions, with NumPy or CuPy: float32 (y, x)."""
    P = xp.asarray(grid).astype(xp.float64)
    k = P.shape[-1]
    pairs = xp.zeros((*P.shape[:2], 2 * k - 1, 2 * k - 1), xp.float64)  # products of neighbours
    pairs[..., ::2, ::2] = P * P
    pairs[..., 1::2, ::2] = P[..., :-1, :] * P[..., 1:, :]
    pairs[..., ::2, 1::2] = P[..., :-1] * P[..., 1:]
    across = P[..., :-1, :-1] * P[..., 1:, 1:] + P[..., :-1, 1:] * P[..., 1:, :-1]
    pairs[..., 1::2, 1::2] = across / 2
    mean = _products(xp, P, valid, ys, xs, xp.float64)
    variance = _products(xp, pairs, valid, squared_ys, squared_xs, xp.float64) - mean * mean
    return xp.sqrt(xp.where(variance > 0, variance, 0)).astype(xp.float32)


def _products(
    xp: Any, grid: Any, valid: Any, ys: Strips, xs: Strips, dtype: Any = np.float32
) -> Any:
    """Multiply the grid by the matrices of both axes, with NumPy or CuPy: ``dtype`` (y, x)."""
    grid, valid = xp.asarray(grid), xp.asarray(valid)
    ran = ~xp.isnan(grid[:, :, 0, 0])  # (gy, gx)
    # Multiply in float64, because float32 pictures would differ between processors and libraries.
    P = xp.where(ran[:, :, None, None], grid, 0).astype(xp.float64)
    P = rearrange(P, "gy gx a b -> (gy a) (gx b)")
    k, ran = grid.shape[-1], ran.astype(xp.float64)
    ink = xp.zeros(valid.shape, dtype)
    along_x = [(x, xp.asarray(x.B.T), xp.asarray(x.w.T)) for x in xs]
    for y in ys:
        rows = xp.asarray(y.B) @ P[k * y.tiles.start : k * y.tiles.stop]  # (pixels, gx * k)
        weights = xp.asarray(y.w) @ ran[y.tiles]  # (pixels, gx)
        for x, Bx, wx in along_x:
            total = rows[:, k * x.tiles.start : k * x.tiles.stop] @ Bx
            weight = weights[:, x.tiles] @ wx
            covered = valid[y.pixels, x.pixels] & (weight > 0)
            ink[y.pixels, x.pixels] = xp.where(covered, total / xp.where(covered, weight, 1), 0)
    return ink


def overlap_add(
    grid: np.ndarray, valid: np.ndarray, ys: np.ndarray, xs: np.ndarray, tile: int, family: Family
) -> np.ndarray:
    """Blend a chunk as the people of its network do: float32 (y, x).

    Their window is a symmetric Hann, divided by its maximum and with a floor. Tiles that did not
    run count nowhere; where pixels without data are 0, no such tile touches another pixel.
    """
    along, u = np.hanning(tile), upsampling(tile, grid.shape[-1])
    window = np.outer(along, along)
    window = np.maximum(window / window.max(), family.floor)
    # With a tile of room on each side, because tiles reach beyond the chunk.
    total, weight = np.zeros((2, *(side + 2 * tile for side in valid.shape)))
    for i, j in np.argwhere(~np.isnan(grid[:, :, 0, 0])):
        y, x = ys[i] + tile, xs[j] + tile
        total[y : y + tile, x : x + tile] += window * (u @ grid[i, j] @ u.T)
        weight[y : y + tile, x : x + tile] += window
    total, weight = (a[tile:-tile, tile:-tile] for a in (total, weight))
    covered = (weight > 0) & (valid | (not family.is_masked))
    ink = np.divide(total, weight, out=np.zeros(valid.shape), where=covered)
    return ink.astype(np.float32)


def array_library() -> Any:
    """Return CuPy once it is warm in this process, otherwise NumPy."""
    if not _cupy_is_ready.is_set():
        return np
    import cupy

    return cupy


def warm_up() -> None:
    """Let CuPy blend in this process as soon as it can; call it where a GPU computes.

    On a fresh machine CuPy builds its kernels for 14 s, so a thread does that, once per process.
    Until then NumPy blends, and for good if CuPy is not installed or fails.
    """
    if importlib.util.find_spec("cupy") and _warming.acquire(blocking=False):
        # Not a daemon, because the interpreter ends daemons within CUDA's calls, which may crash.
        threading.Thread(target=_warm_up, name="inkdask-cupy").start()


def _warm_up() -> None:
    """Blend a small chunk with CuPy, which builds all kernels."""
    try:
        import cupy

        tiling = Tiling.of((128, 128), 64, 16, 128)
        for k in (4, 1):  # a single value per tile has kernels of its own
            grid = np.zeros((*tiling.grid_shape, k, k), np.float32)
            along = strips(tiling.y, 0, k, "hann", 0.0)
            valid = np.ones(tiling.shape, bool)
            _products(_UntilExit(cupy), grid, valid, along, along).get()
    except Exception as error:  # for example an old driver
        log.warning("CuPy cannot blend, NumPy does: %s", error)
    else:
        _cupy_is_ready.set()


class _UntilExit:
    """A module that ends its thread when the main thread has ended, at the next use of a name."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        if not threading.main_thread().is_alive():
            raise SystemExit
        return getattr(self._module, name)


class Strip(NamedTuple):
    """Pixels of a chunk along an axis, and the matrices of the tiles that reach them.

    Attributes
    ----------
    pixels, tiles
        Both count from the first of the chunk.
    B, w
        Float64 (pixels, tiles * k) and (pixels, tiles).
    """

    pixels: slice
    tiles: slice
    B: np.ndarray
    w: np.ndarray


Strips = tuple[Strip, ...]


def strips(
    axis: Axis, index: int, k: int, window: BlendMode, sigma: float, is_squared: bool = False
) -> Strips:
    """Return a chunk along an axis in strips; ``is_squared`` is for squares of opinions.

    The matrices of the whole chunk would be zeros for the most part, because few of its tiles
    reach a pixel.
    """
    origins = tuple(axis.reaching_origins(index).tolist())
    return strips_of(
        origins, axis.chunks[index], axis.tile, k, window, sigma, is_squared=is_squared
    )


@lru_cache(maxsize=16)  # few, because all chunks but those at the borders share theirs
def strips_of(
    origins: tuple[int, ...],
    pixels: int,
    tile: int,
    k: int,
    window: BlendMode,
    sigma: float,
    margin: int = 0,
    is_squared: bool = False,
) -> Strips:
    """Return ``pixels`` and tiles at ``origins`` in strips.

    The window is wider than a tile by ``margin`` pixels on either side.
    """
    wide = tile + 2 * margin
    w, u = taper(wide, window, sigma * wide / tile), upsampling(tile, k, margin)
    u = _squared(u) if is_squared else u
    B = np.zeros((pixels, len(origins), u.shape[1]))
    W = np.zeros((pixels, len(origins)))
    for i, origin in enumerate(origins):
        start, stop = max(origin - margin, 0), min(origin + tile + margin, pixels)
        inside = slice(start - origin + margin, stop - origin + margin)
        W[start:stop, i] = w[inside]
        B[start:stop, i] = w[inside, None] * u[inside]
    cut = []
    for start in range(0, pixels, STRIP):
        some = slice(start, min(start + STRIP, pixels))
        reaching = np.flatnonzero(W[some].any(0))  # neighbours, because origins ascend
        tiles = slice(int(reaching[0]), int(reaching[-1]) + 1)
        cut.append(
            Strip(some, tiles, B[some, tiles].reshape(some.stop - start, -1), W[some, tiles])
        )
    return tuple(cut)


def taper(tile: int, window: BlendMode = "hann", sigma: float = 0.0) -> np.ndarray:
    """Weights of a tile's pixels along one axis, float64 (tile,), positive everywhere.

    ``hann`` is sampled at half-pixel offsets, sin^2(pi (n + 1/2) / T). Its ends are positive, so
    the outermost pixels have weight. Its sum is constant at strides T/2, T/4, ...
    ``gaussian`` has standard deviation ``sigma`` pixels; 0 means T / 2.5.
    """
    n = np.arange(tile) + 0.5
    if window == "hann":
        return np.sin(np.pi * n / tile) ** 2
    # Bound the weights from below, because the outermost pixels need a weight.
    return np.maximum(np.exp(-0.5 * ((n - tile / 2) / (sigma or tile / 2.5)) ** 2), FLOOR)


def upsampling(tile: int, k: int, margin: int = 0) -> np.ndarray:
    """Bilinear interpolation from k values to the pixels of a tile, float64 (tile, k).

    With a margin, the pixels before and after the tile too, float64 (tile + 2 * margin, k).

    Equals ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``: the values
    lie at the centres of k equal parts, and pixels beyond the outermost centre take its value.
    """
    position = (np.arange(tile + 2 * margin) - margin + 0.5) * k / tile - 0.5
    return np.stack([np.interp(position, np.arange(k), one) for one in np.eye(k)], axis=1)


def _squared(u: np.ndarray) -> np.ndarray:
    """Return u_a^2 and 2 u_a u_b of neighbours a and b in turn, float64 (tile, 2 k - 1)."""
    both = np.zeros((len(u), 2 * u.shape[1] - 1))
    both[:, ::2], both[:, 1::2] = u**2, 2 * u[:, :-1] * u[:, 1:]
    return both
