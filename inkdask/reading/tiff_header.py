"""Headers of TIFF layers, parsed by tifffile from small range reads; no pixels are read.

The terms are those of the TIFF 6.0 specification (Adobe, 1992).
"""

from __future__ import annotations

import collections
import io
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from operator import index
from typing import IO, Any, cast

import numpy as np
import tifffile

from inkdask import storage
from inkdask.errors import InkdaskError, reason
from inkdask.reading.images import PLAIN
from inkdask.reading.tiff import Layout, TiffImage

HEADER_READ = 4096  # bytes, which hold the tags of most files
CUT_BYTES, CUT_ROWS = 1 << 20, 64  # limits of a piece where pieces can be chosen

HEAD = 8  # bytes of the shortest header
MOST_SHRUNK = 1 << 16  # times that a codec makes zeros smaller
MOST_IMAGES = 1 << 20
MOST_VISITS = 1000  # of one byte, because tifffile follows pages in a circle without end

PLANES = "PlanarConfiguration"
_JPEG = (7, 33007)
_UNPREDICTED = (*_JPEG, 1, 32773)  # libtiff ignores a predictor there, tifffile applies it
_SEVERAL = "several pages, of which the first is read"
_MEANINGS = {0: "of white that is 0, upside down; save it as MinIsBlack", 3: "colours of a palette"}
_BYTES = (1, 5, 8, 32773, 32946, 34925, 50000)  # none, LZW, deflate, PackBits, deflate, LZMA, zstd


def read_header(uri: str, size: int, etag: str = "") -> TiffImage:
    """Parse the header of the first image of a TIFF; see `read_stack`."""
    image, *others = read_stack(uri, size, etag)
    return replace(image, oddity=_SEVERAL) if others else image


def read_stack(uri: str, size: int, etag: str = "") -> list[TiffImage]:
    """Parse the headers of a TIFF of ``size`` bytes, and check that its pixels can be read.

    Returns the images of a stack, or else the first image alone.
    """
    file = cast("IO[bytes]", _RangeFile(uri, size, etag))
    try:
        with tifffile.TiffFile(file, _multifile=False) as tif:
            len(tif.pages)  # finds a circle of less than 100 pages
            page: Any = tif.pages.first
            first = _describe(uri, page, page.dataoffsets, page.databytecounts)
            _check_claims(page.description)
            images = list(_describe_all(size, first, page, tif.series[0]))
            if len(images) == 1 and (tif.pages.is_multipage or tif.series[0].ndim > 3):
                images = [replace(images[0], oddity=_SEVERAL)]
    except InkdaskError:
        raise
    except Exception as error:
        raise InkdaskError(f"{uri} cannot be read as a TIFF: {reason(error)}.") from error
    for image in images:
        _check_places(image, size)
    return [replace(it, etag=etag, page=i * (len(images) > 1)) for i, it in enumerate(images, 1)]


