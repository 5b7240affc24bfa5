"""The stored grid: nothing lost in 16 bits, done or not done, and independent writers."""

import os
import re
from concurrent.futures import ThreadPoolExecutor
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
from inkdask.specs import InferredChunk
from inkdask.storage import outputs
from inkdask.storage import s3 as s3_module
from inkdask.store import GridStore, decode, differences, digest, encode, save_chunk
from inkdask.tiling import Tiling

probabilities = st.floats(0, 1, width=32)


@given(arrays(np.float32, (3, 4, 2, 2), elements=probabilities))
def test_sixteen_bits_are_enough(grid):
    grid[1, 2] = np.nan
    back = decode(encode(grid)[None])
    assert back.dtype == np.float32
    assert np.array_equal(np.isnan(back), np.isnan(grid))
    assert np.nanmax(np.abs(back - grid)) <= 1 / 131068 + 1e-7


def chunk_of(tiling, row, column, value, k=4):
    grid = np.full(
        (tiling.y.grid_chunks[row], tiling.x.grid_chunks[column], k, k), value, np.float32
    )
    valid = np.ones((tiling.y.chunks[row], tiling.x.chunks[column]), bool)
    return InferredChunk(grid, valid)


@pytest.fixture
def tiling():
    return Tiling.of((300, 431), tile=64, stride=16, chunk=128)


def test_what_is_written_is_read_and_the_rest_is_missing(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {"a": 1}, tiling, k=4)
    store.create({"a": 1}, {})
    assert (store.tiles_run() == -1).all()
    assert store.write(chunk_of(tiling, 1, 2, 0.25), 1, 2) == np.prod(
        [tiling.y.grid_chunks[1], tiling.x.grid_chunks[2]]
    )
    assert np.argwhere(store.tiles_run() >= 0).tolist() == [[1, 2]]
    grid, valid = store.grid().compute(), store.valid().compute()
    ours = (slice(tiling.y.rows[1], None), slice(tiling.x.rows[2], None))
    np.testing.assert_allclose(grid[ours], 0.25, atol=1e-5)
    grid[ours] = np.nan
    assert np.isnan(grid).all()
    assert valid[tiling.y.edges[1] :, tiling.x.edges[2] :].all()
    assert valid.sum() == tiling.y.chunks[1] * tiling.x.chunks[2]


