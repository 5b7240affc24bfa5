"""A segment as large as real ones through the whole path, and what that means for large GPUs.

    python -m tests.benchmarks.large [--side PIXELS] [--stride PIXELS]

The segment is synthetic: 26 tiled uint16 TIFFs, sparse where there is no papyrus, which is most of
it, as in real ones (a piece without data takes no bytes in the file). The layers are names of one
file, so that the disk holds one; each is read and decoded as if it were a file of its own. The
network is the mean over the layers, which costs next to nothing: what is left is all that a job
does besides its network. From that, and from the arithmetic of the real network, follows a
projection.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
import torch

from inkdask.models.networks import BUILDERS
from tests.benchmarks._common import LAYERS, TILE, measure, scratch, size, stored, table, tell

PIECE = 256  # side of a TIFF's tile, in pixels
BF16_PEAK = 790e12  # operations a second that an H200 was seen to do in bf16 matrix products
STORE_RATE = 1e9  # bytes a second from an object store to one machine, assumed


def cheap(x: torch.Tensor) -> torch.Tensor:
    """Tiles (b, 1, z, 64, 64) to logits (b, 1, 4, 4): the mean over the layers, here and there."""
    return 4 * x[..., 8::16, 8::16].mean(2) - 2


def write_sparse(folder: Path, side: int) -> float:
    """Write the layers; returns the share of the segment that has data."""
    layers = folder / "layers"
    layers.mkdir(parents=True)
    count = -(-side // PIECE)
    edges = (np.arange(count) + 0.5) / count
    y, x = np.meshgrid(edges, edges, indexing="ij")
    waves = 0.05 * np.sin(23 * x + 3 * y) + 0.05 * np.sin(17 * y - 5 * x)
    papyrus = ((y - 0.5) / 0.22) ** 2 + ((x - 0.5) / 0.42) ** 2 + 4 * waves < 1  # a torn ellipse
    rng = np.random.default_rng(0)

    def pieces() -> Iterator[np.ndarray | None]:
        # Of the first one the writer wants to see the type.
        yield np.zeros((PIECE, PIECE), np.uint16)
        for there in papyrus.ravel()[1:]:
            noise = rng.integers(256, 1 << 16, (PIECE, PIECE), dtype=np.uint16)
            yield noise if there else None

    tifffile.imwrite(
        layers / "00.tif", pieces(), shape=(side, side), dtype=np.uint16, tile=(PIECE, PIECE)
    )
    for number in range(1, LAYERS):
        os.link(layers / "00.tif", layers / f"{number:02d}.tif")
    return float(papyrus.mean())


def job(folder: Path, stride: int) -> None:
    """Run the job, and tell what it took."""
    import inkdask
    from inkdask import predictor, reduction, storage, workflow

    seconds: dict[str, float] = {}

    def timed(name, function):  # type: ignore[no-untyped-def]
        def call(*args, **kwargs):  # type: ignore[no-untyped-def]
            start = time.perf_counter()
            out = function(*args, **kwargs)
            seconds[name] = seconds.get(name, 0.0) + time.perf_counter() - start
            return out

        return call

    reduction.write = timed("picture", reduction.write)
    workflow.fill = timed("fill", workflow.fill)
    predictor.Predictor._queue_next = timed("thread", predictor.Predictor._queue_next)
    before, start = storage.counters(), time.perf_counter()
    uri = inkdask.run(
        folder, model=cheap, layers=(0, LAYERS), tile=TILE, stride=stride,
        zarr_output_dir=folder / "work", output_path=folder / "out",
        result_file=folder / "result.txt",
    )  # fmt: skip
    whole = time.perf_counter() - start
    done = storage.counters() - before
    tell(
        **seconds, seconds=whole, read=done.bytes_read, tiles=done.tiles,
        png=Path(uri).stat().st_size,
    )  # fmt: skip


def flops_of_a_tile() -> float:
    """Operations of a tile in inkdask's TimeSformer, counted."""
    from tests.benchmarks.model import count

    return float(count(BUILDERS["ink_timesformer"](layers=LAYERS), LAYERS, TILE))


