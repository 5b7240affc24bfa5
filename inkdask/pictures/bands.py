"""The rows of a lazy picture from top to bottom, so that memory does not grow with its height."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import dask.array as da
import numpy as np

from inkdask import engine
from inkdask.progress import Meter

BAND = 320 << 20  # bytes of a band at most: the chunks of a picture 100,000 pixels wide, in colour

T = TypeVar("T")
R = TypeVar("R")


def bands(canvas: da.Array, phase: str, rows: int | None = None) -> Iterator[np.ndarray]:
    """Compute a picture band by band, in the threads of this process, which writes the file.

    Parameters
    ----------
    canvas
        Dask uint8 (y, x) or (y, x, 3).
    phase
        What is being made of it, for the progress.
    rows
        Height of a band. Default: that of a chunk, or less where that is much memory.
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
    """Call a function in some threads, and yield its answers in order.

    Items are taken only a few ahead of the answers.
    """
    ahead = engine.threads() + 1
    waiting: deque[Future[R]] = deque()
    with ThreadPoolExecutor(engine.threads(), "inkdask-encode") as pool:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
