"""From bytes to the numbers that a network reads."""

from __future__ import annotations

import torch
from torch import Tensor

PERCENTILES = 0.01, 0.99
TO_DEVIATION = 1.4826  # from the median of absolute deviations of a normal distribution
LEAST = 1e-6  # a spread below this is none


def normalise(x: Tensor, clip: float | None, divisor: float | None) -> Tensor:
    """Return tiles in float32, of bytes ``(b, z, y, x)``; `inkdask.specs.ModelSpec` says how."""
    if divisor is None:
        return robust_mad(x)
    return x.float().clamp_(max=clip).div_(divisor) if clip else x.float().div_(divisor)


def robust_mad(x: Tensor) -> Tensor:
    """Return tiles in units of their own spread about their own median, float32.

    Voxels are clipped to the percentiles 1 and 99 of the tile. The spread is the scaled median of
    absolute deviations. Where that is 0, it is the standard deviation before clipping, else half of
    the distance of the percentiles, else 1. All of it follows from the counts of the 256 values,
    which no voxel needs to be sorted for.

    Parameters
    ----------
    x
        Tiles uint8 ``(b, z, y, x)``, zero padding included.
    """
    flat = x.flatten(1).long()
    n, one = flat.shape[1], torch.ones((), dtype=torch.int64, device=x.device)
    counts = torch.zeros(len(x), 256, dtype=torch.int64, device=x.device)
    counts.scatter_add_(1, flat, one.expand_as(flat))
    values = torch.arange(256, dtype=torch.float64, device=x.device).expand(len(x), 256)
    low, high = (_quantile(values, counts, share, n) for share in PERCENTILES)
    clipped = values.clamp(low, high)
    middle = _quantile(clipped, counts, 0.5, n)
    away, order = (clipped - middle).abs().sort(dim=1)
    deviation = TO_DEVIATION * _quantile(away, counts.gather(1, order), 0.5, n)
    mean = (values * counts).sum(1, keepdim=True) / n
    standard = ((values - mean).square() * counts).sum(1, keepdim=True).div(n).sqrt()
    spread = torch.ones_like(deviation)
    for better in ((high - low) / 2, standard, deviation):
        spread = torch.where(better >= LEAST, better, spread)
    low, high, middle, spread = (
        t.float()[:, :, None, None] for t in (low, high, middle, spread)
    )  # (b, 1, 1, 1)
    return x.float().clamp_(low, high).sub_(middle).div_(spread)


def _quantile(values: Tensor, counts: Tensor, share: float, n: int) -> Tensor:
    """Return quantiles by linear interpolation, ``(b, 1)``.

    ``values`` ascend along ``(b, 256)``; each is there ``counts`` times, and ``n`` times in all.
    """
    place = share * (n - 1)
    below, ends = int(place), counts.cumsum(1)
    a, b = (
        values.gather(1, (ends <= rank).sum(1, keepdim=True))
        for rank in (below, min(below + 1, n - 1))
    )
    return a + (b - a) * (place - below)
