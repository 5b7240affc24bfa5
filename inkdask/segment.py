"""A segment: the layers of one unrolled piece of papyrus, found, checked, and described.

Opening one reads listings and headers only, and fails in seconds, in one sentence, on whatever
would fail a job hours later: a missing, doubled, odd-sized, odd-typed or truncated layer.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np

from inkdask import showing, storage
from inkdask.box import Box
from inkdask.errors import InkdaskError, SettingsError
from inkdask.reading import images, tiff_header
from inkdask.reading.layers import LayerFile, asked_for, check_unique, choose_layers, find_layers
from inkdask.reading.tiff import TiffImage
from inkdask.reading.volume import DecodedStack, Reading, Source, TiffStack, lazy, read_block
from inkdask.reading.zarr_volume import open_zarr
from inkdask.settings import layer_range
from inkdask.specs import NO_MASK
from inkdask.storage.parallel import for_each

log = logging.getLogger(__name__)

_ZARR_FILES = {"zarr.json", ".zarray", ".zgroup"}


@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """A segment whose headers have been read, and nothing else; picklable.

    Attributes
    ----------
    uri
        The path it was opened by.
    name
        The part of it that names the segment.
    layers
        Numbers of the layers, in the order in which they are read.
    dtype
        Type of the values on disk, uint8 or uint16; `volume` is always uint8.
    identity
        Digest of the layer files: where they are, sizes, ETags or times, and 4 KiB of each.
    source
        The files, and how they can be cut.
    stored_bytes
        Bytes of the layer files; 0 for zarr arrays, whose files would take long to list.
    mask_uri
        Picture that is non-zero where there is papyrus; None when there is none, and ``none`` when
        none was wanted.
    mask_source
        The same, and how it can be cut.
    mask_identity
        The same digest of the mask; None without one.
    box
        Pixels of the files that are kept; None for all (see `crop`).
    """

    uri: str
    name: str
    layers: tuple[int, ...]
    dtype: np.dtype[Any]
    identity: str
    source: Source
    stored_bytes: int
    mask_uri: str | None = None
    mask_source: Source | None = None
    mask_identity: str | None = None
    box: Box | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, height and width."""
        height, width = self.box.shape if self.box else self.source.shape[1:]
        return len(self.layers), height, width

    @property
    def window(self) -> tuple[slice, slice] | None:
        """The box as rows and columns."""
        return self.box.slices if self.box else None

    @property
    def volume(self) -> da.Array:
        """Layers as dask uint8 (z, y, x); chunks follow the files, and nothing is read."""
        return lazy(self.source, f"{self.identity} {self.layers}", self.box)

    @property
    def mask(self) -> da.Array | None:
        """Dask bool (y, x), True where there is papyrus; None without a mask."""
        return self.lazy()[1]

    def lazy(self, read: Reading = read_block) -> tuple[da.Array, da.Array | None]:
        """Return `volume` and `mask`, whose tasks call ``read`` with their `Block`."""
        volume = lazy(self.source, f"{self.identity} {self.layers}", self.box, read)
        if self.mask_source is None or self.mask_identity is None:
            return volume, None
        return volume, lazy(self.mask_source, self.mask_identity, self.box, read, is_mask=True)

    def take(self, layers: slice) -> Segment:
        """Keep some layers, in the order of the slice; the others are not read."""
        return replace(self, source=self.source.take(layers), layers=self.layers[layers])

    def crop(self, rows: slice, columns: slice) -> Segment:
        """Keep rows and columns, in pixels of what is kept already.

        Slices of `volume` read whole blocks; this reads only the pieces that meet the box.
        """
        whole, box = Box.at((0, 0), self.shape[1:]), Box.of(rows, columns)
        if box.is_empty or not whole.holds(box):
            raise InkdaskError(
                f"Rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop} do "
                f"not lie in {self.uri}, which has {whole.bottom} x {whole.right} pixels."
            )
        return replace(self, box=box.shift(*self.box.corner) if self.box else box)

    def __repr__(self) -> str:
        depth, height, width = self.shape
        return f"<Segment {self.uri}: {depth} layers of {height} x {width} {self.dtype}>"

    def show(self, **options: Any) -> Any:
        """Look at the layers in Jupyter: a `Viewer`; see `inkdask.view.show_segment`."""
        return showing.view.show_segment(self, **options)

    def _repr_html_(self) -> str:
        return showing.view.segment_html(self)


