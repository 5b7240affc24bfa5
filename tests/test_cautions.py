"""Test warnings before the work: each for a segment that deserves it, and for one that does not."""

import json
import logging
from functools import cache

import numpy as np
import pytest
import tifffile
import zarr

import inkdask
from inkdask import cli, samples, storage
from inkdask.cautions import cautions
from inkdask.demo import synthetic
from inkdask.models.registry import known
from inkdask.samples import Samples, sample
from inkdask.segment import open_segment
from inkdask.settings import Settings
from tests.files import write_layers
from tests.oracle import depth_slope

pytestmark = pytest.mark.usefixtures("own_environment")

DEPTH, HEIGHT, WIDTH = 60, 400, 520
MIDDLE, OFF_SHEET = "17:43", "34:60"


@cache
def noise(depth, width):
    """Noise of a scan, float32 (z, y, x)."""
    values = np.random.default_rng(5).standard_normal((depth, HEIGHT, width), np.float32)
    return np.multiply(values, 20, out=values)


def volume(at=29.5, depth=DEPTH, width=WIDTH):
    """Make uint16 (z, y, x) of noise, with a sheet that is brightest at a layer; None: no sheet."""
    light = np.full(depth, 120.0) if at is None else np.arange(depth) - at
    light = light if at is None else 60 + 100 * np.exp(-((light / 4) ** 2))
    light = light[:, None, None].astype(np.float32)
    return (np.clip(light + noise(depth, width), 1, 255) * 256).astype(np.uint16)


def write(folder, layers, kind="tiles"):
    """Write a segment, as TIFFs of tiles or strips, or as a zarr of chunks over all layers."""
    if kind == "zarr":
        zarr.create_array(str(folder), data=layers, chunks=(len(layers), 64, 64))
    else:
        layout = {"tile": (64, 64)} if kind == "tiles" else {"rowsperstrip": 16}
        write_layers(folder / "layers", layers, compression="zstd", **layout)
    return folder


