"""Performance report of a job, as one HTML page."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inkdask import engine, storage
from inkdask.storage import outputs
from inkdask.storage.scratch import Scratch

log = logging.getLogger("inkdask")


@contextmanager
def report(uri: str | None) -> Iterator[None]:
    """Record the tasks of the block, and write a page about them, also when the block fails.

    On a cluster the page is Dask's performance report, on threads the profile of the tasks and of
    the machine. A place that cannot be written is refused before the block begins.

    Parameters
    ----------
    uri
        File of the page, local or ``s3://``; None records nothing.
    """
    if uri is None:
        yield
        return
    with outputs.moved_by("REPORT"):
        outputs.check_writable(uri)
    with Scratch() as scratch:
        page = scratch / "report.html"
        try:
            with _of_threads(page) if engine.current_client() is None else _of_cluster(page):
                yield
        finally:
            if page.exists():
                storage.put_file(page, uri)
                log.info("Report: %s", uri)


@contextmanager
def _of_cluster(page: Path) -> Iterator[None]:
    from distributed import performance_report

    # Profiles are as deep as the stacks of networks, and dask measures their size recursively.
    engine.on_workers(_allow_deep_profiles)
    with performance_report(filename=str(page), mode="inline"):
        yield


def _allow_deep_profiles() -> None:
    sys.setrecursionlimit(max(sys.getrecursionlimit(), 10_000))


@contextmanager
def _of_threads(page: Path) -> Iterator[None]:
    from dask.diagnostics import Profiler, ResourceProfiler, visualize

    tasks, machine = Profiler(), ResourceProfiler(dt=0.25)
    try:
        with tasks, machine:
            yield
    finally:
        if tasks.results:
            visualize([tasks, machine], filename=str(page), show=False, save=True, mode="inline")
