"""Test the prepared array: its voxels, its pictures, resuming, and what it refuses."""

import shutil

import dask
import numpy as np
import pytest
import zarr
from PIL import Image

import inkdask
from inkdask import engine, preparation, storage
from inkdask.errors import InkdaskError, SettingsError
from tests.files import write_segment
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")

HEIGHT, WIDTH = 150, 1500


@pytest.fixture
def volume():
    return papyrus((7, HEIGHT, WIDTH))


@pytest.fixture
def segment(tmp_path, volume):
    return write_segment(tmp_path / "seg", volume)


@pytest.mark.parametrize("compress", [False, True])
def test_prepared_array_holds_the_layers(segment, volume, home, compress):
    uri = storage.join(home, "volume.zarr")
    got = inkdask.prepare(
        segment, layers=(2, 7), surface_volume_zarr=uri, use_zarr_compression=compress
    )
    assert got == uri
    array = zarr.open_array(storage.zarr_store(uri), mode="r")
    assert np.array_equal(array[:], volume[2:7])
    assert (array.shards, array.chunks) == ((5, 1024, 1024), (5, 128, 128))
    assert array.attrs["layers"] == [2, 3, 4, 5, 6]
    assert bool(array.compressors) is compress
    assert not storage.exists(f"{uri}.done")


def test_prepared_array_gives_the_same_picture(segment):
    """A range of layers means their numbers, not their places in the array."""
    uri = inkdask.run(segment, step="prepare", layers=(2, 7))
    options = {"model": depth_slope, "layers": (5, 7)}
    direct = np.asarray(Image.open(inkdask.run(segment, **options)))
    prepared = np.asarray(Image.open(inkdask.run(segment, surface_volume_zarr=uri, **options)))
    assert direct.any()
    assert np.array_equal(direct, prepared)


def test_stopped_prepare_resumes_and_its_array_is_not_read(segment, volume, tmp_path, monkeypatch):
    uri = str(tmp_path / "volume.zarr")
    copied = []
    copy = preparation._copy_block

    def failing(block, *, block_id, **rest):
        if copied:
            raise InkdaskError("the disk is full")
        copy(block, block_id=block_id, **rest)
        copied.append(block_id)

    monkeypatch.setattr(preparation, "_copy_block", failing)
    one_by_one = dask.config.set(num_workers=1)
    with one_by_one, pytest.raises(InkdaskError, match="full"):
        inkdask.prepare(segment, surface_volume_zarr=uri)
    with pytest.raises(InkdaskError, match="volume.zarr is not finished"):
        inkdask.run(segment, model=depth_slope, surface_volume_zarr=uri)

    def counting(block, *, block_id, **rest):
        assert block_id not in copied
        copied.append(block_id)
        copy(block, block_id=block_id, **rest)

    monkeypatch.setattr(preparation, "_copy_block", counting)
    inkdask.prepare(segment, surface_volume_zarr=uri)
    assert len(copied) == 2
    assert np.array_equal(zarr.open_array(uri, mode="r")[:], volume)


def test_prepare_reports_damaged_marks(segment, volume, tmp_path, monkeypatch):
    uri = str(tmp_path / "volume.zarr")
    with monkeypatch.context() as context:
        context.setattr(preparation, "_copy_block", stopped)
        with pytest.raises(InkdaskError, match="full"):
            inkdask.prepare(segment, surface_volume_zarr=uri)
    storage.write_bytes(f"{uri}.done/c/0/0", b"spoiled")
    with pytest.raises(InkdaskError, match=r"volume\.zarr\.done cannot be read .* --overwrite\.$"):
        inkdask.prepare(segment, surface_volume_zarr=uri)
    inkdask.prepare(segment, surface_volume_zarr=uri, overwrite=True)
    assert np.array_equal(zarr.open_array(uri, mode="r")[:], volume)


def stopped(*_, **__):
    raise InkdaskError("the disk is full")


