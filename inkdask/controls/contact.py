"""The contact sheet of a sweep: a picture for each variant, at one scale."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import numpy as np
from numpy.typing import NDArray

from inkdask import storage
from inkdask.controls.table import Sweep, Variant
from inkdask.controls.variants import plan_of
from inkdask.pictures.overlay import flatten
from inkdask.pictures.scale_bar import fitting
from inkdask.pictures.sheets import A4, DIM, INK, MARK, Sheet, inked, on_light

MARGIN, GAP, SIDE = 14.0, 4.0, 27.0  # mm: of the page, between pictures, and of the rows' names
HEAD, UNDER, LEAST = 60.0, 9.0, 32.0  # mm: above and under pictures, and width of the smallest
Way = tuple[str, int, str]  # direction, stride and model
EXPLAINED = (
    "Every picture shows the same papyrus, which the network read through another window of layers "
    "or in another way; what it takes for ink is dark. Look for strokes that are there where the "
    "window holds the sheet, and vanish where it leaves the sheet or reads it backwards: what a "
    "network shows everywhere, it brings along."
)


def draw(sweep: Sweep, uri: str, pixel_um: float | None) -> None:
    """Draw the contact sheet of a sweep as a PNG, for A4; ``pixel_um`` is for the scale bar."""
    offsets = sorted({variant.offset for variant in sweep.variants})
    ways = list(dict.fromkeys(map(_way, sweep.variants)))
    papyrus = _joined([_papyrus(sweep, n) for n in range(len(sweep.windows))])
    aspect = papyrus.shape[0] / papyrus.shape[1]
    wide, across, down, columns, rows = max(
        _layout(aspect, A4[1], A4[0], offsets, ways), _layout(aspect, *A4, ways, offsets),
        key=lambda layout: layout[0],
    )  # fmt: skip
    tall = wide * aspect
    page = Sheet(across, max(down, HEAD + (len(rows) + 1) * (tall + UNDER + GAP)))
    y = _head(page, sweep)

    left = MARGIN + SIDE + GAP
    page.text(MARGIN, y, "papyrus", 9, width=SIDE)
    page.text(MARGIN, y + 4.4, "mean of the layers at the middle", 7.5, DIM, SIDE)
    page.picture(left, y, wide, papyrus)
    if pixel_um:
        length, label = fitting(10_000.0, papyrus.shape[1] * pixel_um)
        page.bar(left, y + tall + 2, length / pixel_um / papyrus.shape[1] * wide, label)
    page.text(left + wide + GAP, y, EXPLAINED, 8.5, DIM, across - left - wide - GAP - MARGIN)
    y += max(tall + UNDER, 24) + GAP
    for n, column in enumerate(columns):
        x, (first, *rest) = left + n * (wide + GAP), _named(column, sweep)
        end = page.text(x, y - 4, first, 9, width=wide)
        page.text(x, end - 0.6, ", ".join(rest), 7.5, DIM, wide)
    y += 4.8
    for row in rows:
        page.rule(MARGIN, y, across - 2 * MARGIN)
        y += 2
        first, *rest = _named(row, sweep)
        end = page.text(MARGIN, y, first, 10, width=SIDE)
        for words in rest:
            end = page.text(MARGIN, end, words, 8, DIM, SIDE)
        for it in sweep.variants:
            here = _way(it), it.offset
            if row in here:
                n = columns.index(next(key for key in here if key != row))
                _show(page, it, left + n * (wide + GAP), y, wide, tall, it is sweep.best)
        y += tall + UNDER
    with storage.writing(uri) as path:
        page.save(path, {"inkdask-sweep": json.dumps(sweep.to_json())})


def _layout(
    aspect: float, across: float, down: float, columns: list[Any], rows: list[Any]
) -> tuple[float, float, float, list[Any], list[Any]]:
    """Return the width of a picture on a page, in mm, and the layout."""
    wide = (across - 2 * MARGIN - SIDE - GAP * len(columns)) / len(columns)
    room = ((down - HEAD) / (len(rows) + 1) - UNDER - GAP) / aspect
    return max(min(wide, room), min(wide, LEAST)), across, down, columns, rows


def _way(it: Variant) -> Way:
    return it.direction, it.stride, it.model


def _named(key: Way | int, sweep: Sweep) -> list[str]:
    """Return the words for a row or a column."""
    if isinstance(key, tuple):
        return [key[0], f"stride {key[1]}", key[2]]
    some = next(it for it in sweep.variants if it.offset == key)
    words = f"offset {key:+d}" if key else "offset 0"
    return [words, f"layers {min(some.layers)} to {max(some.layers)}"]


def _head(page: Sheet, sweep: Sweep) -> float:
    """Write title, place and the suggestion; return where the head ends."""
    wide = page.width - 2 * MARGIN
    y = page.text(MARGIN, MARGIN - 3, f"Sweep of {sweep.segment.rsplit('/', 1)[-1]}", 17)
    windows = " and ".join(",".join(map(str, window)) for window in sweep.windows)
    today = datetime.now(UTC).date().isoformat()
    place = f"{sweep.segment}, pixels {windows} (x0,y0,x1,y1), {today}"
    y = page.text(MARGIN, y, place, 8, DIM, wide)
    for line in sweep.advice.split("\n"):
        y = page.text(MARGIN, y + 0.5, line, 8.5, INK, wide)
    return y + 4


def _show(
    page: Sheet, it: Variant, x: float, y: float, wide: float, tall: float, is_best: bool
) -> None:
    """Draw a variant with its numbers."""
    page.picture(x, y, wide, _joined([inked(r.grey, r.valid) for r in it.readings]), tall)
    if is_best:
        page.frame(x, y, wide, tall)
    first = f"agreement {it.agreement:.1f}" if it.auc is None else f"AUC {it.auc:.3f}"
    rest = f"contrast {it.contrast:.2f}"
    rest += "" if it.auc is None else f", agreement {it.agreement:.1f}"
    first += ", suggested" if is_best else ""
    y = page.text(x, y + tall + 0.8, first, 8.5, MARK if is_best else INK, wide)
    page.text(x, y - 0.5, rest, 7, DIM, wide)


def _papyrus(sweep: Sweep, window: int) -> NDArray[np.uint8]:
    """Return the mean of the layers about the middle, uint8 (y, x, 3)."""
    it = min(sweep.variants, key=lambda variant: abs(variant.offset))
    plan = plan_of(it.jobs[window])
    volume = np.asarray(plan.volume[:, *plan.region.slices])
    return on_light(flatten(volume, "mean"), it.readings[window].valid)


def _joined(pictures: list[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Put pictures of the windows side by side, uint8 (y, x, 3), on white."""
    height = max(picture.shape[0] for picture in pictures)
    gap = max(height // 40, 4)
    parts = []
    for picture in pictures:
        below = [(0, height - picture.shape[0]), (0, gap), (0, 0)]
        parts.append(np.pad(picture, below, constant_values=255))
    return np.concatenate(parts, axis=1)[:, :-gap]
