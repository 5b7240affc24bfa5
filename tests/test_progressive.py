"""From coarse to fine: every tile once, a whole picture after each pass, the same in the end."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import inkdask
import inkdask.view.lazy
from inkdask import engine, workflow
from inkdask.demo import auc, synthetic
from inkdask.errors import InkdaskError
from inkdask.store import GridStore
from inkdask.tiling import Tiling
from tests.files import grids, read_picture
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")

HEIGHT, WIDTH = 330, 460


@st.composite
def tilings(draw):
    tile = draw(st.integers(1, 40))
    stride = draw(st.integers(1, tile))
    shape = draw(st.tuples(st.integers(1, 300), st.integers(1, 300)))
    return Tiling.of(shape, tile, stride, draw(st.integers(1, 150)))


@given(tilings())
def test_every_tile_comes_in_one_pass(tiling):
    rows, columns = tiling.block_shape
    for row in range(rows):
        for column in range(columns):
            passes = [
                tiling.in_passes(row, column, last - 1, last) for last in range(tiling.passes)
            ]
            assert (sum(each.astype(int) for each in passes) == 1).all()
            for last, _ in enumerate(passes):
                until = tiling.in_passes(row, column, -1, last)
                assert np.array_equal(until, sum(passes[: last + 1]) > 0)
                assert tiling.tiles_until(last)[row, column] == until.sum()


@given(tilings())
def test_the_first_pass_covers_every_pixel(tiling):
    for axis in (tiling.y, tiling.x):
        origins = axis.origins[axis.pass_of_tile == 0]
        covered = np.zeros(max(axis.length, axis.tile), bool)
        for origin in origins:
            covered[origin : origin + axis.tile] = True
        assert covered.all()


def test_the_first_pass_of_the_demo_is_less_than_a_tenth():
    tiling = Tiling.of((640, 1664), 64, 16, 1024)
    assert tiling.passes == 3
    assert tiling.tiles_until(0).sum() <= tiling.tiles / 10


@given(tilings())
def test_a_pass_halves_the_stride_of_the_one_before(tiling):
    for axis in (tiling.y, tiling.x):
        for last in range(axis.passes):
            regular = np.flatnonzero(axis.pass_of_tile <= last)[:-1]
            assert (regular % 2 ** (axis.passes - 1 - last) == 0).all()


@pytest.fixture(scope="module")
def scan():
    return synthetic.segment(height=HEIGHT, width=WIDTH, seed=5)


@pytest.fixture
def segment(tmp_path, scan):
    folder = tmp_path / "scroll" / "segment"
    synthetic.write_segment(folder, height=HEIGHT, width=WIDTH, seed=5)
    return folder


def picture(uri):
    with Image.open(uri) as image:
        return np.asarray(image)


def test_each_pass_shows_the_whole_and_sees_more(segment, scan, tmp_path, monkeypatch, capsys):
    volume, truth = scan
    plain = picture(inkdask.run(segment, model="demo", zarr_output_dir=tmp_path / "plain"))
    plain_tiles = capsys.readouterr().err.split("tiles  ")[-1].split(" run")[0].strip()

    seen = []
    show = workflow.preview

    def look(*job):
        uri = show(*job)
        seen.append(picture(uri))
        return uri

    monkeypatch.setattr(workflow, "preview", look)
    uri = inkdask.run(segment, model="demo", progressive=True)
    seen.append(picture(uri))
    assert capsys.readouterr().err.split("tiles  ")[-1].split(" run")[0].strip() == plain_tiles

    assert len(seen) == 3
    inside = plain > 0
    for each in seen:
        assert ((each > 0) >= inside).mean() > 0.95  # no part of the segment is left out
    papyrus = volume.any(axis=0)
    scores = [auc(each[papyrus], truth[papyrus]) for each in seen]
    print("AUC of each pass:", *(f"{score:.4f}" for score in scores))
    assert scores == sorted(scores)
    assert scores[0] > 0.8
    difference = np.abs(seen[-1].astype(int) - plain)
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 1e-4 * difference.size
    assert not list(Path(uri).parent.glob("*preview*"))


def test_a_plain_run_goes_on_from_a_coarse_one(segment, tmp_path, monkeypatch, capsys):
    plain = picture(inkdask.run(segment, model="demo", zarr_output_dir=tmp_path / "plain"))

    class StoppedError(Exception):
        pass

    def stop(*_):
        raise StoppedError

    monkeypatch.setattr(workflow, "preview", stop)
    with pytest.raises(StoppedError):
        inkdask.run(segment, model="demo", progressive=True)
    monkeypatch.undo()
    monkeypatch.setenv("ZARR_OUTPUT_DIR", str(tmp_path / "partitions"))
    monkeypatch.setenv("RESULT_FILE", str(tmp_path / "result.txt"))
    monkeypatch.setenv("CHUNK_SIZE", "128")
    [grid] = grids(str(tmp_path / "partitions"))
    store, _ = GridStore.open(grid)
    assert (store.passes_done() == 0).all()
    coarse = store.tiling.tiles_until(0).sum()
    capsys.readouterr()
    again = picture(inkdask.run(segment, model="demo"))
    said = capsys.readouterr().err
    assert f"{coarse:,} resumed from an earlier run" in said
    assert np.abs(again.astype(int) - plain).max() <= 1


def test_in_python_it_goes_on_in_the_background(segment, tmp_path):
    """A region first, then the whole, pass by pass; and a run takes over what is there."""
    options = {"model": "demo", "progressive": True}
    ink = inkdask.predict(segment, **options)
    seen = []
    background = inkdask.view.background(ink)
    background.observers.append(lambda _: seen.append(background._passes.copy()))
    ink.focus(0, 60, 0, 60)
    ink.start()
    ink.wait()
    assert not background.is_busy
    finest = ink.tiling.passes - 1
    first = next(passes for passes in seen if passes[0, 0] == finest)
    assert (first[1:, 1:] < 0).all()  # the region was at its finest before others had begun
    whole = [passes for passes in seen if (passes >= 0).all()]
    assert (whole[0] < finest).any()  # a picture of the whole, before it is at its finest
    map_ = ink.so_far.compute()
    np.testing.assert_allclose(map_, ink.map.compute(), atol=1e-4)
    assert "chunks at their finest" in background.status

    inkdask.view.lazy._known.clear()
    again = inkdask.predict(segment, **options)
    assert (inkdask.view.background(again).known).all()
    np.testing.assert_array_equal(again.so_far.compute(), map_)


def test_a_progressive_prediction_is_stored_though_a_plain_one_was_looked_at(segment):
    plain = inkdask.predict(segment, model="demo")
    fine = inkdask.predict(segment, model="demo", progressive=True)
    assert plain.map.name == fine.map.name
    assert inkdask.view.background(plain) is not inkdask.view.background(fine)
    fine.focus(0, 60, 0, 60)
    fine.wait()
    assert (fine.job.grid.passes_done() >= 0).any()


def test_two_windows_of_a_segment_are_two_jobs(segment):
    opened = inkdask.open_segment(segment)
    windows = [(slice(0, 120), slice(0, 120)), (slice(90, 210), slice(64, 184))]
    inks = [
        inkdask.predict(opened.crop(*window), model="demo", progressive=True) for window in windows
    ]
    for ink in inks:
        ink.start()
        ink.wait()
        np.testing.assert_allclose(ink.so_far.compute(), ink.map.compute(), atol=1e-4)
    assert [ink.job.origin.roi_xyxy for ink in inks] == [(0, 0, 120, 120), (64, 90, 184, 210)]
    uri = inkdask.run(grid=inks[1].job.grid.uri, step="reduce")
    expected = np.floor(255 * inks[1].map.compute())
    assert uri.endswith("_64-90-184-210.png")
    assert np.abs(picture(uri) - expected).max() <= 1


def test_a_run_takes_over_what_a_notebook_began(segment, capsys):
    ink = inkdask.predict(segment, model="demo", progressive=True)
    ink.focus(0, 60, 0, 60)
    ink.wait()
    capsys.readouterr()
    inkdask.run(segment, model="demo")
    assert "resumed from an earlier run" in capsys.readouterr().err


def test_chunk_that_is_gone_after_an_early_pass_is_computed_again(tmp_path):
    synthetic.write_segment(tmp_path / "seg", height=HEIGHT, width=WIDTH, layers=26)
    options = {"model": "demo", "progressive": True, "compile": False}
    expected = read_picture(inkdask.run(tmp_path / "seg", **options))
    (grid,) = grids(str(tmp_path / "partitions"))
    store, _ = GridStore.open(grid)
    Path(grid, "g1", "grid", "c", "1", "1", "0", "0").unlink()
    assert np.argwhere(~store.chunks_done()).tolist() == [[1, 1]]
    again = inkdask.run(tmp_path / "seg", **{**options, "progressive": False})
    assert store.chunks_done().all()
    assert np.array_equal(read_picture(again), expected)


class StoppedError(Exception):
    """What stops a job in a test."""


def test_changed_values_leave_nothing_of_a_coarser_pass(tmp_path, monkeypatch):
    """A progressive run, new values, ``--overwrite`` stopped early, and a progressive run again."""
    place = tmp_path / "volume.zarr"
    volume = papyrus((6, 300, 420))
    array = zarr.create_array(str(place), data=volume, chunks=(6, 128, 128))
    options = {"model": depth_slope, "output_path": tmp_path / "out"}
    inkdask.run(place, **options, progressive=True)
    array[:, :128] = 255 - volume[:, :128]  # the middle is part of the identity
    with monkeypatch.context() as context:
        count = iter(range(100))
        write = GridStore.write

        def stopping(*arguments):
            if next(count):
                raise StoppedError
            return write(*arguments)

        context.setattr(GridStore, "write", stopping)
        context.setattr(engine, "TRIES", 1)
        with pytest.raises(InkdaskError, match="StoppedError"):
            inkdask.run(place, **options, overwrite=True)
    mixed = read_picture(inkdask.run(place, **options, progressive=True))
    fresh = inkdask.run(place, **options, zarr_output_dir=tmp_path / "fresh")
    assert np.array_equal(mixed, read_picture(fresh))
