"""The network of this process: blocks of voxels in, probabilities of tiles out.

A `Network` spec travels in graphs, and `predictor` turns it into a `Predictor` once per process.
One thread of the process runs all forward passes and compilations. So the task threads of a Dask
worker read the next blocks meanwhile, and torch's state per thread stays in one place. On a CPU
that thread hands the tiles of a batch to the cores (`SideBySide`).

On a GPU that thread only queues work, and never waits for a result: the thread of the task does.
Two blocks are on the way, so the device always has work:

    thread of the task     pin and upload the block ............ wait, check, return
    predictor's thread                  queue its batches
    the device                                run them, download the probabilities

A block goes to the device once, as bytes. Tiles are cut out of it there, batch by batch. Where
batches are padded, one batch may hold the last tiles of a block and the first of the next.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from queue import SimpleQueue
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inkdask import paces
from inkdask.blending import warm_up
from inkdask.errors import InkdaskError
from inkdask.models.fast import CORE_VOXELS, Forward
from inkdask.models.hardware import (
    cores,
    device_for,
    fast_float32,
    is_out_of_memory,
    precision_for,
)
from inkdask.models.streams import CpuStream, CudaStream
from inkdask.specs import Network
from inkdask.storage.counting import count

log = logging.getLogger("inkdask")

# Voxels in a batch by default. A GPU takes 256 tiles of 26 layers and 64 x 64 pixels. A core of a
# CPU takes 8 of them, in 4 turns; all cores share a larger tile. A callable on a CPU gets larger
# batches, because a small network loses more time to calls than to the cache.
GPU_VOXELS = 256 * 26 * 64 * 64
CALLABLE_VOXELS = 32 * 26 * 64 * 64
TURNS = 4
# A network whose wide maps have every pixel, where others have a sixteenth, needs so much memory
# more: 0.3 GiB a tile in float32.
WIDE = {"ink_hecate_9_6um": 16}
# Axes that are turned around, for each image of a tile.
MIRRORS: dict[str, list[tuple[int, ...]]] = {
    "none": [()],
    "mirror": [(), (-1,), (-2,), (-2, -1)],
}
CANARY_TILES = 4  # tiles that compare a fast path with the plain network

LONG = 60.0  # seconds of uncompiled work above which a network is compiled

# Assume that a process will run at most this many times the tiles that it was given so far, because
# it does not know the share of other processes.
TRUST = 8

AHEAD = 2  # blocks on the device: one runs, one is ready
CUSHION = 4  # batches that the device still has when the last tiles of a block stop waiting
SWITCH_SECONDS = 5e-4  # turn of a thread beside a GPU, whose next work must not wait for Python
THREADS = torch.get_num_threads()  # of the process; new threads take what was set last
MOST_NETWORKS = 4  # in a process; the oldest is dropped

_predictors: dict[Network, Predictor] = {}
_lock = threading.Lock()
# One thread for all networks, because before torch 2.13 CUDA graphs belong to a thread.
_thread = ThreadPoolExecutor(1, thread_name_prefix="inkdask-predictor")


def predictor(network: Network) -> Predictor:
    """Return the predictor of a network in this process; the first call builds it.

    Callables of one digest share a predictor, because every task unpickles a copy of its own.
    """
    key = replace(network, function=None)
    with _lock:
        if key not in _predictors:
            while len(_predictors) >= MOST_NETWORKS:
                del _predictors[next(iter(_predictors))]
            _predictors[key] = Predictor(network)
        return _predictors[key]


@dataclass(eq=False)
class _Block:
    """A block on its way: what its task gave, and what the predictor's thread makes of it.

    Attributes
    ----------
    uploaded
        Voxels uint8 (z, h, w), and origins of tiles int64 (n, 2), from `CpuStream.upload`.
    to_come, threads
        As in `Predictor.predict`; number of torch's threads on a CPU.
    launched
        Probabilities on their way to the host, and the marks before and after all work.
    out, done
        Probabilities float32 (n, k, k) on the device, and the number of tiles queued so far.
    """

    uploaded: Any
    to_come: int | None
    threads: int
    launched: Future[tuple[Tensor, Any, Any]] = field(default_factory=Future)
    voxels: Tensor = field(init=False)
    at: Tensor = field(init=False)
    out: Tensor = field(init=False)
    began: Any = None
    done: int = 0

    @property
    def left(self) -> int:
        """Number of tiles that are not queued yet."""
        return len(self.at) - self.done


class Predictor:
    """A network on its device, and the blocks that are on their way through it.

    Parameters
    ----------
    network
        Spec of the network; weights are loaded at the first prediction.

    Attributes
    ----------
    device
        Device of the network.
    precision
        Arithmetic: ``float32``, ``bfloat16`` or ``int8``; empty for a callable.
    batch_size
        Number of tiles in a forward pass; lack of memory halves it for good.
    pace
        Best time of a tile so far, in seconds; None before the first tile.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.device = device_for(network)
        self.precision = precision_for(network, self.device)
        self.batch_size = network.batch_size or self._default_batch()
        self.pace: float | None = None
        self._form: Any = None  # `models.forms.Form`, once the network is loaded
        self._compiled: Forward | None = None  # for batches of exactly batch_size tiles
        self._lack = ""  # latest message of a device that lacks memory
        on_gpu = self.device.type == "cuda"
        self._may_compile = network.compile and on_gpu and network.function is None
        self._pads = on_gpu and network.function is None
        self._stream = CudaStream(self.device) if on_gpu else CpuStream()
        if on_gpu:
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self._ahead = threading.Semaphore(AHEAD)
        self._coming: SimpleQueue[_Block] = SimpleQueue()
        self._open: list[_Block] = []  # with tiles that are not queued yet
        self._marks: deque[Any] = deque(maxlen=CUSHION)  # after each of the latest batches
        self._given = 0  # tiles of all blocks so far

    def predict(
        self, block: np.ndarray, origins: np.ndarray, to_come: int | None = None
    ) -> np.ndarray:
        """Return the probabilities of tiles of a block.

        Parameters
        ----------
        block
            Voxels, uint8 (z, h, w); z in the order of the network, h and w at least a tile.
        origins
            First row and column of every tile in the block, integers (n, 2).
        to_come
            Most tiles that this process may still run, these included; decides whether compilation
            repays. Default: as many as it was given so far.

        Returns
        -------
        numpy.ndarray
            Probabilities, float32 (n, k, k).
        """
        if len(block) != self.network.layers:
            raise InkdaskError(
                f"Channel mismatch: the volume has {len(block)} layers and the network of "
                f"{self.network.model.key!r} reads {self.network.layers}."
            )
        if len(origins) == 0:
            return np.empty((0, self.network.k, self.network.k), np.float32)
        voxels = np.require(block, requirements=["C", "W"])
        with self._ahead:
            uploaded = self._stream.upload(voxels, np.asarray(origins, np.int64))
            mine = _Block(uploaded, to_come, cores())
            self._coming.put(mine)
            _thread.submit(self._queue_next)
            out, began, ended = mine.launched.result()
            ended.wait()
        probabilities: np.ndarray = out.numpy()
        if lost := np.count_nonzero(np.isnan(probabilities).any(axis=(1, 2))):
            # An error, because NaN in a stored grid means a tile without data.
            raise InkdaskError(
                f"The network of {self.network.model.key!r} returned NaN for {lost} of "
                f"{len(origins)} tiles: its weights, or what they make of these layers, are no "
                "numbers."
            )
        seconds = ended.since(began) / len(origins)
        self.pace = min(self.pace or seconds, seconds)
        paces.record(self.network, seconds)
        return probabilities

    @property
    def runs(self) -> str:
        """What runs, for people: device, arithmetic, form of the network, size of a batch."""
        on = torch.cuda.get_device_name() if self.device.type == "cuda" else "CPU"
        form = "compiled" if self._compiled is not None else self._form.name
        words = (on, self.precision, form, f"batches of {self.batch_size}")
        return ", ".join(filter(None, words))

    # All methods below run in the predictor's thread.

    @torch.no_grad()
    def _queue_next(self) -> None:
        """Queue the tiles of the next block, and leave the last few to the block after it."""
        block = self._coming.get()
        self._open.append(block)
        torch.set_num_threads(block.threads)
        try:
            with fast_float32(self.device), self._stream.work():
                self._begin(block)
                while self._left >= self.batch_size:
                    self._queue_batch()
                if self._left and self._pads and self._marks:
                    self._marks[0].wait()  # now a block that follows is there
                while self._left and (self._coming.empty() or not self._pads):
                    self._queue_batch()
        except BaseException as error:
            for other in self._open:
                other.launched.set_exception(error)
            self._open.clear()
        finally:
            torch.set_num_threads(THREADS)

    @property
    def _left(self) -> int:
        return sum(block.left for block in self._open)

    def _begin(self, block: _Block) -> None:
        """Take a block that is on the device; load the network for the first one."""
        block.voxels, block.at = self._stream.receive(block.uploaded)
        block.uploaded = None
        n, k = len(block.at), self.network.k
        block.out = torch.empty(n, k, k, device=self.device)
        self._given += n
        if self._form is None:
            from inkdask.models import forms

            if self.device.type == "cuda":
                warm_up()
            # From the middle, because the first tiles of a chunk are often almost empty.
            some = block.at[n // 2 :][: min(CANARY_TILES, self.batch_size)]
            self._form = forms.load(self.network, self.device, self.precision, block.voxels, some)
            self.precision = self._form.precision
            self._may_compile &= self._form.name == "plain"
            log.info("%s: %s", self.network.model.key, self.runs)
        block.began = self._stream.mark()

    def _queue_batch(self) -> None:
        """Queue a batch of the open blocks, and the download of blocks that have all tiles."""
        self._compile_if_it_repays()
        pieces, room = [], self.batch_size
        for block in self._open:
            pieces.append((block, block.at[block.done : block.done + room]))
            room -= len(pieces[-1][1])
        pieces = [(block, at) for block, at in pieces if len(at)]
        ink = self._run(pieces, self.batch_size - room)
        if ink is None:
            self._halve_batch()
            return
        for (block, at), some in zip(pieces, ink.split([len(at) for _, at in pieces]), strict=True):
            block.out[block.done : block.done + len(at)] = some
            block.done += len(at)
        count(tiles=len(ink))
        self._marks.append(self._stream.mark())
        for block, _ in pieces:
            if not block.left:
                out, ended = self._stream.download(block.out), self._stream.mark()
                self._open.remove(block)  # last, because a failure is told to all that are open
                block.launched.set_result((out, block.began, ended))

    def _cut(self, block: _Block, at: Tensor) -> Tensor:
        """Return tiles of a block for the network, (b, 1, z, t, t)."""
        spec = self.network
        form = self._form
        return form.gather(block.voxels, at, spec.tile, spec.clip, spec.divisor, form.dtype)

    def _run(self, pieces: list[tuple[_Block, Tensor]], b: int) -> Tensor | None:
        """Return probabilities of ``b`` tiles, float32 (b, k, k); None for lack of memory."""
        forward, size = self._way(b)
        last, at = pieces[-1]
        # Copies of the last tile fill a larger batch.
        rest = at[torch.arange(len(at) + size - b, device=at.device).clamp_(max=len(at) - 1)]
        try:
            parts = [self._cut(*piece) for piece in (*pieces[:-1], (last, rest))]
            x = parts[0] if len(parts) == 1 else torch.cat(parts)
            images = MIRRORS[self.network.tta]
            ink = torch.stack([self._probabilities(forward, x, axes) for axes in images]).mean(0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._lack = str(error).partition("\n")[0]
            return None  # without the error, because the error holds on to memory
        return ink[:b, 0]

    def _probabilities(self, forward: Forward, x: Tensor, axes: tuple[int, ...]) -> Tensor:
        """Return probabilities of a batch, float32 (b, 1, k, k), from its image along ``axes``."""
        k = self.network.k
        logits = torch.as_tensor(forward(x.flip(axes) if axes else x), device=self.device)
        if logits.shape != (len(x), 1, k, k):
            raise InkdaskError(
                f"The network of {self.network.model.key!r} returned logits of shape "
                f"{tuple(logits.shape)} for {len(x)} tiles, not {(len(x), 1, k, k)}."
            )
        return logits.flip(axes).float().sigmoid()

    def _way(self, b: int) -> tuple[Forward, int]:
        """Return the forward pass for ``b`` tiles, and the size of their batch."""
        if self._compiled is not None and 2 * b > self.batch_size:
            return self._compiled, self.batch_size
        if not self._pads:
            return self._form.forward, b
        # Halves of the batch size only, because cuDNN tries its algorithms on every new shape.
        size = self.batch_size
        while size >= 2 * b:
            size //= 2
        return self._form.forward, size

    def _default_batch(self) -> int:
        if self.device.type == "cuda":
            return max(1, GPU_VOXELS // self._tile_voxels)
        if self.network.function is not None:
            return max(1, CALLABLE_VOXELS // self._tile_voxels)
        return max(1, cores() * TURNS * (CORE_VOXELS // self._tile_voxels))

    @property
    def _tile_voxels(self) -> int:
        wide = WIDE.get(self.network.model.architecture, 1)
        return wide * self.network.layers * self.network.tile**2

    def _compile_if_it_repays(self) -> None:
        """Compile the network if the tiles to come take long without; measured once."""
        if not self._may_compile:
            return
        if self.pace is None and len(self._marks) == CUSHION:  # after the first batches
            self._marks[-1].wait()
            seconds = self._marks[-1].since(self._marks[0])
            self.pace = seconds / (CUSHION - 1) / self.batch_size
        block = self._open[0]
        expected = min(block.to_come or self._given, TRUST * self._given)
        if self.pace is None or self.pace * expected < LONG:
            return
        from inkdask.models import compiling

        self._may_compile = False
        at = block.at[torch.arange(self.batch_size, device=block.at.device) % len(block.at)]
        self._compiled = compiling.compiled(self.network, self._form, self._cut(block, at))
        if self._compiled is not None:
            log.info("%s: %s", self.network.model.key, self.runs)

    def _halve_batch(self) -> None:
        if self.batch_size == 1:
            raise InkdaskError(
                f"Out of memory: the {self.device.type} device has no room for a single tile of "
                f"{self.network.model.key!r} ({self._lack})."
            )
        self.batch_size = (self.batch_size + 1) // 2
        if self._compiled is not None:
            from inkdask.models.compiling import forget_compiled

            self._compiled = None  # because it takes batches of the old size only
            forget_compiled()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
