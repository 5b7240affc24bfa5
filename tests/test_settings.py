"""One model for the environment, the command line, Python and the README."""

import inspect
import os
from pathlib import Path

import pytest
from click.testing import CliRunner
from IPython.core.completer import IPCompleter, provisionalcompleter

from inkdask import settings
from inkdask.cli import inkdask_
from inkdask.errors import SettingsError
from inkdask.settings import (
    Settings,
    env_name,
    markdown_table,
    parameters,
    with_parameters,
)
from tests.files import own_messages


@pytest.fixture(autouse=True)
def no_environment(monkeypatch):
    for name, variable, _ in parameters():
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


# Required, then optional, then those of later versions of the reference system.
CONTRACT = (
    *("MODEL", "S3_PATH", "START_LAYER", "END_LAYER"),
    *("CUDA_VISIBLE_DEVICES", "HF_TOKEN", "TILE_SIZE", "STRIDE", "BATCH_SIZE", "MODEL_TYPE"),
    *("ZARR_OUTPUT_DIR", "COMPILE", "COMPILE_MODE", "CHUNK_SIZE", "RESULT_FILE"),
    *("OUTPUT_PATH", "FORCE_REVERSE", "BLEND_MODE", "GAUSSIAN_SIGMA", "MODEL_IN_CHANS"),
    *("STEP", "NUM_PARTS", "PART_ID", "USE_ZARR_COMPRESSION"),
    *("SURFACE_VOLUME_ZARR", "ROI_XYXY", "Z_DOWNSAMPLE_MEAN_FACTOR", "MASK_PATH"),
)


@pytest.mark.parametrize("variable", CONTRACT)
def test_contract_variable_is_a_parameter(variable):
    assert variable in {variable for _, variable, _ in parameters()}


def test_parameters_are_described():
    for name, _, field in parameters():
        assert field.description, name
        assert field.description.endswith("."), name


def test_parameters_are_options_with_their_variable():
    text = CliRunner().invoke(inkdask_, ["run", "--help"]).output.replace("\n", " ")
    for name, variable, _ in parameters():
        if name != "s3_path":
            assert f"--{name.replace('_', '-')}" in text
            assert f"[{variable}]" in text


def test_given_value_wins_over_environment_and_default(monkeypatch):
    assert Settings.of().chunk_size is None
    monkeypatch.setenv("CHUNK_SIZE", "512")
    assert Settings.of().chunk_size == 512
    assert Settings.of(chunk_size=256).chunk_size == 256


def test_given_cluster_wins_over_address_of_the_environment(monkeypatch):
    monkeypatch.setenv("SCHEDULER_ADDRESS", "tcp://scheduler:8786")
    assert Settings.of().scheduler_address == "tcp://scheduler:8786"
    assert Settings.of(cluster="local").scheduler_address is None
    assert Settings.of(cluster="local", scheduler_address="tcp://b:1").scheduler_address


def test_environment_values_are_typed(monkeypatch):
    for variable, value in {
        "TILE_SIZE": "128", "COMPILE": "0", "FORCE_REVERSE": "true", "START_LAYER": "03",
        "END_LAYER": "29", "GAUSSIAN_SIGMA": "2.5", "S3_PATH": "s3://bucket/segment/",
        "ROI_XYXY": "1, 2,30,40", "Z_DOWNSAMPLE_MEAN_FACTOR": "2",
    }.items():  # fmt: skip
        monkeypatch.setenv(variable, value)
    settings = Settings.of()
    assert settings.tile == 128
    assert settings.compile is False
    assert settings.force_reverse is True
    assert settings.layers == (3, 29)
    assert settings.gaussian_sigma == 2.5
    assert settings.roi_xyxy == (1, 2, 30, 40)
    assert settings.z_downsample_mean_factor == 2
    assert settings.s3_path == "s3://bucket/segment"


