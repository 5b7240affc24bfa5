"""A cluster, an S3 server behind a proxy that fails on purpose, and a small disk; all can be hurt.

Scheduler, workers and clients are processes that a server forks, because importing torch and
distributed takes seconds. Whoever dies is replaced, as Kubernetes does.
"""

from __future__ import annotations

import asyncio
import atexit
import faulthandler
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from inkdask.errors import InkdaskError
from tests.conftest import free_port, start_server
from tests.faultproxy import FaultProxy

WORKERS, THREADS = 3, 2
DISK = 16 << 20  # bytes of the small disk
TIME_TO_LIVE = "12 s"  # of a worker that is silent; Dask's default is 5 minutes
PATIENCE = 900  # seconds for an undisturbed job, because a machine may be busy

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["inkdask.workflow", "inkdask.predictor", "inkdask.storage.s3", "distributed", __name__]
)


def network(x: Any) -> Any:
    """Return logits (b, 1, 4, 4) of the first and last layer, after the time that PACE says."""
    import torch

    if pace := os.environ.get("PACE"):
        time.sleep(len(x) * float(Path(pace).read_text()))
    return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], 4)


class Rig:
    """All processes and places, below one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.disk = folder, folder / "disk"
        self.disk.mkdir()
        self.is_mounted = not subprocess.call(
            ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.disk)],
            stderr=subprocess.DEVNULL,
        )
        for name in ("tmp", "workers"):
            (self.disk / name).mkdir()
        self.pace = folder / "pace"
        self.pace.write_text("0")
        self.servers: list[subprocess.Popen[bytes]] = []
        self.s3 = self._serve("moto.server", "-H", "127.0.0.1", "-p")
        self.proxy = FaultProxy(self._serve("tests.faultproxy", after=[self.s3]))
        self.port = free_port()
        self.address = f"tcp://127.0.0.1:{self.port}"
        self.absent_until = 0.0  # the time of `time.monotonic` before which no scheduler comes
        self.scheduler = self._begin(schedule, self.port, str(self.folder))
        self.workers = [self._work(number) for number in range(WORKERS)]
        self.client: Any = None
        self.twins: list[tuple[Any, Path]] = []  # more clients of the same job, and their logs
        self._given: tuple[Any, ...] = ()

    def _serve(self, module: str, *words: str, after: list[str] | None = None) -> str:
        port = free_port()
        server = start_server("-m", module, *words, str(port), *(after or []), port=port)
        self.servers.append(server)
        return f"http://127.0.0.1:{port}"

    def environment(self, s3: str) -> dict[str, str]:
        """Variables of a job's process, with the endpoint of S3."""
        return {
            "AWS_ENDPOINT_URL": s3, "AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull, "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
            "TMPDIR": str(self.disk / "tmp"), "MODEL_VERSION": "1",
        }  # fmt: skip

    def _begin(self, target: Callable[..., None], *words: Any, log: str = "cluster.log") -> Any:
        environment = {**self.environment(self.proxy.url), "PACE": str(self.pace)}
        return self._fork(target, environment, self.folder / log, *words)

    def _fork(self, target: Any, environment: dict[str, str], log: Path, *words: Any) -> Any:
        job = partial(enter, target, environment, str(log))
        process = PROCESSES.Process(target=job, args=words, daemon=True)
        process.start()
        return process

    def _work(self, number: int) -> Any:
        return self._begin(work, self.address, number, str(self.disk / "workers" / str(number)))

    def heal(self) -> None:
        """Replace the processes of the cluster that have died."""
        if self.scheduler.exitcode is not None and time.monotonic() > self.absent_until:
            self.scheduler = self._begin(schedule, self.port, str(self.folder))
        for number, worker in enumerate(self.workers):
            if worker.exitcode is not None:
                self.workers[number] = self._work(number)

    def recover(self) -> None:
        """Wait until the cluster has a scheduler that can be reached."""
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end:
            self.heal()
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
                return
            time.sleep(0.1)
        raise TimeoutError("no scheduler starts")

    def start(self, log: Path, options: dict[str, Any]) -> Any:
        """Begin a job's client on the cluster, which sees S3 through the proxy."""
        environment = {**self.environment(self.proxy.url), "PACE": str(self.pace)}
        self._given = run, environment, log, {**options, "cluster": self.address}
        self.client = self._fork(*self._given)
        return self.client

    def start_twin(self) -> None:
        """Give the command of the running job once more, while it runs."""
        target, environment, log, options = self._given
        log = log.with_name(f"{log.stem}-twin-{len(self.twins)}.log")
        self.twins.append((self._fork(target, environment, log, options), log))

    def run_alone(self, log: Path, options: dict[str, Any]) -> None:
        """Run a job undisturbed, without cluster and proxy."""
        process = self._fork(run, self.environment(self.s3), log, options)
        process.join(PATIENCE)
        if process.exitcode != 0:
            raise RuntimeError(f"the undisturbed job failed:\n{log.read_text()}")

    def forget_s3(self) -> None:
        """Empty the S3 server."""
        urllib.request.urlopen(f"{self.s3}/moto-api/reset", b"").close()

    def fill(self) -> Callable[[], None]:
        """Leave no room on the small disk; return what makes room again.

        Without the right to mount, no process may write a file any longer.
        """
        ballast = self.disk / "ballast"
        if self.is_mounted:
            with suppress(OSError), ballast.open("wb", buffering=0) as file:
                while file.write(bytes(1 << 16)):
                    pass
            return partial(ballast.unlink, missing_ok=True)
        limited = [process.pid for process in (*self.workers, self.client)]
        for pid in limited:
            limit_files(pid, 0)
        return lambda: [limit_files(pid, resource.RLIM_INFINITY) for pid in limited]  # type: ignore[return-value]

    def strangers(self) -> list[psutil.Process]:
        """Processes that are neither servers nor of the cluster."""
        ours = {process.pid for process in (*self.servers, self.scheduler, *self.workers)}
        helpers = ("forkserver", "resource_tracker")
        found = []
        for process in psutil.Process().children(recursive=True):
            with suppress(psutil.Error):
                words = " ".join(process.cmdline())
                is_helper = process.ppid() == os.getpid() and any(map(words.__contains__, helpers))
                if process.pid not in ours and not is_helper:
                    found.append(process)
        return found

    def close(self) -> None:
        """End all processes, and give the small disk back."""
        twins = [twin for twin, _ in self.twins]
        for process in (self.client, *twins, *self.workers, self.scheduler):
            if process is not None:
                process.kill()
                process.join()
        for server in self.servers:
            server.kill()
            server.wait()
        if self.is_mounted:
            subprocess.call(["umount", "-l", str(self.disk)])


