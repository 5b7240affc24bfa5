"""The contact sheet of a sweep: a picture for each variant, at one scale."""

from __future__ import annotations

import json
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from inkdask import storage
from inkdask.controls.table import Sweep, Variant
from inkdask.job import plan_of
from inkdask.pictures.overlay import flatten, papyrus_colours
from inkdask.pictures.sheets import DIM, GAP, MARGIN, NO_DATA, TITLE, WORDS, Panel, Sheet, inked

EXPLAINED = (
    "Every picture shows the same papyrus, which the network read through another window of layers "
    "or in another way; what it takes for ink is dark. Look for strokes that are there where the "
    "window holds the sheet, and vanish where it leaves the sheet or reads it backwards: what a "
    "network shows everywhere, it brings along."
)


def draw(sweep: Sweep, uri: str, pixel_um: float | None) -> None:
    """Draw the contact sheet of a sweep as a PNG, for A4; ``pixel_um`` is for the scale bar."""
    of_offset = {it.offset: [v for v in sweep.variants if v.offset == it.offset]
                 for it in sorted(sweep.variants, key=lambda it: it.offset)}  # fmt: skip
    ways = max(map(len, of_offset.values()))
    panels = [_panel(it, it is sweep.best) for it in sweep.variants]
    sheet = Sheet(panels, (len(of_offset), ways), around=62, spare=1)
    if sheet.columns == ways:  # a row for each offset
        panels = [_panel(it, it is sweep.best) for row in of_offset.values() for it in row]
    y = sheet.text(MARGIN, MARGIN - 3, f"Sweep of {sweep.segment.rsplit('/', 1)[-1]}", 17)
    today = datetime.now(UTC).date().isoformat()
    place = f"{sweep.segment}, pixels {sweep.places} (x0,y0,x1,y1), {today}"
    y = sheet.text(MARGIN, y, place, 8, DIM)
    for line in sweep.advice.split("\n"):
        y = sheet.text(MARGIN, y + 0.5, line, 8.5)
    y += 4
    papyrus = _joined([_papyrus(sweep, n) for n in range(len(sweep.windows))])
    sheet.panel(MARGIN, y, Panel("Papyrus", papyrus, notes=["mean of the layers at the middle"]))
    sheet.scale(y, papyrus.shape[1], pixel_um)
    sheet.text(MARGIN + sheet.wide + GAP, y + TITLE - 1, EXPLAINED, 8.5, DIM)
    sheet.draw(panels, y + sheet.tall + WORDS)
    with storage.writing(uri) as path:
        sheet.save(path, {"inkdask-sweep": json.dumps(sweep.to_json())})


def _panel(it: Variant, is_best: bool) -> Panel:
    """Return a variant with its numbers."""
    numbers = [] if it.auc is None else [f"AUC {it.auc:.3f}"]
    numbers += [f"agreement {it.agreement:.1f}", f"contrast {it.contrast:.2f}"]
    says = numbers[0] + ", suggested" * is_best
    layers = f"layers {it.layers}, stride {it.recipe.stride}"
    picture = _joined([inked(reading.grey, reading.valid) for reading in it.readings])
    title = f"offset {it.offset:+d}, {it.recipe.direction}".replace("+0", "0")
    return Panel(title, picture, says, [numbers[1], layers, it.recipe.model], is_best)


def _papyrus(sweep: Sweep, window: int) -> NDArray[np.uint8]:
    """Return the mean of the layers about the middle, uint8 (y, x, 3)."""
    it = min(sweep.variants, key=lambda variant: abs(variant.offset))
    plan, valid = plan_of(it.jobs[window]), it.readings[window].valid
    mean = flatten(np.asarray(plan.volume[:, *plan.region.slices]), "mean")
    low, high = np.percentile(mean[valid], [1, 99.5]) if valid.any() else (0, 255)
    colours = np.rint(papyrus_colours(low, high)).astype(np.uint8)
    return np.where(valid[..., None], colours[mean], NO_DATA)


def _joined(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Put pictures of the windows side by side, uint8 (y, x, 3), on white."""
    height = max(picture.shape[0] for picture in pictures)
    gap = max(height // 40, 4)
    parts = []
    for picture in pictures:
        below = [(0, height - picture.shape[0]), (0, gap), (0, 0)]
        parts.append(np.pad(picture, below, constant_values=255))
    return np.concatenate(parts, axis=1)[:, :-gap]
