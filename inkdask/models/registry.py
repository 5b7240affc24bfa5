"""Known models, and the way from a user's words to a `Network`.

A model is a key of `known`, a file or folder, a Hugging Face repo, an ``s3://`` URI, or a callable.
A file ``inkdask.toml`` beside the weights may describe the model. Only a callable makes this
module import torch.
"""

from __future__ import annotations

import json
import tomllib
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path, PurePosixPath
from typing import Any

from inkdask import storage
from inkdask.errors import InkdaskError, reason
from inkdask.models import hub
from inkdask.models.callables import resolve_callable
from inkdask.models.sources import Repo, WeightsSource, sha256
from inkdask.specs import ModelSpec, Network, Precision, Tta, normalisation

ENTRY_POINTS = "inkdask.models"

# Values of MODEL_TYPE, and the names of these networks in timm's registry.
ARCHITECTURES: dict[str, str] = {
    "timesformer": "ink_timesformer",
    "resnet3d-50": "ink_resnet3d_50",
    "resnet3d-101": "ink_resnet3d_101",
    "resnet3d-152": "ink_resnet3d_152",
    "resnet3d-152-3d-decoder": "ink_resnet3d_152_decoder3d",
    "hecate-2.4um": "ink_hecate_2_4um",
    "hecate-9.6um": "ink_hecate_9_6um",
    "hybrid-3d2d": "ink_hybrid_3d2d",
    "depth-cnn": "ink_depth_cnn",
}

_RESNET = {"tile": 256, "stride": 128, "pixels_per_logit": 4}
_SHAPES: dict[str, dict[str, Any]] = {
    "ink_timesformer": {"layers": 26, "tile": 64, "stride": 16, "pixels_per_logit": 16},
    "ink_resnet3d_50": {"layers": 26, **_RESNET},
    "ink_resnet3d_101": {"layers": 26, **_RESNET},
    "ink_resnet3d_152": {"layers": 26, **_RESNET},
    "ink_resnet3d_152_decoder3d": {"layers": 62, **_RESNET},
    "ink_hecate_2_4um": {"layers": 64, **_RESNET, "clip": None, "pixel_um": 2.4},
    "ink_hecate_9_6um": {
        "layers": 16, "tile": 64, "stride": 32, "pixels_per_logit": 1,
        "clip": None, "divisor": 255.0, "pixel_um": 9.6,
    },
    "ink_hybrid_3d2d": {
        "layers": 17, "tile": 128, "stride": 64, "pixels_per_logit": 1,
        "clip": None, "divisor": None, "pixel_um": 9.6,
    },
    "ink_depth_cnn": {"layers": 26, "tile": 64, "stride": 16, "pixels_per_logit": 4},
}  # fmt: skip
# A tile has a multiple of these pixels, where not of those of a logit: the sides of patches, and
# what the maps of a network are divided by.
_STEPS = {
    "ink_timesformer": 16,
    "ink_hecate_2_4um": 32,
    "ink_hecate_9_6um": 8,
    "ink_hybrid_3d2d": 64,
}
# Networks whose class token gives as many logits as for their own tile, for a tile of any size.
_OF_ONE_TOKEN = {"ink_timesformer"}


def _spec(key: str, architecture: str, weights: str, **values: Any) -> ModelSpec:
    """Return a spec whose shape is that of its architecture, unless ``values`` give it."""
    shape: dict[str, Any] = {**_SHAPES.get(architecture, {}), **values}
    return ModelSpec(key, architecture, weights, **shape)


def _scrollprize(key: str, architecture: str, repo: str, **values: Any) -> ModelSpec:
    licence = f"see the model card at https://huggingface.co/scrollprize/{repo}"
    values = {"licence": licence, **values}
    return _spec(key, architecture, f"scrollprize/{repo}", **values)


_HECATE = {"revision": "9cb86e500e944b11a06a7020403cde5dffb5bcb2", "licence": "MIT"}
_INK_9UM = "7109667e2607db1b90c37c8b09cb876ea7fe7bb1"

