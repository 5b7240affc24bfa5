"""TimeSformer with its wide linear layers in bfloat16 and packed: weights in blocks, for CPUs.

The kernels of a CPU read weights in blocks, and plain weights are put into blocks at every call.
The kernels are oneDNN's, the ones that torch's compiler uses for networks with frozen weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from inkdask.models.hardware import has_packed_bfloat16
from inkdask.models.timesformer import LastBlock, TimeSformer


def pack_if_it_can(network: nn.Module) -> bool:
    """Replace the wide layers of a TimeSformer in bfloat16 by packed layers, in place.

    Layers for the class token alone stay, because packing does not repay for one row.

    Parameters
    ----------
    network
        Network with weights of the dtype in which it will run.

    Returns
    -------
    bool
        False for other networks and dtypes, and on a device without the kernels.
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
    """A linear layer with packed weights and an activation.

    Parameters
    ----------
    weight, bias
        ``(out, in)`` and ``(out)``, in the dtype of the result; no bias for None.
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
    """A `FeedForward` of packed layers, whose kernel activates the gate."""

    def __init__(self, plain: Any) -> None:
        super().__init__()
        expand, _, _, contract = plain.net
        (value, gate), (value_bias, gate_bias) = expand.weight.chunk(2), expand.bias.chunk(2)
        self.value = PackedLinear(value, value_bias)
        self.gate = PackedLinear(gate, gate_bias, "gelu")
        self.contract = PackedLinear(contract.weight, contract.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)`` from the same."""
        x = x.to(self.value.dtype)
        return self.contract(self.gate(x).mul_(self.value(x)))
