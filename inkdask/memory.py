"""Memory of a process: its peak, its limit, and an estimate for a job."""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from pathlib import Path
from typing import Any

from inkdask import engine
from inkdask.tiling import Tiling

M_MMAP_THRESHOLD = -3  # of mallopt
IMPORTS = 600e6  # bytes of a process that has imported everything and loaded a network
PROBABILITY = 40  # bytes of each while the tiles of a chunk are stored or blended


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


@cache
def map_large_blocks() -> None:
    """Let the C library map every array of 1 MB and more by itself, in this process.

    Such an array goes back to the system when it is dropped. By default the bound grows with the
    arrays, whose memory then stays with the thread that freed them.
    """
    if (mallopt := _of_c_library("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, 1 << 20)


def give_back() -> None:
    """Return freed memory to the system, in milliseconds.

    The C library keeps what each thread has freed: hundreds of megabytes in a long job with many
    threads.
    """
    if (trim := _of_c_library("malloc_trim")) is not None:
        trim(0)


def _of_c_library(name: str) -> Any:
    """Return a function that glibc has, and others lack."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def expected_memory(
    volume: Any, tiling: Tiling, threads: int | None = None, processes: int = 1, k: int = 4
) -> float:
    """Estimate the peak memory of a process that reads and computes, in bytes.

    A row of chunks waits for the row below, whose first pixels are its halo, so two rows are held,
    with blocks that are being cut. Each thread holds a chunk with its halo and the probabilities of
    its tiles, or a block as stored and as decoded.

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
    k
        Side of the probabilities of a tile.
    """
    depth, height, width = volume.shape
    block = depth * max(volume.chunks[1]) * max(volume.chunks[2])
    rows = min(2 * (max(tiling.chunks[0]) + max(volume.chunks[1])), height)
    chunk = depth * max(tiling.chunks[0]) * max(tiling.chunks[1])
    row = depth * rows * width / processes
    tiles = max(tiling.grid_chunks[0]) * max(tiling.grid_chunks[1])
    chunk += PROBABILITY * tiles * k**2
    return IMPORTS + row + (threads or engine.threads()) * max(3 * block, chunk)
