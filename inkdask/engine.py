"""Where tasks run: the current Dask client if there is one, else threads of this process.

A task that fails does not stop the others. What may pass (a lost worker, a server that does not
answer) is tried again, after a pause and on other workers; what cannot (a corrupt file) is not.
"""

from __future__ import annotations

import copy
import logging
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue
from typing import Any

import dask
from dask import threaded
from dask._task_spec import Alias
from dask.base import collections_to_expr
from dask.callbacks import Callback
from dask.delayed import Delayed
from dask.system import CPU_COUNT

from inkdask.errors import InkdaskError, UnavailableError

log = logging.getLogger("inkdask")

TRIES = 3  # of a task, before it fails for good
PAUSE = 1.0  # seconds before the second try; the next waits twice as long
MOST_THREADS = 32  # of the local scheduler, beside the network's
HOPELESS = 10  # failures without one success: something is wrong with all of them

Key = Any
Tell = Callable[[Key, Any, Exception | None, Key], None]  # a task, its result or error, and whose


def compute_each(
    tasks: Sequence[Delayed], on_result: Callable[[Any], None]
) -> dict[Key, Exception]:
    """Compute tasks in any order, and hand over each result as it comes.

    Runs on the current ``distributed.Client`` where there is one, else on the threads of this
    process; a library call never starts a cluster.

    Parameters
    ----------
    tasks
        They may share parts of one graph.
    on_result
        Called in this thread, once for each task that succeeds.

    Returns
    -------
    What failed for good: the key of the task, and its error. Tasks that were never tried, because
    all the first ones failed, are not in it.
    """
    left = {task.key: task for task in tasks}
    failed: dict[Key, Exception] = {}
    avoid: set[str] = set()  # workers on which tasks failed
    causes: set[Key] = set()  # one task that cannot read may fail many
    succeeded = False

    def tell(key: Key, result: Any, error: Exception | None, cause: Key = None) -> None:
        nonlocal succeeded
        if error is not None:
            failed[key] = error
            causes.add(cause)
            if not succeeded and len(causes) >= HOPELESS:
                raise _HopelessError
            return
        succeeded = True
        failed.pop(key, None)
        on_result(result)

    for attempt in range(TRIES):
        if attempt:
            log.info("%d failed, and will be tried again", len(left))
            time.sleep(PAUSE * 2 ** (attempt - 1))
        client = current_client()
        try:
            if client is None:
                _on_threads(left, tell)
            else:
                _on_cluster(client, left, tell, avoid)
        except _HopelessError:
            break
        left = {key: left[key] for key, error in failed.items() if may_pass(error)}
        if not left:
            break
    return failed


def raise_any(failed: Mapping[Key, Exception]) -> None:
    """Raise the first error of `compute_each`, where a failure of one is a failure of all.

    Raises
    ------
    InkdaskError
        That error, or in its place one that says what kind it is of.
    """
    for error in failed.values():
        if isinstance(error, InkdaskError):
            raise error
        log.debug("a task failed", exc_info=error)
        raise InkdaskError(f"{reason(error)}.") from error


def reason(error: Exception) -> str:
    """What an error of `compute_each` says, for a sentence: without its full stop."""
    text = str(error) if isinstance(error, InkdaskError) else f"{type(error).__name__}: {error}"
    return " ".join(text.split()).rstrip(".")


def may_pass(error: Exception) -> bool:
    """Whether it makes sense to try again: not after an error that a user must act on."""
    return isinstance(error, UnavailableError) or not isinstance(error, InkdaskError)


def current_client() -> Any | None:
    """The ``distributed.Client`` of this process, or None."""
    if "distributed" not in sys.modules:  # nobody can have made one
        return None
    from distributed import default_client

    try:
        client = default_client()
    except ValueError:
        return None
    return client if client.scheduler else None  # else it is only just being made


def on_workers(function: Callable[[], Any]) -> list[Any]:
    """Results of a function that every worker process runs now; none without a client."""
    client = current_client()
    return [] if client is None else list(client.run(function).values())


def lost_tasks(keys: set[Key]) -> list[Key]:
    """Those of some tasks that a worker was at, or held, when it was lost; once for each time."""
    client = current_client()
    lost: list[Key] = []
    for _, event in client.get_events("all") if client else ():
        if isinstance(event, dict) and event.get("action") == "remove-worker":
            names = {*event["processing-tasks"], *event["lost-computed-tasks"]}
            lost += [key for key in names if key in keys]
    return lost