def test_the_arithmetic_of_each_chunk_is_kept(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    assert store.precisions() == []
    for column, precision in enumerate(("bfloat16", "float32", "bfloat16")):
        chunk = chunk_of(tiling, 0, column, 0.5)._replace(precision=precision)
        store.write(chunk, 0, column)
    assert store.precisions() == ["float32", "bfloat16"]


def test_an_empty_chunk_is_done_too(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    assert store.write(chunk_of(tiling, 0, 0, np.nan), 0, 0) == 0
    assert store.tiles_run()[0, 0] == 0


@pytest.mark.parametrize("name", ["grid", "valid"])
def test_a_chunk_whose_data_are_gone_is_not_done(home, tiling, name):
    """As after a copy that broke off: zarr would read them as empty, and the picture had a hole."""
    store = GridStore.of(home, "seg", {}, tiling, k=4)
    store.create({}, {})
    for place in np.ndindex(tiling.block_shape):
        chunk = chunk_of(tiling, *place, np.nan if place == (0, 1) else 0.5)
        store.write(chunk._replace(valid=chunk.valid & (place != (0, 0))), *place)
    assert (store.tiles_run() >= 0).all()
    assert (store.passes_done() == store.tiling.passes - 1).all()
    (file,) = (
        file for file in storage.list_files(store.uri) if re.match(rf"{name}/c(/2)?/1/1\b", file)
    )
    fs, path = storage.filesystem(storage.join(store.uri, file))
    fs.rm(path)
    gone = np.zeros(tiling.block_shape, bool)
    gone[1, 1] = True
    assert np.array_equal(store.tiles_run() < 0, gone)
    assert np.array_equal(store.passes_done() < 0, gone)


def test_writers_side_by_side_lose_nothing(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    rows, columns = tiling.block_shape
    places = [(i, j) for i in range(rows) for j in range(columns)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda p: store.write(chunk_of(tiling, *p, sum(p) / 10), *p), places))
    assert (store.tiles_run() > 0).all()
    grid = store.grid().compute()
    for i, j in places:
        at = grid[tiling.y.rows[i], tiling.x.rows[j], 0, 0]
        assert at == pytest.approx((i + j) / 10, abs=1e-5)


def test_a_folder_of_other_things_is_no_place_for_a_grid(home, tiling):
    """A segment, say, would be taken for a zarr group from then on."""
    store = GridStore(storage.join(home, "segment"), tiling, 4)
    storage.write_bytes(storage.join(store.uri, "layers", "00.tif"), b"layer")
    with pytest.raises(InkdaskError, match=r"segment is there, and it is no tile grid: .* layers"):
        store.create({}, {})
    tried = GridStore(storage.join(home, "tried"), tiling, 4)  # by another part, or one killed then
    storage.write_bytes(storage.join(tried.uri, f"zarr.json.0123abcd{outputs.PROBE}"), b"")
    tried.create({}, {})
    assert storage.list_files(store.uri) == ["layers/00.tif"]


@pytest.mark.parametrize("kind", ["picture", "volume"])
def test_another_zarr_is_no_place_for_a_grid(tmp_path, tiling, kind):
    place = str(tmp_path / "precious.zarr")
    if kind == "picture":
        write_pyramid(da.ones((60, 70), dtype=np.uint8), place, {"volume": "elsewhere"})
    else:
        zarr.create_array(place, data=np.ones((3, 4, 5), np.uint8))
    before = sorted(storage.list_files(place))
    with pytest.raises(InkdaskError, match=r"precious\.zarr is there, and it is no tile grid"):
        GridStore(place, tiling, 4).create({}, {})
    assert sorted(storage.list_files(place)) == before


def test_creating_again_keeps_what_is_done(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    store.write(chunk_of(tiling, 1, 1, 0.5), 1, 1)
    store.create({}, {})
    assert store.tiles_run()[0, 0] > 0
    store.forget(np.arange(tiling.block_shape[1]) == np.zeros((tiling.block_shape[0], 1)))
    assert np.argwhere(store.tiles_run() >= 0).tolist() == [[1, 1]]


@pytest.mark.parametrize("name", ["grid", "valid", "tiles", "ran_in", "work"])
def test_what_is_damaged_is_named_and_made_anew(tmp_path, tiling, name):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    places = list(np.ndindex(tiling.block_shape))

    def fill():
        store.plan_work(np.ones(tiling.block_shape, np.int32))
        for place in places:
            store.write(chunk_of(tiling, *place, 0.5)._replace(precision="float32"), *place)

    def read():
        store.grid().compute(), store.valid().compute(), store.tiles_run(), store.precisions()

    fill()
    for file in (Path(store.uri) / name / "c").rglob("0"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[:-5])
    if name == "work":  # is estimated again
        assert store.work() is None
    else:
        with pytest.raises(
            DamagedError, match=rf"seg-.*\.zarr/{name} cannot be .* --overwrite, or"
        ):
            read()
    store.forget(np.ones(tiling.block_shape, bool))
    fill()
    read()
    assert (store.tiles_run() > 0).all()
    assert (store.work() == 1).all()


def test_a_server_that_is_down_is_no_damage(s3, faults, tiling, monkeypatch):
    monkeypatch.setattr(s3_module, "TRIES", 2)
    store = GridStore.of(s3, "seg", {}, tiling, k=4)
    store.create({}, {})
    lazily = store.grid(), store.valid()
    faults.inject(["503"])
    readers = (store.tiles_run, store.passes_done, store.work, store.precisions, store.grid)
    for read in (*readers, *(array.compute for array in lazily)):
        with pytest.raises(InkdaskError, match=rf"^{s3}/.*SlowDown") as caught:
            read()
        assert not isinstance(caught.value, DamagedError)


def test_many_may_create_one_store_at_once(home, tiling):
    """Nobody removes what another has done already."""
    store = GridStore.of(home, "seg", {"a": [1, 2]}, tiling, k=4)
    rows, columns = tiling.block_shape
    places = [(i, j) for i in range(rows) for j in range(columns)]

    def work(place):
        store.create({"a": (1, 2)}, {"source": "here"})
        return store.write(chunk_of(tiling, *place, 0.5), *place)

    with ThreadPoolExecutor(len(places)) as pool:
        list(pool.map(work, places))
    assert (store.tiles_run() > 0).all()
    assert store.attributes(store.uri) == {
        "fingerprint": {"a": [1, 2]},
        "origin": {"source": "here"},
    }


def test_a_grid_of_another_job_is_refused_and_what_differs_named(tmp_path, tiling):
    uri = str(tmp_path / "mine.zarr")
    first = {"stride": 16, "model": "a", "layers": [0, 1]}
    store = GridStore(uri, tiling, k=4)
    store.create(first, {})
    store.create({**first, "layers": (0, 1)}, {})
    with pytest.raises(
        InkdaskError, match=r"mine.zarr is another job's: stride is 16 there and 32 h"
    ):
        store.create({**first, "stride": 32}, {})
    with pytest.raises(InkdaskError, match=r"no tile grid"):
        GridStore.open(str(tmp_path / "other.zarr"))


def test_other_jobs_have_other_places(tmp_path, tiling):
    places = {
        GridStore.of(str(tmp_path), "seg", identity, tiling, 4).uri
        for identity in ({"stride": 16}, {"stride": 32}, {"layers": [1, 2]}, {"layers": [2, 1]})
    }
    assert len(places) == 4
    assert digest({"a": 1, "b": 2}) == digest({"b": 2, "a": 1})


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_place_is_one_sentence(tmp_path, tiling):
    tmp_path.chmod(0o500)
    with pytest.raises(InkdaskError, match="permission denied"):
        GridStore.of(str(tmp_path), "seg", {}, tiling, 4).create({}, {})


def test_a_place_below_a_file_is_one_sentence(tmp_path, tiling):
    (tmp_path / "file").write_text("")
    with pytest.raises(InkdaskError, match="file"):
        GridStore.of(str(tmp_path / "file"), "seg", {}, tiling, 4).create({}, {})


def test_a_grid_of_an_older_format_is_not_opened(tmp_path, tiling):
    shape = {"shape": [300, 431], "tile": 64, "stride": 16, "chunk": [128, 128], "k": 4}
    store = GridStore.of(str(tmp_path), "seg", {"format": 1, **shape}, tiling, k=4)
    store.create({"format": 1, **shape}, {})
    with pytest.raises(InkdaskError, match="no tile grid that this version"):
        GridStore.open(store.uri)


def test_a_file_that_is_half_written_is_no_chunk(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    storage.write_bytes(storage.join(store.uri, "valid", "c", "0", "1.partial"), b"")
    assert np.argwhere(store.tiles_run() >= 0).tolist() == [[0, 0]]


@pytest.mark.parametrize("name", ["grid", "valid"])
def test_a_chunk_is_marked_when_all_of_it_is_there(tmp_path, tiling, monkeypatch, name):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    data = GridStore._data

    def full(self, which):
        if which == name:
            raise OSError(28, "No space left on device")
        return data(self, which)

    monkeypatch.setattr(GridStore, "_data", full)
    with pytest.raises(InkdaskError, match="No space"):
        store.write(chunk_of(tiling, 0, 0, 0.5), 0, 0)
    assert store._read("tiles").max() == -1


def test_a_report_counts_each_tile_once(tmp_path, tiling):
    store = GridStore.of(str(tmp_path), "seg", {}, tiling, k=4)
    store.create({}, {})
    chunk = chunk_of(tiling, 0, 0, 0.5)
    chunk.grid[:2] = np.nan
    report = save_chunk(chunk, store, block_id=(0, 0))
    rows, columns = tiling.y.grid_chunks[0], tiling.x.grid_chunks[0]
    assert (report.ran, report.empty) == ((rows - 2) * columns, 2 * columns)


def test_what_a_fingerprint_lacks_is_a_difference():
    assert differences({}, {"stride": 16}) == "stride is None there and 16 here"
