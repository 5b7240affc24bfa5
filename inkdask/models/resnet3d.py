"""ResNet3D with a decoder in the plane or in space, as trained for ink detection.

Encoder: Hara, Kataoka and Satoh, "Can Spatiotemporal 3D CNNs Retrace the History of 2D CNNs and
ImageNet?", CVPR 2018 (arXiv:1711.09577), with bottleneck blocks and a first pooling that keeps
depth. Decoder in the plane: the maximum over depth of four maps, joined as in a U-Net
(arXiv:1505.04597). Decoder in space: a residual U-Net with group norms, and attention over depth
at its end.

Parameters of the encoder carry the names of the package 3D-ResNets, which checkpoints have behind
the prefix ``backbone.``. Those of the decoder begin with ``decoder.``. The classifier ``fc`` and
the heads ``aux_head_s1`` and ``aux_head_s2`` are left out, because they serve training alone.

Logits have a quarter of the tile's resolution.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from inkdask.models.convolutions import (
    GroupNorm,
    conv_add_relu,
    conv_relu,
    max_over_depth,
    upsample,
    windows,
)

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}
WIDTHS = (64, 128, 256, 512)
EXPANSION = 4
MAPS = tuple(EXPANSION * width for width in WIDTHS)  # channels of the encoder's four maps


class ResNet3D(nn.Module):
    """Logits of a tile from four maps, each of half the resolution of the one before.

    Parameters
    ----------
    depth
        50, 101 or 152.
    decoder
        Module that takes the maps ``(b, c, z, y, x)`` to logits ``(b, 1, tile / 4, tile / 4)``.
    normalization
        Whether the input passes a batch norm first, as in some checkpoints.
    """

    def __init__(self, depth: int, decoder: nn.Module, normalization: bool = False) -> None:
        super().__init__()
        self.normalization = nn.BatchNorm3d(1) if normalization else nn.Identity()
        self.conv1 = nn.Conv3d(1, 64, 7, stride=(1, 2, 2), padding=3, bias=False)
        self.bn1 = nn.BatchNorm3d(64)
        self.maxpool: nn.Module = nn.MaxPool2d(3, stride=2, padding=1)
        inputs = (64, *MAPS)
        strides = (1, 2, 2, 2)
        self.layer1, self.layer2, self.layer3, self.layer4 = (
            stage(*shape) for shape in zip(inputs, WIDTHS, BLOCKS[depth], strides, strict=False)
        )
        self.decoder = decoder

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, tile / 4, tile / 4)`` of tiles ``(b, 1, layers, tile, tile)``."""
        return self.decoder(self.maps(x))

    def maps(self, x: Tensor) -> list[Tensor]:
        """Return the four maps of tiles ``(b, 1, layers, tile, tile)``."""
        x1 = self.layer1(self.stem(x))  # (b, 256, z, t / 4, t / 4)
        x2 = self.layer2(x1)  # (b, 512, z / 2, t / 8, t / 8)
        x3 = self.layer3(x2)  # (b, 1024, z / 4, t / 16, t / 16)
        x4 = self.layer4(x3)  # (b, 2048, z / 8, t / 32, t / 32)
        return [x1, x2, x3, x4]

    def stem(self, x: Tensor) -> Tensor:
        """Return ``(b, 64, z, t / 4, t / 4)`` of tiles ``(b, 1, z, t, t)``.

        The first convolution has a single channel, for which hardware has no fast kernels. So its
        depths become channels of a convolution in the plane.
        """
        b, conv = len(x), self.conv1
        x, weight = windows(self.normalization(x)[:, 0], conv.weight[:, 0])
        x = F.conv2d(x, weight, stride=conv.stride[1:], padding=conv.padding[1:])
        x = rearrange(x, "(b z) c y x -> b c z y x", b=b)
        x = rearrange(self.bn1(x), "b c z y x -> (b z) c y x")
        # The bias of a folded batch norm and ReLU come last, because a quarter is left to them.
        x = self.maxpool(x)
        if self.conv1.bias is not None:
            x = x.add_(self.conv1.bias[:, None, None])
        return rearrange(F.relu(x, inplace=True), "(b z) c y x -> b c z y x", b=b)