def open_segment(
    uri: str | os.PathLike[str],
    layers: tuple[int, int] | str | None = None,
    *,
    count: int | None = None,
    mask: str | os.PathLike[str] | None = None,
    level: str = "0",
) -> Segment:
    """Find the layers of a segment, and read their headers.

    Parameters
    ----------
    uri
        Local path or ``s3://`` URI: a folder with ``layers`` or ``surface_volume`` in it, a folder
        of layers itself (``<id>.tifs``), a zarr array, or an OME-Zarr group.
    layers
        First layer (inclusive) and last (exclusive), as the files are numbered; or ``"0:26"``.
    count
        Without ``layers``: as many layers, centred on the middle one. Default: all.
    mask
        Picture that is non-zero where there is papyrus, or ``none``. Default: ``<id>_mask.png``
        where the folder ``<id>`` has it.
    level
        Level of an OME-Zarr group.

    Raises
    ------
    InkdaskError
        When there are no layers, one is missing, there twice, unreadable or truncated, or differs
        from the others in size or type.
    """
    uri = os.fspath(uri)
    if layers is not None:
        try:
            layers = layer_range(layers)
        except ValueError as error:
            raise SettingsError(f"{error}.") from None
    listing = storage.list_folder(uri)
    name = name_of(uri)
    if _ZARR_FILES & {entry.name for entry in listing}:
        source, numbers, dtype, identity = _open_array(uri, layers, count, level)
        stored = 0
    else:
        if not listing:
            raise InkdaskError(f"No layers found in {uri}{asked_for(layers)}: {_what_is_at(uri)}.")
        folder, files = find_layers(uri, listing)
        check_unique(files, layers)
        files = files[choose_layers([file.number for file in files], folder, layers, count)]
        source, dtype, identity = _open_files(files)
        numbers = tuple(file.number for file in files)
        stored = sum(file.size for file in files)
    mask_uri = os.fspath(mask) if mask else _find_mask(uri, name, listing)
    segment = Segment(uri, name, numbers, dtype, identity, source, stored, mask_uri)
    if mask_uri and mask_uri != NO_MASK:
        mask_source = _open_mask(mask_uri, source.shape[1:])
        segment = replace(segment, mask_source=mask_source, mask_identity=mask_source.identity)
    log.debug("%s: layers %s are read, in this order", uri, " ".join(map(str, numbers)))
    return segment


@dataclass(frozen=True)
class Description:
    """What a person wants to know of a segment: what `Segment` says, and two more things.

    Attributes
    ----------
    layout
        How the files store the layers, in words.
    empty_share
        Share of zero pixels in the middle layer, estimated from a few blocks of it; None where
        nothing can be read without decoding whole layers.
    """

    uri: str
    name: str
    layers: tuple[int, ...]
    shape: tuple[int, int, int]
    dtype: str
    layout: str
    stored_bytes: int
    empty_share: float | None
    mask_uri: str | None


def describe(segment: Segment) -> Description:
    """Describe a segment; reads up to 16 pieces of its middle layer."""
    return Description(
        uri=segment.uri,
        name=segment.name,
        layers=segment.layers,
        shape=segment.shape,
        dtype=segment.dtype.name,
        layout=segment.source.words,
        stored_bytes=segment.stored_bytes,
        empty_share=_empty_share(segment.source),
        mask_uri=segment.mask_uri,
    )


