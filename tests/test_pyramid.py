"""The stored picture: an OME-Zarr pyramid that is right, and whole or not there."""

import shutil

import dask.array as da
import numpy as np
import pytest
import zarr
from hypothesis import given
from hypothesis import strategies as st
from ome_zarr_models.v05 import Image as OmeImage

from inkdask import storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import Provenance
from inkdask.information import describe
from inkdask.pictures import pyramid
from inkdask.pictures.picture import is_picture, open_picture
from inkdask.pictures.pyramid import halve, halved, level_shapes, to_uint8, write_pyramid
from inkdask.storage import outputs
from tests.files import bound_by_rights
from tests.jobs import PROVENANCE, store_in


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (1301, 700), dtype=np.uint8)


def lazy(pixels, chunk=256):
    return da.from_array(pixels, chunks=chunk)


def test_grey_values_follow_the_contract():
    values = np.array([-0.1, 0, 0.5, 0.99999, 1, 1.5], np.float32)
    assert to_uint8(values).tolist() == [0, 0, 127, 254, 255, 255]


def test_a_level_averages_two_by_two():
    block = np.array([[0, 1, 10], [1, 1, 20], [7, 8, 255]], np.uint8)
    assert halve(block).tolist() == [[1, 15], [8, 255]]


def test_sizes_end_where_one_look_takes_all_in():
    assert level_shapes((1301, 700)) == [(1301, 700), (651, 350), (326, 175)]
    assert level_shapes((512, 3)) == [(512, 3)]
    assert level_shapes((100_000, 1))[-1] == (391, 1)


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    chunk=st.integers(1, 50),
    times=st.integers(1, 3),
)
def test_levels_are_the_same_stored_or_not(height, width, chunk, times):
    pixels = np.random.default_rng(height).integers(0, 256, (height, width), dtype=np.uint8)
    expected = pixels
    for _ in range(times):
        expected = halve(expected)
    got = halved(lazy(pixels, chunk), times)
    assert got.shape == expected.shape
    assert np.array_equal(got.compute(), expected)


def test_every_level_is_the_mean_of_the_one_before(home, pixels):
    uri = storage.join(home, "prediction.zarr")
    write_pyramid(lazy(pixels), uri, PROVENANCE)
    group = zarr.open_group(storage.zarr_store(uri, read_only=True), mode="r")
    assert sorted(group.array_keys()) == ["0", "1", "2"]
    expected = pixels
    for level in range(3):
        assert group[str(level)].dtype == np.uint8
        assert np.array_equal(group[str(level)][:], expected), level
        expected = halve(expected)
    assert Provenance.from_json(group.attrs["inkdask"], uri) == PROVENANCE
    assert [entry.name for entry in storage.list_folder(home)] == ["prediction.zarr"]


def test_metadata_are_those_of_ome_zarr(tmp_path, pixels):
    uri = str(tmp_path / "prediction_toy_00_26.zarr")
    write_pyramid(lazy(pixels), uri, None, pixel_um=7.91, corner=(100, 40))
    image = OmeImage.from_zarr(zarr.open_group(uri, mode="r"))
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


def test_without_a_size_of_the_pixels_there_is_no_unit(tmp_path, pixels):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(pixels), uri, None)
    image = OmeImage.from_zarr(zarr.open_group(uri, mode="r"))
    assert {axis.unit for axis in image.ome_attributes.multiscales[0].axes} <= {None}
    assert open_picture(uri).pixel_um is None


def test_a_picture_is_opened_as_it_was_written(home, pixels):
    uri = storage.join(home, "p.zarr")
    write_pyramid(lazy(pixels), uri, PROVENANCE, 7.91, (100, 40))
    picture = open_picture(uri)
    assert (picture.pixel_um, picture.corner) == (pytest.approx(7.91), (100, 40))
    assert picture.provenance == PROVENANCE
    assert picture.shape == pixels.shape
    assert np.array_equal(picture.level(1).compute(), halve(pixels))
    assert picture.level(5).shape == (41, 22)
    part = picture.crop((50, 110, 60, 130))
    assert np.array_equal(part.levels[0].compute(), pixels[10:30, 10:20])
    assert part.corner == (110, 50)
    with pytest.raises(SettingsError, match="40,100,740,1401"):
        picture.crop((0, 0, 10, 10))


def test_a_plain_array_is_a_picture_too(tmp_path, pixels):
    uri = str(tmp_path / "somebody.zarr")
    zarr.create_array(uri, data=pixels, chunks=(100, 100))
    picture = open_picture(uri)
    assert np.array_equal(picture.level(2).compute(), halve(halve(pixels)))
    assert picture.provenance is None


def test_damaged_provenance_is_told_and_the_picture_opens(tmp_path, pixels, caplog):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(pixels), uri, PROVENANCE)
    group = zarr.open_group(uri, mode="r+")
    group.attrs["inkdask"] = {"fingerprint": {"format": 3}}
    assert open_picture(uri).provenance is None
    assert "p.zarr does not say what it was made of as this version" in caplog.text


