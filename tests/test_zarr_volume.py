"""Segments that are zarr arrays: plain, prepared, OME-Zarr, and damaged."""

import itertools
import os
import pickle
import shutil
import time
import tracemalloc

import numcodecs
import numpy as np
import pytest
import zarr

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.reading.volume import MadeOf, Occupied
from inkdask.segment import open_segment
from tests.files import SHAPE, assert_reads, ome, own_messages, random_volume


def create(uri, data, **options):
    array = zarr.create_array(
        storage.zarr_store(str(uri)), shape=data.shape, dtype=data.dtype, **options
    )
    array[:] = data
    return array


@pytest.mark.parametrize(
    ("home", "zarr_format", "dtype", "order"),
    [
        *itertools.product(["local"], [2, 3], ["|u1", "<u2", ">u2"], ["depth first", "depth last"]),
        ("s3", 2, "<u2", "depth last"),
        ("s3", 3, "|u1", "depth first"),
    ],
    indirect=["home"],
)
def test_array_of_every_kind_is_read(home, zarr_format, dtype, order):
    data = random_volume(SHAPE, dtype)
    stored = data if order == "depth first" else np.moveaxis(data, 0, -1)
    chunks = (3, 64, 64) if order == "depth first" else (64, 64, 3)
    uri = storage.join(home, "volume.zarr")
    create(uri, stored, chunks=chunks, zarr_format=zarr_format)
    expected = data if dtype == "|u1" else data >> 8
    assert_reads(open_segment(uri), expected)
    assert_reads(open_segment(uri, (1, 5)), expected[1:5])
    segment = pickle.loads(pickle.dumps(open_segment(uri, (1, 5)).take(slice(None, None, -1))))
    assert segment.layers == (4, 3, 2, 1)
    assert segment.name == "volume"
    assert_reads(segment, expected[4:0:-1])
    assert_reads(segment.crop(slice(7, 50), slice(100, 130)), expected[4:0:-1, 7:50, 100:130])


@pytest.mark.parametrize(
    ("home", "zarr_format"), [("local", 2), ("local", 3), ("s3", 2)], indirect=["home"]
)
def test_identity_of_an_array_changes_when_it_is_written_anew(home, zarr_format):
    uri = storage.join(home, "volume.zarr")
    identities = []
    data = random_volume(SHAPE, "|u1")
    for value in range(2):
        if value and home.startswith("s3"):
            time.sleep(1.1)  # S3 counts whole seconds
        data[0, 0, 0] = value  # not in the middle chunk
        create(uri, data, chunks=(6, 64, 64), zarr_format=zarr_format, overwrite=True)
        identities += [open_segment(uri).identity, open_segment(uri).identity]
    assert identities[0] == identities[1]
    assert identities[2] == identities[3]
    assert identities[0] != identities[2]


def test_identity_of_two_arrays_of_one_group_differs(tmp_path):
    data = random_volume(SHAPE, "|u1")
    uri = str(tmp_path / "x.zarr")
    group = zarr.create_group(uri, zarr_format=2, attributes=ome("0.4"))
    for level in "01":
        group.create_array(level, data=data, chunks=(3, 32, 32))
        os.utime(f"{uri}/{level}/.zarray", (10**9, 10**9))
        os.utime(f"{uri}/{level}/.zattrs", (10**9, 10**9))
    assert open_segment(uri).identity != open_segment(uri, level="1").identity
    assert open_segment(uri).identity == open_segment(storage.join(uri, "0")).identity


@pytest.mark.parametrize("shards", [None, (6, 64, 64)])
def test_identity_of_an_array_changes_with_its_middle_chunk(tmp_path, shards):
    uri = str(tmp_path / "x.zarr")
    identities = []
    array = create(uri, np.zeros(SHAPE, "|u1"), chunks=(6, 32, 32), shards=shards)
    array[:, :32, :32] = 1
    for value in (0, 1, 2):
        array[:, 64:96, 64:96] = value
        identities.append(open_segment(uri).identity)
    assert len(set(identities)) == 3


