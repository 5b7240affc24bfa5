"""The table of a sweep: variants of a run, and what came of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any

import dask.array as da

from inkdask.controls.scores import Reading, agreement, contrast
from inkdask.controls.variants import pictures_of
from inkdask.identity import Recipe, Region, digest
from inkdask.job import Job
from inkdask.progress import clock
from inkdask.summary import Cost


@dataclass(frozen=True)
class Variant:
    """A way to run a region, and what came of it.

    Attributes
    ----------
    offset
        Distance of the window of layers from the middle.
    jobs, readings
        A job and its picture for each window of pixels.
    cost
        What it cost now.
    auc
        Area under the curve of the picture against labels; None without labels.
    """

    offset: int
    jobs: tuple[Job, ...]
    readings: tuple[Reading, ...]
    cost: Cost
    auc: float | None

    @property
    def recipe(self) -> Recipe:
        """What shapes its tiles in the first window; model, direction and stride among it."""
        return self.jobs[0].recipe

    @cached_property
    def contrast(self) -> float:
        """See `inkdask.controls.scores.contrast`."""
        return contrast(self.readings)

    @cached_property
    def agreement(self) -> float:
        """See `inkdask.controls.scores.agreement`."""
        return agreement(self.readings)

    @property
    def layers(self) -> str:
        """Its layers, as ``--layers`` names them."""
        return f"{min(self.recipe.layers)}:{max(self.recipe.layers) + 1}"

    @property
    def maps(self) -> list[da.Array]:
        """Ink of each window, dask float32 (y, x), of the stored grids."""
        return [pictures_of(job)[0] for job in self.jobs]

    @property
    def command(self) -> str | None:
        """Command of the run of the whole segment; None for a callable."""
        words = self.jobs[0].origin.command
        return shlex.join(words) if words else None

    @property
    def name(self) -> str:
        """The variant in words."""
        it = self.recipe
        return (
            f"{it.model}, layers {self.layers} (offset {self.offset:+d}), {it.direction}, "
            f"stride {it.stride}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the table says, and the recipes."""
        names = ("model", "direction", "stride", "weights")
        return {
            **{name: getattr(self.recipe, name) for name in names},
            **{name: getattr(self, name) for name in ("offset", "contrast", "agreement", "auc")},
            "layers": [*map(int, self.layers.split(":"))],
            "tiles_run": self.cost.tiles,
            "seconds": round(self.cost.seconds, 3),
            "recipes": [job.recipe.digest for job in self.jobs],
            "command": self.command,
        }


@dataclass(frozen=True)
class Sweep:
    """Table of variants.

    Attributes
    ----------
    segment, windows
        URI of the segment, and the regions ``x0, y0, x1, y1`` that were run.
    variants
        In the order of models, directions, strides and offsets.
    best
        The variant that is suggested; None where nothing stands out.
    advice
        A sentence on that.
    sheet, table
        URIs of the contact sheet, a PNG, and of the table as JSON.
    """

    segment: str
    windows: tuple[Region, ...]
    variants: tuple[Variant, ...]
    best: Variant | None
    advice: str
    sheet: str = ""
    table: str = ""

    @property
    def places(self) -> str:
        """The windows in words."""
        return " and ".join(",".join(map(str, window)) for window in self.windows)

    def to_json(self) -> dict[str, Any]:
        """Return all of it; the digest is that of the recipes."""
        variants = [variant.to_json() for variant in self.variants]
        return {
            "segment": self.segment,
            "windows": self.windows,
            "variants": variants,
            "suggested": self.best.command if self.best else None,
            "advice": self.advice,
            "sheet": self.sheet,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "digest": digest([variant["recipes"] for variant in variants]),
        }

    def __str__(self) -> str:
        heads = "model direction offset layers stride time contrast agreement AUC"
        rows = [heads.split()]
        for it in self.variants:
            time = clock(it.cost.seconds) if it.cost.tiles else "kept"
            score = "" if it.auc is None else f"{it.auc:.3f}"
            rows.append([
                it.recipe.model, it.recipe.direction, f"{it.offset:+d}", it.layers,
                str(it.recipe.stride), time, f"{it.contrast:.3f}", f"{it.agreement:.1f}",
                score + " <" * (it is self.best),
            ])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        return "\n".join([f"{self.segment}, region {self.places}", *lines, self.advice])
