"""Test sweeps: variants that read once, cost nothing twice, and a sheet to look at."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inkdask
from inkdask import cli, engine, storage
from inkdask.controls.windows import full_windows
from inkdask.demo import synthetic
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import digest
from inkdask.pictures.picture import open_picture
from inkdask.segment import open_segment
from tests.files import read_picture, write_layers, write_segment
from tests.jobs import network
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_tiles")

LAYERS, HEIGHT, WIDTH = 12, 230, 300
ROI = (40, 30, 260, 200)


@pytest.fixture
def segment(tmp_path):
    volume = papyrus((LAYERS, HEIGHT, WIDTH), holes=False)
    write_layers(tmp_path / "segment/layers", volume, tile=(64, 64))
    return str(tmp_path / "segment")


def sweep(segment, **options):
    common = {"model": network, "model_in_chans": 4, "offsets": [-4, -2, 0, 2, 4], "roi_xyxy": ROI}
    return inkdask.sweep(segment, **{**common, **options})


@pytest.mark.slow
def test_ten_variants_read_each_byte_once_and_cost_nothing_again(segment, monkeypatch):
    before = storage.counters()
    opened = inkdask.open_segment(segment)
    headers = storage.counters().bytes_read - before.bytes_read
    read = []
    monkeypatch.setattr("inkdask.sharing.read_or_fail", counted(read))
    result = sweep(segment)
    assert len(result.variants) == 10
    assert headers > 0
    # The union of all tiles, of every layer: each piece of the files in one block, read once.
    assert len(read) == len(set(read)) > 0
    ran = storage.counters()
    assert all(it.cost.tiles > 0 and it.cost.seconds > 0 for it in result.variants)
    again = sweep(segment)
    assert storage.counters().tiles == ran.tiles
    assert all(it.cost.tiles == 0 for it in again.variants)
    assert len(read) == len(set(read))
    assert {len(open_segment(segment).layers)} == {opened.shape[0]}
    assert "kept" in str(again)
    for one, other in zip(result.variants, again.variants, strict=True):
        np.testing.assert_array_equal(one.maps[0].compute(), other.maps[0].compute())


def counted(read):
    """Read as `read_or_fail` does, and note the place of each block."""

    def read_and_count(block):
        read.append(digest(repr(block)))
        return block.read()

    return read_and_count


@pytest.mark.slow
def test_bytes_of_a_sweep_are_those_of_its_columns(segment, monkeypatch):
    bytes_before = []
    real = engine.compute_each

    def noted(*arguments):
        bytes_before.append(storage.counters().bytes_read)
        account = real(*arguments)
        bytes_before.append(storage.counters().bytes_read)
        return account

    monkeypatch.setattr(engine, "compute_each", noted)
    sweep(segment, strides=[16, 32], model=[network, depth_slope])
    assert len(bytes_before) == 2
    whole = open_segment(segment)
    pixels = whole.source.cost(slice(32, 224), slice(32, 288))  # of all tiles that touch the region
    grown = bytes_before[1] - bytes_before[0]
    assert grown <= 1.05 * pixels + 100_000  # and marks of grids
    assert grown >= 0.9 * pixels


@pytest.mark.slow
def test_variant_is_the_picture_of_a_run_and_the_run_goes_on_from_it(segment):
    result = sweep(segment, offsets=[0, 2])
    it = next(v for v in result.variants if (v.offset, v.recipe.direction) == (2, "reverse"))
    assert it.recipe.layers == (9, 8, 7, 6)
    before = storage.counters().tiles
    options = {"model": network, "layers": (6, 10), "force_reverse": True, "roi_xyxy": ROI}
    picture = read_picture(inkdask.run(segment, **options))
    assert storage.counters().tiles == before
    np.testing.assert_array_equal(it.readings[0].grey, picture)


@pytest.mark.slow
def test_pictures_name_the_sweeps_that_have_them_among_their_variants(segment, capsys):
    """A picture that was there, and one that is made after the sweep; no other."""

    def named(uri):
        return open_picture(f"{uri.removesuffix('.png')}.zarr").provenance.sweeps

    before = inkdask.run(segment, model=network, layers=(4, 8))
    other = inkdask.run(segment, model=network, layers=(4, 8), direction="reverse")
    result = sweep(segment, offsets=[0, 2], direction="forward")
    (told,) = named(before)
    assert told == json.loads(Path(result.table).read_text())["digest"]
    assert named(other) == ()
    after = inkdask.run(segment, model=network, layers=(6, 10))
    assert named(after) == (told,)
    assert named(inkdask.run(segment, model=network, layers=(6, 10), stride=32)) == ()
    capsys.readouterr()
    cli.main(["info", before.removesuffix(".png") + ".zarr"])
    assert told in capsys.readouterr().out
    Path(result.table).write_text('{"variants": 3')  # a damaged one stops no job
    assert named(inkdask.run(segment, model=network, layers=(6, 10))) == ()


def test_grid_of_an_earlier_run_costs_a_sweep_nothing(segment):
    inkdask.run(segment, model=network, layers=(4, 8), roi_xyxy=ROI)
    left = Path(segment, "predictions", ".sweep.png.01234567.part")  # of a process long dead
    left.touch()
    os.utime(left, (1, 1))
    result = sweep(segment, offsets=[0, 2], direction="forward")
    assert [it.cost.tiles > 0 for it in result.variants] == [False, True]
    assert not left.exists()


@pytest.mark.slow
def test_sweep_of_the_demo_finds_depth_and_direction(tmp_path, capsys):
    """The one right variant of ten, with labels and without."""
    options = {"text": ("ΑΦΟΒ",), "height": 192, "width": 448, "layers": 58}
    synthetic.write_segment(tmp_path / "demo", **options)
    labels = str(tmp_path / "demo/truth.png")
    words = ["sweep", str(tmp_path / "demo"), "--model", "demo", "--roi-xyxy", "0,0,448,192"]
    words += ["--offsets", "-16,-8,0,8,16", "--strides", "32", "--direction", "both"]
    cli.main([*words, "--labels", labels, "--pixel-resolution-um", "7.91"])
    said = capsys.readouterr().out
    table = json.loads(Path(tmp_path, "demo/predictions/sweep.json").read_text())
    best = max(table["variants"], key=lambda it: it["auc"])
    assert (best["offset"], best["direction"], best["layers"]) == (0, "forward", [16, 42])
    assert best["auc"] >= 0.98
    for it in table["variants"]:
        if it["direction"] == "reverse" or abs(it["offset"]) == 16:
            assert it["auc"] < 0.70, it
    assert table["suggested"] == best["command"]
    assert best["command"] in said
    assert "--layers 16:42" in best["command"]
    with Image.open(table["sheet"]) as sheet:
        assert min(sheet.size) >= 1984  # A4
        assert json.loads(sheet.text["inkdask-sweep"])["digest"] == table["digest"]
        assert len(np.unique(np.asarray(sheet.convert("L")))) > 200
    cli.main(words)
    said = capsys.readouterr().out
    assert "Suggested, because its opinions agree best" in said
    assert best["command"] in said
    assert said.count("kept") == 10


def test_nothing_stands_out_for_a_network_that_sees_nothing(segment):
    result = sweep(segment, model=same_everywhere)
    assert result.best is None
    assert result.advice.startswith("Nothing stands out")
    assert json.loads(Path(result.table).read_text())["suggested"] is None


def same_everywhere(x):
    """Logits that do not depend on the layers: (b, 1, 4, 4)."""
    import torch

    steps = torch.linspace(-4, 4, 16).reshape(1, 1, 4, 4)
    return steps.expand(len(x), 1, 4, 4) + 0 * x.mean()


def test_coarser_stride_is_suggested_where_it_shows_the_same(segment):
    flat = sweep(segment, model=constant, strides=[16, 32], offsets=[0, 2], labels=None)
    assert flat.best is None
    from inkdask.controls.sweeps import _coarser

    fine = flat.variants[0]
    assert fine.recipe.stride == 16
    assert _coarser(fine, flat.variants).recipe.stride == 32


def constant(x):
    return 0 * x[:, :, 0, ::16, ::16] + 1


def test_offset_beyond_the_layers_is_refused_and_defaults_are_left_out(segment, tmp_path):
    with pytest.raises(SettingsError, match=r"Offset 5 needs layers 9 to 12, and .* has 0 to 11"):
        sweep(segment, offsets=[0, 5])
    for offsets in (None, []):
        result = sweep(segment, offsets=offsets)
        assert {it.offset for it in result.variants} == {0}
    write_layers(tmp_path / "few/layers", papyrus((5, HEIGHT, WIDTH)))
    with pytest.raises(SettingsError, match="Offset 0 needs layers -1 to 2"):
        sweep(tmp_path / "few", offsets=None, layers=(0, 2))
    with pytest.raises(SettingsError, match="DIRECTION: input should be 'forward'"):
        sweep(segment, direction="sideways")


def test_blank_options_of_a_sweep_are_not_given(segment, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SettingsError, match="^S3_PATH is not set"):
        sweep(" ")
    monkeypatch.setenv("S3_PATH", segment)
    result = sweep("", offsets=[0], direction="forward", labels=" ")
    assert (result.segment, result.variants[0].auc) == (segment, None)


def test_labels_of_another_size_are_named(segment, tmp_path):
    Image.new("L", (10, 10)).save(tmp_path / "labels.png")
    with pytest.raises(InkdaskError, match=r"The picture of labels .*labels\.png has 10 x 10"):
        sweep(segment, labels=tmp_path / "labels.png")


def test_windows_are_full_of_papyrus_and_apart(tmp_path):
    volume = papyrus((3, 900, 1300), holes=False)
    volume[:, :, :300] = 0
    volume[:, 500:] = 0
    place = str(write_segment(tmp_path / "big", volume))
    windows = full_windows(open_segment(place), side=192)
    assert len(windows) == 3
    for x0, y0, x1, y1 in windows:
        assert (x1 - x0, y1 - y0) == (192, 192)
        assert (volume[1, y0:y1, x0:x1] > 0).mean() > 0.95
    lefts = sorted(x0 for x0, *_ in windows)
    assert min(np.diff(lefts)) > 192
    small = open_segment(str(write_segment(tmp_path / "small", volume[:, 100:200, 400:480])))
    assert full_windows(small) == [(0, 0, 80, 100)]


def test_sweep_without_region_says_its_windows(segment, capsys, caplog):
    with caplog.at_level("INFO", "inkdask"):
        result = sweep(segment, roi_xyxy=None, offsets=[0], direction="forward")
    assert "windows that are full of papyrus are run, 0,0,300,230" in caplog.text
    assert result.windows == ((0, 0, 300, 230),)
    assert "0,0,300,230" in str(result)
    beyond = sweep(segment, roi_xyxy=(0, 0, 4000, 4000), offsets=[0], direction="forward")
    assert beyond.windows == result.windows
    assert "reaches beyond the segment, which has 300 x 230 pixels (x, y)" in caplog.text


def test_sweeps_of_two_segments_in_one_folder_are_both_kept(segment, tmp_path):
    write_segment(tmp_path / "other", papyrus((LAYERS, HEIGHT, WIDTH), seed=1, holes=False))
    shared = tmp_path / "out"
    options = {"offsets": [0], "direction": "forward", "output_path": shared}
    one, two = (sweep(str(tmp_path / name), **options) for name in ("segment", "other"))
    names = ["sweep_segment.png", "sweep_segment.json", "sweep_other.png", "sweep_other.json"]
    assert [one.sheet, one.table, two.sheet, two.table] == [str(shared / name) for name in names]
    for result in (one, two):
        told = json.loads(Path(result.table).read_text())
        assert (told["segment"], told["sheet"]) == (result.segment, result.sheet)
    made = {"model": network, "layers": (4, 8), "output_path": shared}
    for result in (one, two):  # a picture beside both names its own
        picture = inkdask.run(result.segment, **made).removesuffix(".png") + ".zarr"
        told = json.loads(Path(result.table).read_text())["digest"]
        assert open_picture(picture).provenance.sweeps == (told,)
    own = sweep(segment, **options | {"output_path": tmp_path / "results/segment/ink"})
    assert Path(own.sheet).name == "sweep.png"


def test_sweep_of_a_folder_of_layers_is_beside_the_pictures_of_its_segment(segment):
    result = sweep(f"{segment}/layers", offsets=[0], direction="forward")
    assert result.sheet == f"{segment}/predictions/sweep.png"
    picture = inkdask.run(f"{segment}/layers", model=network, layers=(4, 8))
    assert Path(picture).parent == Path(result.sheet).parent
