"""The whole program as its list of steps: `predict` for a notebook, `run` for files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np
from dask import delayed
from dask.delayed import Delayed

from inkdask import engine, showing, storage
from inkdask.blending import Window, blend
from inkdask.clusters import connect, report
from inkdask.errors import InkdaskError, SettingsError
from inkdask.inference import infer, infer_chunk
from inkdask.parts import agreed_work, assign
from inkdask.plan import Plan, Source
from inkdask.preflight import check_memory, check_room
from inkdask.preparation import prepare
from inkdask.progress import Meter
from inkdask.provenance import fingerprint, origin_of
from inkdask.reduction import announce, output_stem, picture, preview, reduce
from inkdask.segment import name_of
from inkdask.settings import Settings
from inkdask.specs import Network, Passes
from inkdask.storage import outputs
from inkdask.store import ChunkReport, GridStore, save_chunk
from inkdask.summary import Summary
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

_OF_PATHS = ("s3_path", "surface_volume_zarr", "mask_path")


@dataclass(frozen=True)
class StoredJob:
    """A tile grid, what shapes it, and where it comes from (`inkdask.provenance`)."""

    store: GridStore
    fingerprint: Mapping[str, Any]
    origin: Mapping[str, Any]

    @classmethod
    def of(cls, plan: Plan, settings: Settings) -> StoredJob:
        """Where a job keeps its tile grid; nothing is written yet."""
        identity, place = fingerprint(plan), (plan.tiling, plan.network.k)
        if settings.grid:
            store = GridStore(settings.grid, *place)
        else:
            store = GridStore.of(settings.zarr_output_dir, plan.name, identity, *place)
        return cls(store, identity, origin_of(plan, settings))

    def create(self) -> None:
        """Make the grid's store where it is not there; see `GridStore.create`."""
        self.store.create(self.fingerprint, self.origin)


