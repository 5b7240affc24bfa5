"""Stored pictures: OME-Zarr pyramids that are right, and whole or not there."""

import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image as OmeImage

from inkdask import engine, storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import Provenance
from inkdask.information import describe
from inkdask.pictures import pyramid
from inkdask.pictures.picture import is_picture, open_picture
from inkdask.pictures.pyramid import halve, halved, level_shapes, to_uint8, write_pyramid
from inkdask.storage import outputs
from tests.files import bound_by_rights
from tests.jobs import PROVENANCE, store_in


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (1301, 91), dtype=np.uint8)


def lazy(pixels, chunk=(512, 64)):
    return da.from_array(pixels, chunks=chunk)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, pixels):
    """A stored picture of 7.91 um pixels, to read only."""
    uri = str(tmp_path_factory.mktemp("stored") / "prediction_toy_00_26.zarr")
    write_pyramid(lazy(pixels), uri, PROVENANCE, 7.91, (100, 40))
    return uri


def check_levels(uri, pixels):
    """Check every level of a stored picture; return their number."""
    group = zarr.open_group(storage.zarr_store(uri, read_only=True), mode="r")
    levels = sorted(group.array_keys())
    for level in levels:
        assert group[level].dtype == np.uint8
        assert np.array_equal(group[level][:], pixels), level
        pixels = halve(pixels)
    return len(levels)


def test_grey_values_are_clipped_and_rounded_down():
    values = np.array([-0.1, 0, 0.5, 0.99999, 1, 1.5], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]


def test_halving_averages_two_by_two():
    block = np.array([[0, 1, 10], [1, 1, 20], [7, 8, 255]], np.uint8)
    assert halve(block).tolist() == [[1, 15], [8, 255]]


def test_level_shapes_end_at_512_pixels():
    assert level_shapes((1301, 700)) == [(1301, 700), (651, 350), (326, 175)]
    assert level_shapes((512, 3)) == [(512, 3)]
    assert level_shapes((100_000, 1))[-1] == (391, 1)


@settings(max_examples=40)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    chunk=st.integers(1, 50),
    times=st.integers(1, 3),
)
def test_lazy_halving_at_any_chunk_equals_halving(height, width, chunk, times):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    expected = pixels
    for _ in range(times):
        expected = halve(expected)
    got = halved(lazy(pixels, chunk), times)
    assert got.shape == expected.shape
    assert np.array_equal(got.compute(), expected)


def test_levels_on_storage_are_means_of_the_level_before(home, pixels):
    uri = storage.join(home, "p.zarr")
    write_pyramid(lazy(pixels), uri, PROVENANCE, 7.91, (100, 40))
    assert check_levels(uri, pixels) == 3
    assert [entry.name for entry in storage.list_folder(home)] == ["p.zarr"]
    picture = open_picture(uri)
    assert np.array_equal(picture.level(1).compute(), halve(pixels))
    assert picture.provenance == PROVENANCE


@pytest.mark.parametrize("shape", [(1, 1), (513, 1), (2, 701), (513, 513)])
@pytest.mark.parametrize(("corner", "chunk"), [((0, 0), 1024), ((100, 130), 256), ((255, 1), 400)])
def test_levels_of_any_size_and_crop_are_right(tmp_path, shape, corner, chunk):
    whole = np.random.default_rng(1).integers(0, 256, (800, 900), dtype=np.uint8)
    part = slice(corner[0], corner[0] + shape[0]), slice(corner[1], corner[1] + shape[1])
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(whole, chunk)[part], uri, None)
    assert check_levels(uri, whole[part]) == 1 + (max(shape) > 512)


def test_levels_of_uneven_chunks_are_right(tmp_path, pixels):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(pixels, ((500, 300, 501), (64, 27))), uri, None)
    assert check_levels(uri, pixels) == 3
    assert zarr.open_array(f"{uri}/0").chunks == (500, 64)


