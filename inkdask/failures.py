"""Failures as values: what a task hands on when it cannot do its work.

An exception on Dask's threads ends the whole computation, and so other people's chunks. A
`Failure` ends only the chunks that need its block: it passes through Dask's own steps (slices,
``rechunk``, ``overlap``) as an array would, and through every function that is `fallible`.
"""

from __future__ import annotations

import functools
import pickle
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar
from uuid import uuid4

from dask.array.dispatch import concatenate_lookup

from inkdask.errors import InkdaskError, UnavailableError

P = ParamSpec("P")
R = TypeVar("R")


@dataclass(frozen=True, eq=False)
class Failure:
    """Error of a task, returned instead of its result.

    Attributes
    ----------
    error
        The error; picklable, and free of the frames that hold a block in memory.
    trace
        Its traceback, for the log.
    worker
        Address of the Dask worker; empty elsewhere.
    cause
        Tells this failure from others, on its way through many tasks.
    """

    error: Exception
    trace: str = ""
    worker: str = ""
    cause: str = field(default_factory=lambda: uuid4().hex)

    # As an array (z, y, x) for Dask's own steps.
    ndim = 3
    __array_priority__ = 1e9

    def __getitem__(self, _: Any) -> Failure:
        return self

    def __array_function__(self, *_: Any) -> Failure:
        return self

    @property
    def may_pass(self) -> bool:
        """Whether trying again may help; it does not after an error that a user must act on."""
        return isinstance(self.error, UnavailableError) or not isinstance(self.error, InkdaskError)

    @property
    def reason(self) -> str:
        """What the error says, for a sentence: without its full stop."""
        error = self.error
        text = str(error) if isinstance(error, InkdaskError) else f"{type(error).__name__}: {error}"
        return " ".join(text.split()).rstrip(".")


@concatenate_lookup.register(Failure)
def _first(arrays: Any, axis: int = 0) -> Failure:
    return next(array for array in arrays if isinstance(array, Failure))


def fallible(function: Callable[P, R]) -> Callable[P, R | Failure]:
    """Let a task function return a `Failure` in place of raising, and hand on one that it gets."""

    @functools.wraps(function)
    def attempt(*args: P.args, **kwargs: P.kwargs) -> R | Failure:
        for value in args:
            if isinstance(value, Failure):
                return value
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return caught(error)

    return attempt


def caught(error: Exception) -> Failure:
    """Make a failure of an error that was just raised."""
    trace = "".join(traceback.format_exception(error))
    try:
        pickle.dumps(error)
    except Exception:  # of a library, whose errors hold sockets
        error = RuntimeError(f"{type(error).__name__}: {error}")
    link: BaseException | None = error
    while link is not None:
        link.__traceback__ = None
        link = link.__cause__ or link.__context__
    return Failure(error, trace, _worker())


@fallible
def read_or_fail(block: Any) -> Any:
    """Read a `Block` of the volume: an array, or the failure."""
    return block.read()


def unwrap(value: R | Failure) -> R:
    """Return a value that is none; raise the error of a failure, for who computes a lazy array."""
    if isinstance(value, Failure):
        raise value.error
    return value


def dask_worker() -> Any | None:
    """Return the Dask worker whose task this thread runs, or None."""
    if "distributed" not in sys.modules:  # no thread has made a worker
        return None
    from distributed import get_worker  # waits, if another thread is just importing it

    try:
        return get_worker()
    except ValueError:
        return None


def _worker() -> str:
    worker = dask_worker()
    return str(worker.address) if worker else ""
