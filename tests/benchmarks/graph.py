"""What a graph costs before anything runs: seconds, tasks and megabytes.

    python -m tests.benchmarks.graph [--side PIXELS]

The layers are files with a header and no pixels: sparse, so that nothing large is written. The
whole segment's graph is built as a job builds it, optimised and pickled as it goes to a scheduler,
and submitted to one that has no workers. A window of 1,000 pixels is what a notebook looks at: of
these layers, each one strip, whose blocks are bands of few rows across the whole width, and of a
prepared array, whose blocks are squares.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

import cloudpickle
import dask
import numpy as np
import tifffile
import torch
import zarr
from dask.base import collections_to_expr
from distributed import Client, LocalCluster

import inkdask
from inkdask import workflow
from inkdask.filling import Work, together
from inkdask.preparation import CHUNK, SHARD
from inkdask.settings import Settings

LAYERS, WINDOW = 26, 1000


def trivial(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the layers at every sixteenth pixel, as logits."""
    return x.mean(2)[:, :, ::16, ::16]


def write_sparse_segment(folder: Path, side: int) -> None:
    """Write layers of one strip that are names of one file full of holes."""
    layers = folder / "layers"
    layers.mkdir(parents=True)
    tifffile.memmap(layers / "00.tif", shape=(side, side), dtype=np.uint16, bigtiff=True)
    for number in range(1, LAYERS):
        os.link(layers / "00.tif", layers / f"{number:02d}.tif")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=40_000, help="of the segment in pixels")
    side = parser.parse_args().side
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        write_sparse_segment(Path(scratch), side)
        settings = Settings.of(
            s3_path=scratch, model=trivial, zarr_output_dir=f"{scratch}/partitions",
            result_file=f"{scratch}/result.txt",
        )  # fmt: skip
        start = time.perf_counter()
        job = workflow.settle(settings)
        job.create()
        rows.append(("headers read, job settled", time.perf_counter() - start, "", ""))

        start = time.perf_counter()
        work = Work.of(job.grid, job.plan)
        tasks = together([(row, column, 0) for row, column in np.argwhere(work.missing)], [work])
        rows.append((f"{len(tasks):,} chunks as tasks", time.perf_counter() - start, "", ""))

        start = time.perf_counter()
        expression = collections_to_expr(tasks, optimize_graph=True).optimize()
        graph = expression.__dask_graph__()
        seconds = time.perf_counter() - start
        size = len(cloudpickle.dumps(collections_to_expr(tasks, optimize_graph=True)))
        rows.append(("optimised", seconds, len(graph), size))

        with (
            LocalCluster(n_workers=0, processes=False, dashboard_address=None) as cluster,
            Client(cluster) as client,
        ):
            start = time.perf_counter()
            futures = client.compute(tasks)
            while client.run_on_scheduler(lambda dask_scheduler: len(dask_scheduler.tasks)) < len(
                tasks
            ):
                time.sleep(0.05)
            rows.append(("submitted", time.perf_counter() - start, "", ""))
            client.cancel(futures)

        prepared = f"{scratch}/prepared.zarr"
        zarr.create_array(
            prepared, shape=(LAYERS, side, side), dtype="uint8", chunks=(LAYERS, CHUNK, CHUNK),
            shards=(LAYERS, SHARD, SHARD),
        )  # fmt: skip
        middle = slice(side // 2, side // 2 + WINDOW)
        for what, source in (("these layers", scratch), ("a prepared array", prepared)):
            start = time.perf_counter()
            [window] = dask.optimize(inkdask.predict(source, trivial).map[middle, middle])
            seconds = time.perf_counter() - start
            size, count = len(cloudpickle.dumps(window)), len(window.__dask_graph__())
            rows.append((f"a window of {WINDOW:,} px of {what}", seconds, count, size))

    print(
        f"{side:,} x {side:,} x {LAYERS}\n\n| | seconds | tasks | pickled MB |\n|---|---|---|---|"
    )
    for name, seconds, count, size in rows:
        tasks_, megabytes = (f"{count:,}" if count else "", f"{size / 1e6:.2f}" if size else "")
        print(f"| {name} | {seconds:.2f} | {tasks_} | {megabytes} |")


if __name__ == "__main__":
    main()
