"""From coarse to fine: every tile once, a whole picture after each pass, the same in the end."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st

import inkdask
from inkdask import background, coarse, engine, workflow
from inkdask.blending import blend, strips_of
from inkdask.box import Box
from inkdask.demo import auc, synthetic
from inkdask.errors import InkdaskError
from inkdask.store import GridStore
from inkdask.tiling import Tiling
from inkdask.view import words
from inkdask.view.tiles import Ink
from tests.files import grids, read_picture, write_segment
from tests.oracle import assert_same_picture, depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")

HEIGHT, WIDTH = 270, 420  # 2 x 3 chunks
JOB = {"model": depth_slope, "tile": 64, "stride": 16}


@st.composite
def tilings(draw):
    tile = draw(st.integers(1, 40))
    stride = draw(st.integers(1, tile))
    sides = st.integers(1, 30 + 3 * tile)  # up to a few chunks
    return Tiling.of(draw(st.tuples(sides, sides)), tile, stride, draw(st.integers(1, 150)))


@given(tilings())
def test_tiling_has_every_tile_in_one_pass(tiling):
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
def test_first_pass_covers_every_pixel(tiling):
    for axis in (tiling.y, tiling.x):
        origins = axis.origins[axis.pass_of_tile == 0]
        covered = np.zeros(max(axis.length, axis.tile), bool)
        for origin in origins:
            covered[origin : origin + axis.tile] = True
        assert covered.all()


def test_first_pass_of_the_demo_is_less_than_a_tenth():
    tiling = Tiling.of((640, 1664), 64, 16, 1024)
    assert tiling.passes == 3
    assert tiling.tiles_until(0).sum() <= tiling.tiles / 10


@given(tilings())
def test_pass_halves_the_stride_of_the_one_before(tiling):
    for axis in (tiling.y, tiling.x):
        for last in range(axis.passes):
            regular = np.flatnonzero(axis.pass_of_tile <= last)[:-1]
            assert (regular % 2 ** (axis.passes - 1 - last) == 0).all()


@pytest.fixture(scope="module")
def segment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scroll") / "segment"
    return write_segment(folder, papyrus((6, HEIGHT, WIDTH)))


def tiles_run(capsys):
    """Number of tiles that ran, as the summary of the last run says it."""
    return capsys.readouterr().err.split("tiles  ")[-1].split(" run")[0].strip()


def test_each_pass_shows_the_whole_and_sees_more(tmp_path, monkeypatch, capsys):
    shape = {"text": ("ΑΦΟΒΟΝ",), "height": 200, "width": 330}
    volume, truth = synthetic.segment(**shape)
    place = tmp_path / "segment"
    synthetic.write_segment(place, **shape)
    out = {"output_path": tmp_path / "plain", "zarr_output_dir": tmp_path / "plain"}
    expected = read_picture(inkdask.run(place, model="demo", **out))
    tiles = tiles_run(capsys)
    seen = []
    show = workflow.preview

    def look(*job):
        uri = show(*job)
        seen.append(read_picture(uri))
        return uri

    monkeypatch.setattr(workflow, "preview", look)
    uri = inkdask.run(place, model="demo", progressive=True)
    seen.append(read_picture(uri))
    assert tiles_run(capsys) == tiles == "180"

    assert len(seen) == 3
    inside = expected > 0
    for each in seen:
        assert ((each > 0) >= inside).mean() > 0.95  # no part of the segment is left out
    papyrus = volume.any(axis=0)
    scores = [auc(each[papyrus], truth[papyrus]) for each in seen]
    print("AUC of each pass:", *(f"{score:.4f}" for score in scores))
    assert scores[0] > 0.8
    assert scores[1] > scores[0]
    assert scores[2] > scores[1] - 1e-3  # the second sees almost all
    assert_same_picture(seen[-1], expected)
    assert not list(Path(uri).parent.glob("*preview*"))


@pytest.mark.parametrize("window", ["hann", "gaussian"])
def test_picture_of_a_pass_has_no_seams(segment, window):
    """Steps where tiles meet are as small as other steps of the picture."""
    ink = inkdask.predict(segment, **JOB, blend_mode=window, progressive=True)
    first, *_ = range(ink.tiling.passes)
    runner, seen = ink.background, []
    runner.observers.append(lambda _: (runner.passes == first).all() and seen.append(
        (ink.so_far.compute(), Ink.of(ink).tile(0, 0, 0).copy())
    ))  # fmt: skip
    ink.start()
    ink.wait()
    early, shown = seen[0]
    expected = np.rint(early[:256, :256] * 254)
    assert np.abs(shown[: len(expected), : expected.shape[1]] - expected).max() <= 1
    inside = early > 0
    steps = np.abs(np.diff(early, axis=1))
    steps[~(inside[:, 1:] & inside[:, :-1])] = np.nan
    by_column = np.nanmean(steps, axis=0)
    seams = by_column[63 : WIDTH - 64 : 64]
    assert seams.max() < 1.5 * np.nanmax(np.delete(by_column, np.s_[63::64]))
    assert seams.max() < 0.06  # 0.34 where the tiles are not blended
    assert (early > 0).sum() == (ink.so_far.compute() > 0).sum()  # nothing is left out


def test_blend_so_far_of_a_whole_grid_is_the_blend(segment):
    ink = inkdask.predict(segment, **JOB, progressive=True, roi_xyxy=(30, 20, 400, 250))
    ink.start()
    ink.wait()
    grid = ink.background.grid
    expected = blend(grid.grid(), grid.valid(), grid.tiling)[ink.plan.region.slices]
    np.testing.assert_array_equal(ink.so_far.compute(), expected.compute())


@given(tilings(), st.integers(0, 5), st.sampled_from([1, 2, 4]))
def test_windows_of_every_pass_reach_every_pixel_of_a_chunk(tiling, last, k):
    axis, last = tiling.y, min(last, tiling.passes - 1)
    margin = coarse._margin(axis, last)
    early = axis.origins[axis.pass_of_tile <= last]
    whole = strips_of(tuple(early.tolist()), axis.length, axis.tile, k, "hann", 0.0, margin)
    for strip in whole:
        assert (strip.w.sum(axis=1) > 0).all()
        shares = strip.B.reshape(len(strip.B), -1).sum(axis=1)
        np.testing.assert_allclose(shares, strip.w.sum(axis=1))  # a map of ones stays one


class StoppedError(Exception):
    """What stops a job in a test."""


def stop(*_):
    raise StoppedError


def test_plain_run_goes_on_from_a_coarse_one(segment, tmp_path, monkeypatch, capsys):
    plain = read_picture(inkdask.run(segment, **JOB, zarr_output_dir=tmp_path / "plain"))
    with monkeypatch.context() as context:
        context.setattr(workflow, "preview", stop)
        with pytest.raises(StoppedError):
            inkdask.run(segment, **JOB, progressive=True)
    [grid] = grids(str(tmp_path / "partitions"))
    store, _ = GridStore.open(grid)
    assert (store.passes_done() == 0).all()
    coarse = store.tiling.tiles_until(0).sum()
    capsys.readouterr()
    again = read_picture(inkdask.run(segment, **JOB))
    assert f"{coarse:,} resumed from an earlier run" in capsys.readouterr().err
    assert np.abs(again.astype(int) - plain).max() <= 1


def test_background_computes_a_region_then_the_whole_and_run_takes_it_over(segment, capsys):
    options = JOB | {"progressive": True}
    ink = inkdask.predict(segment, **options)
    seen = []
    ink.background.observers.append(lambda _: seen.append(ink.background.passes.copy()))
    ink.focus(0, 60, 0, 60)
    ink.start()
    ink.wait()
    assert not ink.background.is_busy
    finest = ink.tiling.passes - 1
    first = next(passes for passes in seen if passes[0, 0] == finest)
    assert (first[1:, 1:] < 0).all()  # the region was at its finest before others had begun
    whole = [passes for passes in seen if (passes >= 0).all()]
    assert (whole[0] < finest).any()  # a picture of the whole, before it is at its finest
    map_ = ink.so_far.compute()
    np.testing.assert_allclose(map_, ink.map.compute(), atol=1e-4)
    assert words.status([ink.background]) == "All 6 chunks computed."

    background._known.clear()  # as in another session
    again = inkdask.predict(segment, **options)
    assert again.background.known.all()
    np.testing.assert_array_equal(again.so_far.compute(), map_)
    capsys.readouterr()
    picture = read_picture(inkdask.run(segment, **JOB))
    assert f"{ink.tiling.tiles:,} resumed from an earlier run" in capsys.readouterr().err
    assert np.abs(picture - np.floor(255 * map_)).max() <= 1


def test_start_outlasts_a_look_and_the_status_names_the_pass(segment, monkeypatch):
    """The segment has more tiles than a look computes by itself."""
    monkeypatch.setattr(background, "AUTO_TILES", 10)
    monkeypatch.setattr(background, "_abreast", lambda: 1)
    ink = inkdask.predict(segment, **JOB, progressive=True)
    whole = Box.at((0, 0), ink.map.shape)
    said, runner = [], ink.background

    def note(place):
        said.append(words.status([runner]))
        if place == (1, 1):  # a person looks at all, then at a corner
            runner.see(whole)
            runner.see(Box(0, 20, 0, 20))

    runner.observers.append(note)
    ink.start()
    ink.wait()
    assert (runner.passes == runner.finest).all()
    assert said[0].startswith("Computing all, pass 1 of 3: 1 of 6 chunks")
    assert any(each.startswith("Computing all, pass 3 of 3: 5 of 6 chunks") for each in said)
    assert not any("of 6 chunks computed" in each for each in said)  # coarse ones are not
    runner.passes[:] = 0
    runner.passes[0] = runner.finest
    assert words.status([runner]) == "3 of 6 chunks computed, 3 coarse (pass 1 of 3)."


def test_pass_is_done_in_sight_first_and_then_everywhere(segment, monkeypatch):
    monkeypatch.setattr(background, "_abreast", lambda: 1)
    ink = inkdask.predict(segment, **JOB, progressive=True)
    monkeypatch.setattr(background, "AUTO_TILES", 0)  # looking wants nothing by itself
    order = []
    ink.background.observers.append(order.append)
    ink.background.see(Box(200, 260, 400, 420))  # in the last chunk, into which four reach
    ink.start()
    ink.wait()
    assert sorted(order[:4]) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert len({*order[:6]}) == 6  # a pass over all, before the next


@pytest.mark.slow
def test_task_waits_for_distributed_while_another_thread_imports_it(tmp_path):
    package = tmp_path / "distributed" / "__init__.py"
    package.parent.mkdir()
    package.write_text("import time; time.sleep(2)\ndef get_worker(): raise ValueError")
    code = """if True:
        import sys, threading, time
        from inkdask.failures import _worker
        from inkdask.models.hardware import cores
        thread = threading.Thread(target=__import__, args=("distributed",))
        thread.start()
        while "distributed" not in sys.modules: time.sleep(0.01)
        print(repr(_worker()), cores() > 0)
    """
    path = os.pathsep.join([str(tmp_path), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert done.stdout.strip() == "'' True"


def test_progressive_prediction_is_stored_after_viewing_a_plain_one(segment):
    plain = inkdask.predict(segment, **JOB)
    fine = inkdask.predict(segment, **JOB, progressive=True)
    assert plain.map.name == fine.map.name
    assert plain.background is not fine.background
    fine.focus(0, 60, 0, 60)
    fine.wait()
    assert (fine.job.grid.passes_done() >= 0).any()


def test_two_boxes_of_a_segment_are_two_jobs(segment):
    opened = inkdask.open_segment(segment)
    boxes = [Box(0, 120, 0, 120), Box(90, 210, 64, 184)]
    inks = [inkdask.predict(opened.crop(*box.slices), **JOB, progressive=True) for box in boxes]
    for ink in inks:
        ink.start()
        ink.wait()
        np.testing.assert_allclose(ink.so_far.compute(), ink.map.compute(), atol=1e-4)
    assert [ink.job.origin.roi_xyxy for ink in inks] == [(0, 0, 120, 120), (64, 90, 184, 210)]
    uri = inkdask.run(grid=inks[1].job.grid.uri, step="reduce")
    expected = np.floor(255 * inks[1].map.compute())
    assert uri.endswith("_64-90-184-210.png")
    assert np.abs(read_picture(uri) - expected).max() <= 1


def test_chunk_gone_after_an_early_pass_is_computed_again(segment, tmp_path):
    expected = read_picture(inkdask.run(segment, **JOB, progressive=True))
    (grid,) = grids(str(tmp_path / "partitions"))
    store, _ = GridStore.open(grid)
    Path(grid, "g1", "grid", "c", "1", "1", "0", "0").unlink()
    assert np.argwhere(~store.chunks_done()).tolist() == [[1, 1]]
    again = inkdask.run(segment, **JOB)
    assert store.chunks_done().all()
    assert np.array_equal(read_picture(again), expected)


def test_overwrite_after_changed_values_leaves_nothing_of_a_coarser_pass(tmp_path, monkeypatch):
    """A progressive run, new values, ``--overwrite`` stopped early, and a progressive run again."""
    place = tmp_path / "volume.zarr"
    volume = papyrus((6, HEIGHT, WIDTH))
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
