"""Memory of a process: its peak, its limit, and an estimate for a job."""

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

IMPORTS = 600e6  # bytes of a process that has imported everything and loaded a network


def peak_memory() -> int:
    """Return the peak memory of this process so far, in bytes."""
    if sys.platform == "linux":  # getrusage counts the parent's peak too, if that is higher
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory_limit() -> int:
    """Return the memory of this machine, or of this process's container, in bytes."""
    from distributed import system  # imported late, because only whole jobs need it

    return int(system.memory_limit())


def pages(shape: tuple[int, ...]) -> np.ndarray:
    """Return zeros, uint8, whose memory returns to the system as soon as the array is dropped.

    The C library would keep freed memory for the thread that allocated it.
    """
    size = math.prod(shape)
    return np.frombuffer(mmap.mmap(-1, max(size, 1)), np.uint8, size).reshape(shape)


def give_back() -> None:
    """Return freed memory to the system, in milliseconds.

    The C library keeps what each thread has freed: hundreds of megabytes in a long job with many
    threads.
    """
    if (trim := _trim()) is not None:
        trim(0)


@cache
def _trim() -> Any:
    return getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def expected_memory(
    volume: Any, tiling: Tiling, threads: int | None = None, processes: int = 1
) -> float:
    """Estimate the peak memory of a process that reads and computes, in bytes.

    A row of chunks and the blocks that it was read in stay until the last chunk of the row is done.
    Each thread holds a chunk with its halo, or a block as stored and as decoded.

    Parameters
    ----------
    volume
        Dask (z, y, x) in the blocks in which it is read.
    tiling
        Tiles and chunks of the volume.
    threads
        Number of threads of the process. Default: that of a job without a cluster.
    processes
        Number of processes that share a row of chunks.
    """
    depth, height, width = volume.shape
    block = depth * max(volume.chunks[1]) * max(volume.chunks[2])
    rows = min(max(tiling.chunks[0]) + tiling.y.halo + 2 * max(volume.chunks[1]), height)
    chunk = depth * max(tiling.chunks[0]) * max(tiling.chunks[1])
    row = depth * rows * width / processes
    return IMPORTS + row + (threads or engine.threads()) * max(3 * block, chunk)
