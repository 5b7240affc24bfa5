"""Times of tiles that this process has measured, by network.

A module of its own, because whoever estimates a time must neither import torch nor look into a
module that another thread is still importing.
"""

from __future__ import annotations

from dataclasses import replace

from inkdask.specs import Network

_seconds: dict[Network, float] = {}


def record(network: Network, seconds: float) -> None:
    """Keep the time of a tile, if it is the best so far."""
    key = replace(network, function=None)
    _seconds[key] = min(_seconds.get(key, seconds), seconds)


def measured(network: Network) -> float | None:
    """Return the best time of a tile in this process, in seconds; None before the first tile."""
    return _seconds.get(replace(network, function=None))
