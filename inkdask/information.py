"""Rows that describe what is at a path, for ``inkdask info`` and for notebooks."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from inkdask import catalogue, paces, provenance, storage
from inkdask.cautions import cautions, is_side, tell
from inkdask.costs import cost, of_models
from inkdask.errors import InkdaskError
from inkdask.identity import Origin, Provenance, Recipe
from inkdask.memory import expected_memory
from inkdask.models.registry import known, shaped
from inkdask.pictures import exporting
from inkdask.pictures.picture import is_picture
from inkdask.pictures.reading import Facts, is_picture_file, read_facts
from inkdask.plan import span
from inkdask.preflight import grid_bytes
from inkdask.progress import amount, size
from inkdask.reading.layers import ZARR_FILES, NoLayersError, held_in, list_names, missing_of
from inkdask.reading.tiff_header import read_stack
from inkdask.samples import sample
from inkdask.segment import Segment, open_segment
from inkdask.settings import Settings
from inkdask.specs import normalisation
from inkdask.storage.parallel import for_each
from inkdask.store import GridStore
from inkdask.tiling import CHUNK, Tiling

MOST_LISTED = 500  # folders that are looked into for segments
TILE, STRIDE, K = 64, 16, 4  # of the usual model, where the user gives none


Rows = dict[str, str | Sequence[str]]  # names, and what they say in one or more lines


def describe(path: str, **options: Any) -> Rows:
    """Describe what is at a path; reads headers, and a few pieces of a segment.

    Parameters
    ----------
    path
        A segment, a PNG, TIFF or JPEG, a stored picture or tile grid; a folder of segments, which
        are listed; or an id of the catalogue, of a segment (``SAMPLE/SEGMENT``) or of a scroll.
    **options
        ``layers``, ``volume``, ``catalogue``, ``ome_zarr_level``, ``mask_path``, ``model``,
        ``model_type``, ``tile``,
        ``stride`` and ``chunk_size`` of `inkdask.settings.Settings`.
    """
    settings = Settings.of(s3_path=path, **options)
    if catalogue.is_id(path) and "/" not in path:
        return dict(_of_sample(path, settings.catalogue))
    path = catalogue.locate(path, settings.catalogue)
    if is_picture(path) or (is_picture_file(path) and not _is_stack(path)):
        return dict(_of_picture(path, read_facts(path)))
    if GridStore.label(path):
        return dict(_of_grid(path))
    try:
        segment = open_segment(
            path,
            settings.layers,
            mask=settings.mask_path,
            level=settings.ome_zarr_level,
            volume=settings.volume,
            root=settings.catalogue,
            gaps=True,
        )
    except NoLayersError:
        if not (found := dict(_of_folder(path))):
            raise
        return dict(found)
    tile, stride, k = settings.tile or TILE, STRIDE, K
    kept, samples, spec = segment, sample(segment, share=1 / 8), None
    if settings.model:
        spec, k = shaped(settings.model, settings.tile, settings.model_type)
        tile, stride = spec.tile, spec.stride
        spare = 0 if settings.layers else max(len(segment.layers) - spec.layers, 0)
        kept = segment.take(slice(spare // 2, len(segment.layers) - spare + spare // 2))
    stride = settings.stride or stride
    tiling = Tiling.of(segment.shape[1:], tile, stride, settings.chunk_size or CHUNK)
    tell(cautions(kept, settings, samples, spec, tile if spec else None))
    rows: Rows = dict(of_segment(segment, tiling, samples.empty, k, settings.layers))
    share = 1 - (samples.empty or 0)
    if spec:
        rows["time"] = cost(tiling.tiles * share, paces.of_model(spec, tile))
    else:
        said = tuple(of_models(segment, share, settings.tile, settings.stride))
        rows["models"] = said or "none of `inkdask models` reads such layers"
    return rows


def _of_folder(path: str) -> Iterator[tuple[str, str]]:
    """Describe the segments in a folder; nothing where it holds none."""
    if storage.is_http(path):
        return
    names = [entry.name for entry in storage.list_folder(path) if entry.is_folder]
    looked = names[:MOST_LISTED]
    held = for_each(lambda name: _held_in(storage.join(path, name)), looked)
    found = [(name, what) for name, what in zip(looked, held, strict=True) if what]
    if found:
        yield "folder", path
        yield (
            "segments",
            f"{len(found)}" + f" in the first {MOST_LISTED:,} folders" * (len(names) > MOST_LISTED),
        )
    yield from found


def _held_in(uri: str) -> str:
    """Say what layers a folder holds; empty for none, and for pictures and tile grids."""
    with suppress(InkdaskError):  # one that cannot be read hides no other
        listing = list_names(uri)
        if {*ZARR_FILES} & {entry.name for entry in listing}:
            return "" if is_picture(uri) or GridStore.label(uri) else "zarr"
        return held_in(uri, listing)
    return ""


def _of_sample(sample: str, root: str | None) -> Iterator[tuple[str, str]]:
    """Describe the segments of a scroll, with their surface volumes."""
    for it in catalogue.find(sample, root):
        volumes = [
            uri.rsplit("/", 1)[-1] + (f" ({side:.4g} um{_fitting(side)})" if side else "")
            for uri, side in it.volumes.items()
        ]
        yield f"{it.sample}/{it.id}", ", ".join(volumes) or "no surface volumes"


def _fitting(side: float) -> str:
    """Name the models that were trained at this side of a pixel."""
    near = [spec.key for spec in known().values() if is_side(spec, side)]
    return f", as of {', '.join(near)}" if near else ""


def _is_stack(path: str) -> bool:
    """Whether a file is a TIFF of several layers."""
    with suppress(InkdaskError):
        entry = storage.entry(path)
        return len(read_stack(path, entry.size, entry.etag)) > 1
    return False


def of_segment(
    segment: Segment,
    tiling: Tiling,
    empty: float | None = None,
    k: int = K,
    asked: tuple[int, int] | None = None,
) -> Iterator[tuple[str, str]]:
    """Describe a segment and its tiles of k x k probabilities.

    ``empty`` is its share of zero pixels, where known; ``asked`` the range of layers that it was
    opened with.
    """
    depth, height, width = segment.shape
    yield "segment", segment.uri
    yield "layers", f"{depth} ({span(segment.layers)})"
    first, end = asked or (min(segment.layers), max(segment.layers) + 1)
    if lacking := missing_of({*segment.layers}, first, end):
        yield "missing", f"layers {lacking}, without which no job reads this range"
    yield "size", size((height, width))
    if side := segment.pixel_um:
        yield "pixels", f"{side:.4g} um{_fitting(side)}"
    yield "type", segment.dtype.name + (" (the high byte is read)" * (segment.dtype.itemsize == 2))
    yield "layout", segment.source.words
    if segment.stored_bytes:
        yield "stored", f"{amount(segment.stored_bytes)}, {amount(depth * height * width)} as uint8"
    if segment.mask_uri:
        yield "mask", segment.mask_uri
    tiles = f"{tiling.tiles:,} of {tiling.tile} px at stride {tiling.stride}"
    if empty is not None:
        yield "empty", f"about {empty:.0%} of the pixels, from a few samples"
        tiles += f", about {int(tiling.tiles * (1 - empty)):,} with data"
        tiles += ", fewer by what the mask leaves out" if segment.mask_source else ""
    yield "tiles", tiles
    down, across = tiling.block_shape
    step = size((tiling.y.step, tiling.x.step))
    yield "chunks", f"{across} x {down} of {step}"
    yield "memory", f"about {amount(expected_memory(segment.volume, tiling, k=k))} at most"
    yield "grid", f"about {amount(grid_bytes(tiling, k))}"


def _of_picture(path: str, facts: Facts) -> Iterator[tuple[str, str]]:
    """Describe a picture, and its provenance where it has one."""
    height, width = facts.shape
    yield "picture", path
    yield "type", facts.kind
    extent = size(facts.shape)
    if side := facts.pixel_um:
        extent += f" of {side:.3g} um: {width * side / 1e4:.3g} x {height * side / 1e4:.3g} cm"
    yield "size", extent
    told = facts.provenance
    if told is None:
        yield "origin", "not recorded in the file"
        return
    if told.shows == "spread":
        yield "shows", "spread of opinions, their standard deviation; 255 is 0.5"
    yield from _of_job(told.recipe, told.origin, told.ran_in, told)
    if told.export:
        yield (
            "export",
            _repeated(
                told.export, "export", exporting.OF_COMMANDS, "--to", provenance.absolute(path)
            ),
        )


def _of_grid(path: str) -> Iterator[tuple[str, str]]:
    """Describe a tile grid, and how much of it is done."""
    grid, label = GridStore.open(path)
    done = grid.chunks_done()
    yield "grid", path
    yield "done", f"{np.count_nonzero(done):,} of {done.size:,} chunks ({done.mean():.0%})"
    yield from _of_job(label.recipe, label.origin, grid.precisions())


def _of_job(
    recipe: Recipe, origin: Origin, ran_in: tuple[str, ...], picture: Provenance | None = None
) -> Iterator[tuple[str, str]]:
    """Describe the recipe and origin of a tile grid or a picture."""
    yield "segment", f"{origin.source} (input {recipe.input})"
    if origin.mask:
        yield "mask", origin.mask
    mean = f", means of {recipe.averaged}" if recipe.averaged > 1 else ""
    middle = "" if origin.offset is None else f", {origin.offset:+g} from the middle"
    middle = ", the middle" if origin.offset == 0 else middle
    yield "layers", f"{len(recipe.layers)} ({span(recipe.layers)}){mean}{middle}"
    if origin.roi_xyxy:
        yield "region", ",".join(map(str, origin.roi_xyxy)) + " (x0,y0,x1,y1)"
    place = f" from {origin.weights_from}" if origin.weights_from else ""
    yield "model", f"{recipe.model} ({recipe.architecture}){place}"
    yield "weights", f"sha256 {recipe.weights}"
    yield "voxels", normalisation(recipe.clip, recipe.divisor)
    tiles = f"{recipe.tile} px at stride {recipe.stride}"
    if picture:
        tiles += f" ({picture.window_um:.4g} um)" if picture.window_um else ""
        tiles += f", {picture.blend_mode} window"
        if picture.blend_mode == "gaussian":
            tiles += f" of sigma {picture.gaussian_sigma or recipe.tile / 2.5:g} px"
    yield "tiles", tiles
    yield "precision", recipe.precision + (f" ({' and '.join(ran_in)} ran)" if ran_in else "")
    for name in ("evidence", "sweeps"):
        if picture and (digests := getattr(picture, name)):
            yield name, ", ".join(digests)
    yield "software", ", ".join(f"{name} {v}" for name, v in origin.software.items())
    if picture:
        yield "made", picture.created
    repeat = "inkdask.run in Python: the model was a function, no checkpoint"
    if origin.command:
        repeat = _repeated(origin.command, "run", provenance.OF_COMMANDS)
    yield "repeat", repeat


def _repeated(words: Sequence[str], command: str, options: Sequence[str], *more: str) -> str:
    """Return the recorded command and ``more`` words, or say why it is not shown."""
    line = provenance.shell_line(words, command, options)
    foreign = "not shown: the command in the file is not one that inkdask records"
    return " ".join([line, *map(shlex.quote, more)]) if line else foreign
