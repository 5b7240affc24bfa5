"""The whole program as its list of steps: `predict` for a notebook, `run` for files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from inkdask import catalogue, records, storage
from inkdask.blending import blend
from inkdask.cautions import Caution, cautions, cautions_of, tell
from inkdask.clusters import connect, report
from inkdask.costs import ready
from inkdask.environment import environment_kept
from inkdask.errors import SettingsError
from inkdask.filling import Work, check_weights, fill
from inkdask.inference import infer
from inkdask.inkmap import InkMap
from inkdask.job import Job, plan_of
from inkdask.parts import agreed_work, assign
from inkdask.plan import Given, Plan
from inkdask.preflight import (
    check_memory,
    check_pixels,
    check_places,
    check_prepared,
    check_replaced,
)
from inkdask.preparation import Preparation
from inkdask.reading.layers import list_names
from inkdask.reduction import picture, preview
from inkdask.samples import sample
from inkdask.segment import open_segment
from inkdask.settings import Settings, with_parameters
from inkdask.specs import NO_MASK
from inkdask.storage import outputs
from inkdask.summary import Summary
from inkdask.volumes import choose_volume

log = logging.getLogger("inkdask")

_OF_PATHS = ("s3_path", "surface_volume_zarr", "mask_path")


@with_parameters
@environment_kept()
def predict(
    source: Given,
    model: str | os.PathLike[str] | Callable[[Any], Any] | None = None,
    **options: Any,
) -> InkMap:
    """Predict ink lazily; nothing is read but the headers of the layers.

    Parameters
    ----------
    source
        A segment, its local path or ``s3://`` URI, or an array uint8 (z, y, x).
    model
        Model key, repo id, URI or path of a checkpoint, or any picklable callable
        ``(b, 1, z, t, t) float -> (b, 1, k, k) logits``.
    **options
        Any parameter of `inkdask.settings.Settings`, such as ``tile=64, stride=16``.
    """
    if not isinstance(source, str | os.PathLike):
        for name in {"layers", "start_layer", "end_layer", *_OF_PATHS} & options.keys():
            raise SettingsError(
                f"{name} goes with a path: {type(source).__name__} is open already."
            )
    settings = Settings.of(**options, **_given(model=model))
    if settings.direction == "both":
        raise SettingsError("DIRECTION=both is for files: predict each direction by itself.")
    settings.export_token()
    plan = Plan.of(source, settings)
    inferred = infer(plan.volume, plan.tiling, plan.network, plan.mask)
    window = settings.blend_mode, settings.gaussian_sigma, plan.family
    ink = blend(inferred.grid, inferred.valid, plan.tiling, *window)
    return InkMap(
        map=ink[plan.region.slices],
        grid=inferred.grid,
        reached=inferred.valid,
        plan=plan,
        blend_mode=settings.blend_mode,
        gaussian_sigma=settings.gaussian_sigma,
        progressive=settings.progressive,
        # An array may change without a trace, so nothing that it gave is kept.
        job=Job.of(plan, settings) if settings.progressive and plan.segment else None,
        pixel_um=settings.pixel_resolution_um,
    )


@with_parameters
@environment_kept()
def run(s3_path: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Do the whole job, from the layers to the picture in its place.

    Parameters
    ----------
    s3_path
        The segment, an ``s3://`` URI or a local path.
    **options
        Any parameter of `inkdask.settings.Settings`; what is not given comes from the
        environment.

    Returns
    -------
    The URI of the PNG; with ``step="prepare"`` that of the prepared array, and with
    ``num_parts`` above 1 that of the stored grid, until ``step="reduce"`` makes the picture. With
    ``direction="both"`` two URIs, each in a line.
    """
    settings = _settings(s3_path, options)
    if settings.step == "prepare":
        return prepare(s3_path, **options)
    if settings.step == "reduce":
        return reduce(s3_path, **options)
    is_whole = settings.num_parts == 1  # else STEP=reduce makes the picture of all parts
    if is_whole:
        with outputs.moved_by("RESULT_FILE"):
            outputs.remove_file(settings.result_file)  # of an earlier job
    jobs = [settle(way) for way in settings.each_way()]
    for job in jobs:
        log.info("%s", job.plan)
    tell(cautions_of(plan_of(jobs[0]), settings))
    sweep_places(jobs, settings)
    if settings.overwrite and is_whole:
        jobs = [job.restarted() for job in jobs]
    with connect(settings), report(settings.report):
        check_memory(plan_of(jobs[0]))
        summary = Summary()
        for job in jobs:
            job.create()
        shares = [share(job, settings) for job in jobs]
        uri, ink = compute(shares, summary, settings)
        summary.say("; ".join(job.grid.uri for job, _ in shares), ink)
    if is_whole:
        storage.write_bytes(settings.result_file, os.fsencode(uri))  # last of all
    return uri


