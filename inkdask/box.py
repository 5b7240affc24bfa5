"""Rectangles of pixels, and copies of the pixels that two rectangles share."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from inkdask.errors import SettingsError

if TYPE_CHECKING:
    import numpy as np

log = logging.getLogger("inkdask")

Slices = tuple[slice, slice]


@dataclass(frozen=True)
class Box:
    """Rows ``top`` to ``bottom`` and columns ``left`` to ``right``, in pixels, ends exclusive."""

    top: int
    bottom: int
    left: int
    right: int

    @classmethod
    def of(cls, rows: slice, columns: slice) -> Box:
        """Box of two slices, whose ends are given."""
        return cls(rows.start, rows.stop, columns.start, columns.stop)

    @classmethod
    def at(cls, corner: tuple[int, int], shape: tuple[int, ...]) -> Box:
        """Box of an image of ``shape`` (y, x, ...) whose first pixel is at ``corner`` (y, x)."""
        return cls(corner[0], corner[0] + shape[0], corner[1], corner[1] + shape[1])

    @classmethod
    def of_xyxy(cls, xyxy: tuple[int, int, int, int]) -> Box:
        """Box of ``x0, y0, x1, y1``, as users write a region."""
        x0, y0, x1, y1 = xyxy
        return cls(y0, y1, x0, x1)

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        """``x0, y0, x1, y1``."""
        return self.left, self.top, self.right, self.bottom

    @property
    def corner(self) -> tuple[int, int]:
        """First row and first column."""
        return self.top, self.left

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width."""
        return self.bottom - self.top, self.right - self.left

    @property
    def slices(self) -> Slices:
        """Rows and columns, to index an array."""
        return slice(self.top, self.bottom), slice(self.left, self.right)

    @property
    def is_empty(self) -> bool:
        """Whether it has no pixel."""
        return self.top >= self.bottom or self.left >= self.right

    def shift(self, rows: int, columns: int) -> Box:
        """Move it down and to the right."""
        return Box(self.top + rows, self.bottom + rows, self.left + columns, self.right + columns)

    def inside(self, corner: tuple[int, int]) -> Box:
        """The same box, counted from ``corner`` (y, x)."""
        return self.shift(-corner[0], -corner[1])

    def intersect(self, other: Box) -> Box:
        """Pixels of both; empty where they do not meet."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        return Box(
            top, max(min(self.bottom, other.bottom), top),
            left, max(min(self.right, other.right), left),
        )  # fmt: skip

    def holds(self, other: Box) -> bool:
        """Whether all of ``other`` lies in it."""
        return self.intersect(other) == other

    def common(self, other: Box) -> tuple[Slices, Slices]:
        """Pixels of both: slices of an array that covers this box, and of one that covers other."""
        both = self.intersect(other)
        return both.inside(self.corner).slices, both.inside(other.corner).slices

    def paste(self, pixels: np.ndarray, canvas: np.ndarray, place: Box) -> None:
        """Copy ``pixels``, which cover this box, to ``canvas``, which covers ``place``.

        Only what both share is copied. The arrays are (y, x, ...).
        """
        here, there = self.common(place)
        canvas[there] = pixels[here]


def cut_region(roi_xyxy: tuple[int, int, int, int], whole: Box, there: str) -> Box:
    """Return the part of a region of interest that lies in ``whole``; a note says what is cut off.

    ``there`` names the whole in messages. A region that lies beyond it is a `SettingsError`.
    """
    asked = Box.of_xyxy(roi_xyxy)
    roi = asked.intersect(whole)
    said = f"ROI_XYXY {','.join(map(str, roi_xyxy))}"
    if roi.is_empty:
        raise SettingsError(f"{said} lies beyond {there}.")
    if roi != asked:
        log.warning("%s reaches beyond %s: %d,%d,%d,%d is read", said, there, *roi.xyxy)
    return roi
