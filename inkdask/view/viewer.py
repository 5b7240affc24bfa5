"""The viewer: a widget that shows pictures by tiles, and the controls about it.

The browser asks for the tiles in sight and keeps them (``viewer.js``); this side reads or computes
them, in threads of its own, so that the kernel stays free.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import traitlets
from IPython.display import HTML, display

from inkdask.errors import InkdaskError
from inkdask.view import html
from inkdask.view.tiles import SIDE, Ink, Papyrus, Window

if TYPE_CHECKING:
    from inkdask.inkmap import InkMap
    from inkdask.segment import Segment

PAPYRUS = 0  # the picture's number; predictions count from 1
READERS = 4  # threads that serve tiles: most wait for files
_HERE = Path(__file__).parent

TileKey = tuple[int, int, int, int, int]  # picture, layer, level, row, column


class Canvas(anywidget.AnyWidget):
    """The pictures in the browser; `Viewer` puts controls about it.

    Attributes
    ----------
    shape
        Height and width of the pictures, in pixels.
    panels
        For each panel its title, and whether it shows papyrus, and which prediction (or none).
    columns
        Panels in a row.
    layer, numbers
        Index of the layer that is shown, and the numbers of all.
    contrast
        Values that are black and white, 0 to 255.
    opacity
        Of ink over papyrus, 0 to 1.
    is_drawing
        Whether dragging draws a box, and does not move the picture.
    sight, box
        What is in sight, and the box that was drawn last: y0, y1, x0, x1 in pixels.
    """

    _esm = _HERE / "viewer.js"
    _css = _HERE / "viewer.css"

    side = traitlets.Int(SIDE).tag(sync=True)
    shape = traitlets.List(traitlets.Int()).tag(sync=True)
    panels = traitlets.List(traitlets.Dict()).tag(sync=True)
    columns = traitlets.Int(1).tag(sync=True)
    height = traitlets.Int(480).tag(sync=True)
    layer = traitlets.Int(0).tag(sync=True)
    numbers = traitlets.List(traitlets.Int()).tag(sync=True)
    contrast = traitlets.List(traitlets.Int(), [0, 255]).tag(sync=True)
    opacity = traitlets.Float(0.7).tag(sync=True)
    is_drawing = traitlets.Bool(False).tag(sync=True)
    sight = traitlets.List(traitlets.Float()).tag(sync=True)
    box = traitlets.List(traitlets.Int()).tag(sync=True)


class Viewer:
    """A canvas with its controls; displays itself in Jupyter.

    Attributes
    ----------
    canvas
        The pictures; its traits can be read and set.
    controls
        The widgets about it, by name.
    """

    def __init__(
        self,
        papyrus: Papyrus | None,
        inks: Sequence[Ink],
        panels: list[dict[str, Any]],
        static: str,
        sources: Sequence[Any] = (),
        **traits: Any,
    ) -> None:
        self._papyrus, self._inks, self._static = papyrus, tuple(inks), static
        self._sources = tuple(sources)  # of the inks: what has a focus of its own
        shape = (papyrus or inks[0]).shape
        numbers = list(papyrus.numbers) if papyrus else []
        low, high = html.usual_contrast(papyrus)
        self.canvas = Canvas(
            shape=list(shape),
            panels=panels,
            numbers=numbers,
            layer=len(numbers) // 2,
            contrast=[low, high],
            **traits,
        )
        self._asked: dict[TileKey, Future[None]] = {}
        self._changes = 0  # of predictions, since it was opened
        self._turn = threading.Lock()
        self._readers = ThreadPoolExecutor(READERS, "inkdask-view")
        self.controls = self._controls()
        self.widget = widgets.VBox([self._toolbar(), self.canvas, self.controls["status"]])
        self.canvas.on_msg(self._on_message)
        self.canvas.observe(self._on_sight, "sight")
        self.canvas.observe(self._on_box, "box")
        for number, ink in enumerate(self._inks, 1):
            ink.observers.append(_Changed(self, number))
        self._say()

    @classmethod
    def of_segment(cls, segment: Segment, *, height: int) -> Viewer:
        """Look at layers."""
        panels = [{"title": "", "papyrus": True, "ink": 0}]
        papyrus = Papyrus.of_segment(segment)
        return cls(papyrus, [], panels, html.segment_html(segment), height=height)

    @classmethod
    def of_ink(cls, ink: InkMap, *, beside: bool, height: int) -> Viewer:
        """Look at a prediction and its papyrus."""
        panels, columns = _BESIDE if beside else _OVER
        return cls(
            Papyrus.of_plan(ink.plan),
            [html.picture_of(ink)],
            panels,
            html.ink_html(ink),
            [ink],
            columns=columns,
            height=height,
        )

    @classmethod
    def of_several(cls, predictions: Mapping[str, InkMap], *, columns: int, height: int) -> Viewer:
        """Look at predictions side by side."""
        shapes = {ink.map.shape for ink in predictions.values()}
        if len(shapes) != 1:
            raise InkdaskError(
                "Predictions can be compared when they have one size, but these have "
                + " and ".join(f"{height} x {width}" for height, width in sorted(shapes))
                + " pixels."
            )
        panels = [
            {"title": title, "papyrus": False, "ink": number}
            for number, title in enumerate(predictions, 1)
        ]
        return cls(
            None,
            [html.picture_of(ink) for ink in predictions.values()],
            panels,
            html.several_html(predictions),
            list(predictions.values()),
            columns=columns,
            height=height,
        )

    @property
    def box(self) -> Window | None:
        """The box that was drawn last, as rows and columns: ``ink.map[viewer.box]``."""
        if not self.canvas.box:
            return None
        y0, y1, x0, x1 = self.canvas.box
        return slice(y0, y1), slice(x0, x1)

    def look_at(self, rows: slice, columns: slice) -> None:
        """Move so that a window, in pixels, fills the view."""
        edges = [rows.start, rows.stop, columns.start, columns.stop]
        self.canvas.sight = [float(edge) for edge in edges]  # for views that open later
        self.canvas.send({"kind": "look_at", "window": edges})

    def refresh(self, window: Window | None = None, number: int = 1) -> None:
        """Show a prediction anew, all of it or a window: what has been computed since."""
        height, width = self.canvas.shape
        rows, columns = window or (slice(0, height), slice(0, width))
        edges = [rows.start, rows.stop, columns.start, columns.stop]
        self._changes += 1
        self.canvas.send({"kind": "changed", "picture": number, "window": edges})
        self._say()

    def _ipython_display_(self) -> None:
        # First what is left where no kernel lives; the widget hides it while it is there.
        display(HTML(f'<div class="inkdask-static">{self._static}</div>'))
        display(self.widget)

    def _controls(self) -> dict[str, Any]:
        canvas = self.canvas
        controls: dict[str, Any] = {}
        if self._papyrus:
            controls["layer"] = widgets.SelectionSlider(
                options=[(f"{number:02d}", i) for i, number in enumerate(canvas.numbers)],
                value=canvas.layer,
                description="Layer",
                continuous_update=True,
            )
            controls["contrast"] = widgets.IntRangeSlider(
                value=canvas.contrast, min=0, max=255, description="Contrast"
            )
            # Between two models, SelectionSlider has an index, which is the layer's.
            widgets.jslink((controls["layer"], "index"), (canvas, "layer"))
            widgets.jslink((controls["contrast"], "value"), (canvas, "contrast"))
        if self._papyrus and self._inks:
            controls["opacity"] = widgets.FloatSlider(
                value=canvas.opacity, min=0, max=1, step=0.05, description="Ink"
            )
            widgets.jslink((controls["opacity"], "value"), (canvas, "opacity"))
            controls["beside"] = widgets.ToggleButtons(
                options=["over", "beside"], value="over" if canvas.columns == 1 else "beside"
            )
            controls["beside"].style.button_width = "5em"
            controls["beside"].observe(self._on_beside, "value")
        if self._inks:
            controls["draw"] = widgets.ToggleButton(
                description="Draw a box", icon="object-group", layout={"width": "9em"},
                tooltip="Drag over the picture: the box is computed first",
            )  # fmt: skip
            widgets.jslink((controls["draw"], "value"), (canvas, "is_drawing"))
            controls["compute"] = widgets.Button(
                description="Compute", icon="play", layout={"width": "8em"},
                tooltip="Compute all that is in sight",
            )  # fmt: skip
            controls["compute"].on_click(lambda _: self._focus(_pixels(canvas)))
        controls["status"] = widgets.HTML()
        controls["status"].add_class("inkdask-status")
        return controls

    def _toolbar(self) -> widgets.HBox:
        shown = [control for name, control in self.controls.items() if name != "status"]
        return widgets.HBox(shown, layout={"flex_flow": "row wrap"})

    def _on_beside(self, change: Any) -> None:
        panels, columns = _BESIDE if change["new"] == "beside" else _OVER
        with self.canvas.hold_sync():  # else the browser lays out with one of them
            self.canvas.panels, self.canvas.columns = panels, columns

    def _on_sight(self, _: Any) -> None:
        for ink in self._inks:
            ink.see(_pixels(self.canvas))
        self._say()

    def _on_box(self, _: Any) -> None:
        if self.box:
            self._focus(self.box)

    def _focus(self, window: Window) -> None:
        for ink in self._inks:
            ink.focus(window)
        self._say()

    def _say(self, trouble: str = "") -> None:
        words = trouble or " · ".join(dict.fromkeys(ink.status for ink in self._inks))
        self.controls["status"].value = html.escape(words)

    def _on_message(self, _: Any, content: Any, __: Any) -> None:
        """Serve the tiles in sight; those asked for before and not begun are out of sight."""
        if content.get("kind") != "tiles":
            return
        wanted: list[TileKey] = [tuple(key) for key in content["wanted"]]
        with self._turn:
            for key in self._asked.keys() - set(wanted):
                if self._asked[key].cancel():
                    del self._asked[key]
            for key in wanted:
                if key not in self._asked:
                    self._asked[key] = self._readers.submit(self._serve, key)

    def _serve(self, key: TileKey) -> None:
        picture, layer, *place = key
        before = self._changes
        try:
            if picture == PAPYRUS:
                assert self._papyrus is not None  # noqa: S101  its panels are not there without it
                pixels = self._papyrus.tile(layer, *place)
            else:
                pixels = self._inks[picture - 1].tile(*place)
        except Exception as error:
            self._say(str(error) or type(error).__name__)
            return
        finally:
            with self._turn:
                self._asked.pop(key, None)
        size = {"kind": "tile", "key": list(key), "size": list(pixels.shape)}
        self.canvas.send(size, [pixels.tobytes()])
        with self._turn:  # what changed while it was read may be missing from it
            if self._changes != before and picture != PAPYRUS and key not in self._asked:
                self._asked[key] = self._readers.submit(self._serve, key)


class _Changed:
    """Tells a viewer of a prediction's chunks."""

    def __init__(self, viewer: Viewer, number: int) -> None:
        self._viewer, self._number = viewer, number

    def __call__(self, window: Window) -> None:
        self._viewer.refresh(window, self._number)


_OVER = [{"title": "", "papyrus": True, "ink": 1}], 1
_BESIDE = (
    [
        {"title": "papyrus", "papyrus": True, "ink": 0},
        {"title": "ink", "papyrus": False, "ink": 1},
    ],
    2,
)


def _pixels(canvas: Canvas) -> Window:
    """What is in sight, in whole pixels of the picture."""
    height, width = canvas.shape
    y0, y1, x0, x1 = canvas.sight or (0, height, 0, width)
    return (
        slice(max(int(y0), 0), max(min(int(y1) + 1, height), 1)),
        slice(max(int(x0), 0), max(min(int(x1) + 1, width), 1)),
    )
