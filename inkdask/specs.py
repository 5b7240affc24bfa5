"""Frozen values that travel in graphs: what to run, and what came of it.

This file imports nothing of inkdask, and nothing heavy: the Dask scheduler deserialises graphs
too, and must not need torch for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np

BlendMode = Literal["hann", "gaussian", "upstream"]  # the blending window
Precision = Literal["auto", "float32", "bfloat16", "int8"]
Tta = Literal["none", "mirror"]  # mean over images of a tile
NO_MASK = "none"  # in the place of a mask's path


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
        ``(tile / pixels_per_logit) ** 2`` logits. A TimeSformer has those of this ``tile`` for a
        tile of any size.
    clip, divisor
        A voxel ``v`` reaches the network as ``min(v, clip) / divisor``; without a ``clip``, as
        ``v / divisor``. Without a ``divisor``, each tile is normalised by its own values
        (`inkdask.models.normalisation.robust_mad`).
    pixel_um
        Side of a voxel of the scans that the network was trained on, in micrometers.
    filename, revision
        File and revision inside the repo; ``None`` picks by preference and the newest.
    sha256
        Digest of the weights; others are refused. None takes any.
    precision
        Arithmetic when the user does not say; float32 for networks that bfloat16 shows to differ.
    licence
        A note on the licence of the weights.
    suits
        What it was trained on, in words.
    """

    key: str
    architecture: str
    weights: str
    layers: int = 26
    tile: int = 64
    stride: int = 16
    pixels_per_logit: int = 16
    clip: float | None = 200.0
    divisor: float | None = 200.0
    pixel_um: float | None = None
    filename: str | None = None
    revision: str | None = None
    sha256: str | None = None
    precision: Precision = "auto"
    licence: str = ""
    suits: str = ""


def normalisation(clip: float | None, divisor: float | None) -> str:
    """Say what becomes of a voxel, in words; `ModelSpec` says what None means."""
    if divisor is None:
        return "clipped to the percentiles 1 and 99 of their tile, and scaled by its robust MAD"
    clipped = "" if clip is None else f"clipped to {clip:g}, "
    return f"{clipped}divided by {divisor:g}"


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
    tta
        ``mirror`` is the mean probability of a tile and its three mirror images.
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
    clip: float | None
    divisor: float | None
    digest: str
    precision: Precision = "auto"
    tta: Tta = "none"
    batch_size: int | None = None
    compile: bool = True
    compile_mode: str = "reduce-overhead"
    function: Callable[[Any], Any] | None = None


class InferredChunk(NamedTuple):
    """Result of one chunk.

    Attributes
    ----------
    grid
        Probabilities, float32 (gy, gx, k, k); NaN where a tile is empty and did not run.
    valid
        Bool (y, x): any layer is non-zero.
    precision
        Arithmetic of the network: ``float32``, ``bfloat16`` or ``int8``. Empty where no tile ran,
        and for a callable.
    runs
        What ran, for people: `inkdask.predictor.Predictor.runs`. Empty where no tile ran.
    seconds
        What it took.
    """

    grid: np.ndarray
    valid: np.ndarray
    precision: str = ""
    runs: str = ""
    seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Passes:
    """Tiles to run: those of the passes after ``done``, up to ``last``.

    Attributes
    ----------
    done
        Last pass that each chunk has, int (rows, columns); -1 for none.
    last
        Last pass to run.
    """

    done: np.ndarray
    last: int