def compute(
    shares: Sequence[tuple[Job, np.ndarray]], summary: Summary, settings: Settings
) -> tuple[str, str]:
    """Fill the grids of jobs of one tiling pass by pass; make their pictures where they are whole.

    Returns the URIs of the pictures, or of the grids, each in a line; and the ink of the pictures.
    """
    jobs, is_whole = [job for job, _ in shares], settings.num_parts == 1
    passes = jobs[0].grid.tiling.passes
    for job, mine in shares:
        summary.resume(job.grid.passes_done(), mine, job.grid.tiling)
    for last in range(0 if settings.progressive else passes - 1, passes):
        fill([Work.of(job.grid, plan_of(job), mine, last) for job, mine in shares], summary)
        if last < passes - 1 and is_whole:
            for job in jobs:
                log.info("pass %d of %d: %s", last + 1, passes, preview(job))
    for job in jobs:
        job.check_unchanged()
    if not is_whole:
        return "\n".join(job.grid.uri for job in jobs), ""
    uris, inks = zip(*(picture(job, num_parts=1) for job in jobs), strict=True)
    return "\n".join(uris), "; ".join(inks)


@with_parameters
@environment_kept()
def reduce(s3_path: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Make the picture of a stored grid, and return its URI.

    The grid is the one that ``grid`` names, or that of the job under ``zarr_output_dir`` that
    agrees with all that is given. No weights, no GPU and no layers are needed.

    Parameters
    ----------
    s3_path, **options
        As for `run`.
    """
    settings = _settings(s3_path, options)
    with outputs.moved_by("RESULT_FILE"):
        outputs.remove_file(settings.result_file)
        outputs.check_writable(settings.result_file)
    if settings.volume and (place := settings.s3_path):
        volume = choose_volume(place, list_names(place), settings.volume, settings.catalogue)
        settings = settings.model_copy(update={"surface_volume_zarr": volume})
    jobs = [Job.found(way) for way in settings.each_way()]
    for job in jobs:
        check_replaced(job)
    sweep_places(jobs, settings)
    with connect(settings), report(settings.report):
        uris, inks = zip(*(picture(job, settings.num_parts) for job in jobs), strict=True)
        log.info("ink: %s", "; ".join(inks))
    uri = "\n".join(uris)
    storage.write_bytes(settings.result_file, os.fsencode(uri))
    return uri


@with_parameters
def check(s3_path: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Find out whether a job can run, before anything expensive is started.

    Model and weights, layers and tiles are settled as `run` does, and the places for the outputs
    are tried; nothing is read but headers, weights and a few samples, and nothing is left behind.

    Parameters
    ----------
    s3_path, **options
        As for `run`.

    Returns
    -------
    The URI that the PNG will have.
    """
    jobs, _ = examine(s3_path, **options)
    return "\n".join(f"{job.target}.png" for job in jobs)


@environment_kept()
def examine(
    s3_path: str | os.PathLike[str] | None = None, **options: Any
) -> tuple[list[Job], list[Caution]]:
    """Do what `check` does, and return the jobs that `run` would do, and the warnings."""
    settings = _settings(s3_path, options)
    jobs = [settle(way) for way in settings.each_way()]
    for job in jobs:
        log.info("%s", job.plan)
    found = cautions_of(plan_of(jobs[0]), settings)
    tell(found)
    check_weights(plan_of(jobs[0]).network)
    if settings.cluster == "threads":
        check_memory(plan_of(jobs[0]))
    log.info("ready: %s", ready(jobs, settings.overwrite))
    return jobs, found


@with_parameters
@environment_kept()
def prepare(s3_path: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Write the layers of a segment to a zarr array, and return its URI.

    What is done is kept when it is stopped, and the same call resumes.

    Parameters
    ----------
    s3_path
        The segment, an ``s3://`` URI or a local path.
    **options
        Of `inkdask.settings.Settings`: ``layers`` (default: all), ``z_downsample_mean_factor``,
        ``ome_zarr_level``, ``volume``, ``surface_volume_zarr`` (where the array goes; default: in
        ``zarr_output_dir``), ``use_zarr_compression``, ``overwrite``.
    """
    settings = _settings(s3_path, options)
    settings.require("s3_path")
    segment = open_segment(
        str(settings.s3_path),
        settings.layers,
        mask=NO_MASK,
        level=settings.ome_zarr_level,
        volume=settings.volume,
        root=settings.catalogue,
    )
    array = Preparation.of(segment, settings)
    said = cautions(array.segment, settings, sample(array.segment))
    tell(it for it in said if it.kind != "direction")  # the array has it as the layers have it
    outputs.sweep(others=[array.uri])
    array.begin(settings.overwrite)
    if array.is_finished:
        log.info("%s is there already, made of the same files", array.uri)
    else:
        array.fill()
    return array.uri


def settle(settings: Settings) -> Job:
    """Settle what `run` will do, and check that there is a place for all that it writes."""
    settings.require("s3_path", "model")
    settings.export_devices()
    settings.export_token()
    plan = Plan.of(str(settings.s3_path), settings)
    job = Job.of(plan, settings)
    check_prepared(job, replaces=settings.output_path is None)
    check_replaced(job)
    check_pixels(plan, settings.pixel_resolution_um)
    job.grid.check_place(job.recipe)
    check_places(job, settings)
    return job


def sweep_places(jobs: Sequence[Job], settings: Settings) -> None:
    """Remove what killed processes left where jobs are to write."""
    others = {settings.result_file, settings.report or settings.result_file}
    others |= {job.grid.uri for job in jobs}
    others |= {storage.join(job.folder, records.FOLDER) for job in jobs if job.folder}
    outputs.sweep(*(job.target for job in jobs), others=others)


def share(job: Job, settings: Settings) -> tuple[Job, np.ndarray]:
    """Return the chunks of the part that the settings name, bool (rows, columns).

    A part that is to start anew begins a generation where it has chunks in this one; a part that
    has none yet joins the generation that another part has begun.
    """
    plan = plan_of(job)
    if settings.num_parts == 1:
        return job, np.ones(plan.tiling.block_shape, bool)

    def mine(job: Job) -> np.ndarray:
        return assign(agreed_work(job.grid, plan), settings.num_parts) == settings.part_id

    chunks = mine(job)
    if settings.overwrite and job.grid.has_any(chunks):
        job = job.restarted()
        job.create()
        chunks = mine(job)
    return job, chunks


def _settings(s3_path: str | os.PathLike[str] | None, options: dict[str, Any]) -> Settings:
    """Return the settings of a job, with the URI of its segment where an id was given."""
    settings = Settings.of(**options, **_given(s3_path=s3_path))
    if settings.s3_path is None:
        return settings
    uri = catalogue.locate(settings.s3_path, settings.catalogue)
    return settings.model_copy(update={"s3_path": uri})


def _given(**values: Any) -> dict[str, Any]:
    """The arguments that a caller gave, for `Settings.of`."""
    return {name: value for name, value in values.items() if value is not None}
