"""The table of a sweep: variants of a run, and what came of them."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import dask.array as da

from inkdask.controls.scores import Reading
from inkdask.controls.variants import Cost, pictures_of
from inkdask.identity import Region, digest
from inkdask.job import Job
from inkdask.progress import clock


@dataclass(frozen=True)
class Variant:
    """A way to run a region, and what came of it.

    Attributes
    ----------
    model, direction, offset, stride
        Name of the model, direction of the layers, distance of the window from the middle in
        layers, and stride in pixels.
    jobs
        A job for each window.
    readings
        Pictures of the windows.
    cost
        What it cost now.
    contrast, agreement, auc
        See `inkdask.controls.scores`; the AUC is None without labels.
    """

    model: str
    direction: str
    offset: int
    stride: int
    jobs: tuple[Job, ...]
    readings: tuple[Reading, ...]
    cost: Cost
    contrast: float
    agreement: float
    auc: float | None

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers, in the order in which the network reads them."""
        return self.jobs[0].recipe.layers

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
        start, end = min(self.layers), max(self.layers) + 1
        return (
            f"{self.model}, layers {start}:{end} (offset {self.offset:+d}), {self.direction}, "
            f"stride {self.stride}"
        )

    def to_json(self) -> dict[str, Any]:
        """Return what the table says, and the recipes."""
        ran, seconds = self.cost.tiles, round(self.cost.seconds, 3)
        names = ("model", "direction", "offset", "stride", "contrast", "agreement", "auc")
        return {
            **{name: getattr(self, name) for name in names},
            "layers": [min(self.layers), max(self.layers) + 1],
            "tiles_run": ran,
            "seconds": seconds,
            "weights": self.jobs[0].recipe.weights,
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
        URIs of the contact sheet and of ``sweep.json``.
    """

    segment: str
    windows: tuple[Region, ...]
    variants: tuple[Variant, ...]
    best: Variant | None
    advice: str
    sheet: str = ""
    table: str = ""

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
        heads = [
            "model",
            "direction",
            "offset",
            "layers",
            "stride",
            "time",
            "contrast",
            "agreement",
        ]
        rows = [[*heads, "AUC"]]
        for it in self.variants:
            time = clock(it.cost.seconds) if it.cost.tiles else "kept"
            layers = f"{min(it.layers)}:{max(it.layers) + 1}"
            score = "" if it.auc is None else f"{it.auc:.3f}"
            rows.append([
                it.model, it.direction, f"{it.offset:+d}", layers, str(it.stride), time,
                f"{it.contrast:.3f}", f"{it.agreement:.1f}", score + " <" * (it is self.best),
            ])  # fmt: skip
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        windows = " and ".join(",".join(map(str, window)) for window in self.windows)
        return "\n".join([f"{self.segment}, region {windows}", *lines, self.advice])
