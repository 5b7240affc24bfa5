"""The volume in the chunks that own the tiles, each with the halo after its end.

Dask can say this with ``rechunk`` and ``overlap``, but then a chunk's halo comes from whole
neighbouring chunks, which must be read and put together first: a window at the corner of a segment
read twice the rows it needed, and a job held the neighbours of every chunk in memory. Here each
chunk takes the pieces it needs, halo included, straight from the blocks as they were read. Cutting
a piece is a task of its own, so that on a cluster the piece travels and not the block.
"""

from __future__ import annotations

import itertools
from operator import getitem
from typing import Any

import dask.array as da
import numpy as np
from dask.base import tokenize
from dask.highlevelgraph import HighLevelGraph

from inkdask.memory import pages
from inkdask.tiling import Axis, Tiling


def with_halo(volume: da.Array, tiling: Tiling) -> da.Array:
    """Gather the chunks of a tiling with their halos, lazily.

    Parameters
    ----------
    volume
        Dask (z, y, x) of uint8 or bool, in any chunks.
    tiling
        Its chunks overlap here: each block is longer than its chunk by the halo, except at the
        end of an axis.

    Returns
    -------
    Dask (z, y, x), one block along z and one for each chunk of the tiling; because of the
    overlaps it is larger than the volume.
    """
    volume = volume.rechunk({0: -1}, method="tasks")
    name = f"halo-{tokenize(volume.name, tiling)}"
    piece = f"piece-{name}"
    along_y, along_x = _pieces(tiling.y, volume.chunks[1]), _pieces(tiling.x, volume.chunks[2])
    graph: dict[Any, Any] = {}
    for (i, rows), (j, columns) in itertools.product(enumerate(along_y), enumerate(along_x)):
        for (a, ys), (b, xs) in itertools.product(rows, columns):
            graph[piece, i, j, a, b] = (getitem, (volume.name, 0, a, b), (slice(None), ys, xs))
        keys = [[(piece, i, j, a, b) for b, _ in columns] for a, _ in rows]
        graph[name, 0, i, j] = (_join, keys)
    chunks = (volume.chunks[0], _sizes(tiling.y), _sizes(tiling.x))
    layers = HighLevelGraph.from_collections(
        name,
        graph,
        dependencies=[volume],  # type: ignore[list-item]  # dask's own protocol, mistyped
    )
    return da.Array(layers, name, chunks, meta=volume._meta)


def _ends(axis: Axis) -> np.ndarray:
    """Pixel after the last of each chunk, with its halo."""
    return np.minimum(axis.edges[1:] + axis.halo, axis.length)


def _sizes(axis: Axis) -> tuple[int, ...]:
    return tuple((_ends(axis) - axis.edges[:-1]).tolist())


def _pieces(axis: Axis, blocks: tuple[int, ...]) -> list[list[tuple[int, slice]]]:
    """For each chunk: the blocks that it reaches into, and the part of each that it takes."""
    edges = np.concatenate([[0], np.cumsum(blocks)]).tolist()
    found = []
    for start, end in zip(axis.edges[:-1].tolist(), _ends(axis).tolist(), strict=True):
        reached = range(int(np.searchsorted(edges, start, "right")) - 1, len(blocks))
        found.append(
            [
                (b, slice(max(start - edges[b], 0), min(end, edges[b + 1]) - edges[b]))
                for b in reached
                if edges[b] < end
            ]
        )
    return found


def _join(pieces: list[list[np.ndarray]]) -> np.ndarray:
    """Put pieces together in one copy."""
    heights = [row[0].shape[1] for row in pieces]
    widths = [piece.shape[2] for piece in pieces[0]]
    joined = pages((len(pieces[0][0]), sum(heights), sum(widths))).view(pieces[0][0].dtype)
    y = 0
    for row, height in zip(pieces, heights, strict=True):
        x = 0
        for piece, width in zip(row, widths, strict=True):
            joined[:, y : y + height, x : x + width] = piece
            x += width
        y += height
    return joined
