"""Numbers that say how pictures of one place agree; none of them says whether ink is there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import dask
import dask.array as da
import numpy as np
from numpy.typing import NDArray

from inkdask.controls.variants import pictures_of
from inkdask.job import Job
from inkdask.pictures.pyramid import to_uint8


@dataclass(frozen=True)
class Reading:
    """What a variant shows of a place.

    Attributes
    ----------
    grey, spread
        Grey values of ink, and of the spread of opinions (255 is 0.5), uint8 (y, x).
    valid
        Pixels with data, bool (y, x).
    """

    grey: NDArray[np.uint8]
    spread: NDArray[np.uint8]
    valid: NDArray[np.bool_]

    @classmethod
    def of(cls, job: Job) -> Reading:
        """Read the picture of a filled grid."""
        ink, spread, valid = pictures_of(job)
        grey, deviation = (
            da.map_blocks(to_uint8, values, dtype=np.uint8) for values in (ink, spread * 2)
        )
        return cls(*dask.compute(grey, deviation, valid))


def contrast(readings: Sequence[Reading]) -> float:
    """Return the standard deviation of the probabilities among the pixels with data."""
    values = np.concatenate([it.grey[it.valid] for it in readings])
    return float(values.std() / 255) if values.size else 0.0


def agreement(readings: Sequence[Reading]) -> float:
    """Return contrast divided by the spread of opinions (root mean square); 0 without spread."""
    values = np.concatenate([it.spread[it.valid] for it in readings]).astype(float)
    spread = np.sqrt(np.mean(values**2)) / 510 if values.size else 0.0
    return contrast(readings) / float(spread) if spread > 1e-3 else 0.0


def reproduced(of: NDArray[np.uint8], by: NDArray[np.uint8], where: NDArray[np.bool_]) -> float:
    """Return the share of the contrast of one picture that another one reproduces.

    It is the slope of the line through the values of ``by`` over those of ``of``, pixels uint8
    (y, x): 1 for the same picture, 0 for one that does not know of it, and negative where one is
    bright and the other dark.
    """
    a, b = (picture[where].astype(float) for picture in (of, by))
    if not a.size or (variance := a.var()) == 0:
        return 0.0
    return float(((a - a.mean()) * (b - b.mean())).mean() / variance)