def _empty_share(source: Source) -> float | None:
    if not source.can_be_sampled:
        return None
    layers, height, width = source.shape
    middle = source.take(slice(layers // 2, layers // 2 + 1))
    rows, columns = (
        min(unit, side) for unit, side in zip(source.unit, (height, width), strict=True)
    )
    windows = [
        (slice(y, y + rows), slice(x, x + columns))
        for y in _spread(height, rows, 16 if columns == width else 4)
        for x in _spread(width, columns, 4)
    ]
    return float(np.mean([(middle.block(*window).read() == 0).mean() for window in windows]))


def _spread(length: int, piece: int, most: int) -> list[int]:
    """Spread the starts of some pieces over a length, of at most every second piece."""
    count = max(1, min(most, length // piece // 2))
    return [(length - piece) * (2 * i + 1) // (2 * count) for i in range(count)]


def _open_array(
    uri: str, layers: tuple[int, int] | None, count: int | None, level: str
) -> tuple[Source, tuple[int, ...], np.dtype[Any], str]:
    """Open a zarr array, and choose its layers."""
    source = open_zarr(uri, level)
    numbers = source.numbers
    # The reference tool prepares an array (y, x, z) of just one range, and keeps no numbers.
    is_of_one_range = not (source.path or source.is_numbered) and source.depth == 2
    if layers and is_of_one_range and layers[1] - layers[0] == len(numbers):
        numbers = tuple(range(*layers))
    chosen = choose_layers(numbers, uri, layers, count)
    return source.take(chosen), numbers[chosen], source.dtype, source.identity


def _open_files(files: Sequence[LayerFile]) -> tuple[Source, np.dtype[Any], str]:
    """Read the headers of all layers, and check that they agree."""
    headers, traits = zip(*for_each(_open_file, files), strict=True)
    for image in headers:
        if isinstance(image, images.Picture) and image.is_palette:
            raise InkdaskError(f"{image.uri} has colours of a palette: save it in grey.")
    _check_alike(headers, "pixels", lambda image: f"{image.shape[1]} x {image.shape[0]}")
    _check_alike(headers, "values", lambda image: image.dtype.name)
    odd = [image for image in headers if image.oddity]
    if odd:
        log.warning("%s has %s (%d such layers)", odd[0].uri, odd[0].oddity, len(odd))
    identity = _digest(traits)
    tiffs = tuple(image for image in headers if isinstance(image, TiffImage))
    if len(tiffs) == len(headers) and TiffStack(tiffs).can_be_cut:
        return TiffStack(tiffs), tiffs[0].dtype, identity
    words = " and ".join(dict.fromkeys(image.words for image in headers))
    log.warning(
        "%s and its neighbours (%s) cannot be read in parts: each process decodes every layer once "
        "into a scratch zarr; `inkdask prepare` spares the next job that",
        files[0].uri,
        words,
    )
    return DecodedStack(tuple(headers), identity, words), headers[0].dtype, identity


def _open_file(file: LayerFile) -> tuple[TiffImage | images.Picture, tuple[Any, ...]]:
    """Read the header of a file, and what tells it from others."""
    read = tiff_header.read_header if file.is_tiff else images.read_header
    image = read(file.uri, file.size, file.etag)
    middle = storage.read_middle(file.uri, file.size, file.etag)
    return image, (storage.absolute(file.uri), file.size, file.mark, middle)


def _check_alike(headers: Sequence[Any], what: str, of: Callable[[Any], str]) -> None:
    """Check that all layers have the property; the odd one out is named, not the first."""
    usual = collections.Counter(map(of, headers)).most_common(1)[0][0]
    for image in headers:
        if of(image) != usual:
            raise InkdaskError(
                f"{image.uri} has {of(image)} {what}, the other layers have {usual}."
            )


def _what_is_at(uri: str) -> str:
    """What there is where nothing can be listed."""
    if not storage.exists(uri):
        return "it does not exist"
    return "it is a file" if not storage.entry(uri).is_folder else "it is empty"


def find_mask(uri: str) -> str | None:
    """Find the mask of the segment at ``uri``, or None."""
    return _find_mask(uri, name_of(uri), storage.list_folder(uri))


def _find_mask(uri: str, name: str, listing: Sequence[storage.Entry]) -> str | None:
    """Find the mask that lies in a segment; ``*_mask.png`` of other names say something else."""
    own = f"{name}_mask.png"
    return storage.join(uri, own) if own in {entry.name for entry in listing} else None


def _open_mask(uri: str, shape: tuple[int, ...]) -> DecodedStack:
    image, traits = _open_file(LayerFile.of(0, uri, storage.entry(uri)))
    if isinstance(image, images.Picture):
        image = replace(image, is_mask=True)
    elif image.dtype != np.uint8:  # its high bytes alone might all be zero
        raise InkdaskError(f"The mask {uri} has {image.dtype.name} values, and a TIFF needs uint8.")
    if image.shape != shape:
        raise InkdaskError(
            f"The mask {uri} has {image.shape[1]} x {image.shape[0]} pixels, "
            f"the layers have {shape[1]} x {shape[0]}; MASK_PATH=none reads them without a mask."
        )
    return DecodedStack((image,), _digest(traits), image.words)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def name_of(uri: str) -> str:
    """Name a segment after its folder: ``scroll5/20240301/layers/`` is ``20240301``."""
    path = storage.filesystem(uri)[1] if storage.is_local(uri) else uri  # "." has a name too
    parts = [part for part in path.split("/") if part not in ("", "layers", "surface_volume")]
    return parts[-1].removesuffix(".tifs").removesuffix(".zarr") if parts else "segment"
