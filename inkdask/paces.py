"""Times of tiles: those that this process has measured, and those that jobs left on this machine.

A module of its own, because whoever estimates a time must neither import torch nor look into a
module that another thread is still importing.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

from inkdask import storage
from inkdask.environment import cache_home
from inkdask.errors import InkdaskError
from inkdask.specs import ModelSpec, Network

log = logging.getLogger("inkdask")

SHORTEST = 2.0  # seconds of computing that tell the pace of a job

_seconds: dict[Network, float] = {}


def record(network: Network, seconds: float) -> None:
    """Keep the time of a tile, if it is the best so far."""
    key = replace(network, function=None)
    _seconds[key] = min(_seconds.get(key, seconds), seconds)


def measured(network: Network) -> float | None:
    """Return the best time of a tile in this process, in seconds; None before the first tile."""
    return _seconds.get(replace(network, function=None))


def keep(network: Network, tiles: int, seconds: float) -> None:
    """Keep the pace of a job on this machine for other processes, where it was long enough."""
    if network.function is not None or not tiles or seconds < SHORTEST:
        return
    try:
        kept = _read() | {_name(network): seconds / tiles}
        storage.write_bytes(str(_file()), json.dumps(kept, indent=1).encode())
    except (InkdaskError, RuntimeError) as error:  # a home that is missing, or cannot be written
        log.debug("The pace of this machine is not kept: %s", error)


def kept(network: Network) -> float | None:
    """Return the time of a tile in the latest job on this machine, in seconds; None without one."""
    seconds = _read().get(_name(network))
    is_time = isinstance(seconds, float) and math.isfinite(seconds) and seconds > 0
    return seconds if is_time else None


def of_model(model: ModelSpec, tile: int) -> float | None:
    """Return the same as `kept` for a model as it is used when nothing else is said."""
    precision = model.precision
    return kept(Network(model, model.layers, tile, 1, None, None, "", precision))


def _name(network: Network) -> str:
    """Name a pace by the machine and by what makes a network fast or slow."""
    device = "CPU" if os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1") else "any device"
    shape = f"{network.layers} x {network.tile} x {network.tile}"
    words = (network.model.architecture, shape, network.precision, network.tta)
    return ", ".join((platform.node(), device, *words))


def _file() -> Path:
    return cache_home() / "paces.json"


def _read() -> dict[str, Any]:
    try:
        found = json.loads(_file().read_bytes())
    except (OSError, ValueError, RuntimeError):
        return {}
    return found if isinstance(found, dict) else {}
