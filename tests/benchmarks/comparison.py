"""The whole job side by side with the two usual ways to do it: same segment, weights and machine.

    python -m tests.benchmarks.comparison [--side PIXELS] [--large PIXELS] [--batch TILES]

tiles one by one
    The volume is first written to a zarr array (y, x, z) in chunks of 1024 x 1024 x 1, as the
    usual tools prepare it; then a torch ``DataLoader`` cuts 64 x 64 tiles from it one by one, the
    network of ``timesformer-pytorch`` runs them eagerly under autocast, and each tile's
    probabilities are added to two float32 planes, which are stored and divided in the end. On a CPU
    in batches of 8, which the network runs fastest in, and of 256, those tools' default.
MONAI
    ``monai.inferers.sliding_window_inference`` on the volume loaded into memory, with the same
    network: plainly, in float32, and under the same autocast.
inkdask
    ``inkdask.run``; on a CPU that can, once more in int8.

All go from TIFFs of uint16 noise, in which no tile is empty, to a PNG, each in a process of its
own, with tiles of 64 px and the same window. First TimeSformer on a small segment (stride 16),
which shows the speed: a chunk of 1024 x 1024 is read for a tile whatever the size of the segment,
so the bytes read for a tile are those of a large one. Then a network that costs nothing, on a
larger segment (stride 64), which shows memory and what surrounds the network.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import torch
from PIL import Image

from tests.benchmarks._common import (
    LAYERS,
    STRIDE,
    TILE,
    Measured,
    bytes_received,
    gpu_memory,
    measure,
    reference_network,
    runs_int8,
    save_checkpoint,
    scratch,
    side_for_device,
    size,
    stored,
    table,
    tell,
    write_noise,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLIP = 200.0


def cheap(x: torch.Tensor) -> torch.Tensor:
    """Tiles (b, 1, z, 64, 64) to logits (b, 1, 4, 4): the mean over the layers, here and there."""
    return 4 * x[..., 8::16, 8::16].mean(2) - 2


class Plain(torch.nn.Module):
    """Tiles (b, z, 64, 64) in [0, 1] to probabilities (b, 1, 64, 64), eagerly."""

    def __init__(self, checkpoint: Path | None, autocast: bool) -> None:
        super().__init__()
        self.network, self.autocast = None, autocast
        if checkpoint:
            network = reference_network()
            state = torch.load(checkpoint, weights_only=True)
            network.load_state_dict({k.removeprefix("backbone."): w for k, w in state.items()})
            self.network = network.to(DEVICE)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.network is None:
            logits = cheap(x[:, None])
        else:
            with torch.autocast(DEVICE, torch.bfloat16, enabled=self.autocast):
                logits = self.network(x.to(DEVICE)[:, :, None])
        p = logits.float().sigmoid().view(-1, 1, 4, 4)
        return torch.nn.functional.interpolate(p, size=(TILE, TILE), mode="bilinear")


def hann() -> np.ndarray:
    """The window (64, 64) that inkdask uses."""
    edge = np.sin(np.pi * (np.arange(TILE) + 0.5) / TILE) ** 2
    return np.outer(edge, edge).astype(np.float32)


def write_picture(ink: np.ndarray, path: Path) -> None:
    Image.fromarray(np.floor(255 * ink.clip(0, 1)).astype(np.uint8)).save(path)


def read_layers(folder: Path) -> Iterator[np.ndarray]:
    for path in sorted((folder / "layers").glob("*.tif")):
        yield (tifffile.imread(path) >> 8).astype(np.uint8)


class Tiles(torch.utils.data.Dataset):
    """Tiles of a zarr array (y, x, z), cut one by one."""

    def __init__(self, path: Path, stride: int) -> None:
        import zarr

        self.array = zarr.open_array(path, mode="r")
        ys, xs = (range(0, length - TILE + 1, stride) for length in self.array.shape[:2])
        self.places = [(y, x) for y in ys for x in xs]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, int]:
        y, x = self.places[index]
        tile = self.array[y : y + TILE, x : x + TILE].transpose(2, 0, 1).astype(np.float32)
        return torch.from_numpy(np.minimum(tile, CLIP) / np.float32(CLIP)), y, x


def one_by_one(folder: Path, network: Plain, stride: int, batch: int) -> None:
    import zarr

    plain: dict[str, Any] = {"zarr_format": 2, "compressors": None}
    layers = read_layers(folder)
    first = next(layers)
    shape = first.shape
    prepared = zarr.create_array(
        folder / "work" / "prepared.zarr", shape=(*shape, LAYERS), dtype=np.uint8,
        chunks=(1024, 1024, 1), **plain,
    )  # fmt: skip
    for z, layer in enumerate(itertools.chain([first], layers)):
        prepared[:, :, z] = layer

    tiles = Tiles(folder / "work" / "prepared.zarr", stride)
    loader = torch.utils.data.DataLoader(tiles, batch, num_workers=min(os.cpu_count() or 1, 8))
    total, weight, window = np.zeros(shape, np.float32), np.zeros(shape, np.float32), hann()
    with torch.inference_mode():
        for x, rows, columns in loader:
            for p, row, column in zip(
                network(x)[:, 0].cpu().numpy(), rows.tolist(), columns.tolist(), strict=True
            ):
                at = slice(row, row + TILE), slice(column, column + TILE)
                total[at] += p * window
                weight[at] += window
    for name, plane in (("total", total), ("weight", weight)):
        place = folder / "work" / f"{name}.zarr"
        zarr.create_array(place, data=plane, chunks=(1024, 1024), **plain)
    total, weight = (
        np.asarray(zarr.open_array(folder / "work" / f"{name}.zarr", mode="r")[:])
        for name in ("total", "weight")
    )
    write_picture(total / weight, folder / "picture.png")


def by_monai(folder: Path, network: Plain, stride: int, batch: int) -> None:
    from monai.inferers import sliding_window_inference

    volume = np.stack(list(read_layers(folder))).astype(np.float32)  # (z, y, x)
    volume = torch.from_numpy(np.minimum(volume, CLIP, out=volume)).div_(CLIP)
    with torch.inference_mode():
        ink = sliding_window_inference(
            volume[None], (TILE, TILE), batch, network, overlap=1 - stride / TILE,
            roi_weight_map=torch.from_numpy(hann()), sw_device=DEVICE, device="cpu",
        )  # fmt: skip
    write_picture(ink[0, 0].cpu().numpy(), folder / "picture.png")


def differs_from_monai(folder: Path, picture: Path, corner: int, side: int) -> int:
    """Greatest difference of a window of a job's picture from MONAI's in float32, of 255.

    The window is a square with that ``corner`` in both axes; stride 16.
    """
    from monai.inferers import sliding_window_inference

    layers = [tifffile.memmap(path, mode="r") for path in sorted((folder / "layers").iterdir())]
    first = max(0, corner - TILE + STRIDE) // STRIDE * STRIDE  # all tiles that reach into it
    last = min((corner + side - 1) // STRIDE * STRIDE + TILE, len(layers[0]))
    volume = np.stack([layer[first:last, first:last] >> 8 for layer in layers])
    volume = torch.from_numpy(np.minimum(volume.astype(np.float32), CLIP) / CLIP)
    with torch.inference_mode():
        ink = sliding_window_inference(
            volume[None], (TILE, TILE), 32, Plain(folder / "random.pt", autocast=False),
            overlap=1 - STRIDE / TILE, roi_weight_map=torch.from_numpy(hann()), sw_device=DEVICE,
            device="cpu",
        )  # fmt: skip
    within = slice(corner - first, corner - first + side)
    Image.MAX_IMAGE_PIXELS = None
    there = np.asarray(Image.open(picture))[corner : corner + side, corner : corner + side]
    return int(np.abs(there - np.floor(255 * ink[0, 0, within, within].numpy())).max())


def by_inkdask(folder: Path, checkpoint: Path | None, stride: int, precision: str) -> None:
    import inkdask

    uri = inkdask.run(
        folder, model=str(checkpoint) if checkpoint else cheap, model_type="timesformer",
        layers=(0, LAYERS), tile=TILE, stride=stride, clip=CLIP, divisor=CLIP, precision=precision,
        zarr_output_dir=folder / "work", output_path=folder / "out",
        result_file=folder / "result.txt",
    )  # fmt: skip
    Path(uri).rename(folder / "picture.png")


LARGER = "tiles one by one, autocast, in batches of 256"
OTHERS: dict[str, Callable[[Path, Plain, int, int], None]] = {
    "tiles one by one, autocast": one_by_one,
    LARGER: one_by_one,
    "MONAI": by_monai,
    "MONAI, autocast": by_monai,
}
OURS = {"inkdask": "auto", "inkdask, int8": "int8"}  # and their precision
EXACT = "MONAI"  # in float32


def job(way: str, folder: Path, checkpoint: Path | None, stride: int, batch: int) -> None:
    """Do the whole job in one way, and tell what it took."""
    # what a process imports is not the job
    if way in OURS:
        from inkdask import predictor, workflow  # noqa: F401
    else:
        import zarr  # noqa: F401
    start, before = time.perf_counter(), bytes_received()
    if way in OURS:
        by_inkdask(folder, checkpoint, stride, OURS[way])
    else:
        batch = 256 if way == LARGER else batch
        OTHERS[way](folder, Plain(checkpoint, "autocast" in way), stride, batch)
    seconds = time.perf_counter() - start
    tell(seconds=seconds, read=bytes_received() - before, gpu=gpu_memory())


def left_out(with_weights: bool) -> set[str]:
    """The ways that are no different here."""
    if not with_weights:
        return {LARGER, "MONAI, autocast", "inkdask, int8"}
    out = set() if DEVICE == "cpu" else {LARGER}
    return out if runs_int8() else {*out, "inkdask, int8"}


def compare(name: str, side: int, stride: int, batch: int, rounds: int, with_weights: bool) -> None:
    """Print the table of one network on one segment: the fastest of some rounds for each way.

    Without weights there is nothing that autocast could change.
    """
    side = TILE + -(-(side - TILE) // stride) * stride  # the last tile ends with the segment
    tiles = ((side - TILE) // stride + 1) ** 2
    found: dict[str, Measured] = {}
    pictures = {}
    weights: tuple[str, ...] = ()
    with scratch() as home:
        if with_weights:
            checkpoint = Path(home, "random.pt")
            save_checkpoint(reference_network(), checkpoint)
            weights = ("--checkpoint", str(checkpoint))
        folder = Path(home, "segment")
        write_noise(folder, side, side)
        layers = stored(folder)
        ways = [way for way in (*OTHERS, *OURS) if way not in left_out(with_weights)]
        options = ("--batch", batch, "--stride", stride, *weights)
        for way in ways * rounds:
            (folder / "work").mkdir()
            done = measure(__spec__.name, *options, "--job", way, folder)
            done.said["stored"] = stored(folder / "work")
            highest = max(done.peak, found[way].peak) if way in found else done.peak
            if way not in found or done.seconds < found[way].seconds:
                found[way] = done
            found[way].peak = highest
            pictures[way] = np.asarray(Image.open(folder / "picture.png")).astype(int)
            shutil.rmtree(folder / "work")
        read_too = f", {size(checkpoint.stat().st_size)} of weights included" if weights else ""
    print(
        f"{name}: {side:,} x {side:,} x {LAYERS} uint16 ({size(layers)}), {tiles:,} tiles at "
        f"stride {stride}, on {DEVICE if weights else 'cpu'}; the others in batches of {batch}; "
        f"the fastest of {rounds} turns and their highest memory. "
        "Tiles/s are of the job, TIFFs to PNG; the process's time includes imports. Bytes read "
        f"are what the process asked of the system{read_too}. Behind each figure: times inkdask's. "
        "Pictures are compared with that of MONAI, in float32.",
        end="\n\n",
    )
    ours = found["inkdask"]
    rows = []
    for way, done in found.items():
        said, mine = done.said, ours.said
        gpu = f" and {size(said['gpu'])} on the GPU" if said["gpu"] else ""
        cells = (
            way,
            f"{tiles / said['seconds']:,.1f} ({mine['seconds'] / said['seconds']:.2f})",
            f"{done.seconds:.1f} s ({done.seconds / ours.seconds:.2f})",
            f"{size(done.peak)} ({done.peak / ours.peak:.2f}){gpu}",
            f"{size(said['read'])} ({said['read'] / mine['read']:.2f})",
            f"{size(said['stored'])} ({said['stored'] / mine['stored']:,.1f})",
            f"{np.abs(pictures[way] - pictures[EXACT]).max()}/255",
        )
        rows.append(cells)
    headings = (
        "way", "tiles/s", "whole process", "peak memory", "bytes read", "stored on the way",
        "picture differs by at most",
    )  # fmt: skip
    table(headings, rows)
    spread = pictures[EXACT]
    planes = 2 * 4 * side * side
    print(
        f"\nThe picture's values go from {spread.min()} to {spread.max()}. Two float32 planes of "
        f"it are {size(planes)}, {planes / ours.said['stored']:.1f} times what inkdask stores.\n",
        flush=True,
    )


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--side", type=int, default=side_for_device(400, 2000),
        help="of the segment for TimeSformer, in pixels; default %(default)s",
    )  # fmt: skip
    parser.add_argument("--large", type=int, default=6000, help="of the other segment; 0: none")
    parser.add_argument("--rounds", type=int, default=2, help="turns; the fastest counts")
    parser.add_argument("--batch", type=int, help="tiles, of the others; 8, or 256 on a GPU")
    parser.add_argument("--stride", type=int, default=16, help=argparse.SUPPRESS)
    parser.add_argument("--checkpoint", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--job", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    batch = given.batch or (256 if DEVICE == "cuda" else 8)
    if given.job:
        way, folder = given.job
        job(way, Path(folder), given.checkpoint, given.stride, batch)
        return
    compare("TimeSformer", given.side, 16, batch, given.rounds, with_weights=True)
    if given.large:
        compare("A network that costs nothing", given.large, 64, batch, 1, with_weights=False)


if __name__ == "__main__":
    main()
