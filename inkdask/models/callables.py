"""Models that are Python callables: tried on one tile, and told apart by a digest.

A callable travels as a cloudpickle. A pickle holds the code of functions that cannot be imported,
such as those of a notebook, and names all other code. So a digest of the pickle notices no edit in
a module that the pickle names: see `_digest`.
"""

from __future__ import annotations

import hashlib
import inspect
import logging
import pickletools
import sys
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from types import FunctionType
from typing import Any

from inkdask.errors import InkdaskError
from inkdask.specs import ModelSpec

log = logging.getLogger("inkdask")

# In the digest of a callable whose code is not all known: no later process has the same.
_THIS_PROCESS = uuid.uuid4().bytes

_IMPORT = ("cloudpickle.cloudpickle", "subimport")  # what imports a module when unpickled


def resolve_callable(
    function: Callable[[Any], Any],
    layers: int | None = None,
    tile: int | None = None,
    version: str | None = None,
) -> tuple[ModelSpec, str, int]:
    """Return spec, digest and k of a callable, which is tried on one tile of zeros.

    Parameters
    ----------
    function
        Takes float32 (b, 1, layers, tile, tile) to logits (b, 1, k, k).
    layers, tile
        Layers of a tile and its side in pixels; 26 and 64 by default.
    version
        Stands for the code that the pickle only names.
    """
    import cloudpickle  # type: ignore[import-untyped]

    name = name_of(function)
    if getattr(function, "training", False):
        raise InkdaskError(f"The model {name} is in training mode: call its eval() first.")
    try:
        pickled = cloudpickle.dumps(function)
    except Exception as error:
        raise InkdaskError(f"The model {name} cannot travel to workers: {error}.") from error
    spec = ModelSpec(name, "", "", layers=layers or 26, tile=tile or 64)
    k = _try(function, spec)
    return replace(spec, pixels_per_logit=spec.tile // k), _digest(function, pickled, version), k


def name_of(function: Any) -> str:
    """Return the name of a function, or of the class of another callable."""
    return str(getattr(function, "__name__", type(function).__name__)).strip("<>")


def _try(function: Callable[[Any], Any], spec: ModelSpec) -> int:
    """Return the side k of the logits (1, 1, k, k) of one tile of zeros."""
    import torch

    parameters: Callable[[], Iterable[Any]] = getattr(function, "parameters", tuple)
    device = next((parameter.device for parameter in parameters()), "cpu")
    shape = (1, 1, spec.layers, spec.tile, spec.tile)
    try:
        with torch.inference_mode():
            logits = function(torch.zeros(shape, device=device))
    except Exception as error:
        raise InkdaskError(
            f"The model {spec.key} failed on a tile of shape {shape}: "
            f"{type(error).__name__}: {error}."
        ) from error
    got = tuple(logits.shape) if hasattr(logits, "shape") else ()
    k = got[-1] if got else 0
    if got != (1, 1, k, k) or not 1 <= k <= spec.tile:
        what = f"shape {got}" if hasattr(logits, "shape") else type(logits).__name__
        raise InkdaskError(
            f"The model {spec.key} must return logits of shape (1, 1, k, k) for a tile of shape "
            f"{shape}, not {what}."
        )
    return k


def _digest(function: Callable[[Any], Any], pickled: bytes, version: str | None) -> str:
    """Return a SHA-256 that differs between callables.

    Without a version, a callable whose pickle names the user's own modules gets a digest of this
    process alone, because these modules may be edited before the next one. The digest includes
    their files, so that an edited and reloaded module gives another digest in this process.
    """
    if version is not None:
        return _sha256(pickled, version.encode())
    modules = sorted(filter(_is_users_own, set(_modules_named(pickled))))
    if not modules:
        return _sha256(pickled, _source_file(function))
    log.warning(
        "Tiles of the model %s will not resume in a later process, because code in your module %s "
        "may change unseen: set model_version= (MODEL_VERSION), and change it with the code.",
        name_of(function),
        modules[0],
    )
    return _sha256(pickled, *(_content(_file_of(module)) for module in modules), _THIS_PROCESS)


def _sha256(*parts: bytes) -> str:
    return hashlib.sha256(b"".join(parts)).hexdigest()


def _source_file(function: Any) -> bytes:
    """Return the content of the file that defines a callable, or nothing without such a file."""
    try:
        kind = function if isinstance(function, FunctionType) else type(function)
        return _content(Path(inspect.getfile(kind)))
    except (OSError, TypeError):  # of a built-in or interactive class
        return b""


def _content(path: Path | None) -> bytes:
    """Return the content of a file, or nothing where it cannot be read."""
    try:
        return path.read_bytes() if path else b""
    except OSError:
        return b""


def _modules_named(pickled: bytes) -> Iterator[str]:
    """Yield the names of modules that unpickling would import; nothing is imported here."""
    memo: dict[Any, Any] = {}
    before: Any = None  # the two latest values on the pickle's stack: strings, or names of objects
    latest: Any = None
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name == "MEMOIZE":
            memo[len(memo)] = latest
            continue
        if opcode.name == "STACK_GLOBAL":
            yield before
            before, latest = None, (before, latest)
            continue
        pushed: Any = memo.get(argument) if "BINGET" in opcode.name else argument
        before, latest = latest, pushed if isinstance(pushed, str | tuple) else None
        if before == _IMPORT and isinstance(latest, str):
            yield latest


def _is_users_own(module: str) -> bool:
    """Whether a module is neither Python's, nor inkdask's, nor an installed package's."""
    package = module.partition(".")[0]
    if package in sys.stdlib_module_names or package == "inkdask":
        return False
    path = _file_of(module) or _file_of(package)
    return path is None or not {"site-packages", "dist-packages"} & set(path.parts)


def _file_of(module: str) -> Path | None:
    """Return the file of an imported module; None for a module without a file."""
    file = getattr(sys.modules.get(module), "__file__", None)
    return Path(file) if file else None
