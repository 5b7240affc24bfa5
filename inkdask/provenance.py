"""What shapes a result: the fingerprint of its tile grid, and the origin that pictures carry."""

from __future__ import annotations

import platform
import re
import shlex
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inkdask import storage
from inkdask.plan import Plan
from inkdask.settings import Settings

FORMAT = 1  # of the stored grid; another number never resumes an older grid
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
        "corner": list(plan.corner),
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


def provenance(identity: Mapping[str, Any], plan: Plan, settings: Settings) -> dict[str, Any]:
    """The origin of a picture: for zarr attributes, PNG text, TIFF tags. No secrets are in it."""
    origin = {
        "fingerprint": dict(identity),
        "source": absolute(plan.segment.uri) if plan.segment else None,
        "mask": absolute(plan.segment.mask_uri) if plan.segment else None,
        "roi_xyxy": settings.roi_xyxy,
        "direction": "reverse" if settings.force_reverse else "forward",
        "weights_from": None if plan.network.function else plan.network.model.weights,
        "blend_mode": settings.blend_mode,
        "gaussian_sigma": settings.gaussian_sigma,
        "pixel_resolution_um": settings.pixel_resolution_um,
        "software": {"python": platform.python_version(), **{p: version(p) for p in SOFTWARE}},
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command(plan, settings),
    }
    return without_secrets(origin)


# Parameters that shape a picture, beside those that `command` always says.
SHAPING = (
    "surface_volume_zarr", "roi_xyxy", "mask_path", "z_downsample_mean_factor", "force_reverse",
    "model_type", "model_in_chans", "blend_mode", "gaussian_sigma", "precision",
    "pixel_resolution_um", "add_scale_bar", "scale_bar_length_um",
)  # fmt: skip


def command(plan: Plan, settings: Settings) -> str | None:
    """The command line that makes the same picture; None when the model is no more than a function.

    What the model or the program would choose is said too, so that a later version, which might
    choose otherwise, repeats it.
    """
    if plan.network.function is not None:
        return None
    start, end = settings.layers or (min(plan.layers), max(plan.layers) + 1)
    words = ["inkdask", "run", absolute(settings.s3_path), "--model", _model(plan, settings)]
    words += ["--layers", f"{start}:{end}", "--tile", plan.tiling.tile]
    words += ["--stride", plan.tiling.stride, "--clip", f"{plan.network.clip:.15g}"]
    words += ["--divisor", f"{plan.network.divisor:.15g}"]
    for name in SHAPING:
        value = getattr(settings, name)
        value = absolute(value) if name in ("surface_volume_zarr", "mask_path") else value
        if value != Settings.model_fields[name].default:
            words.append(f"--{name.replace('_', '-')}")
            if isinstance(value, tuple):
                words.append(",".join(map(str, value)))
            elif value is not True:
                words.append(f"{value:.15g}" if isinstance(value, float) else str(value))
    return shlex.join(map(str, words))


def _model(plan: Plan, settings: Settings) -> str:
    """The model as the user named it; a folder that happens to have its key is not meant."""
    of_path = settings.model == plan.network.model.weights
    return str(absolute(settings.model) if of_path else settings.model)


def absolute(value: Any) -> Any:
    """A local path as it is everywhere on this machine; anything else as it is."""
    if isinstance(value, str) and storage.is_local(value) and Path(value).exists():
        return str(Path(value).absolute())
    return value


def without_secrets(value: Any) -> Any:
    """The same value, where no URI says a user and a password."""
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_secrets(item) for item in value]
    return re.sub(r"://[^/@\s]+@", "://", value) if isinstance(value, str) else value