@pytest.mark.parametrize(("thickness", "reads_all"), [(2, False), (4, True), (8, True)])
def test_cost_of_an_array_is_what_a_read_fetches(tmp_path, thickness, reads_all):
    data = random_volume((8, 64, 96), "<u2")
    create(tmp_path / "x.zarr", data, chunks=(thickness, 32, 32), compressors=None)
    source = open_segment(tmp_path / "x.zarr", (4, 8)).take(slice(None, None, -1)).source
    assert source.reads_all_layers is reads_all
    assert source.can_be_sampled
    for part in (source, source.take(slice(1, 2))):
        for window in ((slice(0, 64), slice(0, 96)), (slice(31, 33), slice(0, 32))):
            part.block(*window).read()  # opens the array
            before = storage.counters().bytes_read
            part.block(*window).read()
            assert part.cost(*window) == storage.counters().bytes_read - before


def test_prepared_array_says_what_it_is_made_of_and_where_data_are(tmp_path):
    said = {"uri": "/data/seg", "identity": "abc", "layers": [3, 4], "compressed": False}
    occupied = {"side": 16, "share": [[0, 0.5], [1, 0]]}
    create(
        tmp_path / "x.zarr",
        random_volume((2, 30, 20), "|u1"),
        chunks=(2, 8, 8),
        attributes={"prepared_from": said, "occupied": occupied},
    )
    source = open_segment(tmp_path / "x.zarr").source
    assert source.made_of == MadeOf("/data/seg", "abc", (3, 4))
    assert source.occupancy == Occupied(16, ((0, 0.5), (1, 0)))


def test_array_in_shards_is_read(tmp_path):
    data = random_volume((4, 200, 300), "|u1")
    uri = str(tmp_path / "volume.zarr")
    create(uri, data, chunks=(4, 32, 32), shards=(4, 128, 128))
    segment = open_segment(uri)
    assert "in shards" in segment.source.words
    assert segment.source.unit == (128, 128)
    assert_reads(segment, data)


def test_named_axes_decide_over_lengths(tmp_path):
    """Named axes decide even when the volume is deeper than it is wide."""
    data = random_volume((40, 30, 20), "|u1")
    create(str(tmp_path / "a.zarr"), data, chunks=(40, 8, 8), dimension_names=("z", "y", "x"))
    assert_reads(open_segment(str(tmp_path / "a.zarr")), data)


@pytest.mark.parametrize("order", ["xyz", "zxy", "yxz", "xzy", "yzx", "zyx"])
def test_axes_in_any_order_are_read_by_their_names(tmp_path, order):
    data = random_volume((40, 30, 20), "<u2")
    stored = np.transpose(data, ["zyx".index(axis) for axis in order])
    chunks = {"z": 40, "y": 8, "x": 16}
    sizes = tuple(chunks[axis] for axis in order)
    create(tmp_path / "3.zarr", stored, chunks=sizes, dimension_names=tuple(order.upper()))
    named = {"_ARRAY_DIMENSIONS": list(order)}
    create(tmp_path / "2.zarr", stored, chunks=sizes, zarr_format=2, attributes=named)
    group = zarr.create_group(str(tmp_path / "ome.zarr"), attributes=ome("0.5", order))
    group.create_array("0", data=stored, chunks=sizes)
    old = zarr.create_group(str(tmp_path / "old.zarr"), zarr_format=2, attributes=ome("0.4", order))
    old.create_array("0", data=stored, chunks=sizes)
    for name in ("3.zarr", "2.zarr", "ome.zarr", "ome.zarr/0", "old.zarr", "old.zarr/0"):
        segment = open_segment(str(tmp_path / name), (3, 9))
        assert segment.source.unit == (8, 16)
        assert_reads(segment, data[3:9] >> 8)
        crop = segment.take(slice(None, None, -1)).crop(slice(7, 25), slice(3, 19))
        assert_reads(crop, data[8:2:-1, 7:25, 3:19] >> 8)


