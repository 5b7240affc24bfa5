"""Networks with the weights of a file.

A network is built without memory for its parameters, and the tensors of the mapped file become its
parameters. Names may carry the prefixes of wrappers (`names.bare`). A missing, unexpected or
mis-shaped weight is an error.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from inkdask.errors import InkdaskError
from inkdask.models import hub, registry
from inkdask.models.checkpoint import Checkpoint, read
from inkdask.models.names import bare, by_bare_name, patch_layers, recognise
from inkdask.models.networks import BUILDERS
from inkdask.models.sources import sha256
from inkdask.specs import Network

__all__ = ["Checkpoint", "build", "fit", "load", "read", "recognise"]

# Weights for training alone: the classifier of the encoder, the auxiliary heads of the 3-D decoder,
# a loss, and the count of averaged models.
_TRAINING_ONLY = re.compile(r"fc\.|(decoder\.)?aux_head_s[12]\.|(criterion|loss)\w*\.|n_averaged$")


def load(network: Network) -> nn.Module:
    """Return the network with its weights, in float32 and evaluation mode.

    Parameters
    ----------
    network
        From `inkdask.models.registry.resolve`; its ``digest`` is that of the weights file.
    """
    path = hub.fetch(network.model)
    if sha256(path) != network.digest:
        raise InkdaskError(
            f"The weights {path} are not those this job was made with: their SHA-256 starts with "
            f"{sha256(path)[:12]}, not {network.digest[:12]}."
        )
    checkpoint = read(path)
    _check_shape(network, checkpoint)
    return fit(build(network, checkpoint), checkpoint, network.model.architecture)


def _check_shape(network: Network, checkpoint: Checkpoint) -> None:
    """Check that a checkpoint does not speak of other numbers of layers or logits."""
    trained, asked, k = _layers(checkpoint.facts), network.layers, network.k
    if trained not in (None, asked):
        raise InkdaskError(
            f"Channel mismatch: the checkpoint {checkpoint.path} says {trained} layers (in_chans), "
            f"and {registry.who_says_layers(network)} says {asked}; set MODEL_IN_CHANS={trained}."
        )
    logits = by_bare_name(checkpoint).get("to_out.1.bias")
    given = k * k if logits is None else logits.numel()
    if given != k * k and network.model.architecture == "ink_timesformer":
        raise InkdaskError(
            f"The checkpoint {checkpoint.path} gives {given} logits a tile, not {k} x {k}: give "
            "tile and pixels_per_logit of its training, in an inkdask.toml beside it."
        )


def _layers(facts: dict[str, Any]) -> int | None:
    """Return the number of layers of a network, by its checkpoint; None if it does not say."""
    # Only from in_chans, because ink models are trained with other numbers than num_frames.
    try:
        layers = int(facts["in_chans"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return patch_layers(facts)
    return layers if 1 <= layers <= 10_000 else None


class _ParametersOnMeta(TorchFunctionMode):
    """A mode in which ``torch.empty`` returns tensors without memory.

    Parameters begin as such tensors. Computed buffers, such as rotary frequencies, stay real.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Iterable[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def build(network: Network, checkpoint: Checkpoint) -> nn.Module:
    """Build the network of a checkpoint, with parameters on the meta device."""
    options: dict[str, Any] = {"layers": network.layers, "tile": network.tile}
    if network.model.architecture in BUILDERS:
        options["k"] = network.k
    if any(bare(name).startswith("normalization.") for name in checkpoint.tensors):
        options["normalization"] = True
    architecture = network.model.architecture
    builder = BUILDERS.get(architecture) or _from_timm(architecture)
    try:
        with _ParametersOnMeta():
            return builder(**options)
    except (TypeError, ValueError) as error:
        given = ", ".join(f"{name}={value}" for name, value in options.items())
        raise InkdaskError(f"{architecture}({given}) cannot be built: {error}.") from error


def _from_timm(architecture: str) -> Callable[..., nn.Module]:
    """Return the builder of a network that another package registered with timm."""
    importlib.import_module("inkdask.models.in_timm")  # so that timm can be imported
    import timm

    if not timm.is_model(architecture):
        registry.known()  # because loading an entry point may register its network
    if not timm.is_model(architecture):
        raise InkdaskError(
            f"There is no network {architecture}: known are {', '.join(registry.ARCHITECTURES)}."
        )
    return partial(timm.create_model, architecture)


def fit(module: nn.Module, checkpoint: Checkpoint, architecture: str) -> nn.Module:
    """Give a network exactly the tensors of a checkpoint."""
    wanted = module.state_dict()
    found = by_bare_name(checkpoint)
    state: dict[str, Tensor] = {}
    missing, misshaped = [], []
    for name, place in wanted.items():
        tensor = found.pop(bare(name), None)
        if tensor is None and name.endswith("num_batches_tracked"):
            # Zero, because files from before torch 1.0 lack this count of training steps.
            tensor = torch.zeros((), dtype=torch.int64)
        if tensor is None:
            missing.append(name)
        elif tensor.shape != place.shape:
            misshaped.append(f"{name} {tuple(tensor.shape)} for {tuple(place.shape)}")
        else:
            state[name] = tensor.to(place.dtype)
    unexpected = [name for name in found if not _TRAINING_ONLY.match(name)]
    if missing or misshaped or unexpected:
        faults = {"missing": missing, "unexpected": unexpected, "of another shape": misshaped}
        listed = "; ".join(
            f"{len(names)} {fault}, first {', '.join(names[:3])}"
            for fault, names in faults.items()
            if names
        )
        raise InkdaskError(
            f"The weights {checkpoint.path} are not those of {architecture}: {listed}. "
            f"{recognise(checkpoint.tensors)}"
        )
    module.load_state_dict(state, strict=True, assign=True)
    return module.float().eval().requires_grad_(False)
