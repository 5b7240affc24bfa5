"""Recipes and records of invented jobs, and a network that counts its tiles."""

import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from inkdask.identity import Origin, Provenance, Recipe, Said
from inkdask.store import GridStore

RECIPE = Recipe(
    input="0123456789abcdef", mask=None, layers=(0, 1, 2), direction="forward", averaged=1,
    corner=(0, 0), size=(300, 431), model="demo", architecture="ink_depth_cnn", weights="ab" * 32,
    clip=200.0, divisor=200.0, precision="auto", tta="none", tile=64, stride=16,
    k=4, chunk=(128, 128),
)  # fmt: skip
ORIGIN = Origin(
    segment="seg", source="s3://bucket/seg", volume="s3://bucket/seg", ome_zarr_level="0",
    mask=None, layer_range=(0, 3), opened=(0, 3), weights_from="somewhere", roi_xyxy=None,
    software={"inkdask": "0.1.0"}, command=("inkdask", "run", "s3://bucket/seg"),
)  # fmt: skip
SAID = Said(
    s3_path="s3://bucket/seg", surface_volume_zarr=None, ome_zarr_level="0", mask_path=None,
    layers=(0, 3), force_reverse=False, z_downsample_mean_factor=1, model="demo",
    model_in_chans=3, clip=200.0, divisor=200.0, precision="auto", tta="none", tile=64, stride=16,
    roi_xyxy=None, chunk_size=128,
)  # fmt: skip
PROVENANCE = Provenance(
    recipe=RECIPE, origin=ORIGIN, blend_mode="hann", gaussian_sigma=0.0, ran_in=("float32",),
    created="2026-11-27T12:00:00+00:00",
)  # fmt: skip


def store_in(folder, recipe=RECIPE):
    """Create the empty store of a recipe in a folder."""
    store = GridStore.of(str(folder), "seg", recipe)
    store.create(recipe, ORIGIN)
    return store


def network(x):
    """Logits from the first and last layer: (b, 1, 4, 4); logs tiles, sleeps on request."""
    with Path(os.environ["TILES_LOG"]).open("a") as log:
        log.write(f"{len(x)}\n")
    time.sleep(len(x) * float(os.environ.get("SECONDS_A_TILE", 0)))
    return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], 4)


def count_tiles(tmp_path):
    """Count the tiles of `network` in all processes; needs the fixture ``own_tiles``."""
    return sum(map(int, (tmp_path / "tiles.log").read_text().split()))


def made_of(volume, layers=3):
    """Return the provenance of a picture of all layers of a volume."""
    origin = replace(ORIGIN, source=volume, volume=volume, layer_range=(0, layers))
    recipe = replace(RECIPE, layers=tuple(range(layers)))
    return replace(PROVENANCE, recipe=recipe, origin=replace(origin, opened=(0, layers)))
