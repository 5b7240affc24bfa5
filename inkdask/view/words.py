"""Sentences about a background: what it computes, what the button would do, and how long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inkdask.background import Background, Wish
from inkdask.box import Box
from inkdask.progress import about

NAMES: dict[Wish, str] = {
    "focus": "the region", "box": "the box", "sight": "the view", "start": "all"
}  # fmt: skip


class Offer(NamedTuple):
    """What the button would do: its label, a sentence, and whether there is anything to do."""

    label: str
    sentence: str
    is_open: bool


def status(backgrounds: Sequence[Background], button: Offer | None = None) -> str:
    """Return one line on predictions of one segment: what went wrong, what runs, or what is done.

    ``button`` is what the viewer offers; it is mentioned where nothing runs.
    """
    for each in backgrounds:
        if each.failure:
            return each.failure
    if running := _running(backgrounds):
        return running
    passes = np.concatenate([each.passes.ravel() for each in backgrounds])
    last = max(each.finest for each in backgrounds)
    finest = np.concatenate([(each.passes == each.finest).ravel() for each in backgrounds])
    fine, total = int(finest.sum()), passes.size
    if fine == total:
        return f"All {total:,} chunks computed." if total > 1 else "The only chunk is computed."
    coarse = [
        f", {count:,} coarse (pass {number + 1} of {last + 1})"
        for number in range(last)
        if (count := np.count_nonzero((passes == number) & ~finest))
    ]
    said = f"{fine:,} of {total:,} chunks computed{''.join(coarse)}."
    return f"{said} {button.sentence}" if button and button.is_open else said


def offer(backgrounds: Sequence[Background], sight: Box, whole: Box) -> Offer:
    """Return what the button would compute: what is in sight and nobody has asked for."""
    is_whole = sight.holds(whole)
    label = "Compute all" if is_whole else "Compute view"
    left = [each.left_out(sight) for each in backgrounds]
    chunks, tiles = (sum(numbers) for numbers in zip(*left, strict=True))
    if not chunks:
        return Offer(label, "Nothing in sight is left to compute.", False)
    seconds = [
        None if each.pace is None else each.pace * count
        for each, (_, count) in zip(backgrounds, left, strict=True)
    ]
    known = [each for each in seconds if each is not None]
    cost = about(sum(known)) if len(known) == len(seconds) else f"{tiles:,} tiles"
    advice = "Zoom in or draw a box to compute a part. " if is_whole else ""
    return Offer(label, f"{advice}{label}: {cost}.", True)


def _running(backgrounds: Sequence[Background]) -> str:
    pairs = [(each, work) for each in backgrounds if (work := each.work)]
    if not pairs:
        return ""
    first, work = pairs[0]
    done, total = (sum(getattr(w, name) for _, w in pairs) for name in ("done", "total"))
    number = f", pass {work.number + 1} of {first.finest + 1}" if first.is_progressive else ""
    left = [each.pace and each.pace * w.tiles for each, w in pairs]
    known = [seconds for seconds in left if seconds]
    time = f"; {about(sum(known))} left" if len(known) == len(left) else ""
    return f"Computing {NAMES[work.wish]}{number}: {done:,} of {total:,} chunks{time}"
