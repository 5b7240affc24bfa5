"""Chunks of a prediction, computed by a thread while the program goes on.

The chunks go into a stored grid like that of a job: in a scratch folder that ends with the process,
or for a progressive prediction in the grid of the job itself, where the next session finds them.
No tile runs twice, and memory does not grow with the segment.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np

from inkdask import engine, paces
from inkdask.box import Box
from inkdask.errors import InkdaskError
from inkdask.inference import infer
from inkdask.job import Job
from inkdask.plan import Plan
from inkdask.provenance import recipe_of
from inkdask.specs import InferredChunk, Passes
from inkdask.storage.scratch import Scratch
from inkdask.store import GridStore
from inkdask.tiling import Axis

log = logging.getLogger(__name__)

AUTO_TILES = 20_000  # up to so many are computed by `see`
KEPT = 8  # backgrounds of a process, the latest used

Place = tuple[int, int]  # row and column of a chunk
Observer = Callable[[Place | None], None]
Wish = Literal["focus", "box", "sight", "start"]

_known: OrderedDict[Hashable, Background] = OrderedDict()
_lock = threading.Lock()


class Work(NamedTuple):
    """What a background is computing.

    Attributes
    ----------
    wish
        Which wish it serves.
    number
        Pass that is run, from 0.
    done, total
        Chunks that have this pass, and all that the wish needs.
    tiles
        Tiles that the wish still needs, those of later passes included.
    """

    wish: Wish
    number: int
    done: int
    total: int
    tiles: int


class Background:
    """Runner of the chunks of a prediction, one for each prediction and process.

    There are four wishes, and none cancels another: `focus`, a box that a person drew (`choose`),
    what is in `sight`, and `start`, which wants all. They are served in this order, but `start`
    shares its passes with the sight: each pass is done everywhere, in sight first. Boxes are in
    pixels of the picture, which is the plan's region.

    Attributes
    ----------
    passes
        Last pass that each chunk has, int (rows, columns); -1 for none.
    finest
        Number of the last pass.
    is_busy
        Whether chunks are being computed.
    failure
        Error of the last attempt, in one sentence; empty without one.
    observers
        Called, from any thread, with each chunk that has new tiles, and with None at the end.
    attached
        Objects that users of this background keep as long as it lives.
    """

    def __init__(self, plan: Plan, job: Job | None = None, progressive: bool = False) -> None:
        self._plan, self.is_progressive = plan, progressive
        self._tiling = plan.tiling
        self.passes = np.full(plan.tiling.block_shape, -1)
        self.finest = plan.tiling.passes - 1
        self.is_busy, self.failure = False, ""
        self.observers: list[Observer] = []
        self.attached: dict[Hashable, Any] = {}
        self._wishes: dict[Wish, list[Place]] = {}
        self._in_sight: list[Place] = []  # also those that are too many to be a wish
        self._spent = self._ran = 0.0  # seconds, and tiles; the latest weigh most
        self._blocks: dict[int, np.ndarray] = {}  # of Delayed, for each pass
        self._grid: GridStore | None = None
        self._thread: threading.Thread | None = None  # the last one
        self._turn = threading.Lock()
        if job is not None:
            job.create()
            self._grid = job.grid
            self.passes[:] = job.grid.passes_done()

    @classmethod
    def of(cls, name: str, plan: Plan, job: Job | None, progressive: bool) -> Background:
        """Return the background of the tiles of this name, the same for all who ask."""
        key = name, plan.region, progressive, job and job.grid
        with _lock:
            background = _known.pop(key, None) or cls(plan, job, progressive)
            _known[key] = background
            while len(_known) > KEPT:
                _known.popitem(last=False)
        return background

    @property
    def grid(self) -> GridStore:
        """Where the chunks are stored; a scratch folder is made at the first use."""
        with self._turn:
            if self._grid is None:
                self._folder = Scratch()
                self._grid = GridStore.at(f"{self._folder.path}/grid.zarr", recipe_of(self._plan))
                self._grid.make_arrays()
            return self._grid

    @property
    def known(self) -> np.ndarray:
        """Chunks that have all of their tiles, or the coarsest, bool (rows, columns)."""
        return self.passes >= 0

    @property
    def work(self) -> Work | None:
        """What is being computed, or None."""
        with self._turn:
            wish, missing = self._first_wish() if self.is_busy else ("start", [])
            places = self._wishes.get(wish, [])
        if not missing:
            return None
        number = self._pass_after(missing)
        done = sum(bool(self.passes[place] >= number) for place in places)
        return Work(wish, number, done, len(places), self._tiles_of(missing))

    @property
    def pace(self) -> float | None:
        """Time of a tile, in seconds; None before the first tile of the network here."""
        return self._spent / self._ran if self._ran else paces.measured(self._plan.network)

    def start(self) -> None:
        """Compute all chunks; a progressive prediction does each pass over all of them."""
        self._want("start", list(np.ndindex(self.passes.shape)))

    def focus(self, box: Box) -> None:
        """Compute the chunks of a box, however many, before all others."""
        earlier = self._missing(self._wishes.get("focus", []))
        self._want("focus", [*dict.fromkeys(self._reaching(box) + earlier)])

    def choose(self, box: Box | None) -> None:
        """Compute the chunks of the box that a person drew; None withdraws this wish."""
        self._want("box", self._reaching(box) if box else [])

    def see(self, box: Box) -> None:
        """Compute the chunks of a box, if they lack at most `AUTO_TILES` tiles."""
        places = self._reaching(box)
        is_small = self._tiles_of(self._missing(places)) <= AUTO_TILES
        self._in_sight = places
        self._want("sight", places if is_small else [])

    def left_out(self, box: Box) -> tuple[int, int]:
        """Count the chunks of a box that lack tiles and were not asked for, and their tiles."""
        with self._turn:
            wanted = {place for places in self._wishes.values() for place in places}
        missing = [p for p in self._missing(self._reaching(box)) if p not in wanted]
        return len(missing), self._tiles_of(missing)

    def wait(self, seconds: float | None = None) -> None:
        """Wait until nothing is being computed, and the observers know it.

        Raises an `InkdaskError` for what could not be computed.
        """
        with self._turn:
            thread = self._thread
        if thread is not None:
            thread.join(seconds)
        if self.failure:
            raise InkdaskError(self.failure)

    def pixels_of(self, place: Place) -> Box:
        """Return the pixels of the volume that a chunk is."""
        (row, column), (y, x) = place, (self._tiling.y.edges, self._tiling.x.edges)
        return Box(int(y[row]), int(y[row + 1]), int(x[column]), int(x[column + 1]))

    def chunks_in(self, box: Box) -> list[Place]:
        """Return the chunks that meet a box, those about its middle first."""
        inside = box.shift(*self._plan.region.corner)

        def distance(place: Place) -> float:
            chunk = self.pixels_of(place)
            return float(np.hypot(
                chunk.top + chunk.bottom - inside.top - inside.bottom,
                chunk.left + chunk.right - inside.left - inside.right,
            ))  # fmt: skip

        rows = _meeting(self._tiling.y, inside.top, inside.bottom)
        columns = _meeting(self._tiling.x, inside.left, inside.right)
        return sorted(itertools.product(rows, columns), key=distance)

    def _reaching(self, box: Box) -> list[Place]:
        """Chunks of a box, and those before them, whose tiles reach into them."""
        places = dict.fromkeys(self.chunks_in(box))
        for row, column in list(places):
            for before in ((row - 1, column), (row, column - 1), (row - 1, column - 1)):
                if min(before) >= 0:
                    places.setdefault(before)
        return list(places)

    def _missing(self, places: Sequence[Place]) -> list[Place]:
        return [place for place in places if self.passes[place] < self.finest]

    def _tiles_of(self, places: Sequence[Place]) -> int:
        """Number of tiles that chunks lack."""
        if not places:
            return 0
        tiles = self._tiling.tiles_until(self.finest) - self._tiling.tiles_there(self.passes)
        return int(tiles[tuple(np.transpose(places))].sum())

    def _want(self, wish: Wish, places: list[Place]) -> None:
        with self._turn:
            self._wishes[wish] = places
            if not self.is_busy and any(map(self._missing, self._wishes.values())):
                self.is_busy, self.failure = True, ""
                self._thread = threading.Thread(target=self._work, name="ink", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        try:
            while True:
                with self._turn:
                    number, batch = self._next()
                    if not batch:
                        self.is_busy = False
                        break
                blocks = self._delayed(number)
                tasks = [blocks[place] for place in batch]
                began, tiles = time.monotonic(), self._tiles_of(batch)
                engine.compute_each(tasks, partial(self._receive, number, batch)).check()
                self._spent = self._spent / 2 + time.monotonic() - began
                self._ran = self._ran / 2 + tiles - self._tiles_of(batch)
        except Exception as error:
            # No caller waits here, so `failure` and `wait` report the error.
            if not isinstance(error, InkdaskError):
                log.exception("a chunk could not be computed in the background")
            with self._turn:
                self.failure = str(error) or type(error).__name__
                self._wishes, self.is_busy = {}, False
        self._tell(None)

    def _next(self) -> tuple[int, list[Place]]:
        """Return a pass, and the chunks of one row, which read together, to compute now."""
        wish, missing = self._first_wish()
        if not missing:
            return self.finest, []
        if wish == "start":
            missing = self._missing([*dict.fromkeys(self._in_sight + missing)])
        number = self._pass_after(missing)
        if self.is_progressive:
            missing = [place for place in missing if self.passes[place] == number - 1]
        batch = [place for place in missing if place[0] == missing[0][0]]
        return number, batch[: _abreast()]

    def _first_wish(self) -> tuple[Wish, list[Place]]:
        """Return the wish that is served first, and the chunks that it lacks."""
        last: Wish = "start" if self._wishes.get("start") else "sight"  # `start` takes it along
        for wish in ("focus", "box", last):
            if missing := self._missing(self._wishes.get(wish, [])):
                break
        return wish, missing

    def _pass_after(self, missing: Sequence[Place]) -> int:
        """Return the pass that chunks need next, the coarsest first."""
        if not self.is_progressive:
            return self.finest
        return int(min(self.passes[place] for place in missing)) + 1

    def _delayed(self, number: int) -> np.ndarray:
        """Tasks of all chunks for a pass, Delayed (rows, columns)."""
        if number not in self._blocks:
            plan = self._plan
            done = number - 1 if self.is_progressive else -1
            passes = Passes(np.full(self.passes.shape, done), number)
            chunks = infer(plan.volume, plan.tiling, plan.network, plan.mask, passes).chunks
            self._blocks[number] = chunks.to_delayed()
        return self._blocks[number]

    def _receive(self, number: int, batch: list[Place], task: int, chunk: InferredChunk) -> None:
        place = batch[task]
        self.grid.write(chunk, *place, number)
        self.passes[place] = number
        self._tell(place)

    def _tell(self, place: Place | None) -> None:
        for observer in list(self.observers):
            observer(place)


def _meeting(axis: Axis, start: int, stop: int) -> range:
    """Chunks of an axis that meet the pixels ``start`` to ``stop``."""
    first = int(np.searchsorted(axis.edges, start, "right")) - 1
    after = int(np.searchsorted(axis.edges, stop, "left"))
    return range(max(first, 0), min(after, len(axis.chunks)))


def _abreast() -> int:
    """Number of chunks computed side by side: a few, so that a new wish is served soon."""
    client = engine.current_client()
    return 3 if client is None else max(3, sum(client.nthreads().values()))
