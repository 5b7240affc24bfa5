"""JPEG, an overview to send and to print; it is held in memory as a whole."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
from PIL import Image

from inkdask.pictures.bands import bands

LARGEST = 8192  # pixels
QUALITY = 92
MOST_COMMENT = 65533  # bytes
MOST_DENSITY = 65535  # pixels an inch


def write_jpeg(
    canvas: da.Array, path: Path, description: str, pixel_um: float | None = None
) -> None:
    """Write a picture, dask uint8 (y, x) or (y, x, 3), of at most `LARGEST` pixels a side.

    ``description`` is for the comment, ``pixel_um`` for the density.
    """
    options: dict[str, Any] = {}
    comment = description.encode()
    if len(comment) <= MOST_COMMENT:
        options["comment"] = comment
    if pixel_um and 1 <= (per_inch := round(25400 / pixel_um)) <= MOST_DENSITY:
        options["dpi"] = (per_inch, per_inch)
    pixels = np.concatenate(list(bands(canvas, "JPEG")))
    Image.fromarray(pixels).save(path, "JPEG", quality=QUALITY, subsampling=0, **options)
