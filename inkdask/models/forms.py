"""The forms that a network can take on a device, and the choice of the fastest that is right.

`load` takes the first form that agrees with the plain network in float32 on a few tiles. A form
that fails or differs is left out with a warning, so a job never ends for lack of a fast path.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inkdask.memory import give_back
from inkdask.models import int8, weights
from inkdask.models.fast import Forward, agree, is_prepared, on_cores, prepare
from inkdask.models.hardware import full_float32, native_dtype
from inkdask.models.normalisation import normalise
from inkdask.models.packed import pack_if_it_can
from inkdask.models.timesformer import TimeSformer
from inkdask.specs import Network

# Largest difference of probabilities between a form and the plain network in float32. On a GPU,
# float32 includes TF32 with its ten bits.
TOLERANCE = {"float32": 0.005, "bfloat16": 0.03, "int8": 0.03}

Gather = Callable[..., Tensor]


@dataclass(frozen=True)
class Form:
    """A form of a network.

    Attributes
    ----------
    name
        ``kernels``, ``quantised``, ``plain`` (the network itself in fast arithmetic, which may be
        compiled), ``float32`` or ``function``.
    precision
        Arithmetic: ``float32``, ``bfloat16`` or ``int8``; empty for a callable.
    forward
        Logits (b, 1, k, k) of tiles (b, 1, z, t, t).
    gather
        What cuts the tiles out of a block, as `gather`.
    """

    name: str
    precision: str
    forward: Forward
    gather: Gather

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the tiles; in int8 a network reads float32, because its layers quantise."""
        return torch.bfloat16 if self.precision == "bfloat16" else torch.float32


def gather(
    block: Tensor,
    at: Tensor,
    tile: int,
    clip: float | None,
    divisor: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Cut tiles out of a block, and normalise them.

    Parameters
    ----------
    block
        Voxels, uint8 (z, h, w).
    at
        First row and column of each tile, int64 (b, 2), on the device of the block.
    tile, clip, divisor
        Side of a tile in pixels; as in `Network`.

    Returns
    -------
    Tiles (b, 1, z, tile, tile) of the dtype, rounded from float32.
    """
    tiles = block.unfold(1, tile, 1).unfold(2, tile, 1)  # a view (z, y, x, tile, tile)
    x = tiles.permute(1, 2, 0, 3, 4)[at[:, 0], at[:, 1]]
    return normalise(x, clip, divisor).to(dtype)[:, None]


def load(network: Network, device: torch.device, precision: str, block: Tensor, at: Tensor) -> Form:
    """Load a network in the fastest of its forms that is right on some tiles of a block.

    Parameters
    ----------
    network
        Spec of the network.
    device, precision
        Where it runs, and the arithmetic that is wanted.
    block, at
        As in `gather`.
    """
    if network.function is not None:
        return Form("function", "", network.function, gather)
    spread = partial(
        on_cores, cores=torch.get_num_threads(), tile_voxels=network.layers * network.tile**2
    )
    cut = block, at, network.tile, network.clip, network.divisor
    module: Any = weights.load(network).to(device)
    if device.type == "cpu" and precision != "int8" and is_prepared(module, as_dtype(precision)):
        return Form("plain", precision, spread(module), gather)
    with full_float32():
        expected = spread(module)(gather(*cut, torch.float32))
    for name, build, gather_form in _forms(module, device, precision, spread):
        try:
            cuts = gather if network.clip is None else gather_form  # a kernel clips and divides
            form = Form(name, precision, build(module), cuts)
            let_go_of_file(module)
            if agree(form.forward(form.gather(*cut, form.dtype)), expected, TOLERANCE[precision]):
                return form
            said = f"is more than {TOLERANCE[precision]} from plain float32"
        except Exception as error:
            said = f"failed ({first_line(error)})"
        warnings.warn(
            f"The fast path of {network.model.key!r} ({name}, {precision} on {device.type}) "
            f"{said}; a plainer one runs instead.",
            RuntimeWarning,
            stacklevel=2,
        )
        module = weights.load(network).to(device)  # because a form rewrites it in place
    plain = spread(module)

    def in_float32(x: Tensor) -> Tensor:
        with full_float32():
            return plain(x)

    return Form("float32", "float32", in_float32, gather)


def _forms(
    network: nn.Module, device: torch.device, precision: str, spread: Callable[[Any], nn.Module]
) -> Iterator[tuple[str, Callable[[Any], nn.Module], Gather]]:
    """List forms, fastest first: name, function that rewrites a network in place, gather."""

    def quantised(module: Any) -> nn.Module:
        int8.convert(module, native_dtype(device))
        return spread(module)

    def fused(module: Any) -> nn.Module:
        prepare(module, torch.bfloat16)
        return kernels.FusedTimeSformer(module)

    def plain(module: Any) -> nn.Module:
        prepare(module, as_dtype(precision))
        pack_if_it_can(module)
        return spread(module)

    if precision == "int8":
        yield "quantised", quantised, gather
        return
    if isinstance(network, TimeSformer) and device.type == "cuda" and precision == "bfloat16":
        try:
            from inkdask.models import kernels
        except ImportError:  # Triton comes with most builds of torch for a GPU
            pass
        else:
            yield "kernels", fused, kernels.gather
    yield "plain", plain, gather


def as_dtype(precision: str) -> torch.dtype:
    """Return the dtype of ``float32`` or ``bfloat16``."""
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def let_go_of_file(module: nn.Module) -> None:
    """Copy the weights that are still mapped, because a mapped file counts as memory in full."""
    for kept in (*module.parameters(), *module.buffers()):
        if kept.device.type == "cpu":
            kept.data = kept.data.clone()
    give_back()


def first_line(error: Exception) -> str:
    """Return the type and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