def test_metadata_are_those_of_ome_zarr(stored):
    image = OmeImage.from_zarr(zarr.open_group(stored, mode="r"))
    (multiscale,) = image.ome_attributes.multiscales
    assert multiscale.name == "prediction_toy_00_26"
    assert [(axis.name, axis.type, axis.unit) for axis in multiscale.axes] == [
        ("y", "space", "micrometer"),
        ("x", "space", "micrometer"),
    ]
    for level, dataset in enumerate(multiscale.datasets):
        scale, place = dataset.coordinateTransformations
        assert scale.scale == pytest.approx([7.91 * 2**level] * 2)
        # The outer corner of the first pixel is that of the picture, whatever the level.
        corner = np.array(place.translation) - np.array(scale.scale) / 2
        assert corner == pytest.approx([(100 - 0.5) * 7.91, (40 - 0.5) * 7.91])
    group = zarr.open_group(stored, mode="r")
    assert Provenance.from_json(group.attrs["inkdask"], stored) == PROVENANCE


def test_metadata_without_pixel_size_have_no_unit(tmp_path, pixels):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(pixels), uri, None)
    image = OmeImage.from_zarr(zarr.open_group(uri, mode="r"))
    assert {axis.unit for axis in image.ome_attributes.multiscales[0].axes} <= {None}
    assert open_picture(uri).pixel_um is None


def test_opened_picture_has_levels_place_and_provenance(stored, pixels):
    picture = open_picture(stored)
    assert (picture.pixel_um, picture.corner) == (pytest.approx(7.91), (100, 40))
    assert picture.provenance == PROVENANCE
    assert picture.shape == pixels.shape
    assert np.array_equal(picture.level(1).compute(), halve(pixels))
    assert picture.level(5).shape == (41, 3)
    assert np.array_equal(picture.levels[0][600, 5:80].compute(), pixels[600, 5:80])
    part = picture.crop((50, 110, 60, 130))
    assert np.array_equal(part.levels[0].compute(), pixels[10:30, 10:20])
    assert part.corner == (110, 50)
    for beyond in ((0, 0, 10, 10), (50, 110, 50, 130)):
        with pytest.raises(SettingsError, match="shows 40,100,131,1401 of"):
            picture.crop(beyond)


def test_opened_picture_outlives_its_pickle(stored, pixels):
    picture = pickle.loads(pickle.dumps(open_picture(stored)))
    assert np.array_equal(picture.level(1).compute(), halve(pixels))


def test_plain_array_is_a_picture(tmp_path, pixels):
    uri = str(tmp_path / "somebody.zarr")
    zarr.create_array(uri, data=pixels, chunks=(100, 100))
    picture = open_picture(uri)
    assert np.array_equal(picture.level(2).compute(), halve(halve(pixels)))
    assert picture.provenance is None


def test_picture_with_damaged_provenance_opens_with_a_warning(tmp_path, stored, caplog):
    uri = shutil.copytree(stored, str(tmp_path / "p.zarr"))
    group = zarr.open_group(uri, mode="r+")
    group.attrs["inkdask"] = {"fingerprint": {"format": 3}}
    assert open_picture(uri).provenance is None
    assert "p.zarr does not say what it was made of as this version" in caplog.text


def test_other_paths_are_no_pictures(tmp_path):
    with pytest.raises(InkdaskError, match="does not exist"):
        open_picture(str(tmp_path / "nothing"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(InkdaskError, match="no zarr array"):
        open_picture(str(tmp_path / "folder"))
    zarr.create_array(str(tmp_path / "volume.zarr"), data=np.zeros((3, 4, 5), np.uint8))
    with pytest.raises(InkdaskError, match="no picture"):
        open_picture(str(tmp_path / "volume.zarr"))
    with pytest.raises(InkdaskError, match="tile grid"):
        open_picture(store_in(tmp_path).uri)
    assert not any(is_picture(str(path)) for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda place: shutil.rmtree(place / "1"), r"p\.zarr/1 does not exist"),
        (
            lambda place: (place / "1" / "zarr.json").write_text("{"),
            r"p\.zarr.* cannot be read \(J",
        ),
        (lambda place: (place / "zarr.json").write_text("{"), r"p\.zarr cannot be read \(JSOND"),
        (
            lambda place: zarr.create_group(str(place / "1"), overwrite=True),
            r"p\.zarr/1 is a zarr group, not an array",
        ),
        (
            lambda place: zarr.open_group(str(place)).attrs.update(ome={"multiscales": [{}]}),
            r"p\.zarr cannot be read \(KeyError",
        ),
    ],
)
def test_damaged_picture_is_reported_in_one_sentence(tmp_path, stored, spoil, message):
    shutil.copytree(stored, tmp_path / "p.zarr")
    spoil(tmp_path / "p.zarr")
    for opened in (open_picture, describe):
        with pytest.raises(InkdaskError, match=message) as caught:
            opened(str(tmp_path / "p.zarr"))
        assert "\n" not in str(caught.value)


