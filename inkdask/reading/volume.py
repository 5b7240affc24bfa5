"""The surface volume as a lazy dask array, for every kind of file.

A `Source` describes files and how they can be cut, and `lazy` makes one task for each block. Blocks
follow the files, so that a full pass fetches each byte once: full-width bands for strips, aligned
squares for tiles and zarr chunks. Tasks carry small frozen descriptions.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from inkdask.box import Box
from inkdask.errors import InkdaskError
from inkdask.progress import size
from inkdask.reading.images import CHUNK, DECODING_BYTES, DecodedBlock, Image, decoded_bytes
from inkdask.reading.tiff import TiffBlock, TiffImage

# Upper bound of a read block, in decoded bytes: two rows of chunks are in memory at a time.
BLOCK_BYTES = 32 << 20
WHOLE_BYTES = 64 << 20  # limit of a piece that is read whole because cutting it costs more
BLOCK_SIDE = 1024  # pixels: upper bound of a block's height, about that of a chunk
LARGEST, LONGEST = 10**11, 1 << 20  # pixels of a layer, and of a side
MOST_BLOCKS = 500_000  # of a graph, made in some seconds


@dataclass(frozen=True)
class Occupied:
    """Share of pixels with data in squares of ``side`` pixels; the last square may be larger."""

    side: int
    share: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class MadeOf:
    """Segment that an array was prepared from: URI, identity and layer numbers."""

    uri: str
    identity: str
    layers: tuple[int, ...]


class Block(Protocol):
    """Box of a source; picklable, without open files."""

    def read(self) -> np.ndarray:
        """Read the box, uint8 (z, y, x), or bool (y, x) from a mask."""


Reading = Callable[[Block], Any]


@dataclass(frozen=True, eq=False)
class MaskBlock:
    """Box of a mask."""

    block: Block

    def read(self) -> np.ndarray:
        """Read the box, bool (y, x)."""
        return np.asarray(self.block.read()[0] > 0)


class Source(Protocol):
    """Files of a volume."""

    @property
    def name(self) -> str:
        """URI of the array, or of the first file."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, height and width."""

    @property
    def unit(self) -> tuple[int, int]:
        """Height and width of the largest piece that must be read whole."""

    @property
    def words(self) -> str:
        """Human-readable layout."""

    @property
    def can_be_sampled(self) -> bool:
        """Whether a piece can be read without decoding whole layers."""

    @property
    def reads_all_layers(self) -> bool:
        """Whether reading one layer fetches the others too."""

    @property
    def decoding_bytes(self) -> float:
        """Bytes held in memory while whole layers are decoded; 0 where pieces can be read."""

    @property
    def scratch_bytes(self) -> float:
        """Bytes of layers that a process decodes to its own disk, before compression."""

    @property
    def occupancy(self) -> Occupied | None:
        """Where data are, when the files say so."""

    @property
    def made_of(self) -> MadeOf | None:
        """Segment that a prepared array was made from; None for other sources."""

    def cost(self, rows: slice, columns: slice) -> float:
        """Bytes that reading those rows and columns of all layers fetches; reads nothing."""

    def block(self, rows: slice, columns: slice) -> Block:
        """Cut out rows and columns; reads nothing."""

    def take(self, layers: slice) -> Source:
        """Keep some layers, in the order of the slice."""


class _Files:
    """Answers that are the same for all layer files."""

    reads_all_layers = False
    occupancy: Occupied | None = None
    made_of: MadeOf | None = None

    def __post_init__(self: Any) -> None:
        check_size(self.name, self.shape)

    @property
    def name(self: Any) -> str:
        return str(self.images[0].uri)

    @property
    def shape(self: Any) -> tuple[int, int, int]:
        return (len(self.images), *self.images[0].shape)


@dataclass(frozen=True, eq=False)
class TiffStack(_Files):
    """TIFF layers that can be read in parts."""

    images: tuple[TiffImage, ...]

    can_be_sampled = True
    decoding_bytes = scratch_bytes = 0.0

    @property
    def unit(self) -> tuple[int, int]:  # noqa: D102
        pieces = [image.layout.piece for image in self.images]
        return max(height for height, _ in pieces), max(width for _, width in pieces)

    @property
    def words(self) -> str:  # noqa: D102
        return " and ".join(dict.fromkeys(image.words for image in self.images))

    @property
    def can_be_cut(self) -> bool:
        """Whether a task can hold one piece of all layers; one-strip images may be too large."""
        height, width = self.unit
        is_small = self.shape[0] * height * width <= WHOLE_BYTES or height <= BLOCK_SIDE
        one_piece = any(image.offsets.size == 1 for image in self.images)
        return is_small or (self.images[0].layout.is_tiled and not one_piece)

    def cost(self, rows: slice, columns: slice) -> float:  # noqa: D102
        pieces = (image.counts[image.layout.pieces(rows, columns)] for image in self.images)
        return float(sum(counts.sum() for counts in pieces))

    def block(self, rows: slice, columns: slice) -> TiffBlock:  # noqa: D102
        return TiffBlock.of(self.images, rows, columns)

    def take(self, layers: slice) -> TiffStack:  # noqa: D102
        return TiffStack(self.images[layers])


