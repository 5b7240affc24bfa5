"""Test the spread of opinions: in Python, beside the picture, and over its papyrus."""

import dask.array as da
import numpy as np
import pytest

import inkdask
from inkdask import cli, storage
from inkdask.pictures.picture import open_picture
from tests.files import read_picture, write_segment
from tests.jobs import network
from tests.oracle import depth_slope, papyrus
from tests.test_blending import overlap_add, weights

pytestmark = pytest.mark.usefixtures("own_tiles")

SHAPE = (5, 330, 420)
OPTIONS = {"stride": 32, "chunk_size": 128}


@pytest.fixture
def segment(tmp_path):
    return str(write_segment(tmp_path / "segment", papyrus(SHAPE)))


def tiles_run():
    return storage.counters().tiles


def test_spread_of_a_prediction_equals_the_oracle_and_runs_what_a_slice_needs():
    ink = inkdask.predict(papyrus(SHAPE), model=network, roi_xyxy=(100, 60, 400, 300), **OPTIONS)
    assert isinstance(ink.spread, da.Array)
    start = tiles_run()
    part = ink.spread[:40, :50].compute()
    few = tiles_run() - start
    mean, spread, grid, reached = da.compute(ink.map, ink.spread, ink.grid, ink.reached)
    assert 3 * few < tiles_run() - start - few <= ink.tiling.tiles  # the pictures share tiles
    exact = overlap_add(grid, reached, ink.tiling, weights(64, "hann", 0.0, None))
    for got, expected in zip((mean, spread), exact, strict=True):
        np.testing.assert_allclose(got, expected[ink.plan.region.slices], atol=1e-5)
    np.testing.assert_array_equal(part, spread[:40, :50])
    assert 0.1 < spread.max() <= 0.5


def test_spread_of_a_stored_prediction_runs_no_tile(segment):
    ink = inkdask.predict(segment, model=network, progressive=True, **OPTIONS)
    ink.start()
    ink.wait(60)
    before = tiles_run()
    spread = ink.spread.compute()
    assert tiles_run() == before
    again = inkdask.predict(segment, model=network, progressive=True, **OPTIONS)
    np.testing.assert_array_equal(again.spread.compute(), spread)
    assert tiles_run() == before
    plain = inkdask.predict(segment, model=network, **OPTIONS)
    np.testing.assert_allclose(plain.spread.compute(), spread, atol=1e-4)


def test_spread_is_saved_beside_the_picture_and_added_to_a_finished_job(segment, tmp_path):
    picture = inkdask.run(segment, model=network, **OPTIONS)
    assert not (tmp_path / "segment/predictions/prediction_network_00_05_spread.png").exists()
    before = tiles_run()
    inkdask.run(segment, model=network, spread=True, **OPTIONS)
    assert tiles_run() == before
    place = picture.removesuffix(".png") + "_spread"
    expected = inkdask.predict(segment, model=network, **OPTIONS).spread.compute()
    got = read_picture(f"{place}.png")
    assert got.max() > 50
    np.testing.assert_allclose(got / 510, expected, atol=1 / 510 + 1e-4)
    stored = open_picture(f"{place}.zarr")
    assert stored.provenance.shows == "spread"
    assert open_picture(f"{place.removesuffix('_spread')}.zarr").provenance.shows == "ink"


def test_reduce_and_export_show_the_spread_without_the_network(tmp_path, capsys):
    segment = str(write_segment(tmp_path / "segment", papyrus((26, 200, 260))))
    inkdask.run(segment, model="demo", stride=32)
    cli.main(["reduce", segment, "--model", "demo", "--stride", "32", "--spread"])
    place = f"{segment}/predictions/prediction_demo_00_26_spread"
    to = str(tmp_path / "spread.png")
    cli.main(["export", f"{place}.zarr", "--to", to, "--overlay", "mean", "--colour-map", "magma"])
    assert read_picture(to).shape == (200, 260, 3)
    capsys.readouterr()
    cli.main(["info", to])
    said = capsys.readouterr().out
    assert "spread of opinions" in said
    assert "--spread" in said  # in the command that makes it again


def test_opinions_of_a_constant_network_have_no_spread():
    ink = inkdask.predict(papyrus((3, 150, 150)), model=depth_slope, divisor=1e-3, clip=1e-3)
    assert ink.spread.compute().max() < 1e-5
