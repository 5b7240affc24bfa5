"""The content of a weights file, read without running any code of it.

`read` takes .safetensors, and the files of ``torch.save`` and Lightning.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from inkdask.errors import InkdaskError
from inkdask.models.unpickle import ODD, Inert, tensors_only

# Keys under which Lightning and other trainers store the weights; averaged ones come first.
_NESTS = ("ema_model", "state_dict", "model_state_dict")
MOST_HEADER = 8 << 20  # bytes of a safetensors header; 80 describe a tensor
_FACTS = ("architecture_family", "sampling_um", "config")  # keys beside the weights


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
        Hyper-parameters of a Lightning checkpoint and `_FACTS`, or metadata (strings) of a
        safetensors file.
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
        if (size := int.from_bytes(head[:8], "little")) > MOST_HEADER:
            raise InkdaskError(
                f"{path} has a header of {size:,} bytes, and at most {MOST_HEADER:,} are read."
            )
        checkpoint = _read_safetensors(path)
    elif head.startswith((b"PK", b"\x80")):
        checkpoint = _read_torch(path)
    else:
        raise InkdaskError(f"{path} is not a weights file: neither safetensors nor torch's own.")
    if not checkpoint.tensors:
        raise InkdaskError(f"{path} holds no weights.")
    return checkpoint


def _read_safetensors(path: Path) -> Checkpoint:
    try:
        str(path).encode()
        with safe_open(path, framework="pt") as file:
            facts = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except UnicodeEncodeError as error:
        raise InkdaskError(f"{path} cannot be opened: its name is not UTF-8.") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise InkdaskError(f"{path} is cut off or damaged: no whole safetensors file.") from error
    return Checkpoint(path, tensors, facts)


def _read_torch(path: Path) -> Checkpoint:
    try:
        content = tensors_only(path)
    except InkdaskError:
        raise
    except Exception as error:  # of many types, for a broken file
        raise InkdaskError(f"{path} is cut off or damaged, or no checkpoint at all.") from error
    if not isinstance(content, dict):
        kind = "a pickled object" if isinstance(content, Inert) else f"a {type(content).__name__}"
        raise InkdaskError(f"{path} holds {kind}, not weights: save the model's state_dict().")
    states = [content[nest] for nest in _NESTS if isinstance(content.get(nest), dict)]
    tensors = _tensors(states[0] if states else content, path)
    if not tensors and not states:  # because training scripts use keys of their own
        values = {id(value): value for value in content.values()}  # one may be there many times
        found = {number: _tensors(value, path) for number, value in values.items()}
        nests = [name for name, value in content.items() if found[id(value)]]
        if len(nests) > 1:
            raise InkdaskError(
                f"{path} holds several sets of weights, {', '.join(nests)}: save the one "
                "that is meant in a file of its own."
            )
        tensors = found[id(content[nests[0]])] if nests else {}
    said = content.get("hyper_parameters")
    facts = {name: content[name] for name in _FACTS if name in content}
    return Checkpoint(path, tensors, facts | (said if isinstance(said, dict) else {}))


def _tensors(state: Any, path: Path) -> dict[str, Tensor]:
    """Return the tensors of a state dict by name; none when it is no dict."""
    if not isinstance(state, dict):
        return {}
    if odd := next((name for name, value in state.items() if value is ODD), None):
        raise InkdaskError(f"The weight {odd} in {path} is not a plain tensor.")
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}