@pytest.mark.parametrize(
    ("shape", "options", "layers", "says"),
    [
        ((26, 90, 20), {}, 26, "first, of 26"),
        ((26, 90, 20), {"layers": (0, 18)}, 18, "first, of 26"),
        ((26, 90, 10), {}, 10, "last, of 10"),
        ((26, 90, 10), {"count": 26}, 26, "first, of 26"),
        ((26, 90, 10), {"layers": (0, 20)}, 20, "first, of 26"),
        ((65, 90, 20), {"layers": (30, 48)}, 18, "first, of 65"),
        ((65, 90, 18), {"layers": (30, 48)}, 18, "last, of 18"),  # as the reference tool writes
        ((90, 30, 40), {}, 40, "last, of 40"),
        ((26, 90, 300), {}, 26, ""),
        ((300, 30, 20), {}, 20, ""),
    ],
)
def test_axis_of_layers_without_a_name_is_guessed_and_told(
    tmp_path, caplog, shape, options, layers, says
):
    create(tmp_path / "x.zarr", random_volume(shape, "|u1"), chunks=shape, zarr_format=2)
    segment = open_segment(tmp_path / "x.zarr", **options)
    plane = shape[:2] if shape[2] in (layers, segment.source.numbers[-1] + 1) else shape[1:]
    assert segment.shape == (layers, *plane)
    told = f"x.zarr has axes without names: the {says}, is taken for the layers"
    assert [told in message for message in own_messages(caplog)] == [True] * bool(says)


def test_level_named_itself_has_the_pixels_of_its_group(tmp_path):
    levels = [
        {
            "path": str(n),
            "coordinateTransformations": [{"type": "scale", "scale": [2.4 * 2**n] * 3}],
        }
        for n in range(2)
    ]
    axes = [{"name": axis, "type": "space", "unit": "micrometer"} for axis in "zyx"]
    image = {"version": "0.4", "axes": axes, "datasets": levels}
    uri = str(tmp_path / "x.zarr")
    group = zarr.create_group(uri, zarr_format=2, attributes={"multiscales": [image]})
    for n in range(2):
        group.create_array(str(n), data=random_volume((26, 90, 300), "|u1"), chunks=(26, 64, 64))
    assert open_segment(uri, level="1").pixel_um == open_segment(f"{uri}/1").pixel_um == 4.8


@pytest.mark.parametrize(
    "images", [[], [{}], [3], {}, "odd", [{"datasets": 3}], [{"datasets": [{}]}]]
)
def test_odd_group_above_an_array_does_not_matter(tmp_path, images):
    data = random_volume((10, 30, 300), "|u1")
    group = zarr.create_group(str(tmp_path / "x.zarr"), attributes={"multiscales": images})
    group.create_array("0", data=data, chunks=(10, 8, 8))
    assert_reads(open_segment(tmp_path / "x.zarr/0"), data)


def test_volume_of_millions_of_blocks_is_refused(tmp_path):
    uri = str(tmp_path / "x.zarr")
    array = zarr.create_array(uri, shape=(10**6, 10**5, 10**5), chunks=(16,) * 3, dtype="u1")
    array[:16, :16, :16] = 1
    with pytest.raises(InkdaskError, match=r"x\.zarr is read in [\d,]{10,} blocks, and at most"):
        open_segment(uri).volume  # noqa: B018
    assert open_segment(uri, (0, 26)).crop(slice(0, 100), slice(0, 100)).volume.shape


