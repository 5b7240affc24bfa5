"""Files of a stored picture; the ending of a name says which kind."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import dask.array as da

from inkdask import storage
from inkdask.errors import SettingsError
from inkdask.pictures import jpeg
from inkdask.pictures.colour import colour_table, coloured
from inkdask.pictures.jpeg import write_jpeg
from inkdask.pictures.overlay import Flattening, Ground, laid_over, open_ground
from inkdask.pictures.picture import Picture, open_picture
from inkdask.pictures.png import write_png
from inkdask.pictures.pyramid import ORIGIN, write_pyramid
from inkdask.pictures.scale_bar import ScaleBar, with_scale_bar
from inkdask.pictures.tiff import Compression, write_tiff
from inkdask.provenance import absolute, without_secrets, words_of
from inkdask.settings import Settings
from inkdask.storage import outputs

Kind = Literal["png", "tiff", "jpeg", "zarr"]
KINDS: dict[str, Kind] = {
    ".png": "png",
    ".tif": "tiff",
    ".tiff": "tiff",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".zarr": "zarr",
}
OVERVIEW = 4096  # pixels: longer side of a JPEG, where ``max_side`` is not given


@dataclass(frozen=True)
class Look:
    """Look of an exported picture.

    Attributes
    ----------
    overlay
        Ground of the ink: maximum or mean of the layers; None shows the ink alone.
    segment
        Place of these layers. Default: where they were when the prediction was made.
    opacity
        Opacity of the strongest ink in an overlay, in [0, 1].
    colour_map
        Name of a colour map; None is grey, and black ink in an overlay.
    max_side
        Halve the picture until neither side has more pixels. Default: 4096 for JPEG.
    compression
        Compression of TIFF.
    reverse_video
        Show ink dark on light ground.
    scale_bar_um
        Length of a scale bar, in micrometers; None draws none.
    """

    overlay: Flattening | None = None
    segment: str | None = None
    opacity: float = 0.85
    colour_map: str | None = None
    max_side: int | None = None
    compression: Compression = "deflate"
    reverse_video: bool = False
    scale_bar_um: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("overlay", Flattening), ("compression", Compression)):
            value = getattr(self, name)
            if value is not None and value not in get_args(allowed):
                raise SettingsError(
                    f"{name} must be {' or '.join(get_args(allowed))}, but is {value!r}."
                )
        if not 0 <= self.opacity <= 1:
            raise SettingsError(f"opacity must be between 0 and 1, but is {self.opacity}.")
        if self.max_side is not None and self.max_side < 1:
            raise SettingsError(f"max_side must be 1 pixel or more, but is {self.max_side}.")
        if self.overlay and self.reverse_video:
            raise SettingsError(
                "REVERSE_VIDEO is for the ink alone: over papyrus it is dark as it is."
            )
        if self.colour_map:
            colour_table(self.colour_map)


def export(
    prediction: str | os.PathLike[str],
    to: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    *,
    overlay: Flattening | None = None,
    segment: str | None = None,
    opacity: float = 0.85,
    colour_map: str | None = None,
    max_side: int | None = None,
    compression: Compression = "deflate",
    **options: Any,
) -> list[str]:
    """Make pictures of a stored prediction, each whole or not at all; the network does not run.

    Parameters
    ----------
    prediction
        The ``prediction_*.zarr`` of a job, local or ``s3://``.
    to
        Files to write: ``.png``, ``.tif`` (tiled BigTIFF), ``.jpg`` (an overview), and ``.zarr``
        (an OME-Zarr pyramid of the ink alone).
    overlay, segment, opacity, colour_map, max_side, compression
        See `Look`.
    **options
        ``pixel_resolution_um`` (default: what the prediction says), ``reverse_video``,
        ``add_scale_bar``, ``scale_bar_length_um`` and ``roi_xyxy`` of
        `inkdask.settings.Settings`.

    Returns
    -------
    The URIs of the files.
    """
    settings = Settings.of(**options)
    look = Look(
        reverse_video=settings.reverse_video,
        scale_bar_um=settings.scale_bar_length_um if settings.add_scale_bar else None,
        overlay=overlay, segment=segment, opacity=opacity, colour_map=colour_map,
        max_side=max_side, compression=compression,
    )  # fmt: skip
    uri = os.fspath(prediction).rstrip("/")
    each = [to] if isinstance(to, str | os.PathLike) else to
    targets = [os.fspath(target).rstrip("/") for target in each]
    for target in targets:
        _check(target, look)
    picture = open_picture(uri)
    if settings.pixel_resolution_um:
        picture = replace(picture, pixel_um=settings.pixel_resolution_um)
    if settings.add_scale_bar and not picture.pixel_um:
        settings.require("pixel_resolution_um")
    if settings.roi_xyxy:
        picture = picture.crop(settings.roi_xyxy)
    ground = open_ground(picture, look.overlay, look.segment) if look.overlay else None
    if picture.provenance:
        told = without_secrets(picture.provenance)
        told = replace(told, export=_command(picture, look, settings))
        picture = replace(picture, provenance=told)
    outputs.sweep(*(it for it in targets if kind_of(it) == "zarr"), others=targets)
    for target in targets:
        write(picture, target, look, ground)
    return targets


def write(picture: Picture, target: str, look: Look, ground: Ground | None = None) -> None:
    """Write a picture to a file, whole or not at all; its name says the kind."""
    kind = kind_of(target)
    if kind == "zarr":  # all sizes; colours are left to the viewer
        write_pyramid(
            picture.levels[0], target, picture.provenance, picture.pixel_um, picture.corner
        )
        return
    level = _level(picture.shape, look.max_side or (OVERVIEW if kind == "jpeg" else None))
    pixel_um = picture.pixel_um and picture.pixel_um * 2**level
    canvas = render(picture, level, look, ground)
    said = "" if picture.provenance is None else json.dumps(picture.provenance.to_json())
    with storage.writing(target) as path:
        if kind == "png":
            write_png(canvas, path, {ORIGIN: said} if said else {}, pixel_um)
        elif kind == "tiff":
            write_tiff(canvas, path, said, pixel_um, look.compression)
        else:
            write_jpeg(canvas, path, said, pixel_um)


def render(picture: Picture, level: int, look: Look, ground: Ground | None) -> da.Array:
    """Return the pixels of a file: dask uint8 (y, x), or (y, x, 3) in colour."""
    canvas = picture.level(level)
    table = colour_table(look.colour_map) if look.colour_map else None
    if look.reverse_video:
        canvas = 255 - canvas
    if ground is not None:
        canvas = laid_over(canvas, ground, level, look.opacity, table)
    elif table is not None:
        canvas = coloured(canvas, table)
    if look.scale_bar_um and picture.pixel_um:
        bar = ScaleBar.of(canvas.shape, picture.pixel_um * 2**level, look.scale_bar_um)
        if look.reverse_video and canvas.ndim == 2:  # a dark bar on light ground
            canvas = 255 - with_scale_bar(255 - canvas, bar)
        else:
            canvas = with_scale_bar(canvas, bar)
    return canvas


def kind_of(target: str) -> Kind:
    """Return the kind of a file, by the ending of its name."""
    for ending, kind in KINDS.items():
        if target.lower().endswith(ending):
            return kind
    raise SettingsError(f"{target} must end in one of {', '.join(KINDS)}.")


def _check(target: str, look: Look) -> None:
    """Check a target, before the first file is written."""
    kind = kind_of(target)
    if kind == "zarr":
        if look.overlay or look.colour_map:
            raise SettingsError(
                f"{target} would be a pyramid, which holds the ink alone: overlay and colour map "
                "go with PNG, TIFF and JPEG."
            )
        if storage.exists(target):
            raise SettingsError(f"{target} is there already: remove it, or name another.")
    if kind == "jpeg" and (look.max_side or 0) > jpeg.LARGEST:
        raise SettingsError(
            f"A JPEG is an overview of at most {jpeg.LARGEST:,} pixels a side; PNG and TIFF have "
            "no such bound."
        )
    outputs.check_writable(target)


def _level(shape: tuple[int, int], max_side: int | None) -> int:
    """Count the halvings after which the longer side has at most ``max_side`` pixels."""
    level, longer = 0, max(shape)
    while max_side and longer > max_side:
        level, longer = level + 1, -(-longer // 2)
    return level


# Parameters of `Look`, and all that the command of an export may say.
_OF_LOOKS = [field.name for field in fields(Look) if field.name != "scale_bar_um"]
OF_COMMANDS = (
    *_OF_LOOKS, "add_scale_bar", "scale_bar_length_um", "pixel_resolution_um", "roi_xyxy"
)  # fmt: skip


def _command(picture: Picture, look: Look, settings: Settings) -> tuple[str, ...]:
    """Return the words of the command that exports the picture, without the file."""
    usual = Look()
    shown = {
        name: value for name in _OF_LOOKS if (value := getattr(look, name)) != getattr(usual, name)
    } | {
        "segment": without_secrets(absolute(look.segment)),
        "add_scale_bar": look.scale_bar_um is not None,
        "scale_bar_length_um": look.scale_bar_um,
        "pixel_resolution_um": settings.pixel_resolution_um,
        "roi_xyxy": settings.roi_xyxy and picture.box.xyxy,
    }
    return "inkdask", "export", without_secrets(absolute(picture.uri)), *words_of(shown)
