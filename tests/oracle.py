"""Reference implementation: a sliding window in float64, one tile at a time."""

import numpy as np
import torch
from torch.nn.functional import interpolate

from inkdask.specs import ModelSpec, Network


def naive_map(volume, function, tile=64, stride=16, clip=200.0, divisor=200.0, window=None):
    """Blend ``sigmoid(function(tile))`` over all tiles of a (z, y, x) volume: float64 (y, x)."""
    valid = (volume > 0).any(axis=0)
    height, width = valid.shape
    padded = [(0, max(tile - side, 0)) for side in (height, width)]
    volume = np.pad(volume, [(0, 0), *padded])
    total, weight = np.zeros(volume.shape[1:]), np.zeros(volume.shape[1:])
    if window is None:
        edge = np.sin(np.pi * (np.arange(tile) + 0.5) / tile) ** 2
        window = np.outer(edge, edge)
    for y in origins(volume.shape[1], tile, stride):
        for x in origins(volume.shape[2], tile, stride):
            cut = volume[:, y : y + tile, x : x + tile]
            if not cut.any():
                continue
            pixels = np.minimum(cut.astype(np.float32), clip) / divisor
            with torch.inference_mode():
                logits = function(torch.from_numpy(pixels)[None, None])
            p = torch.sigmoid(torch.as_tensor(logits).double())
            up = interpolate(p, size=(tile, tile), mode="bilinear", align_corners=False)[0, 0]
            total[y : y + tile, x : x + tile] += window * up.numpy()
            weight[y : y + tile, x : x + tile] += window
    blended = np.divide(total, weight, out=np.zeros_like(total), where=weight > 0)
    return np.where(valid, blended[:height, :width], 0)


def origins(length, tile, stride):
    last = max(length - tile, 0)
    return sorted({*range(0, last + 1, stride), last})


def picture(probability):
    """Convert probabilities to the uint8 picture that users get."""
    return np.floor(255 * np.clip(probability, 0, 1)).astype(np.uint8)


def network_of(function, layers, tile=64, k=4, **options):
    """Return the `Network` of a callable, as `inkdask.models.registry.resolve` does."""
    model = ModelSpec(key=getattr(function, "__name__", "function"), architecture="", weights="")
    settings = {"clip": 200.0, "divisor": 200.0, "digest": "test", **options}
    return Network(model, layers=layers, tile=tile, k=k, function=function, **settings)


def papyrus(shape, seed=0, holes=True):
    """Return a volume uint8 (z, y, x) of noise, with a zero corner and a hole."""
    rng = np.random.default_rng(seed)
    volume = rng.integers(1, 256, shape, dtype=np.uint8)
    if holes:
        _, height, width = shape
        y, x = np.ogrid[:height, :width]
        outside = (x / width + y / height) < 0.35
        hole = (abs(y - 0.6 * height) < 0.2 * height) & (abs(x - 0.7 * width) < 0.2 * width)
        volume[:, outside | hole] = 0
    return volume


def depth_slope(x):
    """Logits from the slope of brightness over depth in sixteenths of a tile: (b, 1, 4, 4)."""
    depth = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1, 1)
    return 300 * torch.nn.functional.adaptive_avg_pool2d((x * depth).mean(2), 4)


def assert_same_picture(got, expected, share=1e-4):
    """Check that pictures differ by at most 1, in at most a share of their pixels."""
    difference = np.abs(got.astype(int) - expected)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= share * difference.size
