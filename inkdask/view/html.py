"""Descriptions of segments and predictions for notebooks: HTML that needs no kernel."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from inkdask import paces
from inkdask.box import Slices
from inkdask.information import STRIDE, TILE, of_segment
from inkdask.plan import span
from inkdask.progress import amount, clock, size
from inkdask.tiling import CHUNK, Tiling
from inkdask.view import words
from inkdask.view.kept import Kept
from inkdask.view.sampling import Budget
from inkdask.view.tiles import MOST, OVERVIEW_BUDGET, UNKNOWN, Ink, Papyrus

if TYPE_CHECKING:
    from inkdask.inkmap import InkMap
    from inkdask.segment import Segment

THUMBNAIL = 360  # pixels: longest side
THUMBNAIL_SHARE = 0.005  # of a segment's bytes that its thumbnail may read
THUMBNAIL_BUDGET = Budget(12 << 20, 200)  # of a thumbnail, whatever the segment's size
SMALL = 4 << 20  # pixels: a layer of up to so many is read whole
NO_THUMBNAIL = "no thumbnail: layers of this kind are decoded whole"

_thumbnails = Kept(32 << 20)  # bytes


def segment_html(segment: Segment) -> str:
    """Describe a segment; reads a few pieces of its middle layer."""
    tiling = Tiling.of(segment.shape[1:], TILE, STRIDE, CHUNK)
    grey = _thumbnail_of(segment)
    empty = None if grey is None else 1 - _share(grey)
    _, *rows = of_segment(segment, tiling, empty)  # the first is its place
    note = NO_THUMBNAIL if grey is None else ""
    return _card(f"Segment {segment.name}", segment.uri, _picture(grey), note, dict(rows))


def ink_html(ink: InkMap) -> str:
    """Describe a prediction; computes nothing."""
    plan, network, picture = ink.plan, ink.network, Ink.of(ink)
    segment, known = plan.segment, picture.background.known
    is_whole = segment is not None and segment.shape[1:] == ink.map.shape
    grey = _thumbnail_of(segment) if segment and is_whole else None
    sigma = f", sigma {ink.gaussian_sigma:g} px" if ink.gaussian_sigma else ""
    rows = {
        "model": f"{network.model.key} ({network.model.architecture}), weights "
        f"{network.digest[:12]}",
        "layers": f"{len(plan.layers)} ({span(plan.layers)})",
        "size": f"{size(ink.map.shape)}, lazy in {known.size:,} chunks",
        "type": f"{ink.map.dtype}, ink probability 0 to 1",
        "tiles": _tiles(ink.tiling, grey),
        "window": ink.blend_mode + sigma,
        "cost": _cost(ink, grey),
    }
    note = ""
    if grey is None and not known.any():
        note = "no thumbnail of this layout" if segment else "nothing is computed yet"
    bar = f"<progress value='{np.count_nonzero(known)}' max='{known.size}'></progress>"
    progress = f"{bar} {escape(words.status([picture.background]))}"
    uri = segment.uri if segment else "array"
    return _card("Ink prediction", uri, _picture(grey, picture), note, rows, progress)


def several_html(predictions: Mapping[str, InkMap]) -> str:
    """Describe predictions by thumbnails side by side; computes nothing."""
    pictures = {title: Ink.of(ink) for title, ink in predictions.items()}
    # Smaller ones for many, because a saved notebook keeps them all.
    side = min(THUMBNAIL, int(2 * THUMBNAIL / len(pictures) ** 0.5))
    cells = "".join(
        f"<figure style='margin:4px'>{_img(_picture(None, picture, side))}"
        f"<figcaption>{escape(title)}: {escape(words.status([picture.background]))}"
        "</figcaption></figure>"
        for title, picture in pictures.items()
    )
    return f"<div style='display:flex;flex-wrap:wrap'>{cells}</div>"


def usual_contrast(papyrus: Papyrus | None) -> tuple[int, int]:
    """Return the values that are shown black and white at first."""
    if papyrus is None or not papyrus.is_cheap:
        return 0, 255
    return _ends(papyrus.overview(len(papyrus.numbers) // 2))


def middle(segment: Segment, side: int) -> Slices:
    """Return the part of at most ``side`` pixels a side with most papyrus, about the middle."""
    grey = _thumbnail_of(segment)
    shape = segment.shape[1:]
    data = np.ones((1, 1)) if grey is None else grey > 0
    scales = [length / count for length, count in zip(shape, data.shape, strict=True)]
    tall, wide = (
        max(min(round(side / scale), count), 1)
        for scale, count in zip(scales, data.shape, strict=True)
    )
    sums = np.pad(data, ((1, 0), (1, 0))).cumsum(0, dtype=float).cumsum(1)
    sums = sums[tall:, :] - sums[:-tall, :]
    sums = sums[:, wide:] - sums[:, :-wide]
    away = [np.linspace(-1, 1, n) if n > 1 else np.zeros(1) for n in sums.shape]
    best = np.argmax(sums / (tall * wide) - 0.05 * np.hypot(away[0][:, None], away[1]))
    at = zip(np.unravel_index(best, sums.shape), (tall, wide), scales, strict=True)
    centres = [(place + length / 2) * scale for place, length, scale in at]
    starts = [
        round(min(max(centre - side / 2, 0), max(length - side, 0)))
        for centre, length in zip(centres, shape, strict=True)
    ]
    rows, columns = (slice(a, min(a + side, n)) for a, n in zip(starts, shape, strict=True))
    return rows, columns


def _ends(grey: np.ndarray) -> tuple[int, int]:
    seen = grey[grey > 0]
    if not seen.size:
        return 0, 255
    low, high = np.percentile(seen, [1, 99.5])
    return int(low), max(int(np.ceil(high)), int(low) + 1)


def _thumbnail_of(segment: Segment) -> np.ndarray | None:
    """The middle layer, uint8 (y, x); None where it would have to be decoded whole."""
    papyrus = Papyrus.of_segment(segment)
    if not papyrus.is_cheap:
        return None
    stored = segment.stored_bytes or 0.2 * segment.volume.nbytes
    budget = THUMBNAIL_BUDGET._replace(bytes=min(THUMBNAIL_SHARE * stored, THUMBNAIL_BUDGET.bytes))
    if np.prod(segment.shape[1:]) <= SMALL:
        budget = OVERVIEW_BUDGET
    number = len(papyrus.numbers) // 2
    # The same files and the same box make the same thumbnail.
    key = segment.uri, segment.identity, segment.layers, segment.box
    return _thumbnails.get(key, lambda: papyrus.overview(number, budget))


def _picture(
    grey: np.ndarray | None, ink: Ink | None = None, side: int = THUMBNAIL
) -> Image.Image | None:
    """Thumbnail of papyrus in grey, and the ink that is known over it."""
    values = ink.overview if ink and ink.background.known.any() else None
    if grey is not None:
        low, high = _ends(grey)
        page = np.stack([(grey.astype(np.float32) - low) / (high - low)] * 3, axis=2)
        page = np.clip(page, 0, 1) * 255
        if values is not None and values.shape == grey.shape:
            share = np.where(values == UNKNOWN, 0, values / np.float32(MOST))[:, :, None]
            page += 0.8 * share * (np.array([255, 92, 36], np.float32) - page)
    elif values is not None:
        page = np.stack([values * np.float32(255 / MOST)] * 3, axis=2)
        page[values == UNKNOWN] = (48, 46, 52)
    else:
        return None
    picture = Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    return picture


def _img(picture: Image.Image | None) -> str:
    if picture is None:
        return ""
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    return f"<img alt='thumbnail' src='data:image/jpeg;base64,{data}' style='display:block'>"


def _card(
    title: str,
    uri: str,
    picture: Image.Image | None,
    note: str,
    rows: Mapping[str, str],
    progress: str = "",
) -> str:
    """HTML of a table with a picture; ``progress`` is HTML already, all else is text."""
    cells = {name: escape(text) for name, text in rows.items()}
    if progress:
        cells["progress"] = progress
    lines = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{name}</th>"
        f"<td style='text-align:left'>{cell}</td></tr>"
        for name, cell in cells.items()
    )
    aside = _img(picture) + (f"<small>{escape(note)}</small>" if note else "")
    return (
        "<div style='display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start'>"
        f"<div>{aside}</div><div><strong>{escape(title)}</strong><br>"
        f"<code>{escape(uri)}</code><table style='margin:4px 0'>{lines}</table></div></div>"
    )


def _tiles(tiling: Tiling, grey: np.ndarray | None) -> str:
    words = f"{tiling.tiles:,} of {tiling.tile} px at stride {tiling.stride}"
    share = _share(grey)
    return words + (f", about {int(tiling.tiles * share):,} with data" if share < 0.995 else "")


def _share(grey: np.ndarray | None) -> float:
    """Share of pixels with data; 1 without a thumbnail."""
    return 1.0 if grey is None else float(np.mean(grey > 0))


def _cost(ink: InkMap, grey: np.ndarray | None) -> str:
    """Bytes that computing all of it reads, and the time at the speed measured here."""
    segment, reads = ink.plan.segment, float(ink.plan.volume.nbytes)
    if segment and segment.stored_bytes:
        area = float(np.prod(ink.tiling.shape) / np.prod(segment.shape[1:]))
        reads = segment.stored_bytes * area * len(ink.plan.layers) / len(segment.layers)
    words = f"reads {amount(reads)}"
    pace = paces.measured(ink.network)  # seconds a tile
    if pace is None:
        return f"{words}; time: known when the first chunk is computed"
    seconds = ink.tiling.tiles * _share(grey) * pace
    return f"{words}, about {clock(seconds)} at {1 / pace:,.0f} tiles/s here"
