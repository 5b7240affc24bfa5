"""Synthetic segment: papyrus in layers, with ink that only depth shows.

The sheet wanders up and down through the layers, like a real one whose traced surface is a little
off. Ink brightens voxels a little above the sheet's middle and darkens voxels as far below it by
the same amount, so the sum over depth does not change with ink. In a single layer the ink is bright
in some places, dark in others and mostly absent, under stronger fibres. Only a network that follows
the sheet through the layers can read the letters.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from inkdask.demo import letters
from inkdask.errors import InkdaskError

#: Philodemus' "fourfold cure", PHerc. 1005: nothing to fear in god, nothing to suspect in death;
#: the good is easily won, the terrible easily borne.
TETRAPHARMAKOS = (
    "ΑΦΟΒΟΝΟΘΕΟΣΑΝΥΠΟΠΤΟΝ",
    "ΟΘΑΝΑΤΟΣΚΑΙΤΑΓΑΘΟΝ",
    "ΜΕΝΕΥΚΤΗΤΟΝΤΟΔΕΔΕΙ",
    "ΝΟΝΕΥΕΚΚΑΡΤΕΡΗΤΟΝ",
)

MADE = b"inkdask demo"  # in the metadata of the files
NOTE = PngInfo()
NOTE.add_text("Software", MADE.decode())

# Brightness in units of the uint8 scale that networks read; distances along depth in layers.
_AIR = 60.0  # between the sheets
_SHEET = 110.0  # of the sheet's middle, more than air
_THICKNESS = 4.0
_INK = 15.0
_INK_DEPTH, _INK_WIDTH = 3.0, 1.2
_WANDER = 6.0  # largest distance of the sheet from the middle layer
_NOISE = 28.0  # standard deviation of a voxel


def segment(
    text: Sequence[str] = TETRAPHARMAKOS,
    height: int = 640,
    width: int = 1664,
    layers: int = 26,
    seed: int = 79,
) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Make a segment; the same arguments make the same segment.

    Parameters
    ----------
    text
        Lines of Greek capitals (`inkdask.demo.letters.ALPHABET`), written as large as they fit.
    height, width
        Size in pixels.
    layers
        Number of layers.
    seed
        Seed of the fibres, the outline, the sheet and the letters.

    Returns
    -------
    volume
        uint16 (z, y, x); ``volume >> 8`` is zero outside the papyrus and nowhere else.
    truth
        Mask of the ink, bool (y, x).
    """
    rng = np.random.default_rng(seed)
    shape = height, width
    papyrus = _outline(shape, rng)
    ink = _writing(text, shape, rng) * papyrus

    sheet = (layers - 1) / 2 + _WANDER * np.tanh(_smooth_noise(shape, 60, 60, rng) / 1.6)
    # Papyrus is two plies glued crosswise: strips along x above, strips along y below.
    above, below = _fibres(shape, rng), _fibres(shape[::-1], rng).T
    volume = np.zeros((layers, height, width), np.uint16)
    for z in range(layers):
        u = (z - sheet).astype(np.float32)  # layers below the sheet's middle
        share = 1 / (1 + np.exp(1.5 * u))
        fibres = share * above + (1 - share) * below
        layer = _AIR + _SHEET * np.exp(-((u / _THICKNESS) ** 2)) * (1 + fibres)
        layer += _INK * ink * (_bell(u + _INK_DEPTH) - _bell(u - _INK_DEPTH))
        layer += _NOISE * rng.standard_normal(shape, np.float32)
        volume[z] = papyrus * (np.clip(layer, 1, 255) * 256).astype(np.uint16)
    return volume, ink > 0.5


