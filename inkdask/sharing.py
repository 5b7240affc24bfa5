"""Plans of one place: their volumes are cut out of one, so that each block is read once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import dask.array as da

from inkdask.box import Box
from inkdask.failures import read_or_fail
from inkdask.plan import Plan, average
from inkdask.segment import Segment, open_segment
from inkdask.specs import NO_MASK


def shared(plans: Sequence[Plan]) -> list[Plan]:
    """Return the plans, in their order, so that those of one place share what they read.

    A place is a region of interest of a segment: the plans may read other layers of it, in another
    direction, and in other tiles.
    """
    groups: dict[Any, list[int]] = {}
    for number, plan in enumerate(plans):
        place = plan.segment and (plan.segment.uri, plan.segment.level, plan.roi_xyxy)
        groups.setdefault(place or number, []).append(number)
    result = list(plans)
    for group in groups.values():
        if len(group) > 1:
            whole = _whole([plans[number] for number in group])
            volume = whole.lazy(read_or_fail)[0]
            for number in group:
                result[number] = _cut_out(plans[number], whole, volume)
    return result


def _whole(plans: Sequence[Plan]) -> Segment:
    """Return the segment with the layers and pixels that any of the plans reads."""
    numbers = {number for plan in plans for number in plan.layers}
    segments: list[Any] = [plan.segment for plan in plans]
    whole = next((it for it in segments if numbers <= {*it.layers}), None)
    if whole is None:
        of_all = min(numbers), max(numbers) + 1
        whole = open_segment(segments[0].uri, of_all, mask=NO_MASK, level=segments[0].level)
    first, last = (whole.layers.index(number) for number in (min(numbers), max(numbers)))
    boxes = [Box.at(plan.corner, plan.tiling.shape) for plan in plans]
    rows = slice(min(box.top for box in boxes), max(box.bottom for box in boxes))
    columns = slice(min(box.left for box in boxes), max(box.right for box in boxes))
    return whole.take(slice(first, last + 1)).crop(rows, columns)


def _cut_out(plan: Plan, whole: Segment, volume: da.Array) -> Plan:
    """Return a plan with its volume cut out of that of ``whole``, which has all that it reads."""
    order = [whole.layers.index(number) for number in plan.layers]
    corner = whole.box.corner if whole.box else (0, 0)
    part = volume[:, *Box.at(plan.corner, plan.tiling.shape).inside(corner).slices]
    return replace(plan, volume=average(part[order], plan.averaged))
