"""The lazy prediction of `inkdask.predict`, computed where somebody looks.

Chunks in sight are computed in the background, from the middle of the view outwards, into a grid
like that of a job, in a scratch folder that goes with the process: no tile runs twice, and memory
does not grow with the segment. A progressive prediction goes from coarse to fine, in the very grid
of the job, so that it is there again tomorrow.
"""

from __future__ import annotations

import logging
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Hashable
from functools import partial
from typing import TYPE_CHECKING, Any

import dask.array as da
import numpy as np

from inkdask import engine
from inkdask.blending import blend, blend_chunk
from inkdask.errors import InkdaskError
from inkdask.inference import infer
from inkdask.provenance import recipe_of
from inkdask.specs import InferredChunk, Passes
from inkdask.store import GridStore
from inkdask.tiling import Axis
from inkdask.view.tiles import Ink, Window

if TYPE_CHECKING:
    from inkdask.inkmap import InkMap

log = logging.getLogger(__name__)

AUTO_TILES = 20_000  # in sight: as many are computed unasked
KEPT_PREDICTIONS = 8  # whose chunks a process remembers

_known: OrderedDict[Hashable, LazyInk] = OrderedDict()
_lock = threading.Lock()


def lazy_ink(ink: InkMap) -> LazyInk:
    """What was computed of a prediction so far, in any viewer of this process."""
    name = ink.map.name, ink.progressive, ink.job and ink.job.grid
    with _lock:
        picture = _known.pop(name, None) or LazyInk(ink)
        _known[name] = picture
        while len(_known) > KEPT_PREDICTIONS:
            _known.popitem(last=False)
    return picture


