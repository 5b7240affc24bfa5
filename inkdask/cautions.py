"""Warnings before the work: what would make a picture wrong in silence."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from inkdask.plan import Plan, span
from inkdask.samples import Samples, sample
from inkdask.segment import Segment
from inkdask.settings import Settings
from inkdask.specs import ModelSpec

log = logging.getLogger("inkdask")

Kind = Literal[
    "direction", "off-centre", "off-sheet", "flat", "equal", "empty", "few-bits", "pixel-size",
    "large-window",
]  # fmt: skip
LETTER_MM = 3.0  # height of a letter; those of Herculaneum have 2 to 4 mm
TOLERANCE = 0.02  # share by which the side of a pixel may differ from the model's
OFF = 1 / 4  # of the window: a layer at its middle would be in the outer half of a centred one
# Share of the brightest layer by which the darkest is darker, where the layers hold a sheet and the
# air beside it: 0.5 in the demo. Within a sheet, fibres alone make layers differ.
RELIEF = 0.05
# Depth that holds more than a sheet of 0.1 to 0.2 mm; in layers where the pixel size is unknown.
DEEP_UM, DEEP_LAYERS = 250.0, 26
EMPTY = 2 / 3  # of the pixels: a render that misses its scan had 0.7; whole sheets have half
SURE = 4  # pieces from which their mean says something about the whole


@dataclass(frozen=True)
class Caution:
    """A reason to look again before a job runs: its kind, a sentence, and the figures in it."""

    kind: Kind
    sentence: str
    figures: dict[str, Any] = field(default_factory=dict)


def cautions_of(plan: Plan, settings: Settings) -> list[Caution]:
    """Return what should be known before a plan is run; reads a few samples."""
    if plan.inside is None:
        return []
    model, tile = plan.network.model, plan.tiling.tile
    return cautions(plan.inside, settings, sample(plan.inside), model, tile)


def cautions(
    segment: Segment,
    settings: Settings,
    samples: Samples,
    model: ModelSpec | None = None,
    tile: int | None = None,
) -> list[Caution]:
    """Return what should be known before the layers of a segment are read.

    Parameters
    ----------
    segment
        Of the layers that are read, and no others.
    settings
        What was said about them.
    samples
        Of the segment.
    model, tile
        The model, and the side of its window in pixels, where they are known.
    """
    pixel_um = settings.pixel_resolution_um or segment.pixel_um
    found = [*_of_depth(segment, samples, pixel_um), *_of_values(segment, samples)]
    if settings.direction is None and not settings.force_reverse:
        says = (
            f"{segment.uri} does not say which way its layers run, and they are read forward: "
            "DIRECTION=both shows the other way, too"
        )
        found.append(Caution("direction", says))
    if model and (it := off_pixel_size(pixel_um, model)):
        found.append(it)
    if tile and pixel_um and (wide := tile * pixel_um / 1e3) > LETTER_MM:
        says = (
            f"The network's window is {wide:.3g} mm wide, and a letter is about {LETTER_MM:g} mm "
            "high: it may paint whole letters"
        )
        found.append(Caution("large-window", says, {"window_mm": wide, "letter_mm": LETTER_MM}))
    return found


def tell(found: Iterable[Caution]) -> None:
    """Log a line for each caution; a direction that nobody named is usual, so it is no warning."""
    for it in found:
        log.log(logging.INFO if it.kind == "direction" else logging.WARNING, "%s", it.sentence)


def is_side(spec: ModelSpec, pixel_um: float) -> bool:
    """Whether a model was trained at this side of a pixel, in micrometers."""
    side = spec.pixel_um
    return side is not None and abs(side - pixel_um) <= TOLERANCE * side


def off_pixel_size(found: float | None, model: ModelSpec) -> Caution | None:
    """Compare the side of a pixel, in micrometers, with that of the model's training."""
    wanted = model.pixel_um
    if not found or not wanted or is_side(model, found):
        return None
    says = f"Pixels of {found:.4g} um: model {model.key} was trained at {wanted:g} um"
    figures = {"pixel_um": found, "model_um": wanted}
    return Caution("pixel-size", f"{says}, and others may show no ink", figures)


def _of_depth(segment: Segment, samples: Samples, pixel_um: float | None) -> Iterator[Caution]:
    """Compare the layers that are read with the middle of the depth, and with the sheet."""
    layers, columns, profile = sorted(segment.layers), samples.columns, samples.profile
    low, high = (of(profile.values(), default=0.0) for of in (min, max))
    brightest = max(profile, key=lambda number: profile[number], default=None)
    is_flat, middle = high - low <= RELIEF * high, (layers[0] + layers[-1]) / 2
    if columns and len(samples.numbers) > 1 and all((it == it[0]).all() for it in columns):
        says = f"{segment.uri}: all layers are equal in {len(columns)} samples"
        yield Caution("equal", says, {"samples": len(columns)})
    elif profile and is_flat and _is_deep(segment, pixel_um):
        says = (
            f"{segment.uri}: the layers are equally bright, within {(high - low) / high:.1%}: they "
            "may hold no sheet"
        )
        yield Caution("flat", says, {"relief": (high - low) / high, "profile": profile})
    if brightest is not None and not is_flat:
        seen = np.interp(layers, [*profile], [*profile.values()])
        if seen.max() < (low + high) / 2:
            says = (
                f"Layers {span(layers)} lie off the sheet: {segment.uri} is brightest about layer "
                f"{brightest}"
            )
            yield Caution("off-sheet", says, {"brightest": brightest, "profile": profile})
    # A window about the brightest layer was chosen, although it is not about the middle.
    is_chosen = not is_flat and brightest is not None and _is_near(brightest - middle, layers)
    if not _is_near(segment.offset, layers) and not is_chosen:
        says = (
            f"The middle of layers {span(layers)} is {segment.offset:+g} layers from that of all "
            f"{len(segment.found)}, where the sheet usually is"
        )
        yield Caution("off-centre", says, {"offset": segment.offset, "layers": len(segment.found)})


def _is_near(distance: float, layers: list[int]) -> bool:
    return abs(distance) <= OFF * len(layers)


def _is_deep(segment: Segment, pixel_um: float | None) -> bool:
    """Whether a sheet cannot fill the depth; layers do not grow coarser with the level."""
    pitch = pixel_um and pixel_um / 2 ** getattr(segment.source, "level", 0)
    depth = len(segment.found)
    return depth * pitch >= DEEP_UM if pitch else depth >= DEEP_LAYERS


def _of_values(segment: Segment, samples: Samples) -> Iterator[Caution]:
    """Tell of values that are zero, or of fewer bits than the files have."""
    empty, largest = samples.empty, samples.largest
    if empty is not None and empty >= EMPTY and len(samples.pieces) >= SURE:
        says = f"{segment.uri}: about {empty:.0%} of the pixels are empty, from a few samples"
        yield Caution("empty", says, {"empty": empty, "samples": len(samples.pieces)})
    if segment.dtype.itemsize == 2 and 0 < largest < 1 << 12:  # as in a sixteenth of the range
        bits = max(8, largest.bit_length())
        says = (
            f"{segment.uri}: the largest value sampled is {largest:,} of 65,535: these look "
            f"like {bits}-bit values kept in uint16, whose high bytes are read; rescale them"
        )
        yield Caution("few-bits", says, {"largest": largest, "bits": bits})
