"""The stored tile grid: jobs resume from it, and pictures are blended from it without a GPU.

Each job has one zarr 3 group. Its name holds the segment and the digest of the recipe, so different
jobs have different groups:

    <ZARR_OUTPUT_DIR>/<segment>-<digest>.zarr    attributes: `identity.Label`
        g1/grid    uint16 (gy, gx, k, k)  0: no tile ran here; c: probability (c - 1) / 65534
        g1/valid   bool (y, x)            pixels where any layer is non-zero
        g1/done    int8 (rows, columns)   last pass of each chunk; -1: none
        g1/work    int32 (rows, columns)  estimated tiles with data; -1: not estimated
        g1/ran_in  uint8 (rows, columns)  precision of each chunk, an index of `PRECISIONS`

A job runs all tiles of a chunk at once, or in passes from coarse to fine. Each pass is merged into
the stored chunk. A chunk has one writer at a time, which writes the data before the element of
``done``. Each chunk has its own zarr chunks, so writers never share an object. Zarr reads a missing
object as its fill value, for example after an incomplete copy. A chunk therefore counts as done
only if its mark and its objects are there.

A restart writes the next generation to the attributes. The arrays then lie in ``g2``, and writers
of ``g1`` cannot change them. The attributes hold everything else that a picture needs.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import dask.array as da
import numpy as np
import zarr
from zarr.errors import ContainsArrayError, ContainsGroupError

from inkdask import storage
from inkdask.errors import DamagedError, InkdaskError
from inkdask.failures import fallible
from inkdask.identity import FORMAT, Label, Origin, Recipe, Said, differences
from inkdask.memory import give_back, peak_memory
from inkdask.specs import InferredChunk, Passes
from inkdask.storage import outputs
from inkdask.storage.dask_arrays import StoredArray
from inkdask.tiling import Tiling

ENDING = ".zarr"
PRECISIONS = ("", "float32", "bfloat16", "int8")
STEPS = 65534  # steps of a probability: 30 times finer than float16 near 1, in as many bits

REMEDY = ": run the job with --overwrite, or delete the tile grid"

restarted: list[str] = []  # URIs of grids that this process restarted


@dataclass(frozen=True)
class ChunkReport:
    """Report of a finished chunk.

    Attributes
    ----------
    grid
        URI of the grid that has it.
    ran, empty
        Tiles that went through the network, and tiles without data.
    runs, seconds
        What ran, and what it took, as in `InferredChunk`.
    process
        Host and process id of the worker.
    counters, peak_memory
        Counters of that process since its start, and its peak memory in bytes.
    """

    grid: str
    ran: int
    empty: int
    runs: str
    seconds: float
    process: str
    counters: storage.Counters
    peak_memory: int


@dataclass(frozen=True)
class GridStore:
    """Place and shape of one generation of a tile grid; small and picklable.

    Each process opens an array once per `GridStore`, so no handle serves a grid of another shape or
    generation at the same place.
    """

    uri: str
    tiling: Tiling
    k: int
    generation: int = 1

    @classmethod
    def of(cls, folder: str, segment: str, recipe: Recipe) -> GridStore:
        """Return the store of a recipe in a folder, in its current generation."""
        name = f"{segment}-{recipe.digest[:16]}{ENDING}"
        return cls.at(storage.join(folder, name), recipe)

    @classmethod
    def at(cls, uri: str, recipe: Recipe) -> GridStore:
        """Return the store of a recipe at a place, in its current generation."""
        label = cls.label(uri)
        tiling = Tiling.of(recipe.size, recipe.tile, recipe.stride, recipe.chunk)
        # Absolute, because workers may run in another folder.
        here = storage.absolute(uri)
        return cls(here, tiling, recipe.k, label.generation if label else 1)

    @classmethod
    def open(cls, uri: str) -> tuple[GridStore, Label]:
        """Open the existing store at ``uri``."""
        label = cls.label(uri)
        if label is None:
            raise InkdaskError(f"{uri} is no tile grid that this version of inkdask can read.")
        return cls.at(uri, label.recipe), label

    @staticmethod
    def label(uri: str) -> Label | None:
        """Read the attributes of the grid at ``uri``; None where there is no grid."""
        if not storage.exists(storage.join(uri, "zarr.json")):
            return None
        node = storage.zarr_node(uri)
        attributes = dict(node.attrs)
        # Check the attributes, because a picture is a group too; a prepared volume is an array.
        if not isinstance(node, zarr.Group) or not {"recipe", "fingerprint"} & attributes.keys():
            return None
        if attributes.get("format") != FORMAT:
            raise InkdaskError(f"{uri} is no tile grid that this version of inkdask can read.")
        return Label.from_json(attributes, uri)

    def create(self, recipe: Recipe, origin: Origin, said: Said | None = None) -> None:
        """Create the empty store, or keep the existing one to resume from.

        Several processes may do so at once. ``origin`` and ``said`` replace the stored ones,
        because the same tiles may serve another region. Chunks that lost data are marked as not
        done.
        """
        there = self.check_place(recipe)
        label = Label(FORMAT, self.generation, recipe, origin, said).to_json()
        with storage.explained(self.uri):
            place = storage.zarr_store(self.uri)
            with suppress(ContainsGroupError):  # another process may have created it
                zarr.create_group(place, zarr_format=3, attributes=label)
            if there and (there.origin, there.said) != (origin, said):
                del label["generation"]
                zarr.open_group(place, mode="r+").attrs.update(label)
        self.make_arrays()
        if there and (lost := self._lost()).any():
            with storage.explained(self.uri):
                for chunk in np.argwhere(lost):
                    self._data("done")[tuple(chunk)] = -1

    def make_arrays(self) -> None:
        """Create the missing arrays."""
        tiling, k = self.tiling, self.k
        side = [min(axis.step, axis.length) for axis in (tiling.y, tiling.x)]
        tiles = [axis.grid_chunks[0] for axis in (tiling.y, tiling.x)]
        each = {"shape": tiling.block_shape, "dimension_names": ("row", "column")}
        arrays: dict[str, dict[str, Any]] = {
            "grid": {
                "shape": (*tiling.grid_shape, k, k), "chunks": (*tiles, k, k), "dtype": "uint16",
                "fill_value": 0, "dimension_names": ("gy", "gx", "ky", "kx"),
            },
            "valid": {
                "shape": tiling.shape, "chunks": tuple(side), "dtype": "bool",
                "fill_value": False, "dimension_names": ("y", "x"),
            },
            "done": {**each, "chunks": (1, 1), "dtype": "int8", "fill_value": -1},
            "work": {**each, "chunks": tiling.block_shape, "dtype": "int32", "fill_value": -1},
            "ran_in": {**each, "chunks": (1, 1), "dtype": "uint8", "fill_value": 0},
        }  # fmt: skip
        with storage.explained(self.uri):
            place = storage.zarr_store(self.uri)
            for name, how in arrays.items():
                with suppress(ContainsArrayError):
                    zarr.create_array(place, name=self._path(name), zarr_format=3, **how)

    def check_place(self, recipe: Recipe) -> Label | None:
        """Check that the place is free or has this job's grid; return the label of that grid.

        Another job's grid and a folder with other files are refused.
        """
        # Ignore files that another process is still writing, and probes of earlier versions.
        entries = {entry.name for entry in storage.list_folder(self.uri)}
        others = {name for name in entries if not name.endswith((".partial", ".part", ".test"))}
        there = self.label(self.uri)
        if there is not None:
            if differing := differences(there.recipe, recipe):
                raise InkdaskError(f"The tile grid {self.uri} is another job's: {differing}.")
        elif others:
            raise InkdaskError(
                f"{self.uri} is there, and it is no tile grid: it has {min(others)} in it."
            )
        return there

    def restart(self) -> GridStore:
        """Start the next generation of the grid and return it, without its arrays.

        Processes that restart the same generation at once get the same next one.
        """
        after = replace(self, generation=self.generation + 1)
        with storage.explained(self.uri):
            group = zarr.open_group(storage.zarr_store(self.uri), mode="r+")
            group.attrs["generation"] = after.generation
        restarted.append(self.uri)
        return after

    def check_current(self) -> None:
        """Check that this generation is the current one."""
        label = self.label(self.uri)
        if label is None or label.generation != self.generation:
            raise InkdaskError(f"The tile grid {self.uri} was started anew by another job.")

    def remove_earlier(self) -> None:
        """Remove the earlier generations, as far as possible."""
        for number in range(1, self.generation):
            outputs.discard(storage.join(self.uri, f"g{number}"))

    def work(self) -> np.ndarray | None:
        """Estimated tiles with data of each chunk, int32 (rows, columns).

        None where the estimate is missing or damaged, because it can be made again.
        """
        try:
            work = self._read("work")
        except DamagedError:
            return None
        return None if (work < 0).any() else work

    def plan_work(self, work: np.ndarray) -> None:
        """Store an estimate of the work, so that all parts share it."""
        with storage.explained(self.uri):
            self._array("work")[:] = work

    def passes_done(self) -> np.ndarray:
        """Last pass of each chunk, int (rows, columns); -1 for none."""
        marks = self._read("done")  # before the data, because writers write the data first
        return np.where(self._lost(), -1, marks).astype(int)

    def chunks_done(self) -> np.ndarray:
        """Chunks that are done, bool (rows, columns)."""
        return np.asarray(self.passes_done() == self.tiling.passes - 1)

    def has_any(self, chunks: np.ndarray) -> bool:
        """Return True if any of ``chunks``, bool (rows, columns), is stored or damaged."""
        try:
            return bool((self.passes_done()[chunks] >= 0).any())
        except DamagedError:
            return True

    def precisions(self) -> tuple[str, ...]:
        """Precisions used; several where the hardware of workers differs."""
        found = np.unique(self._read("ran_in")).tolist()
        return tuple(PRECISIONS[number] for number in found if number)

    def write(self, chunk: InferredChunk, row: int, column: int, last: int = -1) -> int:
        """Store a chunk with its tiles up to pass ``last``; return how many tiles ran."""
        y, x = self.tiling.y, self.tiling.x
        tiles = (slice(*y.rows[row : row + 2]), slice(*x.rows[column : column + 2]))
        pixels = (slice(*y.edges[row : row + 2]), slice(*x.edges[column : column + 2]))
        codes, last = encode(chunk.grid), last % self.tiling.passes
        ran = int(np.count_nonzero(codes[:, :, 0, 0]))
        there = int(self._read("done", (row, column)))
        if there >= 0:  # an earlier pass is stored
            codes = np.maximum(codes, self._read("grid", tiles))
        with storage.explained(self.uri):
            self._data("grid")[tiles] = codes
            self._data("valid")[pixels] = chunk.valid
            if chunk.precision:
                self._array("ran_in")[row, column] = PRECISIONS.index(chunk.precision)
            self._array("done")[row, column] = max(last, there)
        return ran

    def grid(self) -> da.Array:
        """Stored probabilities, dask float32 (gy, gx, k, k), NaN where no tile ran."""
        stored = da.from_array(self._stored("grid"), (*self.tiling.grid_chunks, self.k, self.k))
        return stored.map_blocks(decode, dtype=np.float32)

    def valid(self) -> da.Array:
        """Pixels with data, dask bool (y, x)."""
        return da.from_array(self._stored("valid"), self.tiling.chunks)

    def read(
        self, tiles: tuple[slice, slice], pixels: tuple[slice, slice]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Read a part of `grid`, float32 (gy, gx, k, k), and of `valid`, bool (y, x)."""
        return decode(self._read("grid", tiles)), self._read("valid", pixels)

    def _lost(self) -> np.ndarray:
        """Chunks that are marked as done and lack data, bool (rows, columns).

        Lists the objects and reads none.
        """
        done = self._chunks_there("done")  # before the data, because writers write the data first
        return done & ~(self._chunks_there("grid") & self._chunks_there("valid"))

    def _chunks_there(self, name: str) -> np.ndarray:
        """Mask of stored chunks, bool (rows, columns)."""
        shape = self._array(name).cdata_shape
        there = np.zeros(shape, bool)
        for file in storage.list_files(storage.join(self.uri, self._path(name), "c")):
            place = file.split("/")
            if all(map(str.isdecimal, place)):  # skip other files, for example half-written ones
                there[tuple(map(int, place))] = True
        there = there.reshape(shape[:2])
        for axis, count in enumerate(self.tiling.block_shape):
            # Combine zarr chunks, because the last chunk of an axis may span several of them.
            there = np.logical_and.reduceat(there, np.arange(count), axis)
        return there

    def _read(self, name: str, box: Any = ...) -> np.ndarray:
        """Read from one of the arrays; what cannot be decoded is a `DamagedError`."""
        with storage.decoded(storage.join(self.uri, self._path(name)), REMEDY):
            return np.asarray(self._array(name)[box])

    def _stored(self, name: str) -> StoredArray:
        return StoredArray(storage.join(self.uri, self._path(name)), self._array(name), REMEDY)

    def _data(self, name: str) -> zarr.Array:
        """Open an array that stores empty chunks too, because a missing object means lost data."""
        return self._array(name).with_config({"write_empty_chunks": True})

    def _array(self, name: str) -> zarr.Array:
        place = storage.join(self.uri, self._path(name))
        with storage.explained(place):
            array = storage.open_array(place, f"{self.tiling} {self.k}")
        tiling = self.tiling
        shapes = {"grid": (*tiling.grid_shape, self.k, self.k), "valid": tiling.shape}
        if array.shape != shapes.get(name, tiling.block_shape):
            raise DamagedError(f"{place} has another shape than {self.uri} says{REMEDY}.")
        return array

    def _path(self, name: str) -> str:
        return f"g{self.generation}/{name}"