def test_rows_are_not_taken_for_layers_that_are_missing(tmp_path):
    create(tmp_path / "x.zarr", random_volume((300, 90, 20), "|u1"), chunks=(64, 64, 20))
    with pytest.raises(InkdaskError, match="26 layers are wanted of .*, but it has 20"):
        open_segment(tmp_path / "x.zarr", count=26)


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        (
            (26, 10**6, 10**6),
            "has 26 layers of 1,000,000 x 1,000,000 pixels .*, and .* coarser",
        ),
        ((26, 1, 10**12), "has 26 layers of 1,000,000,000,000 x 1 pixels"),
        ((10**12, 10**12, 10**12), "has 1,000,000,000,000 layers"),
        ((26, 0, 100), "has no pixels"),
        ((0, 90, 100), "has no pixels"),
    ],
)
def test_array_of_no_or_endless_size_is_refused_at_once(tmp_path, shape, says):
    uri = str(tmp_path / "x.zarr")
    zarr.create_array(uri, shape=shape, chunks=(1, 64, 64), dtype="u1")
    tracemalloc.start()
    with pytest.raises(InkdaskError, match=rf"x\.zarr {says}"):
        open_segment(uri)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_prepared_array_keeps_its_layer_numbers(tmp_path):
    data = random_volume((4, 30, 20), "|u1")
    named = str(tmp_path / "named.zarr")
    create(named, data, chunks=(4, 8, 8), attributes={"layers": [5, 6, 7, 8]})
    segment = open_segment(named, (6, 8))
    assert segment.layers == (6, 7)
    assert_reads(segment, data[1:3])
    with pytest.raises(InkdaskError, match=r"No layers found in .*named\.zarr for START_LAYER=0, "):
        open_segment(named, (0, 4))


def test_array_of_the_reference_tool_is_the_range_asked_for(tmp_path):
    """The range 5 to 9 of an array of four layers is all of it, not layers 5 to 9 of it."""
    data = random_volume((4, 30, 20), "|u1")
    uri = str(tmp_path / "reference.zarr")
    create(uri, np.moveaxis(data, 0, -1), chunks=(8, 8, 4), zarr_format=2)
    segment = open_segment(uri, (5, 9))
    assert segment.layers == (5, 6, 7, 8)
    assert_reads(segment, data)


@pytest.mark.parametrize("is_group", [True, False])
def test_other_arrays_of_that_length_count_from_zero(tmp_path, is_group):
    uri = str(tmp_path / "segment.zarr")
    where = f"{uri}/0" if is_group else uri
    if is_group:
        zarr.create_group(uri, zarr_format=2, attributes=ome("0.4"))
    create(where, random_volume((10, 30, 20), "|u1"), chunks=(10, 8, 8), zarr_format=2)
    assert open_segment(uri, (0, 10)).layers == tuple(range(10))
    with pytest.raises(InkdaskError, match=r"Layer 10 missing in .* START_LAYER=1, END_LAYER=11"):
        open_segment(uri, (1, 11))
    with pytest.raises(InkdaskError, match=r"No layers found in .*: it has 10, 00 to 09"):
        open_segment(uri, (20, 30))


@pytest.mark.parametrize(
    ("home", "version", "zarr_format"),
    [("local", "0.4", 2), ("local", "0.5", 3), ("s3", "0.4", 2)],
    indirect=["home"],
)
def test_levels_of_ome_zarr_are_read(home, version, zarr_format):
    data = random_volume((10, 60, 70), "|u1")
    uri = storage.join(home, "segment.zarr")
    group = zarr.create_group(
        storage.zarr_store(uri), zarr_format=zarr_format, attributes=ome(version)
    )
    for level, pixels in enumerate([data, data[::2, ::2, ::2]]):
        array = group.create_array(str(level), shape=pixels.shape, chunks=(10, 32, 32), dtype="u1")
        array[:] = pixels
    assert_reads(open_segment(uri, count=4), data[3:7])
    assert_reads(open_segment(uri, level="1"), data[::2, ::2, ::2])
    assert_reads(open_segment(storage.join(uri, "1")), data[::2, ::2, ::2])
    with pytest.raises(InkdaskError, match=r"segment\.zarr has no level '7'; it has 0, 1"):
        open_segment(uri, level="7")


