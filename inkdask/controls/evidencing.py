"""A prediction and its controls: the same papyrus, read in ways in which no ink can be seen."""

from __future__ import annotations

import os
import shlex
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from inkdask import storage
from inkdask.clusters import connect
from inkdask.controls.page import Control, Page, write_page
from inkdask.controls.scores import Reading, agreement, contrast, reproduced
from inkdask.controls.variants import fill_together, job_of
from inkdask.environment import environment_kept
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import Provenance, Region, digest
from inkdask.job import Job, changed_input, place_of, shortened
from inkdask.pictures.overlay import laid_over, open_ground
from inkdask.pictures.picture import Picture, note, open_picture
from inkdask.plan import Plan, span
from inkdask.provenance import absolute, words_of
from inkdask.settings import Settings, is_blank
from inkdask.storage import outputs
from inkdask.store import GridStore

MOST, SIDE = 1_500_000, 1024  # pixels of a picture that is shown whole; side of a part


class _Way(NamedTuple):
    """A way to read the region again, or why there is none."""

    title: str
    note: str
    job: Job | None


@environment_kept()
def evidence(
    prediction: str | os.PathLike[str],
    *,
    model: Any = None,
    second_model: Any = None,
    second_stride: int | None = None,
    **options: Any,
) -> list[str]:
    """Make a page with a prediction, its papyrus, and its controls, as PNG and as HTML.

    Parameters
    ----------
    prediction
        The ``prediction_*.zarr`` of a job, local or ``s3://``.
    model
        The model, where it was a Python function.
    second_model, second_stride
        Another model, and another stride in pixels, to show beside it.
    **options
        ``roi_xyxy`` (default: the whole, or the part of a large picture with the most contrast),
        ``output_path`` (default: beside the prediction), and other `Settings` that change no tile.

    Returns
    -------
    The URIs of PNG and HTML.
    """
    second_model = None if is_blank(second_model) else second_model
    picture = open_picture(uri := os.fspath(prediction).rstrip("/"))
    told = _origin(picture)
    settings = _settings(told, uri, model, options)
    settings.export_devices()
    settings.export_token()
    _check_stride(second_stride)
    part = picture.crop(settings.roi_xyxy or _part_to_show(picture))
    region = part.box.xyxy
    stem = _stem(picture, str(told.origin.source), settings.output_path, part)
    with outputs.moved_by("OUTPUT_PATH"):
        outputs.check_writable(f"{stem}.png")
    base = {n: getattr(settings, n) for n in settings.model_fields_set} | {"roi_xyxy": region}
    own, ways = _own(told, settings, base), _ways(base, second_model, second_stride)
    with connect(settings):
        jobs = [way.job for way in ways if way.job]
        fill_together([*jobs, *([own] if own.plan else [])])
        ours, ink = Reading.of(own), np.asarray(part.levels[0])
        shown = tuple(_control(way, ink, ours.valid) for way in ways)
        ink_over = partial(laid_over, part.levels[0], open_ground(part, "mean"), 0)
        papyrus, on_papyrus = np.asarray(ink_over(0.0)), np.asarray(ink_over(0.85))
    page = Page(
        told.origin.segment, ink, ours.valid, papyrus, on_papyrus, ours.spread,
        agreement=agreement([ours]), contrast=contrast([Reading(ink, ours.spread, ours.valid)]),
        controls=shown,
        pixel_um=settings.pixel_resolution_um or picture.pixel_um,
        tile=told.recipe.tile,
        facts=_facts(told, region, uri),
        command=_command(uri, region, second_model, second_stride, settings),
        digest=digest([region, *(job.recipe.digest for job in jobs)]),
    )  # fmt: skip
    write_page(page, stem)
    note(uri, "evidence", page.digest)
    return [f"{stem}.png", f"{stem}.html"]


def _origin(picture: Picture) -> Provenance:
    """Return what a picture was made of, which must still be there."""
    uri, told = picture.uri, picture.provenance
    if told is None or told.shows != "ink" or told.origin.source is None:
        raise InkdaskError(f"{uri} does not say what segment and network its ink was made of.")
    if changed := changed_input(told.recipe, told.origin):
        raise InkdaskError(f"{uri} cannot be compared with what is there now: {changed}.")
    return told


