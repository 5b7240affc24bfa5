"""TimeSformer's linear layers in bfloat16 as the kernels of a CPU want them: weights in blocks.

Plain weights are put into blocks anew at every call. The kernels are oneDNN's, from where torch's
own compiler takes them for networks whose weights are frozen.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inkdask.models.hardware import has_packed_bfloat16
from inkdask.models.timesformer import LastBlock, TimeSformer


def pack_if_it_can(network: nn.Module) -> bool:
    """Put packed layers in place of the wide ones of a network.

    What the class token alone goes through stays: one row is not worth it.

    Parameters
    ----------
    network
        With weights of the dtype that it will run in; to be changed.

    Returns
    -------
    bool
        Whether it was done: it is a TimeSformer in bfloat16 on a CPU that has the kernels.
    """
    weight = next(network.parameters())
    if not (isinstance(network, TimeSformer) and weight.dtype is torch.bfloat16):
        return False
    if not has_packed_bfloat16(weight.device):
        return False
    block: Any
    for block in network.layers:
        *attentions, feed_forward = block
        if isinstance(block, LastBlock):
            attentions.pop()
        else:
            feed_forward.fn = PackedFeedForward(feed_forward.fn)
        for attention in attentions:
            attention.fn.to_qkv = PackedLinear(attention.fn.to_qkv.weight)
            (to_out,) = attention.fn.to_out
            attention.fn.to_out = PackedLinear(to_out.weight, to_out.bias)
    return True


class PackedLinear(nn.Module):
    """A linear layer and the activation after it.

    Parameters
    ----------
    weight, bias
        ``(out, in)`` and ``(out)``, or no bias; their dtype is that of the result.
    activation
        ``none`` or ``gelu``.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, activation: str = "none"
    ) -> None:
        super().__init__()
        self.dtype, self.bias, self.activation = weight.dtype, bias, activation
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out)`` from ``(..., in)`` of any dtype."""
        return torch.ops.mkldnn._linear_pointwise(
            x.to(self.dtype), self.weight, self.bias, self.activation, [], "none"
        )


class PackedFeedForward(nn.Module):
    """`FeedForward` in packed layers; its gate leaves the kernel activated."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        expand, _, _, contract = plain.net
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        self.value = PackedLinear(value, value_bias)
        self.gate = PackedLinear(gate, gate_bias, "gelu")
        self.contract = PackedLinear(contract.weight, contract.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, tokens, d)`` from the same."""
        x = x.to(self.value.dtype)
        return self.contract(self.gate(x).mul_(self.value(x)))
