"""Records of jobs, ``<ZARR_OUTPUT_DIR>/jobs/<digest>.json``, by which `reduce` finds a grid."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.identity import Said, differences
from inkdask.storage.parallel import for_each

log = logging.getLogger("inkdask")

FOLDER = "jobs"
SHOWN = 3  # jobs that a sentence names


def keep(folder: str, said: Said, grid: str) -> None:
    """Write the record of a job; one of the same words is replaced."""
    place = storage.join(folder, FOLDER, f"{said.digest[:16]}.json")
    storage.write_bytes(place, json.dumps({"said": said.to_json(), "grid": grid}).encode())


def find(folder: str, asked: Mapping[str, Any], first: str) -> str:
    """Find the grid of the one job that was asked for; ``first`` says how to run it."""
    jobs = _read_all(folder)
    # A region is made of its own grid, or cut out of that of the whole segment.
    for wanted in (asked, {**asked, "roi_xyxy": None}):
        if fitting := {grid: said for said, grid in jobs if not differences(said, wanted)}:
            break
    if len(fitting) == 1:
        return next(iter(fitting))
    if fitting:
        (one, said), *others = fitting.items()
        words = "; ".join(f"in {uri}, {differences(said, it)}" for uri, it in others[: SHOWN - 1])
        there = f"{len(fitting)} jobs in {folder} are meant, the first in {one}; "
        there += words.replace(" there and ", " in the first and ")
        raise InkdaskError(f"{there}: say which, or name one with --grid.")
    apart = {(grid, differences(said, asked)) for said, grid in jobs}
    near = sorted(apart, key=lambda job: (job[1].count(" there and "), *job))
    there = "; ".join(f"in {uri}, {words}" for uri, words in near[:SHOWN]) or "it has none"
    more = f"; and {len(near) - SHOWN} that differ more" if len(near) > SHOWN else ""
    raise InkdaskError(f"No job in {folder} is this one: {there}{more}; {first}")


def _read_all(folder: str) -> list[tuple[Said, str]]:
    """Read what was said, and the grid, of every job; one that is damaged blocks no other."""
    place, jobs = storage.join(folder, FOLDER), []
    names = (entry.name for entry in storage.list_folder(place))
    uris = [storage.join(place, name) for name in names if name.endswith(".json")]
    for uri, text in zip(uris, for_each(storage.read_bytes, uris), strict=True):
        try:
            record = json.loads(text)
            jobs.append((Said.from_json(record["said"], uri), str(record["grid"])))
        except (InkdaskError, ValueError, KeyError, TypeError, RecursionError) as error:
            log.warning("The record %s is passed over: %s", uri, error)
    return jobs
