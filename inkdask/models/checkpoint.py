"""What a weights file holds, read without running anything of it.

`read` takes .safetensors, and what ``torch.save`` and Lightning write.
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

# Lightning and other trainers put the weights under one of these.
_NESTS = ("state_dict", "model_state_dict")

_marking = threading.Lock()


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes
    ----------
    path
        The file.
    tensors
        Its tensors by name, as views of the mapped file.
    facts
        Plain values that it gives about itself: Lightning's hyper-parameters, or the metadata
        of a safetensors file (strings).
    """

    path: Path
    tensors: dict[str, Tensor]
    facts: dict[str, Any] = field(default_factory=dict)


def read(path: Path) -> Checkpoint:
    """Read a weights file; nothing in it is executed, whatever it holds.

    Parameters
    ----------
    path
        A safetensors file, or a torch file with a state dict, on its own or under a name of its
        own, such as ``state_dict``. Its content decides, not its name.

    Raises
    ------
    InkdaskError
        When the file is empty, cut off, something else altogether, or made to run code.
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
    if not tensors and not states:  # training scripts have names of their own
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
    """The tensors of a state dict by name; none of anything else."""
    if not isinstance(state, dict):
        return {}
    return {
        name: value
        for name, value in state.items()
        if isinstance(name, str) and isinstance(value, Tensor)
    }


def _torch_content(path: Path, zipped: bool) -> Any:
    # What torch says is not shown: it advises to load the file unsafely.
    broken = InkdaskError(f"{path} is cut off or damaged, or no checkpoint at all.")
    try:
        with _nothing_marked_safe():
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as refused:  # of many kinds: the file is broken or names other objects
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
    """Hide from torch what this process lets any file construct.

    Importing timm is enough to mark classes of torch.distributed, whose constructors connect.
    """
    with _marking:
        marked = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            yield
        finally:
            torch.serialization.add_safe_globals(marked)