def _settings(told: Provenance, uri: str, model: Any, options: dict[str, Any]) -> Settings:
    """Return the settings of the job that made a picture."""
    recipe, origin, words = told.recipe, told.origin, list(told.origin.command or ())
    said = {
        name: words[words.index(flag) + 1]
        for name, flag in (("model", "--model"), ("model_type", "--model-type"))
        if flag in words
    }
    said |= {} if model is None else {"model": model}
    if "model" not in said:
        raise InkdaskError(f"{uri} was made by a Python function: give it again, as model=.")
    return Settings.of(**options, **said, **{
        "s3_path": origin.source,
        "surface_volume_zarr": None if origin.volume == origin.source else origin.volume,
        "ome_zarr_level": origin.ome_zarr_level, "mask_path": origin.mask,
        **_between(*origin.layer_range), "model_in_chans": len(recipe.layers) // recipe.averaged,
        "force_reverse": recipe.direction == "reverse",
        "z_downsample_mean_factor": recipe.averaged, "clip": recipe.clip,
        "divisor": recipe.divisor, "precision": recipe.precision, "tile": recipe.tile,
        "stride": recipe.stride, "chunk_size": recipe.chunk[0], "blend_mode": told.blend_mode,
        "gaussian_sigma": told.gaussian_sigma,
    })  # fmt: skip


def _check_stride(second: int | None) -> None:
    try:
        Settings.of(stride=second)
    except SettingsError as error:
        raise SettingsError(f"SECOND_{error}") from None


def _own(told: Provenance, settings: Settings, base: dict[str, Any]) -> Job:
    """Return the job whose grid has the opinions: the picture's own where it is whole."""
    source = str(settings.s3_path)
    whole = job_of(source, Settings.of(**{**base, "roi_xyxy": told.origin.roi_xyxy}))
    if whole.recipe.weights != told.recipe.weights:
        raise InkdaskError(
            f"Model {told.recipe.model} has other weights now, of SHA-256 "
            f"{whole.recipe.weights[:12]}; the picture was made with {told.recipe.weights[:12]}."
        )
    if GridStore.label(whole.grid.uri) and whole.grid.chunks_done().all():
        return replace(whole, origin=replace(whole.origin, roi_xyxy=base["roi_xyxy"]), plan=None)
    return job_of(source, Settings.of(**base))


