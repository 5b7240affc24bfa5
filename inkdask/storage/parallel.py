"""One pool of threads for each process, for fetching and decoding."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")

# Most of these wait for the network; decoding releases the interpreter and shares the cores.
THREADS = 24

_here = threading.local()


def for_each(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call ``function`` on all items at once, in this process's pool, and return all answers.

    The first failure is raised, and what has not begun by then is dropped. From inside itself it
    calls one after the other, because threads of a pool that wait for the same pool wait for ever.
    """
    if getattr(_here, "is_in_pool", False):
        return [function(item) for item in items]
    return list(_pool(os.getpid()).map(function, items))


@cache
def _pool(process: int) -> ThreadPoolExecutor:
    # Threads do not survive a fork, hence one pool for each process id.
    return ThreadPoolExecutor(THREADS, "inkdask-read", initializer=_enter)


def _enter() -> None:
    _here.is_in_pool = True
