"""Zarr arrays of version 2 and 3, alone and in OME-Zarr groups: metadata and chunks."""

import contextlib
import itertools
import json
import math

import numpy as np
import zarr

from inkdask.segment import open_segment
from inkdask.storage import parallel
from tests.files import ome, random_volume
from tests.fuzz import spoil

SHAPE = (4, 30, 40)
MOST = 1 << 20  # voxels that are compared
METADATA = ("zarr.json", ".zarray", ".zattrs", ".zgroup")


@contextlib.contextmanager
def opened(home):
    """Yield the reader of one input."""
    parallel._here.is_in_pool = True
    bases = [files(home / f"{at}.zarr", *kind) for at, kind in enumerate(kinds())]
    yield lambda rng, folder: read(rng, folder, spoil.choice(rng, bases))


def kinds():
    """Yield version, type of values, axes (empty for an array alone), and whether in shards."""
    axes = ("", "zyx", "yxz", "xyz", "tczyx")
    yield from itertools.product((2, 3), ("|u1", "<u2"), axes, (False, True))


def files(place, version, dtype, axes, is_odd):
    """Write a volume, and return the bytes of its files by their paths."""
    volume = random_volume(SHAPE, dtype)
    if axes and "t" not in axes:
        volume = np.moveaxis(volume, (0, 1, 2), ["zyx".index(axis) for axis in "zyx"])
        volume = np.transpose(volume, ["zyx".index(axis) for axis in axes])
    elif axes:
        volume = volume[None, None]
    chunks = (1,) * (volume.ndim - 3) + (4, 16, 16)
    options = {"chunks": chunks}
    if version == 3 and is_odd:
        options = {"chunks": tuple(min(side, 8) for side in chunks), "shards": chunks}
    elif is_odd:
        options["compressors"] = None
    if version == 2:
        options["chunk_key_encoding"] = {"name": "v2", "separator": "/."[is_odd]}
    if axes:
        attributes = ome("0.4" if version == 2 else "0.5", axes)
        group = zarr.create_group(place, zarr_format=version, attributes=attributes)
        for level, data in enumerate((volume, volume[..., ::2, ::2])):
            group.create_array(str(level), data=data, **options)
    else:
        attributes = {"layers": [3, 4, 5, 6]} if is_odd else None
        zarr.create_array(place, data=volume, zarr_format=version, attributes=attributes, **options)
    return {str(it.relative_to(place)): it.read_bytes() for it in place.rglob("*") if it.is_file()}


def read(rng, folder, base):
    """Write a base with spoiled files, and compare it with what zarr reads."""
    contents = dict(base)
    for _ in range(rng.integers(0, 3)):
        spoil_one(rng, contents)
    place = folder / "20240301.zarr"
    for name, data in contents.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    level = str(spoil.choice(rng, (0, 0, 0, 1, 2, "s0", "..")))
    segment = open_segment(place, level=level)
    _, height, width = segment.shape
    if math.prod(segment.shape) > MOST:
        segment = segment.take(slice(0, 4)).crop(slice(0, min(9, height)), slice(0, min(9, width)))
    got = segment.volume.compute(scheduler="synchronous")
    try:
        return compare(got, segment, contents)
    except AssertionError:
        # A damaged chunk without a checksum may be decoded to what was in memory.
        if all(data == base[name] for name, data in contents.items() if not is_metadata(name)):
            raise
        return "unjudged"


def is_metadata(name):
    return name.endswith(METADATA)


def compare(got, segment, contents):
    """Compare with the array that the metadata name, whose axes are found by other means."""
    source = segment.source
    array = zarr.open_array(source.name, mode="r")
    if array.size > MOST:
        return "unjudged"
    pixels = array[:]
    pixels = pixels.reshape(pixels.shape[-3:])
    if pixels.dtype.itemsize == 2:
        pixels = pixels >> 8
    group = next((contents[it] for it in ("zarr.json", ".zattrs") if it in contents), b"{}")
    attributes = json.loads(group)
    attributes = (attributes or {}).get("attributes", attributes) or {}
    images = (attributes.get("ome") or attributes).get("multiscales")
    if images and images[0].get("axes"):
        names = [it["name"] if isinstance(it, dict) else it for it in images[0]["axes"]][-3:]
        if sorted(map(str, names)) == ["x", "y", "z"]:
            pixels = pixels.transpose([names.index(axis) for axis in "zyx"])
    else:  # the guess is not judged here
        pixels = pixels.transpose(source.axes)
    if sorted(pixels.shape) != sorted(segment.source.shape):
        raise AssertionError(f"{pixels.shape} for {segment.source.shape}")
    if pixels.shape != segment.source.shape:
        return "unjudged"  # axes of other names
    depth, height, width = got.shape
    np.testing.assert_array_equal(got, pixels[:depth, :height, :width])
    return "read"


def spoil_one(rng, contents):
    """Spoil one file; most often metadata."""
    names = sorted(contents)
    metadata = list(filter(is_metadata, names))
    if metadata and rng.integers(5):
        name = spoil.choice(rng, metadata)
        if rng.integers(20) == 0:
            del contents[name]
        else:
            try:
                contents[name] = spoil.change_text(rng, contents[name].decode())
            except ValueError:  # spoiled before
                contents[name] = spoil.change(rng, contents[name])
    else:
        name = spoil.choice(rng, names)
        contents[name] = spoil.change(rng, contents[name])
