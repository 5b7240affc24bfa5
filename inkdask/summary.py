"""Count what a job computes, skips and reads, and how fast."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass

import numpy as np

from inkdask import engine, storage
from inkdask.memory import peak_memory
from inkdask.progress import amount, clock, columns, write
from inkdask.store import ChunkReport, process_name
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")


@dataclass(frozen=True)
class Cost:
    """Tiles that ran, and seconds."""

    tiles: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.tiles + other.tiles, self.seconds + other.seconds)


class Summary:
    """Sum of the reports of a job's chunks.

    Attributes
    ----------
    ran, empty, resumed
        Tiles that went through the network, tiles without data, and tiles of chunks that an
        earlier run had finished.
    tiles
        Tiles of the job.
    costs
        What the chunks of each grid took, by its URI: the seconds of each, though they run side by
        side.
    networks
        What ran: device, arithmetic, form of the network, size of a batch.
    finished, failed
        Chunks of this run that were computed, and chunks that failed.
    lost
        Chunks that were lost with a worker and computed again.
    """

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.inferring = 0.0  # seconds
        self.tiles = self.ran = self.empty = self.resumed = 0
        self.finished = self.failed = self.lost = 0
        self.networks: set[str] = set()
        self.costs: dict[str, Cost] = {}
        self._start = storage.counters()
        self._processes: dict[str, ChunkReport] = {}
        self._before = dict(engine.on_workers(_named_counters))

    def resume(self, passes_done: np.ndarray, mine: np.ndarray, tiling: Tiling) -> None:
        """Count the tiles of a grid, and those that an earlier run stored.

        ``passes_done`` comes from `GridStore.passes_done`; ``mine`` is True for the chunks of this
        job's part.
        """
        self.tiles += int(tiling.tiles_until(tiling.passes - 1)[mine].sum())
        self.resumed += int(tiling.tiles_there(passes_done)[mine].sum())

    def add(self, report: ChunkReport) -> None:
        """Count a finished chunk."""
        self.finished += 1
        self.ran += report.ran
        self.empty += report.empty
        self.networks |= {report.runs} - {""}
        cost = Cost(report.ran, report.seconds)
        self.costs[report.grid] = self.costs.get(report.grid, Cost()) + cost
        latest = self._processes.get(report.process)
        if latest is None or report.counters.requests >= latest.counters.requests:
            self._processes[report.process] = report

    @property
    def here(self) -> storage.Counters:
        """Counters of this process since the job began."""
        return storage.counters() - self._start

    @property
    def progress(self) -> int:
        """Tiles that ran in this process so far, plus empty tiles."""
        return self.here.tiles + self.empty

    @property
    def read(self) -> storage.Counters:
        """Bytes, requests and retries of all processes of the job."""
        others = (
            report.counters - self._before.get(process, storage.Counters())
            for process, report in self._processes.items()
            if process != process_name()
        )
        return sum(others, start=self.here)

    @property
    def peak_memory(self) -> int:
        """Largest peak memory of a process of the job, in bytes."""
        return max([peak_memory(), *(r.peak_memory for r in self._processes.values())])

    def say(self, grid: str, ink: str = "") -> None:
        """Print the account on standard error: with the grid's place, and what came out."""
        read, seconds = self.read, time.monotonic() - self.began
        tiles = f"{self.ran:,} run, {self.empty:,} skipped as empty"
        if self.resumed:
            tiles += f", {self.resumed:,} resumed from an earlier run"
        speed = f"{self.ran / self.inferring:,.1f} tiles/s" if self.inferring else "none was left"
        retries = f", {read.retries:,} retried" if read.retries else ""
        chunks = f"{self.finished:,} completed"
        if self.lost:
            chunks += f", {self.lost:,} of them computed again after workers were lost"
        if self.failed:
            chunks += f", {self.failed:,} failed"
        rows = {
            "tiles": tiles,
            "chunks": chunks,
            "network": "; ".join(sorted(self.networks)) or "none ran",
            "time": f"{clock(seconds)} ({speed})",
            "read": f"{amount(read.bytes_read)} in {read.requests:,} requests{retries}",
            "memory": f"{amount(self.peak_memory)} at most in one process",
            "grid": grid,
        } | ({"ink": ink} if ink else {})
        write(columns(rows))
        if self.empty and not (self.ran or self.resumed or self.failed):
            log.warning("No tile has data: are these the right layers, and is the mask right?")


def _named_counters() -> tuple[str, storage.Counters]:
    return process_name(), storage.counters()
