"""A U-Net in the plane behind a small stem in space, as trained for scans of 9.6 um.

The stem convolves in space and joins, for each of its channels, the mean over depth by attention
and the maximum over depth. The body is a residual U-Net of six resolutions in the manner of nnU-Net
(Isensee et al., Nature Methods 2021, arXiv:1904.08128).

All norms are instance norms without running statistics: the logits of a tile depend on the whole
tile. Logits have the tile's resolution.

Parameters carry the names of the package `vesuvius`, in which checkpoints store every convolution
and norm of the body a second time, under ``all_modules``.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEM = 16  # channels of the stem
WIDTHS = (32, 64, 128, 256, 320, 320)
BLOCKS = (1, 3, 4, 6, 6, 6)
SLOPE = 0.01  # of LeakyReLU


class Hybrid3D2D(nn.Module):
    """Logits of a tile from a picture that its stem makes of the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.depth_fusion = DepthFusion()
        self.network = unet()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, tile, tile)`` of tiles ``(b, 1, layers, tile, tile)``."""
        return self.network(self.depth_fusion(x))


class DepthFusion(nn.Module):
    """Two convolutions in space, then the mean by attention and the maximum over depth."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv3d(1, STEM, 3, padding=1, bias=False),
            nn.InstanceNorm3d(STEM, affine=True),
            nn.LeakyReLU(SLOPE, inplace=True),
            nn.Conv3d(STEM, STEM, 3, padding=1, bias=False),
            nn.InstanceNorm3d(STEM, affine=True),
            nn.LeakyReLU(SLOPE, inplace=True),
        )
        self.attention_logits = nn.Conv3d(STEM, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, 32, y, x)`` of tiles ``(b, 1, z, y, x)``."""
        x = self.features(x)
        weights = self.attention_logits(x).float().softmax(dim=2).to(x.dtype)
        return torch.cat(((x * weights).sum(dim=2), x.amax(dim=2)), dim=1)


def unet() -> nn.Sequential:
    """Return encoder, decoder and head: logits ``(b, 1, y, x)`` of ``(b, 32, y, x)``."""
    heads = nn.Sequential(OrderedDict(ink=nn.Conv2d(WIDTHS[0], 1, 1)))
    return nn.Sequential(
        OrderedDict(shared_encoder=Encoder(), shared_decoder=Decoder(), task_heads=heads)
    )


class Encoder(nn.Module):
    """Six maps, each of half the resolution of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convs(2 * STEM, WIDTHS[0])
        inputs = (WIDTHS[0], *WIDTHS)
        self.stages = nn.ModuleList(
            stage(*shape, stride=1 if number == 0 else 2)
            for number, shape in enumerate(zip(inputs, WIDTHS, BLOCKS, strict=False))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps ``(b, c, y, x)`` of ``(b, 32, y, x)``, the largest first."""
        maps, x = [], self.stem(x)
        for step in self.stages:
            x = step(x)
            maps.append(x)
        return maps


def stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a row of residual blocks, the first of them with the stride."""
    first = Residual(inputs, width, stride)
    row = nn.Sequential(first, *(Residual(width, width) for _ in range(blocks - 1)))
    return nn.Sequential(OrderedDict(blocks=row))


class Residual(nn.Module):
    """Two convolutions 3x3 with norms, added to the input."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv_norm(inputs, width, 3, stride)
        self.conv2 = conv_norm(width, width, 3)
        pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        project = () if inputs == width else (conv_norm(inputs, width, 1),)
        self.skip = nn.Sequential(pool, *project)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width, y, x)``, with y and x divided by the stride."""
        y = F.leaky_relu(self.conv1(x), SLOPE, inplace=True)
        return F.leaky_relu(self.conv2(y) + self.skip(x), SLOPE, inplace=True)


def conv_norm(inputs: int, outputs: int, side: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution and its norm; one of 1x1 pixels has no bias."""
    conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=side > 1)
    return nn.Sequential(OrderedDict(conv=conv, norm=nn.InstanceNorm2d(outputs, affine=True)))


def convs(inputs: int, outputs: int) -> nn.Sequential:
    """Return one convolution 3x3 with norm and LeakyReLU."""
    row = nn.Sequential(conv_norm(inputs, outputs, 3))
    return nn.Sequential(OrderedDict(convs=row, activation=nn.LeakyReLU(SLOPE, inplace=True)))


class Decoder(nn.Module):
    """Five steps from the smallest map to the largest."""

    def __init__(self) -> None:
        super().__init__()
        steps = list(pairwise(WIDTHS[::-1]))
        self.stages = nn.ModuleList(convs(2 * skip, skip) for _, skip in steps)
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose2d(deep, skip, 2, stride=2) for deep, skip in steps
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return ``(b, 32, y, x)`` of the encoder's maps."""
        *skips, x = maps
        for skip, up, join in zip(skips[::-1], self.transpconvs, self.stages, strict=True):
            x = join(torch.cat((up(x), skip), dim=1))
        return x


def ink_hybrid_3d2d(**_: Any) -> Hybrid3D2D:
    """Build the trained size: 34.5 million parameters, the same for any ``layers`` and ``tile``."""
    return Hybrid3D2D()
