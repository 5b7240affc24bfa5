"""The layers of a segment as one zarr array: what many jobs read, or what cannot be cut.

A zarr 3 array uint8 (z, y, x): one object for each block of about 1,024 pixels a side (a shard),
in chunks of 128 pixels a side that can be read alone. It is written block by block, so memory does
not grow with the segment, and a stopped run resumes. Until the last block is there, the array says
of itself that it is not finished, and nothing reads it.

Several jobs may prepare one array at once. So header and blocks are replaced, and never removed
first: what one job has stored or marked, no other job of the same layers takes away.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
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
HEADER = "zarr.json"


@dataclass(frozen=True)
class Preparation:
    """An array that is to hold a segment, and a mark for each block that it holds."""

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
            outputs.check_writable(storage.join(uri, HEADER))
        return cls(uri, segment, settings.use_zarr_compression, factor, tags)

    def begin(self, overwrite: bool) -> None:
        """Lay the empty array, where it is not begun or is to start anew."""
        there = self._source_there(overwrite)
        if there == self._source and not overwrite:
            return
        check_room_to_prepare(self.segment, self.uri, self.is_compressed)
        restarted.append(self.uri)
        with outputs.moved_by("SURFACE_VOLUME_ZARR"):  # which may not be removed
            outputs.remove(self._all_marks)
        self._lay({FINISHED_ATTRIBUTE: False})
        if there is not None:
            self._remove_blocks_outside()

    @property
    def is_finished(self) -> bool:
        """Whether all blocks are there."""
        return bool(_attributes(self.uri)[FINISHED_ATTRIBUTE])

    def fill(self) -> None:
        """Copy the blocks that are not there yet, and say that the array is finished."""
        shares = self._shares()
        missing = np.argwhere(shares < 0)
        volume, _ = self.segment.lazy(read_or_fail)
        copies = over_chunks(
            _copy_block,
            self._blocks,
            average(volume, self.averaged),
            uri=self.uri,
            marks=self._marks,
            layout=self._layout,
            source=self._source,
        ).to_delayed()
        depth, *area = self.segment.shape
        log.info("%s: %d layers of %s to %s", self.segment.uri, depth, size(area), self.uri)

        def tell(number: int, share: float) -> None:
            shares[tuple(missing[number])] = share
            meter.add(1)

        with Meter("surface volume", len(missing), "blocks") as meter:
            engine.compute_each([copies[row, column] for row, column in missing], tell).check()
        _check_current(self.uri, self._source)
        occupied = {"side": self._blocks.y.step, "share": shares.round(4).tolist()}
        self._lay({OCCUPIED_ATTRIBUTE: occupied, FINISHED_ATTRIBUTE: True})
        outputs.discard(self._all_marks)

    def _lay(self, state: dict[str, Any]) -> None:
        """Write the header of the array, in one step, so that no reader finds none."""
        depth = self._layout["shape"][0]
        attributes = {
            LAYERS_ATTRIBUTE: [*(range(depth) if self.tags else self.segment.layers)],
            PREPARED_ATTRIBUTE: self._source,
            PIXEL_ATTRIBUTE: self.segment.pixel_um,
            **self.tags,
            **state,
        }
        made: dict[str, Any] = {}  # a store in memory
        zarr.create_array(made, **self._layout, attributes=attributes)
        storage.write_bytes(storage.join(self.uri, HEADER), made[HEADER].to_bytes())

    def _remove_blocks_outside(self) -> None:
        """Remove the blocks of a larger array that was there."""
        _, height, width = self._layout["shape"]
        kept = {f"0/{row}/{column}" for row, column in _shards((0, height), (0, width))}
        blocks = storage.join(self.uri, "c")
        for file in storage.list_files(blocks):
            if file not in kept and all(map(str.isdecimal, file.split("/"))):
                outputs.discard(storage.join(blocks, file))

    @property
    def _all_marks(self) -> str:
        return f"{self.uri}.done"

    @property
    def _marks(self) -> str:
        """Folder of empty files ``<row>-<column>-<share>``, one for each block that is there.

        A late mark of a job of other layers goes to another folder.
        """
        return storage.join(self._all_marks, digest(self._source)[:16])

    @property
    def _layout(self) -> dict[str, Any]:
        """Layout of the array, as zarr takes it."""
        depth, height, width = self.segment.shape
        depth //= self.averaged
        return {
            "shape": (depth, height, width),
            "shards": (depth, SHARD, SHARD),
            "chunks": (depth, CHUNK, CHUNK),
            "dtype": "uint8",
            "fill_value": 0,
            "compressors": ZstdCodec(level=3) if self.is_compressed else None,
            "dimension_names": ("z", "y", "x"),
        }

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

    def _source_there(self, overwrite: bool) -> Any:
        """Return what the array that is there was made of; None where there is no array.

        An array that inkdask did not prepare is never touched; one of another segment only when
        that is asked for.
        """
        # Ignore files that another job is still writing: its first is the header.
        names = (entry.name for entry in storage.list_folder(self.uri))
        if all(name.endswith((".part", ".partial")) for name in names):
            return None
        is_headed = storage.exists(storage.join(self.uri, HEADER))
        attributes = _attributes(self.uri) if is_headed else {}
        if not {FINISHED_ATTRIBUTE, LAYERS_ATTRIBUTE, PREPARED_ATTRIBUTE} <= attributes.keys():
            raise InkdaskError(f"{self.uri} is there, and it is no array that inkdask prepared.")
        there = attributes[PREPARED_ATTRIBUTE]
        source = there.get("uri") if isinstance(there, dict) else "another place"
        if source != self._source["uri"] and not overwrite:
            raise InkdaskError(
                f"{self.uri} was prepared from {source}: name another place, or replace "
                "it with --overwrite."
            )
        return there

    def _shares(self) -> np.ndarray:
        """Share of data of each block that is marked, float (rows, columns); -1 for the others."""
        shares = np.full(self._blocks.block_shape, -1.0)
        for mark in storage.list_files(self._marks):
            if found := re.fullmatch(r"(\d+)-(\d+)-(\d\.\d+)", mark):
                shares[int(found[1]), int(found[2])] = float(found[3])
        return shares


def _attributes(uri: str) -> dict[str, Any]:
    """Attributes of the array at ``uri``; empty where its header is not one of zarr 3."""
    with suppress(ValueError, TypeError, KeyError):
        return dict(json.loads(storage.read_bytes(storage.join(uri, HEADER)))["attributes"])
    return {}


def _check_current(uri: str, source: dict[str, Any]) -> None:
    """Check that no job of other layers has started the array anew."""
    if _attributes(uri).get(PREPARED_ATTRIBUTE) != source:
        raise InkdaskError(f"{uri} was started anew by another job, of other layers.")


def _shards(rows: Sequence[int], columns: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Row and column of each shard between these pixels; the last block may have several."""
    y, x = (range(start // SHARD, -(-stop // SHARD)) for start, stop in (rows, columns))
    return product(y, x)


@fallible
def _copy_block(
    block: np.ndarray,
    *,
    tiling: Tiling,
    uri: str,
    marks: str,
    layout: dict[str, Any],
    source: dict[str, Any],
    block_id: tuple[int, int],
) -> float:
    """Store a block, mark it, and return its share of data."""
    row, column = block_id
    rows = tiling.y.edges[row : row + 2].tolist()
    columns = tiling.x.edges[column : column + 2].tolist()
    made: dict[str, Any] = {}  # a store in memory: zarr would merge a block with what is there
    with storage.explained(uri):
        zarr.create_array(made, **layout)[:, slice(*rows), slice(*columns)] = block
        _check_current(uri, source)
        for shard in _shards(rows, columns):
            name = storage.join("c/0", *map(str, shard))
            if name in made:
                storage.write_bytes(storage.join(uri, name), made[name].to_bytes())
            else:  # nothing but zeros
                outputs.remove(storage.join(uri, name))
    share = float(np.count_nonzero(block.any(axis=0)) / block[0].size)
    try:
        storage.write_bytes(storage.join(marks, f"{row}-{column}-{share:.4f}"), b"")
    except InkdaskError as error:  # the marks of a finished array are removed, for example
        log.info("A block has no mark, and is copied again if the job is stopped: %s", error)
    return share