def test_what_is_no_picture_is_said_in_a_sentence(tmp_path):
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
def test_a_damaged_picture_is_one_sentence(tmp_path, pixels, spoil, message):
    write_pyramid(lazy(pixels), str(tmp_path / "p.zarr"), None)
    spoil(tmp_path / "p.zarr")
    for opened in (open_picture, describe):
        with pytest.raises(InkdaskError, match=message) as caught:
            opened(str(tmp_path / "p.zarr"))
        assert "\n" not in str(caught.value)


def test_a_new_picture_replaces_the_old_one(home, pixels):
    uri = storage.join(home, "p.zarr")
    for picture in (pixels, pixels[:100] // 2):
        write_pyramid(lazy(picture, 100), uri, None)
    assert np.array_equal(open_picture(uri).levels[0].compute(), pixels[:100] // 2)
    assert len(open_picture(uri).levels) == 2


def test_a_picture_without_data_is_a_picture(home):
    uri = storage.join(home, "p.zarr")
    for _ in range(2):
        write_pyramid(lazy(np.zeros((600, 700), np.uint8)), uri, None)
    assert not open_picture(uri).level(1).compute().any()


def test_a_failed_job_leaves_the_old_picture(tmp_path, pixels):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(pixels), uri, None)

    def broken(block):
        raise OSError("the disk is gone")

    with pytest.raises(InkdaskError, match=r"^OSError: the disk is gone\.$"):
        write_pyramid(lazy(pixels).map_blocks(broken, dtype=np.uint8), uri, None)
    assert np.array_equal(open_picture(uri).levels[0].compute(), pixels)
    assert [path.name for path in tmp_path.iterdir()] == ["p.zarr"]


def test_a_window_that_begins_inside_a_chunk(tmp_path, pixels):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(lazy(pixels)[100:1290, 30:180], uri, None)
    assert np.array_equal(open_picture(uri).levels[0].compute(), pixels[100:1290, 30:180])


@pytest.mark.parametrize(
    ("sizes", "side"),
    [
        ((700,), 700),
        ((1024, 300), 1024),
        ((1024, 1072), 1024),
        ((1, 876), 876),
        ((1, 1024, 9), 1024),
    ],
)
def test_chunks_are_those_of_the_source_though_a_window_begins_in_one(sizes, side):
    assert pyramid._side(sizes) == side


def test_what_is_removed_halfway_is_no_array(tmp_path, monkeypatch):
    place = tmp_path / "picture.zarr"
    zarr.create_group(str(place)).create_array("0", data=np.ones((3, 3)))

    def killed(*_):
        raise OSError("killed")

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(InkdaskError, match="killed"):
        outputs.remove(str(place))
    assert list(place.iterdir())
    assert not list(place.rglob("zarr.json"))


def test_what_is_removed_halfway_on_s3_is_no_array(s3, faults):
    uri = f"{s3}/picture.zarr"
    zarr.create_group(storage.zarr_store(uri)).create_array("0", data=np.ones((3, 3)))
    faults.inject(["403"], match=r"POST .*delete")
    with pytest.raises(InkdaskError, match="denied"):
        outputs.remove(uri)
    assert [entry.name for entry in storage.list_folder(uri)] == ["0"]
    assert [entry.name for entry in storage.list_folder(f"{uri}/0")] == ["c"]


def test_an_array_without_data_can_be_removed(home):
    uri = storage.join(home, "empty.zarr")
    zarr.create_array(storage.zarr_store(uri), shape=(3, 3), dtype="u1")
    outputs.remove(uri)
    outputs.remove(uri)
    assert not storage.exists(uri)


@pytest.mark.parametrize(
    ("refused", "arrays"), [("0/c/0/0", []), ("1/c/0/0", []), ("0/zarr.json", ["1", "2"])]
)
def test_what_is_copied_halfway_is_no_array(s3, faults, pixels, refused, arrays):
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


def test_a_place_is_checked_without_a_trace(home):
    outputs.check_writable(storage.join(home, "a", "b.png"))
    assert storage.list_folder(home) == []


def test_a_place_that_may_not_be_entered_is_one_sentence(tmp_path):
    closed = tmp_path / "closed"
    closed.mkdir(0)
    for place in (closed / "r.txt", closed / "a" / "b.png"):
        with (
            bound_by_rights(),
            pytest.raises(InkdaskError, match=rf"{place}: permission denied\.$"),
        ):
            outputs.check_writable(str(place))


def test_a_place_where_nothing_can_be_removed_is_named(s3, faults):
    faults.inject(["403"], match="DELETE ")
    with pytest.raises(
        InkdaskError,
        match=rf"^Access to {s3}/b\.png is denied: .* \(s3:DeleteObject\), so .* is left",
    ) as caught:
        outputs.check_writable(f"{s3}/b.png")
    assert "\n" not in str(caught.value)
