"""Every parameter once: its type, bounds, unit, default and description.

`Settings` makes the environment contract (``TILE_SIZE``), the command line (``--tile``), the
keyword arguments of the Python API (``tile=``) and the table in the README. A given value wins over
the environment, and the environment over the default.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator
from functools import cache
from itertools import takewhile
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AliasChoices,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from inkdask.errors import SettingsError
from inkdask.specs import BlendMode, Precision, Tta

log = logging.getLogger("inkdask")

F = TypeVar("F", bound=Callable[..., Any])
LAYERS = FieldInfo(default=None, annotation=Any)  # start_layer and end_layer in one word
ModelType = Literal[
    "timesformer", "resnet3d-50", "resnet3d-101", "resnet3d-152", "resnet3d-152-3d-decoder",
    "hecate-2.4um", "hecate-9.6um", "hybrid-3d2d",
]  # fmt: skip


def layer_range(layers: Any) -> tuple[int, int]:
    """Return first layer (inclusive) and last (exclusive) of ``"0:26"``, a pair or a range.

    Raises
    ------
    ValueError
        With a sentence for the user.
    """
    said = layers
    if isinstance(layers, range | slice):
        said = (layers.start, layers.stop) if layers.step in (None, 1) else None
    try:
        start, end = map(int, said.split(":") if isinstance(said, str) else said)
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"layers must be START:END, such as 0:26, but is {layers!r}") from None
    return _in_order(start, end)


def _in_order(start: int, end: int) -> tuple[int, int]:
    if start >= end:
        raise ValueError(
            f"START_LAYER ({start}) must be less than END_LAYER ({end}): the range is empty"
        )
    return start, end


def is_blank(value: Any) -> bool:
    """Whether a value is text without a word, which counts as not given."""
    return isinstance(value, str) and not value.strip()


# URIs without a bucket or host, also as `Path` writes them: s3:/bucket.
_NAMELESS = re.compile(r"(s3a?|https?):(/?$|/(?!/[^/]))|[\w+.-]+://+$")

# Upper bounds; a larger value is a mistake.
MOST_LAYERS, MOST_WORKERS = 100_000, 10_000


class Settings(BaseSettings):
    """All parameters of a job.

    Raises
    ------
    pydantic.ValidationError
        From the constructor; use `Settings.of` for one sentence instead.
    """

    model_config = SettingsConfigDict(
        case_sensitive=False,
        extra="forbid",
        frozen=True,
        populate_by_name=True,
        protected_namespaces=(),
    )

    # Input
    s3_path: str | None = Field(
        None,
        description="Segment to read: a local path, or an `s3://` or `https://` URI, of the folder "
        "that holds `layers/` or `surface-volumes/`; or its id in the catalogue, `SAMPLE/SEGMENT`. "
        "Required.",
    )
    volume: str | None = Field(
        None,
        description="Surface volume to read of a segment that has several: its name, the id of its "
        "scan, or how one of these begins.",
    )
    catalogue: str | None = Field(
        None,
        validation_alias=AliasChoices("catalogue", "inkdask_catalogue"),
        description="Folder, `s3://` or `https://` URI of a copy of the open bucket, whose "
        "`metadata.json` is the catalogue. Default: the open bucket.",
    )
    start_layer: int | None = Field(
        None,
        ge=0,
        le=MOST_LAYERS,
        description="First layer, inclusive. With END_LAYER: `--layers START:END`.",
    )
    end_layer: int | None = Field(None, ge=1, le=MOST_LAYERS, description="Last layer, exclusive.")
    surface_volume_zarr: str | None = Field(
        None,
        description="Read the layers from this zarr array instead: a prepared one, or an OME-Zarr "
        "group, local or `s3://`. For prepare: write it there.",
    )
    ome_zarr_level: str = Field(
        "0", description="Level of an OME-Zarr group that is read; 0 is the finest."
    )
    roi_xyxy: Annotated[tuple[int, int, int, int] | None, NoDecode] = Field(
        None,
        json_schema_extra={"metavar": "X0,Y0,X1,Y1"},
        description="Region of interest `x0,y0,x1,y1`, in pixels of the segment, x1 and y1 "
        "exclusive. The picture is that part of the whole one.",
    )
    mask_path: str | None = Field(
        None,
        description="Picture that is non-zero where there is papyrus; tiles elsewhere are skipped. "
        "Default: the segment's own `<id>_mask.png`, if there is one. `none`: no mask.",
    )
    z_downsample_mean_factor: Literal[1, 2, 4] = Field(
        1,
        description="Average this many neighbouring layers to one. 4, with OME_ZARR_LEVEL=2 of a "
        "scan of 2.4 um: the middle 84 layers, as models of 9 um read them.",
    )
    force_reverse: bool = Field(
        False, description="Read the layers from the last to the first (the sheet lies face down)."
    )

    direction: Literal["forward", "reverse", "both"] | None = Field(
        None,
        description="Order of the layers; reverse is that of FORCE_REVERSE. both: two pictures "
        "from one read. The picture of the reverse is called `..._reverse.png`.",
    )

    # Model
    model: Any = Field(
        None,
        description="Model key (see `inkdask models`), Hugging Face repo id, `s3://` URI or local "
        "path of a checkpoint. Required.",
    )
    model_type: ModelType | None = Field(
        None,
        description="Architecture of a checkpoint that does not tell it. Default: that of the "
        "description beside it, of its own facts or of the names of its tensors, else timesformer.",
    )
    model_version: str | None = Field(
        None,
        description="Version of a model that is a Python function. Tiles of a function that uses "
        "code of your own modules resume under a version only: change it with the code.",
    )
    model_in_chans: int | None = Field(
        None,
        ge=1,
        le=MOST_LAYERS,
        description="Layers that the network reads; a longer range is cropped about its centre. "
        "Default: the model's.",
    )
    hf_token: SecretStr | None = Field(
        None, description="Hugging Face token, for private model repositories."
    )
    clip: float | None = Field(
        None, gt=0, le=255, description="Voxels are clipped to this value. Default: the model's."
    )
    divisor: float | None = Field(
        None, gt=0, le=65535, description="Voxels are divided by this value. Default: the model's."
    )

    # Tiles and blending
    tile: int | None = Field(
        None,
        ge=1,
        le=4096,
        validation_alias=AliasChoices("tile", "tile_size"),
        description="Side of a tile, in pixels. Default: the model's (TimeSformer: 64).",
    )
    stride: int | None = Field(
        None,
        ge=1,
        le=4096,
        description="Distance of neighbouring tiles, in pixels. Default: the model's "
        "(TimeSformer: 16).",
    )
    progressive: bool = Field(
        False,
        description="Go from coarse to fine: tiles at four and two times the stride come first. "
        "Each pass reads the layers, and leaves a picture of the whole, `..._preview.png`.",
    )
    blend_mode: BlendMode = Field(
        "hann",
        description="Blending window, which weighs the pixels of a tile. upstream: window and "
        "borders as the programs of the model's people have them.",
    )
    gaussian_sigma: float = Field(
        0.0,
        ge=0,
        le=4096,
        description="Standard deviation of the Gaussian window, in pixels; 0 means tile / 2.5.",
    )

    tta: Tta = Field(
        "none",
        description="mirror: the mean probability of a tile and its three mirror images, for four "
        "times the cost.",
    )

    # Computation
    batch_size: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="Tiles in one forward pass. Default: chosen for the device (256 on a GPU).",
    )
    precision: Precision = Field(
        "auto",
        description="Arithmetic of the network. auto: bfloat16 where the hardware has it. int8: "
        "faster and less exact, for TimeSformer on a CPU without AMX.",
    )
    compile: bool = Field(
        True,
        description="Compile networks without kernels of their own, on a GPU, where the rest of "
        "the job would take longer than a minute. On a CPU nothing is compiled: compiled networks "
        "were 0.4 to 1.3 times as fast.",
    )
    compile_mode: Literal[
        "default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"
    ] = Field("reduce-overhead", description="Mode of `torch.compile`.")
    chunk_size: int | None = Field(
        None,
        ge=1,
        le=65536,
        description="Side of a chunk, in pixels, rounded up to a multiple of the stride and to "
        "two tiles. Default: 1024; 2048 where this process, the current Dask client or `--cluster "
        "cuda` has GPUs.",
    )
    cuda_visible_devices: str = Field(
        "0", description="GPUs that the process may use, as CUDA counts them."
    )

    # Cluster
    cluster: str = Field(
        "threads",
        description="Where the job runs: `threads` of this process (or the current client, in "
        "Python), `local` worker processes, `cuda` for one worker a GPU, `kubernetes`, or the "
        "address of a Dask scheduler.",
    )
    scheduler_address: str | None = Field(
        None,
        validation_alias=AliasChoices("dask_scheduler_address", "scheduler_address"),
        description="Address of a running Dask scheduler, the same as `--cluster ADDRESS`.",
    )
    min_workers: int = Field(
        1,
        ge=0,
        le=MOST_WORKERS,
        description="Workers that a Kubernetes cluster keeps even when idle.",
    )
    max_workers: int | None = Field(
        None,
        ge=1,
        le=MOST_WORKERS,
        description="Workers at most. Default: local: one for every 4 cores; cuda: the visible "
        "GPUs; kubernetes: 8.",
    )
    cluster_namespace: str | None = Field(
        None,
        description="Namespace of a Kubernetes cluster's pods. Default: that of the kubeconfig or "
        "of the pod.",
    )
    cluster_image: str | None = Field(
        None, description="Image of a Kubernetes cluster's pods. Default: the manifest's."
    )
    cluster_spec: str | None = Field(
        None,
        description="File with the DaskCluster to make on Kubernetes, as `kubectl kustomize "
        "cluster` prints it. Default: that of the cluster `inkdask` in the namespace, else that of "
        "the package.",
    )
    report: str | None = Field(
        None,
        description="Write Dask's performance report to this HTML file, also when the job fails.",
    )

    # Look of the picture
    reverse_video: bool = Field(
        False,
        description="Show ink dark on light ground, 255 minus each value; the zarr beside the "
        "picture keeps the probabilities.",
    )
    spread: bool = Field(
        False,
        description="Save the spread of opinions beside the picture, `..._spread.png`: the "
        "standard deviation among the tiles that hold a pixel. White is 0.5, the most.",
    )
    pixel_resolution_um: float | None = Field(
        None,
        ge=0.01,  # a value in metres or millimetres is smaller
        le=1000,
        description="Side of a pixel, in micrometers, for the scale bar and the resolution that "
        "the files carry.",
    )
    add_scale_bar: bool = Field(
        False, description="Draw a scale bar into the picture; needs PIXEL_RESOLUTION_UM."
    )
    scale_bar_length_um: float = Field(
        10_000.0,
        gt=0,
        le=1e9,
        description="Length of the scale bar, in micrometers; a round, shorter length where it "
        "does not fit.",
    )

    # Outputs
    output_path: str | None = Field(
        None,
        description="Folder for the picture, local or `s3://`. Default: `<S3_PATH>/predictions`; "
        "the current folder for a segment over HTTPS, or from a bucket without credentials. "
        "Pictures in a folder that is not the segment's own have the segment's name in theirs.",
    )
    zarr_output_dir: str = Field(
        "/tmp/partitions",  # noqa: S108  the contract's default
        description="Folder for tile grids, local or `s3://`: interrupted jobs resume from it.",
    )
    grid: str | None = Field(
        None,
        description="Tile grid to use instead of the one named after the job. A grid of the same "
        "job is resumed, one of another job is refused.",
    )
    step: Literal["prepare", "inference", "reduce"] = Field(
        "inference",
        description="prepare writes the layers to a zarr array; inference does the whole job, or "
        "one part of it; reduce makes the picture when all parts are done.",
    )
    num_parts: int = Field(
        1, ge=1, le=1_000_000, description="Number of parts of an inference on separate machines."
    )
    part_id: int = Field(
        0, ge=0, description="Part that this inference does, from 0 to NUM_PARTS - 1."
    )
    use_zarr_compression: bool = Field(
        False, description="Compress the zarr array that prepare writes."
    )
    overwrite: bool = Field(False, description="Start again, even where a tile grid could resume.")
    result_file: str = Field(
        "/tmp/result_s3_url.txt",  # noqa: S108  the contract's default
        description="File that receives the URI of the picture, last of all.",
    )

    @classmethod
    def of(cls, **given: Any) -> Settings:
        """Make settings of the given values, the environment and the defaults.

        ``layers=(0, 26)`` or ``"0:26"`` sets start_layer and end_layer. A wrong value is a
        SettingsError that names its variable.
        """
        # A blank value is one that was not given, as in the environment; but empty
        # CUDA_VISIBLE_DEVICES hide all GPUs.
        given = {
            name: value
            for name, value in given.items()
            if name == "cuda_visible_devices" or not is_blank(value)
        }
        if given.get("cluster") is not None:  # wins over an address of the environment
            given.setdefault("scheduler_address", None)
        if given.get("layers") is not None:
            for name in ("start_layer", "end_layer"):
                if given.get(name) is not None:
                    raise SettingsError(f"{env_name(name)}: layers sets it too, give one of them.")
        _warn_of_unread()
        try:
            return cls(**given)
        except ValidationError as error:
            raise SettingsError(_sentence(error)) from None

    def require(self, *names: str) -> None:
        """Refuse settings that lack one of these parameters, by its name."""
        for name in names:
            if getattr(self, name) is None:
                raise SettingsError(
                    f"{env_name(name)} is not set: {_describe(Settings.model_fields[name])}"
                )

    def export_devices(self) -> None:
        """Set CUDA_VISIBLE_DEVICES for a job, before CUDA is loaded (`environment_kept`)."""
        if self.cluster == "cuda":  # each worker sets its own
            return
        is_given = "cuda_visible_devices" in self.model_fields_set
        if is_given or "CUDA_VISIBLE_DEVICES" not in os.environ:  # an empty value hides all GPUs
            os.environ["CUDA_VISIBLE_DEVICES"] = self.cuda_visible_devices

    def export_token(self) -> None:
        """Set HF_TOKEN for huggingface_hub, because no graph and no log may hold the token."""
        if self.hf_token is not None:
            os.environ["HF_TOKEN"] = self.hf_token.get_secret_value()

    @property
    def layers(self) -> tuple[int, int] | None:
        """First layer (inclusive) and last (exclusive), or None where the model decides."""
        if self.start_layer is None or self.end_layer is None:
            return None
        return self.start_layer, self.end_layer

    @property
    def is_reversed(self) -> bool:
        """Whether the layers are read from the last to the first."""
        return self.force_reverse or self.direction == "reverse"

    def each_way(self) -> list[Settings]:
        """Return the settings of each direction; those of both differ in ``force_reverse``."""
        if self.direction != "both":
            return [self]
        return [self.model_copy(update={"force_reverse": turned}) for turned in (False, True)]

    @model_validator(mode="before")
    @classmethod
    def _split_layers(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "layers" not in given:
            return given
        rest = {k: v for k, v in given.items() if k != "layers"}
        if given["layers"] is not None:
            rest["start_layer"], rest["end_layer"] = layer_range(given["layers"])
        return rest

    @model_validator(mode="after")
    def _part_in_range(self) -> Settings:
        if self.part_id >= self.num_parts:
            raise ValueError(
                f"PART_ID ({self.part_id}) must be less than NUM_PARTS ({self.num_parts})"
            )
        return self

    @model_validator(mode="after")
    def _one_direction(self) -> Settings:
        if self.force_reverse and self.direction in ("forward", "both"):
            raise ValueError(
                f"FORCE_REVERSE is set and DIRECTION is {self.direction}: give one of them"
            )
        return self

    @model_validator(mode="after")
    def _layers_in_order(self) -> Settings:
        if (self.start_layer is None) != (self.end_layer is None):
            missing = "END_LAYER" if self.end_layer is None else "START_LAYER"
            raise ValueError(f"{missing} is not set: give both ends of the layer range or neither")
        if self.layers:
            _in_order(*self.layers)
        return self

    @field_validator("roi_xyxy", mode="before")
    @classmethod
    def _four_numbers(cls, value: Any) -> Any:
        numbers = value.split(",") if isinstance(value, str) else value
        if numbers is None:
            return None
        try:
            x0, y0, x1, y1 = (int(number) for number in numbers)
        except (ValueError, TypeError, OverflowError):
            raise ValueError("must be four whole numbers x0,y0,x1,y1") from None
        if not (0 <= x0 < x1 and 0 <= y0 < y1):
            raise ValueError("must have 0 <= x0 < x1 and 0 <= y0 < y1")
        return x0, y0, x1, y1

    @field_validator("cluster")
    @classmethod
    def _known_or_an_address(cls, value: str) -> str:
        if not re.fullmatch(r"threads|local|cuda|kubernetes|(tcp|tls|ucx|ucxx)://.+", value):
            raise ValueError(
                "must be threads, local, cuda, kubernetes, or the address of a scheduler, such as "
                "tcp://host:8786"
            )
        return value

    @field_validator("z_downsample_mean_factor", mode="before")
    @classmethod
    def _whole_number(cls, value: Any) -> Any:
        return int(value) if isinstance(value, str) and value.isdigit() else value

    @field_validator(
        "s3_path", "catalogue", "model", "surface_volume_zarr", "mask_path", "output_path",
        "zarr_output_dir", "result_file", "grid", "report", "cluster_spec", mode="before",
    )  # fmt: skip
    @classmethod
    def _as_text(cls, value: Any) -> Any:
        """Turn paths into text without a slash at the end; refuse a URI that names no bucket."""
        text = os.fspath(value) if isinstance(value, os.PathLike) else value
        if not isinstance(text, str):
            return text
        if found := _NAMELESS.match(text):  # as of an empty variable; would be a local folder `s3:`
            what = "bucket" if found[0].startswith("s3") else "place"
            raise ValueError(f"must name a {what} after {found[0].partition(':')[0]}://")
        return text.rstrip("/") or "/"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        *_: Any,
        **__: Any,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Read given values, then the environment; no ``.env`` files and no secrets' files.

        A blank variable is one that was not given, because an Argo parameter may be left empty.
        """
        read = {*_VARIABLES, "DASK_SCHEDULER_ADDRESS"}  # not TILE, though it is a field's name
        if isinstance(env_settings, EnvSettingsSource):
            env_settings.env_vars = {
                name: value
                for name, value in env_settings.env_vars.items()
                if name.upper() in read and not is_blank(value)
            }
        return init_settings, env_settings


