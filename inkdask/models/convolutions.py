"""Convolutions with what follows them, the way the hardware runs them best.

On a GPU in bfloat16, bias, residual sum and ReLU run in the kernel of the convolution or of the
product. Each of them by a kernel of its own would read and write the whole map again. Elsewhere,
and for a compiler, which fuses by itself, these are plain operations. Both ways give the same
result up to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

MOST_ELEMENTS = 2**31  # in a map that cuDNN's fused kernels can address


def conv_relu(x: Tensor, conv: nn.Conv3d, norm: nn.Module) -> Tensor:
    """Return the ReLU of a normed convolution.

    Parameters
    ----------
    x
        Map ``(b, c, z, y, x)``.
    conv, norm
        Convolution with as many outputs as inputs, or of 1x1x1 voxels with stride 1; batch norm, or
        identity once `fast.prepare` has folded it.
    """
    if not _can_fuse(x, conv, norm):
        return F.relu(norm(conv(x)), inplace=True)
    if is_pointwise(conv):
        return _product(x, conv, conv.bias)
    # cuDNN adds a map in any case, and times zero only a finite one is nothing. Memory that was
    # not written yet may hold NaN, so take the input.
    steps = (slice(None, None, step) for step in conv.stride)
    return _fused(x, conv, conv.bias, x[:, :, *steps], 0.0)


def conv_add_relu(
    x: Tensor, conv: nn.Conv3d, norm: nn.Module, plus: Tensor, project: nn.Module
) -> Tensor:
    """Return the ReLU of a normed convolution plus a projected map.

    Parameters
    ----------
    x, plus
        Maps ``(b, c, z, y, x)``.
    conv, norm
        See `conv_relu`.
    project
        Identity, or a convolution and its norm in a row.
    """
    if not _can_fuse(x, conv, norm):
        return F.relu(norm(conv(x)).add_(project(plus)), inplace=True)
    bias: Any = conv.bias
    if isinstance(project, nn.Sequential):
        projection: Any = project[0]
        bias = bias + projection.bias  # so that the projection needs no pass for its own
        plus = _product(plus, projection) if is_pointwise(projection) else _plain(plus, projection)
    return _fused(x, conv, bias, plus, 1.0)


def windows(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return depths as channels: maps ``(b z, d, y, x)`` and a kernel ``(c, d, y, x)``.

    Parameters
    ----------
    x
        Maps ``(b, z, y, x)``. Every depth gets its neighbours as channels, zeros at the ends.
    weight
        Kernel ``(c, depth, y, x)`` of odd depth. It gets zeros, because kernels of a GPU read eight
        channels at a time.
    """
    depth = weight.shape[1]
    more = -depth % 8
    x = F.pad(x, (0, 0, 0, 0, depth // 2, depth // 2 + more)).unfold(1, depth + more, 1)
    weight = F.pad(weight, (0, 0, 0, 0, 0, more)).contiguous(memory_format=torch.channels_last)
    x = rearrange(x, "b z y x d -> (b z) y x d").contiguous()
    return rearrange(x, "n y x d -> n d y x"), weight


def max_over_depth(x: Tensor) -> Tensor:
    """Return ``(b, c, y, x)`` of maps ``(b, c, z, y, x)``, channels-last."""
    return rearrange(rearrange(x, "b c z y x -> b z y x c").amax(1), "b y x c -> b c y x")


def upsample(x: Tensor, size: Sequence[int]) -> Tensor:
    """Return maps ``(b, c, ...)`` of a size by linear interpolation, channels-last.

    Channels-last, because otherwise a GPU gives a thread all channels of an output pixel.
    """
    if x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)
        return F.interpolate(x, size=size, mode="bilinear")
    # Depth by a product, because no kernel of a GPU takes channels-last maps in space.
    b, c, z, y, _ = x.shape
    basis = F.interpolate(torch.eye(z, device=x.device)[None], size=size[0], mode="linear")
    x = basis[0].t().to(x.dtype) @ rearrange(x, "b c z y x -> b z (y x c)")
    x = upsample(rearrange(x, "b z (y x c) -> (b z) c y x", y=y, c=c), size[1:])
    return rearrange(x, "(b z) c y x -> b c z y x", b=b)


class GroupNorm(nn.GroupNorm):
    """A group norm that keeps maps channels-last.

    On a GPU, torch's copies such a map before and after.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return maps ``(b, c, z, y, x)`` of the same shape."""
        if not _has_kernels(x) or torch.compiler.is_compiling():
            return super().forward(x)
        rows = rearrange(x, "b c z y x -> b (z y x) c")  # a view of a channels-last map
        sums = rows.sum(1, dtype=torch.float32)
        squares = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32).square()
        of_groups = partial(reduce, pattern="b (g c) -> b g 1", g=self.num_groups)
        count = rows[0].numel() // self.num_groups
        mean, square = (of_groups(s, reduction="sum") / count for s in (sums, squares))
        scale = (square - mean.square()).clamp_(min=0).add_(self.eps).rsqrt_()
        weight = self.weight.float().view(self.num_groups, -1)
        scale = weight * scale  # (b, g, c)
        shift = self.bias.float().view_as(weight) - mean * scale
        shift, scale = (t.reshape(len(x), -1, 1, 1, 1) for t in (shift, scale))
        return torch.addcmul(shift, x, scale, out=torch.empty_like(x))


def is_pointwise(conv: nn.Conv3d) -> bool:
    """Whether a convolution is a product of every voxel's channels."""
    return {*conv.kernel_size, *conv.stride} == {1}


def _can_fuse(x: Tensor, conv: nn.Conv3d, norm: nn.Module) -> bool:
    """Whether the fused kernels take this map, on this device."""
    return (
        _has_kernels(x)
        and isinstance(norm, nn.Identity)
        and x.numel() // conv.in_channels * max(conv.in_channels, conv.out_channels) < MOST_ELEMENTS
        and not torch.compiler.is_compiling()
    )


def _has_kernels(x: Tensor) -> bool:
    # Only in bfloat16, because GPUs without it have no tensor cores for these kernels.
    return x.is_cuda and x.dtype is torch.bfloat16


def _product(x: Tensor, conv: nn.Conv3d, bias: Tensor | None = None) -> Tensor:
    """Return a pointwise convolution; with a bias, the ReLU of its sum."""
    rows = rearrange(x, "b c z y x -> (b z y x) c")  # a view of a channels-last map
    weight = conv.weight.flatten(1).t()
    y = rows @ weight if bias is None else torch._addmm_activation(bias, rows, weight)
    b, _, *zyx = x.shape
    return y.view(b, *zyx, -1).permute(0, 4, 1, 2, 3)


def _fused(x: Tensor, conv: Any, bias: Tensor | None, plus: Tensor, scale: float) -> Tensor:
    """Return the ReLU of a convolution plus its bias plus a scaled map."""
    return torch.cudnn_convolution_add_relu(
        x, conv.weight, plus, scale, bias, conv.stride, conv.padding, conv.dilation, conv.groups
    )


def _plain(x: Tensor, conv: Any) -> Tensor:
    """Return a convolution without its bias."""
    return F.conv3d(x, conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)
