"""Greek book capitals as pen strokes.

Not every machine has a font with Greek letters, and a reed pen does not write like a font. So each
letter is a few strokes, with the round sigma, epsilon and omega of the Herculaneum scribes. The pen
is an ellipse, held at an angle and pressed a little unevenly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from inkdask.errors import InkdaskError

Stroke = NDArray[np.float64]  # points (n, 2): x, y

# A letter is its width and its strokes, in hundredths of its height; x is 0 at the left, y is 0 at
# the top. A stroke is a straight line through two points, a smooth curve through more, or part of
# an ellipse: centre, radii, and two angles in degrees, 0 right and 90 down.
_STROKES = {
    "Α": "84 | 40 2, 26 45, 0 100 | 34 -6, 56 48, 72 90, 86 98 | 15 66, 62 62",
    "Β": "62 | 6 0, 6 100 | 2 3, 30 0, 47 21, 33 42, 8 47 | 8 47, 40 49, 60 72, 40 96, 0 99",
    "Γ": "60 | 6 2, 6 100 | 2 3, 62 0",
    "Δ": "92 | 40 2, 26 45, 0 100 | 34 -6, 92 100 | 0 97, 90 96",
    "Ε": "70 | arc 46 50, 45 50, -58 -306 | 3 50, 64 47",
    "Ζ": "72 | 4 3, 68 1 | 68 1, 2 96 | 2 96, 74 97",
    "Η": "74 | 6 0, 6 100 | 68 -1, 68 50, 69 86, 78 99 | 6 48, 68 46",
    "Θ": "88 | arc 44 50, 42 51, -85 -460 | 4 51, 84 48",
    "Ι": "16 | 8 0, 8 100",
    "Κ": "72 | 6 0, 6 100 | 64 0, 38 30, 6 55 | 22 44, 46 76, 74 98",
    "Λ": "84 | 40 2, 26 45, 0 100 | 34 -6, 56 48, 72 90, 86 98",
    "Μ": "102 | 16 0, 12 50, 0 100 | 16 0, 32 46, 53 68 | 53 68, 70 46, 86 0 | 86 0, 90 55, 102 98",
    "Ν": "78 | 6 0, 6 100 | 6 2, 72 98 | 72 -2, 72 98",
    "Ξ": "68 | 4 2, 66 0 | 12 48, 58 46 | 2 97, 70 96",
    "Ο": "74 | arc 37 52, 35 42, -85 -460",
    "Π": "80 | 12 3, 12 100 | 0 4, 82 1 | 68 2, 68 50, 69 86, 80 99",
    "Ρ": "56 | 6 0, 6 122 | 2 4, 32 0, 53 25, 34 52, 8 54",
    "Σ": "70 | arc 46 50, 45 50, -58 -306",
    "Τ": "76 | 0 5, 76 1 | 38 3, 38 100",
    "Υ": "74 | 0 3, 16 10, 30 34, 37 58 | 74 0, 57 14, 44 38, 37 58 | 37 54, 37 106",
    "Φ": "92 | arc 46 53, 44 32, -85 -460 | 47 -22, 46 124",
    "Χ": "76 | 2 2, 36 48, 64 90, 78 98 | 72 0, 36 52, 0 100",
    "Ψ": "86 | 2 2, 10 36, 43 58, 76 36, 86 0 | 43 -18, 43 120",
    "Ω": "108 | arc 29 48, 27 49, -115 -360 | arc 80 48, 27 49, 180 -65",
}


def _glyph(text: str) -> tuple[float, tuple[Stroke, ...]]:
    width, *strokes = text.split("|")
    return int(width) / 100, tuple(map(_stroke, strokes))


def _stroke(text: str) -> Stroke:
    pairs = [tuple(map(int, pair.split())) for pair in text.replace("arc", "").split(",")]
    if "arc" in text:
        *sizes, (start, end) = pairs
        (x, y), (rx, ry) = (np.array(pair) / 100 for pair in sizes)
        turn = np.deg2rad(np.linspace(start, end, 9))
        return np.column_stack([x + rx * np.cos(turn), y + ry * np.sin(turn)])
    return np.array(pairs) / 100


GLYPHS = {letter: _glyph(text) for letter, text in _STROKES.items()}
ALPHABET = "".join(GLYPHS)

LINE_PITCH = 1.62  # distance of two lines, in letter heights
_GAP = 0.20  # distance of two letters, in letter heights
_SPACE = 0.50  # width of a space, in letter heights
_NIB = 0.170, 0.095  # the nib's long and short axis, in letter heights
_NIB_ANGLE = np.deg2rad(-28)  # of the nib's long axis to the line of writing
_FINE = 3  # factor by which the page is drawn finer, before it is averaged


def letter_height(lines: Sequence[str], height: float, width: float) -> float:
    """Return the largest letter height in pixels with which the lines fit height x width pixels."""
    widest = max(sum(map(_advance, line)) - _GAP for line in lines)
    return min(height / (LINE_PITCH * (len(lines) - 1) + 1), width / widest)


def write(
    lines: Sequence[str],
    shape: tuple[int, int],
    origin: tuple[float, float],
    letter: float,
    rng: np.random.Generator,
) -> NDArray[np.float32]:
    """Write lines of Greek capitals, each letter a little different.

    Parameters
    ----------
    lines
        Text in the capitals of `ALPHABET`; a space leaves a gap.
    shape
        Height and width of the page, in pixels.
    origin
        (y, x) of the top left corner of the first letter, in pixels.
    letter
        Height of a letter, in pixels.
    rng
        Source of the differences between letters.

    Returns
    -------
    Inked share of each pixel, float32 (y, x), 0 to 1.
    """
    page = Image.new("L", (shape[1] * _FINE, shape[0] * _FINE))
    pen = ImageDraw.Draw(page)
    for row, line in enumerate(lines):
        y, x = origin[0] + row * LINE_PITCH * letter, origin[1]
        for character in line:
            advance = _advance(character) * letter
            _, strokes = GLYPHS.get(character, (0, ()))
            size = letter * (1 + 0.025 * rng.standard_normal())
            slant, lift = 0.02 * rng.standard_normal(), 0.02 * letter * rng.standard_normal()
            for stroke in strokes:
                path = _smooth(stroke) + 0.01 * rng.standard_normal(2)  # (n, 2): x, y
                path[:, 0] += slant * (0.5 - path[:, 1])
                path = size * path + np.array([x, y + lift])
                _pull(pen, path * _FINE, size * _FINE, rng)
            x += advance
    fine = np.asarray(page, dtype=np.float32).reshape(shape[0], _FINE, shape[1], _FINE)
    return fine.mean(axis=(1, 3)) / np.float32(255)


def _advance(character: str) -> float:
    if character == " ":
        return _SPACE
    if character not in GLYPHS:
        raise InkdaskError(f"The scribe cannot write {character!r}, only the capitals {ALPHABET}.")
    return GLYPHS[character][0] + _GAP


def _smooth(points: NDArray[np.float64], steps: int = 12) -> NDArray[np.float64]:
    """Return points along a Catmull-Rom spline through the given points, (n, 2)."""
    first, last = 2 * points[0] - points[1], 2 * points[-1] - points[-2]
    p = np.vstack([first, points, last])
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    pieces = [
        b + t / 2 * ((c - a) + t * ((2 * a - 5 * b + 4 * c - d) + t * (3 * b - a - 3 * c + d)))
        for a, b, c, d in zip(p, p[1:], p[2:], p[3:], strict=False)
    ]
    return np.vstack([*pieces, points[-1:]])


def _pull(
    pen: ImageDraw.ImageDraw, path: NDArray[np.float64], size: float, rng: np.random.Generator
) -> None:
    """Draw a path with the nib, with less pressure at its ends."""
    length = np.concatenate([[0], np.cumsum(np.hypot(*np.diff(path, axis=0).T))])
    stamps = max(int(length[-1] / (0.012 * size)), 2)  # about 1 % of a letter apart
    share = np.linspace(0, 1, stamps)
    spots = np.column_stack([np.interp(share * length[-1], length, axis) for axis in path.T])
    waver = np.interp(share, np.linspace(0, 1, 4), 1 + 0.06 * rng.standard_normal(4))
    pressure = waver * (0.86 + 0.14 * np.minimum(1, 8 * np.minimum(share, 1 - share)))

    turn = np.linspace(0, 2 * np.pi, 20, endpoint=False)
    nib = np.column_stack([_NIB[0] / 2 * np.cos(turn), _NIB[1] / 2 * np.sin(turn)]) * size
    cos, sin = np.cos(_NIB_ANGLE), np.sin(_NIB_ANGLE)
    nib = nib @ np.array([[cos, sin], [-sin, cos]])
    for spot, press in zip(spots, pressure, strict=True):
        pen.polygon((spot + press * nib).ravel().tolist(), fill=255)
