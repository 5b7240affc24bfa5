"""The demo's network: it finds the sheet among the layers and reads ink off its profile.

Small enough to train in minutes without a GPU (``examples/train_demo.py``), and to travel with the
package. Three convolutions over depth describe the sheet's profile around every 4 x 4 pixels; the
maximum and the mean over depth forget at which layer it lay; three in the plane draw the letters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class DepthCNN(nn.Module):
    """Convolutions over depth, then in the plane: 81,000 parameters.

    It takes any number of layers, and tiles whose side is a multiple of 4 pixels.
    """

    def __init__(self) -> None:
        super().__init__()
        self.pool = nn.AvgPool2d(4)  # one logit for 4 x 4 pixels, and a quarter of the noise
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
        """Tiles to logits: (b, 1, z, t, t) float to (b, 1, t / 4, t / 4)."""
        x = self.pool(x.squeeze(1)).unsqueeze(1)  # (b, 1, z, t / 4, t / 4)
        x = self.depth(x)  # (b, 32, z / 8, t / 4, t / 4)
        x = torch.cat([x.amax(dim=2), x.mean(dim=2)], dim=1)  # (b, 64, t / 4, t / 4)
        return self.plane(x)


def _conv3d(inputs: int, outputs: int, depth: int) -> tuple[nn.Module, ...]:
    """See ``depth`` layers and 3 x 3 places at once, and halve the number of layers."""
    conv = nn.Conv3d(
        inputs, outputs, (depth, 3, 3), stride=(2, 1, 1), padding=(depth // 2, 1, 1), bias=False
    )
    return conv, nn.BatchNorm3d(outputs), nn.ReLU(inplace=True)


def _conv2d(inputs: int, outputs: int) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def ink_depth_cnn(layers: int = 26, tile: int = 64, **_: Any) -> DepthCNN:
    """Build the demo's network; it is the same for any ``layers`` and ``tile``."""
    return DepthCNN()
