"""TIFF layers: tags, tables and pieces."""

import contextlib
import functools
import io
import struct

import numpy as np
import tifffile

from inkdask.segment import open_segment
from inkdask.storage import parallel
from tests.files import random_volume
from tests.fuzz import spoil

MOST = 1 << 20  # pixels that are compared
SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8}
TAGS = (254, 256, 257, 258, 259, 262, 266, 270, 273, 274, 277, 278, 279, 284, 317, 320, 322, 323,
        324, 325, 330, 338, 339, 347, 530, 32997, 65000)  # fmt: skip


@contextlib.contextmanager
def opened(_):
    """Yield the reader of one input."""
    parallel._here.is_in_pool = True  # one thread, because the subject is decoding
    yield read


def read(rng, folder):
    """Write one or two layers, of which the first is spoiled, and compare with tifffile."""
    layers = folder / "layers"
    layers.mkdir()
    data = whole = spoil.choice(rng, files())
    if rng.integers(10):
        data = spoiled(rng, whole)
    (layers / "00.tif").write_bytes(data)
    others = [whole] if rng.integers(3) == 0 else []
    for other in others:
        (layers / "01.tif").write_bytes(other)
    segment = open_segment(folder)
    depth, height, width = segment.shape
    if depth * height * width > MOST:
        segment = segment.take(slice(0, 4)).crop(
            slice(0, min(64, height)), slice(0, min(64, width))
        )
    got = segment.volume.compute(scheduler="synchronous")
    wanted = [oracle(it, segment.shape, is_stack=not others) for it in (data, *others)]
    if any(it is None for it in wanted):
        return "unjudged"
    np.testing.assert_array_equal(got, np.concatenate(wanted))
    return "read"


def oracle(data, shape, is_stack):
    """Decode a file by tifffile: uint8 (z, y, x), of the size of ``shape``; None if it refuses."""
    depth, height, width = shape
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as tif:
            page = tif.pages.first
            series = tif.series[0]
            pages = [it for it in series if it is not None] if is_stack else [page]
            if page.size > MOST or series.size > 8 * MOST:
                return None
            if any(0 in it.databytecounts for it in pages):
                return None  # because tifffile misplaces what comes after an empty piece
            whole = series if is_stack and series.size > page.size else page
            pixels, axes = whole.asarray(maxworkers=1), whole.axes
    except Exception:
        return None
    if pixels.dtype.itemsize == 2:
        pixels = pixels >> 8
    if "S" in axes:  # colours come first or last
        pixels = pixels.take(0, axes.index("S") - len(axes))
    pixels = pixels.reshape(-1, *pixels.shape[-2:])
    count = depth if is_stack else 1
    return pixels[:count, :height, :width].astype(np.uint8)


@functools.cache
def files():
    """Encode an image of 40 x 50 pixels, or a stack of three, in every layout and codec."""
    found = []
    layouts = ({"rowsperstrip": 16}, {"rowsperstrip": 40}, {"tile": (16, 32)})
    for dtype in ("|u1", "<u2", ">u2"):
        stack = random_volume((3, 40, 50), dtype)
        native = stack.astype(stack.dtype.newbyteorder("="))
        order = {"byteorder": ">" if dtype == ">u2" else "<"}
        codecs = [None, "lzw", "zlib", "packbits", "zstd", "lzma", *["jpeg"][: dtype == "|u1"]]
        for codec in codecs:
            predicted = codec not in (None, "packbits", "jpeg")
            for layout in layouts:
                options = {"compression": codec, "predictor": predicted, **layout, **order}
                found.append(_encode(native[0], **options))
                found.append(_encode(native[0], bigtiff=True, **options))
            found.append(_encode(native, compression=codec, rowsperstrip=16, **order))
        colour = np.stack([native[0]] * 3, axis=-1)
        found.append(_encode(colour, photometric="rgb", rowsperstrip=16, **order))
        separate = np.stack([native[0]] * 3)
        found.append(_encode(separate, photometric="rgb", planarconfig="separate", **order))
    found.append(_encode(native, imagej=True))
    found.append(_encode(native, ome=True))
    return tuple(found)


def _encode(pixels, **options):
    file = io.BytesIO()
    options.setdefault("photometric", "minisblack")
    tifffile.imwrite(file, pixels, **options)
    return file.getvalue()


def spoiled(rng, data):
    """Change tags, bytes of the head or the tables, or pixels of a file."""
    how = rng.integers(8)
    if how < 5:
        data = bytearray(data)
        for _ in range(rng.integers(1, 4)):
            change_tag(rng, data)
        return bytes(data)
    if how == 5:
        return data[: int(rng.integers(len(data)))]
    return spoil.change(rng, data)


def change_tag(rng, data):
    """Change one entry of the directories in place: its tag, type, count or values."""
    order = "<" if data[:2] == b"II" else ">"
    entries = list(_entries(data, order))
    if not entries:
        return
    at, is_big = spoil.choice(rng, entries)
    long, size = ("Q", 20) if is_big else ("I", 12)
    _, kind, count = struct.unpack_from(f"{order}HH{long}", data, at)
    how = rng.integers(6)
    if how == 0:
        struct.pack_into(f"{order}H", data, at, spoil.choice(rng, TAGS))
    elif how == 1:
        struct.pack_into(f"{order}H", data, at + 2, int(rng.integers(0, 19)))
    elif how == 2:
        limit = 256 ** struct.calcsize(long)
        struct.pack_into(f"{order}{long}", data, at + 4, spoil.number(rng) % limit)
    else:
        place, room = at + size - struct.calcsize(long), struct.calcsize(long)
        width = SIZES.get(kind, 1)
        if how > 3 and width * count > room:  # in the table that the entry points to
            place = struct.unpack_from(f"{order}{long}", data, place)[0]
            place += width * int(rng.integers(min(count, 1000) or 1))
            room = width
        value = spoil.number(rng) % 256 ** min(width, room)
        value = value.to_bytes(min(width, room), "little" if order == "<" else "big")
        data[place : place + len(value)] = value


def _entries(data, order):
    """Yield the place of each entry of the first directories, and whether the file is a BigTIFF."""
    try:
        is_big = struct.unpack_from(f"{order}H", data, 2)[0] == 43
        at = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, 8 if is_big else 4)[0]
        for _ in range(3):
            count = struct.unpack_from(f"{order}Q" if is_big else f"{order}H", data, at)[0]
            at += 8 if is_big else 2
            for _ in range(min(count, 40)):
                yield at, is_big
                at += 20 if is_big else 12
            at = struct.unpack_from(f"{order}Q" if is_big else f"{order}I", data, at)[0]
            if not at:
                return
    except struct.error:
        return
