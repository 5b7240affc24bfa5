"""Where tasks run: the current Dask client if there is one, else threads of this process.

A task that fails does not stop the others (`inkdask.failures`). It is tried again alone, where
that is possible, after a pause, and on another worker; a request that fails is tried again where it
is made (`inkdask.storage.s3`).
"""

from __future__ import annotations

import ctypes
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import dask
from dask import threaded
from dask.callbacks import Callback
from dask.core import get_dependencies
from dask.delayed import Delayed
from dask.system import CPU_COUNT
from threadpoolctl import threadpool_limits

from inkdask.errors import InkdaskError, UnavailableError
from inkdask.failures import Failure, caught

log = logging.getLogger("inkdask")

TRIES = 3  # of a task, before it fails for good
PAUSE = 1.0  # seconds before the second try; the next waits twice as long
MOST_THREADS = 32  # of the local scheduler, beside the network's
HOPELESS = 10  # failures without one success: something is wrong with all of them
_LOST = "processing-tasks", "lost-computed-tasks"  # tasks in the event of a removed worker
Tell = Callable[[int, Any], None]  # number of a task, and its result or `Failure`


@dataclass
class Account:
    """How the tasks of `compute_each` ended.

    Attributes
    ----------
    failed
        Failures for good, by the number of the task; tasks that were never tried have none.
    succeeded, lost
        How many succeeded, and how many were at or on a worker that was lost, for each loss.
    """

    failed: dict[int, Failure] = field(default_factory=dict)
    succeeded: int = 0
    lost: int = 0

    def check(self) -> None:
        """Raise the first error, where a failure of one task is a failure of all."""
        for failure in self.failed.values():
            log.debug("a task failed:\n%s", failure.trace)
            if isinstance(failure.error, InkdaskError):
                raise failure.error
            raise InkdaskError(f"{failure.reason}.") from failure.error


def compute_each(
    tasks: Sequence[Delayed],
    on_result: Tell,
    alone: Callable[[int], Delayed] | None = None,
) -> Account:
    """Compute tasks in any order, and hand over each result as it comes.

    Parameters
    ----------
    tasks
        They may share parts of one graph.
    on_result
        Called in this thread with the number of each task that succeeds, and its result, once.
    alone
        Makes the task of a number anew so that it shares nothing: a block that cannot be read may
        be needed by some of the tasks only. Every task that failed is tried so.
    """
    left = dict(enumerate(tasks))
    account, avoid = Account(), set[str]()  # workers on which tasks failed
    causes = set[str]()  # one block that cannot be read may fail many tasks

    def tell(number: int, result: Any) -> None:
        if not isinstance(result, Failure):
            account.succeeded += 1
            account.failed.pop(number, None)
            on_result(number, result)
            return
        account.failed[number] = result
        causes.add(result.cause)
        avoid.update({result.worker} - {""})
        if not account.succeeded and len(causes) >= HOPELESS:
            raise _HopelessError

    client = current_client()  # for all tries: a job does not go on without its cluster
    with reaching(client):
        for attempt in range(TRIES):
            if attempt and any(account.failed[number].may_pass for number in left):
                log.info("%d failed, and will be tried again", len(left))
                time.sleep(PAUSE * 2 ** (attempt - 1))
            try:
                if client is None:
                    _on_threads(left, tell)
                else:
                    account.lost += _on_cluster(client, left, tell, avoid)
            except _HopelessError:
                break
            failed = account.failed.items()
            again = [number for number, it in failed if it.may_pass or (alone and not attempt)]
            left = {number: alone(number) if alone else left[number] for number in again}
            if not left:
                break
    return account


def current_client() -> Any | None:
    """The ``distributed.Client`` of this process, or None; raises where it lost its scheduler."""
    if "distributed" not in sys.modules:  # nobody can have made one
        return None
    from distributed import default_client

    try:
        client = default_client()
    except ValueError:
        return None
    if client.status == "closed":  # within its block
        raise UnavailableError(
            "The Dask scheduler of this process's client is gone; what is finished is kept, and "
            "the same command resumes with the rest."
        )
    return client if client.scheduler else None  # else it is only just being made


