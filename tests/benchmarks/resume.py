"""What it costs to be interrupted: a job killed half way and resumed, and a finished one repeated.

    python -m tests.benchmarks.resume [--side PIXELS]

TimeSformer with random weights, at stride 32, in chunks of 128 px so that a small job has many.
The interrupted job gets SIGKILL as soon as half of its chunks are marked as done.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from PIL import Image

from tests.benchmarks._common import (
    LAYERS,
    ROOT,
    measure,
    reference_network,
    save_checkpoint,
    scratch,
    table,
    tell,
    write_noise,
)

STRIDE, CHUNK = 32, 128


def job(folder: Path, work: str) -> None:
    """Run the job, and tell its time and the tiles that it ran."""
    import inkdask
    from inkdask import predictor, storage, workflow  # noqa: F401

    start = time.perf_counter()
    inkdask.run(
        folder, model=str(folder / "random.pt"), model_type="timesformer", layers=(0, LAYERS),
        stride=STRIDE, chunk_size=CHUNK, zarr_output_dir=folder / work,
        output_path=folder / f"{work}-out", result_file=folder / f"{work}.txt",
    )  # fmt: skip
    tell(seconds=time.perf_counter() - start, tiles=storage.counters().tiles)


def until_half(folder: Path, work: str) -> tuple[float, int, int]:
    """Start the job, and kill it half way: its seconds, the chunks it had done, and all chunks."""
    from inkdask.store import GridStore

    start = time.perf_counter()
    command = [sys.executable, "-m", __spec__.name, "--job", str(folder), work]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT) as process:
        try:
            while process.poll() is None:
                time.sleep(0.05)
                for place in (folder / work).glob("*.zarr"):
                    marks = place / "g1" / "ran_in" / "zarr.json"  # made last
                    if marks.exists() and GridStore.label(str(place)):
                        done = GridStore.open(str(place))[0].chunks_done()
                        if 2 * np.count_nonzero(done) >= done.size:
                            process.kill()
                            process.wait()
                            seconds = time.perf_counter() - start
                            done = GridStore.open(str(place))[0].chunks_done()
                            return seconds, int(np.count_nonzero(done)), done.size
        finally:
            process.kill()
    raise SystemExit("the job ended before it could be interrupted")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=544, help="side of the segment in pixels")
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job(Path(given.job[0]), given.job[1])
        return
    with scratch() as home:
        folder = Path(home)
        write_noise(folder, given.side, given.side)
        save_checkpoint(reference_network(), folder / "random.pt")
        plain = measure(__spec__.name, "--job", folder, "plain")
        again = measure(__spec__.name, "--job", folder, "plain")
        seconds, chunks, of = until_half(folder, "halved")
        rest = measure(__spec__.name, "--job", folder, "halved")
        pictures = [np.asarray(Image.open(p)) for p in sorted(folder.glob("*-out/*.png"))]
    if not np.array_equal(*pictures):
        raise SystemExit("the resumed job gives another picture than the plain one")

    print(f"{given.side} x {given.side} x {LAYERS}; the resumed picture equals the plain one.\n")
    tiles = plain.said["tiles"]
    rows = [
        ("plain", plain.seconds, plain.said["seconds"], tiles),
        ("finished, given again", again.seconds, again.said["seconds"], again.said["tiles"]),
        (f"killed when {chunks} of {of} chunks were done", seconds, None, None),
        ("the rest of it, resumed", rest.seconds, rest.said["seconds"], rest.said["tiles"]),
        ("both together", seconds + rest.seconds, None, None),
    ]
    table(
        ("run", "process", "of the plain run", "without imports", "tiles run"),
        (
            (
                name, f"{whole:.1f} s", f"{whole / plain.seconds:.2f}",
                "" if own is None else f"{own:.1f} s", "" if ran is None else ran,
            )
            for name, whole, own, ran in rows
        ),
    )  # fmt: skip


if __name__ == "__main__":
    main()
