"""The whole job from TIFFs on S3 with a trivial network, against the plain way to read them.

    python -m tests.benchmarks.reading [--side PIXELS]

The plain way opens each layer with ``tifffile.imread`` over fsspec, stacks them in memory, cuts
tiles with NumPy, and runs the same network on the same batches; it neither blends nor writes. The
S3 server is moto, in a process of its own that answers one request after the other; what differs
between two runs beside each other is what counts, not the seconds.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import fsspec
import numpy as np
import tifffile
import torch
from numpy.lib.stride_tricks import sliding_window_view

import inkdask
from inkdask import storage
from tests.conftest import free_port, start_server

LAYERS, TILE, STRIDE, BATCH = 26, 64, 32, 32
LAYOUTS: dict[str, dict[str, Any]] = {
    "one strip": {},
    "16-row strips": {"rowsperstrip": 16},
    "256 tiles": {"tile": (256, 256)},
    "LZW, 16-row strips": {"rowsperstrip": 16, "compression": "lzw", "predictor": True},
}


def trivial(x: torch.Tensor) -> torch.Tensor:
    """Return the mean over the layers at every sixteenth pixel, as logits."""
    return x.mean(2)[:, :, ::16, ::16]


def scan(side: int) -> np.ndarray:
    """Make layers (z, y, x) uint16 that compress as a scan does."""
    steps = np.random.default_rng(0).integers(-900, 901, (LAYERS, side, side), dtype=np.int16)
    return (np.cumsum(steps, axis=2, dtype=np.int32) + 30_000).clip(256, 65_535).astype(np.uint16)


def upload(volume: np.ndarray, place: str, layout: dict[str, Any]) -> int:
    """Write the layers to S3; returns their bytes."""
    size = 0
    for number, layer in enumerate(volume):
        file = io.BytesIO()
        tifffile.imwrite(file, layer, **{"rowsperstrip": len(layer), **layout})
        storage.write_bytes(f"{place}/layers/{number:02d}.tif", file.getvalue())
        size += len(file.getvalue())
    return size


def by_inkdask(place: str, scratch: str) -> None:
    """Do the whole job: read, run, blend, write."""
    inkdask.run(
        place, model=trivial, stride=STRIDE, batch_size=BATCH, overwrite=True,
        zarr_output_dir=f"{scratch}/partitions", output_path=f"{scratch}/out",
        result_file=f"{scratch}/result.txt",
    )  # fmt: skip


def plainly(place: str) -> np.ndarray:
    """Read whole layers, cut tiles, and run the network."""
    layers = []
    for number in range(LAYERS):
        with fsspec.open(f"{place}/layers/{number:02d}.tif") as file:
            layers.append((tifffile.imread(file) >> 8).astype(np.uint8))
    volume = np.stack(layers)
    tiles = sliding_window_view(volume, (TILE, TILE), axis=(1, 2))[:, ::STRIDE, ::STRIDE]
    tiles = tiles.transpose(1, 2, 0, 3, 4).reshape(-1, LAYERS, TILE, TILE)
    out = []
    with torch.no_grad():
        for start in range(0, len(tiles), BATCH):
            batch = torch.from_numpy(tiles[start : start + BATCH]).float().clamp_(max=200) / 200
            out.append(trivial(batch[:, None]).sigmoid().numpy())
    return np.concatenate(out)


def seconds(job: Callable[[], Any]) -> float:
    """Time a job."""
    start = time.perf_counter()
    job()
    return time.perf_counter() - start


def measure(side: int, scratch: str) -> None:
    """Print a row for each layout: the best of two runs each, by turns."""
    volume = scan(side)
    for number, (name, layout) in enumerate(LAYOUTS.items()):
        place = f"s3://layout-{number}"
        storage.s3_filesystem().mkdir(place)
        size = upload(volume, place, layout)
        ours, theirs = [], []
        for _ in range(2):
            before = storage.counters()
            ours.append(seconds(partial(by_inkdask, place, scratch)))
            read = storage.counters() - before
            theirs.append(seconds(partial(plainly, place)))
        print(
            f"| {name} | {size / 1e6:.0f} MB | {min(ours) / min(theirs):.2f} "
            f"| {read.bytes_read / size:.3f} | {read.requests / LAYERS:.1f} |",
            flush=True,
        )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=1200, help="side of the segment in pixels")
    side = parser.parse_args().side
    port = free_port()
    server = start_server("-m", "moto.server", "-H", "127.0.0.1", "-p", str(port), port=port)
    try:
        os.environ.update(
            AWS_ENDPOINT_URL=f"http://127.0.0.1:{port}",
            AWS_ACCESS_KEY_ID="testing",
            AWS_SECRET_ACCESS_KEY="testing",
            AWS_DEFAULT_REGION="us-east-1",
        )
        print(f"{side:,} x {side:,} x {LAYERS} uint16, tile {TILE}, stride {STRIDE}\n")
        print("| layout | on S3 | time to plain time | bytes read a byte | requests a layer |")
        print("|---|---|---|---|---|")
        with tempfile.TemporaryDirectory() as scratch:
            warm = np.zeros((LAYERS, 128, 128), np.uint16) + 999
            storage.s3_filesystem().mkdir("warm")
            upload(warm, "s3://warm", {})
            by_inkdask("s3://warm", scratch)  # imports
            plainly("s3://warm")
            measure(side, scratch)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
