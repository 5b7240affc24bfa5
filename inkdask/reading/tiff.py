"""TIFF layers by byte ranges: a block fetches and decodes only the pieces that it meets.

A `TiffImage` holds the places of the pieces (strips or tiles) of one layer, as parsed by
`reading.tiff_header`. A `TiffBlock` is a box of all layers. It is picklable and has no open files,
and it holds the places of its own pieces only, so that large tables are sent once. Pieces are
decoded into the uint8 output of the block; of uint16 values the high byte is kept, because the
models were trained so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import tifffile

from inkdask import storage
from inkdask.box import Box, Slices
from inkdask.errors import InkdaskError, reason
from inkdask.memory import map_large_blocks
from inkdask.reading import lzw
from inkdask.storage.parallel import for_each

MERGE_GAP = 256  # bytes: pieces this close are fetched as one range
RUN_BYTES = 8 << 20  # bytes of a range; long, because each S3 request costs milliseconds of CPU


@dataclass(frozen=True)
class Layout:
    """How a TIFF stores its pixels.

    Attributes
    ----------
    shape
        Height and width in pixels.
    dtype
        ``|u1``, ``<u2`` or ``>u2``, in the byte order of the file.
    piece
        Height and width of a strip or tile.
    is_tiled
        Whether pieces are tiles, which have their full size at the border too.
    samples
        Interleaved values of a pixel (3 for RGB), of which the first is kept.
    compression, predictor
        Tags 259 and 317.
    jpeg
        Tables and colour spaces for JPEG pieces.
    words
        Human-readable layout.
    """

    shape: tuple[int, int]
    dtype: str
    piece: tuple[int, int]
    is_tiled: bool
    samples: int
    compression: int
    predictor: int
    jpeg: tuple[bytes | None, Any, Any] | None
    words: str

    @property
    def pixel_bytes(self) -> int:
        """Bytes from one pixel to the next."""
        return self.samples * np.dtype(self.dtype).itemsize

    def pieces(self, rows: slice, columns: slice) -> tuple[slice, slice]:
        """Return the rows and columns of pieces that meet rows and columns of pixels."""
        height, width = self.piece
        return (
            slice(rows.start // height, -(-rows.stop // height)),
            slice(columns.start // width, -(-columns.stop // width)),
        )

    def decode(self, data: memoryview, rows: int) -> np.ndarray:
        """Decode a piece of ``rows`` rows: ``dtype`` (rows, width of a piece)."""
        width = self.piece[1]
        size = rows * width * self.pixel_bytes
        dtype = np.dtype(self.dtype)
        if self.jpeg:
            return self._decode_jpeg(data, rows, *self.jpeg)
        if self.compression == 5:
            data = lzw.decode(data, rows, width * self.pixel_bytes)
        elif self.compression != 1:
            data = tifffile.TIFF.DECOMPRESSORS[self.compression](data, out=size)
        if len(data) < size:
            raise ValueError(f"{len(data)} bytes where {size} belong")
        values = np.frombuffer(data, dtype, size // dtype.itemsize)
        values = values.reshape(rows, width, self.samples)
        if self.predictor != 1:
            values = values.astype(dtype.newbyteorder("="))
            tifffile.TIFF.UNPREDICTORS[self.predictor](values, axis=-2, out=values)
        return values[:, :, 0]

    def _decode_jpeg(
        self, data: memoryview, rows: int, tables: bytes | None, colours: Any, wanted: Any
    ) -> np.ndarray:
        _, height, width, _ = tifffile.tifffile.jpeg_shape(bytes(data))
        if width != self.piece[1] or not rows <= height <= self.piece[0]:
            raise ValueError(f"{width} x {height} pixels where {self.piece[1]} x {rows} belong")
        pixels: np.ndarray = tifffile.TIFF.DECOMPRESSORS[self.compression](
            data, tables=tables, colorspace=colours, outcolorspace=wanted
        )
        return pixels.reshape(height, width, -1)[:rows, :, 0]


@dataclass(frozen=True, eq=False)
class TiffImage:
    """One layer: a layout, and the place of each piece in the file.

    Attributes
    ----------
    uri
        Path or URI of the file.
    layout
        How the file stores its pixels.
    offsets, counts
        First byte and number of bytes of each piece, int64 (rows of pieces, columns of pieces). A
        piece of no bytes is all zero.
    oddity
        Unread contents, for a warning; mostly empty.
    etag
        ETag on S3, elsewhere empty.
    page
        Number of the image in a stack, from 1; 0 without a stack.
    """

    uri: str
    layout: Layout
    offsets: np.ndarray
    counts: np.ndarray
    oddity: str = ""
    etag: str = ""
    page: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.layout.shape

    @property
    def words(self) -> str:
        """Human-readable layout."""
        return self.layout.words + ", pages of a stack" * bool(self.page)

    @property
    def dtype(self) -> np.dtype[Any]:
        """Type of the values, in this machine's byte order."""
        return np.dtype(self.layout.dtype).newbyteorder("=")

    @property
    def channels(self) -> int:
        """Interleaved values of a pixel, of which the first is kept."""
        return self.layout.samples

    def decode(self, dtype: Any = np.uint8) -> np.ndarray:
        """Read the whole image, ``dtype`` (y, x): high bytes, or values as stored."""
        height, width = self.shape
        return TiffBlock.of([self], slice(0, height), slice(0, width)).read(dtype)[0]


