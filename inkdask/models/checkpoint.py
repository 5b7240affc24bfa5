"""The content of a weights file, read without running any code of it.

`read` takes .safetensors, and the files of ``torch.save`` and Lightning.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from inkdask.errors import InkdaskError
from inkdask.models.unpickle import Inert, look_for_harm, tensors_only

# Keys under which Lightning and other trainers store the weights.
_NESTS = ("state_dict", "model_state_dict")

_marking = threading.Lock()


@dataclass(frozen=True)
class Checkpoint:
    """The content of a weights file.

    Attributes
    ----------
    path
        The file.
    tensors
        Its tensors by name, as views of the mapped file.
    facts
        Hyper-parameters of a Lightning checkpoint, or metadata (strings) of a safetensors file.
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Checkpoint:
    """Read a weights file without executing anything in it.

    Parameters
    ----------
    path
        A safetensors file, or a torch file with a state dict, alone or under a key such as
        ``state_dict``. The content decides, not the name of the file.
    """
    with path.open("rb") as file:
        head = file.read(64)
    if not head:
        raise InkdaskError(f"The weights file {path} is empty.")
    if head.startswith(b"version https://git-lfs"):
        raise InkdaskError(f"{path} is a Git LFS pointer, not the weights: run git lfs pull.")
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        checkpoint = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):
        checkpoint = _read_torch(path, zipped=head.startswith(b"PK"))
    else:
        raise InkdaskError(f"{path} is not a weights file: neither safetensors nor torch's own.")
    if not checkpoint.tensors:
        raise InkdaskError(f"{path} holds no weights.")
    return checkpoint


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InkdaskError(f"{path} is cut off or damaged: no whole safetensors file.") from error
    return Checkpoint(path, tensors, facts)


def _read_torch(path: Path, zipped: bool) -> Checkpoint:
    content = _torch_content(path, zipped)
    if not isinstance(content, dict):
        kind = "a pickled object" if isinstance(content, Inert) else f"a {type(content).__name__}"
        raise InkdaskError(f"{path} holds {kind}, not weights: save the model's state_dict().")
    states = [content[nest] for nest in _NESTS if isinstance(content.get(nest), dict)]
    tensors = _tensors(states[0] if states else content)
    if not tensors and not states:  # because training scripts use keys of their own
        nests = {name: found for name in content if (found := _tensors(content[name]))}
        if len(nests) > 1:
            raise InkdaskError(
                f"{path} holds several sets of weights, {', '.join(map(str, nests))}: save the one "
                "that is meant in a file of its own."
            )
        tensors = next(iter(nests.values()), {})
    for name, value in tensors.items():
        if value.layout is not torch.strided or value.device.type != "cpu" or value.is_quantized:
            raise InkdaskError(f"The weight {name} in {path} is not a plain tensor.")
    facts = content.get("hyper_parameters")
    return Checkpoint(path, tensors, facts if isinstance(facts, dict) else {})


def _tensors(state: Any) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name; none when it is no dict."""
    if not isinstance(state, dict):
        return {}
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _torch_content(path: Path, zipped: bool) -> Any:
    # Without the message of torch, because it advises to load the file unsafely.
    broken = InkdaskError(f"{path} is cut off or damaged, or no checkpoint at all.")
    try:
        with _nothing_marked_safe():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as refused:  # torch raises many types for broken files and other objects
        if not zipped:
            look_for_harm(path)
            if isinstance(refused, pickle.UnpicklingError) and "GLOBAL" in str(refused):
                raise InkdaskError(
                    f"{path} is in torch's format before 1.6 and holds other objects than "
                    "tensors: load it where it was made and save its state_dict() again."
                ) from refused
            raise broken from refused
    try:
        return tensors_only(path)
    except InkdaskError:
        raise
    except Exception as error:
        raise broken from error


@contextmanager
def _nothing_marked_safe() -> Iterator[None]:
    """Empty torch's list of classes that any file may construct.

    Importing timm adds classes of torch.distributed, whose constructors open connections.
    """
    with _marking:
        marked = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            yield
        finally:
            torch.serialization.add_safe_globals(marked)
