"""What is at a path, for ``inkdask info``: a segment before a job, in a person's words."""

from __future__ import annotations

from typing import Any

from inkdask import engine
from inkdask.plan import span
from inkdask.progress import amount
from inkdask.segment import describe as describe_segment
from inkdask.segment import open_segment
from inkdask.settings import Settings
from inkdask.tiling import Tiling

IMPORTS = 600e6  # bytes that a process holds with everything imported and a network loaded
TILE, STRIDE = 64, 16  # of the usual model, where the user names none


def describe(path: str, **options: Any) -> dict[str, str]:
    """Describe the segment at a path; reads headers and a few sampled blocks.

    Parameters
    ----------
    path
        A segment, local or ``s3://``.
    **options
        ``layers``, ``tile``, ``stride`` and ``chunk_size`` of `inkdask.settings.Settings`.

    Raises
    ------
    InkdaskError
        When there is no segment, in one sentence.
    """
    settings = Settings.of(s3_path=path, **options)
    segment = open_segment(path, settings.layers)
    found = describe_segment(segment)
    depth, height, width = found.shape
    tiling = Tiling.of(
        (height, width), settings.tile or TILE, settings.stride or STRIDE, settings.chunk_size
    )
    rows = {
        "segment": found.uri,
        "layers": f"{depth} ({span(found.layers)})",
        "size": f"{height:,} x {width:,} pixels",
        "type": found.dtype + (" (the high byte is read)" if found.dtype == "uint16" else ""),
        "layout": found.layout,
    }
    if found.stored_bytes:
        rows["stored"] = f"{amount(found.stored_bytes)}, {amount(depth * height * width)} as uint8"
    if found.mask_uri:
        rows["mask"] = found.mask_uri
    tiles = f"{tiling.tiles:,} of {tiling.tile} px at stride {tiling.stride}"
    if found.empty_share is not None:
        rows["empty"] = f"about {found.empty_share:.0%} of the pixels, from a few samples"
        tiles += f", about {int(tiling.tiles * (1 - found.empty_share)):,} with data"
    chunks = "{} x {}".format(*tiling.block_shape)
    rows["tiles"] = tiles
    rows["chunks"] = f"{chunks} of {tiling.y.step:,} x {tiling.x.step:,} px"
    rows["memory"] = f"about {amount(expected_memory(segment.volume, tiling))} at most"
    return rows


def expected_memory(volume: Any, tiling: Tiling) -> float:
    """Estimate the most bytes that a process with local threads holds.

    A row of chunks stays until its last chunk is done, with the blocks that it was read in; each
    thread holds a chunk with its halo, or the bytes of a block as stored and as decoded.
    """
    depth, height, width = volume.shape
    block = depth * max(volume.chunks[1]) * max(volume.chunks[2])
    rows = min(max(tiling.chunks[0]) + tiling.y.halo + 2 * max(volume.chunks[1]), height)
    chunk = depth * max(tiling.chunks[0]) * max(tiling.chunks[1])
    return IMPORTS + depth * rows * width + engine.threads() * max(3 * block, chunk)
