"""How much this process has read and computed, for progress, summaries and tests."""

from __future__ import annotations

import operator
import threading
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Counters:
    """What this process has done since it started.

    Attributes
    ----------
    bytes_read
        Bytes of object and file bodies received; bodies that arrived cut short do not count.
    requests
        Requests to an object store (each try counts) plus reads of local files.
    retries
        Requests that were repeated after a passing fault.
    tiles
        Tiles that went through the network.
    """

    bytes_read: int = 0
    requests: int = 0
    retries: int = 0
    tiles: int = 0

    def __add__(self, other: Counters) -> Counters:
        return Counters(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*map(operator.sub, astuple(self), astuple(other)))


_lock = threading.Lock()
_total = Counters()


def count(*, bytes_read: int = 0, requests: int = 0, retries: int = 0, tiles: int = 0) -> None:
    """Add to this process's counters; safe from any thread and any event loop."""
    global _total
    with _lock:
        _total += Counters(bytes_read, requests, retries, tiles)


def counters() -> Counters:
    """Return what this process has done so far; subtract two answers to measure a span."""
    return _total
