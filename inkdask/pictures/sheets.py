"""Pages to print: text, pictures and scale bars on A4, dark on white."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from inkdask.pictures.overlay import BLACK, LIGHT

Colour = tuple[int, int, int]
DPI = 240
A4 = 210.0, 297.0  # mm
INK: Colour = (28, 24, 21)
DIM: Colour = (112, 105, 97)
RULE: Colour = (205, 199, 190)
MARK: Colour = (158, 58, 38)
PALE = np.array([250, 245, 233], np.float32)  # papyrus without ink
NO_DATA = np.array([226, 223, 218], np.uint8)


@lru_cache(maxsize=16)
def _font(points: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(points * DPI / 72)


def pixels(mm: float) -> int:
    """Return a length on the page in pixels."""
    return round(mm * DPI / 25.4)


@dataclass
class Sheet:
    """A page; places and sizes are in millimetres from its upper left corner.

    Attributes
    ----------
    width, height
        Size of the page.
    """

    width: float
    height: float
    image: Image.Image = field(init=False)

    def __post_init__(self) -> None:
        size = pixels(self.width), pixels(self.height)
        self.image = Image.new("RGB", size, (255, 255, 255))
        self.pen = ImageDraw.Draw(self.image)

    def text(
        self,
        x: float,
        y: float,
        words: str,
        points: float = 9,
        colour: Colour = INK,
        width: float | None = None,
        align: str = "left",
    ) -> float:
        """Write words from ``y`` down, in lines of at most ``width``; return where they end."""
        line = points * 25.4 / 72 * 1.32
        for text in wrapped(words, points, width):
            free = (width or 0) - self.length(text, points)
            shift = {"left": 0.0, "centre": free / 2, "right": free}[align]
            at = pixels(x + shift), pixels(y + line * 0.78)
            self.pen.text(at, text, colour, _font(points), anchor="ls")
            y += line
        return y

    def length(self, words: str, points: float) -> float:
        """Return the length of words, in mm."""
        return float(self.pen.textlength(words, _font(points))) * 25.4 / DPI

    def rule(self, x: float, y: float, width: float, colour: Colour = RULE) -> None:
        """Draw a thin line to the right."""
        self.pen.line([pixels(x), pixels(y), pixels(x + width), pixels(y)], colour, 2)

    def frame(self, x: float, y: float, width: float, height: float, colour: Colour = MARK) -> None:
        """Draw a frame around a place."""
        box = (pixels(x) - 5, pixels(y) - 5, pixels(x + width) + 4, pixels(y + height) + 4)
        self.pen.rectangle(box, outline=colour, width=5)

    def picture(
        self, x: float, y: float, width: float, rgb: NDArray[np.uint8], height: float | None = None
    ) -> float:
        """Paste uint8 (y, x, 3), ``width`` wide; return the height that it takes, in mm."""
        tall = height or width * rgb.shape[0] / rgb.shape[1]
        size = max(pixels(width), 1), max(pixels(tall), 1)
        small = Image.fromarray(rgb).resize(size, Image.Resampling.LANCZOS, reducing_gap=3)
        self.image.paste(small, (pixels(x), pixels(y)))
        return tall

    def bar(self, x: float, y: float, length: float, label: str) -> None:
        """Draw a scale bar, whose label stands to its right."""
        box = (pixels(x), pixels(y), pixels(x + length), pixels(y + 0.9))
        self.pen.rectangle(box, INK)
        self.text(x + length + 1.5, y - 1.4, label, 8)

    def save(self, path: Path, note: dict[str, str]) -> None:
        """Write a PNG with text chunks, keyword to value."""
        info = PngInfo()
        for keyword, value in note.items():
            info.add_itxt(keyword, value)
        self.image.save(path, "PNG", dpi=(DPI, DPI), pnginfo=info, optimize=True)


def wrapped(words: str, points: float, width: float | None) -> list[str]:
    """Break words into lines of at most ``width`` mm; a longer word is broken, too."""
    if width is None:
        return [words]
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
    share = np.linspace(0, 1, 256, dtype=np.float32)[:, None]
    table = np.rint(PALE + share * (BLACK - PALE)).astype(np.uint8)
    rgb: NDArray[np.uint8] = table[grey]
    rgb[~valid] = NO_DATA
    return rgb


def heated(spread: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Show a spread of opinions red on light, uint8 (y, x, 3)."""
    share = np.sqrt(np.linspace(0, 1, 256, dtype=np.float32))[:, None]  # because most are small
    table = np.rint(PALE + share * (np.array([120, 20, 10], np.float32) - PALE)).astype(np.uint8)
    rgb: NDArray[np.uint8] = table[spread]
    rgb[~valid] = NO_DATA
    return rgb


def on_light(papyrus: NDArray[np.uint8], valid: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """Stretch uint8 (y, x) to the colours of papyrus, uint8 (y, x, 3)."""
    seen = papyrus[valid]
    low, high = np.percentile(seen, [1, 99.5]) if seen.size else (0, 255)
    light = np.clip((papyrus.astype(np.float32) - low) / max(high - low, 1), 0, 1)[..., None]
    dark = LIGHT * np.float32(0.28)
    rgb = np.rint(dark + light * (LIGHT - dark)).astype(np.uint8)
    rgb[~valid] = NO_DATA
    return rgb
