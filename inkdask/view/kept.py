"""Cache of arrays that were read or computed for a viewer."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from concurrent.futures import Future

import numpy as np


class Kept:
    """The latest used arrays, up to a number of bytes.

    Threads that ask for one array at once wait for the first of them to make it.
    """

    def __init__(self, most_bytes: int) -> None:
        self._most, self._bytes = most_bytes, 0
        self._lock = threading.Lock()
        self._arrays: OrderedDict[Hashable, Future[np.ndarray]] = OrderedDict()

    def get(self, key: Hashable, make: Callable[[], np.ndarray]) -> np.ndarray:
        """Return the array of a key, or make it; an error of ``make`` is not kept."""
        with self._lock:
            known = self._arrays.get(key)
            future = known or self._arrays.setdefault(key, Future())
            self._arrays.move_to_end(key)
        if known:
            return known.result()
        try:
            array = make()
        except BaseException as error:
            with self._lock:
                if self._arrays.get(key) is future:
                    del self._arrays[key]
            future.set_exception(error)
            raise
        future.set_result(array)
        with self._lock:
            if self._arrays.get(key) is future:  # else it was dropped while it was made
                self._bytes += array.nbytes
                self._make_room(key)
        return array

    def drop(self, key: Hashable) -> None:
        """Forget an array that is out of date."""
        with self._lock:
            self._forget(key)

    def _make_room(self, newest: Hashable) -> None:
        for key in list(self._arrays):
            if self._bytes <= self._most:
                return
            if key != newest and self._arrays[key].done():
                self._forget(key)

    def _forget(self, key: Hashable) -> None:
        future = self._arrays.pop(key, None)
        if future is not None and future.done():
            self._bytes -= future.result().nbytes
