"""Find in seconds what would stop a job after hours: too little memory, too little disk.

The figures are estimates. Those of disks are low, because compression is not known in advance.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from inkdask import engine, records, storage
from inkdask.box import Box
from inkdask.cautions import off_pixel_size
from inkdask.errors import InkdaskError, SettingsError
from inkdask.job import Job, is_below
from inkdask.memory import expected_memory, memory_limit
from inkdask.pictures.picture import provenance_at
from inkdask.plan import Plan
from inkdask.progress import amount
from inkdask.provenance import absolute
from inkdask.reading.volume import Source
from inkdask.segment import Segment, identify, name_of
from inkdask.settings import Settings
from inkdask.storage import outputs
from inkdask.store import GridStore
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

PICTURE = 0.5  # bytes per pixel of the stored picture, and of the PNG; part of it is empty
CODE = 1.0  # bytes per probability of the tile grid; part of it is empty
COMPRESSED = 0.3  # share of the bytes of a volume


@dataclass(frozen=True)
class Need:
    """Bytes that a job writes below a place, and the variable that moves it elsewhere."""

    what: str
    variable: str
    place: str
    size: float


def check_places(job: Job, settings: Settings) -> None:
    """Check that a job, or one part of it, can write its outputs and has disk space for them."""
    variable = "ZARR_OUTPUT_DIR" if job.folder else "GRID"
    places = [("OUTPUT_PATH", f"{job.target}.png"), ("RESULT_FILE", settings.result_file)]
    places += [("REPORT", settings.report)] if settings.report else []
    places += [(variable, storage.join(job.grid.uri, "zarr.json"))]
    places += [(variable, storage.join(job.folder, records.FOLDER, "a"))] if job.folder else []
    for setting, file in places:
        with outputs.moved_by(setting):
            outputs.check_writable(file)
    missing = 1.0
    if not settings.overwrite and GridStore.label(job.grid.uri):
        with suppress(InkdaskError):  # another part is creating it, or `run` reports the error
            missing = float(np.mean(~job.grid.chunks_done()))
    size = missing * grid_bytes(job.grid.tiling, job.grid.k) / settings.num_parts
    needs = [Need("tile grid", variable, job.grid.uri, size)]
    if settings.num_parts == 1:
        needs += _picture(job.region, job.target)
    check_disks([*needs, *_scratch(job.plan.segment if job.plan else None)])


def check_replaced(job: Job) -> None:
    """Check that no picture of another segment would be replaced.

    One in the segment's own folder is replaced, because the segment may have been moved.
    """
    uri, source = f"{job.target}.zarr", str(job.origin.source)
    if is_below(uri, source):
        return
    there = provenance_at(uri)  # a damaged picture is replaced
    if there and there.origin.source != source:
        raise SettingsError(
            f"{uri} is the picture of {there.origin.source}, and that of {source} would replace "
            "it: set OUTPUT_PATH to another folder."
        )


def check_prepared(job: Job, replaces: bool) -> None:
    """Check that a prepared array holds the current layers of the job's segment.

    ``replaces`` is True where the picture goes to the segment itself.
    """
    segment = job.plan.segment if job.plan else None
    made_of = segment.source.made_of if segment else None
    place, source = job.origin.volume, job.origin.source
    if made_of is None or source is None or place == source:
        return
    origin = absolute(made_of.uri)
    is_inside = origin == source or origin.startswith(f"{source}/")  # a surface volume is
    if not is_inside and name_of(origin) != name_of(source) and replaces:
        raise SettingsError(
            f"SURFACE_VOLUME_ZARR {place} was prepared from {made_of.uri}, and the picture of "
            f"S3_PATH {source} would be replaced: set OUTPUT_PATH where that is right."
        )
    if not is_inside:
        return
    layers = min(made_of.layers), max(made_of.layers) + 1
    try:
        now, _ = identify(origin, layers, None, job.origin.ome_zarr_level)
    except InkdaskError as error:  # the layers may be gone, because an array can serve instead
        log.info("The layers of %s cannot be compared with %s: %s", source, place, error)
        return
    if now != made_of.identity:
        raise InkdaskError(
            f"SURFACE_VOLUME_ZARR {place} was prepared before the layers of {source} were changed: "
            "run inkdask prepare again, or leave it out."
        )


def check_pixels(plan: Plan, given: float | None) -> None:
    """Refuse pixels of another side, ``given`` or as the segment tells it, for a strict model."""
    found = given or (plan.segment.pixel_um if plan.segment else None)
    model = plan.network.model
    if "hecate" in model.architecture and (it := off_pixel_size(found, model)):
        raise SettingsError(
            f"{it.sentence.rpartition(',')[0]}, and refuses others: name a surface volume (VOLUME) "
            "or level (OME_ZARR_LEVEL) of that size, or set PIXEL_RESOLUTION_UM where the size is "
            "wrong."
        )


def check_room_for_picture(region: Box, target: str) -> None:
    """Check that the disks suffice for a picture at ``target``, a path without ending."""
    check_disks(_picture(region, target))


def check_room_to_prepare(segment: Segment, uri: str, compress: bool) -> None:
    """Check that the disk suffices for the prepared array of a segment at ``uri``."""
    size = float(np.prod(segment.shape, dtype=float)) * (COMPRESSED if compress else 1)
    place = Need("surface volume", "SURFACE_VOLUME_ZARR", uri, size)
    check_disks([place, *_scratch(segment)])


def check_memory(plan: Plan) -> None:
    """Check that each process of a job has the memory that the job is expected to take."""
    where, limit, threads, processes = _processes()

    def expected(tiling: Tiling) -> float:
        needed = expected_memory(plan.volume, tiling, threads, processes, plan.network.k)
        return needed + _decoding(plan.segment)

    needed, tiling = expected(plan.tiling), plan.tiling
    if not limit or needed <= limit:
        return
    least = Tiling.of(tiling.shape, tiling.tile, tiling.stride, chunk=1)
    advice = (
        "a smaller CHUNK_SIZE needs less"
        if expected(least) <= limit
        else "layers that are cut into tiles, or prepared by inkdask prepare, need less"
    )
    raise InkdaskError(
        f"The job needs about {amount(needed)} of memory in a process, and {where} has "
        f"{amount(limit)}: {advice}."
    )


def _processes() -> tuple[str, int, int | None, int]:
    """Return name, memory in bytes and threads of a process, and the number of processes."""
    client = engine.current_client()
    if client is None:
        return "this machine", memory_limit(), None, 1
    workers = client.scheduler_info(n_workers=-1)["workers"]
    limits = [worker["memory_limit"] for worker in workers.values() if worker["memory_limit"]]
    if not limits:  # no worker is there yet, or none has a limit
        return "a worker", 0, 1, 1
    threads = max(worker["nthreads"] for worker in workers.values())
    return "a worker", min(limits), threads, len(workers)


def _decoding(segment: Segment | None) -> float:
    """Bytes in memory while a mask, or a layer that is decoded whole, is decoded."""
    return max((source.decoding_bytes for source in _sources(segment)), default=0)


def _sources(segment: Segment | None) -> list[Source]:
    """Return the sources of layers and mask that a segment has."""
    found = (segment.source, segment.mask_source) if segment else ()
    return [source for source in found if source]


def grid_bytes(tiling: Tiling, k: int) -> float:
    """Bytes of a whole tile grid of k x k probabilities."""
    height, width = tiling.shape
    return CODE * tiling.tiles * k**2 + height * width / 16


def _picture(region: Box, target: str) -> list[Need]:
    height, width = region.shape
    size = PICTURE * height * width
    return [
        Need("picture", "OUTPUT_PATH", target, 2 * size),
        Need("PNG in the making", "TMPDIR", tempfile.gettempdir(), size),
    ]


def _scratch(segment: Segment | None) -> list[Need]:
    """Scratch space without a cluster; workers have folders of their own."""
    size = sum(source.scratch_bytes for source in _sources(segment)) * COMPRESSED
    if not size or engine.current_client():
        return []
    return [Need("decoded layers", "TMPDIR", tempfile.gettempdir(), size)]


def check_disks(needs: Iterable[Need]) -> None:
    """Check that each local disk has free space for the sum of its needs."""
    disks: dict[int, list[Need]] = defaultdict(list)
    for need in needs:
        if storage.is_local(need.place):
            disks[_existing(need.place).stat().st_dev].append(need)
    for together in disks.values():
        folder = _existing(together[0].place)
        free, size = shutil.disk_usage(folder).free, sum(need.size for need in together)
        if size > free:
            parts = ", ".join(
                f"{need.what} {amount(need.size)} ({need.variable})" for need in together
            )
            raise InkdaskError(
                f"The disk of {folder} has {amount(free)} free, and the job writes about "
                f"{amount(size)} there: {parts}."
            )


def _existing(place: str) -> Path:
    """Return the nearest existing folder at or above a place."""
    path = Path(storage.filesystem(place)[1])
    return next(folder for folder in [path, *path.parents] if folder.exists())