_BUILT_IN = (
    _scrollprize(
        "timesformer-scroll5", "ink_timesformer", "timesformer_scroll5_27112024", pixel_um=7.91
    ),
    _scrollprize(
        "timesformer_scroll5_27112024",
        "ink_timesformer",
        "timesformer_scroll5_27112024",
        pixel_um=7.91,
    ),
    _scrollprize(
        "timesformer-gp-scroll1", "ink_timesformer", "timesformer_GP_scroll1", pixel_um=7.91
    ),
    _scrollprize(
        "resnet3d-152-3d-decoder-2um",
        "ink_resnet3d_152_decoder3d",
        "ink_canonical_2um",
        pixel_um=2.4,
    ),
    _scrollprize("resnet50-3um", "ink_resnet3d_50", "resnet50_3um_01122024", layers=18),
    _scrollprize(
        "hecate-2.4um",
        "ink_hecate_2_4um",
        "hecate",
        filename="hecate_2.4um.pth",
        sha256="fa2de3827ebd247ff2d33df1b6f899ea79d5269036cf16765997c62f0e9988c7",
        **_HECATE,
    ),
    _scrollprize(
        "hecate-9.6um",
        "ink_hecate_9_6um",
        "hecate",
        filename="hecate_9.6um.pth",
        sha256="809f4f10f7cb7afa19b4bee0f7d2ab31edd7e11b664f9f210cc9c17f22fcfe5d",
        **_HECATE,
    ),
    _scrollprize(
        "ink-9um",
        "ink_hybrid_3d2d",
        "ink_9um",
        filename="hybrid_3d2d-seed42/step-075000.pth",
        revision=_INK_9UM,
        sha256="e635558ae6a1a807a7e5ec1e83adfd45bc3c0ac53883ea43f1d4e085d62a9cab",
    ),
    _scrollprize(
        "ink-9um-seed43",
        "ink_hybrid_3d2d",
        "ink_9um",
        filename="hybrid_3d2d-seed43/step-075000.pth",
        revision=_INK_9UM,
        sha256="2aeaa85a35ef28d7bc7bf3e848c4a6a91385e9132710927fdba41133c4ecb28f",
    ),
    _spec(
        "demo",
        "ink_depth_cnn",
        "package://inkdask.models/demo.safetensors",
        precision="float32",  # because probabilities in bfloat16 differ by 0.03
        licence="MIT, as inkdask itself; trained on synthetic ink",
    ),
)
KNOWN: dict[str, ModelSpec] = {spec.key: spec for spec in _BUILT_IN}

# Words of a description beside the weights, and their types.
_WORDS: dict[str, type] = {
    **{"model_type": str, "architecture": str, "licence": str},
    **{"layers": int, "tile": int, "stride": int, "pixels_per_logit": int},
    **{"clip": float, "divisor": float, "pixel_um": float},
}

MOST = 65535  # of any number in a description


@cache
def known() -> dict[str, ModelSpec]:
    """Return all models by key: `KNOWN` and the models of installed packages.

    A package adds models by an entry point of the group ``inkdask.models`` that loads to a
    `ModelSpec` or to a list of them. An entry point that fails is left out with a warning.
    """
    models = dict(KNOWN)
    for entry in entry_points(group=ENTRY_POINTS):
        try:
            added = entry.load()
            specs = [added] if isinstance(added, ModelSpec) else list(added)
            for spec in specs:
                if not isinstance(spec, ModelSpec):
                    raise TypeError(f"{spec!r} is not a ModelSpec")
                if models.setdefault(spec.key, spec) != spec:
                    raise ValueError(f"the key {spec.key} is taken")
        except Exception as error:  # because another package must not break this one
            warnings.warn(f"Models of {entry.value} are left out: {error}.", stacklevel=2)
    return models


