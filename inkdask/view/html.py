"""What a segment and a prediction say of themselves in a notebook: HTML that needs no kernel."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import lru_cache
from html import escape
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from inkdask.information import STRIDE, TILE
from inkdask.memory import expected_memory
from inkdask.plan import span
from inkdask.progress import amount, clock
from inkdask.settings import Settings
from inkdask.tiling import Tiling
from inkdask.view.lazy import lazy_ink
from inkdask.view.sampling import Budget
from inkdask.view.tiles import MOST, OVERVIEW_BUDGET, UNKNOWN, Ink, Papyrus

if TYPE_CHECKING:
    from inkdask.inkmap import InkMap
    from inkdask.segment import Segment

THUMBNAIL = 360  # pixels: longest side
THUMBNAIL_SHARE = 0.005  # of a segment's bytes that its thumbnail may read
THUMBNAIL_BUDGET = Budget(12 << 20, 200)  # and no more than this
SMALL = 4 << 20  # pixels: a layer of no more is read whole
_INK = np.array([255, 92, 36], np.float32)

__all__ = ["escape", "ink_html", "picture_of", "segment_html", "several_html", "usual_contrast"]


def picture_of(ink: InkMap) -> Ink:
    """What is known of a prediction."""
    return lazy_ink(ink)


def segment_html(segment: Segment) -> str:
    """Describe a segment; reads a few pieces of its middle layer."""
    depth, height, width = segment.shape
    tiling = Tiling.of(
        (height, width), TILE, STRIDE, Settings.model_fields["chunk_size"].get_default()
    )
    rows = {
        "layers": f"{depth} ({span(segment.layers)})",
        "shape": f"{height:,} x {width:,} pixels (y, x)",
        "dtype": _dtype(segment),
        "layout": segment.source.words,
        **_stored(segment),
        **({"mask": segment.mask_uri} if segment.mask_uri else {}),
    }
    papyrus = _papyrus(segment)
    grey = _thumbnail_of(segment)
    share = "" if grey is None else _with_data(tiling.tiles, grey)
    rows["tiles"] = f"{tiling.tiles:,} of {TILE} px at stride {STRIDE}{share}"
    rows["memory"] = f"about {amount(expected_memory(segment.volume, tiling))} for a job here"
    note = "" if grey is not None else _note(papyrus)
    return _card(f"Segment {segment.name}", segment.uri, _picture(grey, None), note, rows)


def ink_html(ink: InkMap) -> str:
    """Describe a prediction; computes nothing."""
    plan, network, tiling = ink.plan, ink.network, ink.tiling
    segment = plan.segment
    height, width = ink.map.shape
    known = picture_of(ink)
    grey = _thumbnail_of(segment) if segment and _is_whole(ink) else None
    share = "" if grey is None else _with_data(tiling.tiles, grey)
    window = ink.blend_mode + (f", sigma {ink.gaussian_sigma:g} px" if ink.gaussian_sigma else "")
    rows = {
        "model": f"{network.model.key} ({network.model.architecture}), weights "
        f"{network.digest[:12]}",
        "layers": f"{len(plan.layers)} ({span(plan.layers)})",
        "shape": f"{height:,} x {width:,} pixels (y, x), lazy in {known.known.size:,} chunks",
        "dtype": f"{ink.map.dtype}, ink probability 0 to 1",
        "tiles": f"{tiling.tiles:,} of {tiling.tile} px at stride {tiling.stride}{share}",
        "window": window,
        "cost": _cost(ink, grey),
        "progress": _bar(known),
    }
    if segment is None:
        note = "" if known.known.any() else "nothing is computed yet"
    else:
        note = "" if grey is not None or known.known.any() else "no thumbnail of this layout"
    source = segment.uri if segment else "array"
    return _card(
        "Ink prediction", source, _picture(grey, known), note, rows, unescaped=("progress",)
    )


def several_html(predictions: Mapping[str, InkMap]) -> str:
    """Set the thumbnails of predictions side by side; computes nothing."""
    cells = "".join(
        f"<figure style='margin:4px'>{_img(_picture(None, picture_of(ink)))}"
        f"<figcaption>{escape(title)}: {escape(picture_of(ink).status)}</figcaption></figure>"
        for title, ink in predictions.items()
    )
    return f"<div style='display:flex;flex-wrap:wrap'>{cells}</div>"


def usual_contrast(papyrus: Papyrus | None) -> tuple[int, int]:
    """Values that are shown black and white, at first."""
    if papyrus is None or not papyrus.is_cheap:
        return 0, 255
    return _ends(papyrus.overview(len(papyrus.numbers) // 2))


def _ends(grey: np.ndarray) -> tuple[int, int]:
    seen = grey[grey > 0]
    if not seen.size:
        return 0, 255
    low, high = np.percentile(seen, [1, 99.5])
    return int(low), max(int(np.ceil(high)), int(low) + 1)


def _papyrus(segment: Segment) -> Papyrus:
    return Papyrus.of_segment(segment)


def _thumbnail_of(segment: Segment) -> np.ndarray | None:
    """The middle layer, uint8 (y, x); None where it would have to be decoded whole."""
    _, height, width = segment.shape
    stored = segment.stored_bytes or 0.2 * segment.volume.nbytes
    most = min(THUMBNAIL_SHARE * stored, THUMBNAIL_BUDGET.bytes)
    is_small = height * width <= SMALL
    return _overview(
        _Same(segment), OVERVIEW_BUDGET if is_small else THUMBNAIL_BUDGET._replace(bytes=most)
    )


class _Same:
    """A segment as a key: the same files and the same window make the same thumbnail."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment
        self._key = segment.uri, segment.identity, segment.layers, str(segment.window)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other._key == self._key


