"""A job: the grid that it fills, and the place of the picture that is made of it."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from inkdask import records, storage
from inkdask.box import Box, cut_region
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import Origin, Provenance, Recipe, Said, differences, digest
from inkdask.models.registry import known
from inkdask.models.sources import sha256
from inkdask.pictures.exporting import Look
from inkdask.plan import Plan
from inkdask.provenance import UNSAID, asked_of, origin_of, picture_options, recipe_of, said_of
from inkdask.segment import identify, name_of
from inkdask.settings import Settings
from inkdask.specs import BlendMode
from inkdask.store import GridStore

log = logging.getLogger("inkdask")

LONGEST = 128  # bytes of one name in a file name, because endings follow, and 255 are the most


@dataclass(frozen=True)
class Rendering:
    """How a picture is made of a grid.

    Attributes
    ----------
    blend_mode, gaussian_sigma
        The blending window.
    pixel_um
        Side of a pixel in micrometers; None where it is not known.
    look
        How the picture is shown.
    spread
        Whether the spread of opinions is saved beside it.
    words
        All of this and the region, as words of a command.
    """

    blend_mode: BlendMode
    gaussian_sigma: float
    pixel_um: float | None
    look: Look
    spread: bool
    words: tuple[str, ...]


def rendering_of(settings: Settings, origin: Origin) -> Rendering:
    """Return what the settings say about the picture."""
    pixel_um = settings.pixel_resolution_um or origin.pixel_um
    if settings.add_scale_bar and pixel_um is None:
        settings.require("pixel_resolution_um")
    bar = settings.scale_bar_length_um if settings.add_scale_bar else None
    return Rendering(
        blend_mode=settings.blend_mode,
        gaussian_sigma=settings.gaussian_sigma,
        pixel_um=pixel_um,
        look=Look(reverse_video=settings.reverse_video, scale_bar_um=bar),
        spread=settings.spread,
        words=picture_options(settings, origin.roi_xyxy),
    )


@dataclass(frozen=True)
class Job:
    """What run, its parts, reduce and a progressive notebook have in common.

    Attributes
    ----------
    recipe, origin, said
        What shapes its tiles, where they come from, and what was asked for (`inkdask.identity`).
    grid
        Where its tiles are stored.
    target
        Place of the picture, without an ending.
    rendering
        How the picture is made of the grid.
    folder
        Where the record of the job is kept; None for a grid that was named.
    plan
        What computes it; None where only the stored grid is there.
    """

    recipe: Recipe
    origin: Origin
    said: Said | None
    grid: GridStore
    target: str
    rendering: Rendering
    folder: str | None = None
    plan: Plan | None = None

    @classmethod
    def of(cls, plan: Plan, settings: Settings) -> Job:
        """Return the job of a plan; nothing is written yet."""
        recipe, origin = recipe_of(plan), origin_of(plan, settings)
        if settings.grid:
            grid, folder = GridStore.at(settings.grid, recipe), None
        else:
            grid = GridStore.of(settings.zarr_output_dir, shortened(plan.name), recipe)
            folder = settings.zarr_output_dir
        target = output_stem(settings.output_path, origin, recipe.model, _way(settings))
        said = said_of(plan, origin, settings)
        rendering = rendering_of(settings, origin)
        return cls(recipe, origin, said, grid, target, rendering, folder, plan)

    @classmethod
    def found(cls, settings: Settings) -> Job:
        """Return the job whose grid the settings name, or whose record agrees with them."""
        asked = asked_of(settings)
        if settings.grid:
            grid, label = GridStore.open(settings.grid)
            said = settings.model_fields_set
            # The region may be any part of the grid, and its chunks do not show in a picture.
            open_to = {*UNSAID} - said | {"roi_xyxy", "chunk_size"}
            given = {name: value for name, value in asked.items() if name not in open_to}
            if label.said and (differing := differences(label.said, given)):
                raise InkdaskError(f"The tile grid {grid.uri} is another job's: {differing}.")
        else:
            settings.require("s3_path", "model")
            parts = ", ".join(map(str, range(settings.num_parts)))
            first = f"run STEP=inference with NUM_PARTS={settings.num_parts} and PART_ID={parts}"
            uri = records.find(settings.zarr_output_dir, asked, f"{first} first.")
            grid, label = GridStore.open(uri)
            if changed := changed_input(label.recipe, label.origin):
                raise InkdaskError(f"The tile grid {uri} is old: {changed}; {first} first.")
        origin = label.origin
        if settings.roi_xyxy:
            whole = Box.at(label.recipe.corner, label.recipe.size)
            there = f"the tile grid, which covers {','.join(map(str, whole.xyxy))}"
            roi = cut_region(settings.roi_xyxy, whole, there).xyxy
            origin = replace(origin, roi_xyxy=roi)
        way = _way(settings)
        target = output_stem(settings.output_path, origin, label.recipe.model, way)
        rendering = rendering_of(settings, origin)
        return cls(label.recipe, origin, label.said, grid, target, rendering)

    def create(self) -> None:
        """Make the grid where it is not there, and keep the record by which `reduce` finds it."""
        self.grid.create(self.recipe, self.origin, self.said)
        if self.folder and self.said:
            # A region that was cut at the segment's border is found by both.
            for roi in {self.said.roi_xyxy, self.origin.roi_xyxy}:
                said = replace(self.said, roi_xyxy=roi)
                records.keep(self.folder, said, self.grid.uri)

    def restarted(self) -> Job:
        """Start the grid anew, where one is there, and return the job of its next generation."""
        if self.grid.check_place(self.recipe) is None:
            return self
        return replace(self, grid=self.grid.restart())

    def check_unchanged(self) -> None:
        """Check that the layers are those whose tiles are stored, and that the grid is current.

        Tiles of other layers may be among those stored just now, so the grid starts anew.
        """
        self.grid.check_current()
        if changed := changed_input(self.recipe, self.origin):
            self.grid.restart()
            raise InkdaskError(
                f"The input of {self.origin.volume} changed while the job ran: {changed}. Give the "
                "same command again."
            )

    @property
    def provenance(self) -> Provenance:
        """What a picture of the tiles that are there says of itself."""
        words = self.origin.command
        if words is not None:
            words = (*words, *self.rendering.words)
        return Provenance(
            recipe=self.recipe,
            origin=replace(self.origin, command=words),
            blend_mode=self.rendering.blend_mode,
            gaussian_sigma=self.rendering.gaussian_sigma,
            ran_in=self.grid.precisions(),
            window_um=self.rendering.pixel_um and self.recipe.tile * self.rendering.pixel_um,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            sweeps=self._sweeps,
        )

    @property
    def _sweeps(self) -> tuple[str, ...]:
        """Digest of the sweep beside the picture, where this job is among its variants."""
        place = sweep_stem(self.target.rpartition("/")[0] or "/", str(self.origin.source))
        with suppress(InkdaskError, ValueError, LookupError, TypeError, RecursionError):
            told = json.loads(storage.read_bytes(f"{place}.json"))
            if is_variant(told, self.recipe, self.origin):
                return (str(told["digest"]),)
        return ()

    @property
    def region(self) -> Box:
        """Pixels of the grid's volume that are the picture."""
        covered = Box.at(self.recipe.corner, self.recipe.size)
        roi = self.origin.roi_xyxy
        region = Box.of_xyxy(roi) if roi else covered
        if not covered.holds(region):
            raise SettingsError(
                f"ROI_XYXY {','.join(map(str, region.xyxy))} reaches beyond the tile grid, which "
                f"covers {','.join(map(str, covered.xyxy))}."
            )
        return region.inside(self.recipe.corner)


