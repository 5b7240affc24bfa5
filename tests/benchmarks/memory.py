"""Peak memory of a process that does the main job, against the size of the segment.

    python -m tests.benchmarks.memory [--layout strips|tiles|lzw] [--worker] [HEIGHTxWIDTH ...]

A trivial network runs on 26 uint16 layers, so that what is measured is reading, blending and
writing. Each job runs in a process of its own, on its threads, or with ``--worker`` on a Dask
worker process of two threads. The floor is a process that has only imported what the job imports.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch

import inkdask
from inkdask import storage
from inkdask.memory import peak_memory

LAYERS, STRIDE = 26, 64
LAYOUTS: dict[str, dict[str, Any]] = {
    "strips": {"rowsperstrip": 64},
    "tiles": {"tile": (256, 256)},
    "lzw": {"rowsperstrip": 64, "compression": "lzw"},
}


def trivial(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the layers at every sixteenth pixel, as logits."""
    return x.mean(2)[:, :, ::16, ::16]


def write_segment(folder: Path, height: int, width: int, layout: str) -> int:
    """Write layers that are names of one file of noise; returns their bytes."""
    layers = folder / "layers"
    layers.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 1 << 16, (height, width), dtype=np.uint16)
    tifffile.imwrite(layers / "00.tif", noise, **LAYOUTS[layout])
    for number in range(1, LAYERS):
        os.link(layers / "00.tif", layers / f"{number:02d}.tif")
    return LAYERS * (layers / "00.tif").stat().st_size


def job(folder: str, on_worker: bool) -> None:
    """Run the job, and print: bytes at the start, bytes at the end, bytes read."""
    from distributed import Client, LocalCluster, wait

    options = {"zarr_output_dir": f"{folder}/partitions", "result_file": f"{folder}/result.txt"}

    def run() -> None:
        inkdask.run(folder, model=trivial, stride=STRIDE, **options)

    if not on_worker:
        floor = peak_memory()
        run()
        print(floor, peak_memory(), storage.counters().bytes_read)
        return
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        wait(client.submit(__import__, "inkdask.predictor"))
        [floor] = client.run(peak_memory).values()
        run()
        [peak] = client.run(peak_memory).values()
        [counters] = client.run(storage.counters).values()
        print(floor, peak, counters.bytes_read)


def measure(height: int, width: int, layout: str, on_worker: bool) -> tuple[int, ...]:
    """Bytes of the layers, of the process at its start and at its most, and bytes read."""
    with tempfile.TemporaryDirectory() as scratch:
        size = write_segment(Path(scratch), height, width, layout)
        command = [sys.executable, "-m", __spec__.name, "--job", scratch]
        done = subprocess.run(
            [*command, *(["--worker"] if on_worker else [])],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return size, *(int(number) for number in done.stdout.split()[-3:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", default=["4000x8000", "32000x8000"])
    parser.add_argument("--layout", choices=LAYOUTS, default="strips")
    parser.add_argument("--worker", action="store_true", help="on a Dask worker process")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job(given.job, given.worker)
        return
    print("| segment | layers on disk | peak memory | above imports | to the first | read |")
    print("|---|---|---|---|---|---|")
    first = 0
    for size in given.sizes:
        height, width = map(int, size.split("x"))
        stored, floor, peak, read = measure(height, width, given.layout, given.worker)
        first = first or peak
        print(
            f"| {height:,} x {width:,} x {LAYERS}, {given.layout} | {stored / 1e9:.2f} GB "
            f"| {peak / 1e9:.2f} GB | {(peak - floor) / 1e9:.2f} GB | {peak / first:.2f} x "
            f"| {read / stored:.3f} x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
