"""Work that is queued on a device: uploads, downloads, and marks in its order.

A GPU works while the program goes on. `CudaStream` hides that behind a few calls, and `CpuStream`
answers the same calls where all work is done when a call returns.
"""

from __future__ import annotations

import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class CpuMark:
    """A moment, in seconds."""

    at: float

    def wait(self) -> None:
        """Wait until all work before the mark is done."""

    def since(self, other: CpuMark) -> float:
        """Return the seconds from another mark to this one; both were waited for."""
        return self.at - other.at


class CpuStream:
    """A device whose work is done when a call returns."""

    def upload(self, *arrays: np.ndarray) -> tuple[Tensor, ...]:
        """Begin to copy arrays to the device; from any thread."""
        return tuple(map(torch.from_numpy, arrays))

    def work(self) -> AbstractContextManager[Any]:
        """Queue what is computed within the block on this stream."""
        return nullcontext()

    def receive(self, uploaded: Any) -> tuple[Tensor, ...]:
        """Return what `upload` began, for work that is queued from now on."""
        return uploaded

    def download(self, x: Tensor) -> Tensor:
        """Begin to copy a tensor to the host; it is there at the next mark."""
        return x

    def mark(self) -> Any:
        """Return a mark behind all work so far."""
        return CpuMark(time.perf_counter())


class CudaMark:
    """A place in the work of a GPU."""

    def __init__(self) -> None:
        # Blocking, because waiting threads would otherwise keep a core busy each.
        self.event = torch.cuda.Event(enable_timing=True, blocking=True)
        self.event.record()

    def wait(self) -> None:
        """Wait until all work before the mark is done."""
        self.event.synchronize()

    def since(self, other: CudaMark) -> float:
        """Return the seconds from another mark to this one; both were waited for."""
        return other.event.elapsed_time(self.event) / 1000


class CudaStream(CpuStream):
    """A GPU, with streams of its own for uploads and for the network.

    Uploads do not wait for the network. Nor does CuPy, whose work on the default stream would
    otherwise come after all that is queued.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploads, self._network = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def work(self) -> AbstractContextManager[Any]:
        """Queue what is computed within the block on this stream."""
        return torch.cuda.stream(self._network)

    def upload(self, *arrays: np.ndarray) -> Any:
        """Begin to copy arrays to the device; from any thread."""
        pinned = [torch.from_numpy(array).pin_memory() for array in arrays]
        with torch.cuda.stream(self._uploads):
            there = [array.to(self.device, non_blocking=True) for array in pinned]
            return there, CudaMark()

    def receive(self, uploaded: Any) -> tuple[Tensor, ...]:
        """Return what `upload` began, for work that is queued from now on."""
        there, mark = uploaded
        self._network.wait_event(mark.event)
        for array in there:
            array.record_stream(self._network)  # so that its memory is not used again too early
        return tuple(there)

    def download(self, x: Tensor) -> Tensor:
        """Begin to copy a tensor to the host; it is there at the next mark."""
        return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)

    def mark(self) -> CudaMark:
        """Return a mark behind all work so far."""
        return CudaMark()
