"""Variants of a run of one region side by side: depth offset, direction, model, stride."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from itertools import product
from typing import Any

import dask.array as da
import numpy as np

from inkdask import catalogue, storage
from inkdask.box import Box, cut_region
from inkdask.clusters import connect
from inkdask.controls.contact import draw
from inkdask.controls.scores import Reading
from inkdask.controls.table import Sweep, Variant
from inkdask.controls.variants import fill_together, job_of
from inkdask.controls.windows import full_windows
from inkdask.demo.job import auc
from inkdask.environment import environment_kept
from inkdask.errors import SettingsError
from inkdask.identity import Region
from inkdask.job import is_variant, sweep_stem
from inkdask.pictures.picture import note, provenance_at
from inkdask.plan import Plan
from inkdask.progress import size
from inkdask.provenance import absolute
from inkdask.segment import Segment, home_of, open_labels, open_segment
from inkdask.settings import Settings, is_blank, with_parameters
from inkdask.specs import NO_MASK
from inkdask.storage import outputs
from inkdask.summary import Cost

log = logging.getLogger("inkdask")

OFFSETS = -16, -8, 0, 8, 16
STANDS_OUT = 1.5  # times the median of the others
SURE = 0.7  # least AUC of a suggestion
ALIKE = 2 / 255  # root mean square distance at which two strides show the same


@with_parameters
@environment_kept()
def sweep(
    s3_path: str | os.PathLike[str],
    model: Any = None,
    *,
    offsets: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
    labels: str | os.PathLike[str] | None = None,
    **options: Any,
) -> Sweep:
    """Run variants of a region as one graph that reads each column once, and compare them.

    Writes ``sweep.png``, a contact sheet, and ``sweep.json`` to ``output_path``; in a folder that
    is not the segment's own, ``sweep_<SEGMENT>.png`` and ``.json``. The grids are those of `run`
    with the same words, so a variant that was run before costs nothing.

    Parameters
    ----------
    s3_path
        The segment, an ``s3://`` URI or a local path.
    model
        A model, or a list of models.
    offsets
        Distances of the window from the middle of ``layers``, or of the segment, in layers.
        Default: those of -16, -8, 0, 8 and 16 for which the segment has layers.
    strides
        In pixels. Default: that of the model.
    labels
        Picture of the size of the segment that is not 0 where there is ink, for the AUC.
    **options
        Any parameter of `inkdask.settings.Settings`. Without ``direction``, both are run; without
        ``roi_xyxy``, a few windows that are full of papyrus.
    """
    models = list(model) if isinstance(model, list | tuple) else [model]
    given = {**options, "s3_path": s3_path}
    settings = Settings.of(**given, **({} if models[0] is None else {"model": models[0]}))
    settings.require("s3_path", "model")
    settings.export_devices()
    settings.export_token()
    models[0] = settings.model
    source = str(absolute(home_of(catalogue.locate(str(settings.s3_path), settings.catalogue))))
    given["s3_path"] = source
    place = settings.surface_volume_zarr or source
    whole = open_segment(place, mask=NO_MASK, level=settings.ome_zarr_level)
    stem = sweep_stem(settings.output_path, source)
    targets = [f"{stem}.png", f"{stem}.json"]
    with outputs.moved_by("OUTPUT_PATH"):
        outputs.check_writable(targets[0])
    outputs.sweep(others=targets)
    labels = None if is_blank(labels) else labels
    truth = None if labels is None else open_labels(os.fspath(labels), whole.shape[1:])
    windows = _windows(settings, whole)
    ways = _ways(given, settings, models, offsets, strides, whole)
    with connect(settings):
        variants = _run(source, ways, windows, truth)
    best, advice = suggestion(variants)
    result = Sweep(whole.uri, tuple(windows), tuple(variants), best, advice, *targets)
    draw(result, targets[0], settings.pixel_resolution_um)
    storage.write_bytes(targets[1], json.dumps(told := result.to_json(), indent=1).encode())
    _note(stem.rpartition("/")[0] or "/", told)
    return result


def _note(folder: str, told: dict[str, Any]) -> None:
    """Add the digest of a sweep to the pictures beside it that are among its variants."""
    for entry in storage.list_folder(folder):
        uri = storage.join(folder, entry.name)
        there = provenance_at(uri)
        if there and is_variant(told, there.recipe, there.origin):
            note(uri, "sweeps", told["digest"])


def _run(
    source: str,
    ways: Sequence[tuple[int, dict[str, Any]]],
    windows: Sequence[Region],
    truth: da.Array | None,
) -> list[Variant]:
    """Fill the grids of all variants and windows, and read the pictures."""
    jobs = [
        job_of(source, Settings.of(**{**way, "roi_xyxy": window}))
        for _, way in ways
        for window in windows
    ]
    costs, variants = fill_together(jobs), []
    for n, (offset, _) in enumerate(ways):
        some = slice(n * len(windows), (n + 1) * len(windows))
        readings = tuple(map(Reading.of, jobs[some]))
        cost = sum(costs[some], Cost())
        score = _auc(readings, windows, truth)
        variants.append(Variant(offset, tuple(jobs[some]), readings, cost, score))
    return variants


def _windows(settings: Settings, whole: Segment) -> list[Region]:
    """Return the region of the settings, or windows that are full of papyrus, and say which."""
    if settings.roi_xyxy:
        area = whole.shape[1:]
        there = f"the segment, which has {size(area)}"
        return [cut_region(settings.roi_xyxy, Box.at((0, 0), area), there).xyxy]
    windows = full_windows(whole)
    places = " and ".join(",".join(map(str, window)) for window in windows)
    log.info("no ROI_XYXY was given: windows that are full of papyrus are run, %s", places)
    return windows


def _ways(
    given: dict[str, Any],
    settings: Settings,
    models: Sequence[Any],
    offsets: Sequence[int] | None,
    strides: Sequence[int] | None,
    whole: Segment,
) -> list[tuple[int, dict[str, Any]]]:
    """Return offset and options of each variant, in the order of the table."""
    asked, ways = settings.layers, []
    is_one = settings.force_reverse or settings.direction in ("forward", "reverse")
    directions = [settings.is_reversed] if is_one else [False, True]
    unsaid = ("layers", "start_layer", "end_layer", "direction")
    for model in models:
        own = {**given, **dict.fromkeys(unsaid), "model": model}
        plan = Plan.of(str(given["s3_path"]), Settings.of(**own))
        depth = len(plan.layers)
        start = (sum(asked) - depth) // 2 if asked else min(plan.layers)
        there = range(min(whole.layers), max(whole.layers) - depth + 2)  # of first layers
        chosen = offsets or [o for o in OFFSETS if start + o in there] or [0]
        for offset in chosen:
            if start + offset not in there:
                raise SettingsError(
                    f"Offset {offset} needs layers {start + offset} to {start + offset + depth - 1}"
                    f", and {whole.uri} has {min(whole.layers)} to {max(whole.layers)}."
                )
        for turned, stride, offset in product(directions, strides or [plan.tiling.stride], chosen):
            layers = {"start_layer": start + offset, "end_layer": start + offset + depth}
            ways.append((offset, {**own, **layers, "stride": stride, "force_reverse": turned}))
    return ways


def _auc(
    readings: Sequence[Reading], windows: Sequence[Region], truth: da.Array | None
) -> float | None:
    """Compare pictures with labels; None without labels, or where all are alike."""
    if truth is None:
        return None
    seen = np.concatenate([it.grey[it.valid] for it in readings])
    parts = [np.asarray(truth[Box.of_xyxy(window).slices]) for window in windows]
    ink = np.concatenate([part[it.valid] for part, it in zip(parts, readings, strict=True)])
    return auc(seen, ink) if ink.any() and not ink.all() else None


def suggestion(variants: Sequence[Variant]) -> tuple[Variant | None, str]:
    """Return the variant to run, or None where nothing stands out; and a sentence on it."""
    scored = [variant for variant in variants if variant.auc is not None]
    if scored:
        best = max(scored, key=lambda it: it.auc or 0)
        reason = f"its AUC of {best.auc:.3f} is the best"
        if (best.auc or 0) < SURE:
            return None, f"Nothing stands out: the best AUC is {best.auc:.3f}."
    else:
        best = max(variants, key=lambda it: it.agreement)
        others = [it.agreement for it in variants if _place(it) != _place(best)]
        usual = float(np.median(others)) if others else 0.0
        words = f"agreement {best.agreement:.1f}, and {usual:.1f} is the median of the others"
        if not others or best.agreement < STANDS_OUT * usual or not best.agreement:
            return None, f"Nothing stands out ({words}): look at the contact sheet."
        reason = f"its opinions agree best ({words})"
    cheaper, more = _coarser(best, variants), ""
    if cheaper is not best:
        more = f"; stride {cheaper.recipe.stride} shows the same as stride {best.recipe.stride}"
    command = cheaper.command or f"inkdask.run in Python with {cheaper.name}"
    return (
        cheaper,
        f"Suggested, because {reason}{more}; look at the contact sheet first:\n{command}",
    )


def _place(it: Variant) -> tuple[int, str]:
    return it.offset, it.recipe.direction


def _coarser(best: Variant, variants: Sequence[Variant]) -> Variant:
    """Return the variant of the largest stride that shows the same."""
    fitting = [best]
    for it in variants:
        same = it.recipe.weights == best.recipe.weights and _place(it) == _place(best)
        if same and it.recipe.stride > best.recipe.stride:
            pairs = zip(it.readings, best.readings, strict=True)
            apart = [(a.grey.astype(float) - b.grey)[b.valid] for a, b in pairs]
            if np.sqrt(np.mean(np.concatenate(apart) ** 2)) / 255 <= ALIKE:
                fitting.append(it)
    return max(fitting, key=lambda it: it.recipe.stride)
