"""From a plan and its settings to what says which job it is (`inkdask.identity`)."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from inkdask import storage
from inkdask.errors import without_password
from inkdask.identity import Origin, Provenance, Recipe, Region, Said
from inkdask.models.callables import name_of
from inkdask.models.registry import known
from inkdask.plan import Plan
from inkdask.segment import home_of
from inkdask.settings import Settings

SOFTWARE = ("inkdask", "torch", "dask", "zarr", "numpy")

# Parameters that change the grid, beside those that `_command` always says, and parameters that
# change only the picture.
OF_GRIDS = (
    "ome_zarr_level", "z_downsample_mean_factor", "force_reverse", "model_type", "model_in_chans",
    "precision", "tta", "chunk_size",
)  # fmt: skip
OF_PICTURES = (
    "roi_xyxy", "blend_mode", "gaussian_sigma", "reverse_video", "spread",
    "pixel_resolution_um", "add_scale_bar", "scale_bar_length_um",
)  # fmt: skip
# Parameters that the command of a grid may say.
OF_COMMANDS = (
    "model", "layers", "tile", "stride", "clip", "divisor", "surface_volume_zarr", "mask_path",
    *OF_GRIDS, *OF_PICTURES,
)  # fmt: skip
OF_PATHS = ("surface_volume_zarr", "mask_path")
# What `reduce` asks of a record also when the user does not say it: there is no word for "none".
UNSAID = ("force_reverse", "z_downsample_mean_factor", "roi_xyxy")


def recipe_of(plan: Plan) -> Recipe:
    """Return what shapes the tiles of a plan, and the chunks they are stored in."""
    network, tiling, segment = plan.network, plan.tiling, plan.segment
    return Recipe(
        input=segment.identity if segment else None,
        mask=segment.mask_identity if segment else None,
        layers=plan.layers,
        direction="reverse" if plan.is_reversed else "forward",
        averaged=plan.averaged,
        corner=plan.corner,
        size=tiling.shape,
        model=network.model.key,
        architecture=network.model.architecture,
        weights=network.digest,
        clip=network.clip,
        divisor=network.divisor,
        precision=network.precision,
        tta=network.tta,
        tile=tiling.tile,
        stride=tiling.stride,
        k=network.k,
        chunk=(tiling.y.step, tiling.x.step),
    )


@cache
def software() -> dict[str, str]:
    """Return the versions of Python and of the packages that shape a picture."""
    return {"python": platform.python_version(), **{name: version(name) for name in SOFTWARE}}


def origin_of(plan: Plan, settings: Settings) -> Origin:
    """Return where the tiles of a plan come from; source and layers are the plan's own."""
    segment = plan.segment
    origin = Origin(
        segment=plan.name,
        source=absolute(plan.source),
        volume=absolute(segment.uri) if segment else None,
        ome_zarr_level=segment.level if segment else settings.ome_zarr_level,
        mask=absolute(segment.mask_uri) if segment else None,
        layer_range=plan.layer_range,
        opened=plan.opened,
        weights_from=None if plan.network.function else plan.network.model.weights,
        roi_xyxy=plan.roi_xyxy,
        software=software(),
        command=None,
        offset=plan.inside.offset if plan.inside else None,
        pixel_um=segment.pixel_um if segment else None,
    )
    origin = without_secrets(origin)
    if plan.network.function is not None:
        return origin
    return replace(origin, command=_command(plan, origin, settings))


def said_of(plan: Plan, origin: Origin, settings: Settings) -> Said | None:
    """Return what was asked for, with all that was left open settled; None for an array."""
    if origin.source is None:
        return None
    return Said(
        s3_path=origin.source,
        surface_volume_zarr=None if origin.volume == origin.source else origin.volume,
        ome_zarr_level=origin.ome_zarr_level,
        mask_path=origin.mask,
        layers=origin.layer_range,
        force_reverse=plan.is_reversed,
        z_downsample_mean_factor=plan.averaged,
        model=_model(settings.model),
        model_in_chans=plan.network.layers,
        clip=plan.network.clip,
        divisor=plan.network.divisor,
        precision=plan.network.precision,
        tta=plan.network.tta,
        tile=plan.tiling.tile,
        stride=plan.tiling.stride,
        roi_xyxy=settings.roi_xyxy or origin.roi_xyxy,
        chunk_size=plan.tiling.y.chunk,
    )


