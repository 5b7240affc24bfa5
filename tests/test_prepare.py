"""Test the prepared array: its voxels, its pictures, resuming, and what it refuses."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, Event

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
        copied.append(block_id)
        return copy(block, block_id=block_id, **rest)

    monkeypatch.setattr(preparation, "_copy_block", failing)
    one_by_one = dask.config.set(num_workers=1)
    with one_by_one, pytest.raises(InkdaskError, match="full"):
        inkdask.prepare(segment, surface_volume_zarr=uri)
    with pytest.raises(InkdaskError, match="volume.zarr is not finished"):
        inkdask.run(segment, model=depth_slope, surface_volume_zarr=uri)

    def counting(block, *, block_id, **rest):
        assert block_id not in copied
        copied.append(block_id)
        return copy(block, block_id=block_id, **rest)

    monkeypatch.setattr(preparation, "_copy_block", counting)
    inkdask.prepare(segment, surface_volume_zarr=uri)
    assert len(copied) == 2
    check_whole(uri, volume)


def check_whole(uri, volume):
    """Check an array that says it is finished: its voxels, its shares of data, and its marks."""
    array = zarr.open_array(storage.zarr_store(uri), mode="r")
    assert array.attrs["finished"]
    assert np.array_equal(array[:], volume)
    data = volume.any(axis=0)
    shares = [[data[:, :1024].mean(), data[:, 1024:].mean()]]
    np.testing.assert_allclose(array.attrs["occupied"]["share"], shares, atol=1e-4)
    assert not storage.exists(f"{uri}.done")


def test_damaged_array_is_made_anew_with_overwrite(segment, volume, home):
    """The last block is at the edge, and the first is empty."""
    volume[:, :, :1024] = 0
    write_segment(segment, volume, replace=True)
    uri = inkdask.prepare(segment, surface_volume_zarr=storage.join(home, "volume.zarr"))
    for block in "01":
        storage.write_bytes(f"{uri}/c/0/0/{block}", b"spoiled")
    inkdask.prepare(segment, surface_volume_zarr=uri, overwrite=True)
    check_whole(uri, volume)
    assert storage.list_files(f"{uri}/c") == ["0/0/1"]


def test_blocks_of_a_larger_array_are_removed(segment, volume, home):
    uri = storage.join(home, "volume.zarr")
    inkdask.prepare(segment, surface_volume_zarr=uri)
    write_segment(segment, volume[:, :90, :700], replace=True)
    inkdask.prepare(segment, surface_volume_zarr=uri)
    assert storage.list_files(f"{uri}/c") == ["0/0/0"]
    assert np.array_equal(zarr.open_array(storage.zarr_store(uri))[:], volume[:, :90, :700])


def prepare_at_once(segments, uri, **options):
    """Let each segment be prepared in a thread; return what came out, in their order."""

    def prepare(segment):
        try:
            return inkdask.prepare(segment, surface_volume_zarr=uri, **options)
        except InkdaskError as error:
            return error

    with ThreadPoolExecutor(len(segments)) as pool:
        return list(pool.map(prepare, segments))


@pytest.mark.parametrize("overwrite", [False, True])
def test_identical_prepares_at_once_both_succeed(segment, volume, tmp_path, monkeypatch, overwrite):
    meeting = Barrier(2)  # both have seen what is there, and neither has written
    monkeypatch.setattr(preparation, "check_room_to_prepare", lambda *_: meeting.wait(60))
    uri = str(tmp_path / "volume.zarr")
    for there in (False, overwrite, overwrite, overwrite):
        if not there:
            shutil.rmtree(uri, ignore_errors=True)
        assert prepare_at_once([segment, segment], uri, overwrite=overwrite) == [uri] * 2
        check_whole(uri, volume)


def test_changed_layers_replace_an_array_in_two_jobs_at_once(segment, volume, home, monkeypatch):
    uri = storage.join(home, "volume.zarr")
    inkdask.prepare(segment, surface_volume_zarr=uri, layers=(1, 6), use_zarr_compression=True)
    meeting = Barrier(2)
    monkeypatch.setattr(preparation, "check_room_to_prepare", lambda *_: meeting.wait(60))
    assert prepare_at_once([segment, segment], uri) == [uri] * 2
    check_whole(uri, volume)


def test_job_succeeds_whose_marks_another_job_removes(segment, volume, tmp_path, monkeypatch):
    copy, begun, go_on = preparation._copy_block, Event(), Event()
    uri = str(tmp_path / "volume.zarr")

    def wait(block, *, block_id, **rest):
        begun.set()
        assert go_on.wait(60)
        return copy(block, block_id=block_id, **rest)

    with ThreadPoolExecutor(1) as pool:
        with monkeypatch.context() as slowly:
            slowly.setattr(preparation, "_copy_block", wait)
            slow = pool.submit(inkdask.prepare, segment, surface_volume_zarr=uri)
            assert begun.wait(60)
        inkdask.prepare(segment, surface_volume_zarr=uri)
        check_whole(uri, volume)
        go_on.set()
        assert slow.result(60) == uri
    check_whole(uri, volume)


@pytest.mark.parametrize("layers", [(0, 7), (1, 6)])
def test_late_mark_of_another_job_hides_no_missing_block(
    segment, volume, tmp_path, monkeypatch, layers
):
    """A job stores a block; another starts anew, and is killed; then the first marks the block."""
    uri, replace, late = str(tmp_path / "volume.zarr"), Path.replace, []
    other = {"surface_volume_zarr": uri, "layers": layers}

    def replace_late(file, target):
        if f"{uri}.done" in str(target) and Path(target).name != "zarr.json" and not late:
            late.append(target)
            with monkeypatch.context() as killed:
                killed.setattr(preparation, "_copy_block", stopped)
                with pytest.raises(InkdaskError, match="full"):
                    inkdask.prepare(segment, overwrite=True, **other)
        return replace(file, target)

    with monkeypatch.context() as context, dask.config.set(num_workers=1):
        context.setattr(Path, "replace", replace_late)
        if layers == (0, 7):
            inkdask.prepare(segment, surface_volume_zarr=uri)
        else:
            with pytest.raises(InkdaskError, match="zarr was started anew by another job"):
                inkdask.prepare(segment, surface_volume_zarr=uri)
    assert late
    inkdask.prepare(segment, **other)
    check_whole(uri, volume[slice(*layers)])


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
