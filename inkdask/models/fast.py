"""Exact rewrites of a network for inference, and its tiles side by side on the cores of a CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

Forward = Callable[[Tensor], Tensor]

# Voxels that one core of a CPU takes at a time, because their activations fit into its cache. A
# larger tile keeps all cores busy.
CORE_VOXELS = 2 * 26 * 64 * 64


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
    # An instance norm copies its input into the plain layout, and so do all steps around it.
    is_plain = any(isinstance(child, _InstanceNorm) for child in module.modules())
    for weight in _to_convert(module):
        layout = torch.contiguous_format if is_plain else _layout(weight)
        weight.data = weight.data.to(dtype, memory_format=layout)


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
