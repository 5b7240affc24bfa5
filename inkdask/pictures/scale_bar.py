"""Scale bar in the corner of a picture, legible on dark and on light ground."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dask.array as da
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from inkdask.box import Box

log = logging.getLogger("inkdask")

SHARE = 1 / 3  # of the picture's width, at most
SIZE = 1 / 50  # height of the letters, as a share of the picture's longer side


@dataclass(frozen=True)
class ScaleBar:
    """Scale bar of a round length.

    Attributes
    ----------
    label
        Its length in words, such as ``1 cm``.
    pixels
        Its length.
    text
        Height of the letters, in pixels.
    height, width
        Size of the whole picture, in pixels.
    """

    label: str
    pixels: int
    text: int
    height: int
    width: int

    @classmethod
    def of(cls, shape: tuple[int, ...], pixel_um: float, length_um: float) -> ScaleBar:
        """Return the bar for a picture of ``shape`` (y, x), whose pixels are ``pixel_um`` wide.

        A bar that is longer than `SHARE` of the width gives way to a shorter round length.
        """
        height, width = shape[:2]
        shown, label = fitting(length_um, width * pixel_um)
        if shown < length_um:
            log.warning(
                "A scale bar of %s does not fit in a third of %d pixels: it shows %s",
                _words(length_um), width, label,
            )  # fmt: skip
        text = round(min(max(max(height, width) * SIZE, 12), max(height / 8, 9)))
        return cls(label, max(round(shown / pixel_um), 1), text, height, width)

    @property
    def stamp(self) -> tuple[np.ndarray, np.ndarray]:
        """White bar and letters with a black rim: values uint8 (y, x), and opacity in [0, 1]."""
        return _stamp(self.label, self.pixels, self.text)

    @property
    def corner(self) -> tuple[int, int]:
        """Row and column where the stamp begins: at the lower right."""
        height, width = self.stamp[0].shape
        return max(self.height - height - self.text, 0), max(self.width - width - self.text, 0)


def fitting(length_um: float, width_um: float) -> tuple[float, str]:
    """Return a length that fits in `SHARE` of a picture's width, a round one, and its words."""
    most = SHARE * width_um
    shown = length_um if length_um <= most else _round_below(most)
    return shown, _words(shown)


def with_scale_bar(canvas: da.Array, bar: ScaleBar) -> da.Array:
    """Draw a scale bar on dask uint8 (y, x) or (y, x, 3)."""
    return da.map_blocks(_draw, canvas, bar=bar, dtype=np.uint8)


def _draw(block: np.ndarray, bar: ScaleBar, block_info: Any = None) -> np.ndarray:
    if not block_info:  # dask asks what comes of an empty block
        return block
    rows, columns = block_info[0]["array-location"][:2]
    stamp, opacity = bar.stamp
    box, place = Box(*rows, *columns), Box.at(bar.corner, stamp.shape)
    if box.intersect(place).is_empty:
        return block
    there, here = box.common(place)
    grey, share = stamp[here], opacity[here]
    if block.ndim == 3:
        grey, share = grey[..., None], share[..., None]
    drawn = block.copy()
    drawn[there] = np.rint(share * grey + (1 - share) * block[there])
    return drawn


@lru_cache(maxsize=4)
def _stamp(label: str, pixels: int, text: int) -> tuple[np.ndarray, np.ndarray]:
    font = ImageFont.load_default(text)
    left, top, right, bottom = map(round, font.getbbox(label))
    rim, thick, gap = max(round(text / 12), 1), max(round(text / 4), 2), round(text / 2)
    width = max(pixels, right - left) + 2 * rim
    height = bottom - top + gap + thick + 2 * rim
    start, bar_top = (width - pixels) // 2, height - rim - thick
    bar = (start, bar_top, start + pixels - 1, bar_top + thick - 1)
    outer = (bar[0] - rim, bar[1] - rim, bar[2] + rim, bar[3] + rim)
    place = ((width - right - left) / 2, rim - top)

    white, opaque = (Image.new("L", (width, height), 0) for _ in range(2))
    ImageDraw.Draw(white).rectangle(bar, fill=255)
    ImageDraw.Draw(white).text(place, label, 255, font)
    ImageDraw.Draw(opaque).rectangle(outer, fill=255)
    ImageDraw.Draw(opaque).text(place, label, 255, font, stroke_width=rim)
    return np.asarray(white), np.asarray(opaque) / np.float32(255)


def _round_below(length: float) -> float:
    """Return the longest of 1, 2, 5, 10, ... that is not longer."""
    power = 10.0 ** math.floor(math.log10(length))
    return max(step * power for step in (1, 2, 5) if step * power <= length)


def _words(micrometers: float) -> str:
    """Return a length in words; not in micrometers, because the font has no Greek letters."""
    return f"{micrometers / 1e4:g} cm" if micrometers >= 1e4 else f"{micrometers / 1e3:g} mm"
