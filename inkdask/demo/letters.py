"""Greek book capitals as pen strokes.

Not every machine has a font with Greek letters, and a reed pen does not write like a font. So each
letter is a few strokes on a small grid, with the round sigma, epsilon and omega of the Herculaneum
scribes. The pen is an ellipse, held at an angle and pressed a little unevenly.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from inkdask.errors import InkdaskError

Point = tuple[float, float]
Stroke = tuple[Point, ...]


def _arc(x: float, y: float, rx: float, ry: float, start: float, end: float) -> Stroke:
    """Return part of an ellipse around (x, y); angles in degrees, 0 right and 90 down."""
    turn = np.deg2rad(np.linspace(start, end, 9))
    return tuple(zip(x + rx * np.cos(turn), y + ry * np.sin(turn), strict=True))


# A letter is its width and its strokes. The unit is the letter's height: y is 0 at the top and 1 at
# the foot. Two points are a straight stroke; more are a smooth curve through all of them.
_ROOF: tuple[Stroke, ...] = (
    ((0.40, 0.02), (0.26, 0.45), (0.00, 1.00)),
    ((0.34, -0.06), (0.56, 0.48), (0.72, 0.90), (0.86, 0.98)),
)
_MOON = _arc(0.46, 0.50, 0.45, 0.50, -58, -306)
GLYPHS: dict[str, tuple[float, tuple[Stroke, ...]]] = {
    "Α": (0.84, (*_ROOF, ((0.15, 0.66), (0.62, 0.62)))),
    "Β": (
        0.62,
        (
            ((0.06, 0.00), (0.06, 1.00)),
            ((0.02, 0.03), (0.30, 0.00), (0.47, 0.21), (0.33, 0.42), (0.08, 0.47)),
            ((0.08, 0.47), (0.40, 0.49), (0.60, 0.72), (0.40, 0.96), (0.00, 0.99)),
        ),
    ),
    "Γ": (0.60, (((0.06, 0.02), (0.06, 1.00)), ((0.02, 0.03), (0.62, 0.00)))),
    "Δ": (
        0.92,
        (_ROOF[0], ((0.34, -0.06), (0.92, 1.00)), ((0.00, 0.97), (0.90, 0.96))),
    ),
    "Ε": (0.70, (_MOON, ((0.03, 0.50), (0.64, 0.47)))),
    "Ζ": (
        0.72,
        (((0.04, 0.03), (0.68, 0.01)), ((0.68, 0.01), (0.02, 0.96)), ((0.02, 0.96), (0.74, 0.97))),
    ),
    "Η": (
        0.74,
        (
            ((0.06, 0.00), (0.06, 1.00)),
            ((0.68, -0.01), (0.68, 0.50), (0.69, 0.86), (0.78, 0.99)),
            ((0.06, 0.48), (0.68, 0.46)),
        ),
    ),
    "Θ": (0.88, (_arc(0.44, 0.50, 0.42, 0.51, -85, -460), ((0.04, 0.51), (0.84, 0.48)))),
    "Ι": (0.16, (((0.08, 0.00), (0.08, 1.00)),)),
    "Κ": (
        0.72,
        (
            ((0.06, 0.00), (0.06, 1.00)),
            ((0.64, 0.00), (0.38, 0.30), (0.06, 0.55)),
            ((0.22, 0.44), (0.46, 0.76), (0.74, 0.98)),
        ),
    ),
    "Λ": (0.84, _ROOF),
    "Μ": (
        1.02,
        (
            ((0.16, 0.00), (0.12, 0.50), (0.00, 1.00)),
            ((0.16, 0.00), (0.32, 0.46), (0.53, 0.68)),
            ((0.53, 0.68), (0.70, 0.46), (0.86, 0.00)),
            ((0.86, 0.00), (0.90, 0.55), (1.02, 0.98)),
        ),
    ),
    "Ν": (
        0.78,
        (((0.06, 0.00), (0.06, 1.00)), ((0.06, 0.02), (0.72, 0.98)), ((0.72, -0.02), (0.72, 0.98))),
    ),
    "Ξ": (
        0.68,
        (((0.04, 0.02), (0.66, 0.00)), ((0.12, 0.48), (0.58, 0.46)), ((0.02, 0.97), (0.70, 0.96))),
    ),
    "Ο": (0.74, (_arc(0.37, 0.52, 0.35, 0.42, -85, -460),)),
    "Π": (
        0.80,
        (
            ((0.12, 0.03), (0.12, 1.00)),
            ((0.00, 0.04), (0.82, 0.01)),
            ((0.68, 0.02), (0.68, 0.50), (0.69, 0.86), (0.80, 0.99)),
        ),
    ),
    "Ρ": (
        0.56,
        (
            ((0.06, 0.00), (0.06, 1.22)),
            ((0.02, 0.04), (0.32, 0.00), (0.53, 0.25), (0.34, 0.52), (0.08, 0.54)),
        ),
    ),
    "Σ": (0.70, (_MOON,)),
    "Τ": (0.76, (((0.00, 0.05), (0.76, 0.01)), ((0.38, 0.03), (0.38, 1.00)))),
    "Υ": (
        0.74,
        (
            ((0.00, 0.03), (0.16, 0.10), (0.30, 0.34), (0.37, 0.58)),
            ((0.74, 0.00), (0.57, 0.14), (0.44, 0.38), (0.37, 0.58)),
            ((0.37, 0.54), (0.37, 1.06)),
        ),
    ),
    "Φ": (0.92, (_arc(0.46, 0.53, 0.44, 0.32, -85, -460), ((0.47, -0.22), (0.46, 1.24)))),
    "Χ": (
        0.76,
        (
            ((0.02, 0.02), (0.36, 0.48), (0.64, 0.90), (0.78, 0.98)),
            ((0.72, 0.00), (0.36, 0.52), (0.00, 1.00)),
        ),
    ),
    "Ψ": (
        0.86,
        (
            ((0.02, 0.02), (0.10, 0.36), (0.43, 0.58), (0.76, 0.36), (0.86, 0.00)),
            ((0.43, -0.18), (0.43, 1.20)),
        ),
    ),
    "Ω": (
        1.08,
        (
            _arc(0.29, 0.48, 0.27, 0.49, -115, -360),
            _arc(0.80, 0.48, 0.27, 0.49, 180, -65),
        ),
    ),
}
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
    numpy.ndarray
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
                path = _smooth(np.asarray(stroke)) + 0.01 * rng.standard_normal(2)  # (n, 2): x, y
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
