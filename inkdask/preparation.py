"""The layers of a segment as one zarr array: what many jobs read, or what cannot be cut.

A zarr 3 array uint8 (z, y, x): one object for each block of about 1,024 pixels a side (a shard),
in chunks of 128 pixels a side that can be read alone. It is written block by block, so memory does
not grow with the segment, and a stopped run resumes. Until the last block is there, the array says
of itself that it is not finished, and nothing reads it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import zarr
from zarr.codecs import ZstdCodec

from inkdask import engine, isotropic, storage
from inkdask.errors import InkdaskError
from inkdask.failures import fallible, read_or_fail
from inkdask.identity import digest
from inkdask.inference import over_chunks
from inkdask.job import shortened
from inkdask.plan import average
from inkdask.preflight import check_room_to_prepare
from inkdask.progress import Meter, size
from inkdask.reading.zarr_volume import (
    FINISHED_ATTRIBUTE,
    LAYERS_ATTRIBUTE,
    OCCUPIED_ATTRIBUTE,
    PIXEL_ATTRIBUTE,
    PREPARED_ATTRIBUTE,
)
from inkdask.segment import Segment
from inkdask.settings import Settings
from inkdask.storage import outputs
from inkdask.store import restarted
from inkdask.tiling import Tiling

log = logging.getLogger("inkdask")

SHARD, CHUNK = 1024, 128  # pixels a side


@dataclass(frozen=True)
class Preparation:
    """An array that is to hold a segment, and a mark for each block: its share of data, or -1."""

    uri: str
    segment: Segment
    is_compressed: bool
    averaged: int
    tags: dict[str, Any]

    @classmethod
    def of(cls, whole: Segment, settings: Settings) -> Preparation:
        """Settle which layers are kept, and where the array goes."""
        uri, factor = settings.surface_volume_zarr, settings.z_downsample_mean_factor
        segment = isotropic.centre(whole, settings)
        segment = segment.take(slice(len(segment.layers) // factor * factor))
        tags = isotropic.tags(whole, segment, factor)
        first, last = min(segment.layers), max(segment.layers)
        means = f"-means-of-{factor}" if factor > 1 else ""
        kept = f"{first:02d}-{last + 1:02d}{means}"
        name = f"{shortened(segment.name)}-{kept}-{segment.identity}.volume.zarr"
        uri = storage.absolute(uri or storage.join(settings.zarr_output_dir, name))
        with outputs.moved_by("SURFACE_VOLUME_ZARR"):
            outputs.check_writable(storage.join(uri, "zarr.json"))
        return cls(uri, segment, settings.use_zarr_compression, factor, tags)

    def begin(self, overwrite: bool) -> None:
        """Lay the empty array and its marks, where it is not begun or is to start anew."""
        if self._is_begun(overwrite) and not overwrite:
            return
        check_room_to_prepare(self.segment, self.uri, self.is_compressed)
        restarted.append(self.uri)
        with outputs.moved_by("SURFACE_VOLUME_ZARR"):  # which may not be removed
            outputs.remove(self.uri)
        depth, height, width = self.segment.shape
        depth //= self.averaged
        with storage.explained(self.uri):
            zarr.create_array(
                storage.zarr_store(self._marks),
                shape=self._blocks.block_shape,
                chunks=(1, 1),
                dtype="float32",
                fill_value=-1,
                overwrite=True,
            )
            zarr.create_array(
                storage.zarr_store(self.uri),
                shape=(depth, height, width),
                shards=(depth, SHARD, SHARD),
                chunks=(depth, CHUNK, CHUNK),
                dtype="uint8",
                fill_value=0,
                compressors=ZstdCodec(level=3) if self.is_compressed else None,
                dimension_names=("z", "y", "x"),
                attributes={
                    LAYERS_ATTRIBUTE: [*(range(depth) if self.tags else self.segment.layers)],
                    FINISHED_ATTRIBUTE: False,
                    PREPARED_ATTRIBUTE: self._source,
                    PIXEL_ATTRIBUTE: self.segment.pixel_um,
                    **self.tags,
                },
            )

    @property
    def is_finished(self) -> bool:
        """Whether all blocks are there."""
        return bool(storage.zarr_array(self.uri).attrs[FINISHED_ATTRIBUTE])

    def fill(self) -> None:
        """Copy the blocks that are not there yet."""
        missing = np.argwhere(self._shares() < 0)
        volume, _ = self.segment.lazy(read_or_fail)
        copies = over_chunks(
            _copy_block,
            self._blocks,
            average(volume, self.averaged),
            uri=self.uri,
            marks=self._marks,
            version=digest(self._source),
        ).to_delayed()
        depth, *area = self.segment.shape
        log.info("%s: %d layers of %s to %s", self.segment.uri, depth, size(area), self.uri)
        with Meter("surface volume", len(missing), "blocks") as meter:
            tasks = [copies[row, column] for row, column in missing]
            engine.compute_each(tasks, lambda _: meter.add(1)).check()

    def finish(self) -> None:
        """Say that the array is finished, and where it has data; remove the marks."""
        share = self._shares().round(4).tolist()
        with storage.explained(self.uri):
            zarr.open_array(storage.zarr_store(self.uri), mode="r+").attrs.update(
                {
                    OCCUPIED_ATTRIBUTE: {"side": self._blocks.y.step, "share": share},
                    FINISHED_ATTRIBUTE: True,
                }
            )
        outputs.discard(self._marks)

    @property
    def _marks(self) -> str:
        return f"{self.uri}.done"

    @property
    def _blocks(self) -> Tiling:
        # Tiles of one chunk without overlap: the blocks are whole shards, and there is no halo.
        return Tiling.of(self.segment.shape[1:], tile=CHUNK, stride=CHUNK, chunk=SHARD)

    @property
    def _source(self) -> dict[str, Any]:
        return {
            "uri": storage.absolute(self.segment.uri),
            "identity": self.segment.identity,
            "layers": list(self.segment.layers),
            "compressed": self.is_compressed,
            **self.tags,
        }

    def _is_begun(self, overwrite: bool) -> bool:
        """Whether the array is there, made of the same files in the same way.

        An array that inkdask did not prepare is never touched; one of another segment only when
        that is asked for.
        """
        if not storage.exists(self.uri):
            return False
        with storage.explained(self.uri):
            try:
                array = zarr.open_array(storage.zarr_store(self.uri), mode="r")
                attributes: dict[str, Any] = array.attrs.asdict()
            except (ValueError, TypeError, KeyError, FileNotFoundError):  # no zarr array
                attributes = {}
        if not {FINISHED_ATTRIBUTE, LAYERS_ATTRIBUTE, PREPARED_ATTRIBUTE} <= attributes.keys():
            raise InkdaskError(f"{self.uri} is there, and it is no array that inkdask prepared.")
        there = attributes[PREPARED_ATTRIBUTE]
        source = there.get("uri") if isinstance(there, dict) else "another place"
        if source != self._source["uri"] and not overwrite:
            raise InkdaskError(
                f"{self.uri} was prepared from {source}: name another place, or replace "
                "it with --overwrite."
            )
        return bool(there == self._source)

    def _shares(self) -> np.ndarray:
        """The marks of the blocks, float (rows, columns)."""
        with storage.decoded(self._marks, ": run inkdask prepare again with --overwrite"):
            return np.asarray(storage.open_array(self._marks, digest(self._source))[:], float)


@fallible
def _copy_block(
    block: np.ndarray,
    *,
    tiling: Tiling,
    uri: str,
    marks: str,
    version: str,
    block_id: tuple[int, int],
) -> None:
    row, column = block_id
    rows, columns = tiling.y.edges[row : row + 2], tiling.x.edges[column : column + 2]
    with storage.explained(uri):
        storage.open_array(uri, version)[:, slice(*rows), slice(*columns)] = block
        share = np.count_nonzero(block.any(axis=0)) / block[0].size
        storage.open_array(marks, version)[row, column] = share
