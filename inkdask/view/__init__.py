"""Looking at segments and predictions in Jupyter.

The classes call these functions only when somebody looks, so that a job needs neither widgets nor
a browser. The widgets stand on anywidget and ipywidgets, because these run in JupyterLab, Notebook,
VS Code and Voilà alike, without a network and without megabytes in the saved notebook (a Bokeh plot
brings its library along or fetches it). The browser holds the tiles it has seen: it zooms, blends
and changes contrast without asking the kernel, which ipympl asks for every move.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from inkdask import showing
from inkdask.errors import InkdaskError

if TYPE_CHECKING:
    from inkdask.box import Slices
    from inkdask.inkmap import InkMap
    from inkdask.segment import Segment
    from inkdask.view.viewer import Viewer

__all__ = ["compare", "ink_html", "middle", "segment_html", "show_ink", "show_segment"]


def segment_html(segment: Segment) -> str:
    """Describe a segment, with a thumbnail; reads under 1 % of a large one."""
    from inkdask.view import html

    return html.segment_html(segment)


def ink_html(ink: InkMap) -> str:
    """Describe a prediction, with a thumbnail of what is known of it; computes nothing."""
    from inkdask.view import html

    return html.ink_html(ink)


def middle(segment: Segment, side: int) -> Slices:
    """Return rows and columns with much papyrus about the middle; reads as `segment_html` does.

    Parameters
    ----------
    segment
        From `inkdask.open_segment`.
    side
        Most rows and columns, in pixels.
    """
    from inkdask.view import html

    return html.middle(segment, side)


def show_segment(segment: Segment, *, height: int = 480, pixel_um: float | None = None) -> Viewer:
    """Show the layers of a segment: slide through them, set the contrast, zoom and pan.

    Parameters
    ----------
    segment
        From `inkdask.open_segment`.
    height
        Of the viewer, in pixels of the screen.
    pixel_um
        Side of a pixel in micrometers, for a scale bar.
    """
    return _viewer().of_segment(segment, height=height, pixel_um=pixel_um)


def show_ink(
    ink: InkMap,
    *,
    beside: bool = False,
    spread: bool = False,
    height: int = 480,
    pixel_um: float | None = None,
) -> Viewer:
    """Show a prediction over its papyrus, or beside it.

    The background computes what is in sight, from the middle outwards, if that is a few chunks;
    more when a box is drawn or the button is pressed.

    Parameters
    ----------
    ink
        From `inkdask.predict`.
    beside
        Whether papyrus and prediction begin side by side.
    spread
        Whether the spread of opinions is shown beside them, white where it is 0.5.
    height
        Of the viewer, in pixels of the screen.
    pixel_um
        Side of a pixel in micrometers, for a scale bar. Default: the prediction's
        ``pixel_resolution_um``.
    """
    how = {"beside": beside, "spread": spread, "height": height, "pixel_um": pixel_um}
    return _viewer().of_ink(ink, **how)


def compare(predictions: Mapping[str, InkMap], *, columns: int = 2, height: int = 560) -> Viewer:
    """Show predictions of one segment side by side, all at the same place.

    Parameters
    ----------
    predictions
        Predictions of one size, by their titles.
    columns
        Panels in a row.
    height
        Of the viewer, in pixels of the screen.
    """
    if not isinstance(predictions, Mapping) or not predictions:
        raise InkdaskError('compare takes predictions by what to call them: {"a": ink_a, ...}.')
    return _viewer().of_several(predictions, columns=columns, height=height)


def _viewer() -> Any:
    try:
        from inkdask.view.viewer import Viewer
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("anywidget", "ipywidgets", "traitlets"):
            raise
        raise InkdaskError(
            f"The viewer needs {error.name}: install it with pip install 'inkdask[viz]'."
        ) from None
    return Viewer


showing.view = sys.modules[__name__]
