"""The weights of a model as one file on the local disk.

Workers call `fetch`, which downloads weights once for all processes of a machine. This module does
not import torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from huggingface_hub import constants

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.models.sources import Bucket, Folder, Repo, WeightsSource, sha256
from inkdask.specs import ModelSpec

PREFERENCE = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")
MOST_LISTED = 20  # weights files in a sentence
PACKAGE = "package://"  # package://NAME/FILE is a file inside an installed Python package

_REPO = re.compile(r"([\w.-]+/[\w.-]+)(?:[/:]([^@]+))?(?:@(.+))?")
_HUB = r"hf://|https?://(www\.)?(huggingface\.co|hf\.co)/"
# A page of the Hub, or the rest of hf://: the repo, a revision in one of two places, and a file.
_PAGE = re.compile(
    r"([\w.-]+/[\w.-]+)(?:@([^/?#]+))?(?:/(?:blob|raw|resolve|tree)/([^/?#]+))?/?([^?#]*)([?#].*)?"
)


def address(model: str) -> str:
    """Return ``owner/name/FILE@REVISION`` for its URL on the Hub; any other model as it is."""
    for start in (re.escape(f"{constants.ENDPOINT}/"), _HUB):
        if (at := re.match(start, model)) and (page := _PAGE.fullmatch(model[at.end() :])):
            repo, revision, branch, file, _ = (unquote(part or "") for part in page.groups())
            version = revision or branch
            return repo + (file and f"/{file}") + (version and f"@{version}")
    return model


def parse(model: str) -> dict[str, Any] | None:
    """Return the `ModelSpec` fields of an address.

    Parameters
    ----------
    model
        A path, a URI, or ``owner/name`` with ``:FILE`` (or ``/FILE``) or ``@REVISION`` after it.

    Returns
    -------
    dict or None
        ``weights``, and ``filename`` and ``revision`` if given. None when ``model`` is no address.
    """
    if "://" in model and not model.startswith("file://"):
        return {"weights": model}
    path = Path(model.removeprefix("file://"))
    with suppress(RuntimeError):  # ~name, and there is no such user
        path = path.expanduser()
    with storage.explained(str(path)):
        if model and path.exists():
            return {"weights": str(path.absolute())}
    named_as_file = path.suffix in PREFERENCE and len(path.parts) < 3
    if named_as_file or model.startswith(("/", ".", "~", "file://")):
        raise InkdaskError(f"The weights {path} do not exist.")
    if repo := _REPO.fullmatch(model):
        if {"", ".", ".."} & set((repo[2] or "file").split("/")):
            raise InkdaskError(f"{model} names no file of the repo {repo[1]}.")
        words = zip(("weights", "filename", "revision"), repo.groups(), strict=True)
        return {word: value for word, value in words if value}
    return None


def locate(spec: ModelSpec) -> tuple[WeightsSource, str]:
    """Return the place of a model's weights, and the name of the weights there."""
    weights = spec.weights
    folder, _, name = weights.rpartition("/")
    source: WeightsSource
    if weights.startswith(PACKAGE):
        package = folder.removeprefix(PACKAGE)
        try:
            if name:
                return Folder(Path(str(resources.files(package))), folder), name
        except ModuleNotFoundError as error:
            raise InkdaskError(f"Model {spec.key} needs the Python package {package}.") from error
        except (TypeError, ValueError):  # a module that is no package, or no name at all
            pass
        raise InkdaskError(f"{weights} names no file of a Python package.")
    if "://" in weights:
        if weights.endswith(PREFERENCE):
            return Bucket(folder), name
        source = Bucket(weights.rstrip("/"))
    elif Path(weights).is_dir():
        source = Folder(Path(weights).absolute())
    elif Path(weights).is_absolute() or Path(weights).is_file():
        path = Path(weights).absolute()
        return Folder(path.parent), path.name
    else:
        source = Repo(weights, spec.revision)
    return source, spec.filename or choose(source.names(), source)


def choose(names: Iterable[str], place: object) -> str:
    """Return the weights file among ``names``; .safetensors comes before .ckpt, .pt and .bin."""
    names = sorted(names)
    for suffix in PREFERENCE:
        found = [name for name in names if name.endswith(suffix)]
        if len(found) > 1:
            raise InkdaskError(
                f"{place} holds {len(found)} {suffix} files, so say which one is meant: "
                f"{', '.join(found[:MOST_LISTED])}{', ...' if len(found) > MOST_LISTED else '.'}"
            )
        if found:
            return found[0]
    raise InkdaskError(f"{place} holds no weights: no {', '.join(PREFERENCE)} file is there.")


def settle(spec: ModelSpec) -> tuple[ModelSpec, Path]:
    """Return the spec with its weights pinned to one file, and the path of that file."""
    source, name = locate(spec)
    path = source.get(name)
    if spec.sha256 and sha256(path) != spec.sha256:
        raise InkdaskError(
            f"{path} is not the file that model {spec.key} is pinned to: its SHA-256 is "
            f"{sha256(path)[:12]}..., not {spec.sha256[:12]}..."
        )
    return replace(spec, **source.pin(name, path)), path


def fetch(spec: ModelSpec) -> Path:
    """Return the path of a model's weights on the local disk."""
    return settle(spec)[1]