def test_level_zero_is_the_first_that_is_listed(tmp_path):
    data = random_volume((10, 60, 70), "|u1")
    attributes = ome("0.5")
    attributes["ome"]["multiscales"][0]["datasets"] = [{"path": "s0"}, {"path": "images/s1"}]
    uri = str(tmp_path / "x.zarr")
    group = zarr.create_group(uri, attributes=attributes)
    group.create_array("s0", data=data, chunks=(10, 32, 32))
    group.create_array("images/s1", data=data[:, ::2, ::2], chunks=(10, 32, 32))
    for level in ("0", "s0"):
        assert_reads(open_segment(uri, level=level), data)
        assert open_segment(uri, level=level).level == level
    assert_reads(open_segment(uri, level="1"), data[:, ::2, ::2])
    with pytest.raises(InkdaskError, match=r"has no level '2'; it has s0, images/s1"):
        open_segment(uri, level="2")


def test_axes_of_length_one_are_ignored(tmp_path):
    data = random_volume((4, 30, 20), "|u1")
    group = zarr.create_group(str(tmp_path / "x.zarr"), attributes=ome("0.5", "tczyx"))
    array = group.create_array("0", shape=(1, 1, 4, 30, 20), chunks=(1, 1, 4, 8, 8), dtype="u1")
    array[0, 0] = data
    assert_reads(open_segment(str(tmp_path / "x.zarr")), data)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 30, 20), "f4"), "no array of uint8 or uint16, but float32"),
        (np.zeros((30, 20), "u1"), "no volume: its shape is"),
        (np.zeros((2, 4, 30, 20), "u1"), "no volume: its shape is"),
    ],
)
def test_array_that_is_no_volume_is_refused(tmp_path, data, message):
    create(str(tmp_path / "x.zarr"), data, chunks=data.shape)
    with pytest.raises(InkdaskError, match=rf"x\.zarr is {message}"):
        open_segment(str(tmp_path / "x.zarr"))


def test_group_without_arrays_is_refused(tmp_path):
    zarr.create_group(str(tmp_path / "x.zarr"))
    with pytest.raises(InkdaskError, match=r"x\.zarr is a zarr group without an array '0'"):
        open_segment(str(tmp_path / "x.zarr"))


def cut_off(path):
    path.write_bytes(path.read_bytes()[:40])


def with_unknown_codec(path):
    path.write_text(path.read_text().replace('"zstd"', '"of tomorrow"'))


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda group, _: shutil.rmtree(group / "0"), r"x\.zarr/0 does not exist"),
        (lambda group, name: (group / "0" / name).unlink(), r"x\.zarr/0 is no zarr array and no "),
        (lambda group, name: cut_off(group / "0" / name), r"x\.zarr/0 cannot be read \(JSONDecode"),
        (
            lambda group, name: with_unknown_codec(group / "0" / name),
            r"x\.zarr/0 cannot .*tomorrow",
        ),
    ],
)
def test_damaged_array_is_named(tmp_path, zarr_format, spoil, message):
    uri = tmp_path / "x.zarr"
    version = {2: "0.4", 3: "0.5"}[zarr_format]
    group = zarr.create_group(str(uri), zarr_format=zarr_format, attributes=ome(version))
    codec = {2: numcodecs.Zstd(), 3: zarr.codecs.ZstdCodec()}[zarr_format]
    group.create_array("0", data=random_volume((4, 30, 20), "|u1"), compressors=codec)
    spoil(uri, {2: ".zarray", 3: "zarr.json"}[zarr_format])
    with pytest.raises(InkdaskError, match=message) as caught:
        open_segment(str(uri))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [".zgroup", ".zattrs", "zarr.json"])