def test_empty_variable_is_ignored(monkeypatch):
    monkeypatch.setenv("BATCH_SIZE", "")
    assert Settings.of().batch_size is None


@pytest.mark.parametrize(
    ("before", "given", "after"),
    [
        (None, {}, "0"),
        ("2,3", {}, "2,3"),
        ("", {}, ""),  # hides all GPUs
        ("", {"cuda_visible_devices": "1"}, "1"),
        ("2,3", {"cuda_visible_devices": ""}, ""),
        ("2,3", {"cuda_visible_devices": "1", "cluster": "cuda"}, "2,3"),
    ],
)
def test_export_devices_sets_the_variable_of_cuda(monkeypatch, before, given, after):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # because delenv restores only what is set
    if before is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", before)
    Settings.of(**given).export_devices()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == after


def test_layers_and_start_layer_together_are_refused():
    with pytest.raises(SettingsError, match="START_LAYER: layers sets it too"):
        Settings.of(layers="0:26", start_layer=3)


def test_unknown_cluster_is_refused():
    with pytest.raises(
        SettingsError, match=r"^CLUSTER: must be threads, .* address .* is 'foo'\.$"
    ):
        Settings.of(cluster="foo")


@pytest.mark.parametrize("layers", [(3, 29), "3:29", [3, 29]])
def test_layers_set_both_ends(layers):
    assert Settings.of(layers=layers).layers == (3, 29)


def test_given_layers_win_over_both_variables(monkeypatch):
    monkeypatch.setenv("START_LAYER", "1")
    monkeypatch.setenv("END_LAYER", "2")
    assert Settings.of(layers="3:29").layers == (3, 29)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"layers": "3"}, "START:END"),
        ({"layers": "a:b"}, "START:END"),
        ({"start_layer": 3}, "END_LAYER"),
        ({"end_layer": 3}, "START_LAYER"),
        ({"layers": (5, 5)}, "START_LAYER"),
        ({"layers": (6, 5)}, "START_LAYER"),
        ({"tile": 0}, "TILE_SIZE"),
        ({"stride": "x"}, "STRIDE"),
        ({"blend_mode": "box"}, "BLEND_MODE"),
        ({"model_type": "unet"}, "MODEL_TYPE"),
        ({"precision": "int4"}, "PRECISION"),
        ({"tiel": 64}, "tiel"),
        ({"part_id": 2, "num_parts": 2}, "PART_ID"),
        ({"roi_xyxy": "1,2,3"}, "ROI_XYXY"),
        ({"roi_xyxy": (0, 0, float("inf"), 9)}, "ROI_XYXY"),
        ({"roi_xyxy": "3,0,3,9"}, "ROI_XYXY"),
        ({"z_downsample_mean_factor": "3"}, "Z_DOWNSAMPLE_MEAN_FACTOR"),
    ],
)
def test_bad_value_is_refused_with_its_variable(given, says):
    with pytest.raises(SettingsError) as caught:
        Settings.of(**given)
    sentence = str(caught.value)
    assert says in sentence
    assert "\n" not in sentence
    assert sentence.endswith(".")
    assert caught.value.exit_code == 2


def test_require_names_the_missing_parameter():
    with pytest.raises(SettingsError, match=r"^MODEL is not set"):
        Settings.of().require("model")


def test_token_is_hidden_in_repr_and_dump():
    settings = Settings.of(hf_token="hf_secret")
    assert "hf_secret" not in repr(settings)
    assert "hf_secret" not in str(settings.model_dump())


def test_env_name_follows_the_contract():
    assert env_name("tile") == "TILE_SIZE"
    assert env_name("s3_path") == "S3_PATH"


def test_readme_table_equals_the_parameters():
    readme = Path(__file__).parent.parent.joinpath("README.md").read_text()
    command = "python -m inkdask.settings"
    inside = readme.split(f"<!-- {command} -->\n")[1].split(f"<!-- end of {command} -->")[0]
    assert inside.strip() == markdown_table(), f"paste what `{command}` prints"