@fallible
def save_chunk(
    chunk: InferredChunk,
    store: GridStore,
    passes: Passes | None = None,
    *,
    block_id: tuple[int, int],
) -> ChunkReport:
    """Store a chunk on the worker that computed it, and return its report."""
    tiling = store.tiling
    done, last = (-1, tiling.passes - 1) if passes is None else (passes.done[block_id], passes.last)
    ran = store.write(chunk, *block_id, last)
    give_back()
    total = int(np.count_nonzero(tiling.in_passes(*block_id, int(done), last)))
    return ChunkReport(
        grid=store.uri,
        ran=ran,
        empty=total - ran,
        runs=chunk.runs,
        seconds=chunk.seconds,
        process=process_name(),
        counters=storage.counters(),
        peak_memory=peak_memory(),
    )


def process_name() -> str:
    """Return host and process id, which name a process in a cluster."""
    return f"{socket.gethostname()}:{os.getpid()}"


def encode(grid: np.ndarray) -> np.ndarray:
    """Convert probabilities to uint16 codes; NaN (no tile ran) becomes 0."""
    ran = ~np.isnan(grid)
    return np.where(ran, np.rint(np.where(ran, grid, 0) * STEPS) + 1, 0).astype(np.uint16)


def decode(codes: np.ndarray) -> np.ndarray:
    """Convert uint16 codes to float32 probabilities; NaN where no tile ran.

    The error is at most 1 / 131068.
    """
    probability = (codes.astype(np.float32) - 1) / STEPS
    return np.where(codes > 0, probability, np.float32(np.nan))
