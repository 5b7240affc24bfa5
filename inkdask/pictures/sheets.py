"""Pages to print: pictures in a grid with their words, and scale bars, dark on white."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from inkdask.pictures.overlay import BLACK
from inkdask.pictures.scale_bar import fitting

Colour = tuple[int, int, int]
DPI = 240
A4 = 210.0, 297.0  # mm
MARGIN, GAP = 15.0, 5.0  # mm: of the page, and between pictures
TITLE, WORDS, LEAST = 5.0, 19.5, 28.0  # mm: of titles, of all words of a picture, least width
INK: Colour = (28, 24, 21)
DIM: Colour = (112, 105, 97)
RULE: Colour = (205, 199, 190)
MARK: Colour = (158, 58, 38)
PALE = np.array([250, 245, 233], np.float32)  # papyrus without ink
RED = np.array([120, 20, 10], np.float32)
NO_DATA = np.array([226, 223, 218], np.uint8)


@lru_cache(maxsize=16)
def _font(points: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points * DPI / 72)


def pixels(mm: float) -> int:
    """Return a length on the page in pixels."""
    return round(mm * DPI / 25.4)


@dataclass(frozen=True)
class Panel:
    """A picture uint8 (y, x, 3) with its title; ``says`` and notes stand below it."""

    title: str
    rgb: NDArray[np.uint8]
    says: str = ""
    notes: Sequence[str] = ()
    is_marked: bool = False


class Sheet:
    """A page of A4, longer where need be; places and sizes are in mm from its upper left corner.

    Parameters
    ----------
    panels
        Pictures of one size.
    columns
        Numbers of columns, of which the one with the largest pictures is taken.
    around
        Height of all that is above and below the panels.
    spare
        Rows of panels beside them.
    """

    def __init__(
        self, panels: Sequence[Panel], columns: Sequence[int], around: float, spare: int = 0
    ) -> None:
        height, width = panels[0].rgb.shape[:2]
        room = A4[0] - 2 * MARGIN + GAP

        def size(count: int) -> float:
            tall = (A4[1] - around) / (-(-len(panels) // count) + spare) - WORDS
            return max(min(room / count - GAP, tall * width / height), LEAST)

        self.columns = max(columns, key=size)
        self.pitch, self.wide = room / self.columns, size(self.columns)
        self.tall = self.wide * height / width
        rows = -(-len(panels) // self.columns) + spare
        page = pixels(A4[0]), pixels(max(A4[1], around + rows * (self.tall + WORDS)))
        self.image = Image.new("RGB", page, (255, 255, 255))
        self.pen = ImageDraw.Draw(self.image)

    def draw(self, panels: Sequence[Panel], y: float) -> float:
        """Draw panels from ``y`` down; return where they end."""
        for n, panel in enumerate(panels):
            row, column = divmod(n, self.columns)
            self.panel(MARGIN + column * self.pitch, y + row * (self.tall + WORDS), panel)
        return y + (row + 1) * (self.tall + WORDS)

    def panel(self, x: float, y: float, panel: Panel) -> None:
        """Draw a panel."""
        colour, width = (MARK if panel.is_marked else INK), self.pitch - GAP
        self.text(x, y, panel.title, 9.5, colour, width)
        self.picture(x, y + TITLE, self.wide, panel.rgb)
        if panel.is_marked:
            self.frame(x, y + TITLE, self.wide, self.tall, colour)
        y += TITLE + self.tall + 0.4
        y = self.text(x, y, panel.says, 9, colour, width) - 0.3
        for note in panel.notes:
            y = self.text(x, y, note, 7, DIM, width) - 0.3

    def text(
        self,
        x: float,
        y: float,
        words: str,
        points: float = 9,
        colour: Colour = INK,
        width: float | None = None,
    ) -> float:
        """Write words from ``y`` down, within ``width`` or the page; return where they end."""
        line = points * 25.4 / 72 * 1.32
        for text in wrapped(words, points, width or A4[0] - MARGIN - x):
            at = pixels(x), pixels(y + line * 0.78)
            self.pen.text(at, text, colour, _font(points), anchor="ls")
            y += line
        return y

    def rule(self, y: float) -> None:
        """Draw a thin line across."""
        line = [pixels(MARGIN), pixels(y), pixels(A4[0] - MARGIN), pixels(y)]
        self.pen.line(line, RULE, 2)

    def frame(self, x: float, y: float, width: float, height: float, colour: Colour) -> None:
        """Draw a frame around a place."""
        box = (pixels(x) - 5, pixels(y) - 5, pixels(x + width) + 4, pixels(y + height) + 4)
        self.pen.rectangle(box, outline=colour, width=5)

    def picture(self, x: float, y: float, width: float, rgb: NDArray[np.uint8]) -> None:
        """Paste uint8 (y, x, 3), ``width`` wide."""
        wide = max(pixels(width), 1)
        size = wide, max(round(wide * rgb.shape[0] / rgb.shape[1]), 1)
        image = Image.fromarray(np.ascontiguousarray(rgb))
        small = image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
        self.image.paste(small, (pixels(x), pixels(y)))

    def bar(self, x: float, y: float, length: float, label: str) -> None:
        """Draw a scale bar, whose label stands to its right."""
        box = (pixels(x), pixels(y), pixels(x + length), pixels(y + 0.9))
        self.pen.rectangle(box, INK)
        self.text(x + length + 1.5, y - 1.4, label, 8)

    def scale(self, y: float, width: int, pixel_um: float | None) -> None:
        """Draw the scale bar of pictures ``width`` pixels wide above the first, at its right."""
        if pixel_um:
            length, label = fitting(10_000.0, width * pixel_um)
            length *= self.wide / width / pixel_um
            words = _font(8).getlength(label) * 25.4 / DPI
            self.bar(MARGIN + self.wide - length - words - 1.5, y + 1.9, length, label)

    def save(self, path: Path, note: dict[str, str]) -> None:
        """Write a PNG with text chunks, keyword to value."""
        info = PngInfo()
        for keyword, value in note.items():
            info.add_itxt(keyword, value)
        self.image.save(path, "PNG", dpi=(DPI, DPI), pnginfo=info)


def wrapped(words: str, points: float, width: float) -> list[str]:
    """Break words into lines of at most ``width`` mm; a longer word is broken, too."""
    most, font, lines = pixels(width), _font(points), [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= most:
            lines[-1] = longer
            continue
        lines.append(word)
        while font.getlength(lines[-1]) > most:
            cut = next(n for n in range(len(word), 0, -1) if font.getlength(word[:n]) <= most)
            lines[-1:] = [word[:cut], word[cut:]]
            word = word[cut:]
    return [line for line in lines if line]


def inked(grey: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Show ink dark on light, uint8 (y, x, 3); pixels without data are grey."""
    return _shaded(grey, valid, np.linspace(0, 1, 256), BLACK)


def heated(spread: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Show a spread of opinions red on light, uint8 (y, x, 3)."""
    return _shaded(spread, valid, np.linspace(0, 1, 256) ** 0.5, RED)  # because most are small


def _shaded(
    values: NDArray[np.uint8], valid: NDArray[np.bool_], share: np.ndarray, towards: np.ndarray
) -> NDArray[np.uint8]:
    table = np.rint(PALE + share[:, None] * (towards - PALE)).astype(np.uint8)
    return np.where(valid[..., None], table[values], NO_DATA)