def test_damaged_group_is_named(tmp_path, name):
    uri = tmp_path / "x.zarr"
    zarr_format = 3 if name == "zarr.json" else 2
    zarr.create_group(str(uri), zarr_format=zarr_format, attributes=ome("0.4"))
    cut_off(uri / name) if name != ".zgroup" else (uri / name).write_text("{")
    with pytest.raises(InkdaskError, match=r"x\.zarr cannot be read \(JSONDecodeError"):
        open_segment(str(uri))


def test_multiscales_without_paths_are_named(tmp_path):
    attributes = {"multiscales": [{"version": "0.4", "datasets": [{}]}]}
    zarr.create_group(str(tmp_path / "x.zarr"), zarr_format=2, attributes=attributes)
    with pytest.raises(InkdaskError, match=r"x\.zarr cannot be read \(KeyError: 'path'\)\.$"):
        open_segment(str(tmp_path / "x.zarr"))


def test_group_in_the_place_of_a_level_is_named(tmp_path):
    """As bioformats2raw writes them: the image is a group inside the group."""
    outer = zarr.create_group(str(tmp_path / "x.zarr"), zarr_format=2)
    inner = outer.create_group("0", attributes=ome("0.4"))
    data = random_volume((4, 30, 20), "|u1")
    inner.create_array("0", data=data)
    with pytest.raises(
        InkdaskError, match=r"x\.zarr/0 is a zarr group, .*: name that group itself"
    ):
        open_segment(str(tmp_path / "x.zarr"))
    assert_reads(open_segment(str(tmp_path / "x.zarr" / "0")), data)


def test_corrupt_chunk_names_array_and_position(tmp_path):
    uri = tmp_path / "x.zarr"
    create(str(uri), random_volume((4, 64, 64), "|u1"), chunks=(4, 32, 32))
    (uri / "c" / "0" / "1" / "0").write_bytes(b"spoiled")
    segment = open_segment(str(uri))
    with pytest.raises(
        InkdaskError, match=r"x\.zarr cannot be read at rows 0 to 64, columns 0 to 64"
    ):
        segment.volume.compute()


@pytest.mark.parametrize("attributes", ["[]", "7", '"text"'])
def test_attributes_that_are_no_object_are_named(tmp_path, attributes):
    uri = tmp_path / "x.zarr"
    create(str(uri), random_volume((4, 30, 20), "|u1"), chunks=(4, 8, 8), zarr_format=2)
    (uri / ".zattrs").write_text(attributes)
    with pytest.raises(InkdaskError, match=r"x\.zarr cannot be read \(TypeError: its attributes"):
        open_segment(str(uri))


@pytest.mark.parametrize(
    "numbers",
    [[0, 1, 2], [3, 2, 1, 0], [1, 1, 2, 3], ["a", 1, 2, 3], [0, 1, 2, 3.0], [-1, 0, 1, 2], 5, [{}]],
)
def test_numbers_that_are_not_those_of_the_layers_are_refused(tmp_path, numbers):
    uri = str(tmp_path / "x.zarr")
    data = random_volume((4, 30, 20), "|u1")
    create(uri, data, chunks=(4, 8, 8), attributes={"layers": numbers})
    with pytest.raises(
        InkdaskError, match=r"x\.zarr (cannot be read|does not number its 4 layers)"
    ):
        open_segment(uri)


def test_bucket_that_is_gone_is_no_volume_of_zeros(s3):
    data = random_volume((4, 30, 20), "|u1")
    create(f"{s3}/x.zarr", data, chunks=(4, 8, 8))
    segment = open_segment(f"{s3}/x.zarr")
    assert_reads(segment, data)
    storage.s3_filesystem().rm(s3, recursive=True)
    with pytest.raises(InkdaskError, match=r"x\.zarr cannot be read at rows 0 .*does not exist\.$"):
        segment.volume.compute()
