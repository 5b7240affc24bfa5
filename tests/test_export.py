"""The picture's files: read back equal by another library, whole or not there."""

import json
import shutil

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from inkdask import storage
from inkdask.export import bands, lay_zarr, publish_zarr, to_uint8, unfinished, write_png
from inkdask.storage import outputs
from inkdask.types import InkdaskError


def test_grey_values_follow_the_contract():
    values = np.array([-0.1, 0, 0.5, 0.99999, 1, 1.5], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]


@given(
    height=st.integers(1, 70),
    width=st.integers(1, 70),
    chunk=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_png_is_read_back_equal(tmp_path_factory, height, width, chunk, seed):
    path = tmp_path_factory.mktemp("png") / "picture.png"
    picture = np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)
    side = (min(chunk, height), min(chunk, width))
    array = zarr.create_array({}, data=picture, chunks=side)
    write_png(array, str(path), {"inkdask": json.dumps({"model": "tοy"})})
    with Image.open(path) as image:
        assert image.mode == "L"
        assert np.array_equal(np.asarray(image), picture)
        assert json.loads(image.text["inkdask"]) == {"model": "tοy"}


def test_bands_bound_the_memory():
    array = zarr.create_array({}, shape=(10_000, 3_000), chunks=(500, 500), dtype="uint8")
    sizes = [band.shape for band in bands(array)]
    assert sum(height for height, _ in sizes) == 10_000
    assert max(height * width for height, width in sizes) <= 4 << 20


@pytest.fixture
def ink():
    values = np.random.default_rng(0).random((300, 200), dtype=np.float32)
    return da.from_array(values, chunks=((128, 172), (64, 136)))


def test_zarr_appears_only_when_it_is_whole(tmp_path, ink):
    final = str(tmp_path / "picture.zarr")
    place = unfinished(final)
    writes = lay_zarr(ink, place, {"model": "toy"})
    writes.compute()
    assert not (tmp_path / "picture.zarr").exists()
    published = publish_zarr(place, final)
    assert np.array_equal(published[:], to_uint8(ink.compute()))
    assert published.dtype == np.uint8
    again = zarr.open_array(final, mode="r")
    assert again.attrs["model"] == "toy"
    assert again.metadata.dimension_names == ("y", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["picture.zarr"]


def test_a_new_picture_replaces_the_old_one(home, ink):
    final = storage.join(home, "picture.zarr")
    for picture in (ink, ink[:100] / 2):
        place = unfinished(final)
        lay_zarr(picture.rechunk(100), place, {}).compute()
        publish_zarr(place, final)
    array = zarr.open_array(storage.zarr_store(final), mode="r")
    assert np.array_equal(array[:], to_uint8((ink[:100] / 2).compute()))


def test_two_runs_share_no_place(tmp_path):
    final = str(tmp_path / "picture.zarr")
    assert unfinished(final) != unfinished(final)


def test_a_window_that_begins_inside_a_chunk(tmp_path, ink):
    place = str(tmp_path / "picture.zarr")
    lay_zarr(ink[100:290, 30:180], place, {}).compute()
    got = zarr.open_array(place, mode="r")[:]
    assert np.array_equal(got, to_uint8(ink[100:290, 30:180].compute()))


def test_what_is_removed_halfway_is_no_array(tmp_path, monkeypatch):
    place = tmp_path / "picture.zarr"
    zarr.create_array(str(place), data=np.ones((3, 3)))

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(InkdaskError, match="killed"):
        outputs.remove(str(place))
    assert list(place.iterdir())
    assert not (place / "zarr.json").exists()


def test_a_place_is_checked_without_a_trace(home):
    outputs.check_writable(storage.join(home, "a", "b.png"))
    assert storage.list_folder(home) == []
