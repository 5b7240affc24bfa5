"""The page of evidence: a prediction and its controls at one scale, as PNG for A4 and as HTML."""

from __future__ import annotations

import base64
import html
import io
import json
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from inkdask import storage
from inkdask.cautions import LETTER_MM
from inkdask.demo import letters
from inkdask.pictures.scale_bar import fitting
from inkdask.pictures.sheets import A4, DIM, INK, MARK, NO_DATA, Sheet, heated, inked

MARGIN, GAP = 15.0, 5.0  # mm
EXPLAINED = (
    "The prediction is dark where a network, which looks at small windows of the scan, finds what "
    "it has learned to take for ink. In the controls the same network reads the same place in ways "
    "in which no ink can be seen: strokes that are absent there depend on the papyrus, and strokes "
    "that show there, too, come from the network."
)


@dataclass(frozen=True)
class Control:
    """A control: ``grey`` uint8 (y, x), share of the prediction's contrast, and its own contrast.

    They are None where the control is not possible.
    """

    title: str
    note: str
    grey: NDArray[np.uint8] | None = None
    reproduced: float | None = None
    contrast: float | None = None

    @property
    def says(self) -> str:
        """The number that stands under it."""
        if self.reproduced is None:
            return "not possible"
        return f"reproduces {_percent(self.reproduced)} of the contrast"

    def own(self, of: float) -> str:
        """Return its own contrast in words, beside that of the prediction."""
        if self.contrast is None:
            return ""
        return f"contrast of its own {self.contrast:.2f}, that of the prediction {of:.2f}"


@dataclass(frozen=True)
class Page:
    """All that a page shows; pictures are uint8 (y, x), or (y, x, 3) in colour, of one size."""

    segment: str
    ink: NDArray[np.uint8]
    valid: NDArray[np.bool_]
    papyrus: NDArray[np.uint8]
    on_papyrus: NDArray[np.uint8]
    spread: NDArray[np.uint8]
    agreement: float
    contrast: float
    controls: tuple[Control, ...]
    pixel_um: float | None
    tile: int
    facts: dict[str, str]
    command: str
    digest: str

    @property
    def verdict(self) -> str:
        """How much of the contrast the controls reproduce, in words."""
        shares = [it.reproduced for it in self.controls[:3] if it.reproduced is not None]
        share = _percent(max([*shares, 0.0]))
        return f"The controls reproduce at most {share} of the prediction's contrast."

    @property
    def window(self) -> str:
        """Size of the network's window, in words."""
        if self.pixel_um is None:
            return f"The network's window is {self.tile} pixels wide, of unknown size."
        return (
            f"The network's window is {self.tile * self.pixel_um / 1e3:.2f} mm wide ({self.tile} "
            f"pixels of {self.pixel_um:.4g} micrometers). A letter is about "
            f"{LETTER_MM:g} mm high."
        )

    @property
    def panels(self) -> list[tuple[str, str, str, str, NDArray[np.uint8]]]:
        """Title, note, number and more, and picture uint8 (y, x, 3), in order."""
        differ = f"opinions agree {self.agreement:.0f} times as well as the picture varies"
        differ = differ if self.agreement else "one opinion a pixel"
        papyrus, on_papyrus = (
            np.where(self.valid[..., None], it, NO_DATA) for it in (self.papyrus, self.on_papyrus)
        )
        ink, spread = inked(self.ink, self.valid), heated(self.spread, self.valid)
        number = f"contrast {self.contrast:.2f} (standard deviation)"
        first = [
            ("Papyrus", "mean of the layers that were read", "", "", papyrus),
            ("Prediction", "dark where the network finds ink", number, "", ink),
            ("Prediction on papyrus", "one laid over the other", "", "", on_papyrus),
            ("Spread of opinions", "red where the tiles of a pixel disagree", differ, "", spread),
        ]
        blank = np.broadcast_to(NO_DATA, (*self.ink.shape, 3))
        return first + [
            (it.title, it.note, it.says, it.own(self.contrast),
             blank if it.grey is None else inked(it.grey, self.valid))
            for it in self.controls
        ]  # fmt: skip


def write_page(page: Page, stem: str) -> None:
    """Write a page as ``<stem>.png`` and ``<stem>.html``."""
    note = {"inkdask-evidence": json.dumps({"digest": page.digest, "command": page.command,
                                            **page.facts})}  # fmt: skip
    with storage.writing(f"{stem}.png") as path:
        _sheet(page).save(path, note)
    storage.write_bytes(f"{stem}.html", _html(page).encode())


