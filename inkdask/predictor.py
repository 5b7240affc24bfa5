"""The network of this process: blocks of voxels in, probabilities of tiles out.

A `Network` spec travels in graphs, and `predictor` turns it into a `Predictor` once per process.
One thread of the predictor runs all forward passes and compilations. So the task threads of a Dask
worker read the next blocks meanwhile, and torch's state per thread stays in one place. On a CPU
that thread hands the tiles of a batch to the cores (`SideBySide`).

A block goes to the device once, as bytes, and is unfolded there. Tiles are views until their batch
is gathered.
"""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from inkdask.errors import InkdaskError
from inkdask.memory import give_back
from inkdask.models.fast import (
    CORE_VOXELS,
    Compilation,
    Forward,
    agree,
    forget_compiled,
    is_prepared,
    on_cores,
    prepare,
)
from inkdask.models.hardware import (
    cores,
    device_for,
    fast_float32,
    full_float32,
    is_out_of_memory,
    native_dtype,
    precision_for,
)
from inkdask.specs import Network
from inkdask.storage.counting import count

# Voxels in a batch by default. A GPU takes 256 tiles of 26 layers and 64 x 64 pixels. A core of a
# CPU takes 8 of them, in 4 turns; all cores share a larger tile. A callable on a CPU gets larger
# batches, because a small network loses more time to calls than to the cache.
GPU_VOXELS = 256 * 26 * 64 * 64
CALLABLE_VOXELS = 32 * 26 * 64 * 64
TURNS = 4
CANARY_TILES = 4  # tiles that compare a fast path with the plain network

# Largest difference of probabilities between a fast path and the plain network in float32. On a
# GPU, float32 includes TF32 with its ten bits.
TOLERANCE = {"float32": 0.005, "bfloat16": 0.03, "int8": 0.03}

# Assume that a process will run at most this many times the tiles it ran so far, because it does
# not know the share of other processes.
TRUST = 8

# Time after which to ask again whether compilation repays.
STRETCH_SECONDS = 10.0

MOST_NETWORKS = 4  # in a process; the oldest is dropped

_predictors: dict[Network, Predictor] = {}
_lock = threading.Lock()


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


def measured_pace(network: Network) -> float | None:
    """Return the best time of a tile in this process, in seconds; None before the first tile."""
    known = _predictors.get(replace(network, function=None))
    return known.pace if known else None


