"""A segment: the layers of one unrolled piece of papyrus.

`open_segment` reads listings and headers only. It fails in seconds on what would fail a job after
hours: a missing, doubled or truncated layer, or one of another size or type.
"""

from __future__ import annotations

import collections
import hashlib
import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np

from inkdask import catalogue, showing, storage
from inkdask.box import Box
from inkdask.errors import InkdaskError, SettingsError
from inkdask.progress import size
from inkdask.reading import images, tiff_header
from inkdask.reading.layers import (
    ZARR_FILES,
    LayerFile,
    check_unique,
    choose_layers,
    find_layers,
    list_names,
    no_layers,
)
from inkdask.reading.tiff import TiffImage
from inkdask.reading.volume import DecodedStack, Reading, Source, TiffStack, lazy, read_block
from inkdask.reading.zarr_volume import open_zarr
from inkdask.settings import layer_range
from inkdask.specs import NO_MASK
from inkdask.storage.parallel import for_each
from inkdask.volumes import choose_volume, pixel_um_of

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, repr=False)
class Segment:
    """Segment whose headers have been read; picklable.

    Attributes
    ----------
    uri
        Path or URI that the segment was opened by.
    name
        Name of the segment's folder.
    layers
        Numbers of the layers, in reading order.
    dtype
        Type of the values on disk, uint8 or uint16; `volume` is always uint8.
    identity
        Digest of the layer files: their places, sizes, ETags or times, and 4 KiB of each.
    source
        Layer files, and how they can be cut.
    stored_bytes
        Bytes of the layer files; 0 for zarr arrays, because listing their files takes long.
    mask_uri
        Picture that is not 0 on papyrus; None without a mask, ``none`` when the user wanted none.
    mask_source
        File of the mask, and how it can be cut; None without a mask.
    mask_identity
        Digest of the mask, as `identity`; None without a mask.
    box
        Pixels of the files that are kept (see `crop`); None for all.
    level
        Level of an OME-Zarr group that was asked for.
    found
        Numbers of all layers that are there, ascending.
    pixel_um
        Side of a pixel in micrometers, where the catalogue, the name or the metadata tell it.
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
    level: str = "0"
    found: tuple[int, ...] = ()
    pixel_um: float | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Layers, height and width."""
        height, width = self.box.shape if self.box else self.source.shape[1:]
        return len(self.layers), height, width

    @property
    def offset(self) -> float:
        """Distance in layers from the middle of ``found`` to the middle of ``layers``."""
        return (min(self.layers) + max(self.layers) - self.found[0] - self.found[-1]) / 2

    @property
    def volume(self) -> da.Array:
        """Layers as dask uint8 (z, y, x), in chunks that follow the files."""
        return self.lazy()[0]

    @property
    def mask(self) -> da.Array | None:
        """Mask as dask bool (y, x), True on papyrus; None without a mask."""
        return self.lazy()[1]

    def lazy(self, read: Reading = read_block) -> tuple[da.Array, da.Array | None]:
        """Return `volume` and `mask`, whose tasks call ``read`` with their `Block`."""
        volume = lazy(self.source, f"{self.identity} {self.layers}", self.box, read)
        if self.mask_source is None or self.mask_identity is None:
            return volume, None
        return volume, lazy(self.mask_source, self.mask_identity, self.box, read, is_mask=True)

    def take(self, layers: slice) -> Segment:
        """Keep some layers, in the order of the slice."""
        return replace(self, source=self.source.take(layers), layers=self.layers[layers])

    def crop(self, rows: slice, columns: slice) -> Segment:
        """Keep rows and columns, counted in this segment's pixels.

        Reads less than a slice of `volume`, which reads whole blocks.
        """
        whole, box = Box.at((0, 0), self.shape[1:]), Box.of(rows, columns)
        if box.is_empty or not whole.holds(box):
            raise InkdaskError(
                f"Rows {rows.start} to {rows.stop}, columns {columns.start} to {columns.stop} do "
                f"not lie in {self.uri}, which has {size(whole.shape)}."
            )
        return replace(self, box=box.shift(*self.box.corner) if self.box else box)

    def __repr__(self) -> str:
        depth, *area = self.shape
        return f"<Segment {self.uri}: {depth} layers of {size(area)}, {self.dtype}>"

    def show(self, **options: Any) -> Any:
        """Show the layers in Jupyter, in a `Viewer`; see `inkdask.view.show_segment`."""
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
    volume: str | None = None,
    root: str | None = None,
    gaps: bool = False,
) -> Segment:
    """Find the layers of a segment, and read their headers.

    Parameters
    ----------
    uri
        Local path, ``s3://`` or ``https://`` URI: a folder that holds ``layers``,
        ``surface_volume`` or ``surface-volumes``, a folder of layers (``<id>.tifs``), a TIFF of all
        layers, a zarr array, or an OME-Zarr group. Or an id of the catalogue, ``SAMPLE/SEGMENT``.
    layers
        Numbers of the first layer (inclusive) and the last (exclusive), or ``"0:26"``.
    count
        Without ``layers``: number of layers around the middle. Default: all.
    mask
        Picture that is not 0 on papyrus, or ``none``. Default: ``<id>_mask.png`` or ``mask.png`` in
        the folder ``<id>``, where there is one.
    level
        Level of an OME-Zarr group.
    volume
        Surface volume of a published segment: its name, or the id of its scan.
    root
        Root of the catalogue. Default: ``INKDASK_CATALOGUE``, else the open bucket.
    gaps
        Whether layers between others may be missing.
    """
    # Absolute, because workers may run in another folder.
    uri = home_of(storage.absolute(catalogue.locate(os.fspath(uri), root)))
    layers = _range_of(layers)
    listing = list_names(uri)
    name = name_of(uri)
    mask_uri = os.fspath(mask) if mask else find_mask(uri, listing)
    if (chosen_uri := choose_volume(uri, listing, volume, root)) != uri:
        uri, listing = chosen_uri, list_names(chosen_uri)
    if {*ZARR_FILES} & {entry.name for entry in listing}:
        source, found, numbers, dtype, identity = _open_array(uri, layers, count, level, gaps)
        stored = 0
    else:
        source, found, numbers, dtype, identity, stored = _open_folder(
            uri, listing, layers, count, gaps
        )
    segment = Segment(
        uri, name, numbers, dtype, identity, source, stored, mask_uri,
        level=level, found=found, pixel_um=pixel_um_of(uri, source, root),
    )  # fmt: skip
    if mask_uri and mask_uri != NO_MASK:
        it = _open_mask(mask_uri, source.shape[1:])
        place = it.images[0].uri
        segment = replace(segment, mask_uri=place, mask_source=it, mask_identity=it.identity)
    log.debug("%s: layers %s are read, in this order", uri, " ".join(map(str, numbers)))
    return segment


