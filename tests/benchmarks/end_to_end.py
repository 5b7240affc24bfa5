"""The whole job, reading and writing included, against the eager reference network alone.

    python -m tests.benchmarks.end_to_end [--side PIXELS]

Both run TimeSformer with the same random weights on the same segment of uint16 TIFFs. The
reference is ``timesformer-pytorch`` run eagerly under bfloat16 autocast, at the best of several
batch sizes, on tiles that lie ready in memory: the favourable case for it.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import tifffile
import torch
from timesformer_pytorch import TimeSformer

import inkdask

LAYERS, TILE = 26, 64


def reference_network() -> TimeSformer:
    """Return the reference network, 26 frames of 64 x 64 pixels."""
    torch.manual_seed(0)
    return TimeSformer(
        dim=512, image_size=TILE, patch_size=16, num_frames=LAYERS, num_classes=16, channels=1,
        depth=8, heads=6, dim_head=64, attn_dropout=0.1, ff_dropout=0.1,
    ).eval()  # fmt: skip


def reference_speed(network: TimeSformer, batch: int, dtype: torch.dtype) -> float:
    """Tiles a second under autocast, best of two after a warm-up."""
    tiles = torch.rand(batch, LAYERS, 1, TILE, TILE)
    seconds = []
    with torch.inference_mode(), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        for _ in range(3):
            start = time.perf_counter()
            network(tiles)
            seconds.append(time.perf_counter() - start)
    return batch / min(seconds[1:])


def write_segment(folder: Path, side: int) -> None:
    """Write uint16 layers without empty tiles."""
    (folder / "layers").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(LAYERS):
        layer = rng.integers(256, 1 << 16, (side, side), dtype=np.uint16)
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", layer, rowsperstrip=64)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", type=int, default=208, help="side of the segment in pixels")
    side = parser.parse_args().side

    network = reference_network()
    references = {"bfloat16 autocast": torch.bfloat16, "float32": torch.float32}
    best = dict.fromkeys(references, 0.0)

    def measure_references() -> None:
        for name, dtype in references.items():
            speeds = [reference_speed(network, batch, dtype) for batch in (1, 2, 4, 8)]
            best[name] = max(best[name], *speeds)

    measure_references()
    jobs = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_segment(folder, side)
        checkpoint = folder / "random.pt"
        torch.save({f"backbone.{k}": v for k, v in network.state_dict().items()}, checkpoint)
        places = {"zarr_output_dir": scratch, "result_file": folder / "result.txt"}
        tiles = ((side - TILE + 15) // 16 + 1) ** 2
        for name in ("inkdask, first job of a process", "inkdask, end to end"):
            start = time.perf_counter()
            inkdask.run(folder, model=str(checkpoint), layers=(0, LAYERS), overwrite=True, **places)
            jobs[f"{name}, {tiles} tiles"] = tiles / (time.perf_counter() - start)
    measure_references()  # again, because a machine's speed drifts: the best counts

    print(f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores,", end=" ")
    print(f"torch {torch.__version__}, inkdask {inkdask.__version__}\n")
    print("| | tiles/s | ratio |")
    print("|---|---|---|")
    rows = {f"timesformer-pytorch, eager, {name}, best batch": best[name] for name in references}
    for name, speed in {**rows, **jobs}.items():
        print(f"| {name} | {speed:.2f} | {speed / best['bfloat16 autocast']:.2f} |")


if __name__ == "__main__":
    main()