def resolve(
    model: str | Callable[[Any], Any],
    *,
    model_type: str | None = None,
    version: str | None = None,
    layers: int | None = None,
    tile: int | None = None,
    clip: float | None = None,
    divisor: float | None = None,
    precision: Precision = "auto",
    tta: Tta = "none",
    batch_size: int | None = None,
    compile: bool = True,  # noqa: A002  the name of the setting
    compile_mode: str = "reduce-overhead",
) -> Network:
    """Return the `Network` that a user means, with defaults from the model.

    Parameters
    ----------
    model
        A key of `known`, a weights file or a folder with one, a Hugging Face repo (its URL,
        ``owner/name``, ``owner/name@revision``, ``owner/name:file.ckpt``), an ``s3://`` URI, or a
        callable ``(b, 1, layers, tile, tile) float32 -> (b, 1, k, k)`` logits.
    model_type
        A key of `ARCHITECTURES`, or a timm name that one of `known` has.
    version
        Of a callable: stands for the code that its pickle only names.
    layers, tile
        Number of layers that the network reads, and side of its tiles in pixels.
    clip, divisor
        In place of those of the model (`ModelSpec`), where it has them.
    precision, tta, batch_size, compile, compile_mode
        As in `Network`.

    Returns
    -------
    Network
        Its ``model`` names one file, and one commit of a Hugging Face repo, so that every worker
        reads the weights of this digest.
    """
    if callable(model):
        spec, digest, k = resolve_callable(model, layers, tile, version)
    else:
        spec, digest, k = _resolve_weights(model, model_type, tile, precision)
    _check_normalisation(spec, clip, divisor)
    return Network(
        model=spec,
        layers=layers or spec.layers,
        tile=tile or spec.tile,
        k=k,
        clip=spec.clip if clip is None else clip,
        divisor=spec.divisor if divisor is None else divisor,
        digest=digest,
        precision=spec.precision if precision == "auto" else precision,
        tta=tta,
        batch_size=batch_size,
        compile=compile,
        compile_mode=compile_mode,
        function=model if callable(model) else None,
    )


def _check_normalisation(spec: ModelSpec, clip: float | None, divisor: float | None) -> None:
    """Refuse a clip or divisor for a model that has none."""
    for name, given, own in (("CLIP", clip, spec.clip), ("DIVISOR", divisor, spec.divisor)):
        if given is not None and own is None:
            raise InkdaskError(
                f"{name} means nothing for model {spec.key}, whose voxels are "
                f"{normalisation(spec.clip, spec.divisor)}: leave {name} out."
            )


def _resolve_weights(
    model: str, model_type: str | None, tile: int | None, precision: Precision
) -> tuple[ModelSpec, str, int]:
    """Return spec, digest of the weights, and k of a model given by name."""
    spec = _described(model, model_type)
    if precision == "int8" and spec.architecture != ARCHITECTURES["timesformer"]:
        raise InkdaskError(f"Precision int8 is for timesformer, and model {spec.key} is not one.")
    k = _logits(spec, tile or spec.tile)
    spec, path = hub.settle(spec)
    return spec, sha256(path), k


def shape_of(
    model: str, model_type: str | None, tile: int | None
) -> tuple[ModelSpec, int, int, int]:
    """Return spec, tile, stride and k of a model given by name; loads no weights of a key."""
    spec = _described(model, model_type)
    tile = tile or spec.tile
    return spec, tile, min(spec.stride, tile), _logits(spec, tile)


def _logits(spec: ModelSpec, tile: int) -> int:
    """Return the side k of the logits of a tile."""
    step = _STEPS.get(spec.architecture, spec.pixels_per_logit)
    if tile < step or tile % step:
        raise InkdaskError(
            f"TILE_SIZE of model {spec.key} must be a multiple of {step} pixels, not {tile}."
        )
    own = spec.architecture in _OF_ONE_TOKEN
    return (spec.tile if own else tile) // spec.pixels_per_logit


def who_says_layers(network: Network) -> str:
    """Return what says how many layers a network reads, for messages."""
    model = network.model
    if network.layers != model.layers:
        return "MODEL_IN_CHANS"
    if model.key in known():
        return "inkdask's list of models"
    is_default = model.layers == _SHAPES.get(model.architecture, {}).get("layers")
    return "inkdask's default" if is_default else "the model's description"


