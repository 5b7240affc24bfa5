"""Damaged pieces of every codec, one after the other: ``python -m tests.damage SEED COUNT``.

A decoder that follows what damaged data say can end its process, so this is one of its own. It
prints how many pieces of each codec were decoded all the same, and how many were refused.
"""

import collections
import io
import sys
import tempfile
from pathlib import Path

import imagecodecs
import numpy as np
import tifffile

from inkdask.errors import InkdaskError
from inkdask.reading import images, tiff_header

ROWS, COLUMNS = 40, 50
KINDS = ["lzw", "zlib", "packbits", "zstd", "lzma", "jpeg", "png", "jpg"]


def pieces(rng, kind):
    """Encode an image of noise, steps or nothing as ``kind``, and say where its pixels lie."""
    noise = rng.integers(0, 256, (ROWS, COLUMNS))
    steps = np.cumsum(rng.integers(-3, 4, (ROWS, COLUMNS)), axis=1)
    pixels = [noise, steps, noise // 64, noise * 0][rng.integers(4)].astype(np.uint8)
    if kind in ("png", "jpg"):
        data = (imagecodecs.png_encode if kind == "png" else imagecodecs.jpeg_encode)(pixels)
        return bytearray(data), 26, len(data)  # after the part that says the size
    file = io.BytesIO()
    layout = [{"rowsperstrip": 16}, {"tile": (16, 32)}, {"rowsperstrip": ROWS}][rng.integers(3)]
    predictor = kind in ("lzw", "zlib", "zstd", "lzma") and bool(rng.integers(2))
    tifffile.imwrite(file, pixels, compression=kind, predictor=predictor, **layout)
    data = file.getvalue()
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        page = tif.pages.first
        start = min(page.dataoffsets)
        stop = max(np.add(page.dataoffsets, page.databytecounts))
    return bytearray(data), start, int(stop)


def damage(rng, data, start, stop):
    """Spoil some bytes in place."""
    # Decoders trust the first bytes of a piece most.
    first = start + 1 if rng.integers(3) == 0 else int(rng.integers(start, stop))
    last = int(min(first + rng.integers(1, 60), stop))
    how = rng.integers(5)
    if how == 0:
        data[first] ^= 1 << rng.integers(8)
    elif how == 1:
        data[start:stop] = rng.bytes(stop - start)
    else:
        filling = [rng.bytes(last - first), bytes(last - first), b"\xff" * (last - first)]
        data[first:last] = filling[how - 2]


def main(seed, count):
    """Damage and decode ``count`` images."""
    outcomes = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(seed, seed + count):
            rng = np.random.default_rng(number)
            kind = KINDS[number % len(KINDS)]
            data, start, stop = pieces(rng, kind)
            damage(rng, data, start, stop)
            path = Path(folder) / (f"0.{kind}" if kind in ("png", "jpg") else "0.tif")
            path.write_bytes(data)
            read = tiff_header if path.suffix == ".tif" else images
            try:
                image = read.read_header(str(path), len(data))
                decoded = image.decode()
                assert decoded.shape == image.shape, (number, decoded.shape)
                outcomes[kind, "decoded"] += 1
            except InkdaskError as error:
                if str(path) not in str(error):
                    raise ValueError(f"{number}: {error}") from error
                outcomes[kind, "refused"] += 1
    for kind in KINDS:
        print(kind, outcomes[kind, "decoded"], outcomes[kind, "refused"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