def has_gpus(cluster: str) -> bool:
    """Whether the workers have GPUs, before a cluster of this kind is made."""
    if (client := current_client()) is not None:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        return bool(workers) and all("gpu" in worker for worker in workers)
    if cluster != "threads":
        return cluster == "cuda"
    try:
        ctypes.CDLL("nvcuda.dll" if os.name == "nt" else "libcuda.so.1")
    except OSError:  # no driver, so torch, which takes seconds to import, need not be asked
        return False
    import torch

    return torch.cuda.is_available()


def on_workers(function: Callable[[], Any]) -> list[Any]:
    """Results of a function that every worker runs now, but for workers that are just lost."""
    client = current_client()
    return [] if client is None else list(client.run(function, on_error="ignore").values())


@contextmanager
def reaching(client: Any | None) -> Iterator[None]:
    """Say that the scheduler is gone, whatever fails in a block because of that."""
    if client is None:
        yield
        return
    from distributed.comm import CommClosedError

    address = client.scheduler.address  # which a client that closes forgets
    try:
        yield
    except InkdaskError:
        raise
    except Exception as error:
        if client.status == "running" and not isinstance(error, CommClosedError):
            raise
        raise UnavailableError(
            f"The Dask scheduler at {address} is gone; what is finished is kept, and the same "
            "command resumes with the rest."
        ) from error


def threads() -> int:
    """Threads of the local scheduler: ``num_workers`` of Dask's settings, or one over the cores."""
    return dask.config.get("num_workers", None) or min(CPU_COUNT, MOST_THREADS) + 1


class _HopelessError(Exception):
    """All that was tried has failed."""


@dataclass(frozen=True)
class _Told:
    """Number of a task, and its result."""

    number: int
    result: Any


def _on_threads(tasks: Mapping[int, Delayed], tell: Tell) -> None:
    left, refused = set(tasks), list[Exception]()  # what `tell` raised, which is no task's failure

    def pass_on(_key: Any, result: Any, *_: Any) -> None:
        if isinstance(result, _Told) and result.number in left:
            left.remove(result.number)
            try:
                tell(result.number, result.result)
            except Exception as error:
                refused.append(error)
                raise

    numbered = [dask.delayed(_Told)(number, task) for number, task in tasks.items()]
    pool = ThreadPoolExecutor(threads())
    try:
        # A thread for each product, because tasks run side by side; nannies do so for workers.
        with threadpool_limits(1, "blas"), Callback(posttask=pass_on):
            dask.compute(*numbered, scheduler=threaded.get, pool=pool)
    except Exception as error:  # of a step that is Dask's own, or of a user's array
        if error in refused:
            raise
        failure = caught(error)
        for number in tuple(left):
            tell(number, failure)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def last_steps(tasks: Mapping[int, Delayed]) -> dict[Any, int]:
    """Return the numbers of tasks by their keys, and by the key of a single step before.

    A task of an array is often another name for the step that does all the work.
    """
    numbers = {}
    for number, task in tasks.items():
        numbers[task.key] = number
        before = get_dependencies(task.dask, task.key)
        if len(before) == 1:
            numbers[before.pop()] = number
    return numbers


def _on_cluster(client: Any, tasks: Mapping[int, Delayed], tell: Tell, avoid: set[str]) -> int:
    """Compute tasks on a cluster; return how often one was lost with its worker."""
    from distributed import as_completed

    workers = client.scheduler_info(n_workers=-1)["workers"]
    others = [address for address in workers if address not in avoid]
    rather = {"workers": others, "allow_other_workers": True} if avoid and others else {}
    futures = client.compute(list(tasks.values()), **rather)
    numbers = {future.key: number for future, number in zip(futures, tasks, strict=True)}
    try:
        for future in as_completed(futures):
            if future.status == "finished":
                result = future.result()
            elif future.status == "error":
                result = Failure(future.exception())
            else:
                result = Failure(RuntimeError(f"task {future.key} was {future.status}"))
            # Release the result, so that nobody computes it again when its worker dies.
            future.release()
            tell(numbers[future.key], result)
        events = [event for _, event in client.get_events("all") if isinstance(event, dict)]
        lost = [event for event in events if event.get("action") == "remove-worker"]
        steps = last_steps(tasks)
        return sum(
            len({steps.get(key) for kind in _LOST for key in event[kind]} - {None})
            for event in lost
        )
    finally:
        if client.status == "running":
            client.cancel(futures)