def parameters() -> Iterator[tuple[str, str, FieldInfo]]:
    """Yield each parameter as (Python keyword, environment variable, pydantic field)."""
    for name, field in Settings.model_fields.items():
        yield name, env_name(name), field


def with_parameters(function: F) -> F:
    """Give a function that passes ``**options`` to `Settings.of` the signature of all parameters.

    Jupyter completes and shows them. The function's own parameters come first.
    """
    kind = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in inspect.signature(function).parameters.values() if p.kind != p.VAR_KEYWORD]
    options = {**Settings.model_fields, "layers": LAYERS}
    keywords = [
        inspect.Parameter(name, kind, default=field.default, annotation=field.annotation)
        for name, field in options.items()
        if name not in {p.name for p in own}
    ]
    vars(function)["__signature__"] = inspect.Signature(own + keywords)
    return function


def env_name(name: str) -> str:
    """Return the environment variable of a parameter: ``TILE_SIZE`` for ``tile``."""
    alias = Settings.model_fields[name].validation_alias
    return str(alias.choices[-1] if isinstance(alias, AliasChoices) else name).upper()


_VARIABLES = tuple(variable for _, variable, _ in parameters())


@cache  # once in a process
def _warn_of(name: str, meant: str) -> None:
    log.warning("The variable %s is set and not read: was %s meant?", name, meant)


