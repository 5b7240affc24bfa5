"""The thread pool of each process, for fetching and decoding."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

THREADS = 24  # more than cores, because most of them wait for the network

_here = threading.local()


def for_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call ``function`` on all items in this process's thread pool, and return the results.

    The first failure is raised, and calls that have not begun are dropped. Inside a thread of the
    pool the calls run one after the other, because a pool that waits for itself waits for ever.
    """
    if getattr(_here, "is_in_pool", False):
        return [function(item) for item in items]
    return list(_pool(os.getpid()).map(function, items))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    # The key is the process id, because threads do not survive a fork.
    return ThreadPoolExecutor(THREADS, "inkdask-read", initializer=_enter)


def _enter() -> None:
    _here.is_in_pool = True