class LazyInk(Ink):
    """The picture of a lazy prediction."""

    def __init__(self, ink: InkMap) -> None:
        super().__init__(ink.map)
        self._ink, self._tiling = ink, ink.plan.tiling
        self._passes = np.full(self._tiling.block_shape, -1)  # the last that each chunk has
        self._last = self._tiling.passes - 1
        self._folder: Any = None  # made with the first chunk
        self._store: GridStore | None = None
        self._blocks: dict[int, np.ndarray] = {}  # of Delayed, for each pass
        self._wanted: list[tuple[int, int]] = []
        self._first: list[tuple[int, int]] = []
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self._failure = ""
        self._left_out = 0
        if ink.job is not None:  # what an earlier session has computed is shown again
            self._open_store()
            for row, column in np.argwhere(self.known):
                self.refresh(int(row), int(column))

    @property
    def known(self) -> np.ndarray:
        """Chunks whose own tiles were computed, or the coarsest of them."""
        return self._passes >= 0

    @property
    def is_busy(self) -> bool:
        """Whether chunks are being computed."""
        return self._thread is not None

    @property
    def status(self) -> str:
        """How far it is, what it waits for, or what went wrong."""
        if self._failure:
            return self._failure
        if self._left_out:
            return (
                f"{super().status}; {self._left_out:,} in sight are many: zoom in, draw a box, or "
                "press Compute"
            )
        to_come = len(self._missing(self._first + self._wanted))
        if self._ink.progressive:
            return (
                f"pass {min(int(self._passes.min()) + 2, self._last + 1)} of {self._last + 1}, "
                f"{np.count_nonzero(self._passes == self._last):,} of {self._passes.size:,} chunks "
                "at their finest"
            )
        return super().status + (f", {to_come:,} to come" if to_come else "")

    def start(self) -> None:
        """Compute all chunks; a progressive prediction goes over the whole of them pass by pass."""
        with self._turn:
            self._wanted = list(np.ndindex(self._passes.shape))
            self._left_out = 0
        self._go_on()

    @property
    def so_far(self) -> da.Array:
        """The picture of all that is there now, dask float32 (y, x); 0 where nothing is yet."""
        ink, store = self._ink, self._open_store()
        blended = blend(
            store.grid(), store.valid(), self._tiling, ink.blend_mode, ink.gaussian_sigma
        )
        return blended[ink.plan.region.slices]

    def see(self, window: Window) -> None:
        """Compute the chunks in sight, if they are few."""
        missing = self._missing(self._reaching(window))
        is_small = sum(self._tiles_of(*place) for place in missing) <= AUTO_TILES
        with self._turn:
            self._left_out = 0 if is_small else len(missing)
            self._wanted = missing if is_small else []
        self._go_on()

    def focus(self, window: Window) -> None:
        """Compute the chunks of a window, however many, before all others."""
        with self._turn:
            self._first = self._missing(self._reaching(window))
            self._left_out = 0
        self._go_on()

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is being computed.

        Raises
        ------
        InkdaskError
            When something could not be, so that parts are missing.
        """
        thread = self._thread
        if thread is not None:
            thread.join(seconds)
        if self._failure:
            raise InkdaskError(self._failure)

    def _reaching(self, window: Window) -> list[tuple[int, int]]:
        """Chunks of a window, and those before them, whose tiles reach into them."""
        places = dict.fromkeys(self.chunks_in(window))
        for row, column in list(places):
            for before in ((row - 1, column), (row, column - 1), (row - 1, column - 1)):
                if min(before) >= 0:
                    places.setdefault(before)
        return list(places)

    def _tiles_of(self, row: int, column: int) -> int:
        rows, columns = self._tiling.grid_chunks
        return rows[row] * columns[column]

    def _missing(self, places: list[tuple[int, int]]) -> list[tuple[int, int]]:
        return [place for place in dict.fromkeys(places) if self._passes[place] < self._last]

    def _go_on(self) -> None:
        with self._turn:
            if self._thread is None and self._missing(self._first + self._wanted):
                self._failure = ""
                self._thread = threading.Thread(target=self._work, name="ink", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                with self._turn:
                    number, batch = self._next()
                    if not batch:
                        self._thread = None
                        break
                blocks = self._delayed(number)
                tasks = [blocks[place] for place in batch]
                engine.raise_any(engine.compute_each(tasks, partial(self._receive, number)))
        except Exception as error:
            # Nobody called: what went wrong is shown in the viewer.
            if not isinstance(error, InkdaskError):
                log.exception("a chunk in sight could not be computed")
            with self._turn:
                self._failure = str(error) or type(error).__name__
                self._first, self._wanted, self._thread = [], [], None
        for observer in list(self.observers):  # that it is over
            observer((slice(0, 0), slice(0, 0)))

    def _next(self) -> tuple[int, list[tuple[int, int]]]:
        """A pass, and chunks to compute side by side: of one row, as they are read together."""
        missing = self._missing(self._first) or self._missing(self._wanted)
        if self._ink.progressive and missing:
            least = min(self._passes[place] for place in missing)
            missing = [place for place in missing if self._passes[place] == least]
            number = int(least) + 1
        else:
            number = self._last
        batch = [place for place in missing if place[0] == missing[0][0]]
        return number, batch[: _abreast()]

    def _open_store(self) -> GridStore:
        if self._store is None:
            plan, job = self._ink.plan, self._ink.job
            if job is None:
                self._folder = tempfile.TemporaryDirectory(prefix="inkdask-view-")
                recipe = recipe_of(plan)
                self._store = GridStore.at(f"{self._folder.name}/grid.zarr", recipe)
                self._store.make_arrays()
            else:
                self._store = job.grid
                job.create()
                self._passes[:] = self._store.passes_done()
        return self._store

    def _delayed(self, number: int) -> np.ndarray:
        if number not in self._blocks:
            plan = self._ink.plan
            done = number - 1 if self._ink.progressive else -1
            passes = Passes(np.full(self._passes.shape, done), number)
            chunks = infer(plan.volume, plan.tiling, plan.network, plan.mask, passes).chunks
            located = da.map_blocks(
                _locate, chunks, meta=np.empty((0, 0), object), enforce_ndim=False
            )
            self._blocks[number] = located.to_delayed()
        return self._blocks[number]

    def _receive(self, number: int, located: tuple[tuple[int, int], InferredChunk]) -> None:
        (row, column), chunk = located
        self._open_store().write(chunk, row, column, number)
        self._passes[row, column] = number
        rows, columns = self._passes.shape
        for y in range(row, min(row + 2, rows)):  # its tiles reach into those after it
            for x in range(column, min(column + 2, columns)):
                if self.known[y, x]:
                    self.refresh(y, x)

    def _chunk(self, row: int, column: int) -> np.ndarray:
        tiling, ink, store = self._tiling, self._ink, self._open_store()
        tiles = _reach(tiling.y, row), _reach(tiling.x, column)
        pixels = (
            slice(int(tiling.y.edges[row]), int(tiling.y.edges[row + 1])),
            slice(int(tiling.x.edges[column]), int(tiling.x.edges[column + 1])),
        )
        whole = blend_chunk(
            *store.read(tiles, pixels),
            np.array([row]),
            np.array([column]),
            tiling,
            ink.blend_mode,
            ink.gaussian_sigma,
        )
        inside = tuple(
            slice(max(kept.start - span.start, 0), min(kept.stop, span.stop) - span.start)
            for kept, span in zip(ink.plan.region.slices, pixels, strict=True)
        )
        return np.asarray(whole[inside])


def _reach(axis: Axis, index: int) -> slice:
    """Grid rows of a chunk, and those before it that reach into it."""
    return slice(max(int(axis.rows[index]) - axis.depth, 0), int(axis.rows[index + 1]))


def _locate(
    chunk: InferredChunk, block_id: tuple[int, int]
) -> tuple[tuple[int, int], InferredChunk]:
    return block_id, chunk


def _abreast() -> int:
    """Chunks that are computed side by side: a few, so that a new view is served soon."""
    client = engine.current_client()
    return 3 if client is None else max(3, sum(client.nthreads().values()))
