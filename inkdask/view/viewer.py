"""The viewer: a widget that shows pictures by tiles, and the controls about it.

The browser asks for the tiles in sight and keeps them (``viewer.js``). The kernel's side reads them
in threads of its own, so that the kernel stays free.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anywidget
import ipywidgets as widgets
import traitlets
from IPython.display import HTML, display

from inkdask.box import Box, Slices
from inkdask.errors import InkdaskError
from inkdask.view import html, words
from inkdask.view.tiles import SIDE, Ink, Papyrus

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
        Title of each panel, whether it shows papyrus, the number of its prediction or 0, and what
        the largest value of that means: 1, or 0.5 for a spread of opinions.
    columns
        Panels in a row.
    layer, numbers
        Index of the layer that is shown, and the numbers of all.
    contrast
        Values that are black and white, 0 to 255.
    opacity
        Opacity of ink over papyrus, 0 to 1.
    colour, threshold
        Colour of ink, ``#rrggbb``, and the probability below which ink is not shown.
    corner, pixel_um
        First row and column of the pictures in their segment, and side of a pixel in micrometers,
        0 where it is not known.
    name
        Name of a picture that the browser saves.
    is_drawing
        Whether dragging draws a box; else it moves the picture.
    sight, box
        Pixels in sight, and the box that was drawn last: y0, y1, x0, x1.
    """

    _esm = "".join((_HERE / name).read_text("utf-8") for name in ("overlay.js", "viewer.js"))
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
    colour = traitlets.Unicode("#ff5c24").tag(sync=True)
    threshold = traitlets.Float(0.0).tag(sync=True)
    corner = traitlets.List(traitlets.Int(), [0, 0]).tag(sync=True)
    pixel_um = traitlets.Float(0.0).tag(sync=True)
    name = traitlets.Unicode("ink").tag(sync=True)
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
        Widgets about the canvas, by name.
    """

    def __init__(
        self,
        papyrus: Papyrus | None,
        inks: Sequence[Ink],
        panels: list[dict[str, Any]],
        static: str,
        **traits: Any,
    ) -> None:
        self._papyrus, self._inks, self._static = papyrus, tuple(inks), static
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
        self.canvas.add_class("inkdask-canvas")
        self.controls = self._controls()
        self.widget = widgets.VBox([self._toolbar(), self.canvas, self.controls["status"]])
        self.widget.add_class("inkdask-all")
        self.canvas.on_msg(self._on_message)
        self.canvas.observe(self._on_sight, "sight")
        self.canvas.observe(self._on_box, "box")
        for number, ink in enumerate(self._inks, 1):
            ink.observers.append(partial(self._on_change, number))
        self._say()

    @classmethod
    def of_segment(cls, segment: Segment, *, height: int, pixel_um: float | None) -> Viewer:
        """Show layers."""
        papyrus, panel, static = Papyrus.of_segment(segment), _panel("", True, 0), html.segment_html
        place = {"corner": list(papyrus.corner), "pixel_um": pixel_um or 0.0, "name": segment.name}
        return cls(papyrus, [], [panel], static(segment), height=height, **place)

    @classmethod
    def of_ink(
        cls, ink: InkMap, *, beside: bool, spread: bool, height: int, pixel_um: float | None
    ) -> Viewer:
        """Show a prediction and its papyrus, and the spread of opinions where it is wanted."""
        panels = (_BESIDE if beside else _OVER) + _SPREAD * spread
        inks = [Ink.of(ink), Ink.of(ink, is_spread=True)][: 1 + spread]
        traits = {"columns": len(panels), "height": height, **_place_of(ink, pixel_um)}
        return cls(Papyrus.of_plan(ink.plan), inks, panels, html.ink_html(ink), **traits)

    @classmethod
    def of_several(cls, predictions: Mapping[str, InkMap], *, columns: int, height: int) -> Viewer:
        """Show predictions side by side."""
        shapes = {ink.map.shape for ink in predictions.values()}
        if len(shapes) != 1:
            raise InkdaskError(
                "Predictions can be compared when they have one size, but these have "
                + " and ".join(f"{height} x {width}" for height, width in sorted(shapes))
                + " pixels."
            )
        panels = [_panel(title, False, number) for number, title in enumerate(predictions, 1)]
        inks, static = map(Ink.of, predictions.values()), html.several_html(predictions)
        place = _place_of(next(iter(predictions.values())), None)
        return cls(None, list(inks), panels, static, columns=columns, height=height, **place)

    @property
    def box(self) -> Slices | None:
        """The box that was drawn last, as rows and columns: ``ink.map[viewer.box]``."""
        return Box(*self.canvas.box).slices if self.canvas.box else None

    def look_at(self, rows: slice, columns: slice) -> None:
        """Move so that these rows and columns, in pixels, fill the view."""
        edges = [rows.start, rows.stop, columns.start, columns.stop]
        self.canvas.sight = [float(edge) for edge in edges]  # for views that open later
        self.canvas.send({"kind": "look_at", "box": edges})

    def _ipython_display_(self) -> None:
        # The static picture stays where no kernel lives; the widget hides it.
        display(HTML(f'<div class="inkdask-static">{self._static}</div>'))
        display(self.widget)

    def _controls(self) -> dict[str, Any]:
        """Make the controls; the browser links most of them, without the kernel."""
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
                value=canvas.contrast, min=0, max=255, description="Contrast", readout=False,
                tooltip="Values that are black and white",
            )  # fmt: skip
        if self._papyrus and self._inks:
            controls["beside"] = widgets.ToggleButton(
                value=not canvas.panels[0]["ink"], description="Beside",
                tooltip="Ink beside the papyrus, or over it",
            )  # fmt: skip
            controls["beside"].observe(self._on_beside, "value")
            controls["colour"] = widgets.ColorPicker(
                value=canvas.colour, concise=True, description="Ink", tooltip="Colour of ink"
            )
            controls["opacity"] = widgets.FloatSlider(
                value=canvas.opacity, min=0, max=1, step=0.05, readout=False,
                tooltip="Opacity of ink over papyrus",
            )  # fmt: skip
        if self._inks:
            controls["threshold"] = widgets.FloatSlider(
                value=canvas.threshold, min=0, max=1, step=0.05, description="Threshold",
                readout_format=".2f", tooltip="Ink below this probability is not shown",
            )  # fmt: skip
            controls["compute"] = widgets.Button(description="Compute all")
            controls["compute"].on_click(self._on_compute)
        for name in controls.keys() & {"layer", "contrast", "colour", "opacity", "threshold"}:
            # The index of a SelectionSlider, which only its model has, is the layer's.
            value = "index" if name == "layer" else "value"
            widgets.jslink((controls[name], value), (canvas, name))
        controls["status"] = widgets.HTML()
        controls["status"].add_class("inkdask-status")
        return controls

    def _toolbar(self) -> widgets.Box:
        rows = ("layer", "contrast", "beside"), ("colour", "opacity", "threshold", "compute")
        groups = [
            widgets.Box([self.controls[name] for name in row if name in self.controls])
            for row in rows
            if self.controls.keys() & set(row)
        ]
        for group in groups:
            group.add_class("inkdask-group")
        return widgets.Box(groups).add_class("inkdask-tools")

    def _on_beside(self, change: Any) -> None:
        panels = (_BESIDE if change["new"] else _OVER) + _SPREAD * (len(self._inks) > 1)
        with self.canvas.hold_sync():  # because the browser lays out by both
            self.canvas.panels, self.canvas.columns = panels, len(panels)
        for name in ("colour", "opacity"):  # of ink over papyrus
            self.controls[name].disabled = change["new"]

    def _on_sight(self, _: Any) -> None:
        for ink in self._inks:
            ink.background.see(_sight(self.canvas))
        self._say()

    def _on_box(self, _: Any) -> None:
        box = Box(*self.canvas.box) if self.canvas.box else None
        for ink in self._inks:
            ink.background.choose(box)
        self._say()

    def _on_compute(self, _: Any) -> None:
        """Compute what is in sight; with all in sight, go pass by pass where there are passes."""
        sight = _sight(self.canvas)
        for ink in self._inks:
            if sight.holds(ink.whole):
                ink.background.start()
            else:
                ink.background.focus(sight)
        self._say()

    def _on_change(self, number: int, box: Box | None) -> None:
        """Tell the browser of pixels that have changed, and the user how far it is."""
        if box is not None:
            self._changes += 1
            edges = [box.top, box.bottom, box.left, box.right]
            self.canvas.send({"kind": "changed", "picture": number, "box": edges})
        self._say()

    def _say(self, trouble: str = "") -> None:
        """Tell how far it is and what the button would do, or what went wrong."""
        if self._inks:
            backgrounds = [*dict.fromkeys(ink.background for ink in self._inks)]  # may be shared
            button = words.offer(backgrounds, _sight(self.canvas), self._inks[0].whole)
            trouble = trouble or words.status(backgrounds, button)
            self.controls["compute"].description = button.label
            self.controls["compute"].disabled = not button.is_open
            self.controls["compute"].tooltip = button.sentence
        self.controls["status"].value = html.escape(trouble)
        self.controls["status"].layout.display = None if trouble else "none"

    def _on_message(self, _: Any, content: Any, __: Any) -> None:
        """Serve the tiles in sight; earlier ones that are not begun are out of sight."""
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
        with self._turn:  # a tile lacks what has changed while it was read
            if self._changes != before and picture != PAPYRUS and key not in self._asked:
                self._asked[key] = self._readers.submit(self._serve, key)


def _panel(title: str, papyrus: bool, ink: int, most: float = 1) -> dict[str, Any]:
    return {"title": title, "papyrus": papyrus, "ink": ink, "most": most}


_OVER = [_panel("", True, 1)]
_BESIDE = [_panel("papyrus", True, 0), _panel("ink", False, 1)]
_SPREAD = [_panel("spread of opinions", False, 2, most=0.5)]


def _place_of(ink: InkMap, pixel_um: float | None) -> dict[str, Any]:
    """Traits of a canvas that tell where a prediction lies."""
    corner = ink.plan.region.shift(*ink.plan.corner).corner
    return {
        "corner": list(corner),
        "pixel_um": pixel_um or ink.pixel_um or 0.0,
        "name": f"{ink.plan.name}_{ink.network.model.key}".replace("/", "_"),
    }


def _sight(canvas: Canvas) -> Box:
    """Whole pixels of the picture that are in sight, at least one."""
    height, width = canvas.shape
    y0, y1, x0, x1 = canvas.sight or (0, height, 0, width)
    return Box(
        max(int(y0), 0), max(min(int(y1) + 1, height), 1),
        max(int(x0), 0), max(min(int(x1) + 1, width), 1),
    )  # fmt: skip
