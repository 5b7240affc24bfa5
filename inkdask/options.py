"""The settings as options of the command line."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo

from inkdask.settings import parameters


def settings_options(*only: str) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for each parameter, or for the named ones."""

    def decorate(command: Any) -> Any:
        for name, variable, field in reversed(list(parameters())):
            if name == "s3_path" or (only and name not in only):
                continue
            flag = f"--{name.replace('_', '-')}"
            kind: dict[str, Any] = {"metavar": _metavar(field)}
            if field.annotation is bool:
                flag, kind = f"{flag}/--no-{flag[2:]}", {"default": None}
            default = "" if field.default is None else f" (default: {field.default})"
            text = f"{field.description}{default} [{variable}]".replace("`", "")
            command = click.option(flag, name, help=text, **kind)(command)
        if only and "start_layer" not in only:
            return command
        return click.option(
            "--layers",
            metavar="START:END",
            help="Layer range, first inclusive, last exclusive. [START_LAYER, END_LAYER]",
        )(command)

    return decorate


def _metavar(field: FieldInfo) -> str:
    """Return the placeholder of an option's value in the help."""
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["metavar"])
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, kinds))
    kind: Any = kinds[0] if kinds else field.annotation
    return "|".join(map(str, get_args(kind))) or {int: "INT", float: "FLOAT"}.get(kind, "TEXT")