def _ways(base: dict[str, Any], second_model: Any, second_stride: int | None) -> list[_Way]:
    """Return the ways to read the region again."""
    source, plan = str(base["s3_path"]), Plan.of(str(base["s3_path"]), Settings.of(**base))

    def way(title: str, note: str, **change: Any) -> _Way:
        return _Way(title, note, job_of(source, Settings.of(**{**base, **change})))

    backwards = "forward" if plan.is_reversed else "from the last to the first"
    ways = [
        way("Layers reversed", f"read {backwards}", force_reverse=not plan.is_reversed),
        _off_the_sheet(plan, base),
        _shuffled(plan, base),
    ]
    if second_stride is not None:
        note = f"tiles every {second_stride} pixels, not {plan.tiling.stride}"
        ways.append(way(f"Stride {second_stride}", note, stride=second_stride))
    if second_model is not None:
        unsaid = ("model_type", "model_in_chans", "clip", "divisor", "precision", "tile", "stride")
        own = {**{k: v for k, v in base.items() if k not in unsaid}, "model": second_model}
        depth = len(Plan.of(source, Settings.of(**{**own, **_between(None, None)})).layers)
        start = max((min(plan.layers) + max(plan.layers) + 1 - depth) // 2, 0)
        job = job_of(source, Settings.of(**{**own, **_between(start, start + depth)}))
        note = f"{job.recipe.model}, layers {start}:{start + depth}"
        ways.append(_Way("Second model", note, job))
    return ways


def _between(start: int | None, end: int | None) -> dict[str, int | None]:
    return {"start_layer": start, "end_layer": end}


def _off_the_sheet(plan: Plan, base: dict[str, Any]) -> _Way:
    """Move the window by its own depth, or as far as there are layers."""
    there = plan.segment.found if plan.segment else plan.layers
    depth, first, last = len(plan.layers), min(plan.layers), max(plan.layers)
    down, up = min(first - min(there), depth), min(max(there) - last, depth)
    title, most = "Window off the sheet", up if up >= down else -down
    if not most:
        return _Way(title, "the segment has no layers beyond those of the window", None)
    layers = first + most, last + 1 + most
    note = f"moved by {most:+d} of {depth} layers, to {layers[0]}:{layers[1]}"
    moved = Settings.of(**{**base, **_between(*layers)})
    return _Way(title, note, job_of(str(base["s3_path"]), moved))


def _shuffled(plan: Plan, base: dict[str, Any]) -> _Way:
    """Put the layers into an order that has nothing of theirs; always the same order."""
    count = np.arange(len(plan.layers))
    orders = (np.random.default_rng(seed).permutation(count) for seed in range(64))
    order = min(orders, key=lambda it: abs(np.corrcoef(it, count)[0, 1]) if len(it) > 1 else 0)
    layers = tuple(plan.layers[number] for number in order)
    job = Job.of(replace(plan, layers=layers), Settings.of(**base))
    # No command makes it, so no run may find it.
    job = replace(job, folder=None, said=None, origin=replace(job.origin, command=None))
    return _Way("Layers shuffled", "the same layers in an order without meaning", job)


def _control(way: _Way, ink: NDArray[np.uint8], valid: NDArray[np.bool_]) -> Control:
    if way.job is None:
        return Control(way.title, way.note)
    it = Reading.of(way.job)
    both = valid & it.valid
    return Control(way.title, way.note, it.grey, reproduced(ink, it.grey, both), contrast([it]))


def _part_to_show(picture: Picture) -> Region:
    """Return all of a picture, or the part of a large one that has the most contrast."""
    height, width = picture.shape
    top, left = picture.corner
    if height * width <= MOST:
        return left, top, left + width, top + height
    level = 4
    coarse = np.asarray(picture.level(level)).astype(float)
    tall, wide = min(SIDE, height), min(SIDE, width)
    rows, columns = tall >> level, wide >> level
    seen = np.lib.stride_tricks.sliding_window_view(coarse, (rows, columns))[::4, ::4]
    y, x = np.unravel_index(seen.std(axis=(2, 3)).argmax(), seen.shape[:2])
    y, x = (int(at) * 4 << level for at in (y, x))
    y, x = min(y, height - tall), min(x, width - wide)
    return left + x, top + y, left + x + wide, top + y + tall


def _stem(picture: Picture, source: str, folder: str | None, shown: Picture) -> str:
    """Return where the page goes, without an ending: as `inkdask.job.output_stem` for pictures."""
    uri = picture.uri if "/" in picture.uri else f"./{picture.uri}"
    beside, name = uri.removesuffix(".zarr").rsplit("/", 1)
    place, segment = place_of(folder, source) if folder else (beside, "")
    words = name.removeprefix("prediction_")
    if segment and not words.startswith(f"{segment}_"):
        name = name.removesuffix(words) + shortened(f"{segment}_{words}")
    part = "" if shown.shape == picture.shape else "_{}-{}-{}-{}".format(*shown.box.xyxy)
    return storage.join(place, f"{name}_evidence{part}")


def _facts(told: Provenance, region: Region, uri: str) -> dict[str, str]:
    recipe = told.recipe
    return {
        "segment": str(told.origin.source),
        "region": ",".join(map(str, region)) + " (x0,y0,x1,y1)",
        "layers": f"{len(recipe.layers)} ({span(recipe.layers)})",
        "model": f"{recipe.model} ({recipe.architecture or 'function'}), sha256 {recipe.weights}",
        "tiles": f"{recipe.tile} pixels at stride {recipe.stride}, {told.blend_mode} window",
        "prediction": f"{absolute(uri)}, made {told.created}",
    }


def _command(uri: str, region: Region, model: Any, stride: int | None, settings: Settings) -> str:
    """Return the command that makes the page again."""
    said = {
        "roi_xyxy": region,
        "second_model": absolute(model) if isinstance(model, str) else None,
        "second_stride": stride,
        "pixel_resolution_um": settings.pixel_resolution_um,
    }
    return shlex.join(["inkdask", "evidence", absolute(uri), *words_of(said)])