@dataclass(frozen=True, eq=False, repr=False)
class InkMap:
    """A lazy prediction: computing a part of it runs only the chunks that the part touches.

    Attributes
    ----------
    map
        Ink probability, dask float32 (y, x) in [0, 1]; 0 where all layers are zero.
    grid
        Tile probabilities, dask float32 (gy, gx, k, k); NaN where a tile is empty.
    valid
        Pixels that have data, dask bool (y, x).
    plan
        What it is made of: segment, layers, tiles and network.
    blend_mode, gaussian_sigma
        The window that weighs the pixels of a tile.
    progressive
        Whether the background goes from coarse to fine.
    job
        Where a progressive prediction is stored; None for one that is not.
    """

    map: da.Array
    grid: da.Array
    valid: da.Array
    plan: Plan
    blend_mode: Window = "hann"
    gaussian_sigma: float = 0.0
    progressive: bool = False
    job: StoredJob | None = None

    def start(self) -> None:
        """Compute all of it in the background; what is there so far is `so_far`.

        A progressive prediction goes from coarse to fine over the whole segment, and is stored: the
        next session, or `run` with the same words, goes on from it.
        """
        showing.view.background(self).start()

    def focus(self, y0: int, y1: int, x0: int, x1: int) -> None:
        """Compute a region of the picture before all else, in the background; in pixels."""
        showing.view.background(self).focus((slice(y0, y1), slice(x0, x1)))

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the background has nothing more to compute."""
        showing.view.background(self).wait(seconds)

    @property
    def so_far(self) -> da.Array:
        """The picture of all tiles that the background has run, dask float32 (y, x)."""
        so_far: da.Array = showing.view.background(self).so_far
        return so_far

    @property
    def tiling(self) -> Tiling:
        """Where the tiles lie."""
        return self.plan.tiling

    @property
    def network(self) -> Network:
        """The network that they go through."""
        return self.plan.network

    def __repr__(self) -> str:
        height, width = self.map.shape
        place = self.plan.segment.uri if self.plan.segment else "array"
        return f"<InkMap of {place}: {height} x {width}, model {self.network.model.key}>"

    def show(self, **options: Any) -> Any:
        """Look at it in Jupyter, over or beside the papyrus: a `Viewer`; see `view.show_ink`."""
        return showing.view.show_ink(self, **options)

    def _repr_html_(self) -> str:
        return showing.view.ink_html(self)


def predict(
    source: Source,
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

    Raises
    ------
    InkdaskError
        When the model or the segment cannot be used, in one sentence.
    """
    if not isinstance(source, str | os.PathLike):
        for name in {"layers", "start_layer", "end_layer", *_OF_PATHS} & options.keys():
            raise SettingsError(
                f"{name} goes with a path: {type(source).__name__} is open already."
            )
    settings = Settings.of(**options, **_given(model=model))
    settings.export_token()
    plan = Plan.of(source, settings)
    inferred = infer(plan.volume, plan.tiling, plan.network, plan.mask)
    ink = blend(
        inferred.grid, inferred.valid, plan.tiling, settings.blend_mode, settings.gaussian_sigma
    )
    return InkMap(
        ink[plan.window],
        inferred.grid,
        inferred.valid[plan.window],
        plan,
        settings.blend_mode,
        settings.gaussian_sigma,
        settings.progressive,
        # An array may change without a trace, so nothing that it gave is kept.
        StoredJob.of(plan, settings) if settings.progressive and plan.segment else None,
    )


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
    ``num_parts`` above 1 that of the stored grid, until ``step="reduce"`` makes the picture.

    Raises
    ------
    InkdaskError
        In one sentence; nothing is left under the final names.
    """
    settings = Settings.of(**options, **_given(s3_path=s3_path))
    if settings.step == "prepare":
        return prepare(s3_path, **options)
    alone = settings.num_parts == 1  # else STEP=reduce makes the picture of all parts
    if alone or settings.step == "reduce":
        outputs.remove_file(settings.result_file)  # of an earlier job
    if settings.step == "reduce":
        return reduce(settings)
    job = Job.of(settings)
    log.info("%s", job.plan)
    with connect(settings), report(settings.report):
        check_memory(job.plan)
        summary = Summary()
        job.stored.create()
        mine = share(job, settings)
        if settings.overwrite:
            job.store.forget(mine)
        summary.resume(job.store.passes_done(), mine, job.plan.tiling)
        passes = job.plan.tiling.passes
        for last in range(0 if settings.progressive else passes - 1, passes):
            fill(job.store, job.plan, mine, summary, last)
            if last < passes - 1 and alone:
                shown = preview(job.store, settings, job.stored.origin)
                log.info("pass %d of %d: %s", last + 1, passes, shown)
        uri = picture(job.store, settings, job.stored.origin) if alone else job.store.uri
        summary.say(uri)
    if alone:
        announce(uri, settings)
    return uri


def check(s3_path: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Find out whether a job can run, before anything expensive is started.

    Model and weights, layers and tiles are settled as `run` does, and the places for the outputs
    are tried; nothing is read but headers and weights, and nothing is left behind.

    Parameters
    ----------
    s3_path, **options
        As for `run`.

    Returns
    -------
    The URI that the PNG will have.

    Raises
    ------
    InkdaskError
        What `run` would fail with, in one sentence.
    """
    settings = Settings.of(**options, **_given(s3_path=s3_path))
    job = Job.of(settings)
    log.info("%s", job.plan)
    check_weights(job.plan.network)
    if settings.cluster == "threads":
        check_memory(job.plan)
    return f"{job.target}.png"


@dataclass(frozen=True)
class Job:
    """What `run` will do, settled and found possible before anything is computed.

    Attributes
    ----------
    plan
        Network, volume and tiles.
    stored
        Its tile grid.
    target
        Where the picture goes, without its endings.
    """

    plan: Plan
    stored: StoredJob
    target: str

    @property
    def store(self) -> GridStore:
        """Where the tile grid lies."""
        return self.stored.store

    @classmethod
    def of(cls, settings: Settings) -> Job:
        """Settle a job, and check that there is a place for all that it writes.

        Raises
        ------
        InkdaskError
            When something is missing or does not fit, in one sentence.
        """
        settings.require("s3_path", "model")
        if settings.add_scale_bar:
            settings.require("pixel_resolution_um")
        settings.export_devices()
        settings.export_token()
        plan = Plan.of(str(settings.s3_path), settings)
        check_prepared(plan, settings)
        stored = StoredJob.of(plan, settings)
        store = stored.store
        store.check_place(stored.fingerprint)
        target = output_stem(settings, stored.origin, plan.network.model.key)
        for file in (f"{target}.png", settings.result_file, storage.join(store.uri, "zarr.json")):
            outputs.check_writable(file)
        check_room(plan, store, target, settings)
        return cls(plan, stored, target)


def check_prepared(plan: Plan, settings: Settings) -> None:
    """Check that a prepared array is of the segment whose picture is to be made.

    Raises
    ------
    SettingsError
        When it is of another, and nobody has said where the picture goes.
    """
    made_of = getattr(plan.segment and plan.segment.source, "prepared_from", None)
    if made_of is None or settings.output_path or not settings.surface_volume_zarr:
        return
    if name_of(made_of) != name_of(str(settings.s3_path)):
        raise SettingsError(
            f"SURFACE_VOLUME_ZARR {settings.surface_volume_zarr} was prepared from {made_of}, and "
            f"the picture of S3_PATH {settings.s3_path} would be replaced: set OUTPUT_PATH where "
            "that is right."
        )


