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
from inkdask.pictures.sheets import DIM, INK, MARGIN, MARK, NO_DATA, Panel, Sheet, heated, inked
from inkdask.storage import outputs

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

    def panel(self, valid: NDArray[np.bool_], contrast: float) -> Panel:
        """Return it as a picture, beside a prediction of a contrast."""
        if self.grey is None or self.reproduced is None:
            blank = np.broadcast_to(NO_DATA, (*valid.shape, 3))
            return Panel(self.title, blank, "not possible", [self.note])
        own = f"contrast of its own {self.contrast:.2f}, that of the prediction {contrast:.2f}"
        says = f"reproduces {_percent(self.reproduced)} of the contrast"
        return Panel(self.title, inked(self.grey, valid), says, [self.note, own])


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
    def panels(self) -> list[Panel]:
        """The pictures, in order."""
        papyrus, on_papyrus = (
            np.where(self.valid[..., None], it, NO_DATA) for it in (self.papyrus, self.on_papyrus)
        )
        ink, spread = inked(self.ink, self.valid), heated(self.spread, self.valid)
        number = f"contrast {self.contrast:.2f} (standard deviation)"
        agree = f"opinions agree {self.agreement:.0f} times as well as the picture varies"
        agree = agree if self.agreement else "one opinion a pixel"
        return [
            Panel("Papyrus", papyrus, "", ["mean of the layers that were read"]),
            Panel("Prediction", ink, number, ["dark where the network finds ink"]),
            Panel("Prediction on papyrus", on_papyrus, "", ["one laid over the other"]),
            Panel("Spread of opinions", spread, "", ["red where tiles disagree", agree]),
            *(it.panel(self.valid, self.contrast) for it in self.controls),
        ]


def write_page(page: Page, stem: str) -> None:
    """Write a page as ``<stem>.png`` and ``<stem>.html``."""
    note = {"inkdask-evidence": json.dumps({"digest": page.digest, "command": page.command,
                                            **page.facts})}  # fmt: skip
    outputs.sweep(others=[f"{stem}.png", f"{stem}.html"])
    with storage.writing(f"{stem}.png") as path:
        _sheet(page).save(path, note)
    storage.write_bytes(f"{stem}.html", _html(page).encode(errors="backslashreplace"))


def _sheet(page: Page) -> Sheet:
    """Draw the page for A4."""
    sheet, width = Sheet(page.panels, (2, 3, 4), around=100), page.ink.shape[1]
    y = sheet.text(MARGIN, MARGIN - 4, f"Prediction and controls: {page.segment}", 16)
    y = sheet.text(MARGIN, y + 1, EXPLAINED, 9, DIM)
    y = sheet.text(MARGIN, y + 1.5, page.verdict, 11.5, MARK) + 3
    sheet.scale(y, width, page.pixel_um)
    _foot(sheet, page, sheet.draw(page.panels, y) + 1, sheet.wide / width)
    return sheet


def _foot(sheet: Sheet, page: Page, y: float, scale: float) -> None:
    """Draw window and letter, and say where all comes from; ``scale`` is mm a pixel."""
    sheet.rule(y)
    side, below, x = page.tile * scale, y + 27, MARGIN
    if page.pixel_um:
        # Of the page, for a mm of the papyrus: may be smaller than that of the pictures.
        mm = min(scale / page.pixel_um * 1e3, 16 / LETTER_MM, 4.4)
        side = page.tile * page.pixel_um / 1e3 * mm
        sheet.bar(x, below - 2, 10 * mm, "1 cm")
        below -= 4.5
        _letter(sheet, x + side + 5, below, LETTER_MM * mm)
    side, x = min(side, 16), MARGIN + 62
    sheet.frame(MARGIN, below - side, side, side, INK)
    end = sheet.text(x, y + 2, page.window, 8.5) + 0.5
    today = datetime.now(UTC).date().isoformat()
    facts = {**page.facts, "page": f"{today}, digest {page.digest[:16]}"}
    for name, value in facts.items():
        sheet.text(x, end, name, 7, DIM)
        end = sheet.text(x + 17, end, value, 7)
    y = max(end, y + 27) + 2
    sheet.rule(y)
    sheet.text(MARGIN, y + 1.5, page.command, 7, DIM)


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
        f"<figure><figcaption><b>{html.escape(it.title)}</b></figcaption>"
        f'<img alt="{html.escape(it.title)}" src="data:image/png;base64,{_encoded(it.rgb)}">'
        f"<p>{html.escape(it.says)}<small>{'<br>'.join(map(html.escape, it.notes))}</small></p>"
        "</figure>"
        for it in page.panels
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
    small.quantize(64).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
