"""Test the stored grid: 16-bit codes, marks, generations, and independent writers."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from inkdask import storage
from inkdask.errors import DamagedError, InkdaskError
from inkdask.pictures.pyramid import write_pyramid
from inkdask.specs import InferredChunk, Passes
from inkdask.storage import outputs
from inkdask.storage import s3 as s3_module
from inkdask.store import GridStore, decode, encode, save_chunk
from inkdask.tiling import Tiling
from tests.jobs import ORIGIN, PROVENANCE, RECIPE, SAID, store_in

probabilities = st.floats(0, 1, width=32)


@given(arrays(np.float32, (3, 4, 2, 2), elements=probabilities))
def test_probability_survives_sixteen_bits(grid):
    grid[1, 2] = np.nan
    back = decode(encode(grid))
    assert back.dtype == np.float32
    assert np.array_equal(np.isnan(back), np.isnan(grid))
    assert np.nanmax(np.abs(back - grid)) <= 1 / 131068 + 1e-7


def chunk_of(tiling, row, column, value, k=4):
    grid = np.full(
        (tiling.y.grid_chunks[row], tiling.x.grid_chunks[column], k, k), value, np.float32
    )
    valid = np.ones((tiling.y.chunks[row], tiling.x.chunks[column]), bool)
    return InferredChunk(grid, valid)


def fill(store, value=0.5):
    """Write all chunks, and return their places."""
    places = list(np.ndindex(store.tiling.block_shape))
    for place in places:
        store.write(chunk_of(store.tiling, *place, value), *place)
    return places


@pytest.fixture
def tiling():
    return Tiling.of(RECIPE.size, RECIPE.tile, RECIPE.stride, RECIPE.chunk)


def test_written_chunk_is_read_and_the_rest_is_missing(tmp_path, tiling):
    store = store_in(tmp_path)
    assert (store.passes_done() == -1).all()
    assert store.write(chunk_of(tiling, 1, 2, 0.25), 1, 2) == np.prod(
        [tiling.y.grid_chunks[1], tiling.x.grid_chunks[2]]
    )
    assert np.argwhere(store.chunks_done()).tolist() == [[1, 2]]
    grid, valid = store.grid().compute(), store.valid().compute()
    ours = (slice(tiling.y.rows[1], None), slice(tiling.x.rows[2], None))
    np.testing.assert_allclose(grid[ours], 0.25, atol=1e-5)
    grid[ours] = np.nan
    assert np.isnan(grid).all()
    assert valid[tiling.y.edges[1] :, tiling.x.edges[2] :].all()
    assert valid.sum() == tiling.y.chunks[1] * tiling.x.chunks[2]


def test_precision_of_each_chunk_is_stored(tmp_path, tiling):
    store = store_in(tmp_path)
    store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    assert store.precisions() == ()
    for column, precision in enumerate(("bfloat16", "float32", "bfloat16")):
        chunk = chunk_of(tiling, 0, column, 0.5)._replace(precision=precision)
        store.write(chunk, 0, column)
    assert store.precisions() == ("float32", "bfloat16")


def test_empty_chunk_is_done(tmp_path, tiling):
    store = store_in(tmp_path)
    assert store.write(chunk_of(tiling, 0, 0, np.nan), 0, 0) == 0
    assert store.chunks_done()[0, 0]


def test_later_pass_is_merged_into_earlier_ones(tmp_path, tiling):
    store = store_in(tmp_path)
    full = chunk_of(tiling, 0, 0, 0.5)
    ran = 0
    for last in range(tiling.passes):
        part = np.where(tiling.in_passes(0, 0, last - 1, last)[..., None, None], full.grid, np.nan)
        ran += store.write(full._replace(grid=part.astype(np.float32)), 0, 0, last)
        assert store.passes_done()[0, 0] == last
        assert store.chunks_done()[0, 0] == (last == tiling.passes - 1)
        rows, columns = tiling.y.grid_chunks[0], tiling.x.grid_chunks[0]
        there = ~np.isnan(store.grid()[:rows, :columns, 0, 0].compute())
        assert np.array_equal(there, tiling.in_passes(0, 0, -1, last))
    assert ran == rows * columns


@pytest.mark.parametrize("name", ["grid", "valid"])
def test_chunk_whose_data_are_gone_is_missing(home, tiling, name):
    """zarr reads lost objects as empty, so the picture would have a hole."""
    store = store_in(home)
    for place in np.ndindex(tiling.block_shape):
        chunk = chunk_of(tiling, *place, np.nan if place == (0, 1) else 0.5)
        store.write(chunk._replace(valid=chunk.valid & (place != (0, 0))), *place)
    assert store.chunks_done().all()
    (file,) = (f for f in storage.list_files(store.uri) if re.match(rf"g1/{name}/c/1/1\b", f))
    fs, path = storage.filesystem(storage.join(store.uri, file))
    fs.rm(path)
    gone = np.zeros(tiling.block_shape, bool)
    gone[1, 1] = True
    assert np.array_equal(~store.chunks_done(), gone)
    store.create(RECIPE, ORIGIN)  # takes the mark back, because the chunk has no pass now
    store.write(chunk_of(tiling, 1, 1, 0.5), 1, 1, 0)
    assert store.passes_done()[1, 1] == 0


def test_concurrent_writers_lose_nothing(tmp_path, tiling):
    store = store_in(tmp_path)
    places = list(np.ndindex(tiling.block_shape))
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: store.write(chunk_of(tiling, *p, sum(p) / 10), *p), places))
    assert store.chunks_done().all()
    grid = store.grid().compute()
    for i, j in places:
        at = grid[tiling.y.rows[i], tiling.x.rows[j], 0, 0]
        assert at == pytest.approx((i + j) / 10, abs=1e-5)


def test_folder_of_other_things_is_refused(home, tiling):
    """zarr would take such a folder, for example a segment, for a group."""
    store = GridStore(storage.join(home, "segment"), tiling, 4)
    storage.write_bytes(storage.join(store.uri, "layers", "00.tif"), b"layer")
    with pytest.raises(InkdaskError, match=r"segment is there, and it is no tile grid: .* layers"):
        store.create(RECIPE, ORIGIN)
    tried = GridStore(storage.join(home, "tried"), tiling, 4)  # as a killed part leaves it
    for ending in ("part", "test"):
        storage.write_bytes(storage.join(tried.uri, f"zarr.json.0123abcd.{ending}"), b"")
    tried.create(RECIPE, ORIGIN)
    assert storage.list_files(store.uri) == ["layers/00.tif"]


@pytest.mark.parametrize("kind", ["picture", "volume"])
def test_another_zarr_is_refused(tmp_path, tiling, kind):
    place = str(tmp_path / "precious.zarr")
    if kind == "picture":
        write_pyramid(da.ones((60, 70), dtype=np.uint8), place, PROVENANCE)
    else:
        zarr.create_array(place, data=np.ones((3, 4, 5), np.uint8))
    before = sorted(storage.list_files(place))
    with pytest.raises(InkdaskError, match=r"precious\.zarr is there, and it is no tile grid"):
        GridStore(place, tiling, 4).create(RECIPE, ORIGIN)
    assert sorted(storage.list_files(place)) == before


def test_creating_again_keeps_what_is_done(tmp_path, tiling):
    store = store_in(tmp_path)
    store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    store.create(RECIPE, ORIGIN, SAID)
    assert np.argwhere(store.chunks_done()).tolist() == [[0, 0]]
    assert GridStore.open(store.uri)[1].said == SAID


@pytest.mark.slow
def test_restarted_grid_is_empty_and_out_of_reach_of_late_writers(home, tiling):
    store = store_in(home)
    fill(store, 0.25)
    late = GridStore.open(store.uri)[0]
    fresh = store.restart()
    again = GridStore.of(home, "seg", RECIPE)
    assert again == fresh != late
    with pytest.raises(InkdaskError, match="was started anew by another job"):
        late.check_current()
    again.create(RECIPE, ORIGIN)
    again.check_current()
    assert (again.passes_done() == -1).all()
    fill(late, 0.125)
    assert (again.passes_done() == -1).all()
    fill(again, 0.75)
    np.testing.assert_allclose(again.grid().compute(), 0.75, atol=1e-5)
    again.remove_earlier()
    assert not storage.exists(storage.join(store.uri, "g1"))
    np.testing.assert_allclose(again.grid().compute(), 0.75, atol=1e-5)


def test_parts_that_restart_at_once_agree(home):
    stores = [store_in(home) for _ in range(2)]
    assert stores[0].restart() == stores[1].restart() == GridStore.of(home, "seg", RECIPE)


def test_new_grid_at_an_old_place_gets_no_stale_handle(tmp_path):
    """A process caches its handles, and workers live long."""
    place = str(tmp_path / "mine.zarr")
    for shape in ((300, 431), (190, 250)):
        recipe = replace(RECIPE, size=shape)
        store = GridStore.at(place, recipe)
        store.create(recipe, ORIGIN)
        fill(store)
        assert store.grid().shape == (*store.tiling.grid_shape, 4, 4)
        assert store.valid().compute().all()
        outputs.remove(place)


@pytest.mark.parametrize("name", ["grid", "valid", "done", "ran_in", "work"])
def test_damaged_array_is_named_and_restored_by_restart(tmp_path, tiling, name):
    store = store_in(tmp_path)
    places = list(np.ndindex(tiling.block_shape))

    def write_all(store):
        store.plan_work(np.ones(tiling.block_shape, np.int32))
        for place in places:
            store.write(chunk_of(tiling, *place, 0.5)._replace(precision="float32"), *place)

    def read(store):
        store.grid().compute(), store.valid().compute(), store.passes_done(), store.precisions()

    write_all(store)
    for file in (Path(store.uri) / "g1" / name / "c").rglob("0"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-5])
    assert store.has_any(np.ones(tiling.block_shape, bool))
    if name == "work":  # because the work is estimated again
        assert store.work() is None
    else:
        says = rf"seg-.*\.zarr/g1/{name} cannot be .* --overwrite, or"
        with pytest.raises(DamagedError, match=says):
            read(store)
    store = store.restart()
    store.create(RECIPE, ORIGIN)
    assert not store.has_any(np.ones(tiling.block_shape, bool))
    write_all(store)
    read(store)
    assert store.chunks_done().all()
    assert (store.work() == 1).all()


def test_unreachable_server_is_not_reported_as_damage(s3, faults, monkeypatch):
    monkeypatch.setattr(s3_module, "TRIES", 2)
    store = store_in(s3)
    lazily = store.grid(), store.valid()
    faults.inject(["503"])
    readers = (store.passes_done, store.work, store.precisions)
    for read in (*readers, *(array.compute for array in lazily)):
        with pytest.raises(InkdaskError, match=rf"^{s3}/.*SlowDown") as caught:
            read()
        assert not isinstance(caught.value, DamagedError)


def test_store_created_by_many_at_once_keeps_all_chunks(home, tiling):
    """No process removes what another one has done."""
    store = GridStore.of(home, "seg", RECIPE)
    places = list(np.ndindex(tiling.block_shape))

    def work(place):
        store.create(RECIPE, ORIGIN, SAID)
        return store.write(chunk_of(tiling, *place, 0.5), *place)

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(work, places))
    assert store.chunks_done().all()
    label = store.label(store.uri)
    assert (label.recipe, label.origin, label.said, label.generation) == (RECIPE, ORIGIN, SAID, 1)


def test_chunk_written_while_another_process_opens_the_grid_keeps_its_mark(
    home, tiling, monkeypatch
):
    store, real, listed = GridStore.of(home, "seg", RECIPE), GridStore._chunks_there, []
    store.create(RECIPE, ORIGIN, SAID)

    def chunks_there(self, name):
        found = real(self, name)
        listed.append(name)
        if len(listed) == 1:
            store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
        return found

    monkeypatch.setattr(GridStore, "_chunks_there", chunks_there)
    store.create(RECIPE, ORIGIN, SAID)
    assert listed
    assert store.chunks_done()[0, 0]


def test_grid_of_another_job_is_refused_with_the_differences(tmp_path, tiling):
    store = GridStore(str(tmp_path / "mine.zarr"), tiling, k=4)
    store.create(RECIPE, ORIGIN)
    says = r"mine.zarr is another job's: stride is 16 there and 32 h"
    with pytest.raises(InkdaskError, match=says):
        store.create(replace(RECIPE, stride=32), ORIGIN)
    with pytest.raises(InkdaskError, match=r"no tile grid"):
        GridStore.open(str(tmp_path / "other.zarr"))


def test_different_recipes_have_different_places(tmp_path):
    recipes = [RECIPE, replace(RECIPE, stride=32), replace(RECIPE, layers=(2, 1, 0))]
    assert len({GridStore.of(str(tmp_path), "seg", recipe).uri for recipe in recipes}) == 3


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_place_is_named(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InkdaskError, match="permission denied"):
        store_in(tmp_path)


def test_place_below_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InkdaskError, match="file"):
        store_in(tmp_path / "file")


@pytest.mark.parametrize(
    "attributes", [{"fingerprint": {"format": 3}}, {"format": 3, "recipe": {}}], ids=["3", "other"]
)
def test_grid_of_another_format_is_not_opened(tmp_path, attributes):
    place = str(tmp_path / "old.zarr")
    zarr.create_group(place, attributes=attributes)
    with pytest.raises(InkdaskError, match="no tile grid that this version"):
        GridStore.open(place)
    with pytest.raises(InkdaskError, match="no tile grid that this version"):
        GridStore.at(place, RECIPE)


def test_half_written_file_does_not_count_as_chunk(tmp_path, tiling):
    store = store_in(tmp_path)
    store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    storage.write_bytes(storage.join(store.uri, "g1", "valid", "c", "0", "1.partial"), b"")
    assert np.argwhere(store.chunks_done()).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", ["grid", "valid"])
def test_chunk_is_marked_done_after_all_its_data_are_written(tmp_path, tiling, monkeypatch, name):
    store = store_in(tmp_path)
    data = GridStore._data

    def full(self, which):
        if which == name:
            raise OSError(28, "No space left on device")
        return data(self, which)

    monkeypatch.setattr(GridStore, "_data", full)
    with pytest.raises(InkdaskError, match="No space"):
        store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    assert store._read("done").max() == -1


@pytest.mark.parametrize("last", [0, 2])
def test_report_counts_each_tile_once(tmp_path, tiling, last):
    store = store_in(tmp_path)
    chunk = chunk_of(tiling, 0, 0, 0.5)
    wanted = tiling.in_passes(0, 0, -1, last)
    chunk.grid[~wanted] = np.nan
    chunk.grid[:2] = np.nan
    passes = Passes(np.full(tiling.block_shape, -1), last)
    report = save_chunk(chunk, store, passes, block_id=(0, 0))
    assert (report.ran, report.empty) == (wanted[2:].sum(), wanted[:2].sum())