def check_weights(network: Network) -> None:
    """Fail before anything is read when the weights are not those of the network."""
    if network.function is None:
        from inkdask.models import weights  # torch: a job needs it, an import of inkdask does not

        weights.load(network)


def share(job: Job, settings: Settings) -> np.ndarray:
    """Chunks of the part of a job that the settings name, bool (rows, columns)."""
    if settings.num_parts == 1:
        return np.ones(job.plan.tiling.block_shape, bool)
    return assign(agreed_work(job.store, job.plan), settings.num_parts) == settings.part_id


def fill(store: GridStore, plan: Plan, mine: np.ndarray, summary: Summary, last: int) -> None:
    """Compute what some chunks lack up to a pass, each written as soon as it is done.

    Parameters
    ----------
    mine
        The chunks, bool (rows, columns).
    last
        The pass: tiles of later ones do not run.

    Raises
    ------
    InkdaskError
        When chunks failed for good; the others are done all the same.
    """
    passes = Passes(store.passes_done(), last)
    missing = np.argwhere((passes.done < last) & mine)
    if not len(missing):
        return
    check_weights(plan.network)
    tasks = _together(missing, plan, store, passes)
    again: list[Delayed] = []  # alone, after they failed together
    tiles = plan.tiling.tiles_until(last) - plan.tiling.tiles_there(passes.done)
    total = int(tiles[(passes.done < last) & mine].sum())
    before, finished = summary.progress, summary.finished
    # A chunk is thousands of tiles; those that run in this process are counted as they run.
    with Meter("ink", total, "tiles", peek=lambda: summary.progress - before) as meter:

        def on_report(chunk: ChunkReport) -> None:
            summary.add(chunk)
            meter.add(chunk.ran + chunk.empty)

        failed = engine.compute_each(tasks, on_report)
        if failed and summary.finished - finished + len(failed) == len(tasks):
            # What could not be read may be needed by some of them only.
            again = [
                _alone(row, column, plan, store, passes)
                for (row, column), task in zip(missing.tolist(), tasks, strict=True)
                if task.key in failed
            ]
            failed = engine.compute_each(again, on_report)
    summary.inferring += meter.seconds
    summary.lost += len(engine.lost_tasks({task.key for task in (*tasks, *again)}))
    if failed:
        summary.failed = len(tasks) - (summary.finished - finished)
        summary.say(store.uri)
        raise failure(failed, summary)


def _together(places: np.ndarray, plan: Plan, store: GridStore, passes: Passes) -> list[Delayed]:
    """One task for each of many chunks, which read together."""
    chunks = infer(plan.volume, plan.tiling, plan.network, plan.mask, passes).chunks
    saved = da.map_blocks(
        save_chunk,
        chunks,
        store=store,
        passes=passes,
        meta=np.empty((0, 0), object),
        enforce_ndim=False,
    ).to_delayed()
    return [saved[row, column] for row, column in places]


def _alone(row: int, column: int, plan: Plan, store: GridStore, passes: Passes) -> Delayed:
    """The task of one chunk, which reads nothing but what this chunk needs."""
    volume, mask = plan.cut(plan.tiling.y.reading(row), plan.tiling.x.reading(column))
    blocks = [array.to_delayed().item() for array in (volume, mask) if array is not None]
    if mask is not None:
        blocks[1] = blocks[1][None]
    place = {"passes": passes, "block_id": (row, column)}
    chunk = delayed(infer_chunk)(*blocks, tiling=plan.tiling, network=plan.network, **place)
    return delayed(save_chunk)(chunk, store, **place)


def failure(failed: Mapping[Any, Exception], summary: Summary) -> InkdaskError:
    """One sentence for the chunks that failed for good."""
    first = next(iter(failed.values()))
    for error in failed.values():
        log.debug("a chunk failed", exc_info=error)
    error = InkdaskError(
        f"{engine.reason(first)} ({summary.failed} of {summary.finished + summary.failed} chunks "
        "were not computed; the others are kept, and the same command resumes with the rest)."
    )
    error.__cause__ = first
    return error


def _given(**values: Any) -> dict[str, Any]:
    """The arguments that a caller gave, for `Settings.of`."""
    return {name: value for name, value in values.items() if value is not None}
