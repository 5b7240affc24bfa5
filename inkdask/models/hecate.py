"""Hecate: the canonical network with another end, for scans of 2.4 and of 9.6 um.

The body is ResNet3D-152 with the decoder in space (`inkdask.models.resnet3d`), behind a batch norm
of the input. At its end each voxel gets a logit, and attention over depth weighs the logits of a
column; the canonical network weighs the features instead. A learned number tilts the attention
towards one face of the sheet. A column without data has the logit 0.

At 9.6 um the first convolution is small and keeps every pixel, and there is no pooling: logits have
the tile's resolution. At 2.4 um they have a quarter of it, and the first and last layer are not
read.

Parameters carry the names of the canonical network, which checkpoints have behind the prefix
``canonical.``, beside ``depth_coordinate_scale``.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inkdask.models.resnet3d import Decoder3D, ResNet3D


class Hecate(ResNet3D):
    """Logits of a tile from the logits of its voxels.

    Parameters
    ----------
    pixels
        Pixels a side that a logit speaks for: 4 at 2.4 um, 1 at 9.6 um.
    margin
        Layers at both ends that are not read.
    normalization
        Whether the input passes a batch norm first.
    """

    decoder: Decoder3D

    def __init__(self, pixels: int, margin: int, normalization: bool = True) -> None:
        super().__init__(152, Decoder3D(), normalization)
        if pixels == 1:
            self.conv1 = nn.Conv3d(1, 64, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        self.pixels, self.margin = pixels, margin
        self.depth_coordinate_scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, k, k)`` of tiles ``(b, 1, layers, tile, tile)``.

        A column whose layers are all 0 is one without data.
        """
        read = slice(self.margin, x.shape[2] - self.margin)
        features = self.decoder.features(self.maps(x[:, :, read])).float()  # (b, 64, z, k, k)
        logits = per_voxel(features, self.decoder.logit)  # (b, 1, z, k, k)
        scores = per_voxel(features, self.decoder.depth_collapse.attn_conv)
        half = features.shape[2] / 2
        place = torch.arange(features.shape[2], device=x.device).sub(half).div(half)
        scores = scores + self.depth_coordinate_scale.float() * place[:, None, None]
        has_data = F.max_pool2d((x != 0).any(2).float(), self.pixels)  # (b, 1, k, k)
        return (scores.softmax(dim=2) * logits).sum(2) * has_data


def per_voxel(x: Tensor, conv: Any) -> Tensor:
    """Return a convolution with one output of single voxels, in float32: ``(b, 1, z, y, x)``."""
    weight = conv.weight.float().view(1, -1, 1, 1, 1)
    return F.conv3d(x, weight, conv.bias.float())


def ink_hecate_2_4um(normalization: bool = True, **_: Any) -> Hecate:
    """Build Hecate for scans of 2.4 um."""
    return Hecate(pixels=4, margin=1, normalization=normalization)


def ink_hecate_9_6um(normalization: bool = True, **_: Any) -> Hecate:
    """Build Hecate for scans of 9.6 um."""
    return Hecate(pixels=1, margin=0, normalization=normalization)
