"""Peak memory of the main job with a trivial network, against the size of the segment.

    python -m tests.benchmarks.memory [SIDE ...]

Each job runs in a process of its own. The floor is a process that has only imported what the job
imports.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import tifffile

LAYERS = 26
JOB = """
import sys
import torch
import inkdask
from inkdask import storage, workflow
from inkdask.store import peak_memory

floor = peak_memory()

def trivial(x):
    return x.mean(2)[:, :, ::16, ::16]

uri = inkdask.run(sys.argv[1], model=trivial, zarr_output_dir=sys.argv[1] + "/partitions",
                  result_file=sys.argv[1] + "/result.txt")
whole = storage.counters().bytes_read
ink = inkdask.predict(sys.argv[1], trivial)
ink.map[:64, :64].compute()
print(floor, peak_memory(), whole, storage.counters().bytes_read - whole)
"""


def write_segment(folder: Path, side: int) -> int:
    """Write uint16 layers of 64-row strips; returns their bytes."""
    layers = folder / "layers"
    layers.mkdir(parents=True)
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 1 << 16, (side, side), dtype=np.uint16)
    for number in range(LAYERS):
        tifffile.imwrite(layers / f"{number:02d}.tif", np.roll(noise, number), rowsperstrip=64)
    return sum(path.stat().st_size for path in layers.iterdir())


def main() -> None:
    """Print the table."""
    sides = [int(side) for side in sys.argv[1:]] or [2000, 4000]
    print("| segment | layers on disk | peak memory | above imports | read | read for [:64, :64] |")
    print("|---|---|---|---|---|---|")
    for side in sides:
        with tempfile.TemporaryDirectory() as scratch:
            size = write_segment(Path(scratch), side)
            done = subprocess.run(
                [sys.executable, "-c", JOB, scratch], stdout=subprocess.PIPE, text=True, check=True
            )
        floor, peak, whole, part = (int(number) for number in done.stdout.split()[-4:])
        print(
            f"| {side:,} x {side:,} x {LAYERS} | {size / 1e9:.2f} GB | {peak / 1e9:.2f} GB "
            f"| {(peak - floor) / 1e9:.2f} GB | {whole / size:.3f} x | {part / size:.3f} x |",
            flush=True,
        )


if __name__ == "__main__":
    main()