def threads() -> int:
    """Threads of the local scheduler: the network has one of its own, the others read ahead.

    Dask's setting ``num_workers``, or as many as the cores: up to a number that feeds any GPU, as
    each takes the memory of a chunk.
    """
    return dask.config.get("num_workers", None) or min(CPU_COUNT, MOST_THREADS) + 1


class _HopelessError(Exception):
    """All that was tried has failed."""


def _on_cluster(client: Any, tasks: Mapping[Key, Delayed], tell: Tell, avoid: set[str]) -> None:
    from distributed import as_completed

    workers = client.scheduler_info(n_workers=-1)["workers"]
    others = [address for address in workers if address not in avoid]
    rather = {"workers": others, "allow_other_workers": True} if avoid and others else {}
    futures = client.compute(list(tasks.values()), **rather)
    try:
        for future in as_completed(futures):
            if future.status == "finished":
                result = future.result()
                # Nobody shall compute it again when the worker that holds it dies.
                future.release()
                tell(future.key, result, None, future.key)
                continue
            cause, where = client.run_on_scheduler(_blamed, key=future.key)
            avoid.update(where)
            lost = RuntimeError(f"task {future.key} was {future.status}")
            error = future.exception() if future.status == "error" else lost
            tell(future.key, None, error, cause)
    except Exception as error:
        if client.status == "running":
            raise
        raise UnavailableError(
            f"The Dask scheduler at {client.scheduler.address} is gone; what is finished is kept, "
            "and the same command resumes with the rest."
        ) from error
    finally:
        if client.status == "running":
            client.cancel(futures)


def _blamed(key: Key, dask_scheduler: Any) -> tuple[Key, list[str]]:
    """The task whose failure failed this one, and the workers where it did."""
    task = dask_scheduler.tasks.get(key)
    blamed = (task.exception_blame or task) if task else None
    return (blamed.key, list(blamed.erred_on or ())) if blamed else (key, [])


def _on_threads(tasks: Mapping[Key, Delayed], tell: Tell) -> None:
    """Compute on threads, where Dask stops at an error; go on with what does not depend on it."""
    expression = collections_to_expr(list(tasks.values()), optimize_graph=True).optimize()
    outcomes: SimpleQueue[tuple[Key, Any, Exception | None]] = SimpleQueue()
    graph = {key: _watched(node, outcomes) for key, node in expression.__dask_graph__().items()}
    left = set(tasks)
    names: dict[Key, set[Key]] = {}  # fused tasks go by other names than those asked for
    for key in tasks:
        names.setdefault(_own_name(graph, key), set()).add(key)

    def pass_on(*_: Any) -> None:
        while not outcomes.empty():
            key, result, error = outcomes.get()
            ended = left & (names.get(key, set()) if error is None else _dependents(graph, key))
            left.difference_update(ended)
            for each in ended:
                tell(each, result, error, key)

    while left:
        pool = ThreadPoolExecutor(threads())
        try:
            with Callback(posttask=pass_on):
                keys = list(left)
                results = threaded.get(graph, keys, pool=pool)
            for key, result in zip(keys, results, strict=True):
                if key in left:  # data, and no task
                    outcomes.put((_own_name(graph, key), result, None))
            pass_on()
        except _TaskError:
            pool.shutdown()  # what is under way is finished, and counts
            pass_on()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


class _TaskError(Exception):
    """The error of a task, which is among the outcomes."""


def _own_name(graph: Mapping[Key, Any], key: Key) -> Key:
    """The task that a key stands for, where it is but another name."""
    while isinstance(graph[key], Alias):
        key = graph[key].target
    return key


def _watched(node: Any, outcomes: SimpleQueue[tuple[Key, Any, Exception | None]]) -> Any:
    """A task that tells its outcome before Dask knows of it."""
    if not hasattr(node, "func"):  # data, or another name of a task
        return node
    watched = copy.copy(node)
    watched.func = partial(_tell, outcomes, node.key, node.func)
    return watched


def _tell(
    outcomes: SimpleQueue[tuple[Key, Any, Exception | None]],
    key: Key,
    function: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    try:
        result = function(*args, **kwargs)
    except Exception as error:
        outcomes.put((key, None, error))
        raise _TaskError from error
    outcomes.put((key, result, None))
    return result


def _dependents(graph: Mapping[Key, Any], key: Key) -> set[Key]:
    """A task, and all that need its result."""
    users: dict[Key, list[Key]] = {}
    for user, node in graph.items():
        for used in node.dependencies:
            users.setdefault(used, []).append(user)
    found, todo = {key}, [key]
    while todo:
        fresh = set(users.get(todo.pop(), ())) - found
        found |= fresh
        todo += fresh
    return found
