"""The stored tile grid: what makes a job resumable, and a picture re-blendable without a GPU.

One zarr 3 group for each job, named after the segment and the fingerprint of all that shapes the
result, so that different jobs never meet:

    <ZARR_OUTPUT_DIR>/<segment>-<fingerprint>.zarr
        grid    uint16 (p, gy, gx, k, k)  0: no tile ran here; c: probability (c - 1) / 65534
        valid   bool (y, x)               any layer is non-zero
        tiles   int32 (p, rows, columns)  tiles run in each chunk; -1: the pass is not done
        work    int32 (rows, columns)     tiles that probably have data; -1: not estimated
        ran_in  uint8 (rows, columns)     arithmetic of a chunk's tiles, an index of `PRECISIONS`

A job writes all of its tiles to the last pass p, or goes from coarse to fine: then each pass holds
the tiles that come with it, and a tile is where any pass has it. A chunk is done when its last
pass is.

A chunk's data are written before its element of ``tiles``, and each has zarr chunks of its own,
so a chunk is done or it is not, and writers never touch each other's objects. Zarr reads an object
that is gone, as after a copy that broke off, as its fill value; so what is marked as done is also
looked for. Nothing is ever removed: to start anew is to take back the marks. The attributes
``fingerprint`` and ``origin`` say all that a picture needs, so a stored grid is complete in itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import dask.array as da
import numpy as np
import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError

from inkdask import storage
from inkdask.errors import DamagedError, InkdaskError
from inkdask.memory import give_back, peak_memory
from inkdask.specs import InferredChunk, Passes
from inkdask.storage import outputs
from inkdask.tiling import Tiling

FORMAT = 3  # of the store; another number never resumes an older grid
ENDING = ".zarr"
PRECISIONS = ("", "float32", "bfloat16", "int8")
STEPS = 65534  # of a probability in 16 bits: 30 times finer than float16 near 1, and no larger


@dataclass(frozen=True)
class ChunkReport:
    """What a worker tells of a finished chunk.

    Attributes
    ----------
    ran, empty
        Tiles that went through the network, and tiles without data.
    precision
        Of the network's arithmetic, as `InferredChunk` says it.
    process
        The worker's host and process id.
    counters, peak_memory
        What that process has read since it started, and the most memory it held, in bytes.
    """

    ran: int
    empty: int
    precision: str
    process: str
    counters: storage.Counters
    peak_memory: int


@dataclass(frozen=True)
class GridStore:
    """Where a job's tile grid lies; small and picklable, opened once per process."""

    uri: str
    tiling: Tiling
    k: int

    @classmethod
    def of(
        cls, folder: str, segment: str, fingerprint: Mapping[str, Any], tiling: Tiling, k: int
    ) -> GridStore:
        """The store of the job with this fingerprint; nothing is read or written yet."""
        name = f"{segment}-{digest(fingerprint)[:16]}{ENDING}"
        return cls(storage.join(folder, name), tiling, k)

    @classmethod
    def open(cls, uri: str) -> GridStore:
        """The store at ``uri``.

        Raises
        ------
        InkdaskError
            When no tile grid is there.
        """
        found = cls.attributes(uri).get("fingerprint")
        if found is None or found["format"] != FORMAT:
            raise InkdaskError(f"{uri} is no tile grid that this version of inkdask can read.")
        tiling = Tiling.of(found["shape"], found["tile"], found["stride"], found["chunk"][0])
        return cls(uri, tiling, found["k"])

    @staticmethod
    def attributes(uri: str) -> dict[str, Any]:
        """Fingerprint and origin of the store at ``uri``; empty when there is none."""
        if not storage.exists(storage.join(uri, "zarr.json")):
            return {}
        node = storage.zarr_node(uri)
        # A prepared volume is an array, and may lie beside.
        return dict(node.attrs) if isinstance(node, zarr.Group) else {}

    def create(self, fingerprint: Mapping[str, Any], origin: Mapping[str, Any]) -> None:
        """Make the empty store, or leave what is there for the job to go on from.

        Several processes may do so at once. The origin becomes this one: the same tiles may have
        been asked for with another region, or of a segment that has moved since. Marks of chunks
        whose data are gone are taken back.

        Raises
        ------
        InkdaskError
            When the place cannot be written, or another job's grid is there.
        """
        there = self.check_place(fingerprint)
        tiling, k = self.tiling, self.k
        side = [min(axis.step, axis.length) for axis in (tiling.y, tiling.x)]
        tiles = [axis.grid_chunks[0] for axis in (tiling.y, tiling.x)]
        arrays: dict[str, dict[str, Any]] = {
            "grid": {
                "shape": (tiling.passes, *tiling.grid_shape, k, k), "chunks": (1, *tiles, k, k),
                "dtype": "uint16", "fill_value": 0,
                "dimension_names": ("pass", "gy", "gx", "ky", "kx"),
            },
            "valid": {
                "shape": tiling.shape, "chunks": tuple(side), "dtype": "bool",
                "fill_value": False, "dimension_names": ("y", "x"),
            },
            "tiles": {
                "shape": (tiling.passes, *tiling.block_shape), "chunks": (1, 1, 1),
                "dtype": "int32", "fill_value": -1, "dimension_names": ("pass", "row", "column"),
            },
            "work": {
                "shape": tiling.block_shape, "chunks": tiling.block_shape, "dtype": "int32",
                "fill_value": -1, "dimension_names": ("row", "column"),
            },
            "ran_in": {
                "shape": tiling.block_shape, "chunks": (1, 1), "dtype": "uint8",
                "fill_value": 0, "dimension_names": ("row", "column"),
            },
        }  # fmt: skip
        attributes = {"fingerprint": dict(fingerprint), "origin": dict(origin)}
        with storage.explained(self.uri):
            place = storage.zarr_store(self.uri)
            with suppress(ContainsGroupError):  # others may be making the same
                zarr.create_group(place, zarr_format=3, attributes=attributes)
            if there and there["origin"] != attributes["origin"]:
                zarr.open_group(place, mode="r+").attrs["origin"] = attributes["origin"]
            for name, how in arrays.items():
                with suppress(ContainsArrayError):
                    zarr.create_array(place, name=name, zarr_format=3, **how)
        if there and (lost := self._lost()).any():
            self.forget(lost)

    def check_place(self, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """Check that the store may be where it is to be; returns the attributes it has there.

        Raises
        ------
        InkdaskError
            When another job's grid is there, or something that is no grid.
        """
        # What others are just writing, or trying to, is not yet anything.
        entries = {entry.name for entry in storage.list_folder(self.uri)}
        others = {name for name in entries if not name.endswith((".partial", outputs.PROBE))}
        there = self.attributes(self.uri)
        if "fingerprint" in there:
            check_same(self.uri, there["fingerprint"], fingerprint)
        elif others:
            raise InkdaskError(
                f"{self.uri} is there, and it is no tile grid: it has {min(others)} in it."
            )
        return there

    def forget(self, chunks: np.ndarray) -> None:
        """Take back the marks of some chunks, bool (rows, columns), so that they are redone."""
        with storage.explained(self.uri):
            marks = self._array("tiles")
            try:
                done = self._read("tiles") >= 0
            except DamagedError:  # what is taken back need not be read
                done = np.ones(marks.shape, bool)
            for place in np.argwhere(chunks & done):
                marks[tuple(place)] = -1

    def work(self) -> np.ndarray | None:
        """Tiles of each chunk that probably have data, int32 (rows, columns), once planned.

        None before, and where it is damaged: it can be estimated again.
        """
        try:
            work = self._read("work")
        except DamagedError:
            return None
        return None if (work < 0).any() else work

    def plan_work(self, work: np.ndarray) -> None:
        """Keep an estimate of the work, so that all parts divide it alike."""
        with storage.explained(self.uri):
            self._array("work")[:] = work

    def tiles_run(self) -> np.ndarray:
        """Tiles run in each chunk, int32 (rows, columns); -1 where the chunk is not done."""
        marks = self._marks()
        return np.where(marks[-1] < 0, -1, np.maximum(marks, 0).sum(axis=0)).astype(np.int32)

    def passes_done(self) -> np.ndarray:
        """Last pass that is done in each chunk, int (rows, columns); -1 for none."""
        marks = self._marks()
        return np.max(np.where(marks < 0, -1, np.arange(len(marks))[:, None, None]), axis=0)

    def precisions(self) -> list[str]:
        """Arithmetic in which tiles ran; workers of different hardware may differ."""
        found = np.unique(self._read("ran_in")).tolist()
        return [PRECISIONS[number] for number in found if number]

    def write(self, chunk: InferredChunk, row: int, column: int, last: int = -1) -> int:
        """Store a chunk whose tiles are there up to a pass; returns how many ran just now."""
        y, x = self.tiling.y, self.tiling.x
        tiles = (slice(*y.rows[row : row + 2]), slice(*x.rows[column : column + 2]))
        pixels = (slice(*y.edges[row : row + 2]), slice(*x.edges[column : column + 2]))
        ran = int(np.count_nonzero(~np.isnan(chunk.grid[:, :, 0, 0])))
        last %= self.tiling.passes
        with storage.explained(self.uri):
            self._data("grid")[(last, *tiles)] = encode(chunk.grid)
            self._data("valid")[pixels] = chunk.valid
            if chunk.precision:
                self._array("ran_in")[row, column] = PRECISIONS.index(chunk.precision)
            self._array("tiles")[last, row, column] = ran
        return ran

    def grid(self) -> da.Array:
        """The stored probabilities, dask float32 (gy, gx, k, k), NaN where no tile ran."""
        used = np.flatnonzero((self._read("tiles") >= 0).any(axis=(1, 2))).tolist()
        chunks = (1, *self.tiling.grid_chunks, self.k, self.k)
        stored = da.from_array(_Lazy(self, "grid"), chunks)[used or [0]]
        together = stored.rechunk({0: -1}, method="tasks")
        return together.map_blocks(
            decode, drop_axis=0, dtype=np.float32, meta=np.empty((0,) * 4, np.float32)
        )

    def valid(self) -> da.Array:
        """Which pixels have data, dask bool (y, x)."""
        return da.from_array(_Lazy(self, "valid"), self.tiling.chunks)

    def window(
        self, tiles: tuple[slice, slice], pixels: tuple[slice, slice]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read some of `grid` and of `valid` now: float32 (gy, gx, k, k), and bool (y, x)."""
        return decode(self._read("grid", (slice(None), *tiles))), self._read("valid", pixels)

    def _marks(self) -> np.ndarray:
        """Tiles run, int32 (p, rows, columns), as ``tiles`` says; -1 where the data are gone."""
        marks = self._read("tiles")  # before the data, which others may be writing
        return np.where(self._lost(), -1, marks)

    def _lost(self) -> np.ndarray:
        """Which chunks lack data that were written, of any pass: bool (rows, columns).

        Listings tell, without reading: of marks, too, because one that is taken back is not kept.
        """
        marked = self._written("tiles", 1)
        there = self._written("grid", 1)[..., 0, 0] & self._written("valid", 0)
        return np.asarray((marked & ~there).any(axis=0))

    def _written(self, name: str, y: int) -> np.ndarray:
        """Where an array is there, whose axis ``y`` is rows: bool (..., rows, columns, ...)."""
        there = np.zeros(self._array(name).cdata_shape, bool)
        for file in storage.list_files(storage.join(self.uri, name, "c")):
            place = file.split("/")
            if all(map(str.isdecimal, place)):  # else another file, such as one half written
                there[tuple(map(int, place))] = True
        for axis, count in enumerate(self.tiling.block_shape, y):
            # The last of our chunks may be long, and more than one of zarr's.
            there = np.logical_and.reduceat(there, np.arange(count), axis)
        return there

    def _read(self, name: str, window: Any = ...) -> np.ndarray:
        """Read from one of the arrays.

        Raises
        ------
        DamagedError
            When what is stored cannot be decoded.
        """
        remedy = ": run the job with --overwrite, or delete the tile grid"
        with storage.decoded(storage.join(self.uri, name), remedy):
            return np.asarray(self._array(name)[window])

    def _data(self, name: str) -> zarr.Array:
        """One of the arrays, to write all that is given, so that nothing there means lost."""
        return self._array(name).with_config({"write_empty_chunks": True})

    def _array(self, name: str) -> zarr.Array:
        with storage.explained(storage.join(self.uri, name)):
            return open_array(storage.join(self.uri, name))


class _Lazy:
    """An array of a stored grid, as Dask reads it."""

    def __init__(self, store: GridStore, name: str) -> None:
        array = store._array(name)
        self._store, self._name = store, name
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim

    def __getitem__(self, window: Any) -> np.ndarray:
        return self._store._read(self._name, window)


def save_chunk(
    chunk: InferredChunk,
    store: GridStore,
    passes: Passes | None = None,
    *,
    block_id: tuple[int, int],
) -> ChunkReport:
    """Store one chunk from the worker that computed it, and report."""
    tiling = store.tiling
    done, last = (-1, tiling.passes - 1) if passes is None else (passes.done[block_id], passes.last)
    ran = store.write(chunk, *block_id, last)
    give_back()
    total = int(np.count_nonzero(tiling.in_passes(*block_id, int(done), last)))
    return ChunkReport(
        ran, total - ran, chunk.precision, process_name(), storage.counters(), peak_memory()
    )


def process_name() -> str:
    """This process among all of a cluster: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def encode(grid: np.ndarray) -> np.ndarray:
    """Probabilities to uint16 codes; NaN (no tile ran) becomes 0."""
    ran = ~np.isnan(grid)
    return np.where(ran, np.rint(np.where(ran, grid, 0) * STEPS) + 1, 0).astype(np.uint16)


def decode(codes: np.ndarray) -> np.ndarray:
    """Uint16 codes of passes (p, ...) to float32 probabilities (...); NaN where none has a tile.

    They are off by at most 1 / 131068.
    """
    codes = codes.max(axis=0)  # what two passes have is the same
    probability = (codes.astype(np.float32) - 1) / STEPS
    return np.where(codes > 0, probability, np.float32(np.nan))


def check_same(uri: str, there: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Check that the grid at ``uri`` is this very job's.

    Raises
    ------
    InkdaskError
        Naming all that differs.
    """
    if differing := differences(there, wanted):
        raise InkdaskError(f"The tile grid {uri} is another job's: {differing}.")


def differences(there: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """What is not the same in a stored fingerprint, in words; empty when nothing is."""
    # JSON has lists where Python may have tuples
    there, wanted = (json.loads(json.dumps(f, default=str)) for f in (there, wanted))
    return ", ".join(
        f"{name} is {_short(there.get(name))} there and {_short(value)} here"
        for name, value in wanted.items()
        if there.get(name) != value
    )


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else f"{text[:18]}...{text[-18:]}"


def digest(fingerprint: Mapping[str, Any]) -> str:
    """SHA-256 of a fingerprint, the same for equal content."""
    text = json.dumps(fingerprint, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@lru_cache(maxsize=32)
def open_array(uri: str, version: str = "") -> zarr.Array:
    """Open an array to read and write, once in a process for each version of what lies there."""
    return zarr.open_array(storage.zarr_store(uri), mode="r+")
