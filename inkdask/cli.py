"""Command line, with options generated from the parameters of `inkdask.settings`."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args, get_origin

import click
from pydantic.fields import FieldInfo
from rich.console import Console

import inkdask
from inkdask.errors import InkdaskError
from inkdask.progress import columns, printable
from inkdask.settings import Settings, parameters
from inkdask.specs import normalisation


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
        _fail(as_typed(str(error), words), error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        print(f"inkdask: {_interrupted(words)}", file=sys.stderr, flush=True)
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
    """Name options instead of variables, where options were given and the variable was not."""
    if not any(word.startswith("--") for word in words):
        return sentence
    if not {"START_LAYER", "END_LAYER"} & os.environ.keys():
        sentence = sentence.replace("START_LAYER and END_LAYER", "--layers")
    for name, variable, field in parameters():
        if name != "s3_path" and variable not in os.environ and field.annotation is not bool:
            flag = f"--{name.replace('_', '-')}"
            sentence = re.sub(rf"\b{variable}=(?=\S)", f"{flag} ", sentence)
            sentence = re.sub(rf"(?<![\w/]){variable}\b", flag, sentence)
    return sentence


def _fail(sentence: str, code: int) -> None:
    print(f"inkdask: {printable(sentence)}", file=sys.stderr)
    sys.exit(code)


def _settings_options(*only: str) -> Callable[[Any], Any]:
    """Return a decorator that adds an option for each parameter, or for the named ones."""

    def decorate(command: Any) -> Any:
        for name, variable, field in reversed(list(parameters())):
            if name == "s3_path" or (only and name not in only):
                continue
            flag = f"--{name.replace('_', '-')}"
            kind: dict[str, Any] = {"metavar": _metavar(field)}
            if field.annotation is bool:
                flag, kind = f"{flag}/--no-{flag[2:]}", {"default": None}
            default = "" if field.default is None else f" (default: {field.default})"
            text = f"{field.description}{default} [{variable}]".replace("`", "")
            command = click.option(flag, name, help=text, **kind)(command)
        if only and "start_layer" not in only:
            return command
        return click.option(
            "--layers",
            metavar="START:END",
            help="Layer range, first inclusive, last exclusive. [START_LAYER, END_LAYER]",
        )(command)

    return decorate


def _metavar(field: FieldInfo) -> str:
    """Return the placeholder of an option's value in the help."""
    if isinstance(field.json_schema_extra, dict):
        return str(field.json_schema_extra["metavar"])
    kinds = [kind for kind in get_args(field.annotation) if kind is not NoneType]
    if get_origin(field.annotation) is Literal:
        return "|".join(map(str, kinds))
    kind: Any = kinds[0] if kinds else field.annotation
    return "|".join(map(str, get_args(kind))) or {int: "INT", float: "FLOAT"}.get(kind, "TEXT")


