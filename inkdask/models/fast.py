"""Fast inference: exact rewrites of a network, cores side by side, and compilation if it repays.

Compilation takes longer than many jobs, so `Compilation.repays` decides from the number of tiles to
come. It reads a note beside the compiler's cache, in which earlier runs wrote how long compilation
took and how much faster the network became.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

from inkdask.specs import Network

logger = logging.getLogger(__name__)

Forward = Callable[[Tensor], Tensor]

# Voxels that one core of a CPU takes at a time, because their activations fit into its cache. A
# larger tile keeps all cores busy.
CORE_VOXELS = 2 * 26 * 64 * 64

# A compilation must save this many times its cost, because both are estimates.
MARGIN = 2.0


def is_prepared(module: nn.Module, dtype: torch.dtype) -> bool:
    """Whether `prepare` would leave a network as it is."""
    return not has_convolutions(module) and all(w.dtype is dtype for w in _to_convert(module))


def has_convolutions(module: nn.Module) -> bool:
    """Whether a network convolves."""
    return any(isinstance(child, nn.Conv2d | nn.Conv3d) for child in module.modules())


def prepare(module: nn.Module, dtype: torch.dtype) -> None:
    """Rewrite a network in place for inference; its logits stay the same up to rounding.

    Batch norms are folded into the convolutions before them. Weights get the dtype, and those of
    convolutions become channels-last, because cuDNN and oneDNN run these without reordering.
    Buffers and norms stay float32, because they take input of any dtype.
    """
    for parent in module.modules():
        for (name, conv), (norm_name, norm) in pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d | nn.Conv3d) and isinstance(norm, _BatchNorm):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    for weight in _to_convert(module):
        weight.data = weight.data.to(dtype, memory_format=_layout(weight))


def _to_convert(module: nn.Module) -> Iterator[nn.Parameter]:
    for child in module.modules():
        if not isinstance(child, _BatchNorm | nn.LayerNorm):
            yield from child.parameters(recurse=False)


def _layout(weight: Tensor) -> torch.memory_format:
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}  # by number of axes
    return layouts.get(weight.ndim, torch.preserve_format)


class SideBySide(nn.Module):
    """A network that gives each core tiles of its own.

    Cores that share each product instead wait for each other at its end, and small steps leave all
    but one core idle.

    Parameters
    ----------
    module
        The network.
    cores
        Number of parts that run at a time.
    tiles
        Number of tiles in a part.
    """

    def __init__(self, module: nn.Module, cores: int, tiles: int) -> None:
        super().__init__()
        self.module, self.tiles = module, tiles
        self._threads = ThreadPoolExecutor(cores, thread_name_prefix="inkdask-core")

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, k, k)`` of a batch ``(b, 1, z, t, t)``."""
        parts = x.split(self.tiles)
        if len(parts) == 1:
            return self.module(x)
        return torch.cat(list(self._threads.map(self._run, parts)))

    @torch.no_grad()  # because a new thread records gradients
    def _run(self, part: Tensor) -> Tensor:
        torch.set_num_threads(1)
        return self.module(part)


def on_cores(module: nn.Module, cores: int, tile_voxels: int) -> nn.Module:
    """Return the fastest uncompiled form of a network, on its device."""
    tiles = CORE_VOXELS // tile_voxels
    on_cpu = next(module.parameters()).device.type == "cpu"
    # Convolutions stay whole, because those of a whole batch use all cores well.
    if on_cpu and cores > 1 and tiles and not has_convolutions(module):
        return SideBySide(module, cores, tiles)
    return module


def agree(logits: Tensor, others: Tensor, tolerance: float) -> bool:
    """Whether two logits of one shape have the same probabilities within a tolerance."""
    difference = logits.float().sigmoid() - others.float().sigmoid()
    return bool(difference.abs().max() <= tolerance)  # False for NaN


@dataclass(frozen=True)
class Experience:
    """Cost of a compilation in seconds, and gain: how many times faster the network becomes."""

    seconds: float
    gain: float