def test_new_picture_replaces_the_old_one(home, pixels):
    uri = storage.join(home, "p.zarr")
    # The second has no data, so that zarr writes no object of it.
    for picture, levels in ((pixels, 3), (np.zeros((600, 7), np.uint8), 2)):
        write_pyramid(lazy(picture), uri, None)
        opened = open_picture(uri)
        assert np.array_equal(opened.levels[0].compute(), picture)
        assert len(opened.levels) == levels


def test_failed_job_leaves_the_old_picture(tmp_path, pixels, stored, monkeypatch):
    monkeypatch.setattr(engine, "PAUSE", 0.01)
    uri = shutil.copytree(stored, str(tmp_path / "p.zarr"))

    def broken(block):
        raise OSError("the disk is gone")

    with pytest.raises(InkdaskError, match=r"^OSError: the disk is gone\.$"):
        write_pyramid(lazy(pixels).map_blocks(broken, dtype=np.uint8), uri, None)
    assert np.array_equal(open_picture(uri).levels[0].compute(), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["p.zarr"]


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ((700,), 700),
        ((1024, 300), 1024),
        ((1024, 1072), 1024),
        ((1, 876), 876),
        ((1, 1024, 9), 1024),
        ((100, 1024, 1500), 1024),
    ],
)
def test_chunk_side_of_a_crop_is_that_of_the_source(sizes, side):
    assert pyramid._side(sizes) == side


def test_array_removed_halfway_is_no_array(tmp_path, monkeypatch):
    place = tmp_path / "picture.zarr"
    zarr.create_group(str(place)).create_array("0", data=np.ones((3, 3)))

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(InkdaskError, match="killed"):
        outputs.remove(str(place))
    assert not place.exists()
    [left] = tmp_path.iterdir()
    assert left.name.startswith("picture.zarr.")
    assert left.suffix == ".unfinished"


def test_array_removed_halfway_on_s3_is_no_array(s3, faults):
    uri = f"{s3}/picture.zarr"
    zarr.create_group(storage.zarr_store(uri)).create_array("0", data=np.ones((3, 3)))
    faults.inject(["403"], match=r"DELETE .*/c/")
    with pytest.raises(InkdaskError, match="denied"):
        outputs.remove(uri)
    assert [entry.name for entry in storage.list_folder(uri)] == ["0"]
    assert [entry.name for entry in storage.list_folder(f"{uri}/0")] == ["c"]


