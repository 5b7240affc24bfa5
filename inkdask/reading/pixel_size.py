"""The side of a pixel, in micrometers, as names and metadata tell it."""

from __future__ import annotations

import re
from typing import Any

SMALLEST, LARGEST = 0.1, 100.0  # micrometers, of scans of papyrus
_UNITS = {"nanometer": 1e-3, "micrometer": 1.0, "millimeter": 1e3, "meter": 1e6}
_PITCH = re.compile(r"(?:^|[-_/])(\d+(?:\.\d+)?)um(?=[-_./]|$)")
_LEVEL = re.compile(r"-L(\d+)(?=\.|$)")


def of_name(name: str) -> float | None:
    """Return the pixel size in a name such as ``2.399um-0.22m-77keV-volume-2025-L1.zarr``."""
    found = _PITCH.search(name)
    return float(found[1]) * 2 ** halvings(name) if found else None


def halvings(name: str) -> int:
    """Return how often the scan was halved before it was rendered: 1 for ``-L1``."""
    found = _LEVEL.search(name)
    return int(found[1]) if found else 0


def of_prepared(attributes: dict[str, Any]) -> float | None:
    """Return the pixel size of an array of means, by the name and level of its source."""
    source, level = str(attributes.get("source")), str(attributes.get("source_level"))
    side = of_path(source)
    return side * 2 ** int(level) if side and level.isdecimal() else None


def of_path(uri: str) -> float | None:
    """Return the pixel size in the name of a file or folder, or in that of a folder above it."""
    return next((side for name in reversed(uri.split("/")) if (side := of_name(name))), None)


def of_ome(attributes: dict[str, Any], index: int) -> float | None:
    """Return the pixel size of a level of an OME-Zarr group, where it is plausible.

    Many writers left the scale at 1, called micrometers nanometers, or gave that of the finest
    level of the scan for a render of a coarser one.
    """
    try:
        image = (attributes.get("ome") or attributes)["multiscales"][0]
        units = [axis.get("unit") for axis in image["axes"][-2:]]
        y, x = image["datasets"][index]["coordinateTransformations"][0]["scale"][-2:]
        side = float(x) * _UNITS[units[1]]
        is_left_alone = float(x) == 2.0**index
        is_square = units[0] == units[1] and abs(y - x) <= 0.01 * x
    except (KeyError, IndexError, TypeError, ValueError, AttributeError):
        return None
    is_of_finest = bool(attributes.get("source_group"))
    is_plausible = is_square and not is_left_alone and not is_of_finest
    return side if is_plausible and SMALLEST <= side <= LARGEST else None
