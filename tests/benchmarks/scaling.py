"""How much faster a job is with more workers, when nothing but their number limits it.

    python -m tests.benchmarks.scaling [--milliseconds N] [--workers 1 2 4 8]

The network sleeps for a fixed time per tile, so that it needs no cores, and every worker process
sleeps in one thread, as a GPU computes. The segment grows with the workers, so that each has the
same to do. Efficiency is the time that the sleeping alone takes, shared evenly among the workers,
over the time from submitting the graph to the last tile.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from distributed import Client, LocalCluster, wait

import inkdask

LAYERS, WIDTH = 4, 4096
HEIGHT = 512  # for each worker: 16 chunks
STRIDE, CHUNK = 32, 256


class Sleeping:
    """A network of fixed cost per tile."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits (b, 1, 4, 4), after a while."""
        time.sleep(self.seconds * len(x))
        return x[:, :, 0, ::16, ::16]


def write_segment(folder: Path, workers: int) -> None:
    """Write layers without empty tiles."""
    (folder / "layers").mkdir(parents=True)
    layer = np.full((workers * HEIGHT, WIDTH), 40_000, np.uint16)
    for number in range(LAYERS):
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", layer, tile=(256, 256))


def measure(workers: int, segment: Path, scratch: Path, seconds: float) -> tuple[int, float]:
    """Tiles of the job, and the seconds that its inference takes."""
    from inkdask import filling, workflow
    from inkdask.settings import Settings
    from inkdask.summary import Summary

    options: dict[str, Any] = {
        "zarr_output_dir": scratch / f"{workers}",
        "result_file": scratch / "result.txt",
        "chunk_size": CHUNK,
        "stride": STRIDE,
    }
    with (
        LocalCluster(n_workers=workers, threads_per_worker=2, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        wait(  # for what a process does once, and a GPU worker does in a long job's first minute
            [
                client.submit(__import__, "inkdask.predictor", workers=[address], pure=False)
                for address in client.scheduler_info(n_workers=-1)["workers"]
            ]
        )
        settings = Settings.of(s3_path=segment, model=Sleeping(seconds), **options)
        job, summary = workflow.settle(settings), Summary()
        job.create()
        filling.fill([filling.Work.of(job.grid, job.plan)], summary)
        return summary.ran, summary.inferring


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--milliseconds", type=float, default=10, help="for each tile")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    given = parser.parse_args()
    seconds = given.milliseconds / 1000
    print(
        f"inkdask {inkdask.__version__}, {os.cpu_count()} cores, {given.milliseconds:g} ms a tile"
    )
    print("\n| workers | tiles | seconds | sleeping alone | efficiency |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for workers in given.workers:
            segment = scratch / f"segment-{workers}"
            write_segment(segment, workers)
            tiles, took = measure(workers, segment, scratch, seconds)
            ideal = tiles * seconds / workers
            share = 100 * ideal / took
            print(
                f"| {workers} | {tiles:,} | {took:.2f} | {ideal:.2f} | {share:.1f} % |", flush=True
            )


if __name__ == "__main__":
    main()
