"""The whole program as its list of steps: `predict` for a notebook, `run` for files."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dask.array as da
import numpy as np

from inkdask import engine, storage, view
from inkdask.blending import Window, blend
from inkdask.inference import infer
from inkdask.pictures import exporting
from inkdask.pictures.picture import open_picture
from inkdask.pictures.pyramid import to_uint8, write_pyramid
from inkdask.plan import Plan, Source
from inkdask.preflight import check_room
from inkdask.preparation import prepare
from inkdask.progress import Meter
from inkdask.provenance import fingerprint, provenance
from inkdask.settings import Settings
from inkdask.storage import outputs
from inkdask.store import ChunkReport, GridStore, save_chunk
from inkdask.summary import Summary
from inkdask.tiling import Tiling
from inkdask.types import InkdaskError, Network, SettingsError

log = logging.getLogger("inkdask")

_OF_PATHS = ("s3_path", "surface_volume_zarr", "mask_path")


@dataclass(frozen=True, eq=False)
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
    """

    map: da.Array
    grid: da.Array
    valid: da.Array
    plan: Plan
    blend_mode: Window = "hann"
    gaussian_sigma: float = 0.0

    @property
    def tiling(self) -> Tiling:
        """Where the tiles lie."""
        return self.plan.tiling

    @property
    def network(self) -> Network:
        """The network that they go through."""
        return self.plan.network

    def show(self, **options: Any) -> view.Viewer:
        """Look at it in Jupyter, over or beside the papyrus; see `inkdask.view.show_ink`."""
        return view.show_ink(self, **options)

    def _repr_html_(self) -> str:
        return view.ink_html(self)


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
    summary = Summary()
    plan, target = settle(settings)
    log.info("%s", plan)

    identity = fingerprint(plan)
    store = GridStore.of(settings.zarr_output_dir, plan.name, identity, plan.tiling, plan.network.k)
    if settings.step == "inference":
        check_weights(plan.network)
        store.create(identity, overwrite=settings.overwrite)
        fill(store, plan, summary, settings)
        if settings.num_parts > 1:  # the picture is for STEP=reduce, when all parts are there
            summary.say(store.uri)
            return store.uri
    check_complete(store, settings)

    ink = blend(
        store.grid(), store.valid(), plan.tiling, settings.blend_mode, settings.gaussian_sigma
    )
    write(ink[plan.window], target, provenance(identity, plan, settings), settings)
    uri = f"{target}.png"
    storage.write_bytes(settings.result_file, uri.encode())
    summary.say(uri)
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
    plan, target = settle(settings)
    log.info("%s", plan)
    check_weights(plan.network)
    return f"{target}.png"


def settle(settings: Settings) -> tuple[Plan, str]:
    """Settle what a job will do and where its outputs go, without their endings."""
    settings.require("s3_path", "model")
    if settings.add_scale_bar:
        settings.require("pixel_resolution_um")
    settings.export_devices()
    settings.export_token()
    plan = Plan.of(str(settings.s3_path), settings)
    target = output_stem(settings, plan)
    for place in (f"{target}.png", settings.result_file):
        outputs.check_writable(place)
    outputs.check_writable(storage.join(settings.zarr_output_dir, "grid"))
    check_room(plan, target, settings)
    return plan, target


def check_weights(network: Network) -> None:
    """Fail before anything is read when the weights are not those of the network."""
    if network.function is None:
        from inkdask.models import weights  # torch: a job needs it, an import of inkdask does not

        weights.load(network)


def fill(store: GridStore, plan: Plan, summary: Summary, settings: Settings) -> None:
    """Compute the chunks that a part still lacks, each written as soon as it is done."""
    tiles_run = store.tiles_run()
    mine = parts(store, settings) == settings.part_id
    summary.resume(tiles_run, mine, plan.tiling)
    missing = np.argwhere((tiles_run < 0) & mine)
    if not len(missing):
        return
    chunks = infer(plan.volume, plan.tiling, plan.network, plan.mask).chunks
    saved = da.map_blocks(
        save_chunk, chunks, store=store, meta=np.empty((0, 0), object), enforce_ndim=False
    )
    blocks = saved.to_delayed()
    # A chunk is thousands of tiles; those that run in this process are counted as they run.
    with Meter("ink", summary.missing, "tiles", peek=lambda: summary.progress) as meter:

        def on_report(report: ChunkReport) -> None:
            summary.add(report)
            meter.add(report.ran + report.empty)

        engine.compute_each([blocks[row, column] for row, column in missing], on_report)
    summary.inferring = meter.seconds


def parts(store: GridStore, settings: Settings) -> np.ndarray:
    """Which part each chunk belongs to, int (rows, columns): dealt out one by one."""
    chunks = store.tiling.block_shape
    return (np.arange(chunks[0] * chunks[1]) % settings.num_parts).reshape(chunks)


def check_complete(store: GridStore, settings: Settings) -> None:
    """Check that a stored grid lacks nothing: a picture never has holes.

    Raises
    ------
    InkdaskError
        Naming the missing parts.
    """
    there = storage.exists(storage.join(store.uri, "zarr.json"))
    missing = store.tiles_run() < 0 if there else np.ones(store.tiling.block_shape, bool)
    if missing.any():
        lacking = ", ".join(map(str, np.unique(parts(store, settings)[missing])))
        raise InkdaskError(
            f"{np.count_nonzero(missing)} of {missing.size} chunks are missing in {store.uri}: run "
            f"STEP=inference with NUM_PARTS={settings.num_parts} and PART_ID={lacking} first."
        )


def write(ink: da.Array, target: str, origin: dict[str, Any], settings: Settings) -> None:
    """Write the picture as ``<target>.zarr`` and ``<target>.png``, each whole or not at all."""
    left, top = (settings.roi_xyxy or (0, 0))[:2]
    picture = da.map_blocks(to_uint8, ink, dtype=np.uint8)
    write_pyramid(picture, f"{target}.zarr", origin, settings.pixel_resolution_um, (top, left))
    stored = open_picture(f"{target}.zarr")
    exporting.write(stored, f"{target}.png", exporting.Look(), settings)


def output_stem(settings: Settings, plan: Plan) -> str:
    """Where the outputs go, without their endings: ``.../prediction_<MODEL>_<START>_<END>``."""
    folder = settings.output_path or storage.join(str(settings.s3_path), "predictions")
    model = plan.network.model.key.replace("/", "_")
    start, end = settings.layers or (min(plan.layers), max(plan.layers) + 1)
    name = f"prediction_{model}_{start:02d}_{end:02d}"
    if settings.roi_xyxy:  # a part must not take the place of the whole
        name += "_{}-{}-{}-{}".format(*settings.roi_xyxy)
    return storage.join(folder, name)


def _given(**values: Any) -> dict[str, Any]:
    """The arguments that a caller gave, for `Settings.of`."""
    return {name: value for name, value in values.items() if value is not None}
