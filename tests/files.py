"""Helpers that make volumes and layer files, and that read the outputs of jobs."""

import io
import os
from contextlib import contextmanager

import numpy as np
import tifffile
from PIL import Image

from inkdask import storage

SHAPE = (6, 100, 130)  # small volume (z, y, x)


def random_volume(shape, dtype="<u2", seed=0):
    """Make a volume (z, y, x) of noise that compresses like a scan, with zeros at the top."""
    rng = np.random.default_rng(seed)
    pixels = np.cumsum(rng.integers(-900, 901, shape), axis=2) + 30000
    volume = np.clip(pixels, 0, 65535).astype(np.uint16)
    volume[:, : shape[1] // 5] = 0
    if np.dtype(dtype).itemsize == 1:
        volume >>= 8
    return volume.astype(dtype)


def assert_reads(segment, expected):
    """Check that the volume of a segment equals ``expected``, uint8 (z, y, x)."""
    assert segment.shape == expected.shape
    np.testing.assert_array_equal(segment.volume.compute(scheduler="synchronous"), expected)


def encode(layer, **options):
    """Encode an image as a TIFF, in one strip unless ``options`` of tifffile set a layout."""
    if "tile" not in options:
        options.setdefault("rowsperstrip", layer.shape[0])
    file = io.BytesIO()
    tifffile.imwrite(file, layer, **options)
    return file.getvalue()


def write_layers(folder, volume, first=0, digits=2, **options):
    """Write a volume (z, y, x) as layers from number ``first``; options as for `encode`."""
    for number, layer in enumerate(volume, first):
        data = encode(layer, **options)
        storage.write_bytes(storage.join(str(folder), f"{number:0{digits}d}.tif"), data)


def write_segment(folder, volume, replace=False):
    """Write layers from number 00 as uint16; reading drops their low bytes, which are noise."""
    noise = np.random.default_rng(3)
    (folder / "layers").mkdir(parents=True, exist_ok=replace)
    for number, layer in enumerate(volume):
        low = noise.integers(0, 256, layer.shape, dtype=np.uint16)
        deep = (layer.astype(np.uint16) << 8) | np.where(layer > 0, low, 0).astype(np.uint16)
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", deep, rowsperstrip=16)
    return folder


def ome(version, axes="zyx"):
    """Return the attributes of an OME-Zarr group with two levels."""
    multiscales = [
        {
            "version": version,
            "axes": [{"name": axis, "type": "space"} for axis in axes],
            "datasets": [{"path": "0"}, {"path": "1"}],
        }
    ]
    return (
        {"multiscales": multiscales} if version == "0.4" else {"ome": {"multiscales": multiscales}}
    )


def read_picture(uri):
    """Read a picture with Pillow."""
    with Image.open(io.BytesIO(storage.read_bytes(uri))) as image:
        return np.asarray(image)


def grids(folder):
    """Return the URIs of the grids in a folder."""
    entries = storage.list_folder(folder) if storage.exists(folder) else []
    return [storage.join(folder, entry.name) for entry in entries if entry.name.endswith(".zarr")]


def own_messages(caplog):
    """Return what inkdask logged, because asyncio may log the garbage of any earlier test."""
    return [it.getMessage() for it in caplog.records if it.name.startswith("inkdask")]


@contextmanager
def bound_by_rights():
    """Become nobody while root, because root may read and write every file."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
