"""The words of the project: frozen specs that travel in graphs, and the errors a user sees.

This file imports nothing of inkdask, and nothing heavy: the Dask scheduler deserialises graphs
too, and must not need torch for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

Precision = Literal["auto", "float32", "bfloat16", "int8"]
NO_MASK = "none"  # in the place of a mask's path


class InkdaskError(Exception):
    """A mistake or a misfortune the user can act on.

    ``str(error)`` is one clear sentence that names the file or the variable; the command line
    prints it without a traceback and exits with ``exit_code``.
    """

    exit_code = 1


class UnavailableError(InkdaskError):
    """A place does not answer now: the same work may succeed later, or on another machine."""


class DamagedError(InkdaskError):
    """What lies at a place cannot be decoded: it is damaged, or something else altogether."""


class SettingsError(InkdaskError):
    """A setting is missing or out of its bounds."""

    exit_code = 2


@dataclass(frozen=True)
class ModelSpec:
    """What is known about a model before its weights are read.

    Attributes
    ----------
    key
        The name a user types, and the one in file names.
    architecture
        Name in timm's model registry, for example ``ink_timesformer``.
    weights
        Where the weights are: a Hugging Face repo id, an ``s3://`` URI, or a local path.
    layers
        Number of layers (depth of the surface volume) the network reads.
    tile, stride
        Side of a tile and distance of neighbouring tiles, in pixels.
    pixels_per_logit
        Side in pixels of the square that one logit speaks for; a tile has
        ``(tile / pixels_per_logit) ** 2`` logits.
    clip, divisor
        A voxel ``v`` reaches the network as ``min(v, clip) / divisor``.
    filename, revision
        File and revision inside the repo; ``None`` picks by preference and the newest.
    precision
        Arithmetic when the user does not say; float32 for networks that bfloat16 shows to differ.
    licence
        A note on the licence of the weights.
    """

    key: str
    architecture: str
    weights: str
    layers: int = 26
    tile: int = 64
    stride: int = 16
    pixels_per_logit: int = 16
    clip: float = 200.0
    divisor: float = 200.0
    filename: str | None = None
    revision: str | None = None
    precision: Precision = "auto"
    licence: str = ""


@dataclass(frozen=True)
class Network:
    """All a worker needs to build and run the network: small, picklable, hashable.

    A process keeps one compiled network per ``Network`` (see `inkdask.predictor`); the spec is
    what travels in graphs, never a module and never a tensor.

    Attributes
    ----------
    model
        Where the network comes from.
    layers, tile
        Shape of its input, ``(b, 1, layers, tile, tile)``.
    k
        Side of its output, ``(b, 1, k, k)`` logits.
    clip, divisor
        As in `ModelSpec`, after the user's overrides.
    digest
        SHA-256 of the weights (or of the pickled function): part of a job's fingerprint.
    precision
        ``auto`` is bfloat16 where the hardware has it, float32 elsewhere. ``int8`` is of the wide
        layers of TimeSformer on a CPU.
    batch_size
        Tiles per forward pass; ``None`` is chosen for the device.
    compile, compile_mode
        Whether ``torch.compile`` may be used, and its mode.
    function
        Instead of weights: a callable ``(b, 1, z, t, t) float -> (b, 1, k, k) logits``.
    """

    model: ModelSpec
    layers: int
    tile: int
    k: int
    clip: float
    divisor: float
    digest: str
    precision: Precision = "auto"
    batch_size: int | None = None
    compile: bool = True
    compile_mode: str = "reduce-overhead"
    function: Callable[[Any], Any] | None = None