def asked_of(settings: Settings) -> dict[str, Any]:
    """Return what the settings ask of a job, by the names of `Said`."""
    asked = {
        name: absolute(value) if name in OF_PATHS else value
        for name, value in settings
        if name in Said.__dataclass_fields__
        and (name in UNSAID or (name in settings.model_fields_set and name != "model"))
    }
    asked["force_reverse"] = settings.is_reversed
    source = settings.s3_path and home_of(settings.s3_path)
    asked |= {"layers": settings.layers, "s3_path": without_secrets(absolute(source))}
    if settings.model is not None:
        asked["model"] = _model(settings.model)
    # PRECISION=auto asks for that of the model, as no PRECISION does.
    return {
        name: value
        for name, value in asked.items()
        if value != "auto" and (value is not None or name in UNSAID)
    }


def picture_options(settings: Settings, roi: Region | None) -> tuple[str, ...]:
    """Return what the settings say about the picture alone, as words of a command."""
    return tuple(words_of(_changed(OF_PICTURES, {**dict(settings), "roi_xyxy": roi})))


def _command(plan: Plan, origin: Origin, settings: Settings) -> tuple[str, ...]:
    """Return the words of the command that makes the same grid.

    What the model or the program would choose is said too, because a later version might choose
    otherwise.
    """
    settled = {"ome_zarr_level": origin.ome_zarr_level, "force_reverse": plan.is_reversed}
    said = {
        "model": _model(settings.model),
        "layers": "{}:{}".format(*origin.layer_range),
        "tile": plan.tiling.tile,
        "stride": plan.tiling.stride,
        "clip": plan.network.clip,
        "divisor": plan.network.divisor,
        "surface_volume_zarr": None if origin.volume == origin.source else origin.volume,
        "mask_path": without_secrets(absolute(plan.mask_path)),
        **_changed(OF_GRIDS, {**dict(settings), **settled}),
    }
    return "inkdask", "run", str(origin.source), *words_of(said)


def _changed(names: Sequence[str], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parameters that are not at their defaults."""
    usual = Settings.model_fields
    return {name: values[name] for name in names if values[name] != usual[name].default}


def words_of(values: Mapping[str, Any]) -> Iterator[str]:
    """Yield parameters as words of a command, but for those that are None or False."""
    for name, value in values.items():
        if value is None or value is False:
            continue
        yield f"--{name.replace('_', '-')}"
        if isinstance(value, tuple | list):
            yield ",".join(map(str, value))
        elif value is not True:
            yield f"{value:.15g}" if isinstance(value, float) else str(value)


def _model(model: Any) -> str:
    """Return the model as the user named it; a local checkpoint with its whole path."""
    if callable(model):
        return name_of(model)
    return str(model if model in known() else absolute(model))


def absolute(value: Any) -> Any:
    """Return a local path that exists as it is from any folder; anything else as it is."""
    if isinstance(value, str) and storage.is_local(value):
        with storage.explained(value):
            if Path(path := storage.absolute(value)).exists():
                return path
    return value


def shell_line(words: Sequence[str], command: str, options: Collection[str]) -> str:
    """Return the line for a shell of a recorded command; empty for one that inkdask did not record.

    A file may say anything. Only ``inkdask`` with ``command``, a place, and some ``options``, by
    their names in Python, is offered to be repeated.
    """
    if tuple(words[:2]) != ("inkdask", command) or words[2:3] == () or words[2].startswith("-"):
        return ""
    rest = iter(words[3:])
    for word in rest:
        name = word.removeprefix("--").replace("-", "_")
        if word[:2] != "--" or name not in options:
            return ""
        field = Settings.model_fields.get(name)
        if field is None or field.annotation is not bool:
            next(rest, None)
    return shlex.join(words)


def without_secrets(value: Any) -> Any:
    """Return the same value without the user and password of any URI."""
    if isinstance(value, Origin | Provenance):
        return type(value).from_json(without_secrets(value.to_json()), "it")
    if isinstance(value, Mapping):
        return {key: without_secrets(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(without_secrets(item) for item in value)
    return without_password(value) if isinstance(value, str) else value