def _warn_of_unread() -> None:
    """Warn of variables that are not read and look like one of ours."""
    for name, value in os.environ.items():
        if value and (meant := _meant(name.upper())):
            _warn_of(name, meant)


@cache
def _meant(name: str) -> str | None:
    """Return the variable of ours that another one was probably to be; None for ordinary ones.

    ``INKDASK_TILE_SIZE``, ``TILE`` without its last word, ``TILESIZE`` with one letter missing,
    added, changed, or swapped with the next. COMPILER is a variable of many builds.
    """
    word = name.removeprefix("INKDASK_")
    if name in (*_VARIABLES, "COMPILER"):
        return None
    for ours in _VARIABLES:
        is_start = len(word) > 2 and word == ours.rpartition("_")[0]
        if is_start or (word == ours != name) or (len(ours) > 5 and _is_one_edit(word, ours)):
            return ours
    return None


def _is_one_edit(word: str, other: str) -> bool:
    """Whether two words differ by one letter, or by two neighbours that are swapped."""
    for _ in range(2):  # cut off what they have in common, at the start and then at the end
        alike = takewhile(lambda pair: pair[0] == pair[1], zip(word, other, strict=False))
        start = len([*alike])
        word, other = word[start:][::-1], other[start:][::-1]
    is_swapped = len(word) == 2 and word == other[::-1]
    return max(len(word), len(other)) < 2 or is_swapped


def _describe(field: FieldInfo) -> str:
    text = (field.description or "").replace("Required.", "").strip()
    return text[0].lower() + text[1:] if text else ""


def _sentence(error: ValidationError) -> str:
    """Return a sentence with the first wrong value and its variable."""
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    message = first["msg"].removeprefix("Value error, ")
    if not name:
        return message[0].upper() + message[1:] + "."
    if first["type"] == "extra_forbidden":
        return f"There is no parameter {name!r}."
    known = name in Settings.model_fields
    variable = env_name(name) if known else name.upper()
    got = "" if variable == "HF_TOKEN" else f", but is {first['input']!r}"
    return f"{variable}: {message[0].lower() + message[1:]}{got}."


def markdown_table() -> str:
    """Return the table of the README, which ``python -m inkdask.settings`` prints."""
    rows = ["| Environment | Command line | Python | Default | Meaning |", "|---|---|---|---|---|"]
    for name, variable, field in parameters():
        option = "`S3_PATH`" if name == "s3_path" else f"`--{name.replace('_', '-')}`"
        default = "" if field.default is None else f"`{field.default}`"
        rows.append(f"| `{variable}` | {option} | `{name}` | {default} | {field.description} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(markdown_table())
