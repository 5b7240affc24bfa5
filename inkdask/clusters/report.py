"""What a job spent its time on, as one HTML page."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from inkdask import engine, storage
from inkdask.storage import outputs

log = logging.getLogger("inkdask")


@contextmanager
def report(uri: str | None) -> Iterator[None]:
    """Record what Dask does in the block, and write a page about it, also when the block fails.

    Parameters
    ----------
    uri
        Where the page goes, local or ``s3://``; None records nothing. On a cluster it is Dask's
        performance report, on threads the profile of its tasks and of the machine.

    Raises
    ------
    InkdaskError
        When there is no place for the page, before anything else happens.
    """
    if uri is None:
        yield
        return
    outputs.check_writable(uri)
    with tempfile.TemporaryDirectory(prefix="inkdask-") as scratch:
        page = Path(scratch) / "report.html"
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

    with performance_report(filename=str(page), mode="inline"):
        yield


@contextmanager
def _of_threads(page: Path) -> Iterator[None]:
    from dask.diagnostics import Profiler, ResourceProfiler, visualize

    tasks, machine = Profiler(), ResourceProfiler(dt=0.25)
    try:
        with tasks, machine:
            yield
    finally:
        if tasks.results:
            visualize([tasks, machine], filename=str(page), show=False, save=True)