def project(said: dict[str, float], stride: int, share: float) -> None:
    """Print how long TimeSformer at stride 16 would take, and how that was computed."""
    flops = flops_of_a_tile()
    tiles = said["tiles"] * (stride / 16) ** 2
    beside = max(said["fill"] - said["thread"], 0.0)
    cores = os.cpu_count() or 1
    ideal = BF16_PEAK / flops
    print(
        f"""
### Projection, not a measurement: TimeSformer at stride 16 on this segment, on H200s

No H200 ran this. The arithmetic, from what was measured above and two figures that were not:

- tiles: {said["tiles"]:,.0f} at stride {stride} x ({stride} / 16)^2 = {tiles:,.0f};
- operations: {flops / 1e9:.1f} GFLOP a tile, as counted in inkdask's network;
- an H200 does {BF16_PEAK / 1e12:.0f} TFLOP/s in bf16 matrix products, so at most \
{BF16_PEAK / 1e12:.0f}e12 / {flops / 1e9:.1f}e9 = {ideal:,.0f} tiles/s;
- share: the part of that peak that the network reaches; 100 % is the bound, and {share:.0%} is
  given with `--share` (`python -m tests.benchmarks.model` tells it on a GPU; 40 % is a guess);
- reading: {size(said["read"])} at {size(STORE_RATE)}/s to each machine (assumed; 8 GPUs a machine);
- the picture: {said["picture"]:.0f} s as measured here on {cores} cores, by one process when all
  tiles are done, whatever the number of GPUs;
- time = max(tiles / (GPUs x share x {ideal:,.0f}), reading) + picture. Start-up, compilation and
  a last chunk that others wait for are not in it.
"""
    )
    rows = []
    for gpus in (1, 8, 64):
        machines = -(-gpus // 8)
        for reached in (1.0, share):
            network = tiles / (gpus * reached * ideal)
            reading = said["read"] / (STORE_RATE * machines)
            rows.append(
                (
                    gpus, f"{reached:.0%}", f"{network:,.1f} s", f"{reading:,.1f} s",
                    f"{said['picture']:,.0f} s",
                    f"{max(network, reading) + said['picture']:,.0f} s",
                    "network" if network > reading else "reading",
                )
            )  # fmt: skip
    table(("H200", "share", "network", "reading", "picture", "time", "bound by"), rows)
    print(
        f"\nSo that GPUs do not wait, a machine must read as fast as they compute: here {cores} "
        f"cores spent {beside:.1f} s on reading {size(said['read'])} while no tile ran "
        f"({said['fill']:.1f} s until the last tile was stored, {said['thread']:.1f} s of them in "
        "the network's thread)."
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=20_000, help="side of the segment in pixels")
    parser.add_argument("--stride", type=int, default=32, help="32: a quarter of the usual tiles")
    parser.add_argument("--share", type=float, default=0.4, help="of the peak, for the projection")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.job:
        job(Path(given.job), given.stride)
        return
    with scratch() as home:
        needed = given.side**2 * 3 + 1e9  # a layer, the grid, two pictures
        if shutil.disk_usage(home).free < needed:
            parser.error(f"{home} has less than {size(needed)} free: set TMPDIR")
        folder = Path(home)
        share = write_sparse(folder, given.side)
        layer = (folder / "layers" / "00.tif").stat().st_size
        done = measure(__spec__.name, "--stride", given.stride, "--job", folder)
        grid = stored(folder / "work")
    said = done.said
    pixels = given.side**2
    plain = 2 * 16 * _tiles(given.side, given.stride)
    print(
        f"{given.side:,} x {given.side:,} x {LAYERS} uint16 in tiles of {PIECE} px, {share:.0%} of "
        f"it with data; {size(LAYERS * layer)} as stored, tiles of {TILE} px at stride "
        f"{given.stride}.\n"
    )
    rows = [
        ("whole job", f"{said['seconds']:.0f} s", f"{pixels / said['seconds'] / 1e6:.1f} Mpixel/s"),
        ("read, run, store", f"{said['fill']:.0f} s", f"{said['tiles'] / said['fill']:,.0f}/s"),
        ("blend, zarr, PNG", f"{said['picture']:.0f} s",
         f"{pixels / said['picture'] / 1e6:.1f} Mpixel/s"),
        ("tiles run", f"{said['tiles']:,}", f"of {_tiles(given.side, given.stride):,}"),
        ("bytes read", size(said["read"]), f"{said['read'] / (LAYERS * layer):.3f} of the layers"),
        ("grid as stored", size(grid), f"{size(plain)} with empty tiles, uncompressed"),
        ("two float32 planes", size(8 * pixels), f"{8 * pixels / plain:.0f} times that"),
        ("peak memory", size(done.peak), f"the volume: {size(LAYERS * pixels)}"),
        ("PNG", size(said["png"]), ""),
    ]  # fmt: skip
    table(("", "", ""), rows)
    project(said, given.stride, given.share)


def _tiles(side: int, stride: int) -> int:
    return (-(-(side - TILE) // stride) + 1) ** 2


if __name__ == "__main__":
    main()
