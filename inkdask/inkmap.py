"""The lazy prediction that a notebook gets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import dask.array as da

from inkdask import coarse, showing
from inkdask.background import Background
from inkdask.blending import spread
from inkdask.box import Box
from inkdask.job import Job
from inkdask.plan import Plan
from inkdask.progress import size
from inkdask.specs import BlendMode, Network
from inkdask.tiling import Tiling


@dataclass(frozen=True, eq=False, repr=False)
class InkMap:
    """A lazy prediction: computing a part of it runs only the chunks that the part touches.

    Attributes
    ----------
    map
        Ink probability, dask float32 (y, x) in [0, 1]; 0 where all layers are zero.
    grid
        Tile probabilities, dask float32 (gy, gx, k, k); NaN where a tile is empty.
    reached
        Pixels that have data, of all that tiles of the picture reach, dask bool (y, x).
    plan
        Segment, layers, tiles and network.
    blend_mode, gaussian_sigma
        The blending window.
    progressive
        Whether the background computes from coarse to fine.
    job
        Job whose grid stores a progressive prediction; None for a plain one.
    pixel_um
        Side of a pixel in micrometers; None where it is not known.
    """

    map: da.Array
    grid: da.Array
    reached: da.Array
    plan: Plan
    blend_mode: BlendMode = "hann"
    gaussian_sigma: float = 0.0
    progressive: bool = False
    job: Job | None = None
    pixel_um: float | None = None

    @property
    def valid(self) -> da.Array:
        """Pixels of the picture that have data, dask bool (y, x)."""
        return self.reached[self.plan.region.slices]

    @property
    def spread(self) -> da.Array:
        """Standard deviation of the opinions that a pixel got, dask float32 (y, x) in [0, 0.5].

        It is made of `grid`, or of the stored grid of a progressive prediction once that is whole.
        """
        grid, valid, stored = self.grid, self.reached, self.job and self.job.grid
        if stored and stored.label(stored.uri) and stored.chunks_done().all():
            grid, valid = stored.grid(), stored.valid()
        window = self.blend_mode, self.gaussian_sigma
        return spread(grid, valid, self.tiling, *window)[self.plan.region.slices]

    @property
    def background(self) -> Background:
        """Runner that computes it in the background, shared by equal predictions."""
        return Background.of(self.grid.name, self.plan, self.job, self.progressive)

    def start(self) -> None:
        """Compute all of it in the background; `so_far` is the part that is done.

        A progressive prediction goes from coarse to fine over the whole segment. It is stored: the
        next session, or `run` with the same words, goes on from it.
        """
        self.background.start()

    def focus(self, y0: int, y1: int, x0: int, x1: int) -> None:
        """Compute a region of the picture before all else, in the background; in pixels."""
        self.background.focus(Box(y0, y1, x0, x1))

    def wait(self, seconds: float | None = None) -> None:
        """Wait until the background has nothing more to compute."""
        self.background.wait(seconds)

    @property
    def so_far(self) -> da.Array:
        """Picture of all tiles that the background has run, dask float32 (y, x); else 0."""
        grid, passes = self.background.grid, self.background.passes.copy()
        window = self.blend_mode, self.gaussian_sigma, self.plan.family
        ink = coarse.so_far(grid, passes, *window)
        return ink[self.plan.region.slices]

    @property
    def tiling(self) -> Tiling:
        """Where the tiles lie."""
        return self.plan.tiling

    @property
    def network(self) -> Network:
        """Network that the tiles go through."""
        return self.plan.network

    def __repr__(self) -> str:
        place = self.plan.segment.uri if self.plan.segment else "array"
        return f"<InkMap of {place}: {size(self.map.shape)}, model {self.network.model.key}>"

    def show(self, **options: Any) -> Any:
        """Show it in Jupyter, over or beside the papyrus, in a `Viewer`; see `view.show_ink`."""
        return showing.view.show_ink(self, **options)

    def _repr_html_(self) -> str:
        return showing.view.ink_html(self)
