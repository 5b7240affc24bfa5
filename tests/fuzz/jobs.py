"""Random jobs against the naive oracle: ``python -m tests.fuzz jobs --count 550 --seed S``."""

import argparse
import collections
import contextlib
import io
import json
import logging
import sys
import tempfile
import time
import traceback
from pathlib import Path

import dask.array as da
import imagecodecs
import numpy as np
import tifffile
import torch
import zarr
from PIL import Image

import inkdask
from inkdask.models import weights
from inkdask.models.registry import resolve
from tests.files import ome, read_picture
from tests.fuzz import spoil
from tests.fuzz.campaign import environment, memory_disk
from tests.oracle import naive_map, papyrus, picture

DEMO_LAYERS = 26


def pooled(x, k):
    """Logits from the slope of brightness over depth, in ``k`` x ``k`` parts of a tile."""
    depth = torch.linspace(-1, 1, x.shape[2]).view(1, 1, -1, 1, 1) + 0.1
    return 40 * torch.nn.functional.adaptive_avg_pool2d((x * depth).mean(2), k) - 0.5


def one(x):
    return pooled(x, 1)


def two(x):
    return pooled(x, 2)


def four(x):
    return pooled(x, 4)


def main(arguments=None):
    """Run jobs, print the tally, and end with status 1 where a picture is wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz jobs", description=__doc__)
    parser.add_argument("--count", type=int, default=550)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first job")
    given = parser.parse_args(arguments)
    logging.disable()
    tally, wrong, start = collections.Counter(), [], time.monotonic()
    for at in range(given.first, given.first + given.count):
        rng = spoil.random(given.seed, at)
        with (
            tempfile.TemporaryDirectory(dir=memory_disk()) as folder,
            contextlib.redirect_stderr(io.StringIO()),
        ):
            said = {}
            try:
                tally.update(try_one(rng, Path(folder), said))
            except Exception:
                wrong.append(at)
                print(
                    f"job {at}: {json.dumps(said, default=str)}\n{traceback.format_exc()}",
                    flush=True,
                )
    rows = "\n".join(f"| {what} | {count} |" for what, count in sorted(tally.items()))
    print(f"| jobs with | |\n|---|---|\n{rows}\n")
    seconds = time.monotonic() - start
    print(f"{given.count} jobs of seed {given.seed}, {len(wrong)} wrong {wrong}, {seconds:.0f} s")
    if wrong:
        sys.exit(1)


def try_one(rng, folder, said):
    """Make a segment, predict it in one of several ways, compare, and return what was tried.

    ``said`` receives the settings, for the report of a failure.
    """
    is_demo = rng.integers(12) == 0
    shape = shape_of(rng, is_demo)
    volume = papyrus(shape, int(rng.integers(1000)), holes=bool(rng.integers(4)))
    if rng.integers(30) == 0:
        volume[:] = 0
    source, layout, volume, first = write(rng, folder / "20240301", volume)
    said |= {"shape": shape, "layout": layout, **settings_of(rng, shape, first, is_demo)}
    settings = {name: value for name, value in said.items() if name not in ("shape", "layout")}
    how = spoil.choice(rng, ("run", "run", "run", "parts", "predict", "array"))
    said["how"] = how
    if rng.integers(4) == 0 and how != "array":
        settings["mask_path"] = str(folder / "mask.png")
        said["mask"] = write_mask(rng, Path(settings["mask_path"]), shape[1:])
    if how == "array":
        settings.pop("layers", None)
        said.pop("layers", None)
    expected = oracle(volume, settings, first)
    places = {"ZARR_OUTPUT_DIR": str(folder / "grids"), "RESULT_FILE": str(folder / "result.txt")}
    with environment(**places, MODEL_VERSION="1"):
        if how in ("predict", "array"):
            given = source if how == "predict" else array_of(rng, volume)
            got = inkdask.predict(given, **settings).map.compute()
            np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance(settings))
        else:
            uri = run(source, settings, int(rng.integers(2, 5)) if how == "parts" else 1)
            check(read_picture(uri), expected, settings)
            assert (folder / "result.txt").read_text() == uri
    named = ("progressive", "force_reverse", "reverse_video", "roi_xyxy", "mask_path",
             "model_in_chans")  # fmt: skip
    return [how, layout.split()[0], *(name for name in named if settings.get(name))]


def array_of(rng, volume):
    """Return the volume as an array of NumPy or Dask, uint8 or uint16."""
    if rng.integers(2):
        volume = volume.astype(np.uint16) << 8
    if rng.integers(2):
        return volume
    return da.from_array(volume, tuple(int(rng.integers(1, side + 1)) for side in volume.shape))


def shape_of(rng, is_demo):
    """Return layers, height and width; sides may be shorter than a tile."""
    depth = DEMO_LAYERS if is_demo else int(rng.integers(1, 13))
    most = 130 if is_demo else 260
    return depth, int(rng.integers(1, most)), int(rng.integers(1, most))


def settings_of(rng, shape, first, is_demo):
    """Return keyword arguments of a job."""
    depth, height, width = shape
    tile = int(spoil.choice(rng, (64,) if is_demo else (16, 20, 32, 48, 64)))
    strides = (32, 64) if is_demo else (tile // 4, tile // 2, tile // 2, tile, tile - 3, 7)
    stride = int(spoil.choice(rng, strides))
    if (height // stride + 1) * (width // stride + 1) > 700:
        stride = tile // 2
    said = {
        "model": "demo" if is_demo else spoil.choice(rng, (one, two, four)),
        "tile": tile, "stride": stride, "chunk_size": int(rng.integers(1, 300)),
        "batch_size": int(rng.integers(1, 40)), "progressive": not rng.integers(5),
        "force_reverse": not rng.integers(4), "reverse_video": not rng.integers(8),
        "blend_mode": spoil.choice(rng, ("hann", "hann", "gaussian")),
        "gaussian_sigma": float(spoil.choice(rng, (0, 0, 6.5, tile))),
    }  # fmt: skip
    if is_demo:
        return {**said, "precision": spoil.choice(rng, ("auto", "float32", "bfloat16"))}
    if rng.integers(3) == 0:
        said |= {"clip": float(rng.integers(50, 256)), "divisor": float(rng.integers(50, 256))}
    if rng.integers(2):
        start = int(rng.integers(depth))
        said["layers"] = (first + start, first + int(rng.integers(start + 1, depth + 1)))
    start, stop = said.get("layers", (first, first + depth))
    if rng.integers(4) == 0 and stop - start > 1:
        said["z_downsample_mean_factor"] = 2
    if rng.integers(4) == 0:
        most = (stop - start) // said.get("z_downsample_mean_factor", 1)
        said["model_in_chans"] = int(rng.integers(1, most + 1))
    if rng.integers(4) == 0:
        x0, y0 = int(rng.integers(width)), int(rng.integers(height))
        x1, y1 = int(rng.integers(x0, width)) + 1, int(rng.integers(y0, height)) + 1
        said["roi_xyxy"] = (x0, y0, x1, y1)
    return said


def oracle(volume, settings, first):
    """Return the map that a job must have, float64 (y, x)."""
    start, stop = settings.get("layers", (first, first + len(volume)))
    layers = volume[start - first : stop - first]
    factor = settings.get("z_downsample_mean_factor", 1)
    count = min(settings.get("model_in_chans", len(layers)) * factor, len(layers))
    count -= count % factor
    skipped = (len(layers) - count) // 2
    layers = layers[skipped : skipped + count]
    if settings["force_reverse"]:
        layers = layers[::-1]
    groups = layers.reshape(-1, factor, *layers.shape[1:]).astype(int)
    layers = ((groups.sum(axis=1) + factor // 2) // factor).astype(np.uint8)
    tile, window = settings["tile"], None
    if settings["blend_mode"] == "gaussian":
        sigma = settings["gaussian_sigma"] or tile / 2.5
        edge = np.exp(-0.5 * ((np.arange(tile) - (tile - 1) / 2) / sigma) ** 2)
        window = np.outer(edge, edge)
    function, options = settings["model"], {"clip": 200.0, "divisor": 200.0}
    if function == "demo":
        network = resolve("demo")
        function, options = (
            weights.load(network),
            {"clip": network.clip, "divisor": network.divisor},
        )
    options |= {name: settings[name] for name in options if name in settings}
    expected = naive_map(layers, function, tile, settings["stride"], window=window, **options)
    if "mask_path" in settings:
        with Image.open(settings["mask_path"]) as mask:
            expected = np.where(np.asarray(mask) > 0, expected, 0)
    x0, y0, x1, y1 = settings.get("roi_xyxy", (0, 0, *expected.shape[::-1]))
    return expected[y0:y1, x0:x1]


def run(source, settings, parts):
    """Run a job as a whole, or in parts and reduce it; return the URI of its picture."""
    if parts == 1:
        return inkdask.run(source, **settings)
    for part in range(parts):
        inkdask.run(source, num_parts=parts, part_id=part, **settings)
    return inkdask.run(source, num_parts=parts, step="reduce", **settings)


def tolerance(settings):
    """Return how far probabilities may be off: by float32, or by the arithmetic of the network."""
    if settings["model"] != "demo":
        return 2e-5
    return 0.05 if settings["precision"] == "bfloat16" else 1e-3


def check(got, expected, settings):
    """Check that each pixel shows a probability that is near enough; grids store 65,534 steps."""
    near = tolerance(settings) + 0.5 / 65534
    least, most = picture(expected - near), picture(expected + near)
    if settings["reverse_video"]:
        least, most = 255 - most, 255 - least
    assert got.shape == expected.shape
    wrong = (got < least) | (got > most)
    assert not wrong.any(), f"{np.count_nonzero(wrong)} of {wrong.size} pixels"


def write(rng, folder, volume):
    """Write a volume as a segment: its path, the layout, what its values are, and the first layer.

    Values may change by the loss of a JPEG, and uint16 files get low bytes that are not read.
    """
    kind = spoil.choice(rng, ("tif", "tif", "tif", "png", "jpg", "zarr", "ome", "prepared"))
    first = int(spoil.choice(rng, (0, 0, 1, 17, 99)))
    is_deep = kind not in ("jpg", "prepared") and bool(rng.integers(2))
    stored = volume
    if is_deep:
        low = rng.integers(0, 256, volume.shape, dtype=np.uint16)
        stored = (volume.astype(np.uint16) << 8) | np.where(volume > 0, low, 0).astype(np.uint16)
    if kind in ("zarr", "ome"):
        return str(folder), *write_zarr(rng, folder, stored, kind, volume), 0
    (folder / "layers").mkdir(parents=True)
    options = tiff_options(rng, is_deep)
    decoded = []
    for number, layer in enumerate(stored, first):
        path = folder / "layers" / f"{number:02d}"
        if kind == "png":
            path.with_suffix(".png").write_bytes(imagecodecs.png_encode(layer))
        elif kind == "jpg":
            data = imagecodecs.jpeg_encode(layer, level=95)
            path.with_suffix(".jpg").write_bytes(data)
            decoded.append(imagecodecs.jpeg_decode(data))
        else:
            tifffile.imwrite(path.with_suffix(".tif"), layer, photometric="minisblack", **options)
    if decoded:
        volume = np.stack(decoded)
    if kind == "prepared":
        place = str(folder / "prepared.zarr")
        inkdask.prepare(folder, surface_volume_zarr=place, use_zarr_compression=bool(first))
        return place, "prepared", volume, first
    return str(folder), f"{kind} {options if kind == 'tif' else ''} {stored.dtype}", volume, first


def tiff_options(rng, is_deep):
    """Return a layout of tifffile."""
    options = spoil.choice(rng, ({}, {"rowsperstrip": 1}, {"rowsperstrip": 37}, {"tile": (16, 32)}))
    codec = spoil.choice(rng, (None, "lzw", "zlib", "packbits", "zstd"))
    predictor = codec in ("lzw", "zlib", "zstd") and bool(rng.integers(2))
    order = {"byteorder": spoil.choice(rng, "<>")} if is_deep else {}
    big = {"bigtiff": not rng.integers(4)}
    return {**options, "compression": codec, "predictor": predictor, **order, **big}


def write_zarr(rng, folder, stored, kind, volume):
    """Write a zarr array or an OME-Zarr group; return its layout, and the volume."""
    version = int(spoil.choice(rng, (2, 3)))
    chunks = tuple(
        int(rng.integers(1, side + 1)) for side in np.minimum(stored.shape, (13, 90, 90))
    )
    # Without chunks, an array without data would be refused.
    config = {"write_empty_chunks": True}
    if kind == "ome":
        attributes = ome("0.4" if version == 2 else "0.5")
        group = zarr.create_group(folder, zarr_format=version, attributes=attributes)
        group.create_array("0", data=stored, chunks=chunks, config=config)
        group.create_array("1", data=stored[:, ::2, ::2])
        return f"ome {version} {chunks} {stored.dtype}", volume
    names = {"dimension_names": ["z", "y", "x"]} if version == 3 else {}
    attributes = None if names else {"_ARRAY_DIMENSIONS": ["z", "y", "x"]}
    zarr.create_array(
        folder, data=stored, chunks=chunks, zarr_format=version, attributes=attributes,
        config=config, **names,
    )  # fmt: skip
    return f"zarr {version} {chunks} {stored.dtype}", volume


def write_mask(rng, path, shape):
    """Write a mask of a box or of noise, and say which."""
    mask = np.zeros(shape, np.uint8)
    y, x = (int(rng.integers(side)) for side in shape)
    mask[y : y + 1 + int(rng.integers(shape[0])), x : x + 1 + int(rng.integers(shape[1]))] = 255
    if is_noise := rng.integers(3) == 0:
        mask[:] = 255 * (rng.random(shape) < 0.01)
    Image.fromarray(mask).save(path)
    return "noise" if is_noise else "box"