@pytest.mark.parametrize("roi", ["-1,0,5,5", "0,-1,5,5", "0,5,5,5", "5,0,5,5"])
def test_empty_or_negative_region_is_refused(roi):
    with pytest.raises(SettingsError, match="ROI_XYXY"):
        Settings.of(roi_xyxy=roi)


def test_token_is_in_no_message_and_is_exported(monkeypatch):
    with pytest.raises(SettingsError) as caught:
        Settings.of(hf_token=["hf_marked"])
    assert "hf_marked" not in str(caught.value)
    monkeypatch.setenv("HF_TOKEN", "")
    Settings.of(hf_token="hf_secret").export_token()
    assert os.environ["HF_TOKEN"] == "hf_secret"


@with_parameters
def job(source, model="demo", **options):
    """Take options as the public functions do."""
    return source, model, options


def test_signature_has_own_parameters_first_and_every_setting_once():
    signature = inspect.signature(job)
    assert [*signature.parameters][:2] == ["source", "model"]
    assert {*signature.parameters} == {*Settings.model_fields, "source", "layers"}
    assert signature.parameters["model"].default == "demo"
    assert signature.parameters["stride"].default is None
    assert signature.parameters["compile"].default is True
    assert signature.bind(3, stride=8, layers="0:5").kwargs == {"stride": 8, "layers": "0:5"}
    assert job(3, stride=8) == (3, "demo", {"stride": 8})


@pytest.mark.parametrize("jedi", [True, False])
@pytest.mark.parametrize(
    ("typed", "offered"),
    [("job(st", {"start_layer=", "step=", "stride="}), ("job(3, lay", {"layers="})],
)
def test_completer_of_jupyter_offers_parameters(
    monkeypatch, tmp_path_factory, typed, offered, jedi
):
    # Jedi finds nothing where another process is just writing a file of the cache that they share.
    cache = tmp_path_factory.getbasetemp() / "jedi"
    monkeypatch.setattr("jedi.settings.cache_directory", str(cache))
    completer = IPCompleter(
        namespace={"job": job},
        use_jedi=jedi,
        disable_matchers=["IPCompleter.magic_matcher"],  # needs a shell
    )
    with provisionalcompleter():
        found = {completion.text for completion in completer.completions(typed, len(typed))}
    assert offered <= found


@pytest.mark.parametrize(
    "name", ["output_path", "zarr_output_dir", "s3_path", "mask_path", "layers"]
)
@pytest.mark.parametrize("blank", ["", " ", "\t\n"])
def test_blank_value_is_one_that_was_not_given(monkeypatch, name, blank):
    assert Settings.of(**{name: blank}) == Settings.of()
    monkeypatch.setenv(env_name(name) if name != "layers" else "START_LAYER", blank)
    assert Settings.of().model_fields_set == set()


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("s3://", "bucket after s3"), ("s3:///", "bucket after s3"),
        ("s3:///predictions", "bucket after s3"), (Path("s3://bucket/x"), "bucket after s3"),
        ("s3:", "bucket after s3"), ("https://", "place after https"),
        ("https:///x", "place after https"), ("file://", "place after file"),
        ("gs://", "place after gs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("name", ["output_path", "zarr_output_dir", "result_file", "s3_path"])
def test_uri_that_names_no_bucket_is_refused(monkeypatch, name, value, what):
    sentence = rf"^{env_name(name)}: must name a {what}://, but is .*\.$"
    with pytest.raises(SettingsError, match=sentence):
        Settings.of(**{name: value})
    monkeypatch.setenv(env_name(name), str(value))
    with pytest.raises(SettingsError, match=sentence):
        Settings.of()


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("file:///x/", "file:///x"), ("s3://b/", "s3://b"), ("s3://b//x", "s3://b//x"),
        ("https://host/x/", "https://host/x"), ("/", "/"), ("s3:x", "s3:x"), (Path("/x"), "/x"),
        (Path("a/s3:"), "a/s3:"),
    ],
)  # fmt: skip
def test_place_is_read_without_a_slash_at_its_end(value, read):
    assert Settings.of(output_path=value).output_path == read


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("TILE", "TILE_SIZE"), ("tile", "TILE_SIZE"), ("TILESIZE", "TILE_SIZE"),
        ("TILE_SZIE", "TILE_SIZE"), ("STRIDES", "STRIDE"), ("STAT_LAYER", "START_LAYER"),
        ("INKDASK_TILE_SIZE", "TILE_SIZE"), ("INKDASK_MODEL", "MODEL"),
        ("INKDASK_BATCH", "BATCH_SIZE"), ("S3PATH", "S3_PATH"), ("ROI", "ROI_XYXY"),
        ("ZARR_OUTPUT", "ZARR_OUTPUT_DIR"), ("CUDA_VISIBLE_DEVICE", "CUDA_VISIBLE_DEVICES"),
    ],
)  # fmt: skip
def test_variable_that_looks_like_ours_is_named_once_and_not_read(monkeypatch, caplog, name, meant):
    settings._warn_of.cache_clear()
    monkeypatch.setenv(name, "3")
    assert Settings.of() == Settings.of()
    assert Settings.of().tile is None
    assert own_messages(caplog) == [f"The variable {name} is set and not read: was {meant} meant?"]