class Bottleneck(nn.Module):
    """Convolutions 1x1x1, 3x3x3 (with the stride) and 1x1x1, added to the input."""

    def __init__(self, inputs: int, width: int, stride: int = 1) -> None:
        super().__init__()
        outputs = EXPANSION * width
        self.conv1 = nn.Conv3d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        self.conv2 = nn.Conv3d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm3d(width)
        self.conv3 = nn.Conv3d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm3d(outputs)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(
                nn.Conv3d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm3d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, 4 width, z, y, x)``, with z, y and x divided by the stride."""
        y = conv_relu(x, self.conv1, self.bn1)
        y = conv_relu(y, self.conv2, self.bn2)
        return conv_add_relu(y, self.conv3, self.bn3, x, self.downsample)


def stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Return a row of bottlenecks, the first of them with the stride."""
    first = Bottleneck(inputs, width, stride)
    return nn.Sequential(first, *(Bottleneck(4 * width, width) for _ in range(blocks - 1)))


class Decoder2D(nn.Module):
    """A U-Net in the plane, of the maximum of each map over depth."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(skip + deep, skip, 3, padding=1, bias=False),
                nn.BatchNorm2d(skip),
                nn.ReLU(inplace=True),
            )
            for skip, deep in pairwise(MAPS)
        )
        self.logit = nn.Conv2d(MAPS[0], 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return ``(b, 1, y, x)`` of the largest map."""
        *skips, x = map(max_over_depth, maps)
        for skip, conv in zip(skips[::-1], self.convs[::-1], strict=True):
            x = upsample(x, skip.shape[2:])
            x = conv(torch.cat((skip, x), dim=1))
        return self.logit(x)


class Decoder3D(nn.Module):
    """A U-Net in space, of maps with fewer channels, and attention over depth at its end."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS) -> None:
        super().__init__()
        self.channel_reduce = nn.ModuleList(
            nn.Sequential(
                nn.Conv3d(channels, width, 1, bias=False),
                GroupNorm(32, width),
                nn.ReLU(inplace=True),
            )
            for channels, width in zip(MAPS, widths, strict=True)
        )
        self.decoder_blocks = nn.ModuleList(
            ResidualBlock(deep + skip, skip) for deep, skip in pairwise(widths[::-1])
        )
        scores = nn.Conv3d(widths[0], 1, 1)
        self.depth_collapse = nn.Sequential(OrderedDict(attn_conv=scores))
        self.logit = nn.Conv2d(widths[0], 1, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Return ``(b, 1, y, x)`` of the largest map."""
        x = self.features(maps)
        weights = self.depth_collapse(x).softmax(dim=2)
        return self.logit((x * weights).sum(dim=2))

    def features(self, maps: list[Tensor]) -> Tensor:
        """Return ``(b, 64, z, y, x)`` of the largest map."""
        *skips, x = (fewer(m) for fewer, m in zip(self.channel_reduce, maps, strict=True))
        for skip, block in zip(skips[::-1], self.decoder_blocks, strict=True):
            x = upsample(x, skip.shape[2:])
            x = block(torch.cat((x, skip), dim=1))
        return x


class ResidualBlock(nn.Module):
    """Two convolutions 3x3x3 with group norms, added to a convolution 1x1x1 of the input."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv3d(inputs, outputs, 3, padding=1, bias=False)
        self.gn1 = GroupNorm(32, outputs)
        self.conv2 = nn.Conv3d(outputs, outputs, 3, padding=1, bias=False)
        self.gn2 = GroupNorm(32, outputs)
        self.shortcut = nn.Conv3d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, outputs, z, y, x)``."""
        y = F.relu(self.gn1(self.conv1(x)), inplace=True)
        return F.relu(self.gn2(self.conv2(y)).add_(self.shortcut(x)), inplace=True)


def ink_resnet3d_50(normalization: bool = False, **_: Any) -> ResNet3D:
    """Build ResNet3D-50 with the decoder in the plane."""
    return ResNet3D(50, Decoder2D(), normalization)


def ink_resnet3d_101(normalization: bool = False, **_: Any) -> ResNet3D:
    """Build ResNet3D-101 with the decoder in the plane."""
    return ResNet3D(101, Decoder2D(), normalization)


def ink_resnet3d_152(normalization: bool = False, **_: Any) -> ResNet3D:
    """Build ResNet3D-152 with the decoder in the plane."""
    return ResNet3D(152, Decoder2D(), normalization)


def ink_resnet3d_152_decoder3d(normalization: bool = False, **_: Any) -> ResNet3D:
    """Build ResNet3D-152 with the decoder in space."""
    return ResNet3D(152, Decoder3D(), normalization)