def _described(model: str, model_type: str | None) -> ModelSpec:
    """Return the spec of a model that is given by name, with the user's architecture if given."""
    architecture = None if model_type is None else ARCHITECTURES.get(model_type, model_type)
    if architecture not in {
        None,
        *ARCHITECTURES.values(),
        *(s.architecture for s in known().values()),
    }:
        raise InkdaskError(
            f"MODEL_TYPE must be one of {', '.join(ARCHITECTURES)}, not {model_type}."
        )
    model = hub.address(model)
    if spec := known().get(model):
        return replace(spec, architecture=architecture or spec.architecture)
    place = hub.parse(model)
    if place is None:
        raise InkdaskError(
            f"There is no model {model}: known are {', '.join(sorted(known()))}; a weights file "
            "or folder, a Hugging Face repo (owner/name), an s3:// URI or a callable will do too."
        )
    for spec in known().values():
        if spec.weights == place["weights"] and spec.filename in (None, place.get("filename")):
            sha256 = spec.sha256 if place.get("revision", spec.revision) == spec.revision else None
            architecture = architecture or spec.architecture
            return replace(spec, key=model, **place, sha256=sha256, architecture=architecture)
    source, name = hub.locate(ModelSpec(model, "", **place))
    values = {"key": model, "filename": name, **place, **_told_of(source, name)}
    values["architecture"] = architecture or values.get("architecture", "ink_timesformer")
    return _spec(**values)


def _told_of(source: WeightsSource, name: str) -> dict[str, Any]:
    """Return the `ModelSpec` fields that a checkpoint and the description beside it tell."""
    from inkdask.models.names import told  # here, because it imports torch

    beside = _sidecar(source, name)
    values = told(source.get(name))
    if (kind := values.pop("model_type", None)) in ARCHITECTURES:
        values["architecture"] = ARCHITECTURES[kind]
    if "tile" in values:
        values["stride"] = values["tile"] // 2  # as the people of such checkpoints use them
    return values | beside


def _sidecar(source: WeightsSource, weights: str) -> dict[str, Any]:
    """Return the `ModelSpec` fields of a TOML or JSON description beside the weights.

    The description has the name of the weights with another ending, or is called ``inkdask.toml``
    or ``inkdask.json``. The first of them counts. A file without any known word is ignored,
    because other programs write such files too.
    """
    stem = PurePosixPath(weights).with_suffix("")
    try:
        present = set(source.names())
    except InkdaskError:
        if isinstance(source, Repo):
            raise
        return {}  # because a file may be readable where listing is forbidden
    for name in (
        f"{stem}.toml", f"{stem}.json",
        str(stem.with_name("inkdask.toml")), str(stem.with_name("inkdask.json")),
    ):  # fmt: skip
        if name in present and (values := _read_sidecar(source.get(name), f"{source}/{name}")):
            return values
    return {}


def _read_sidecar(path: Path, shown: str) -> dict[str, Any]:
    parse = tomllib.loads if path.suffix == ".toml" else json.loads
    try:
        with storage.explained(shown):
            values = parse(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InkdaskError(
            f"The model description {shown} cannot be read: {reason(error)}."
        ) from error
    if not isinstance(values, dict) or not values.keys() & _WORDS.keys():
        return {}
    for word, value in values.items():
        kind = _WORDS.get(word)
        if kind is None:
            raise InkdaskError(
                f"The model description {shown} says {word!r}; it may say {', '.join(_WORDS)}."
            )
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        if not (isinstance(value, str) if kind is str else number and 0 < value <= MOST):
            wanted = "a text" if kind is str else f"a number above 0 and up to {MOST}"
            raise InkdaskError(f"In the model description {shown}, {word} must be {wanted}.")
    if kind := values.pop("model_type", None):
        values["architecture"] = ARCHITECTURES.get(kind, kind)
    return values
