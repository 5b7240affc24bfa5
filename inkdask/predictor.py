"""The process's own network: blocks of voxels in, probabilities of tiles out.

A `Network` spec travels in graphs; `predictor` turns it into a `Predictor` once per process. One
thread of the predictor's own runs every forward pass (and every compilation), so the task threads
of a Dask worker read and decode the next blocks meanwhile, and all of torch's per-thread state
stays in one place. On a CPU it hands the tiles of a batch to the cores (`SideBySide`).

A block goes to the device once, as bytes, and is unfolded there: a tile is a view until its batch
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

# Voxels in a batch when the user names no batch size: as many as fill a GPU; for each core of a CPU
# what it takes in some turns, or a single tile that all cores share. With 26 layers of 64 x 64
# pixels: 256 tiles, or 8 a core. A callable on a CPU is taken for a small network, which loses less
# to the cache than to many calls.
GPU_VOXELS = 256 * 26 * 64 * 64
CALLABLE_VOXELS = 32 * 26 * 64 * 64
TURNS = 4
CANARY_TILES = 4  # on which a fast path must agree with the plain network

# How far probabilities of a fast path may be from those of the plain network in float32. On a GPU
# float32 includes TF32, with its ten bits.
TOLERANCE = {"float32": 0.005, "bfloat16": 0.03, "int8": 0.03}

# A process is believed to run up to this many times the tiles it ran so far: of a job's tiles, no
# process knows how many go to others.
TRUST = 8

# How often to look at the clock and ask whether compiling repays.
STRETCH_SECONDS = 10.0

MOST_NETWORKS = 4  # kept by a process; the oldest goes

_predictors: dict[Network, Predictor] = {}
_lock = threading.Lock()


def predictor(network: Network) -> Predictor:
    """Return this process's predictor of a network; the first call builds it.

    A callable counts as the same network when its digest is the same: every task brings its own
    unpickled copy.
    """
    key = replace(network, function=None)
    with _lock:
        if key not in _predictors:
            while len(_predictors) >= MOST_NETWORKS:  # a notebook tries many
                del _predictors[next(iter(_predictors))]
            _predictors[key] = Predictor(network)
        return _predictors[key]


def measured_pace(network: Network) -> float | None:
    """Seconds a tile at the best pace that this process has seen; None where it ran none."""
    known = _predictors.get(replace(network, function=None))
    return known.pace if known else None


class Predictor:
    """A network on its device, with the thread that runs it.

    Parameters
    ----------
    network
        What to run; weights are loaded at the first prediction.

    Attributes
    ----------
    device, dtype
        Where the network runs, and the dtype of what it reads.
    precision
        Of its arithmetic: a dtype's name, or int8; empty for a function, which has its own.
    batch_size
        Tiles in a forward pass; running out of memory halves it for good.
    """

    def __init__(self, network: Network) -> None:
        self.network = network
        self.device = device_for(network)
        self.precision = precision_for(network, self.device)
        # In int8 a network reads float32: its layers quantise.
        self.dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        self.batch_size = network.batch_size or self._default_batch()
        self._forward: Any = None  # the network, once it is loaded
        self._plain: Callable[[], nn.Module] | None = None  # gives it unpacked, where it is packed
        self._compiled: Forward | None = None  # the same for batches of exactly batch_size tiles
        # Layers in int8 read scales on the way; a compiler would cut the network at each.
        self._may_compile = network.compile and self.precision not in ("", "int8")
        self._tiles_done, self._pace = 0, float("inf")  # the best pace, in seconds a tile
        self._lack = ""  # of memory, as the device said it last
        self._ahead = threading.Semaphore(2)  # blocks in hand: one that runs, one that is ready
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="inkdask-predictor")

    def predict(
        self, block: np.ndarray, origins: np.ndarray, to_come: int | None = None
    ) -> np.ndarray:
        """Return the probabilities of tiles of a block.

        Parameters
        ----------
        block
            Voxels, uint8 (z, h, w), z in the order in which the network reads the layers; h and
            w are at least a tile.
        origins
            Integers (n, 2): first row and column of every tile inside the block.
        to_come
            At most how many tiles this process will still run, these included; decides whether
            compiling repays. By default as many as it ran so far.

        Returns
        -------
        numpy.ndarray
            Probabilities, float32 (n, k, k).

        Raises
        ------
        InkdaskError
            The block has another number of layers than the network, the network returns another
            shape than it should, or memory does not suffice for a single tile.
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
                voxels = voxels.pin_memory()  # here, so that the GPU need not wait for it
            return self._thread.submit(self._predict, voxels, origins, to_come, cores()).result()

    @property
    def pace(self) -> float | None:
        """Seconds a tile at the best pace so far."""
        return self._pace if self._tiles_done else None

    # What follows runs in the predictor's thread.

    @torch.no_grad()
    def _predict(
        self, voxels: Tensor, origins: np.ndarray, to_come: int | None, threads: int
    ) -> np.ndarray:
        torch.set_num_threads(threads)
        tiles = self._unfold(voxels)
        at = torch.as_tensor(np.asarray(origins, np.int64), device=self.device)
        if self._forward is None:
            # The first tiles of a chunk are more often than others almost empty.
            middle = at[len(at) // 2 :][: min(CANARY_TILES, self.batch_size)]
            self._forward = self._load(self._gather(tiles, middle), threads)
        done = []
        while len(at):
            self._compile_if_it_repays(tiles, at, to_come)
            some, at = at.tensor_split([self._stretch()])
            done.append(self._run_stretch(tiles, some))
        return np.concatenate(done)

    def _stretch(self) -> int:
        """Return a number of tiles after which to look at the clock again."""
        batches = STRETCH_SECONDS / (self._pace * self.batch_size) if self._tiles_done else 4
        return self.batch_size * max(1, int(batches))

    def _run_stretch(self, tiles: Tensor, at: Tensor) -> np.ndarray:
        """Return the probabilities (n, k, k) of tiles at ``at``, and note the time they take."""
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
            # In a stored grid NaN is a tile without data: it would be black, and nobody told.
            raise InkdaskError(
                f"The network of {self.network.model.key!r} returned NaN for {lost} of {len(at)} "
                "tiles: its weights, or what they make of these layers, are no numbers."
            )
        self._tiles_done += len(at)
        self._pace = min(self._pace, (time.perf_counter() - started) / len(at))
        return probabilities

    def _unfold(self, voxels: Tensor) -> Tensor:
        """Upload a block (z, h, w) and view all its tiles, (h - t + 1, w - t + 1, z, t, t)."""
        voxels = voxels.to(self.device, non_blocking=True)
        t = self.network.tile
        return rearrange(voxels.unfold(1, t, 1).unfold(2, t, 1), "z y x t u -> y x z t u")

    def _gather(self, tiles: Tensor, at: Tensor) -> Tensor:
        """Return a batch as the network reads it, (b, 1, z, t, t)."""
        x = tiles[at[:, 0], at[:, 1]].float()
        x = x.clamp_(max=self.network.clip).div_(self.network.divisor)
        return x.to(self.dtype)[:, None]

    def _run(self, tiles: Tensor, at: Tensor) -> Tensor | None:
        """Return logits of up to batch_size tiles, float32 (b, k, k); None for want of memory."""
        b, k = len(at), self.network.k
        forward, size = self._way(b)
        # The last tile, again and again, fills a batch that must be larger.
        at = at[torch.arange(size, device=at.device).clamp_(max=b - 1)]
        try:
            logits = torch.as_tensor(forward(self._gather(tiles, at)), device=self.device)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            self._lack = str(error).partition("\n")[0]
            return None  # without the error, which holds on to memory
        if logits.shape != (len(at), 1, k, k):
            raise InkdaskError(
                f"The network of {self.network.model.key!r} returned logits of shape "
                f"{tuple(logits.shape)} for {len(at)} tiles, not {(len(at), 1, k, k)}."
            )
        return logits[:b, 0].float()

    def _way(self, b: int) -> tuple[Forward, int]:
        """Return what ``b`` tiles run through, and the size of their batch."""
        if self._compiled is not None and 2 * b > self.batch_size:
            return self._compiled, self.batch_size  # the one shape it knows
        if self.device.type == "cpu" or self.network.function is not None:
            return self._forward, b
        # cuDNN tries its algorithms on every new shape, so there are few: the batch size, its
        # half, its quarter, ...
        size = self.batch_size
        while size >= 2 * b:
            size //= 2
        return self._forward, size

    def _load(self, x: Tensor, threads: int) -> Forward:
        """Load the network and take the fast path, if it agrees with the plain one on tiles x."""
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
        """Return the network once more, for the compiler, which packs weights itself."""
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
            self._may_compile = False  # once is enough
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
            self._compiled = None  # it knows the old size only, and keeps memory for it
            forget_compiled()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def let_go_of_file(module: nn.Module) -> None:
    """Copy the weights that are still mapped from their file, all of which counts as our memory."""
    for kept in (*module.parameters(), *module.buffers()):
        if kept.device.type == "cpu":
            kept.data = kept.data.clone()
    give_back()