def test_array_without_data_is_removed(home):
    uri = storage.join(home, "empty.zarr")
    zarr.create_array(storage.zarr_store(uri), shape=(3, 3), dtype="u1")
    outputs.remove(uri)
    outputs.remove(uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize(
    ("refused", "arrays"), [("0/c/0/0", []), ("1/c/0/0", []), ("0/zarr.json", ["1", "2"])]
)
def test_picture_copied_halfway_is_no_picture(s3, faults, pixels, refused, arrays):
    uri = f"{s3}/p.zarr"
    faults.inject(["403"], match=rf"PUT .*/p\.zarr/{refused}$")
    with pytest.raises(InkdaskError, match="denied"):
        write_pyramid(lazy(pixels), uri, None)
    faults.inject()
    assert not storage.exists(f"{uri}/zarr.json")
    there = [level for level in "012" if storage.exists(f"{uri}/{level}/zarr.json")]
    assert there == arrays
    for level in there:
        array = zarr.open_array(storage.zarr_store(f"{uri}/{level}"), mode="r")
        assert array[:].any()


def test_writable_place_is_checked_without_a_trace(home):
    outputs.check_writable(storage.join(home, "a", "b.png"))
    assert storage.list_folder(home) == []


def test_place_below_a_link_to_nothing_is_reported(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "gone")
    for place in ("link/a.png", "link/b/a.png"):
        with pytest.raises(InkdaskError, match=rf"{place} cannot be written: .*/link is not a"):
            outputs.check_writable(str(tmp_path / place))
    outputs.check_writable(str(tmp_path / "link"))  # which a file would replace


@pytest.mark.parametrize("length", [240, 245, 255, 256])
def test_name_is_refused_where_its_unfinished_file_has_a_name_too_long(tmp_path, length):
    place = str(tmp_path / ("n" * length))
    if length == 240:
        outputs.check_writable(place)
        storage.write_bytes(place, b"ink")
        return
    with pytest.raises(InkdaskError, match="File name too long"):
        outputs.check_writable(place)


def test_closed_place_is_reported(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(0)
    for place in (closed / "r.txt", closed / "a" / "b.png"):
        with (
            bound_by_rights(),
            pytest.raises(InkdaskError, match=rf"{place}: permission denied\.$"),
        ):
            outputs.check_writable(str(place))


def test_writers_of_one_picture_at_once_all_succeed(tmp_path, pixels):
    uri = str(tmp_path / "p.zarr")
    small = pixels[:200]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: write_pyramid(lazy(small), uri, PROVENANCE), range(40)))
    assert np.array_equal(open_picture(uri).levels[0].compute(), small)
    assert [path.name for path in tmp_path.iterdir()] == ["p.zarr"]


def test_picture_is_drawn_before_another_job_can_replace_it(home, pixels):
    uri, drawn = storage.join(home, "p.zarr"), []

    def draw(place):
        outputs.remove(uri)  # as a job of the same target does
        drawn.append(open_picture(place).levels[0].compute())

    for _ in range(2):
        write_pyramid(lazy(pixels), uri, PROVENANCE, draw=draw)
    assert all(np.array_equal(picture, pixels) for picture in drawn)
    assert [entry.name for entry in storage.list_folder(home)] == ["p.zarr"]


def test_picture_swept_by_another_job_is_not_taken_for_whole(tmp_path, pixels, monkeypatch):
    """A writer that rested for a day is taken for dead, for example on a laptop that slept."""
    monkeypatch.setattr(outputs, "REST", -1)
    monkeypatch.setattr(engine, "PAUSE", 0.01)
    uri = str(tmp_path / "p.zarr")

    def slow(block):
        outputs.sweep(uri)
        return block

    with pytest.raises(InkdaskError, match="give the same command again"):
        write_pyramid(lazy(pixels).map_blocks(slow, dtype=np.uint8), uri, PROVENANCE)
    assert not storage.exists(uri)


def test_step_that_fails_in_a_swept_picture_says_what_to_do(tmp_path, pixels, monkeypatch):
    def swept(*_):
        outputs.sweep(uri)
        raise InkdaskError("the array of level 0 does not exist.")

    monkeypatch.setattr(outputs, "REST", -1)
    monkeypatch.setattr(engine, "compute_each", swept)
    uri = str(tmp_path / "p.zarr")
    with pytest.raises(
        InkdaskError, match=r"\.unfinished was removed: give the same command again"
    ):
        write_pyramid(lazy(pixels), uri, PROVENANCE)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(1301, 91), (1100, 91)])
def test_picture_is_written_in_place_where_nothing_may_be_removed(s3, faults, pixels, shape):
    uri = f"{s3}/p.zarr"
    write_pyramid(lazy(pixels), uri, None)
    faults.inject(["403"], match="^DELETE |POST .*delete")
    again = 255 - pixels[: shape[0]]
    if shape == pixels.shape:
        write_pyramid(lazy(again), uri, PROVENANCE)
        opened = open_picture(uri)
        assert np.array_equal(opened.levels[0].compute(), again)
        assert opened.provenance == PROVENANCE
    else:
        with pytest.raises(InkdaskError, match=r"0 has other chunks, .* without s3:DeleteObject"):
            write_pyramid(lazy(again), uri, PROVENANCE)
        assert not is_picture(uri)
    assert [entry.name for entry in storage.list_folder(s3)] == ["p.zarr"]