def _range_of(layers: tuple[int, int] | str | None) -> tuple[int, int] | None:
    try:
        return None if layers is None else layer_range(layers)
    except ValueError as error:
        raise SettingsError(f"{error}.") from None


def identify(
    uri: str, layers: tuple[int, int], mask: str | None, level: str
) -> tuple[str, str | None]:
    """Return the identities that layers and mask have now, as `Segment` has them; opens no file."""
    listing = list_names(uri)
    if {*ZARR_FILES} & {entry.name for entry in listing}:
        with storage.decoded(uri):
            identity = open_zarr(uri, level).identity
    else:
        start, end = layers
        files = find_layers(uri, listing)[1]
        if len(files) > 1:  # else it may hold a stack of layers of other numbers
            files = [file for file in files if start <= file.number < end]
        if not files:
            raise no_layers(uri, uri, layers)
        identity = _digest(for_each(_traits, files))
    if mask is None or mask == NO_MASK:
        return identity, None
    return identity, _digest([_traits(LayerFile(0, mask, storage.entry(mask)))])


def _open_array(
    uri: str, layers: tuple[int, int] | None, count: int | None, level: str, gaps: bool
) -> tuple[Source, tuple[int, ...], tuple[int, ...], np.dtype[Any], str]:
    """Open a zarr array, and choose of all its layers."""
    with storage.decoded(uri):
        source = open_zarr(uri, level, range(*layers) if layers else range(count or 0))
    numbers = source.numbers
    if source.oddity:
        log.warning("%s has %s", source.name, source.oddity)
    if layers and source.may_be_one_range and layers[1] - layers[0] == len(numbers):
        numbers = tuple(range(*layers))
    chosen = choose_layers(numbers, uri, layers, count, gaps)
    return source.take(chosen), numbers, numbers[chosen], source.dtype, source.identity


def _open_folder(
    uri: str,
    listing: Sequence[storage.Entry],
    layers: tuple[int, int] | None,
    count: int | None,
    gaps: bool,
) -> tuple[Source, tuple[int, ...], tuple[int, ...], np.dtype[Any], str, int]:
    """Find layers in a folder or a stack, choose some of them, and read their headers."""
    folder, files = find_layers(uri, listing)
    check_unique(files, layers)
    only = files[0] if len(files) == 1 and files[0].is_tiff else None
    stack = tiff_header.read_stack(only.uri, only.entry.size, only.entry.etag) if only else []
    numbers = tuple(range(len(stack)) if len(stack) > 1 else (file.number for file in files))
    if not numbers or numbers[0] < 0:
        raise no_layers(uri, folder, layers)
    chosen = choose_layers(numbers, folder, layers, count, gaps)
    files = files if only else files[chosen]
    source, dtype, identity = _open_files(files, stack[chosen])
    stored = sum(file.entry.size for file in files)
    return source, numbers, numbers[chosen], dtype, identity, stored


