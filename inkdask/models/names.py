"""Names of weights: what wrappers add to them, and which network has them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from inkdask.errors import InkdaskError
from inkdask.models.checkpoint import Checkpoint, read

# Prefixes of wrappers: LightningModule, DistributedDataParallel, and parts of a larger module.
_PREFIXES = ("model", "module", "canonical", "backbone")
# Second names of convolutions and norms, in checkpoints of the package `vesuvius`.
_SECOND = {".all_modules.0.": ".conv.", ".all_modules.1.": ".norm."}


def bare(name: str) -> str:
    """Return the first name of a weight, without the prefixes of wrappers."""
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    first = next((i for i, part in enumerate(parts) if part not in _PREFIXES), len(parts))
    name = ".".join(parts[min(first, len(parts) - 1) :])
    for second, usual in _SECOND.items():
        name = name.replace(second, usual)
    return name


def by_bare_name(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return the weights by bare name; equal ones under two names are one."""
    found: dict[str, Tensor] = {}
    for name, tensor in checkpoint.tensors.items():
        other = found.setdefault(bare(name), tensor)
        if other is not tensor and not torch.equal(other, tensor):
            raise InkdaskError(
                f"{checkpoint.path} holds the weight {bare(name)} twice, with other values."
            )
    return found


def kind_of(weights: Iterable[str]) -> str:
    """Return the MODEL_TYPE of weights by their names, and their tensors in a mapping; else ``""``.

    Only the tensors tell the sizes of Hecate apart; names alone give that of 2.4 um.
    """
    full = {bare(name): name for name in weights}

    def has(start: str) -> bool:
        return any(name.startswith(start) for name in full)

    if has("layers.0.0.fn.to_qkv."):
        return "timesformer"
    if "depth_coordinate_scale" in full:
        conv = weights.get(full.get("conv1.weight")) if isinstance(weights, Mapping) else None
        return "hecate-9.6um" if conv is not None and conv.shape[-1] == 3 else "hecate-2.4um"
    if has("depth_fusion.features.") and has("network.shared_encoder."):
        return "hybrid-3d2d"
    if has("layer4.0.conv3."):
        decoder = "-3d-decoder" if has("decoder.decoder_blocks.") else ""
        for depth, blocks in {50: 6, 101: 23, 152: 36}.items():
            if has(f"layer3.{blocks - 1}.") and not has(f"layer3.{blocks}."):
                return f"resnet3d-{depth}{decoder}"
    return "depth-cnn" if has("depth.0.") and has("plane.0.") else ""


def recognise(weights: Iterable[str]) -> str:
    """Return a sentence that names the network of weights, by the names of the weights."""
    kind = kind_of(weights)
    return f"It looks like the weights of {kind}." if kind else "It is of no network known here."


def told(path: Any) -> dict[str, Any]:
    """Return what a checkpoint says of its model, in the words of a description beside weights.

    An ``architecture_family`` or the config of its training tells, else the names of its tensors.
    A file that cannot be read tells nothing, because loading it reports that.
    """
    try:
        checkpoint = read(path)
    except (InkdaskError, OSError):
        return {}
    facts = checkpoint.facts
    said: dict[str, Any] = {"model_type": kind_of(checkpoint.tensors)}
    sampling, config = facts.get("sampling_um"), facts.get("config")
    if isinstance(sampling, int | float) and sampling > 0:
        said["pixel_um"] = float(sampling)
        if facts.get("architecture_family") == "hecate":
            said["model_type"] = f"hecate-{sampling:g}um"
    if isinstance(config, dict):
        if layers := patch_layers(facts):
            said |= {"layers": layers, "tile": config["patch_size"][1]}
        said |= _normalisation(config.get("image_normalization"), path)
    return {word: value for word, value in said.items() if value != ""}


def patch_layers(facts: Mapping[str, Any]) -> int | None:
    """Return the layers of the patches that a network was trained on; None where nothing tells."""
    config = facts.get("config")
    patch = config.get("patch_size") if isinstance(config, dict) else None
    if not isinstance(patch, list | tuple) or len(patch) != 3:
        return None
    is_square = all(type(side) is int and side > 0 for side in patch) and patch[1] == patch[2]
    return int(patch[0]) if is_square else None


def _normalisation(said: Any, path: Any) -> dict[str, float | None]:
    """Return clip and divisor of the normalisation that the config of a training names."""
    if not isinstance(said, dict):
        return {}
    mode, divisor = said.get("mode"), said.get("divisor")
    if mode == "divide" and isinstance(divisor, int | float) and divisor > 0:
        return {"clip": None, "divisor": float(divisor)}
    percentiles = said.get("percentile_lower", 1), said.get("percentile_upper", 99)
    if mode == "robust_mad" and percentiles == (1, 99):
        return {"clip": None, "divisor": None}
    words = ", ".join(f"{name} {value}" for name, value in said.items())
    raise InkdaskError(f"The checkpoint {path} wants a normalisation that is not known: {words}.")