class Compilation:
    """``torch.compile`` of one network for one batch shape.

    Parameters
    ----------
    network, eager
        The spec, and the network as it runs uncompiled, on its device and in its dtype.
    batch_size
        Number of tiles in every batch.
    plain
        Returns the network for the compiler. Default: ``eager`` without `SideBySide`.
    """

    def __init__(
        self,
        network: Network,
        eager: nn.Module,
        batch_size: int,
        plain: Callable[[], nn.Module] | None = None,
    ) -> None:
        parameter = next(eager.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.network, self.eager, self.batch_size = network, eager, batch_size
        module = eager.module if isinstance(eager, SideBySide) else eager
        self.plain = plain or (lambda: module)
        machine = (
            torch.cuda.get_device_name(self.device)
            if self.device.type == "cuda"
            else torch.backends.cpu.get_cpu_capability()
        )
        architecture = network.model.architecture, network.layers, network.tile
        words = (torch.__version__, machine, *architecture, batch_size, str(self.dtype))
        name = hashlib.sha256(repr((words, network.compile_mode)).encode()).hexdigest()[:16]
        self.note = cache_folder() / f"inkdask-{name}.json"

    def experience(self) -> Experience:
        """Return the note of an earlier run, or a guess without one."""
        try:
            return Experience(**json.loads(self.note.read_text()))
        except (OSError, ValueError, TypeError):
            slow = self.device.type == "cpu" and self.dtype is torch.float32
            return Experience(seconds=60.0, gain=1.1 if slow else 1.4)

    def repays(self, seconds_per_tile: float, tiles_to_come: float) -> bool:
        """Whether compilation saves more than it costs, given the time of an uncompiled tile."""
        known = self.experience()
        saved = seconds_per_tile * tiles_to_come * (1 - 1 / known.gain)
        return saved > MARGIN * known.seconds

    def compile(self, batch: Callable[[], Tensor], tolerance: float) -> Forward | None:
        """Compile for batches like the given one.

        Return None with a warning when compilation fails or changes the probabilities by more than
        ``tolerance``, and None without a warning when the compiled network is no faster.
        """
        compiled = self._compiled(batch, tolerance)
        if compiled is None:
            forget_compiled()
        return compiled

    def _compiled(self, batch: Callable[[], Tensor], tolerance: float) -> Forward | None:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_folder()))
        from torch._dynamo import config
        from torch._inductor import list_mode_options  # seconds to import

        warm = self.note.exists()
        started = time.perf_counter()
        try:
            options = list_mode_options(self.network.compile_mode, dynamic=False)
            if self.device.type == "cpu":
                options["freezing"] = True  # prepacks the weights
            compiled = torch.compile(self.plain(), dynamic=False, options=options)
            x = batch()
            # A higher limit, because beyond it networks of the same class run uncompiled, silently.
            with config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True):
                for other in (x, x.flip(0)):  # the second pass records the CUDA graph
                    compiled(other)
            right = agree(compiled(x), self.eager(x), tolerance)
            seconds = time.perf_counter() - started
            gain = _seconds(self.eager, x) / _seconds(compiled, x)
        except Exception as error:
            warnings.warn(
                f"torch.compile failed for {self.network.model.key!r}; the network runs without: "
                f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        if not right:
            warnings.warn(
                f"torch.compile changes the result for {self.network.model.key!r} by more than "
                f"{tolerance}; the network runs without.",
                RuntimeWarning,
                stacklevel=3,
            )
            return None
        # A quarter, because the next run finds the compiler's cache.
        self._write(Experience(seconds if warm else seconds / 4, gain))
        logger.info("compiled %s in %.0f s: %.2f x", self.network.model.key, seconds, gain)
        return compiled if gain > 1 else None

    def _write(self, experience: Experience) -> None:
        try:
            self.note.parent.mkdir(parents=True, exist_ok=True)
            self.note.write_text(json.dumps(asdict(experience)))
        except OSError as error:  # because a job can do without the note
            logger.debug("cannot write %s: %s", self.note, error)


def forget_compiled() -> None:
    """Free the memory of CUDA graphs, in the thread that ran them.

    All compiled code of the process is dropped. Networks still in use are compiled again from the
    cache.
    """
    if torch.cuda.is_available():
        torch.compiler.reset()


def cache_folder() -> Path:
    """Return the folder that keeps compiled code and notes between runs."""
    if named := os.environ.get("TORCHINDUCTOR_CACHE_DIR"):
        return Path(named)
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(caches) / "inkdask" / "inductor"


def _seconds(forward: Forward, x: Tensor) -> float:
    """Return the shortest time of several forward passes."""

    def once() -> float:
        started = time.perf_counter()
        forward(x).float().sum().item()  # waits for the device
        return time.perf_counter() - started

    return min(once() for _ in range(2 if x.device.type == "cpu" else 8))