@click.group(
    "inkdask", context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(inkdask.__version__, prog_name="inkdask")
@click.option("-v", "--verbose", is_flag=True, help="Show more messages.")
def inkdask_(verbose: bool) -> None:
    """Read ink on Herculaneum surface volumes.

    Every option is also an environment variable, named in brackets.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(_Printable("%(message)s"))
    if not verbose:
        handler.addFilter(_is_for_everybody)
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("inkdask").setLevel(logging.DEBUG if verbose else logging.INFO)


class _Printable(logging.Formatter):
    """Format messages, and keep the lines of tracebacks."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(printable, super().format(record).split("\n")))


def _is_for_everybody(record: logging.LogRecord) -> bool:
    """Keep our own messages and warnings; distributed logs every connection."""
    if record.name.startswith("huggingface_hub"):  # has a handler of its own
        return False
    return record.name.startswith("inkdask") or record.levelno >= logging.WARNING


@inkdask_.command()
@click.argument("s3_path", required=False)
@_settings_options()
def run(**given: Any) -> None:
    """Run the job: layers in, picture out.

    S3_PATH is the folder that holds `layers/`, local or `s3://`. Without arguments, the environment
    must name the whole job.
    """
    from inkdask.workflow import run

    print(run(**_complete(given)))


@inkdask_.command()
@click.argument("s3_path", required=False)
@click.option("--json", "as_json", is_flag=True, help="Print pictures and warnings as JSON.")
@_settings_options()
def check(as_json: bool, **given: Any) -> None:
    """Check whether `run` with the same words can do its job, and run nothing.

    Tries model and weights, layers, tiles and the places of the outputs, and warns of what would
    make a wrong picture. Prints the URI that the picture will have.
    """
    from inkdask.workflow import check, examine

    options = _complete(given)
    if not as_json:
        print(check(**options))
        return
    jobs, found = examine(**options)
    told = {
        "pictures": [f"{job.target}.png" for job in jobs],
        "job": str(jobs[0].plan),
        "warnings": [asdict(it) for it in found],
    }
    print(json.dumps(told, indent=1))


@inkdask_.command()
@click.argument("s3_path", required=False)
@_settings_options(
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

    print(run(step="reduce", **_given(given)))


@inkdask_.command()
@click.argument("s3_path", required=False)
@_settings_options(
    "start_layer", "end_layer", "volume", "catalogue", "ome_zarr_level",
    "z_downsample_mean_factor", "surface_volume_zarr", "zarr_output_dir", "use_zarr_compression",
    "overwrite",
)  # fmt: skip
def prepare(**given: Any) -> None:
    """Write the layers of a segment to one zarr array, for SURFACE_VOLUME_ZARR.

    Pays off when many jobs read the same segment, or when its layers cannot be read in parts.
    """
    from inkdask.workflow import prepare

    print(prepare(**_given(given)))


@inkdask_.command()
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("inkdask-demo"), show_default=True,
    help="Folder for the segment and the pictures.",
)  # fmt: skip
def demo(out: Path) -> None:
    """Make a synthetic segment, run the real job on it, and show the letters it finds."""
    from inkdask import demo

    print(demo.run(out))


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
@_settings_options(
    "reverse_video", "pixel_resolution_um", "add_scale_bar", "scale_bar_length_um", "roi_xyxy"
)
def export(prediction: str, to: tuple[str, ...], **given: Any) -> None:
    """Make pictures of a stored prediction, without running the network.

    PREDICTION is the `prediction_*.zarr` that a job leaves beside its PNG.
    """
    from inkdask.pictures.exporting import export

    for uri in export(prediction, to, **_given(given)):
        print(uri)


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
@_settings_options(
    "start_layer", "end_layer", "direction", "roi_xyxy", "model_type", "tile", "clip", "divisor",
    "precision", "batch_size", "chunk_size", "z_downsample_mean_factor", "mask_path",
    "surface_volume_zarr", "ome_zarr_level", "pixel_resolution_um", "output_path",
    "zarr_output_dir", "cluster", "scheduler_address",
)  # fmt: skip
def sweep(s3_path: str, **given: Any) -> None:
    """Run variants of a region side by side: depth, direction, model and stride.

    Each column of voxels is read once for all of them. Writes a contact sheet, sweep.png, and
    sweep.json, and says which run it suggests, or that nothing stands out. Without --direction, it
    runs both; without --roi-xyxy, a few windows that are full of papyrus.
    """
    from inkdask.controls.sweeps import sweep

    for name in ("offsets", "strides"):
        given[name] = _numbers(given[name], name)
    given["model"] = list(given["model"]) or None
    result = sweep(s3_path, **_given(given))
    print(result)
    print(result.sheet)


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
@_settings_options(
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
        print(uri)


@inkdask_.command()
@click.argument("path")
@_settings_options(
    "start_layer", "end_layer", "volume", "catalogue", "ome_zarr_level", "mask_path", "model",
    "model_type", "tile", "stride", "chunk_size",
)  # fmt: skip
def info(path: str, **given: Any) -> None:
    """Describe the segment, picture or tile grid at PATH.

    For a segment: layers, type, layout, size, tiles and expected memory. For a picture that inkdask
    made (PNG, TIFF, JPEG, zarr), or a tile grid: its origin, and the command that makes it again.
    """
    from inkdask.information import describe

    print(columns(describe(path, **_given(given))))


@inkdask_.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
def models(as_json: bool) -> None:
    """List the models that have a key."""
    from inkdask.models.registry import known

    if as_json:
        print(json.dumps([asdict(spec) for spec in known().values()], indent=1))
        return
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for spec in known().values():
        revision = f" at {spec.revision[:12]}" if spec.revision else ""
        file = f":{spec.filename}" if spec.filename else ""
        scan = f" of scans of {spec.pixel_um:g} um" if spec.pixel_um else ""
        console.print(spec.key, style="bold", end="")
        console.print(f"  {spec.weights}{file}{revision}")
        console.print(
            f"    {spec.architecture}: {spec.layers} layers{scan}, tile {spec.tile}, stride "
            f"{spec.stride}; voxels {normalisation(spec.clip, spec.divisor)}"
        )
        if spec.licence:
            console.print(f"    licence: {spec.licence}")


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
