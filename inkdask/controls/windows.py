"""A few small windows of a segment that are full of papyrus."""

from __future__ import annotations

import numpy as np

from inkdask.box import Box
from inkdask.identity import Region
from inkdask.segment import Segment
from inkdask.view.sampling import Budget, Layer, look

SIDE, COUNT = 384, 3  # pixels of a window, 3 mm at 7.91 um, and number of windows
STEP = 32  # pixels: scale at which papyrus is looked for
BUDGET = Budget(bytes=128 << 20, pieces=256)  # of the middle layer
FULL = 0.98  # share of the fullest window from which a window counts as full


def full_windows(segment: Segment, side: int = SIDE, count: int = COUNT) -> list[Region]:
    """Choose windows ``x0, y0, x1, y1`` that are full of papyrus, far from each other.

    Reads the middle layer, or evenly spread pieces of a large one.
    """
    depth, height, width = segment.shape
    tall, wide = min(side, height), min(side, width)
    layer = Layer.of_segment(segment, depth // 2)
    grey = look(layer, Box.at((0, 0), (height, width)), STEP, BUDGET)
    papyrus = grey > 0.75 * np.median(grey[grey > 0]) if grey.any() else grey > 0
    tops = range(0, height - tall + 1, STEP)
    lefts = range(0, width - wide + 1, STEP)
    rows, columns = -(-tall // STEP), -(-wide // STEP)
    seen = np.lib.stride_tricks.sliding_window_view(papyrus, (rows, columns)).mean(axis=(2, 3))
    filled = seen[: len(tops), : len(lefts)]
    places = np.argwhere(filled >= FULL * filled.max()) * STEP
    chosen = [places[np.hypot(*(places - np.array([height - tall, width - wide]) / 2).T).argmin()]]
    while len(chosen) < count:
        apart = [np.abs((places - place) / (tall, wide)).max(axis=1) for place in chosen]
        nearest = np.min(apart, axis=0)
        if nearest.max() < 1:  # it would overlap
            break
        chosen.append(places[nearest.argmax()])
    return [Box.at((int(y), int(x)), (tall, wide)).xyxy for y, x in chosen]