@dataclass(frozen=True, eq=False)
class TiffBlock:
    """Box of all layers, read in a task.

    Attributes
    ----------
    uris, etags, layouts
        File, ETag and layout of each layer.
    rows, columns
        The box, in pixels.
    offsets, counts
        First byte and number of bytes of each piece that meets the box, int64, layer by layer and
        row by row.
    """

    uris: tuple[str, ...]
    etags: tuple[str, ...]
    layouts: tuple[Layout, ...]
    rows: slice
    columns: slice
    offsets: np.ndarray
    counts: np.ndarray

    @classmethod
    def of(cls, images: Sequence[TiffImage], rows: slice, columns: slice) -> TiffBlock:
        """Cut rows and columns out of all layers; reads nothing."""
        offsets, counts = [], []
        for image in images:
            window = image.layout.pieces(rows, columns)
            offsets.append(image.offsets[window].ravel())
            counts.append(image.counts[window].ravel())
        return cls(
            tuple(image.uri for image in images),
            tuple(image.etag for image in images),
            tuple(image.layout for image in images),
            rows,
            columns,
            np.concatenate(offsets),
            np.concatenate(counts),
        )

    def read(self, dtype: Any = np.uint8) -> np.ndarray:
        """Fetch and decode the block, ``dtype`` (z, y, x): high bytes, or values as stored."""
        map_large_blocks()
        out = np.zeros((len(self.uris), *Box.of(self.rows, self.columns).shape), dtype)
        for_each(lambda run: run.read_into(out), self._runs())
        return out

    def _runs(self) -> Iterator[_Run]:
        """Join pieces that are neighbours in a file, up to `RUN_BYTES`."""
        first = 0
        known: dict[tuple[int, int], list[_Place]] = {}
        for z, layout in enumerate(self.layouts):
            if layout.piece not in known:  # once, because most layers are cut alike
                known[layout.piece] = list(self._places(layout))
            places = known[layout.piece]
            last = first + len(places)
            offsets, counts = self.offsets[first:last], self.counts[first:last]
            gaps = offsets[1:] - (offsets[:-1] + counts[:-1])
            is_far = (gaps < 0) | (gaps > MERGE_GAP)
            is_long = np.diff((offsets - offsets[0]) // RUN_BYTES) > 0
            cuts = np.flatnonzero(is_far | is_long) + 1
            for i, j in zip([0, *cuts], [*cuts, len(places)], strict=True):
                yield _Run(self, z, layout, places[i:j], offsets[i:j], counts[i:j])
            first = last

    def _places(self, layout: Layout) -> Iterator[_Place]:
        """Find what each piece that meets the block has in common with it."""
        block = Box.of(self.rows, self.columns)
        down, across = layout.pieces(self.rows, self.columns)
        for row in range(down.start, down.stop):
            for column in range(across.start, across.stop):
                corner = row * layout.piece[0], column * layout.piece[1]
                yield _Place(*corner, *Box.at(corner, layout.piece).common(block))


class _Place(NamedTuple):
    """First row and column of a piece, its pixels inside the block, and where they go."""

    row: int
    column: int
    inside: Slices
    target: Slices


@dataclass(frozen=True, eq=False)
class _Run:
    """Pieces of one layer, fetched as one range."""

    block: TiffBlock
    z: int
    layout: Layout
    places: list[_Place]
    offsets: np.ndarray
    counts: np.ndarray

    def read_into(self, out: np.ndarray) -> None:
        """Fetch the pieces, and decode them into the block ``out`` (z, y, x)."""
        uri, etag = self.block.uris[self.z], self.block.etags[self.z]
        start, stop = int(self.offsets[0]), int(self.offsets[-1] + self.counts[-1])
        data = memoryview(storage.read_range(uri, start, stop, etag) if stop > start else b"")
        spans = zip((self.offsets - start).tolist(), self.counts.tolist(), strict=True)
        for (row, column, inside, target), (offset, count) in zip(self.places, spans, strict=True):
            if not count:  # The block is zero already.
                continue
            rows = self.layout.piece[0]
            if not self.layout.is_tiled:  # The last strip may be shorter.
                rows = min(rows, self.layout.shape[0] - row)
            try:
                piece = self.layout.decode(data[offset : offset + count], rows)
            except Exception as error:
                raise InkdaskError(
                    f"{uri} is corrupt at row {row}, column {column} "
                    f"(bytes {start + offset} to {start + offset + count}): {reason(error)}."
                ) from error
            _narrow(piece[inside], out[self.z][target])


def _narrow(values: np.ndarray, out: np.ndarray) -> None:
    """Copy values, or the high bytes of uint16 values for uint8, to ``out`` in one pass."""
    if values.dtype.itemsize == out.dtype.itemsize:
        np.copyto(out, values)
    elif values.dtype.isnative:
        np.right_shift(values, 8, out=out, casting="unsafe")
    else:  # The high byte of a value in the other byte order is the low byte in this one.
        np.copyto(out, values.view(values.dtype.newbyteorder("=")), casting="unsafe")