def test_ordinary_variables_are_not_named(monkeypatch, caplog):
    settings._warn_of.cache_clear()
    ordinary = [
        *("PATH", "HOME", "MODE", "COMPILER", "CLI", "CUDA_HOME", "CUDA_PATH", "CUDA_VERSION"),
        *("HF_HOME", "HF_HUB_OFFLINE", "GH_TOKEN", "OUTPUT_DIR", "S3", "STEPS", "GRIDS", "Z"),
        *("INKDASK_IMAGE", "INKDASK_RUN_IMAGE", "INKDASK_SERVICE_HOST", "INKDASK_PORT", "CHUNKS"),
        *("SCHEDULER_PORT", "DASK_SCHEDULER_ADDRESS", "AWS_PROFILE", "MODELS", "IMPORT", "PARTS"),
        *("TILE_SIZE", "MODEL_TYPE", "LAYERS", "OMP_NUM_THREADS", "NUM_THREADS", "MODEL_DIR"),
    ]
    for name in ordinary:
        monkeypatch.setenv(name, "tcp://a:1" if name == "DASK_SCHEDULER_ADDRESS" else "timesformer")
    monkeypatch.setenv("TILE_SIZE", "64")
    monkeypatch.setenv("TILE", "")
    Settings.of()
    assert own_messages(caplog) == []


def test_empty_devices_are_given():
    assert Settings.of(cuda_visible_devices="").cuda_visible_devices == ""


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("divisor", "inf"), ("clip", "nan"), ("gaussian_sigma", "inf"), ("chunk_size", "1e30"),
        ("max_workers", "1000000000"), ("num_parts", "1e30"), ("end_layer", "999999999"),
        ("pixel_resolution_um", "7.91e-6"), ("pixel_resolution_um", "inf"),
        ("scale_bar_length_um", "inf"), ("batch_size", "10000000000"),
    ],
)  # fmt: skip
def test_value_that_can_mean_nothing_is_one_sentence(name, value):
    with pytest.raises(SettingsError, match=rf"^{env_name(name)}: [^\n]*\.$"):
        Settings.of(**{name: value, **({"start_layer": 0} if name == "end_layer" else {})})


def test_endless_value_makes_no_endless_sentence():
    with pytest.raises(
        SettingsError, match=r"^BLEND_MODE: .*, but is 'x+ \[\.\.\.\] x+'\.$"
    ) as caught:
        Settings.of(blend_mode="x" * 100_000)
    assert len(str(caught.value)) < 1100
