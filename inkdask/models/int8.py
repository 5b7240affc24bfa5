"""TimeSformer with its wide linear layers in int8, for CPUs with the instructions for it (VNNI).

Such a CPU does twice as many products of int8 as of bfloat16 in a second. Weights have one scale
a row, inputs one a tile, so that a tile's logits do not depend on its neighbours in a batch. What
lies between two such layers is bfloat16 where the CPU has it: attention and the gates. The rest
stays float32: tokens, norms, and what the class token alone goes through.

The kernels are oneDNN's, from where torch's own compiler takes them for quantised networks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from inkdask.models.timesformer import FeedForward, LastBlock, TimeSformer

LIMIT = 127  # values reach from -127 to 127
ZERO = 128  # as which byte 0 is written: the kernel reads bytes without a sign
TINY = 1e-30  # scales nothing but zeros


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
        *attentions, feed_forward = block
        if isinstance(block, LastBlock):
            attentions.pop()  # of the class token
        else:
            feed_forward.fn = Int8FeedForward(feed_forward.fn, dtype)
        for attention in attentions:
            attention.fn.to_qkv = Int8Projection(attention.fn.to_qkv, dtype)
            attention.fn.to_out.to(dtype)


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
        self.bias = None if bias is None else bias.float()
        self.dtype, self.activation = dtype, activation

    def forward(self, values: Tensor, scale: float) -> Tensor:
        """Return ``(tokens, out)`` of what `quantise_` gave for ``(tokens, in)``."""
        return torch.ops.onednn.qlinear_pointwise(
            values, scale, ZERO, self.weight, self.scales, self.zeros, self.bias,
            1.0, 0, self.dtype, self.activation, [], "none",
        )  # fmt: skip


class Int8Projection(nn.Module):
    """An `Int8Linear` of tokens in float32."""

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        super().__init__()
        self.linear = Int8Linear(linear.weight, linear.bias, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, tokens, out)`` from ``(b, tokens, d)``."""
        return tile_by_tile(lambda tokens: self.linear(*quantise_(tokens)), x)


class Int8FeedForward(nn.Module):
    """`FeedForward` in int8; its gate leaves the kernel activated."""

    def __init__(self, plain: FeedForward, dtype: torch.dtype) -> None:
        super().__init__()
        expand: Any = plain.net[0]
        contract: Any = plain.net[3]
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        self.value = Int8Linear(value, value_bias, dtype)
        self.gate = Int8Linear(gate, gate_bias, dtype, "gelu")
        self.contract = Int8Linear(contract.weight, contract.bias, torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, tokens, d)`` from the same."""
        return tile_by_tile(self._of_tile, x)

    def _of_tile(self, tokens: Tensor) -> Tensor:
        quantised = quantise_(tokens)
        return self.contract(*quantise_(self.gate(*quantised).mul_(self.value(*quantised))))


def quantise_(tokens: Tensor) -> tuple[Tensor, float]:
    """Return the bytes of a tile's tokens and their scale: a token is ``(byte - ZERO) * scale``.

    Any shape to the same in uint8. The tokens are overwritten, for a buffer more would leave the
    cache. The scale of tokens with a NaN is NaN, and with it all results.
    """
    low, high = torch.aminmax(tokens)
    scale = max(high.item(), -low.item(), TINY) / LIMIT
    values = tokens.mul_(1 / scale).round_().to(torch.int8)
    return values.view(torch.uint8).bitwise_xor_(ZERO), scale


def tile_by_tile(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return ``(b, tokens, out)``; the function takes ``(tokens, d)`` to ``(tokens, out)``."""
    return function(x[0])[None] if len(x) == 1 else torch.stack([function(tile) for tile in x])
