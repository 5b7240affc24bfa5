"""Size, time and peak memory of every export of a large prediction, checked pixel by pixel.

    python -m tests.benchmarks.export [SIDE] [FOLDER]

The prediction is the blend of a grid of random tiles, as compressible as a real one. A process of
its own writes each file and prints its peak memory. Another process reads the file with a library
that had no part in writing it, and compares the pixels.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SETUP = """
import sys
import dask.array as da
import numpy as np
import inkdask
from inkdask.pictures.exporting import export
from inkdask.pictures.picture import open_picture
from inkdask.pictures.pyramid import halve, to_uint8, write_pyramid
from inkdask.memory import peak_memory

prediction = sys.argv[1]
"""

PREDICTION = """
from inkdask.blending import blend
from inkdask.tiling import Tiling

side = int(sys.argv[2])
tiling = Tiling.of((side, side), 64, 16, 1024)
random = da.random.default_rng(0)
chunks = (*tiling.grid_chunks, 4, 4)
grid = random.random((*tiling.grid_shape, 4, 4), dtype=np.float32, chunks=chunks) ** 3
ink = blend(grid, da.ones(tiling.shape, dtype=bool, chunks=tiling.chunks), tiling)
picture = da.map_blocks(to_uint8, ink, dtype=np.uint8)
write_pyramid(picture, prediction, None, 7.91)
print(peak_memory())
"""

EXPORT = """
options = eval(sys.argv[3])
export(prediction, sys.argv[2], **options)
print(peak_memory())
"""

CHECK = """
import tifffile
import zarr
from PIL import Image
from inkdask.pictures.colour import colour_table

Image.MAX_IMAGE_PIXELS = None
path, options = sys.argv[2], eval(sys.argv[3])
levels = [zarr.open_array(f"{prediction}/{level}", mode="r") for level in (0, 1)]
if path.endswith(".zarr"):
    got = zarr.open_array(f"{path}/0", mode="r")
    below = zarr.open_array(f"{path}/1", mode="r")
    assert np.array_equal(below[:512], halve(got[:1024]))
elif path.endswith(".tif"):
    got = tifffile.imread(path)
else:
    got = np.asarray(Image.open(path))
if path.endswith(".jpg"):
    assert max(got.shape) <= 4096
    raise SystemExit
assert got.shape[:2] == levels[0].shape
last = levels[0].shape[0] if not options else levels[0].shape[0] * 9 // 10  # above the scale bar
for row in range(0, last, 1024):
    rows = slice(row, min(row + 1024, last))
    expected = levels[0][rows]
    if "colour_map" in options:
        expected = colour_table(options["colour_map"])[expected]
    assert np.array_equal(got[rows], expected), row
"""

FILES = [
    ("ink.png", {}),
    ("ink.tif", {}),
    ("zstd.tif", {"compression": "zstd"}),
    ("copy.zarr", {}),
    ("overview.jpg", {}),
    ("colour.png", {"colour_map": "inferno", "add_scale_bar": True}),
]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("side", nargs="?", type=int, default=30_000, help="in pixels")
    parser.add_argument("folder", nargs="?", help="where to write; as TMPDIR says")
    given = parser.parse_args()
    side = given.side
    print("| file | size | seconds | peak memory | read back |")
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory(dir=given.folder) as scratch:
        prediction = f"{scratch}/prediction.zarr"
        seconds, peak = run(PREDICTION, prediction, str(side))
        say("blend, pyramid", prediction, seconds, peak, f"{side:,} x {side:,}")
        for name, options in FILES:
            path = f"{scratch}/{name}"
            seconds, peak = run(EXPORT, prediction, path, repr(options))
            run(CHECK, prediction, path, repr(options))
            words = ", ".join([name, *(str(value) for value in options.values())])
            say(words, path, seconds, peak, "equal" if name != "overview.jpg" else "opens")


def run(program: str, *arguments: str) -> tuple[float, int]:
    """Run a program; return its seconds, imports included, and the peak memory it prints."""
    start = time.perf_counter()
    command = [sys.executable, "-c", SETUP + program, *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return time.perf_counter() - start, int(done.stdout or 0)


def say(what: str, path: str, seconds: float, peak: int, verdict: str) -> None:
    """Print a row."""
    place = Path(path)
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    print(
        f"| {what} | {size / 1e6:,.0f} MB | {seconds:.1f} | {peak / 1e9:.2f} GB | {verdict} |",
        flush=True,
    )


if __name__ == "__main__":
    main()
