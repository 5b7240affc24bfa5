"""TimeSformer with its wide linear layers in int8, for CPUs with the instructions for it (VNNI).

Such a CPU computes twice as many products of int8 as of bfloat16 in a second. With AMX it is the
other way round: see `hardware.precision_for`. Weights have one scale for each row. Inputs have one
scale for each tile, so that logits do not depend on the other tiles of a batch. Attention and gates
are bfloat16 where the CPU has it. Tokens and norms are float32.

Only the class token leaves the network, so it is kept exact where quantisation costs it most: its
projection after attention has float weights, and its gated values have a scale of their own.

The kernels are oneDNN's, the ones that torch's compiler uses for quantised networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inkdask.models.timesformer import Grid, LastBlock, Rotation, TimeSformer, mix

LIMIT = 127  # values reach from -127 to 127
ZERO = 128  # the byte of value 0, because the kernel reads unsigned bytes
TINY = 1e-30  # smallest scale, for rows and tiles of zeros
WHOLE = 1.5 * 2**23  # above it, float32 holds whole numbers only


def convert(network: TimeSformer, dtype: torch.dtype) -> None:
    """Replace the wide layers of a network by int8 layers, in place.

    Parameters
    ----------
    network
        Network in float32, with its weights. It goes on reading float32.
    dtype
        Dtype between two int8 layers, float32 or bfloat16.
    """
    network.attention_dtype = dtype
    network.to_patch_embedding.to(dtype)
    block: Any
    for block in network.layers:
        time, space, feed_forward = block
        block[0] = Int8Attention(time, dtype)
        if not isinstance(block, LastBlock):  # because the rest of it is for the class token alone
            block[1] = Int8Attention(space, dtype)
            block[2] = Int8FeedForward(feed_forward, dtype)


class Int8Linear(nn.Module):
    """A linear layer of quantised tokens, with an activation.

    Parameters
    ----------
    weight, bias
        Float ``(out, in)`` and ``(out)``; no bias for None.
    dtype
        Dtype of the result.
    activation
        ``none`` or ``gelu``.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, activation: str = "none"
    ) -> None:
        super().__init__()
        self.scales = weight.float().abs().amax(1).clamp_(min=TINY) / LIMIT
        rows = (weight.float() / self.scales[:, None]).round_().to(torch.int8)
        self.weight = torch.ops.onednn.qlinear_prepack(rows, None)
        self.zeros = torch.zeros(len(rows), dtype=torch.int64)
        # A copy, because a slice would keep the whole bias in memory.
        self.bias = None if bias is None else bias.float().clone()
        self.dtype, self.activation = dtype, activation

    def forward(self, values: Tensor, scale: float) -> Tensor:
        """Return ``(tokens, out)`` from the values ``(tokens, in)`` and scale of `quantise_`."""
        return torch.ops.onednn.qlinear_pointwise(
            values, scale, ZERO, self.weight, self.scales, self.zeros, self.bias,
            1.0, 0, self.dtype, self.activation, [], "none",
        )  # fmt: skip

    def add_to_(self, tokens: Tensor, values: Tensor, scale: float) -> None:
        """Add the result to float32 ``(tokens, out)``, in place."""
        torch.ops.onednn.qlinear_pointwise.binary(
            values, scale, ZERO, self.weight, self.scales, self.zeros, tokens, self.bias,
            1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "none",
        )  # fmt: skip


class Int8Attention(nn.Module):
    """A `Residual` of attention with projections in int8."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.heads, self.axis = plain.norm, plain.fn.heads, plain.fn.axis
        self.to_qkv = Int8Linear(plain.fn.to_qkv.weight, None, dtype)
        (self.to_out,) = plain.fn.to_out
        self.to_out_int8 = Int8Linear(self.to_out.weight, self.to_out.bias, torch.float32)

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation) -> Tensor:
        """Add attention to tokens ``(b, t, d)`` in place, and return them."""
        qkv = torch.stack([self.to_qkv(*quantise_(tokens)) for tokens in self.norm(x)])
        mixed = mix(qkv, self.heads, self.axis, grid, rotation).float()
        x[:, :1] += self.to_out(mixed[:, :1])
        for patches, values in zip(x[:, 1:], mixed[:, 1:], strict=True):
            self.to_out_int8.add_to_(patches, *quantise_(values))
        return x


class Int8FeedForward(nn.Module):
    """A `Residual` of a feed-forward in int8, whose kernel activates the gate."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = plain.norm
        expand, _, _, contract = plain.fn.net
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        self.value = Int8Linear(value, value_bias, dtype)
        self.gate = Int8Linear(gate, gate_bias, dtype, "gelu")
        self.contract = Int8Linear(contract.weight, contract.bias, torch.float32)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Add the feed-forward to tokens ``(b, t, d)`` in place, and return them."""
        for tokens in x:
            quantised = quantise_(self.norm(tokens))
            gated = self.gate(*quantised).mul_(self.value(*quantised)).float()
            for some, values in zip(*(t.tensor_split([1]) for t in (tokens, gated)), strict=True):
                self.contract.add_to_(some, *quantise_(values))
        return x


def quantise_(tokens: Tensor) -> tuple[Tensor, float]:
    """Return uint8 values and their scale from float32 tokens of the same, any shape.

    A token is ``(value - ZERO) * scale``. The tokens are overwritten, because another buffer would
    not fit into the cache. The scale of tokens with a NaN is NaN, and so are all results.
    """
    scale = max(tokens.amax().item(), -tokens.amin().item(), TINY) / LIMIT
    # So large a sum is rounded to a whole number, whose last byte is its distance from WHOLE.
    bits = tokens.mul_(1 / scale).add_(WHOLE + ZERO).view(torch.int32)
    return bits.to(torch.int8).view(torch.uint8), scale