def test_prepare_reports_full_disk(segment, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(engine, "PAUSE", 0.01)
    monkeypatch.setattr(zarr.Array, "__setitem__", full)
    with pytest.raises(InkdaskError, match=r"^No space is left to write .*volume\.zarr\.$"):
        inkdask.prepare(segment, surface_volume_zarr=str(tmp_path / "volume.zarr"))


def test_run_refuses_array_of_another_segment(segment, volume, tmp_path):
    """Its picture would replace that of the segment."""
    other = write_segment(tmp_path / "other", volume)
    prepared = inkdask.prepare(other)
    options = {"model": depth_slope, "surface_volume_zarr": prepared}
    expected = r"was prepared from .*other, and the picture of S3_PATH .*seg would be replaced"
    with pytest.raises(SettingsError, match=expected):
        inkdask.run(segment, **options)
    assert inkdask.run(segment, output_path=tmp_path / "out", **options)
    assert inkdask.run(f"{other}/layers", **options)


def test_finished_array_is_kept_until_its_layers_change(segment, volume, monkeypatch, caplog):
    uri = inkdask.prepare(segment)
    monkeypatch.setattr(preparation, "_copy_block", None)
    with caplog.at_level("INFO", "inkdask"):
        assert inkdask.prepare(segment) == uri
    assert f"{uri} is there already" in caplog.text
    monkeypatch.undo()
    place = uri + "-2"
    inkdask.prepare(segment, surface_volume_zarr=place)
    write_segment(segment, 255 - volume, replace=True)
    inkdask.prepare(segment, surface_volume_zarr=place)
    assert np.array_equal(zarr.open_array(place, mode="r")[:], 255 - volume)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", ["array", "group", "folder"])
def test_prepare_refuses_to_replace_foreign_data(segment, tmp_path, kind, overwrite):
    place = tmp_path / "precious.zarr"
    if kind == "array":
        attributes = {"source": "precious", "layers": [1, 2]}
        zarr.create_array(str(place), shape=(2, 3, 4), dtype="uint8", attributes=attributes)
    elif kind == "group":
        zarr.create_group(str(place))
    place.mkdir(exist_ok=True)
    (place / "thesis.txt").write_text("years of work")
    with pytest.raises(InkdaskError, match="precious.zarr"):
        inkdask.prepare(segment, surface_volume_zarr=str(place), overwrite=overwrite)
    assert (place / "thesis.txt").exists()


def test_array_of_another_codec_or_range_starts_anew(segment, volume, tmp_path):
    place = str(tmp_path / "volume.zarr")
    for options in ({}, {"use_zarr_compression": True}, {"layers": (1, 6)}):
        inkdask.prepare(segment, surface_volume_zarr=place, **options)
        first, last = options.get("layers", (0, 7))
        assert np.array_equal(zarr.open_array(place, mode="r")[:], volume[first:last])


def test_run_refuses_layers_that_the_array_lacks(segment, tmp_path):
    place = inkdask.prepare(segment, layers=(0, 5))
    with pytest.raises(InkdaskError, match="05, 06 missing"):
        inkdask.run(segment, model=depth_slope, layers=(2, 7), surface_volume_zarr=place)


def test_run_refuses_array_older_than_its_layers(segment, volume):
    prepared = inkdask.prepare(segment, layers=(1, 7))
    options = {"model": depth_slope, "surface_volume_zarr": prepared}
    assert inkdask.check(segment, **options)
    write_segment(segment, 255 - volume, replace=True)
    says = r"SURFACE_VOLUME_ZARR .* was prepared before the layers of .*seg were changed: run inkd"
    for job in (inkdask.check, inkdask.run):
        with pytest.raises(InkdaskError, match=says):
            job(segment, **options)
    shutil.rmtree(segment / "layers")  # the array may serve instead of the layers
    assert inkdask.run(segment, **options)


def test_array_of_another_segment_is_kept_without_overwrite(segment, volume, tmp_path):
    place = str(tmp_path / "volume.zarr")
    inkdask.prepare(segment, surface_volume_zarr=place)
    other = write_segment(tmp_path / "other", 255 - volume)
    with pytest.raises(InkdaskError, match=r"volume\.zarr was prepared from .*seg: name another"):
        inkdask.prepare(other, surface_volume_zarr=place)
    assert np.array_equal(zarr.open_array(place, mode="r")[:], volume)
    inkdask.prepare(other, surface_volume_zarr=place, overwrite=True)
    assert np.array_equal(zarr.open_array(place, mode="r")[:], 255 - volume)