def _sheet(page: Page) -> Sheet:
    """Draw the page for A4."""
    height, width = page.ink.shape
    count = len(page.panels)
    room, under = A4[0] - 2 * MARGIN, 17.5

    def size(columns: int) -> tuple[float, float]:
        wide = (room - GAP * (columns - 1)) / columns
        rows = -(-count // columns)
        tall = (A4[1] - 100) / rows - under
        return min(wide, tall * width / height), wide

    columns = max((2, 3, 4), key=lambda n: size(n)[0])
    wide, pitch = size(columns)
    wide, tall = max(wide, 28), max(wide, 28) * height / width
    rows = -(-count // columns)
    sheet = Sheet(A4[0], max(A4[1], 98 + rows * (tall + under)))
    y = sheet.text(MARGIN, MARGIN - 4, f"Prediction and controls: {page.segment}", 16, width=room)
    y = sheet.text(MARGIN, y + 1, EXPLAINED, 9, DIM, room)
    y = sheet.text(MARGIN, y + 1.5, page.verdict, 11.5, MARK, room) + 3
    top = y
    for n, (title, words, says, more, rgb) in enumerate(page.panels):
        x, y = MARGIN + n % columns * (pitch + GAP), top + n // columns * (tall + under)
        sheet.text(x, y, title, 9.5)
        sheet.picture(x, y + 5, wide, np.ascontiguousarray(rgb), tall)
        end = sheet.text(x, y + tall + 5.4, says, 9, INK) if says else y + tall + 5.4
        end = sheet.text(x, end - 0.3, words, 7, DIM, pitch)
        sheet.text(x, end - 0.6, more, 7, DIM, pitch)
    if page.pixel_um:
        length, label = fitting(10_000.0, width * page.pixel_um)
        bar = length / page.pixel_um * wide / width
        sheet.bar(MARGIN + wide - bar - 11, top + tall + 7, bar, label)
    _foot(sheet, page, top + rows * (tall + under) + 1, wide / width)
    return sheet


def _foot(sheet: Sheet, page: Page, y: float, scale: float) -> None:
    """Draw scale, window and letter, and say where all comes from; ``scale`` is mm a pixel."""
    room, left, x = A4[0] - 2 * MARGIN, MARGIN + 62, MARGIN
    y, side = y + 3, page.tile * scale
    below = y + 24
    if page.pixel_um:
        mm = scale / page.pixel_um * 1e3  # of the page, for one of the papyrus
        mm = min(mm, 16 / LETTER_MM, 4.4)  # it may be smaller than that of the pictures
        side = page.tile * page.pixel_um / 1e3 * mm
        _letter(sheet, x + side + 5, below - 4.5, LETTER_MM * mm)
        sheet.bar(x, below - 2, 10 * mm, "1 cm")
        below -= 4.5
    side = min(side, 16)
    sheet.frame(x, below - side, side, side, INK)
    sheet.rule(MARGIN, y - 3, room)
    end = sheet.text(left, y - 1, page.window, 8.5, INK, room - 62) + 0.5
    today = datetime.now(UTC).date().isoformat()
    facts = {**page.facts, "page": f"{today}, digest {page.digest[:16]}"}
    for name, value in facts.items():
        sheet.text(left, end, name, 7, DIM)
        end = sheet.text(left + 17, end, value, 7, INK, room - 79)
    y = max(end, y + 24) + 2
    sheet.rule(MARGIN, y, room)
    sheet.text(MARGIN, y + 1.5, page.command, 7, DIM, room)


def _letter(sheet: Sheet, x: float, below: float, tall: float) -> None:
    """Draw a letter of a height, in mm, that stands on a line."""
    page = letters.write(["Α"], (260, 240), (30, 20), 200, np.random.default_rng(0))
    white = np.array([255, 255, 255], np.float32)
    rgb = np.rint(white - page[..., None] * (white - np.array(INK))).astype(np.uint8)
    scale = tall / 200
    sheet.picture(x - 20 * scale, below - 230 * scale, 240 * scale, rgb)


def _html(page: Page) -> str:
    """Return the page as HTML that needs nothing else."""
    figures = "".join(
        f"<figure><figcaption><b>{html.escape(title)}</b></figcaption>"
        f'<img alt="{html.escape(title)}" src="data:image/png;base64,{_encoded(rgb)}">'
        f"<p>{html.escape(says)}<small>{html.escape(words)}<br>{html.escape(more)}</small></p>"
        "</figure>"
        for title, words, says, more, rgb in page.panels
    )
    bar = ""
    if page.pixel_um:
        length, label = fitting(10_000.0, page.ink.shape[1] * page.pixel_um)
        share = length / page.pixel_um / page.ink.shape[1]
        bar = f'<div class="bar" style="width:calc({share:.4f} * var(--wide))"></div>{label}'
    facts = {**page.facts, "page": f"digest {page.digest}", "command": page.command}
    rows = "".join(f"<dt>{k}</dt><dd>{html.escape(v)}</dd>" for k, v in facts.items())
    return f"""<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Prediction and controls: {html.escape(page.segment)}</title><style>
body{{font:16px/1.45 Georgia,serif;color:#1c1815;background:#fff;max-width:1120px;margin:2em auto;
padding:0 1em;--wide:min(530px,46vw)}} h1{{font-weight:normal}}
.most{{color:#9e3a26;font-size:1.2em}}
main{{display:grid;grid-template-columns:repeat(2,var(--wide));gap:1.4em}} figure{{margin:0}}
img{{width:100%;display:block}} p{{margin:.3em 0}} small{{display:block;color:#706961}}
.bar{{height:5px;background:#1c1815;margin-top:1.5em}}
dl{{display:grid;grid-template-columns:7em 1fr;font-size:.85em;overflow-wrap:anywhere}}
dt{{color:#706961}} dd{{margin:0}}
figure{{break-inside:avoid}}</style>
<h1>Prediction and controls: {html.escape(page.segment)}</h1><p>{EXPLAINED}</p>
<p class="most">{page.verdict}</p><main>{figures}</main>{bar}
<p>{page.window}</p><dl>{rows}</dl></html>
"""


def _encoded(rgb: NDArray[np.uint8]) -> str:
    file = io.BytesIO()
    small = Image.fromarray(np.ascontiguousarray(rgb))
    small.thumbnail((1600, 1600), Image.Resampling.LANCZOS)
    small.quantize(64).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
