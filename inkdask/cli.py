"""Command line, with options generated from the parameters of `inkdask.settings`."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

import inkdask
from inkdask import messages
from inkdask.errors import InkdaskError, SettingsError
from inkdask.options import settings_options
from inkdask.progress import columns, printable, say
from inkdask.settings import Settings, is_blank, parameters
from inkdask.specs import normalisation

DEMO = "inkdask-demo"  # folder of the demo


def main(arguments: Sequence[str] | None = None, name: str = "inkdask") -> None:
    """Run the command line; report an InkdaskError as one sentence with its exit code."""
    signals: list[int] = []
    words = sys.argv[1:] if arguments is None else arguments

    def stop(number: int, _: Any) -> None:
        signals.append(number)
        raise KeyboardInterrupt

    # Treated as Ctrl-C, because clouds reclaim a machine by SIGTERM, and a closed terminal sends
    # SIGHUP.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, stop)
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: prints any path
    try:
        inkdask_.main(arguments, prog_name=name, standalone_mode=False)
    except InkdaskError as error:
        say(f"inkdask: {printable(as_typed(str(error), words))}")
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        say(f"inkdask: {_interrupted(words)}")
        if images := sys.modules.get("inkdask.reading.images"):
            images.forget()
        # sys.exit would wait for the chunks that are running.
        os._exit(128 + (signals[0] if signals else signal.SIGINT))  # the code that shells use


def _interrupted(words: Sequence[str]) -> str:
    """Return a sentence on what an interrupted command leaves."""
    if not {"run", "prepare"} & {*words}:
        return "interrupted."
    try:
        anew = "--overwrite" in words or Settings.of().overwrite
    except InkdaskError:
        anew = False
    store = sys.modules.get("inkdask.store")
    if anew and not (store and store.restarted):
        return "interrupted before it began: give the same command again."
    without = " without --overwrite" if anew else ""
    return f"interrupted; what is done is kept, and the same command{without} resumes."


def as_typed(sentence: str, words: Sequence[str]) -> str:
    """Name options beside their variables, where options were given and the variable was not."""
    if not any(word.startswith("--") for word in words):
        return sentence
    flags = {
        variable: f"--{name.replace('_', '-')}"
        for name, variable, field in parameters()
        if name != "s3_path" and variable not in os.environ and field.annotation is not bool
    }
    if {"START_LAYER", "END_LAYER"} <= flags.keys():
        flags = {"START_LAYER and END_LAYER": "--layers", **flags}

    def named(found: re.Match[str]) -> str:
        flag = flags[found[1]]
        return f"{flag} " if found[2] else f"{flag} ({found[1]})"

    return re.sub(rf"(?<![\w/])({'|'.join(flags)})\b(=(?=\S))?", named, sentence)


def answer(text: object) -> None:
    """Print a result on standard output, which may be full."""
    try:
        print(text, flush=True)
    except BrokenPipeError:  # click ends as programs before `head` do
        raise
    except OSError as error:
        sys.stdout = None  # else Python would try again at its end  # type: ignore[assignment]
        raise InkdaskError(f"Standard output cannot be written: {error.strerror}.") from error


@click.group(
    "inkdask",
    cls=messages.Group,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(inkdask.__version__, prog_name="inkdask")
@click.option("-v", "--verbose", is_flag=True, help="Show more messages.")
def inkdask_(verbose: bool) -> None:
    """Read ink on Herculaneum surface volumes.

    Every option is also an environment variable, named in brackets.
    """
    messages.show(verbose)


@inkdask_.command()
@click.argument("s3_path", required=False)
@settings_options()
def run(**given: Any) -> None:
    """Run the job: layers in, picture out.

    S3_PATH is the folder that holds `layers/`, local or `s3://`. Without arguments, the environment
    must name the whole job.
    """
    from inkdask.workflow import run

    answer(run(**_complete(given)))


@inkdask_.command()
@click.argument("s3_path", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print pictures and warnings as JSON.")
@settings_options()
def check(as_json: bool, **given: Any) -> None:
    """Check whether `run` with the same words can do its job, and run nothing.

    Tries the model, its weights, the layers, and the places of the outputs. Warns of what would
    make the picture wrong. Prints the URI that the picture will have.
    """
    from inkdask.workflow import check, examine

    options = _complete(given)
    if not as_json:
        answer(check(**options))
        return
    jobs, found = examine(**options)
    told = {
        "pictures": [f"{job.target}.png" for job in jobs],
        "job": str(jobs[0].plan),
        "warnings": [asdict(it) for it in found],
    }
    answer(json.dumps(told, indent=1))


@inkdask_.command()
@click.argument("s3_path", required=False)
@settings_options(
    "model", "start_layer", "end_layer", "model_in_chans", "force_reverse", "direction",
    "z_downsample_mean_factor", "tile", "stride", "clip", "divisor", "precision", "tta", "roi_xyxy",
    "blend_mode", "gaussian_sigma", "reverse_video", "spread", "pixel_resolution_um",
    "add_scale_bar", "scale_bar_length_um", "grid", "zarr_output_dir", "num_parts",
    "output_path", "result_file", "cluster", "scheduler_address", "report",
)  # fmt: skip
def reduce(**given: Any) -> None:
    """Make the picture of a tile grid that a run or its parts have stored.

    Needs no weights, no GPU and no layers. Takes the grid that --grid names, or the one under
    ZARR_OUTPUT_DIR whose job had all settings that are given here.
    """
    from inkdask.workflow import run

    answer(run(step="reduce", **_given(given)))


@inkdask_.command()
@click.argument("s3_path", required=False)
@settings_options(
    "start_layer", "end_layer", "volume", "catalogue", "ome_zarr_level",
    "z_downsample_mean_factor", "surface_volume_zarr", "zarr_output_dir", "use_zarr_compression",
    "overwrite",
)  # fmt: skip
def prepare(**given: Any) -> None:
    """Write the layers of a segment to one zarr array, for SURFACE_VOLUME_ZARR.

    Pays off when many jobs read the same segment, or when its layers cannot be read in parts.
    """
    from inkdask.workflow import prepare

    answer(prepare(**_given(given)))


@inkdask_.command()
@click.option(
    "--out", type=click.Path(), default=DEMO, show_default=True,
    help="Folder for the segment and the pictures.",
)  # fmt: skip
def demo(out: str) -> None:
    """Make a synthetic segment, run the real job on it, and show the letters it finds."""
    from inkdask import demo

    if "://" in out:
        raise SettingsError(f"The demo cannot write to {out}: --out is a local path, not a URI.")
    answer(demo.run(Path(DEMO if is_blank(out) else out)))


@inkdask_.command()
@click.argument("prediction")
@click.option(
    "--to",
    required=True,
    multiple=True,
    metavar="FILE",
    help="File to write, local or s3://: .png, .tif (tiled BigTIFF), .jpg (an overview) or .zarr "
    "(an OME-Zarr pyramid of the ink alone). Can be given several times.",
)
@click.option(
    "--overlay",
    type=click.Choice(["max", "mean"]),
    help="Lay the ink over the papyrus: the maximum or the mean of its layers.",
)
@click.option(
    "--segment", metavar="PATH", help="Folder of the layers for the overlay, if it was moved."
)
@click.option("--opacity", type=float, metavar="0..1", help="Opacity of the strongest ink.")
@click.option(
    "--colour-map",
    metavar="NAME",
    help="Colours of the ink, such as inferno. Default: grey, and black in an overlay.",
)
@click.option(
    "--max-side",
    type=int,
    metavar="PIXELS",
    help="Halve the picture until neither side is longer. Default: 4096 for JPEG.",
)
@click.option("--compression", type=click.Choice(["deflate", "zstd"]), help="Compression of TIFF.")
@settings_options(
    "reverse_video", "pixel_resolution_um", "add_scale_bar", "scale_bar_length_um", "roi_xyxy"
)
def export(prediction: str, to: tuple[str, ...], **given: Any) -> None:
    """Make pictures of a stored prediction, without running the network.

    PREDICTION is the `prediction_*.zarr` that a job leaves beside its PNG.
    """
    from inkdask.pictures.exporting import export

    for uri in export(prediction, to, **_given(given)):
        answer(uri)


@inkdask_.command()
@click.argument("s3_path")
@click.option("--model", multiple=True, metavar="MODEL", help="As of run; can be given repeatedly.")
@click.option(
    "--offsets",
    metavar="N,...",
    help="Distances of the window from the middle, in layers. Default: those of -16,-8,0,8,16 "
    "for which the segment has layers.",
)
@click.option("--strides", metavar="N,...", help="Strides in pixels. Default: the model's.")
@click.option(
    "--labels", metavar="FILE", help="Picture of the segment's size, not 0 where there is ink."
)
@settings_options(
    "start_layer", "end_layer", "direction", "roi_xyxy", "model_type", "tile", "clip", "divisor",
    "precision", "batch_size", "chunk_size", "z_downsample_mean_factor", "mask_path",
    "surface_volume_zarr", "ome_zarr_level", "pixel_resolution_um", "output_path",
    "zarr_output_dir", "cluster", "scheduler_address",
)  # fmt: skip
def sweep(s3_path: str, model: tuple[str, ...], **given: Any) -> None:
    """Run variants of a region side by side: depth, direction, model and stride.

    Each column of voxels is read once for all of them. Writes a contact sheet, sweep.png, and
    sweep.json (sweep_SEGMENT.* in a shared folder), and says which run it suggests, or that nothing
    stands out. Without --direction, it runs both; without --roi-xyxy, a few windows that are full
    of papyrus.
    """
    from inkdask.controls.sweeps import sweep

    for name in ("offsets", "strides"):
        given[name] = _numbers(given[name], name)
    result = sweep(s3_path, **_given(given | {"model": [*model] or None}))
    answer(result)
    answer(result.sheet)


def _numbers(text: str | None, name: str) -> list[int] | None:
    """Return the whole numbers of ``-8,0,8``."""
    try:
        return None if text is None else [int(number) for number in text.split(",")]
    except ValueError:
        raise click.BadParameter(f"--{name} must be whole numbers, such as 8,16.") from None


@inkdask_.command()
@click.argument("prediction")
@click.option("--second-model", metavar="MODEL", help="Another model, to show beside it.")
@click.option("--second-stride", type=int, metavar="N", help="Another stride, in pixels.")
@settings_options(
    "roi_xyxy",
    "pixel_resolution_um",
    "batch_size",
    "output_path",
    "zarr_output_dir",
    "cluster",
    "scheduler_address",
)
def evidence(prediction: str, **given: Any) -> None:
    """Make a page that shows a prediction beside its controls, as PNG and HTML.

    The controls are the same papyrus with its layers reversed, shuffled, and of a window off the
    sheet. PREDICTION is the `prediction_*.zarr` that a job leaves beside its PNG. A large one is
    shown in part, unless --roi-xyxy says which.
    """
    from inkdask.controls.evidencing import evidence

    for uri in evidence(prediction, **_given(given)):
        answer(uri)


@inkdask_.command()
@click.argument("path")
@settings_options(
    "start_layer", "end_layer", "volume", "catalogue", "ome_zarr_level", "mask_path", "model",
    "model_type", "tile", "stride", "chunk_size",
)  # fmt: skip
def info(path: str, **given: Any) -> None:
    """Describe the segment, picture or tile grid at PATH.

    For a segment: layers, type, layout, size, tiles, expected memory, and the time that --model, or
    each model that fits, takes, once this machine has run it. For a picture that inkdask made (PNG,
    TIFF, JPEG, zarr), or a tile grid: its origin, and the command that makes it again. For a folder
    of segments: what each holds.
    """
    from inkdask.information import describe

    answer(columns(describe(path, **_given(given))))


@inkdask_.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def models(as_json: bool) -> None:
    """List the models that have a key, and what each suits."""
    from inkdask.models.registry import known

    if as_json:
        answer(json.dumps([asdict(spec) for spec in known().values()], indent=1))
        return
    lines = []
    for spec in known().values():
        revision = f" at {spec.revision[:12]}" if spec.revision else ""
        file = f":{spec.filename}" if spec.filename else ""
        scan = f", of scans of {spec.pixel_um:g} um" if spec.pixel_um else ""
        suits = f"; {spec.suits}" if spec.suits else ""
        lines += [
            f"{click.style(spec.key, bold=True)}  {spec.weights}{file}{revision}",
            f"    suits segments of {spec.layers} layers and more{scan}{suits}",
            f"    {spec.architecture}: tile {spec.tile}, stride {spec.stride}; "
            f"voxels {normalisation(spec.clip, spec.divisor)}",
        ]
        lines += [f"    licence: {spec.licence}"] if spec.licence else []
    text = "\n".join(lines)
    answer(text if sys.stdout.isatty() else click.unstyle(text))


def _complete(options: dict[str, Any]) -> dict[str, Any]:
    """Return the given options; without any, the environment must name the whole job."""
    given = _given(options)
    said = Settings.of()
    if not given and said.step != "prepare" and not (said.step == "reduce" and said.grid):
        said.require("model", "s3_path", "start_layer", "end_layer")
    return given


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return the options that the user gave."""
    return {name: value for name, value in options.items() if value is not None}