def plan_of(job: Job) -> Plan:
    """Return the plan of a job that computes."""
    assert job.plan is not None  # noqa: S101  only a job of a stored grid has none
    return job.plan


def is_variant(sweep: Mapping[str, Any], recipe: Recipe, origin: Origin) -> bool:
    """Whether a sweep has a variant that reads the same layers, through the same network."""
    layers = [min(recipe.layers), max(recipe.layers) + 1]
    same = [recipe.weights, layers, recipe.direction, recipe.stride]
    names = ("weights", "layers", "direction", "stride")
    variants = [[variant[name] for name in names] for variant in sweep["variants"]]
    return sweep["segment"] == origin.volume and same in variants


def changed_input(recipe: Recipe, origin: Origin) -> str:
    """Say how the input has changed since a recipe was made; empty when it has not, or is gone."""
    if origin.volume is None:
        return ""
    try:
        layers, mask = identify(origin.volume, origin.opened, origin.mask, origin.ome_zarr_level)
    except InkdaskError as error:
        log.info("The input of the tiles cannot be compared: %s", error)
        return ""
    weights = origin.weights_from
    changed = [
        what
        for what, then, now in (
            ("layers", recipe.input, layers),
            ("mask", recipe.mask, mask),
            ("weights", recipe.weights, _digest_of(weights) or recipe.weights),
        )
        if then != now
    ]
    words = " and ".join(changed)
    return f"the {words} had another size, time, ETag or content" if changed else ""


