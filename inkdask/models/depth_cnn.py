"""The network of the demo, which reads ink from the profile of a sheet over depth.

It is small enough to be part of the package and to be trained in minutes without a GPU
(``examples/train_demo.py``). Three convolutions over depth describe the profile around every 4 x 4
pixels. Maximum and mean over depth drop the height of the sheet. Three convolutions in the plane
draw the letters.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange, reduce
from torch import Tensor, nn


class DepthCNN(nn.Module):
    """Convolutions over depth, then in the plane; 81,000 parameters.

    Takes any number of layers, and tiles whose side is a multiple of 4 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(4)  # because a logit stands for 4 x 4 pixels
        self.depth = nn.Sequential(
            *_conv3d(1, 16, depth=7),
            *_conv3d(16, 24, depth=5),
            *_conv3d(24, 32, depth=5),
        )
        self.plane = nn.Sequential(
            *_conv2d(64, 32),
            *_conv2d(32, 32),
            nn.Conv2d(32, 1, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, t / 4, t / 4)`` of tiles ``(b, 1, z, t, t)``."""
        x = self.pool(rearrange(x, "b 1 z y x -> b z y x"))
        x = self.depth(rearrange(x, "b z y x -> b 1 z y x"))
        x = torch.cat([reduce(x, "b c z y x -> b c y x", how) for how in ("max", "mean")], dim=1)
        return self.plane(x)


def _conv3d(inputs: int, outputs: int, depth: int) -> tuple[nn.Module, ...]:
    """Return a convolution of ``depth`` x 3 x 3 voxels that halves the number of layers."""
    conv = nn.Conv3d(
        inputs, outputs, (depth, 3, 3), stride=(2, 1, 1), padding=(depth // 2, 1, 1), bias=False
    )
    return conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)


def _conv2d(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def ink_depth_cnn(layers: int = 26, tile: int = 64, **_: Any) -> DepthCNN:
    """Build the network of the demo, the same for any ``layers`` and ``tile``."""
    return DepthCNN()