@lru_cache(maxsize=32)
def _overview(same: _Same, budget: Budget) -> np.ndarray | None:
    papyrus = _papyrus(same.segment)
    if not papyrus.is_cheap:
        return None
    return papyrus.overview(len(papyrus.numbers) // 2, budget)


def _picture(grey: np.ndarray | None, ink: Ink | None) -> Image.Image | None:
    """A thumbnail: papyrus in grey, and the ink that is known over it."""
    known = ink is not None and bool(ink.known.any())
    if grey is None and not known:
        return None
    if grey is None:
        assert ink is not None  # noqa: S101  known without it is impossible
        values = ink.overview
        unknown = values == UNKNOWN
        page = np.stack([values * np.float32(255 / MOST)] * 3, axis=2)
        page[unknown] = (44, 42, 60)
    else:
        low, high = _ends(grey)
        stretched = np.clip((grey.astype(np.float32) - low) / (high - low), 0, 1) * 255
        page = np.stack([stretched] * 3, axis=2)
        if ink is not None and known and ink.overview.shape == grey.shape:
            values = ink.overview
            share = np.where(values == UNKNOWN, 0, values / np.float32(MOST))[:, :, None]
            page += 0.8 * share * (_INK - page)
    picture = Image.fromarray(np.clip(page, 0, 255).astype(np.uint8))
    picture.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
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
    unescaped: tuple[str, ...] = (),
) -> str:
    lines = "".join(
        f"<tr><th style='text-align:left;vertical-align:top'>{name}</th>"
        f"<td style='text-align:left'>{value if name in unescaped else escape(value)}</td></tr>"
        for name, value in rows.items()
    )
    aside = _img(picture) + (f"<small>{escape(note)}</small>" if note else "")
    return (
        "<div style='display:flex;flex-wrap:wrap;gap:16px;align-items:flex-start'>"
        f"<div>{aside}</div><div><strong>{escape(title)}</strong><br>"
        f"<code>{escape(uri)}</code><table style='margin:4px 0'>{lines}</table></div></div>"
    )


def _bar(ink: Ink) -> str:
    known = ink.known
    return f"<progress value='{np.count_nonzero(known)}' max='{known.size}'></progress> " + escape(
        ink.status
    )


def _dtype(segment: Segment) -> str:
    return segment.dtype.name + (", read as uint8 (the high byte)" if _is_wide(segment) else "")


def _is_wide(segment: Segment) -> bool:
    return segment.dtype.itemsize == 2


def _stored(segment: Segment) -> dict[str, str]:
    if not segment.stored_bytes:
        return {}
    decoded = amount(float(segment.volume.nbytes))
    return {"stored": f"{amount(segment.stored_bytes)}, {decoded} as uint8"}


def _with_data(tiles: int, grey: np.ndarray) -> str:
    share = float(np.mean(grey > 0))
    return f", about {int(tiles * share):,} with data" if share < 0.995 else ""


def _note(papyrus: Papyrus) -> str:
    return "" if papyrus.is_cheap else "no thumbnail: layers of this kind are decoded whole"


def _is_whole(ink: InkMap) -> bool:
    """Whether the prediction covers all of its segment, which the thumbnail shows."""
    segment = ink.plan.segment
    return segment is not None and segment.shape[1:] == ink.map.shape


def _cost(ink: InkMap, grey: np.ndarray | None) -> str:
    """What computing all of it takes: what is read, and how long at the speed measured here."""
    segment, volume = ink.plan.segment, ink.plan.volume
    reads = float(volume.nbytes)
    if segment and segment.stored_bytes:
        pixels = float(np.prod(segment.shape[1:]))
        area = float(np.prod(ink.plan.tiling.shape)) / pixels
        reads = segment.stored_bytes * area * len(ink.plan.layers) / len(segment.layers)
    words = f"reads {amount(reads)}"
    pace = _pace(ink)
    if pace is None:
        return f"{words}; time: known when the first chunk is computed"
    share = 1.0 if grey is None else float(np.mean(grey > 0))
    return (
        f"{words}, about {clock(ink.tiling.tiles * share * pace)} at {1 / pace:,.0f} tiles/s here"
    )


def _pace(ink: InkMap) -> float | None:
    """Seconds a tile, where this process has run the network."""
    import sys

    module: Any = sys.modules.get("inkdask.predictor")  # not loaded: nothing ran
    return module.measured_pace(ink.network) if module else None