@dataclass(frozen=True, eq=False)
class DecodedStack(_Files):
    """Layers that are decoded as a whole (`reading.images`); ``identity`` is their digest."""

    images: tuple[Image, ...]
    identity: str
    words: str

    can_be_sampled = False

    @property
    def unit(self) -> tuple[int, int]:  # noqa: D102
        return CHUNK, CHUNK

    @property
    def decoding_bytes(self) -> float:
        """Bytes in memory while layers are decoded side by side: values read, and uint8 copies."""
        layers, layer = len(self.images), decoded_bytes(self.images[0])
        return 2.0 * max(layer, min(DECODING_BYTES, layers * layer))

    @property
    def scratch_bytes(self) -> float:  # noqa: D102
        return float(math.prod(self.shape))

    def cost(self, rows: slice, columns: slice) -> float:
        """Bytes that reading those rows and columns fetches from the decoded copy."""
        return float(len(self.images) * whole_units(rows, columns, self.unit, self.shape))

    def block(self, rows: slice, columns: slice) -> DecodedBlock:  # noqa: D102
        return DecodedBlock(self.images, self.identity, rows, columns)

    def take(self, layers: slice) -> DecodedStack:  # noqa: D102
        return DecodedStack(self.images[layers], self.identity, self.words)


def check_size(name: str, shape: tuple[int, int, int]) -> None:
    """Check that a volume of layers, height and width has pixels, and not too many for a graph."""
    if 0 in shape:
        raise InkdaskError(f"{name} has no pixels.")
    if max(shape) > LONGEST or shape[1] * shape[2] > LARGEST:
        raise InkdaskError(
            f"{name} has {shape[0]:,} layers of {size(shape[1:])}, and at most "
            f"{LARGEST:,} a layer and {LONGEST:,} a side are read: name a coarser level or a part."
        )


def whole_units(
    rows: slice, columns: slice, unit: tuple[int, int], shape: tuple[int, int, int]
) -> int:
    """Pixels of one layer in all units that meet those rows and columns."""
    pixels = 1
    for span, step, side in zip((rows, columns), unit, shape[1:], strict=True):
        pixels *= min(-(-span.stop // step) * step, side) - span.start // step * step
    return pixels


def block_step(shape: tuple[int, int, int], unit: tuple[int, int]) -> tuple[int, int]:
    """Choose the height and width of a block.

    Parameters
    ----------
    shape
        Layers, height and width of the volume.
    unit
        Height and width of a piece that is read whole.

    Returns
    -------
    tuple of int
        The unit times powers of two, within `BLOCK_BYTES` over all layers and `BLOCK_SIDE`. Powers
        of two let blocks share their edges with chunks. Blocks may be twice as wide as tall,
        because the tiles of a row are neighbours in the file and one request.
    """
    layers, height, width = shape
    rows, columns = min(unit[0], height), min(unit[1], width)
    pixels = max(BLOCK_BYTES // layers, rows * columns)
    while True:
        taller = rows * 2 <= max(BLOCK_SIDE, unit[0]) and rows < height
        wider = columns <= BLOCK_SIDE and columns < width
        if 2 * rows * columns > pixels or not (taller or wider):
            return min(rows, height), min(columns, width)
        if wider and (columns <= rows or not taller):
            columns *= 2
        else:
            rows *= 2


def read_block(block: Block) -> np.ndarray:
    """Read a block, and raise what fails."""
    return block.read()


def lazy(
    source: Source,
    identity: str,
    box: Box | None = None,
    read: Reading = read_block,
    is_mask: bool = False,
) -> da.Array:
    """Make the dask array uint8 (z, y, x) of a source, or bool (y, x) of a mask; reads nothing.

    Parameters
    ----------
    source
        The files.
    identity
        Digest of the files, from which the names of the tasks follow.
    box
        Pixels to keep. Blocks at its border read no more than it needs.
    read
        What a task calls with its block.
    is_mask
        Whether the one layer of the source is a mask, False where it is 0.
    """
    rows, columns = (box or Box.at((0, 0), source.shape[1:])).slices
    step = block_step(source.shape, source.unit)
    bands, blocks = _cut(rows, step[0]), _cut(columns, step[1])
    if (count := len(bands) * len(blocks)) > MOST_BLOCKS:
        raise InkdaskError(
            f"{source.name} is read in {count:,} blocks, and at most {MOST_BLOCKS:,} can be: name "
            "fewer layers, a coarser level or a part (ROI_XYXY)."
        )
    name = f"read-{tokenize(identity, type(source).__name__, source.shape, rows, columns, read)}"
    graph: dict[Any, Any] = {}
    for (i, band), (j, span) in itertools.product(enumerate(bands), enumerate(blocks)):
        block = source.block(band, span)
        key = (name, i, j) if is_mask else (name, 0, i, j)
        graph[key] = (read, MaskBlock(block) if is_mask else block)
    layers = () if is_mask else ((source.shape[0],),)
    chunks = (*layers, *(tuple(s.stop - s.start for s in spans) for spans in (bands, blocks)))
    meta = np.empty((0,) * len(chunks), bool if is_mask else np.uint8)
    return da.Array(HighLevelGraph.from_collections(name, graph), name, chunks, meta=meta)


def _cut(span: slice, step: int) -> Sequence[slice]:
    """Cut a span of pixels at the multiples of ``step``."""
    inner = range(span.start - span.start % step + step, span.stop, step)
    edges = [span.start, *inner, span.stop]
    return [slice(a, b) for a, b in itertools.pairwise(edges)]