def _open_files(
    files: Sequence[LayerFile], stack: Sequence[TiffImage]
) -> tuple[Source, np.dtype[Any], str]:
    """Read the headers of all layers but of a stack, whose are read, and check that they agree."""
    traits = for_each(_traits, files)
    headers: Sequence[Any] = stack or for_each(read_header, files)
    for image in headers:
        if isinstance(image, images.ImageFile) and image.is_palette:
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


def read_header(file: LayerFile) -> TiffImage | images.ImageFile:
    """Read the header of a layer in a file of its own."""
    read = tiff_header.read_header if file.is_tiff else images.read_header
    return read(file.uri, file.entry.size, file.entry.etag)


def _traits(file: LayerFile) -> tuple[Any, ...]:
    """Return what tells a file from others; an ETag is a digest, and spares the look inside."""
    middle = b"" if file.entry.etag else storage.read_middle(file.uri, file.entry.size)
    return storage.absolute(file.uri), file.entry.size, file.entry.mark, middle


def _check_alike(headers: Sequence[Any], what: str, of: Callable[[Any], str]) -> None:
    """Check that a property is the same in all layers; an error names the odd one out."""
    usual = collections.Counter(map(of, headers)).most_common(1)[0][0]
    for image in headers:
        if of(image) != usual:
            raise InkdaskError(
                f"{image.uri} has {of(image)} {what}, the other layers have {usual}."
            )


def find_mask(uri: str, listing: Sequence[storage.Entry] | None = None) -> str | None:
    """Return the mask in a segment, or None; other ``*_mask.png`` are no masks of papyrus."""
    there = {entry.name for entry in listing or list_names(uri)}
    own = [name for name in (f"{name_of(uri)}_mask.png", "mask.png") if name in there]
    return storage.join(uri, own[0]) if own else None


def open_labels(uri: str, shape: tuple[int, ...]) -> da.Array:
    """Open a picture of a segment's size, lazily: dask bool (y, x), True where it is not 0."""
    source = _open_mask(uri, shape, "picture of labels", "")
    return lazy(source, source.identity, is_mask=True)


def _open_mask(
    uri: str,
    shape: tuple[int, ...],
    what: str = "mask",
    advice: str = "; MASK_PATH=none reads them without a mask",
) -> DecodedStack:
    uri = storage.absolute(uri)  # because workers may run in another folder
    file = LayerFile(0, uri, storage.entry(uri))
    it = read_header(file)
    if "pages" in it.oddity:
        raise InkdaskError(f"The {what} {uri} has several pages: save one picture as one page.")
    image = images.ImageFile(uri, it.shape, it.dtype, it.channels, is_mask=True, etag=it.etag)
    if image.shape != shape:
        raise InkdaskError(
            f"The {what} {uri} has {image.shape[1]} x {image.shape[0]} pixels, "
            f"the layers have {shape[1]} x {shape[0]}{advice}."
        )
    return DecodedStack((image,), _digest([_traits(file)]), image.words)


def _digest(parts: Sequence[Any]) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def home_of(uri: str) -> str:
    """Return the segment whose folder of layers ``uri`` is; anything else as it is.

    The mask and the predictions are in the segment.
    """
    if uri.rstrip("/").rpartition("/")[2] not in ("layers", "surface_volume"):
        return uri
    folder, _, name = storage.absolute(uri).rpartition("/")
    try:
        listing = storage.list_folder(folder)
        is_own = find_layers(folder, listing)[0].endswith(f"/{name}")
    except InkdaskError:  # which may not be listed
        return uri
    is_zarr = {*ZARR_FILES} & {entry.name for entry in listing}
    is_segment = find_layers(uri, storage.list_folder(uri))[0] != uri
    return folder if is_own and not is_zarr and not is_segment else uri


def name_of(uri: str) -> str:
    """Name a segment by its folder: ``20240301`` for ``scroll5/20240301/layers/``."""
    path = storage.absolute(uri) if storage.is_local(uri) else uri  # resolves "."
    parts = [part for part in path.split("/") if part not in ("", "layers", "surface_volume")]
    return re.sub(r"\.(tifs?|tiff|zarr)$", "", parts[-1]) if parts else "segment"
