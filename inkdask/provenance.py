"""What shapes a result: the fingerprint of its tile grid, and the origin that pictures carry."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inkdask import storage
from inkdask.plan import Plan
from inkdask.settings import Settings
from inkdask.store import FORMAT

SOFTWARE = ("inkdask", "torch", "dask", "zarr", "numpy")


def fingerprint(plan: Plan) -> dict[str, Any]:
    """Everything that shapes the tile probabilities, and the chunks they are stored in.

    Two jobs with equal fingerprints share a stored grid. The window of the blend is not in it:
    a grid can be blended again with another one.
    """
    network, tiling = plan.network, plan.tiling
    return {
        "format": FORMAT,
        "input": plan.segment.identity if plan.segment else None,
        "layers": list(plan.layers),
        "averaged": len(plan.layers) // network.layers,
        "corner": list(_corner(plan)),
        "shape": list(tiling.shape),
        "model": network.model.key,
        "architecture": network.model.architecture,
        "weights": network.digest,
        "tile": tiling.tile,
        "stride": tiling.stride,
        "k": network.k,
        "clip": network.clip,
        "divisor": network.divisor,
        "precision": network.precision,
        "chunk": [tiling.y.step, tiling.x.step],
    }


def origin_of(plan: Plan, settings: Settings) -> dict[str, Any]:
    """Where a tile grid comes from, beside what shapes it: kept with it, for its pictures."""
    start, end = settings.layers or (min(plan.layers), max(plan.layers) + 1)
    origin = {
        "segment": plan.name,
        "source": absolute(_source(plan, settings)),
        "volume": absolute(plan.segment.uri) if plan.segment else None,
        "ome_zarr_level": settings.ome_zarr_level,
        "mask": absolute(plan.segment.mask_uri) if plan.segment else None,
        "layer_range": [start, end],
        "direction": "reverse" if settings.force_reverse else "forward",
        "weights_from": None if plan.network.function else plan.network.model.weights,
        "roi_xyxy": _region(plan, settings),
        "software": {"python": platform.python_version(), **{p: version(p) for p in SOFTWARE}},
        "command": command(plan, settings),
    }
    return without_secrets(origin)


def provenance(
    identity: Mapping[str, Any], origin: Mapping[str, Any], settings: Settings
) -> dict[str, Any]:
    """The origin of a picture: for zarr attributes, PNG text, TIFF tags. No secrets are in it."""
    roi = settings.roi_xyxy or origin["roi_xyxy"]
    said = origin["command"]
    return {
        "fingerprint": dict(identity),
        **origin,
        "roi_xyxy": list(roi) if roi else None,
        "blend_mode": settings.blend_mode,
        "gaussian_sigma": settings.gaussian_sigma,
        "pixel_resolution_um": settings.pixel_resolution_um,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": said and shlex.join([*said, *_options(OF_PICTURES, settings, roi_xyxy=roi)]),
    }


# Parameters that shape a tile grid, beside those that `command` always says; and its pictures.
OF_GRIDS = (
    "surface_volume_zarr", "ome_zarr_level", "mask_path", "z_downsample_mean_factor",
    "force_reverse", "model_type", "model_in_chans", "precision", "chunk_size",
)  # fmt: skip
OF_PICTURES = (
    "roi_xyxy", "blend_mode", "gaussian_sigma", "reverse_video", "pixel_resolution_um",
    "add_scale_bar", "scale_bar_length_um",
)  # fmt: skip


def command(plan: Plan, settings: Settings) -> list[str] | None:
    """The command that makes the same tile grid; None when the model is no more than a function.

    What the model or the program would choose is said too, so that a later version, which might
    choose otherwise, repeats it.
    """
    if plan.network.function is not None:
        return None
    start, end = settings.layers or (min(plan.layers), max(plan.layers) + 1)
    words = ["inkdask", "run", absolute(_source(plan, settings)), "--model", _model(plan, settings)]
    words += ["--layers", f"{start}:{end}", "--tile", plan.tiling.tile]
    words += ["--stride", plan.tiling.stride, "--clip", f"{plan.network.clip:.15g}"]
    words += ["--divisor", f"{plan.network.divisor:.15g}"]
    return [*map(str, words), *_options(OF_GRIDS, settings)]


def _corner(plan: Plan) -> tuple[int, int]:
    """Where the tiles begin: row and column of the segment's files, also where it was cropped."""
    if plan.inside is None or plan.inside.window is None:
        return plan.corner
    rows, columns = plan.inside.window
    return rows.start, columns.start


def _region(plan: Plan, settings: Settings) -> list[int] | None:
    """What the picture shows, in pixels of the segment's files; None for all of it."""
    if plan.segment is None or plan.segment.window is None:
        return list(settings.roi_xyxy) if settings.roi_xyxy else None
    rows, columns = plan.segment.window  # in which the region of interest is counted
    height, width = plan.segment.shape[1:]
    x0, y0, x1, y1 = settings.roi_xyxy or (0, 0, width, height)
    left, top = columns.start, rows.start
    return [left + x0, top + y0, left + x1, top + y1]


def _source(plan: Plan, settings: Settings) -> str | None:
    """The segment as the user named it, or as it was opened."""
    return settings.s3_path or (plan.segment.uri if plan.segment else None)


def _options(names: Sequence[str], settings: Settings, **instead: Any) -> Iterator[str]:
    """Those of some parameters that are not at their defaults, as words of a command."""
    for name in names:
        value = instead.get(name, getattr(settings, name))
        value = absolute(value) if name in ("surface_volume_zarr", "mask_path") else value
        if value != Settings.model_fields[name].default:
            yield f"--{name.replace('_', '-')}"
            if isinstance(value, tuple | list):
                yield ",".join(map(str, value))
            elif value is not True:
                yield f"{value:.15g}" if isinstance(value, float) else str(value)


def _model(plan: Plan, settings: Settings) -> str:
    """The model as the user named it; a folder that happens to have its key is not meant."""
    of_path = settings.model == plan.network.model.weights
    return str(absolute(settings.model) if of_path else settings.model)


def absolute(value: Any) -> Any:
    """A local path as it is everywhere on this machine; anything else as it is."""
    if isinstance(value, str) and storage.is_local(value):
        with storage.explained(value):
            if Path(value).exists():
                return str(Path(value).absolute())
    return value


def without_secrets(value: Any) -> Any:
    """The same value, where no URI says a user and a password."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return re.sub(r"://[^/@\s]+@", "://", value) if isinstance(value, str) else value
