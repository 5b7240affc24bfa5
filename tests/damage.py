"""Decode damaged images of every codec: ``python -m tests.damage SEED COUNT``.

It runs in a process of its own, because damaged data can crash a decoder. It prints for each codec
how many images were decoded and how many were refused.
"""

import collections
import functools
import io
import sys

import imagecodecs
import numpy as np
import tifffile

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.reading import images, tiff_header
from inkdask.storage import parallel

ROWS, COLUMNS = 40, 50
KINDS = ["lzw", "zlib", "packbits", "zstd", "lzma", "jpeg", "png", "jpg"]
PREDICTED = ("lzw", "zlib", "zstd", "lzma")
LAYOUTS = [{"rowsperstrip": 16}, {"tile": (16, 32)}, {"rowsperstrip": ROWS}]


@functools.cache
def encoded(kind, pattern, layout, is_predicted):
    """Encode noise, steps or zeros as ``kind``; return the file and the span of its pixels."""
    rng = np.random.default_rng(pattern)
    noise = rng.integers(0, 256, (ROWS, COLUMNS))
    steps = np.cumsum(rng.integers(-3, 4, (ROWS, COLUMNS)), axis=1)
    pixels = [noise, steps, noise // 64, noise * 0][pattern].astype(np.uint8)
    if kind in ("png", "jpg"):
        data = (imagecodecs.png_encode if kind == "png" else imagecodecs.jpeg_encode)(pixels)
        return data, 26, len(data)  # after the frame header
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, compression=kind, predictor=is_predicted, **LAYOUTS[layout])
    file.seek(0)
    with tifffile.TiffFile(file) as tif:
        page = tif.pages.first
        start = min(page.dataoffsets)
        stop = max(np.add(page.dataoffsets, page.databytecounts))
    return file.getvalue(), start, int(stop)


def damage(rng, data, start, stop):
    """Spoil some bytes in place."""
    # The first bytes of a piece do most harm.
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
    files = {}
    # Read from memory, in one thread: the subject is decoding.
    storage.read_range = lambda uri, start, stop, etag: files[uri][start:stop]
    storage.read_bytes = lambda uri, etag: files[uri]
    parallel._here.is_in_pool = True
    for number in range(seed, seed + count):
        rng = np.random.default_rng(number)
        kind = KINDS[number % len(KINDS)]
        pattern, layout, predictor = map(int, rng.integers([4, len(LAYOUTS), 2]))
        file, start, stop = encoded(kind, pattern, layout, predictor and kind in PREDICTED)
        data = bytearray(file)
        damage(rng, data, start, stop)
        name = f"image.{kind}" if kind in ("png", "jpg") else "image.tif"
        files[name] = bytes(data)
        read = tiff_header if name.endswith("tif") else images
        try:
            image = read.read_header(name, len(data))
            decoded = image.decode()
            assert decoded.shape == image.shape, (number, decoded.shape)
            outcomes[kind, "decoded"] += 1
        except InkdaskError as error:
            if name not in str(error):
                raise ValueError(f"{number}: {error}") from error
            outcomes[kind, "refused"] += 1
    for kind in KINDS:
        print(kind, outcomes[kind, "decoded"], outcomes[kind, "refused"])


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