def _check_places(image: TiffImage, size: int) -> None:
    """Check that all pieces lie in a file of ``size`` bytes, and may hold their pixels."""
    # Ignore pieces of no bytes, because their offsets mean nothing.
    places, counts = image.offsets[image.counts != 0], image.counts[image.counts != 0]
    height, width = image.layout.piece
    least = -(-height * width * image.layout.pixel_bytes // MOST_SHRUNK)
    shortest = int(counts.min(initial=size))  # an int, because `least` may be any large
    if places.min(initial=HEAD) < HEAD or (counts.size and shortest < least):
        raise InkdaskError(f"{image.uri} is corrupt: its pixels are not where it says.")
    end = (places.astype(np.uint64) + counts.astype(np.uint64)).max(initial=0)  # no overflow
    if end > size:
        raise InkdaskError(
            f"{image.uri} is truncated: its pixels reach to byte {end}, the file has {size} bytes."
        )


def _check_claims(description: str) -> None:
    """Check that a description in OME-XML is none of millions of images, which tifffile lists."""
    sizes = (re.findall(rf'\bSize{axis}="(\d+)"', description) for axis in "CTZ")
    if math.prod(max(map(int, found), default=1) for found in sizes) > MOST_IMAGES:
        raise ValueError("its description speaks of too many images")


def _describe_all(size: int, first: TiffImage, page: Any, series: Any) -> Iterator[TiffImage]:
    """Describe the images along the one axis of a stack; where there are more axes, the first."""
    count = series.size // page.size
    if count < 2 or series.ndim - ("S" in series.axes) > 3:
        yield first
    elif series.dataoffset is None:
        for it in (it for it in series if it is not None):  # others lie in other files
            yield _describe(first.uri, page, it.dataoffsets, it.databytecounts)
    else:  # One page may describe all. The first beyond the end of the file will be an error.
        for shift in range(0, min(count * page.nbytes, size + 1), page.nbytes):
            yield replace(first, offsets=first.offsets + shift)


def _describe(uri: str, page: Any, starts: Sequence[int], counts: Sequence[int]) -> TiffImage:
    """Describe an image like a page of tifffile, whose pieces have these first bytes and sizes."""
    bits, kind = page.bitspersample, page.sampleformat
    if kind != 1 or bits not in (8, 16):
        what = page.dtype if kind != 1 or bits == 1 else f"{bits}-bit values"
        raise InkdaskError(
            f"{uri} is no TIFF of uint8 or uint16, but {what or bits}: save it as one of these, "
            "over the whole range of values."
        )
    for tag, most in (("FillOrder", 1), ("ImageDepth", 1), ("Orientation", 1), (PLANES, 2)):
        if not 1 <= (value := page.tags.valueof(tag, 1)) <= most:
            raise InkdaskError(f"{uri} has {tag} {int(value)}, and only 1 can be read: {PLAIN}.")
    if page.compression not in (*_BYTES, *_JPEG):
        raise InkdaskError(f"{uri} is compressed by {page.compression!r}, which cannot be read.")
    if page.photometric in _MEANINGS:
        raise InkdaskError(f"{uri} cannot be read: its values are {_MEANINGS[page.photometric]}.")
    if page.predictor not in (1, 2) or (page.predictor == 2 and page.compression in _UNPREDICTED):
        raise InkdaskError(f"{uri} has predictor {page.predictor!r}, which cannot be read.")
    height, width = index(page.imagelength), index(page.imagewidth)
    if min(height, width) < 1:
        raise InkdaskError(f"{uri} has no pixels.")
    piece = min(index(page.rowsperstrip), height), width
    if page.is_tiled:
        piece = index(page.tilelength), index(page.tilewidth)
    planes, samples = 1, index(page.samplesperpixel)
    if min(*piece, samples) < 1:
        raise InkdaskError(f"{uri} is corrupt: it is cut into pieces of {piece[1]} x {piece[0]}.")
    grid = (-(-height // piece[0]), -(-width // piece[1]))
    if page.planarconfig == 2:
        planes, samples = samples, 1
    dtype = np.dtype(f"{page.parent.byteorder}u{bits // 8}")
    pieces, listed = grid[0] * grid[1], min(len(starts), len(counts))
    if listed < pieces * planes:
        raise InkdaskError(f"{uri} is corrupt: it lists {listed} of {pieces * planes} pieces.")
    # The tables begin with the pieces of the first plane.
    offsets, sizes = (
        np.array(table[:pieces]).astype(np.int64, casting="same_kind").reshape(grid)
        for table in (starts, counts)
    )
    words = _words(page, piece, grid)
    if not page.is_tiled and page.compression == 1 and page.predictor == 1:
        row_bytes = width * samples * dtype.itemsize
        piece, offsets, sizes = _recut(height, row_bytes, piece, offsets, sizes)
    layout = Layout(
        shape=(height, width),
        dtype=dtype.str,
        piece=piece,
        is_tiled=page.is_tiled,
        samples=samples,
        compression=int(page.compression),
        predictor=int(page.predictor),
        jpeg=_jpeg(page) if page.compression in _JPEG else None,
        words=words,
    )
    channels = f"{page.samplesperpixel} channels, of which the first is read"
    return TiffImage(uri, layout, offsets, sizes, channels if page.samplesperpixel > 1 else "")


def _jpeg(page: Any) -> tuple[bytes | None, Any, Any]:
    if page.photometric == 2 and page.samplesperpixel < 3:
        raise ValueError("colours of one sample")
    colours = tifffile.tifffile.jpeg_decode_colorspace(
        page.photometric, page.planarconfig, page.extrasamples, page.is_jfif
    )
    return page.jpegtables, *colours


def _recut(
    height: int, row_bytes: int, piece: tuple[int, int], offsets: np.ndarray, counts: np.ndarray
) -> tuple[tuple[int, int], np.ndarray, np.ndarray]:
    """Choose new pieces for an uncompressed image whose rows lie one after the other."""
    starts = piece[0] * np.arange(len(offsets))
    rows = np.minimum(piece[0], height - starts)
    in_order = offsets[:, 0] == offsets[0, 0] + starts * row_bytes
    if not in_order.all() or (counts[:, 0] != rows * row_bytes).any():
        return piece, offsets, counts
    # A power of two, so that blocks of these pieces share their edges with chunks.
    step = min(1 << max(CUT_BYTES // row_bytes, 1).bit_length() - 1, CUT_ROWS)
    starts = np.arange(0, height, step)[:, None]
    rows = np.minimum(step, height - starts)
    return (step, piece[1]), offsets[0, 0] + starts * row_bytes, rows * row_bytes


def _words(page: Any, piece: tuple[int, int], grid: tuple[int, int]) -> str:
    if page.is_tiled:
        cut = f"{piece[1]} x {piece[0]} tiles"
    elif grid[0] == 1:
        cut = "one strip"
    else:
        cut = f"{piece[0]}-row strips"
    codec = "uncompressed" if page.compression == 1 else tifffile.COMPRESSION(page.compression).name
    return f"TIFF, {cut}, {codec.replace('ADOBE_', '')}"


class _RangeFile:
    """File for tifffile that fetches ranges on demand, with a little read-ahead, and keeps them."""

    def __init__(self, uri: str, size: int, etag: str) -> None:
        self.name = uri
        self._size = size
        self._etag = etag
        self._position = 0
        self._held: list[tuple[int, bytes]] = []
        self._visits = collections.Counter[int]()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        self._position = start + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def read(self, size: int = -1, /) -> bytes:
        start = min(self._position, self._size)
        self._visits[start] += 1
        if self._visits[start] > MOST_VISITS:
            raise ValueError("its pages follow each other in a circle")
        stop = self._size if size < 0 else min(start + size, self._size)
        self._position = stop
        for held, data in self._held:
            if held <= start and stop <= held + len(data):
                return data[start - held : stop - held]
        stop_read = min(max(stop, start + HEADER_READ), self._size)
        data = storage.read_range(self.name, start, stop_read, self._etag)
        self._held.append((start, data))
        return data[: stop - start]
