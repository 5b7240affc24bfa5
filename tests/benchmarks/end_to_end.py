"""The whole job, reading and writing included, against the eager reference network alone.

    python -m tests.benchmarks.end_to_end [--side PIXELS]

Both run TimeSformer with the same random weights on the same segment of uint16 TIFFs. The
reference is ``timesformer-pytorch`` run eagerly under bfloat16 autocast, at the best of several
batch sizes, on tiles that lie ready in memory: the favourable case for it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from timesformer_pytorch import TimeSformer

import inkdask
from tests.benchmarks._common import (
    LAYERS,
    TILE,
    machine,
    reference_network,
    runs_int8,
    save_checkpoint,
    side_for_device,
    table,
    write_noise,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BATCHES = (64, 256, 512) if DEVICE == "cuda" else (1, 2, 4, 8)


def reference_speed(network: TimeSformer, batch: int, dtype: torch.dtype) -> float:
    """Tiles a second under autocast, best of two after a warm-up."""
    tiles = torch.rand(batch, LAYERS, 1, TILE, TILE, device=DEVICE)
    seconds = []
    with torch.inference_mode(), torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        for _ in range(3):
            start = time.perf_counter()
            network(tiles).sum().item()  # waits for the device
            seconds.append(time.perf_counter() - start)
    return batch / min(seconds[1:])


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--side", type=int, default=side_for_device(208, 3008),
        help="of the segment, in pixels; default %(default)s",
    )  # fmt: skip
    side = parser.parse_args().side

    network = reference_network().to(DEVICE)
    references = {"bfloat16 autocast": torch.bfloat16, "float32": torch.float32}
    best = dict.fromkeys(references, 0.0)

    def measure_references() -> None:
        for name, dtype in references.items():
            speeds = [reference_speed(network, batch, dtype) for batch in BATCHES]
            best[name] = max(best[name], *speeds)

    measure_references()
    jobs = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_noise(folder, side, side)
        checkpoint = folder / "random.pt"
        save_checkpoint(network, checkpoint)
        places = {"zarr_output_dir": scratch, "result_file": folder / "result.txt"}
        tiles = ((side - TILE + 15) // 16 + 1) ** 2
        ways = [("inkdask, first job of a process", "auto"), ("inkdask, end to end", "auto")]
        if runs_int8():
            ways += [("inkdask, end to end, int8", "int8")] * 2  # the first loads and checks it
        for name, precision in ways:
            start = time.perf_counter()
            inkdask.run(
                folder, model=str(checkpoint), layers=(0, LAYERS), overwrite=True,
                precision=precision, **places,
            )  # fmt: skip
            jobs[f"{name}, {tiles} tiles"] = tiles / (time.perf_counter() - start)
    measure_references()  # again, because a machine's speed drifts: the best counts

    print(f"{machine()}; network on {DEVICE}\n")
    rows = {f"timesformer-pytorch, eager, {name}, best batch": best[name] for name in references}
    eager = best["bfloat16 autocast"]
    speeds = {**rows, **jobs}.items()
    table(("", "tiles/s", "ratio"), ((n, f"{v:.2f}", f"{v / eager:.2f}") for n, v in speeds))


if __name__ == "__main__":
    main()
