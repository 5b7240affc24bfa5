"""Lazy pictures from top to bottom, in memory that does not grow with their height."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import dask.array as da
import numpy as np

from inkdask import engine
from inkdask.progress import Meter

BAND = 320 << 20  # bytes of a band at most: chunks of a picture 100,000 pixels wide, in colour

T = TypeVar("T")
R = TypeVar("R")


def bands(canvas: da.Array, phase: str, rows: int | None = None) -> Iterator[np.ndarray]:
    """Compute a picture, dask uint8 (y, x) or (y, x, 3), band by band in threads of this process.

    ``phase`` names the progress. ``rows`` is the height of a band; default: that of a chunk, or
    less where that is much memory.
    """
    height, row_bytes = canvas.shape[0], int(np.prod(canvas.shape[1:]))
    rows = rows or max(min(canvas.chunks[0][0], BAND // row_bytes), 1)
    with Meter(phase, height, "rows") as meter:
        for start in range(0, height, rows):
            part = canvas[start : start + rows]
            band = np.empty(part.shape, np.uint8)  # filled in place: held once, not twice
            da.store(part, band, lock=False, scheduler="threads", num_workers=engine.threads())
            yield band
            meter.add(len(band))
            del band  # before the next one is made


def in_order(function: Callable[[T], R], items: Iterable[T]) -> Iterator[R]:
    """Call a function in threads, a few items ahead, and yield its answers in order."""
    ahead = engine.threads() + 1
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(engine.threads(), "inkdask-encode") as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
