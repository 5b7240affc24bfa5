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
        self.network = UNet()

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


class UNet(nn.Module):
    """Encoder, decoder and the head of the one task."""

    def __init__(self) -> None:
        super().__init__()
        self.shared_encoder = Encoder()
        self.task_heads = nn.ModuleDict({"ink": nn.Conv2d(WIDTHS[0], 1, 1)})
        self.shared_decoder = Decoder()

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, y, x)`` of ``(b, 32, y, x)``."""
        return self.task_heads["ink"](self.shared_decoder(self.shared_encoder(x)))


class Encoder(nn.Module):
    """Six maps, each of half the resolution of the one before."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = Convs(2 * STEM, WIDTHS[0])
        inputs = (WIDTHS[0], *WIDTHS)
        self.stages = nn.ModuleList(
            Stage(*shape, stride=1 if number == 0 else 2)
            for number, shape in enumerate(zip(inputs, WIDTHS, BLOCKS, strict=False))
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        """Return the maps ``(b, c, y, x)`` of ``(b, 32, y, x)``, the largest first."""
        maps, x = [], self.stem(x)
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class Stage(nn.Module):
    """A row of residual blocks, the first of them with the stride."""

    def __init__(self, inputs: int, width: int, blocks: int, stride: int) -> None:
        super().__init__()
        first = Residual(inputs, width, stride)
        self.blocks = nn.Sequential(first, *(Residual(width, width) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width, y, x)``, with y and x divided by the stride."""
        return self.blocks(x)


class Residual(nn.Module):
    """Two convolutions 3x3 with norms, added to the input."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, width, 3, stride)
        self.conv2 = ConvNorm(width, width, 3)
        pool = nn.AvgPool2d(2) if stride == 2 else nn.Identity()
        project = () if inputs == width else (ConvNorm(inputs, width, 1),)
        self.skip = nn.Sequential(pool, *project)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, width, y, x)``, with y and x divided by the stride."""
        y = F.leaky_relu(self.conv1(x), SLOPE, inplace=True)
        return F.leaky_relu(self.conv2(y) + self.skip(x), SLOPE, inplace=True)


class ConvNorm(nn.Module):
    """A convolution and its norm; one of 1x1 pixels has no bias."""

    def __init__(self, inputs: int, outputs: int, side: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, side, stride, side // 2, bias=side > 1)
        self.norm = nn.InstanceNorm2d(outputs, affine=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, outputs, y, x)``, with y and x divided by the stride."""
        return self.norm(self.conv(x))


class Convs(nn.Module):
    """One convolution 3x3 with norm and LeakyReLU."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.convs = nn.Sequential(ConvNorm(inputs, outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, outputs, y, x)`` of ``(b, inputs, y, x)``."""
        return F.leaky_relu(self.convs(x), SLOPE, inplace=True)


class Decoder(nn.Module):
    """Five steps from the smallest map to the largest."""

    def __init__(self) -> None:
        super().__init__()
        steps = list(pairwise(WIDTHS[::-1]))
        self.stages = nn.ModuleList(Convs(2 * skip, skip) for _, skip in steps)
        self.transpconvs = nn.ModuleList(
            nn.ConvTranspose2d(deep, skip, 2, stride=2) for deep, skip in steps
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return ``(b, 32, y, x)`` of the encoder's maps."""
        *skips, x = maps
        for skip, up, stage in zip(skips[::-1], self.transpconvs, self.stages, strict=True):
            x = stage(torch.cat((up(x), skip), dim=1))
        return x


def ink_hybrid_3d2d(**_: Any) -> Hybrid3D2D:
    """Build the trained size: 34.5 million parameters, the same for any ``layers`` and ``tile``."""
    return Hybrid3D2D()
