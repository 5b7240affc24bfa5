"""inkdask: ink detection on surface volumes as one lazy Dask array program.

seg = inkdask.open_segment("s3://bucket/segment", layers=(0, 26))
ink = inkdask.predict(seg, model="timesformer-scroll5")
ink.map[4000:5000, 4000:5000].compute()

inkdask.run("s3://bucket/segment", model="timesformer-scroll5", layers=(0, 26))
"""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inkdask import view

__version__ = "0.1.0"

try:
    Path.home()
except RuntimeError:  # without HOME, for an unknown user; bokeh, for one, cannot be imported
    from inkdask.storage.scratch import Scratch

    _home = Scratch()  # which the next job removes, if this process is killed
    os.environ["HOME"] = str(_home.path)

if TYPE_CHECKING:
    from inkdask.controls.evidencing import evidence
    from inkdask.controls.sweeps import sweep
    from inkdask.errors import InkdaskError
    from inkdask.inkmap import InkMap
    from inkdask.pictures.exporting import export
    from inkdask.segment import Segment, open_segment
    from inkdask.settings import Settings
    from inkdask.specs import ModelSpec
    from inkdask.workflow import check, predict, prepare, reduce, run

_HOME = {
    "InkMap": "inkmap",
    "InkdaskError": "errors",
    "ModelSpec": "specs",
    "Segment": "segment",
    "Settings": "settings",
    "check": "workflow",
    "evidence": "controls.evidencing",
    "export": "pictures.exporting",
    "open_segment": "segment",
    "predict": "workflow",
    "prepare": "workflow",
    "reduce": "workflow",
    "run": "workflow",
    "sweep": "controls.sweeps",
}

__all__ = [*_HOME, "view"]


def __getattr__(name: str) -> Any:
    """Load a public name at its first use, because ``import inkdask`` must stay light."""
    if name not in _HOME:
        raise AttributeError(f"module 'inkdask' has no attribute {name!r}")
    value = getattr(import_module(f"inkdask.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