def _digest_of(weights: str | None) -> str | None:
    """SHA-256 of a local checkpoint; None for weights elsewhere, which have a pinned revision."""
    is_file = weights and storage.is_local(weights) and Path(weights).is_file()
    return sha256(Path(str(weights))) if is_file else None


def _way(settings: Settings) -> str:
    """Return what tells the picture of the reverse from the other, where DIRECTION is used."""
    return "_reverse" if settings.direction and settings.is_reversed else ""


def output_stem(folder: str | None, origin: Origin, model: str, way: str = "") -> str:
    """Where the outputs go, without their endings: ``.../prediction_<MODEL>_<START>_<END>``.

    In a folder that other segments may share, the segment's name comes before that of the model.
    """
    name = _name_of(model, origin.weights_from or "")
    folder, segment = place_of(folder, str(origin.source))
    if segment:
        name = shortened(f"{segment}_{name}")
    start, end = origin.layer_range
    name = f"prediction_{name}_{start:02d}_{end:02d}{way}"
    if roi := origin.roi_xyxy:  # a part must not take the place of the whole
        name += "_{}-{}-{}-{}".format(*roi)
    return storage.join(folder, name)


def sweep_stem(folder: str | None, source: str) -> str:
    """Where table and contact sheet of a sweep go, without their endings."""
    folder, segment = place_of(folder, source)
    return storage.join(folder, f"sweep_{shortened(segment)}" if segment else "sweep")


def place_of(folder: str | None, source: str) -> tuple[str, str]:
    """Return the folder for a segment's outputs, and the segment's name for names of files there.

    The name is empty where a folder on the way is the segment's own.
    """
    beside = "." if _is_for_readers(source) else storage.join(source, "predictions")
    folder = folder or beside
    if storage.is_local(folder):  # the reader of the result file may be in another folder
        folder = str(Path(storage.filesystem(folder)[1]).absolute())
    segment = name_of(source)
    is_own = segment in folder.split("/") or is_below(folder, source)
    return folder, "" if is_own else segment


def is_below(uri: str, folder: str) -> bool:
    """Whether ``uri`` lies in a folder, or is it."""
    return f"{uri}/".startswith(f"{folder}/")


def _is_for_readers(uri: str) -> bool:
    """Whether nothing can be written beside a segment."""
    return storage.is_http(uri) or not (storage.is_local(uri) or storage.has_credentials())


def _name_of(model: str, weights: str) -> str:
    """Return a model as file names say it: a checkpoint in a folder or bucket by its last parts."""
    if model in known() or not (weights.startswith("/") or "://" in weights):
        return shortened(re.sub("[/:]", "_", model))
    last = "_".join(PurePosixPath(weights).with_suffix("").parts[-2:])
    return shortened(re.sub(r"[^\w.-]+", "_", last).strip("_"), weights)


def shortened(name: str, whole: str = "") -> str:
    """Return the end of a name, with a digest of ``whole``, or of a name that is too long."""
    end = name.encode(errors="replace")[-LONGEST:].decode(errors="ignore")
    return f"{end}-{digest(whole or name)[:8]}" if whole or end != name else name
