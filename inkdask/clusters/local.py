"""Worker processes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dask.system import CPU_COUNT

if TYPE_CHECKING:
    from distributed import Client

CORES = 4  # per worker: a network gains little from more, and each worker has a copy of it
DASHBOARD = "127.0.0.1:8787"


@contextmanager
def local(max_workers: int | None) -> Iterator[Client]:
    """Start one worker process for every 4 cores, or ``max_workers``.

    One thread of a worker runs all forward passes, with the worker's share of the cores. Another
    thread reads ahead.
    """
    from distributed import Client, LocalCluster

    workers = max_workers or max(CPU_COUNT // CORES, 1)
    cores = max(CPU_COUNT // workers, 1)
    with (
        LocalCluster(
            n_workers=workers,
            threads_per_worker=max(cores, 2),
            resources={"cores": cores},  # read by `models.hardware.cores`; no task requests them
            dashboard_address=DASHBOARD,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client