def write_segment(out: Path, **options: Any) -> tuple[NDArray[np.uint16], NDArray[np.bool_]]:
    """Make a segment as `segment` does with ``options``, and write it like a scanned one.

    Writes ``layers/00.tif``, ``layers/01.tif``, ... (uint16, strips of 64 rows) and ``truth.png``
    (255 where there is ink) into the folder ``out``. Those of an earlier synthetic segment are
    removed, which say so in their metadata; all others are refused.

    Raises
    ------
    OSError
        The folder cannot be written.
    """
    folder, answer = out / "layers", out / "truth.png"
    earlier = [*folder.iterdir()] if folder.exists() else []
    others = [out / "side-by-side.png", *([] if answer.exists() else [out / "predictions"])]
    for file in [*earlier, answer, *others]:
        if file.exists() and not (file.is_file() and MADE in file.read_bytes()):
            raise InkdaskError(f"{file} is not of an earlier demo: choose another folder.")
    folder.mkdir(parents=True, exist_ok=True)
    volume, truth = segment(**options)
    Image.fromarray(truth.astype(np.uint8) * 255).save(answer, pnginfo=NOTE)
    for file in earlier:
        file.unlink()
    for z, layer in enumerate(volume):
        tifffile.imwrite(folder / f"{z:02d}.tif", layer, rowsperstrip=64, software=MADE.decode())
    return volume, truth


def _bell(u: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.exp(-((u / np.float32(_INK_WIDTH)) ** 2))


def _writing(
    text: Sequence[str], shape: tuple[int, int], rng: np.random.Generator
) -> NDArray[np.float32]:
    """Write the text in the middle of the page, as large as it fits, float32 (y, x), 0 to 1."""
    height, width = shape
    margin = 0.14 * min(shape)
    letter = letters.letter_height(text, height - 2 * margin, width - 2 * margin)
    block = letter * (letters.LINE_PITCH * (len(text) - 1) + 1)
    return letters.write(text, shape, ((height - block) / 2, margin), letter, rng)


def _outline(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.bool_]:
    """Mask of the papyrus, bool (y, x), with torn edges and a missing corner."""
    y, x = np.ogrid[: shape[0], : shape[1]]
    unit = 0.1 * min(shape)
    border = np.minimum(np.minimum(y, shape[0] - 1 - y), np.minimum(x, shape[1] - 1 - x))
    lost = np.hypot(y - 1.10 * shape[0], x - 1.02 * shape[1])  # around the lower right corner
    edge = np.minimum(border, lost - 3.6 * unit)
    torn = 0.26 * _smooth_noise(shape, 60, 60, rng) + 0.09 * _smooth_noise(shape, 14, 14, rng)
    torn += 0.04 * _smooth_noise(shape, 1.5, 4, rng)
    return edge + unit * torn > 0.5 * unit


def _fibres(shape: tuple[int, int], rng: np.random.Generator) -> NDArray[np.float32]:
    """Draw strips and fibres along x, relative brightness, float32 (y, x), mean 0."""
    fine = 0.14 * _smooth_noise(shape, 1.2, 70, rng)
    coarse = 0.12 * _smooth_noise(shape, 5, 160, rng)
    strips = fine + coarse + 0.04 * _smooth_noise(shape, 1, 12, rng)
    # Shift each column by a slow wave, because real fibres are not straight.
    wave = 6 * _smooth_noise(shape, 120, 120, rng)
    y, x = np.ogrid[: shape[0], : shape[1]]
    return strips[np.clip(y + wave.astype(int), 0, shape[0] - 1), x]


def _smooth_noise(
    shape: tuple[int, int], sigma_y: float, sigma_x: float, rng: np.random.Generator
) -> NDArray[np.float32]:
    """Return Gaussian noise smoothed by (sigma_y, sigma_x) pixels, float32 (y, x), variance 1."""
    fy, fx = np.fft.fftfreq(shape[0])[:, None], np.fft.rfftfreq(shape[1])
    blur = np.exp(-2 * np.pi**2 * ((sigma_y * fy) ** 2 + (sigma_x * fx) ** 2))
    noise = np.fft.irfft2(np.fft.rfft2(rng.standard_normal(shape)) * blur, shape)
    return (noise / noise.std()).astype(np.float32)
