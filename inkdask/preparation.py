"""The layers of a segment as one zarr array: what many jobs read, or what cannot be cut.

A zarr 3 array uint8 (z, y, x): one object for each block of about 1,024 pixels a side (a shard),
in chunks of 128 pixels a side that can be read alone. It is written block by block, so memory does
not grow with the segment; a stopped run resumes; and until the last block is there, the array says
of itself that it is not finished, and nothing reads it.
"""

from __future__ import annotations

import logging
import os
from typing import Any

import dask.array as da
import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from inkdask import engine, storage
from inkdask.errors import InkdaskError
from inkdask.halo import with_halo
from inkdask.identity import digest
from inkdask.preflight import check_room_to_prepare
from inkdask.progress import Meter
from inkdask.reading.zarr_volume import (
    FINISHED_ATTRIBUTE,
    LAYERS_ATTRIBUTE,
    OCCUPIED_ATTRIBUTE,
    PREPARED_ATTRIBUTE,
)
from inkdask.segment import Segment, open_segment
from inkdask.settings import Settings
from inkdask.specs import NO_MASK
from inkdask.storage import outputs
from inkdask.store import restarted
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

SHARD, CHUNK = 1024, 128  # pixels a side


def prepare(s3_path: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """Write the layers of a segment to a zarr array, and return its URI.

    Parameters
    ----------
    s3_path
        The segment, an ``s3://`` URI or a local path.
    **options
        Of `inkdask.settings.Settings`: ``layers`` (default: all), ``surface_volume_zarr`` (where
        the array goes; default: in ``zarr_output_dir``), ``use_zarr_compression``, ``overwrite``.

    Raises
    ------
    InkdaskError
        In one sentence; what is done is kept, and the same call resumes.
    """
    given = options if s3_path is None else {**options, "s3_path": os.fspath(s3_path)}
    settings = Settings.of(**given)
    settings.require("s3_path")
    segment = open_segment(
        str(settings.s3_path), settings.layers, mask=NO_MASK, level=settings.ome_zarr_level
    )
    first, last = min(segment.layers), max(segment.layers)
    name = f"{segment.name}-{first:02d}-{last + 1:02d}-{segment.identity}.volume.zarr"
    uri = settings.surface_volume_zarr or storage.join(settings.zarr_output_dir, name)
    outputs.check_writable(storage.join(uri, "zarr.json"))

    # Tiles of one chunk without overlap: the blocks are whole shards, and there is no halo.
    blocks = Tiling.of(segment.shape[1:], tile=CHUNK, stride=CHUNK, chunk=SHARD)
    done = f"{uri}.done"
    source = _source(segment, settings.use_zarr_compression)
    if not _is_begun(uri, source, settings.overwrite) or settings.overwrite:
        check_room_to_prepare(segment, uri, settings.use_zarr_compression)
        restarted.append(uri)
        _begin(uri, done, segment, blocks, source)
    if storage.zarr_array(uri).attrs[FINISHED_ATTRIBUTE]:
        log.info("%s is there already, made of the same files", uri)
    else:
        _fill(uri, done, segment, blocks, version=digest(source))
        share = _shares(done, digest(source)).round(4).tolist()
        with storage.explained(uri):
            zarr.open_array(storage.zarr_store(uri), mode="r+").attrs.update(
                {
                    OCCUPIED_ATTRIBUTE: {"side": blocks.y.step, "share": share},
                    FINISHED_ATTRIBUTE: True,
                }
            )
        outputs.remove(done)
    return uri


def _is_begun(uri: str, source: dict[str, Any], overwrite: bool) -> bool:
    """Whether the array is there, made of the same files in the same way.

    An array that inkdask did not prepare is never touched; one of another segment only when that
    is asked for.
    """
    if not storage.exists(uri):
        return False
    with storage.explained(uri):
        try:
            attributes = zarr.open_array(storage.zarr_store(uri), mode="r").attrs.asdict()
        except (ValueError, TypeError, KeyError, FileNotFoundError):  # no zarr array
            attributes = {}
    if not {FINISHED_ATTRIBUTE, LAYERS_ATTRIBUTE, PREPARED_ATTRIBUTE} <= attributes.keys():
        raise InkdaskError(f"{uri} is there, and it is no array that inkdask prepared.")
    there: Any = attributes[PREPARED_ATTRIBUTE]
    if there != source and not overwrite and there.get("uri") != source["uri"]:
        raise InkdaskError(
            f"{uri} was prepared from {there.get('uri')}: name another place, or replace it with "
            "--overwrite."
        )
    return bool(there == source)


def _begin(uri: str, done: str, segment: Segment, blocks: Tiling, source: dict[str, Any]) -> None:
    """Lay the empty array, and a mark for each block: its share of pixels with data, or -1."""
    depth = segment.shape[0]
    outputs.remove(uri)
    with storage.explained(uri):
        zarr.create_array(
            storage.zarr_store(done),
            shape=blocks.block_shape,
            chunks=(1, 1),
            dtype="float32",
            fill_value=-1,
            overwrite=True,
        )
        zarr.create_array(
            storage.zarr_store(uri),
            shape=segment.shape,
            shards=(depth, SHARD, SHARD),
            chunks=(depth, CHUNK, CHUNK),
            dtype="uint8",
            fill_value=0,
            compressors=ZstdCodec(level=3) if source["compressed"] else None,
            dimension_names=("z", "y", "x"),
            attributes={
                LAYERS_ATTRIBUTE: list(segment.layers),
                FINISHED_ATTRIBUTE: False,
                PREPARED_ATTRIBUTE: source,
            },
        )


def _source(segment: Segment, compress: bool) -> dict[str, Any]:
    return {
        "uri": storage.absolute(segment.uri),
        "identity": segment.identity,
        "layers": list(segment.layers),
        "compressed": compress,
    }


def _fill(uri: str, done: str, segment: Segment, blocks: Tiling, version: str) -> None:
    """Copy the blocks that are not there yet."""
    missing = np.argwhere(_shares(done, version) < 0)
    copies = da.map_blocks(
        _copy_block,
        with_halo(segment.volume, blocks),
        uri=uri,
        done=done,
        blocks=blocks,
        version=version,
        meta=np.empty((0, 0, 0), object),
        enforce_ndim=False,
    ).to_delayed()
    log.info("%s: %d layers of %d x %d pixels to %s", segment.uri, *segment.shape, uri)
    with Meter("surface volume", len(missing), "blocks") as meter:
        tasks = [copies[0, row, column] for row, column in missing]
        engine.raise_any(engine.compute_each(tasks, lambda _: meter.add(1)))


def _shares(done: str, version: str) -> np.ndarray:
    """The marks of the blocks, float (rows, columns)."""
    with storage.decoded(done, ": run inkdask prepare again with --overwrite"):
        return np.asarray(storage.open_array(done, version)[:], float)


def _copy_block(
    block: np.ndarray,
    uri: str,
    done: str,
    blocks: Tiling,
    version: str,
    block_id: tuple[int, int, int],
) -> None:
    _, row, column = block_id
    rows, columns = blocks.y.edges[row : row + 2], blocks.x.edges[column : column + 2]
    with storage.explained(uri):
        storage.open_array(uri, version)[:, slice(*rows), slice(*columns)] = block
        share = np.count_nonzero(block.any(axis=0)) / block[0].size
        storage.open_array(done, version)[row, column] = share
