"""Counters of what this process has read and computed, for progress, summaries and tests."""

from __future__ import annotations

import operator
import threading
from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Counters:
    """Work of this process since it started.

    Attributes
    ----------
    bytes_read
        Bytes of files and objects received; truncated responses do not count.
    requests
        Requests to S3, counting each try, and reads of local files.
    retries
        Requests repeated after a temporary fault.
    tiles
        Tiles run through the network.
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
    """Add to this process's counters; safe in any thread and event loop."""
    global _total
    with _lock:
        _total += Counters(bytes_read, requests, retries, tiles)


def counters() -> Counters:
    """Return the counters; subtract two results to measure what happened between them."""
    return _total
