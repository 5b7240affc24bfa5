"""How much memory a process has held, may hold, and is expected to hold."""

from __future__ import annotations

import ctypes
import math
import mmap
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from inkdask import engine
from inkdask.tiling import Tiling

IMPORTS = 600e6  # bytes that a process holds with everything imported and a network loaded


def peak_memory() -> int:
    """The most memory this process has held so far, in bytes."""
    if sys.platform == "linux":  # getrusage would tell of the parent, where that held more
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_limit() -> int:
    """Bytes that this machine, or the container that this process is in, has."""
    from distributed import system  # takes a moment, and only whole jobs need it

    return int(system.memory_limit())


def pages(shape: tuple[int, ...]) -> np.ndarray:
    """An array uint8 of zeros whose memory goes back to the system as soon as it is dropped.

    What the C library frees stays with the thread that had it, and no other thread uses it.
    """
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).reshape(shape)


def give_back() -> None:
    """Hand freed memory back to the system; takes milliseconds.

    The C library keeps what each thread has freed, and a job with many threads would seem to need
    a few hundred megabytes more the longer it runs.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def expected_memory(
    volume: Any, tiling: Tiling, threads: int | None = None, processes: int = 1
) -> float:
    """Estimate the most bytes that a process holds while it reads and computes.

    A row of chunks stays until its last chunk is done, with the blocks that it was read in; each
    thread holds a chunk with its halo, or the bytes of a block as stored and as decoded.

    Parameters
    ----------
    volume
        Dask (z, y, x) in the blocks in which it is read.
    tiling
        Its tiles and chunks.
    threads
        Of the process; by default those of a job without a cluster.
    processes
        That share the row of chunks.
    """
    depth, height, width = volume.shape
    block = depth * max(volume.chunks[1]) * max(volume.chunks[2])
    rows = min(max(tiling.chunks[0]) + tiling.y.halo + 2 * max(volume.chunks[1]), height)
    chunk = depth * max(tiling.chunks[0]) * max(tiling.chunks[1])
    row = depth * rows * width / processes
    return IMPORTS + row + (threads or engine.threads()) * max(3 * block, chunk)