def limit_files(pid: int, size: int) -> None:
    """Limit the size of the files that a process writes."""
    with suppress(ProcessLookupError):
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def enter(target: Callable[..., None], environment: dict[str, str], log: str, *words: Any) -> None:
    """Run in a new process: take the environment, and write what is said to a file."""
    os.environ.update(environment)
    tempfile.tempdir = None
    file = Path(log).open("a", buffering=1)  # noqa: SIM115  open until the process ends
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    faulthandler.register(signal.SIGUSR1, file, all_threads=True)  # for a job that hangs
    try:
        target(*words)
    finally:
        atexit._run_exitfuncs()  # which a forked process leaves out


def schedule(port: int, folder: str) -> None:
    """Be the scheduler."""
    import dask
    from distributed import Scheduler

    async def serve() -> None:
        async with Scheduler(host="127.0.0.1", port=port, dashboard=False) as scheduler:
            await scheduler.finished()

    how = {"distributed.scheduler.worker-ttl": TIME_TO_LIVE, "temporary-directory": folder}
    with dask.config.set(how):
        asyncio.run(serve())


def work(address: str, number: int, folder: str) -> None:
    """Be a worker."""
    from distributed import Worker

    shutil.rmtree(folder, ignore_errors=True)  # of the one before, as with its pod
    Path(folder).mkdir(parents=True)

    async def serve() -> None:
        name = f"{number}-{os.getpid()}"
        options = {"nthreads": THREADS, "local_directory": folder, "resources": {"cores": 1}}
        async with Worker(address, name=name, **options) as worker:
            await worker.finished()

    asyncio.run(serve())


def run(options: dict[str, Any]) -> None:
    """Be the client of a job, and end as the command line does."""
    import logging

    import inkdask
    from inkdask import messages

    for name in ("distributed", "distributed.client"):  # as where distributed comes after `show`
        logging.getLogger(name).handlers.clear()
        logging.getLogger(name).propagate = True
    messages.show()
    try:
        print(inkdask.run(model=network, **options))
    except InkdaskError as error:
        sys.exit(f"inkdask: {error}")