def told(capsys, segment, *words, layers=MIDDLE):
    """Warnings of `inkdask check --json` by kind, with the direction said unless in ``words``."""
    words = words or ("--direction", "forward")
    common = ("--model", "demo", "--layers", layers, "--json")
    capsys.readouterr()
    cli.main(["check", str(segment), *common, *words])
    return {it["kind"]: it for it in json.loads(capsys.readouterr().out)["warnings"]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Segment that is full, with its sheet in the middle."""
    return write(tmp_path_factory.mktemp("plain") / "seg", volume())


@pytest.mark.parametrize("kind", ["tiles", "strips", "zarr"])
def test_full_segment_with_its_sheet_in_the_window_warns_of_nothing(tmp_path, capsys, kind):
    assert told(capsys, write(tmp_path / "seg", volume(), kind)) == {}


@pytest.mark.slow
def test_demo_warns_of_nothing(tmp_path, capsys, caplog):
    synthetic.write_segment(tmp_path / "demo")
    assert told(capsys, tmp_path / "demo", layers="0:26") == {}
    assert not [it for it in caplog.records if it.levelno >= logging.WARNING]


# Depth.


@pytest.mark.parametrize("kind", ["tiles", "strips", "zarr"])
def test_window_off_the_sheet_is_told(tmp_path, capsys, kind):
    place = write(tmp_path / "seg", volume(at=20), kind)
    assert {"off-sheet", "off-centre"} == told(capsys, place, layers=OFF_SHEET).keys()
    it = told(capsys, place, layers=OFF_SHEET)["off-sheet"]
    assert f"Layers 34:60 lie off the sheet: {place} is brightest about layer 20" == it["sentence"]
    assert it["figures"]["brightest"] == 20
    assert len(it["figures"]["profile"]) == 12  # every fifth layer of 60
    assert told(capsys, place, layers="7:33") == {}  # although it is off the middle


@pytest.mark.parametrize("kind", ["tiles", "zarr"])
def test_window_off_the_middle_is_told_unless_the_sheet_is_there(tmp_path, capsys, kind):
    place = write(tmp_path / "seg", volume(at=29.5), kind)
    (it,) = told(capsys, place, layers="6:32").values()
    assert it["kind"] == "off-centre"
    assert it["figures"] == {"offset": -11.0, "layers": 60}
    assert "The middle of layers 6:32 is -11 layers from that of all 60" in it["sentence"]
    assert told(capsys, place, layers="12:38") == {}


def test_layers_without_a_sheet_are_told(tmp_path, capsys):
    place = write(tmp_path / "flat", volume(at=None))
    (it,) = told(capsys, place).values()
    assert it["kind"] == "flat"
    assert 0 < it["figures"]["relief"] < 0.03
    # 60 layers of 2.4 um can lie inside of one sheet, 60 of 7.91 um cannot.
    few = ("--direction", "forward", "--pixel-resolution-um")
    assert told(capsys, place, *few, "2.4") == {}
    assert told(capsys, place, *few, "7.91").keys() == {"flat"}


@pytest.mark.parametrize("kind", ["tiles", "zarr"])
def test_equal_layers_are_told(tmp_path, capsys, kind):
    one = np.repeat(volume()[:1], DEPTH, axis=0)
    place = write(tmp_path / "seg", one, kind)
    (it,) = told(capsys, place).values()
    assert it["kind"] == "equal"
    assert f"{place}: all layers are equal in" in it["sentence"]
    one[20, ::7, ::5] += 256  # another layer, which few pixels show
    assert "equal" not in told(capsys, write(tmp_path / "other", one, kind))


# Values.


def test_empty_segment_is_told(tmp_path, capsys):
    layers = volume()
    layers[:, :, WIDTH // 4 :] = 0
    (it,) = told(capsys, write(tmp_path / "mostly", layers)).values()
    assert it["kind"] == "empty"
    assert it["figures"]["empty"] == pytest.approx(0.75, abs=0.1)
    layers = volume()
    layers[:, :, WIDTH // 2 :] = 0
    assert told(capsys, write(tmp_path / "half", layers)) == {}
    layers[:] = 0
    assert told(capsys, write(tmp_path / "all", layers)).keys() == {"empty"}


def test_values_of_few_bits_are_told(tmp_path, capsys, plain):
    (it,) = told(capsys, write(tmp_path / "seg", volume() >> 4)).values()
    assert it["kind"] == "few-bits"
    assert it["figures"]["bits"] == 12
    assert told(capsys, plain) == {}


# The model.


def of_model(segment, key, **options):
    """Kinds of warnings that concern a model and its window."""
    spec = known()[key]
    settings = Settings.of(direction="forward", **options)
    found = cautions(open_segment(segment), settings, Samples(), spec, spec.tile)
    return {it.kind: it for it in found}


def test_other_pixel_size_is_told(plain):
    it = of_model(plain, "ink-9um", pixel_resolution_um=2.4)["pixel-size"]
    assert it.sentence.startswith("Pixels of 2.4 um: model ink-9um was trained at 9.6 um, and")
    assert it.figures == {"pixel_um": 2.4, "model_um": 9.6}
    assert of_model(plain, "ink-9um", pixel_resolution_um=9.5) == {}
    assert of_model(plain, "ink-9um") == {}  # of unknown size


def test_window_larger_than_a_letter_is_told(plain):
    found = of_model(plain, "resnet50-3um", pixel_resolution_um=45.532)
    assert found.keys() == {"large-window"}
    assert found["large-window"].figures == {"window_mm": 256 * 45.532 / 1e3, "letter_mm": 3.0}
    assert "window is 11.7 mm wide, and a letter is about 3 mm high" in (
        found["large-window"].sentence
    )
    assert of_model(plain, "resnet50-3um", pixel_resolution_um=3.24) == {}


# Direction.


def test_direction_is_told_where_nobody_named_it(plain, capsys):
    (it,) = told(capsys, plain, "--stride", "32").values()
    assert it["kind"] == "direction"
    assert f"{plain} does not say which way its layers run" in it["sentence"]
    for said in (("--direction", "both"), ("--direction", "reverse"), ("--force-reverse",)):
        assert told(capsys, plain, *said) == {}


# Where it is said.


def test_check_info_and_run_say_the_same_once(tmp_path, caplog, capsys):
    place = write(tmp_path / "seg", volume(at=20, width=200))
    words = [str(place), "--model", "demo", "--layers", OFF_SHEET]
    out = ["--output-path", str(tmp_path), "--stride", "64"]
    lines = []
    for command in (["check", *words, *out], ["info", *words], ["run", *words, *out]):
        caplog.clear()
        with caplog.at_level(logging.INFO, "inkdask"):
            cli.main(command)
        begin = ("Layers 34:60", "The middle of", f"{place} does not say")
        lines.append([message for message in caplog.messages if message.startswith(begin)])
        assert len(lines[-1]) == 3
        assert all("\n" not in line for line in lines[-1])
    assert lines[0] == lines[1] == lines[2]


def test_both_directions_are_sampled_once(plain, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "inkdask.cautions.sample", lambda segment: asked.append(segment) or sample(segment)
    )
    inkdask.run(
        plain, model=depth_slope, layers=(26, 32), direction="both", output_path=tmp_path,
        roi_xyxy=(0, 0, 128, 128),
    )  # fmt: skip
    assert len(asked) == 1


# What the samples cost.


@pytest.mark.parametrize("kind", ["tiles", "strips", "zarr"])
@pytest.mark.parametrize("layers", [None, (17, 43)])
def test_samples_cost_a_small_share_of_the_layers(tmp_path, kind, layers):
    wide = volume(width=2 * WIDTH)
    segment = open_segment(write(tmp_path / "seg", wide, kind), layers)
    before = storage.counters()
    found = sample(segment)
    read = storage.counters() - before
    assert 2 <= len(found.pieces) <= samples.PIECES
    assert 1 <= len(found.columns) <= samples.COLUMNS
    assert found.numbers == tuple(range(0, DEPTH, 5))
    assert {column.shape[0] for column in found.columns} == {12}
    assert read.bytes_read <= 0.06 * wide.nbytes


@pytest.mark.slow
def test_samples_of_a_bucket_are_a_few_chunks(s3):
    layers = (volume(width=2048) >> 8).astype(np.uint8)
    with storage.explained(s3):
        zarr.create_array(
            storage.zarr_store(f"{s3}/seg.zarr"), data=layers, chunks=(DEPTH, 64, 64),
            compressors=None,
        )  # fmt: skip
    segment = open_segment(f"{s3}/seg.zarr", (17, 43))
    before = storage.counters()
    found = sample(segment)
    read = storage.counters() - before
    chunk = DEPTH * 64 * 64
    assert read.bytes_read <= (len(found.pieces) + len(found.columns)) * chunk + 10_000
    assert len(found.pieces) + len(found.columns) <= 12
    assert read.bytes_read <= 0.1 * layers.nbytes


def test_thin_chunks_are_read_in_part(tmp_path):
    layers = (volume() >> 8).astype(np.uint8)
    zarr.create_array(str(tmp_path / "thin"), data=layers, chunks=(1, 128, 128), compressors=None)
    source = open_segment(tmp_path / "thin").source
    part = source.take(slice(None, None, 5))
    before = storage.counters()
    got = part.block(slice(0, 128), slice(0, 128)).read()
    assert storage.counters().bytes_read - before.bytes_read <= 12 * 128 * 128 + 2_000
    np.testing.assert_array_equal(got, layers[::5, :128, :128])
    assert part.cost(slice(0, 128), slice(0, 128)) == 12 * 128 * 128
    back = source.take(slice(50, 10, -5)).block(slice(0, 128), slice(0, 128)).read()
    np.testing.assert_array_equal(back, layers[50:10:-5, :128, :128])


def test_other_files_beyond_the_window_are_no_part_of_the_samples(tmp_path):
    place = write(tmp_path / "seg", volume(depth=20))
    for number in range(0, 8):
        (place / "layers" / f"{number:02d}.tif").unlink()
    write_layers(place / "layers", np.full((8, 30, 30), 9, np.uint16))
    segment = open_segment(place, (8, 20))
    assert len(segment.found) == 20
    assert sample(segment).numbers == tuple(range(8, 20, 2))
    write_layers(place / "layers", np.full((20, 30, 30), 9, np.uint16))
    assert not sample(segment).columns  # and the job says what changed


def test_pages_of_a_stack_are_sampled(tmp_path):
    tifffile.imwrite(tmp_path / "stack.tif", volume(at=20), tile=(64, 64), photometric="minisblack")
    found = sample(open_segment(tmp_path / "stack.tif", OFF_SHEET))
    assert max(found.profile, key=found.profile.get) == 20


def test_pictures_of_uint8_are_not_decoded_for_samples(tmp_path):
    from PIL import Image

    (tmp_path / "png").mkdir()
    for number in range(3):
        Image.fromarray(np.full((64, 64), 9, np.uint8)).save(tmp_path / "png" / f"{number:02d}.png")
    found = sample(open_segment(tmp_path / "png"))
    assert found.empty is None
    assert not found.profile
