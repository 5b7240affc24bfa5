"""Hecate: the canonical network with another end, for scans of 2.4 and of 9.6 um.

The body is ResNet3D-152 with the decoder in space (`inkdask.models.resnet3d`), behind a batch norm
of the input. At its end each voxel gets a logit, and attention over depth weighs the logits of a
column; the canonical network weighs the features instead. A learned number tilts the attention
towards one face of the sheet. Columns without data take no part.

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

MASKED = -1e4  # score of a voxel without data


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

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Return logits ``(b, 1, k, k)`` of tiles ``(b, 1, layers, tile, tile)``.

        Parameters
        ----------
        x
            Tiles; a voxel without data is 0.
        valid
            Voxels with data, bool of the shape of ``x``. Default: all voxels of each column in
            which any layer is not 0. A column without data has the logit 0.
        """
        if valid is None:
            valid = (x != 0).any(2, keepdim=True).expand_as(x)
        read = slice(self.margin, x.shape[2] - self.margin)
        features = self.decoder.features(self.maps(x[:, :, read])).float()  # (b, 64, z, k, k)
        seen = F.max_pool3d(valid[:, :, read].float(), (1, self.pixels, self.pixels))
        logits = per_voxel(features, self.decoder.logit)  # (b, 1, z, k, k)
        scores = per_voxel(features, self.decoder.depth_collapse.attn_conv)
        half = features.shape[2] / 2
        place = torch.arange(features.shape[2], device=x.device).sub(half).div(half)
        scores = scores + self.depth_coordinate_scale.float() * place[:, None, None]
        weights = scores.masked_fill(seen == 0, MASKED).softmax(dim=2) * seen
        weights = weights / weights.sum(2, keepdim=True).clamp(min=1e-8)
        return (weights * logits).sum(2)


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
