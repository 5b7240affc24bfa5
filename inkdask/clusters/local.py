"""Worker processes on this machine."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

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
    from distributed import LocalCluster

    workers = max_workers or max(CPU_COUNT // CORES, 1)
    cores = max(CPU_COUNT // workers, 1)
    with (
        own_options() as options,
        LocalCluster(
            n_workers=workers,
            threads_per_worker=max(cores, 2),
            resources={"cores": cores},  # read by `models.hardware.cores`; no task requests them
            **options,
        ) as cluster,
        own_client(cluster) as client,
    ):
        yield client


@contextmanager
def own_options() -> Iterator[dict[str, Any]]:
    """Give the options of a `LocalCluster` whose workers obey this process alone.

    Connections need a certificate that only this process and its workers have, in memory, because
    every user of the machine reaches every port. Workers leave Ctrl-C, which a terminal sends to
    them too, to this process.
    """
    from distributed.utils import LoopRunner

    resource_tracker.ensure_running()  # because its start would let the signal through again
    runner = LoopRunner()
    # Workers, those in place of lost ones too, are started from the loop's thread, and inherit the
    # mask of their thread.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        with warnings.catch_warnings():
            # A log names the dashboard, wherever it is.
            warnings.filterwarnings("ignore", r"Port \d+ is already in use", UserWarning)
            yield {"loop": runner.loop, "security": True, "dashboard_address": DASHBOARD}
    finally:
        runner.stop()


@contextmanager
def own_client(cluster: Any) -> Iterator[Client]:
    """Give the client of a cluster of this machine; an interrupt ends its workers at once."""
    from distributed import Client, NannyPlugin

    class AtOnce(NannyPlugin):
        """End a worker within its chunk, for which it would wait for seconds and then complain."""

        def teardown(self, nanny: Any) -> None:
            if nanny.pid:
                os.kill(nanny.pid, signal.SIGKILL)

    with Client(cluster) as client:
        try:
            yield client
        except KeyboardInterrupt:
            client.register_plugin(AtOnce())
            raise
