"""Metadata of picture files; pixels are not read."""

from __future__ import annotations

import json
from dataclasses import dataclass
from operator import index
from typing import Any, BinaryIO

import png
import tifffile
from PIL import Image

from inkdask import storage
from inkdask.errors import InkdaskError, reason
from inkdask.identity import Provenance
from inkdask.pictures.exporting import KINDS, kind_of
from inkdask.pictures.picture import open_picture, provenance_in
from inkdask.pictures.pyramid import ORIGIN

READ_AHEAD = 1 << 18  # bytes


@dataclass(frozen=True)
class Facts:
    """Metadata of a picture; ``pixel_um`` and ``provenance`` are None where the file has none.

    Attributes
    ----------
    kind
        Format in words.
    shape
        Height and width in pixels.
    pixel_um
        Side of a pixel in micrometers.
    provenance
        Recipe and origin of the picture.
    """

    kind: str
    shape: tuple[int, int]
    pixel_um: float | None
    provenance: Provenance | None


def is_picture_file(uri: str) -> bool:
    """Whether the name is that of a PNG, TIFF or JPEG."""
    return not uri.endswith(".zarr") and uri.lower().endswith(tuple(KINDS))


def read_facts(uri: str) -> Facts:
    """Read the metadata of a PNG, TIFF or JPEG, or of a stored picture."""
    if not is_picture_file(uri):
        return _of_zarr(uri)
    storage.entry(uri)  # because its error says that nothing is there
    fs, path = storage.filesystem(uri)
    read = {"png": _of_png, "tiff": _of_tiff, "jpeg": _of_jpeg}[kind_of(uri)]
    try:
        with fs.open(path, "rb", block_size=READ_AHEAD, cache_type="readahead") as file:
            return read(file, uri)
    except Exception as error:
        raise InkdaskError(f"{uri} cannot be read as a picture: {reason(error)}.") from error


def _of_zarr(uri: str) -> Facts:
    picture = open_picture(uri)
    count = len(picture.levels)
    kind = f"OME-Zarr, {count} level{'s' if count > 1 else ''}, uint8"
    return Facts(kind, picture.shape, picture.pixel_um, picture.provenance)


def _of_png(file: BinaryIO, uri: str) -> Facts:
    reader = png.Reader(file=file)
    provenance, pixel_um = None, None
    for name, data in reader.chunks():
        if name == b"IHDR":
            width, height = (int.from_bytes(data[at : at + 4]) for at in (0, 4))
            kind = f"PNG, {data[8]} bit, {'grey' if data[9] == 0 else 'colour'}"
        elif name == b"pHYs" and data[8] == 1:
            pixel_um = _micrometers(1e6, int.from_bytes(data[:4]))
        elif name == b"iTXt" and data.startswith(ORIGIN.encode() + b"\0"):
            provenance = _decoded(data.split(b"\0", 5)[-1], uri)
        elif name == b"IDAT":
            break
    return Facts(kind, (height, width), pixel_um, provenance)


def _of_tiff(file: BinaryIO, uri: str) -> Facts:
    with tifffile.TiffFile(file) as tiff:
        page: Any = tiff.pages.first
        centimetre = page.tags.valueof("ResolutionUnit") == tifffile.RESUNIT.CENTIMETER
        per_unit, parts = page.tags.valueof("XResolution") or (0, 1)
        kind = f"{'BigTIFF' if tiff.is_bigtiff else 'TIFF'}, {page.compression.name.lower()}"
        if page.is_tiled:
            kind += f", tiles of {page.tilewidth} x {page.tilelength} px"
        if smaller := page.subifds:
            kind += f", {1 + len(smaller)} levels"
        return Facts(
            kind,
            (index(page.imagelength), index(page.imagewidth)),
            _micrometers(1e4 if centimetre else 25400, per_unit / parts if per_unit > 1 else 0),
            _decoded(page.description, uri),
        )


def _of_jpeg(file: BinaryIO, uri: str) -> Facts:
    with Image.open(file) as image:
        width, height = image.size
        per_inch = image.info.get("dpi", (0, 0))[0]
        provenance = _decoded(image.info.get("comment", b""), uri)
        kind = f"JPEG, {'grey' if image.mode == 'L' else 'colour'}"
        return Facts(kind, (height, width), _micrometers(25400, per_inch), provenance)


def _micrometers(unit: float, per_unit: float) -> float | None:
    return unit / per_unit if per_unit else None


def _decoded(text: str | bytes, uri: str) -> Provenance | None:
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):  # of another program
        return None
    return provenance_in(fields, uri)
