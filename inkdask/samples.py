"""A few samples of a segment: pieces of its middle layer, and columns through all of its depth."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from inkdask.box import Box
from inkdask.errors import InkdaskError
from inkdask.reading.images import Image, decoded_bytes
from inkdask.reading.layers import find_layers, list_names
from inkdask.reading.tiff import TiffImage
from inkdask.reading.tiff_header import read_stack
from inkdask.reading.volume import DecodedStack, Source, TiffStack
from inkdask.reading.zarr_volume import ZarrSource
from inkdask.segment import Segment, read_header
from inkdask.storage.parallel import for_each
from inkdask.view.sampling import evenly, pieces_in, span_of

PIECES, COLUMNS = 16, 3  # at most
LAYERS = 13, 9, 5  # of a column: as many as the budget allows
BYTES = 16 << 20  # at most: of pieces, and of columns
WHOLE = 256 << 20  # bytes of the largest layer that is decoded for its values
FULL = 0.98  # share of the fullest piece from which a piece counts as full


@dataclass(frozen=True, eq=False)
class Samples:
    """Values of a segment; nothing where reading them would decode whole layers.

    Attributes
    ----------
    pieces
        Pieces of the middle layer, as stored, (1, y, x) each.
    columns
        Full pieces through all of the depth, high bytes, uint8 (z, y, x) each.
    numbers
        Numbers of the layers of a column. A job may read only some of these layers.
    """

    pieces: Sequence[np.ndarray] = ()
    columns: Sequence[np.ndarray] = ()
    numbers: tuple[int, ...] = ()

    @property
    def empty(self) -> float | None:
        """Share of pixels that are read as zero; None without pieces."""
        return 1 - float(np.mean([*map(_filled, self.pieces)])) if self.pieces else None

    @property
    def largest(self) -> int:
        """Largest value, as stored; 0 without pieces."""
        return max((int(piece.max()) for piece in self.pieces), default=0)

    @property
    def profile(self) -> dict[int, float]:
        """Mean of the voxels with data in the columns, by the number of the layer."""
        layers = zip(*self.columns, strict=True)
        voxels = [np.concatenate([piece[piece > 0] for piece in layer]) for layer in layers]
        pairs = zip(self.numbers, voxels, strict=bool(voxels))
        return {number: float(values.mean()) for number, values in pairs if values.size}


def sample(segment: Segment, share: float = 1 / 40) -> Samples:
    """Read a few samples of a segment, inside its box.

    Pieces cost at most a ``share`` of the bytes of all, and columns, too; one piece is read always.
    """
    source, box = segment.source, segment.box or Box.at((0, 0), segment.shape[1:])
    found, middle = Samples(), len(segment.layers) // 2
    if isinstance(source, DecodedStack):
        return _of_whole(source.images[middle], box)
    if isinstance(source, ZarrSource):  # a chunk of a shard can be read alone
        source = replace(source, unit=source.inner)
    with suppress(InkdaskError):  # A job names what it cannot read.
        budget = min(BYTES, share * source.cost(*box.slices))
        layer = source.take(slice(middle, middle + 1))
        boxes = _boxes(layer, box, budget)
        found = Samples(_read(layer, boxes, segment.dtype))
        shares = [*map(_filled, found.pieces)]
        full = [at for at, share in zip(boxes, shares, strict=True) if share > FULL * max(shares)]
        for layers in LAYERS if full else ():
            through, numbers = _through(segment, source, layers)
            cost = max(through.cost(*at.slices) for at in full)
            if count := min(COLUMNS, int(budget // max(cost, 1))):
                columns = [full[n] for n in evenly(range(len(full)), count)]
                return replace(found, columns=_read(through, columns, np.uint8), numbers=numbers)
    return found


def _of_whole(image: Image, box: Box) -> Samples:
    """Decode a layer that cannot be read in parts, where it is small and has values to judge."""
    if image.dtype.itemsize == 1 or decoded_bytes(image) > WHOLE:
        return Samples()
    with suppress(InkdaskError):
        return Samples([image.decode(image.dtype)[None, *box.slices]])
    return Samples()


def _boxes(layer: Source, box: Box, budget: float) -> list[Box]:
    """Choose pieces of a layer, evenly spread in a box; each lies in one unit of the files."""
    (height, width), (rows, columns) = layer.unit, box.slices
    down, across = pieces_in(rows, height), pieces_in(columns, width)
    first = Box.of(span_of(down[0], height, rows), span_of(across[0], width, columns))
    count = max(1, min(PIECES, int(budget // max(layer.cost(*first.slices), 1))))
    # A lattice of the golden ratio: few pieces share a row or a column.
    at = [((n + 0.5) / count, (n * 0.618 + 0.5) % 1) for n in range(count)]
    some = dict.fromkeys((down[int(y * len(down))], across[int(x * len(across))]) for y, x in at)
    return [Box.of(span_of(i, height, rows), span_of(j, width, columns)) for i, j in some]


def _through(segment: Segment, source: Source, most: int) -> tuple[Source, tuple[int, ...]]:
    """Return layers evenly spread through all that are there, and their numbers, ascending."""
    found = segment.found
    some = slice(None, None, -(-len(found) // most))
    if isinstance(source, ZarrSource):
        shape = len(found), *source.shape[1:]
        source = replace(source, shape=shape, first=0, stride=1, numbers=found)
        return source.take(some), found[some]
    numbers = found[some]
    if {*numbers} <= {*segment.layers} and isinstance(source, TiffStack):
        places = [segment.layers.index(number) for number in numbers]
        return TiffStack(tuple(source.images[place] for place in places)), numbers
    files = find_layers(segment.uri, list_names(segment.uri))[1]
    if len(files) == 1:
        file = files[0]
        headers: dict[int, Any] = dict(
            enumerate(read_stack(file.uri, file.entry.size, file.entry.etag))
        )
    else:
        some_files = {file.number: file for file in files if file.number in numbers}
        headers = dict(zip(some_files, for_each(read_header, some_files.values()), strict=True))
    alike = {
        number: headers[number]
        for number in numbers
        if isinstance(headers.get(number), TiffImage) and headers[number].shape == source.shape[1:]
    }
    if not alike:
        raise InkdaskError(f"{segment.uri} has no layers of one size.")
    return TiffStack(tuple(alike.values())), tuple(alike)


def _read(source: Any, boxes: Sequence[Box], dtype: Any) -> list[np.ndarray]:
    return for_each(lambda box: source.block(*box.slices).read(dtype), boxes)


def _filled(piece: np.ndarray) -> float:
    """Share of pixels that are not read as zero, in a piece as stored."""
    return float(np.mean(piece >> 8 * (piece.itemsize - 1) > 0))