class Predictor:
    """A network on its device, with the thread that runs it.

    Parameters
    ----------
    network
        Spec of the network; weights are loaded at the first prediction.

    Attributes
    ----------
    device, dtype
        Device of the network, and dtype of its input.
    precision
        Arithmetic: ``float32``, ``bfloat16`` or ``int8``; empty for a callable.
    batch_size
        Number of tiles in a forward pass; lack of memory halves it for good.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.device = device_for(network)
        self.precision = precision_for(network, self.device)
        # In int8 a network reads float32: its layers quantise.
        self.dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self.batch_size = network.batch_size or self._default_batch()
        self._forward: Any = None  # the network, once it is loaded
        self._plain: Callable[[], nn.Module] | None = None  # returns a packed network unpacked
        self._compiled: Forward | None = None  # for batches of exactly batch_size tiles
        # Not in int8, because its layers read scales, and a compiler would cut the network at each.
        self._may_compile = network.compile and self.precision not in ("", "int8")
        self._tiles_done, self._pace = 0, float("inf")  # best time of a tile, in seconds
        self._lack = ""  # latest message of a device that lacks memory
        self._ahead = threading.Semaphore(2)  # blocks on the device: one runs, one is ready
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inkdask-predictor")

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
            repays. Default: as many as it ran so far.

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
        voxels = torch.from_numpy(np.require(block, requirements=["C", "W"]))
        with self._ahead:
            if self.device.type == "cuda":
                voxels = voxels.pin_memory()  # in this thread, so that the GPU does not wait
            return self._thread.submit(self._predict, voxels, origins, to_come, cores()).result()

    @property
    def pace(self) -> float | None:
        """Best time of a tile so far, in seconds; None before the first tile."""
        return self._pace if self._tiles_done else None

    # All methods below run in the predictor's thread.

    @torch.no_grad()
    def _predict(
        self, voxels: Tensor, origins: np.ndarray, to_come: int | None, threads: int
    ) -> np.ndarray:
        torch.set_num_threads(threads)
        tiles = self._unfold(voxels)
        at = torch.as_tensor(np.asarray(origins, np.int64), device=self.device)
        if self._forward is None:
            # From the middle, because the first tiles of a chunk are often almost empty.
            middle = at[len(at) // 2 :][: min(CANARY_TILES, self.batch_size)]
            self._forward = self._load(self._gather(tiles, middle), threads)
        done = []
        while len(at):
            self._compile_if_it_repays(tiles, at, to_come)
            some, at = at.tensor_split([self._stretch()])
            done.append(self._run_stretch(tiles, some))
        return np.concatenate(done)

    def _stretch(self) -> int:
        """Return the number of tiles until compilation is considered again."""
        batches = STRETCH_SECONDS / (self._pace * self.batch_size) if self._tiles_done else 4
        return self.batch_size * max(1, int(batches))

    def _run_stretch(self, tiles: Tensor, at: Tensor) -> np.ndarray:
        """Return the probabilities (n, k, k) of tiles at ``at``, and record their time."""
        started = time.perf_counter()
        out = torch.empty(len(at), self.network.k, self.network.k, device=self.device)
        done = 0
        while done < len(at):
            logits = self._run(tiles, at[done : done + self.batch_size])
            if logits is None:
                self._halve_batch()
            else:
                out[done : done + len(logits)] = logits.sigmoid()
                done += len(logits)
                count(tiles=len(logits))
        probabilities = out.cpu().numpy()
        if lost := np.count_nonzero(np.isnan(probabilities).any(axis=(1, 2))):
            # An error, because NaN in a stored grid means a tile without data.
            raise InkdaskError(
                f"The network of {self.network.model.key!r} returned NaN for {lost} of {len(at)} "
                "tiles: its weights, or what they make of these layers, are no numbers."
            )
        self._tiles_done += len(at)
        self._pace = min(self._pace, (time.perf_counter() - started) / len(at))
        return probabilities

    def _unfold(self, voxels: Tensor) -> Tensor:
        """Upload a block (z, h, w) and return all its tiles, (h - t + 1, w - t + 1, z, t, t)."""
        voxels = voxels.to(self.device, non_blocking=True)
        t = self.network.tile
        return rearrange(voxels.unfold(1, t, 1).unfold(2, t, 1), "z y x t u -> y x z t u")

    def _gather(self, tiles: Tensor, at: Tensor) -> Tensor:
        """Return a batch of tiles for the network, (b, 1, z, t, t)."""
        x = tiles[at[:, 0], at[:, 1]].float()
        x = x.clamp_(max=self.network.clip).div_(self.network.divisor)
        return x.to(self.dtype)[:, None]

    def _run(self, tiles: Tensor, at: Tensor) -> Tensor | None:
        """Return logits of up to batch_size tiles, float32 (b, k, k); None for lack of memory."""
        b, k = len(at), self.network.k
        forward, size = self._way(b)
        # Copies of the last tile fill a larger batch.
        at = at[torch.arange(size, device=at.device).clamp_(max=b - 1)]
        try:
            logits = torch.as_tensor(forward(self._gather(tiles, at)), device=self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._lack = str(error).partition("\n")[0]
            return None  # without the error, because the error holds on to memory
        if logits.shape != (len(at), 1, k, k):
            raise InkdaskError(
                f"The network of {self.network.model.key!r} returned logits of shape "
                f"{tuple(logits.shape)} for {len(at)} tiles, not {(len(at), 1, k, k)}."
            )
        return logits[:b, 0].float()

    def _way(self, b: int) -> tuple[Forward, int]:
        """Return the forward pass for ``b`` tiles, and the size of their batch."""
        if self._compiled is not None and 2 * b > self.batch_size:
            return self._compiled, self.batch_size
        if self.device.type == "cpu" or self.network.function is not None:
            return self._forward, b
        # Halves of the batch size only, because cuDNN tries its algorithms on every new shape.
        size = self.batch_size
        while size >= 2 * b:
            size //= 2
        return self._forward, size

    def _load(self, x: Tensor, threads: int) -> Forward:
        """Load the network; return its fast path if that agrees with the plain one on tiles x."""
        if self.network.function is not None:
            return self.network.function
        from inkdask.models import weights
        from inkdask.models.int8 import convert
        from inkdask.models.packed import pack_if_it_can

        module: Any = weights.load(self.network).to(self.device)
        int8, tolerance = self.precision == "int8", TOLERANCE[self.precision]
        if self.device.type == "cpu" and not int8 and is_prepared(module, self.dtype):
            return on_cores(module, threads, self._tile_voxels)
        with full_float32():
            expected = on_cores(module, threads, self._tile_voxels)(x.float())
        if int8:
            convert(module, native_dtype(self.device))
        else:
            prepare(module, self.dtype)
            if pack_if_it_can(module):
                self._plain = self._prepared
        fast_float32(self.device)
        let_go_of_file(module)
        if agree(module(x), expected, tolerance):
            return on_cores(module, threads, self._tile_voxels)
        warnings.warn(
            f"The fast path of {self.network.model.key!r} ({self.precision} on {self.device.type}) "
            f"is more than {tolerance} from plain float32, which runs instead.",
            RuntimeWarning,
            stacklevel=2,
        )
        self.dtype, self.precision, self._may_compile = torch.float32, "float32", False
        plain = on_cores(weights.load(self.network).to(self.device), threads, self._tile_voxels)

        def reference(x: Tensor) -> Tensor:
            with full_float32():
                return plain(x.float())

        return reference

    def _prepared(self) -> nn.Module:
        """Return the network without packed layers, because the compiler packs weights itself."""
        from inkdask.models import weights

        module = weights.load(self.network)
        prepare(module, self.dtype)
        let_go_of_file(module)
        return module

    def _default_batch(self) -> int:
        if self.device.type == "cuda":
            return max(1, GPU_VOXELS // self._tile_voxels)
        if self.network.function is not None:
            return max(1, CALLABLE_VOXELS // self._tile_voxels)
        return max(1, cores() * TURNS * (CORE_VOXELS // self._tile_voxels))

    @property
    def _tile_voxels(self) -> int:
        return self.network.layers * self.network.tile**2

    def _compile_if_it_repays(self, tiles: Tensor, at: Tensor, to_come: int | None) -> None:
        if not (self._may_compile and self._tiles_done and isinstance(self._forward, nn.Module)):
            return
        expected = self._tiles_done if to_come is None else min(to_come, TRUST * self._tiles_done)
        compilation = Compilation(self.network, self._forward, self.batch_size, self._plain)
        if compilation.repays(self._pace, expected):
            self._may_compile = False
            at = at[torch.arange(self.batch_size, device=at.device) % len(at)]
            self._compiled = compilation.compile(
                lambda: self._gather(tiles, at), TOLERANCE[self.precision]
            )

    def _halve_batch(self) -> None:
        if self.batch_size == 1:
            raise InkdaskError(
                f"Out of memory: the {self.device.type} device has no room for a single tile of "
                f"{self.network.model.key!r} ({self._lack})."
            )
        self.batch_size = (self.batch_size + 1) // 2
        if self._compiled is not None:
            self._compiled = None  # because it takes batches of the old size only
            forget_compiled()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def let_go_of_file(module: nn.Module) -> None:
    """Copy the weights that are still mapped, because a mapped file counts as memory in full."""
    for kept in (*module.parameters(), *module.buffers()):
        if kept.device.type == "cpu":
            kept.data = kept.data.clone()
    give_back()
