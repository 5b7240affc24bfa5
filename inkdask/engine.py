"""Where tasks run: the current Dask client if there is one, else threads of this process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import dask
from dask.callbacks import Callback
from dask.delayed import Delayed
from dask.system import CPU_COUNT

RETRIES = 3  # of a chunk, on any worker, before it fails for good


def compute_each(tasks: Sequence[Delayed], on_result: Callable[[Any], None]) -> None:
    """Compute tasks in any order, and hand over each result as it comes.

    Runs on the current ``distributed.Client`` where there is one, else on the threads of this
    process; a library call never starts a cluster.

    Parameters
    ----------
    tasks
        They may share parts of one graph.
    on_result
        Called in this thread, once for each task.
    """
    if not tasks:
        return
    client = current_client()
    if client is None:
        with _EachResult({task.key for task in tasks}, on_result):
            dask.compute(
                *tasks,
                scheduler=dask.config.get("scheduler", None) or "threads",
                num_workers=dask.config.get("num_workers", None) or threads(),
            )
        return
    from distributed import as_completed

    futures = client.compute(list(tasks), retries=RETRIES)
    try:
        for _, result in as_completed(futures, with_results=True):
            on_result(result)
    finally:
        client.cancel(futures)


def current_client() -> Any | None:
    """The ``distributed.Client`` of this process, or None."""
    if "distributed" not in sys.modules:  # nobody can have made one
        return None
    from distributed import default_client

    try:
        return default_client()
    except ValueError:
        return None


def on_workers(function: Callable[[], Any]) -> list[Any]:
    """Results of a function that every worker process runs now; none without a client."""
    client = current_client()
    return [] if client is None else list(client.run(function).values())


def threads() -> int:
    """Threads of the local scheduler: the network has one of its own, the others read ahead."""
    return CPU_COUNT + 1


class _EachResult(Callback):
    """Tells of the tasks of interest as the local scheduler finishes them."""

    def __init__(self, keys: set[Any], on_result: Callable[[Any], None]) -> None:
        super().__init__()
        self._keys, self._on_result = keys, on_result

    def _posttask(self, key: Any, result: Any, *_: Any) -> None:
        if key in self._keys:
            self._on_result(result)
