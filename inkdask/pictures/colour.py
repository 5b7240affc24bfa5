"""Colour maps, by their names in matplotlib."""

from __future__ import annotations

from functools import lru_cache

import cmap
import dask.array as da
import numpy as np

from inkdask.errors import SettingsError


@lru_cache(maxsize=8)
def colour_table(name: str) -> np.ndarray:
    """Colours of the 256 grey values, uint8 (256, 3)."""
    try:
        colours = cmap.Colormap(name)
    except (ValueError, TypeError):
        raise SettingsError(
            f"There is no colour map {name!r}; inferno, magma, cividis and gray_r are some, and "
            "https://cmap-docs.readthedocs.io shows all."
        ) from None
    return np.rint(255 * colours.lut(256)[:, :3]).astype(np.uint8)


def coloured(grey: da.Array, table: np.ndarray) -> da.Array:
    """Colour a picture: dask uint8 (y, x) to (y, x, 3)."""
    return da.map_blocks(
        _look_up, grey, table, dtype=np.uint8, new_axis=2, chunks=(*grey.chunks, (3,))
    )


def _look_up(grey: np.ndarray, table: np.ndarray) -> np.ndarray:
    return table[grey]
