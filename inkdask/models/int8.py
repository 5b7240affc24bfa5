"""TimeSformer with its wide linear layers in int8, for CPUs with the instructions for it (VNNI).

Such a CPU does twice as many products of int8 as of bfloat16 in a second. Weights have one scale
a row, inputs one a tile, so that a tile's logits do not depend on its neighbours in a batch. What
lies between two such layers is bfloat16 where the CPU has it: attention and the gates. Tokens and
norms stay float32.

The class token alone leaves the network, so it is spared where the others cost it most: after
attention it keeps its float weights, and after the gates it has a scale of its own.

The kernels are oneDNN's, from where torch's own compiler takes them for quantised networks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inkdask.models.timesformer import Grid, LastBlock, Rotation, TimeSformer, mix

LIMIT = 127  # values reach from -127 to 127
ZERO = 128  # as which byte 0 is written: the kernel reads bytes without a sign
TINY = 1e-30  # scales nothing but zeros
WHOLE = 1.5 * 2**23  # from where on float32 has whole numbers only


def convert(network: TimeSformer, dtype: torch.dtype) -> None:
    """Put int8 layers in place of the wide ones.

    Parameters
    ----------
    network
        With its weights, in float32; to be changed. It still reads float32.
    dtype
        Of what is between two such layers, float32 or bfloat16.
    """
    network.attention_dtype = dtype
    network.to_patch_embedding.to(dtype)
    block: Any
    for block in network.layers:
        time, space, feed_forward = block
        block[0] = Int8Attention(time, dtype)
        if not isinstance(block, LastBlock):  # the rest of which is for the class token alone
            block[1] = Int8Attention(space, dtype)
            block[2] = Int8FeedForward(feed_forward, dtype)


class Int8Linear(nn.Module):
    """A linear layer of quantised tokens, and the activation after it.

    Parameters
    ----------
    weight, bias
        Float ``(out, in)`` and ``(out)``, or no bias.
    dtype
        Of the result.
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
        self.bias = None if bias is None else bias.float().clone()  # part of a larger one
        self.dtype, self.activation = dtype, activation

    def forward(self, values: Tensor, scale: float) -> Tensor:
        """Return ``(tokens, out)`` of what `quantise_` gave for ``(tokens, in)``."""
        return torch.ops.onednn.qlinear_pointwise(
            values, scale, ZERO, self.weight, self.scales, self.zeros, self.bias,
            1.0, 0, self.dtype, self.activation, [], "none",
        )  # fmt: skip

    def add_to_(self, tokens: Tensor, values: Tensor, scale: float) -> None:
        """Add the same to float32 ``(tokens, out)``, in place."""
        torch.ops.onednn.qlinear_pointwise.binary(
            values, scale, ZERO, self.weight, self.scales, self.zeros, tokens, self.bias,
            1.0, 0, torch.float32, 1.0, 0, "sum", 1.0, "none", [], "none",
        )  # fmt: skip


class Int8Attention(nn.Module):
    """`Residual` of an attention whose projections are in int8."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm, self.heads, self.axis = plain.norm, plain.fn.heads, plain.fn.axis
        self.to_qkv = Int8Linear(plain.fn.to_qkv.weight, None, dtype)
        (self.to_out,) = plain.fn.to_out
        self.to_out_int8 = Int8Linear(self.to_out.weight, self.to_out.bias, torch.float32)

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation) -> Tensor:
        """Return ``x``, ``(b, tokens, d)``, to which attention has been added in place."""
        qkv = torch.stack([self.to_qkv(*quantise_(tokens)) for tokens in self.norm(x)])
        mixed = mix(qkv, self.heads, self.axis, grid, rotation).float()
        x[:, :1] += self.to_out(mixed[:, :1])
        for patches, values in zip(x[:, 1:], mixed[:, 1:], strict=True):
            self.to_out_int8.add_to_(patches, *quantise_(values))
        return x


class Int8FeedForward(nn.Module):
    """`Residual` of a feed-forward in int8; its gate leaves the kernel activated."""

    def __init__(self, plain: Any, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = plain.norm
        expand, _, _, contract = plain.fn.net
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        self.value = Int8Linear(value, value_bias, dtype)
        self.gate = Int8Linear(gate, gate_bias, dtype, "gelu")
        self.contract = Int8Linear(contract.weight, contract.bias, torch.float32)

    def forward(self, x: Tensor, *_: Any) -> Tensor:
        """Return ``x``, ``(b, tokens, d)``, to which the result has been added in place."""
        for tokens in x:
            quantised = quantise_(self.norm(tokens))
            gated = self.gate(*quantised).mul_(self.value(*quantised)).float()
            for some, values in zip(*(t.tensor_split([1]) for t in (tokens, gated)), strict=True):
                self.contract.add_to_(some, *quantise_(values))
        return x


def quantise_(tokens: Tensor) -> tuple[Tensor, float]:
    """Return the bytes of a tile's tokens and their scale: a token is ``(byte - ZERO) * scale``.

    Float32 of any shape to the same in uint8. The tokens are overwritten, for a buffer more would
    leave the cache. The scale of tokens with a NaN is NaN, and with it all results.
    """
    scale = max(tokens.amax().item(), -tokens.amin().item(), TINY) / LIMIT
    # A sum so large is rounded, and the last byte of its bits is what it exceeds WHOLE by.
    bits = tokens.mul_(1 / scale).add_(WHOLE + ZERO).view(torch.int32)
    return bits.to(torch.int8).view(torch.uint8), scale
