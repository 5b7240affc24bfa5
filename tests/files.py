"""Volumes, and the layer files that hold them."""

import io
import os
from contextlib import contextmanager

import numpy as np
import tifffile

from inkdask import storage


def random_volume(shape, dtype="<u2", seed=0):
    """Make a volume (z, y, x) of smooth noise, as compressible as a scan, with zeros at the top."""
    rng = np.random.default_rng(seed)
    pixels = np.cumsum(rng.integers(-900, 901, shape), axis=2) + 30000
    volume = np.clip(pixels, 0, 65535).astype(np.uint16)
    volume[:, : shape[1] // 5] = 0
    if np.dtype(dtype).itemsize == 1:
        volume >>= 8
    return volume.astype(dtype)


def encode(layer, **options):
    """Encode an image as a TIFF; one strip unless ``options`` of tifffile say otherwise."""
    if "tile" not in options:
        options.setdefault("rowsperstrip", layer.shape[0])
    file = io.BytesIO()
    tifffile.imwrite(file, layer, **options)
    return file.getvalue()


def write_layers(folder, volume, first=0, digits=2, **options):
    """Write ``volume`` (z, y, x) as layers ``first`` and on; options as for `encode`."""
    for number, layer in enumerate(volume, first):
        data = encode(layer, **options)
        storage.write_bytes(storage.join(str(folder), f"{number:0{digits}d}.tif"), data)


@contextmanager
def bound_by_rights():
    """Be nobody in place of root, whom the rights of files do not bind."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
