"""Segments as they are in buckets and on disks: found, checked, described, and refused by name."""

import logging
import pickle
import shutil
import time

import dask
import imagecodecs
import numcodecs
import numpy as np
import pytest
import tifffile
import zarr

from inkdask import storage
from inkdask.reading import images, volume
from inkdask.segment import Segment, _name, describe, open_segment
from inkdask.storage import s3 as s3_module
from inkdask.storage.parallel import THREADS
from inkdask.types import InkdaskError
from tests.files import encode, random_volume, write_layers

SHAPE = (6, 100, 130)


@pytest.fixture
def pixels():
    return random_volume(SHAPE)


def assert_reads(segment, expected):
    assert segment.shape == expected.shape
    np.testing.assert_array_equal(segment.volume.compute(scheduler="synchronous"), expected)


# Where layers are.


@pytest.mark.parametrize("folder", ["layers", "surface_volume", "", "20240301.tifs"])
@pytest.mark.parametrize("digits", [2, 3])
def test_layers_are_found(home, folder, digits, pixels):
    where = storage.join(home, "20240301", folder) if folder else storage.join(home, "20240301")
    write_layers(where, pixels, digits=digits)
    storage.write_bytes(storage.join(where, "composite.png"), b"not a layer")
    segment = open_segment(storage.join(home, "20240301"))
    assert segment.name == "20240301"
    assert segment.layers == tuple(range(6))
    assert segment.dtype == np.uint16
    assert_reads(segment, pixels >> 8)


def test_a_slash_at_the_end_changes_nothing(home, pixels):
    write_layers(storage.join(home, "a.tifs"), pixels)
    segment = open_segment(storage.join(home, "a.tifs") + "/")
    assert segment.name == "a"
    assert_reads(segment, pixels >> 8)


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("s3://bucket/scroll/20230702/", "20230702"),
        ("/data/20230702/layers", "20230702"),
        ("/data/20230702.tifs/", "20230702"),
        ("surface.zarr", "surface"),
        ("/", "segment"),
        (".", "20230702"),
        ("layers/", "20230702"),
    ],
)
def test_name(path, name, tmp_path, monkeypatch):
    (tmp_path / "20230702").mkdir()
    monkeypatch.chdir(tmp_path / "20230702")
    assert _name(path) == name


@pytest.mark.parametrize("suffix", ["png", "jpg", "jpeg", "tiff", "TIF"])
def test_layers_of_other_kinds(home, suffix):
    layers = random_volume(SHAPE, "|u1")
    for number, layer in enumerate(layers):
        if suffix.lower().startswith("tif"):
            data = encode(layer)
        else:
            codec = imagecodecs.png_encode if suffix == "png" else imagecodecs.jpeg_encode
            data = codec(layer)
        storage.write_bytes(storage.join(home, "layers", f"{number:02d}.{suffix}"), data)
    segment = open_segment(home)
    assert segment.dtype == np.uint8
    got = segment.volume.compute().astype(int)
    assert np.abs(got - layers).max() <= (60 if suffix.startswith("jp") else 0)
    assert np.abs(got - layers).mean() <= (5 if suffix.startswith("jp") else 0)


def test_colour_layers_warn_once(tmp_path, caplog, pixels):
    colours = np.stack([pixels, pixels // 2, pixels // 3], axis=-1)
    write_layers(tmp_path, colours, photometric="rgb")
    with caplog.at_level(logging.WARNING, "inkdask"):
        segment = open_segment(str(tmp_path))
    [warning] = caplog.messages
    assert "00.tif has 3 channels, of which the first is read (6 such layers)" in warning
    assert_reads(segment, pixels >> 8)


def test_a_jpeg_whose_size_comes_late(tmp_path, pixels):
    """After a preview or a profile of hundreds of kilobytes."""
    data = imagecodecs.jpeg_encode(pixels[0] >> 8 if pixels.dtype == np.uint16 else pixels[0])
    segment = b"\xff\xe2" + (65535).to_bytes(2, "big") + bytes(65533)
    (tmp_path / "00.jpg").write_bytes(data[:2] + 3 * segment + data[2:])
    assert open_segment(str(tmp_path)).shape == (1, *pixels.shape[1:])


def test_sixteen_bit_png(tmp_path, pixels):
    for number, layer in enumerate(pixels):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    segment = open_segment(str(tmp_path))
    assert segment.dtype == np.uint16
    assert_reads(segment, pixels >> 8)


# Which layers are read.


@pytest.mark.parametrize(
    ("first", "options", "layers"),
    [
        (0, {}, range(6)),
        (0, {"layers": (2, 5)}, range(2, 5)),
        (3, {"layers": (5, 9)}, range(5, 9)),
        (0, {"window": 4}, range(1, 5)),
        (10, {"window": 3}, range(11, 14)),
        (0, {"layers": (1, 3), "window": 4}, range(1, 3)),
    ],
)
def test_choice_of_layers(tmp_path, first, options, layers, pixels, caplog):
    write_layers(tmp_path / "layers", pixels, first=first)
    with caplog.at_level(logging.DEBUG, "inkdask"):
        segment = open_segment(str(tmp_path), **options)
    assert segment.layers == tuple(layers)
    assert f"layers {' '.join(map(str, layers))} are read, in this order" in caplog.text
    assert_reads(segment, (pixels >> 8)[[number - first for number in layers]])


@pytest.mark.parametrize(
    ("layers", "window", "message"),
    [
        (
            (6, 9),
            None,
            "^No layers found in .*/layers for START_LAYER=6, END_LAYER=9: it has 6, 00",
        ),
        ((4, 8), None, "^Layers 06, 07 missing in .*/layers for START_LAYER=4, END_LAYER=8"),
        ((0, 65), None, "^Layers 06, 07, 08, 09, 10, 11, 12, 13 and 51 more missing"),
        (None, 26, "^Channel mismatch: 26 layers are wanted of .*/layers, but it has 6, 00 to 05"),
    ],
)
def test_layers_that_are_not_there(tmp_path, layers, window, message, pixels):
    write_layers(tmp_path / "layers", pixels)
    with pytest.raises(InkdaskError, match=message):
        open_segment(str(tmp_path), layers, window=window)


def test_nothing_there(home):
    for path in ("nothing", "no/such/folder"):
        uri = storage.join(home, path)
        with pytest.raises(
            InkdaskError, match=f"^No layers found in {uri} for START_LAYER=0, END_"
        ):
            open_segment(uri, (0, 26))


def test_a_gap_is_named_when_it_is_inside(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    (tmp_path / "03.tif").unlink()
    for options in ({}, {"window": 4}, {"layers": (2, 6)}):
        with pytest.raises(InkdaskError, match="^Layer 03 missing in"):
            open_segment(str(tmp_path), **options)
    assert open_segment(str(tmp_path), (4, 6)).layers == (4, 5)


@pytest.mark.parametrize("double", ["003.tif", "03.png"])
def test_a_double_layer_names_both_files(tmp_path, double, pixels):
    write_layers(tmp_path, pixels)
    (tmp_path / double).write_bytes(b"whatever")
    with pytest.raises(InkdaskError, match=r"Layer 03 is there twice: .*03\.\w+ and .*03\.\w+\."):
        open_segment(str(tmp_path))
    assert open_segment(str(tmp_path), (0, 3)).layers == (0, 1, 2)


# What is refused.


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            encode(np.zeros((100, 131), "<u2")),
            r"04\.tif has 131 x 100 pixels, the other layers have 13",
        ),
        (
            encode(np.zeros((100, 130), "u1")),
            r"04\.tif has uint8 values, the other layers have uint16",
        ),
        (encode(np.zeros((100, 130), "f4")), r"04\.tif is no TIFF of uint8 or uint16, but float32"),
        (encode(np.zeros((100, 130), "<u2"))[:900], r"04\.tif is truncated: .* has 900 bytes"),
        (b"", r"04\.tif cannot be read as a TIFF"),
        (b"<html>", r"04\.tif cannot be read as a TIFF"),
    ],
)
def test_an_odd_layer_is_named(home, odd, message, pixels):
    write_layers(home, pixels)
    storage.write_bytes(storage.join(home, "04.tif"), odd)
    with pytest.raises(InkdaskError, match=message) as caught:
        open_segment(home)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "data"),
    [("00.png", b"\x89PNG"), ("00.jpg", b"nothing"), ("00.png", b"\x89PNG\r\n\x1a\n" + bytes(30))],
)
def test_a_broken_picture_is_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InkdaskError, match=rf"{name} cannot be read as a PNG or JPEG"):
        open_segment(str(tmp_path))


def test_a_truncated_picture_is_named_when_read(tmp_path, pixels):
    (tmp_path / "00.png").write_bytes(imagecodecs.png_encode(pixels[0])[:-3000])
    segment = open_segment(str(tmp_path))
    with pytest.raises(InkdaskError, match=r"00\.png is truncated or corrupt"):
        segment.volume.compute()


def test_a_file_that_shrinks_later_is_named(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = open_segment(str(tmp_path))
    (tmp_path / "02.tif").write_bytes(b"")
    with pytest.raises(InkdaskError, match=r"02\.tif is truncated: bytes"):
        segment.volume.compute()


def test_denied_and_missing_buckets_are_one_sentence(s3, faults):
    with pytest.raises(InkdaskError, match="^The bucket of s3://not-there/seg does not exist"):
        open_segment("s3://not-there/seg")
    faults.inject(["403"])
    with pytest.raises(InkdaskError, match=f"^Access to {s3}/seg is denied"):
        open_segment(f"{s3}/seg")


def test_a_server_that_falls_silent_after_the_listing(s3, faults, monkeypatch, pixels):
    write_layers(f"{s3}/layers", pixels)
    monkeypatch.setattr(s3_module, "READ_TIMEOUT", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "silent")
    faults.inject(["stall"], match=r"GET .*\.tif")
    with pytest.raises(InkdaskError, match=rf"^{s3}/layers/0\d\.tif does not answer"):
        open_segment(s3)


# The lazy volume.


def test_nothing_is_read_when_it_is_built(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = open_segment(str(tmp_path))
    before = storage.counters()
    array = segment.volume
    assert array.dtype == np.uint8
    assert array.shape == SHAPE
    assert array[:, 10:20].sum().dask
    assert storage.counters() == before


def test_names_follow_from_the_files(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    first = open_segment(str(tmp_path))
    assert first.volume.name == open_segment(str(tmp_path)).volume.name
    assert first.identity == pickle.loads(pickle.dumps(first)).identity
    others = [
        open_segment(str(tmp_path), (0, 5)),
        first.take(slice(None, None, -1)),
        first.crop(slice(0, 50), slice(0, 50)),
        first.crop(slice(0, 50), slice(50, 100)),
    ]
    write_layers(tmp_path, pixels[:1] + 256)
    others.append(open_segment(str(tmp_path)))
    assert others[-1].identity != first.identity
    names = [segment.volume.name for segment in [first, *others]]
    assert len(set(names)) == len(names)


def test_tasks_survive_a_journey(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = pickle.loads(pickle.dumps(open_segment(str(tmp_path))))
    assert isinstance(segment, Segment)
    graph = pickle.loads(pickle.dumps(dict(segment.volume.__dask_graph__())))
    [block] = dask.get(graph, segment.volume.__dask_keys__()[0][0])
    np.testing.assert_array_equal(block, pixels >> 8)


@pytest.mark.parametrize(
    ("shape", "options", "steps"),
    [
        ((26, 4000, 4000), {}, (256, 4000)),
        ((26, 4000, 100_000), {}, (8, 100_000)),
        ((26, 4000, 4000), {"unit": (17, 4000)}, (272, 4000)),
        ((26, 4000, 4000), {"unit": (256, 256)}, (1024, 1024)),
        ((62, 4000, 4000), {"unit": (256, 256)}, (512, 1024)),
        ((109, 4000, 4000), {"unit": (128, 128)}, (512, 512)),
        ((26, 100, 300), {"unit": (256, 256)}, (100, 300)),
        ((1, 9000, 9000), {"unit": (1, 9000)}, (1024, 9000)),
        ((26, 9000, 9000), {"unit": (4096, 4096)}, (4096, 4096)),
    ],
)
def test_blocks_follow_the_files(shape, options, steps):
    unit = options.get("unit", (1, shape[2]))
    assert volume.block_step(shape, unit) == steps


def test_crop(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = open_segment(str(tmp_path)).crop(slice(10, 90), slice(20, 130))
    assert_reads(segment, (pixels >> 8)[:, 10:90, 20:130])
    assert_reads(segment.crop(slice(5, 6), slice(0, 110)), (pixels >> 8)[:, 15:16, 20:130])
    for rows, columns in [
        ((0, 81), (0, 1)),
        ((5, 5), (0, 1)),
        ((0, 1), (-1, 4)),
        ((0, 1), (9, 111)),
    ]:
        with pytest.raises(InkdaskError, match="are no window of .* 80 x 110 pixels"):
            segment.crop(slice(*rows), slice(*columns))


def test_reading_through_faults_gives_the_same(s3, faults, pixels):
    write_layers(f"{s3}/layers", pixels, tile=(32, 32), compression="zlib")
    faults.inject(["503", "truncate", "500", "reset"], every=3)
    before = storage.counters()
    assert_reads(open_segment(s3), pixels >> 8)
    retries = (storage.counters() - before).retries
    injected = faults.injected()
    assert sum(injected.values()) >= 4
    # The HTTP client itself repeats a request whose idle connection was dropped.
    assert sum(injected.values()) - injected["reset"] <= retries <= sum(injected.values())


# Layers that cannot be read in parts.


@pytest.mark.parametrize("kind", ["one-strip", "png"])
def test_what_cannot_be_cut_is_decoded_once(tmp_path, kind, monkeypatch, caplog):
    monkeypatch.setattr(volume, "BLOCK_SIDE", 64)
    monkeypatch.setattr(volume, "BLOCK_BYTES", 3 * 64 * 64)
    monkeypatch.setattr(volume, "WHOLE_BYTES", 3 * 64 * 64)
    monkeypatch.setattr(volume, "CHUNK", 64)
    monkeypatch.setattr(images, "CHUNK", 64)
    layers = random_volume((3, 200, 170))
    if kind == "png":
        for number, layer in enumerate(layers):
            (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    else:
        write_layers(tmp_path, layers, compression="lzw")
    with caplog.at_level(logging.WARNING, "inkdask"):
        segment = open_segment(str(tmp_path))
    assert "cannot be read in parts: each process decodes every layer once" in caplog.text
    assert segment.volume.numblocks == (1, 4, 3)
    before = storage.counters()
    for reading in (segment, pickle.loads(pickle.dumps(segment)), open_segment(str(tmp_path))):
        np.testing.assert_array_equal(reading.volume.compute(), layers >> 8)
    read = storage.counters() - before
    assert read.bytes_read <= segment.stored_bytes + 2 * 3 * 70_000  # headers when opened again
    write_layers(tmp_path, layers[:1] + 512, compression="lzw")
    if kind == "one-strip":
        changed = open_segment(str(tmp_path)).volume.compute()
        np.testing.assert_array_equal(changed[0], (layers[0] + 512) >> 8)


def test_many_layers_and_threads_decode_each_layer_once(tmp_path, monkeypatch):
    """More layers than the pool has threads, each read inside it; none may wait for ever."""
    monkeypatch.setattr(volume, "BLOCK_SIDE", 32)
    monkeypatch.setattr(volume, "BLOCK_BYTES", 32 * 32)
    monkeypatch.setattr(volume, "WHOLE_BYTES", 32 * 32)
    monkeypatch.setattr(volume, "CHUNK", 32)
    layers = random_volume((THREADS + 5, 64, 64))
    write_layers(tmp_path, layers, compression="lzw")
    segment = open_segment(str(tmp_path))
    assert segment.volume.numblocks == (1, 2, 2)
    before = storage.counters()
    got = segment.volume.compute(scheduler="threads", num_workers=4)
    np.testing.assert_array_equal(got, layers >> 8)
    assert (storage.counters() - before).requests == THREADS + 5


def test_scratch_lies_with_the_worker(tmp_path, pixels):
    distributed = pytest.importorskip("distributed")
    for number, layer in enumerate(pixels):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    segment = open_segment(str(tmp_path))
    scratch = tmp_path / "scratch"
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            dashboard_address=None,
            local_directory=str(scratch),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        np.testing.assert_array_equal(client.compute(segment.volume).result(), pixels >> 8)
        assert list(scratch.rglob("inkdask-scratch-*/0.zarr"))
    assert not list(scratch.rglob("*.zarr"))


# zarr arrays.


def create(uri, data, **options):
    array = zarr.create_array(
        storage.zarr_store(uri), shape=data.shape, dtype=data.dtype, **options
    )
    array[:] = data
    return array


@pytest.mark.parametrize("zarr_format", [2, 3])
@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u2"])
@pytest.mark.parametrize("order", ["depth first", "depth last"])
def test_zarr_arrays(home, zarr_format, dtype, order):
    data = random_volume(SHAPE, dtype)
    stored = data if order == "depth first" else np.moveaxis(data, 0, -1)
    chunks = (3, 32, 32) if order == "depth first" else (32, 32, 3)
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


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_an_array_that_is_written_anew_is_another(home, zarr_format):
    uri = storage.join(home, "volume.zarr")
    identities = []
    for seed in range(2):
        data = random_volume(SHAPE, "|u1", seed)
        create(uri, data, chunks=(3, 32, 32), zarr_format=zarr_format, overwrite=True)
        identities += [open_segment(uri).identity, open_segment(uri).identity]
        time.sleep(1.1)  # a second: S3 counts no finer
    assert identities[0] == identities[1]
    assert identities[2] == identities[3]
    assert identities[0] != identities[2]


def test_sharded_zarr(home):
    data = random_volume((4, 200, 300), "|u1")
    uri = storage.join(home, "volume.zarr")
    create(uri, data, chunks=(4, 32, 32), shards=(4, 128, 128))
    segment = open_segment(uri)
    assert "in shards" in describe(segment).layout
    assert segment.source.unit == (128, 128)
    assert_reads(segment, data)


def test_axes_by_name(tmp_path):
    """Named axes decide even when the volume is deeper than it is wide."""
    data = random_volume((40, 30, 20), "|u1")
    create(str(tmp_path / "a.zarr"), data, chunks=(40, 8, 8), dimension_names=("z", "y", "x"))
    assert_reads(open_segment(str(tmp_path / "a.zarr")), data)


def test_a_prepared_array_keeps_its_layer_numbers(tmp_path):
    data = random_volume((4, 30, 20), "|u1")
    named = str(tmp_path / "named.zarr")
    create(named, data, chunks=(4, 8, 8), attributes={"layers": [5, 6, 7, 8]})
    segment = open_segment(named, (6, 8))
    assert segment.layers == (6, 7)
    assert_reads(segment, data[1:3])
    with pytest.raises(InkdaskError, match=r"No layers found in .*named\.zarr for START_LAYER=0, "):
        open_segment(named, (0, 4))


def test_an_array_made_for_the_range_counts_it_once(tmp_path):
    """The range 5 to 9 of an array of four layers is all of it, not layers 5 to 9 of it."""
    data = random_volume((4, 30, 20), "|u1")
    uri = str(tmp_path / "reference.zarr")
    create(uri, np.moveaxis(data, 0, -1), chunks=(8, 8, 4), zarr_format=2)
    segment = open_segment(uri, (5, 9))
    assert segment.layers == (5, 6, 7, 8)
    assert_reads(segment, data)


@pytest.mark.parametrize("is_group", [True, False])
def test_other_arrays_count_from_zero_though_the_range_is_as_long(tmp_path, is_group):
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


def ome(version, axes="zyx"):
    multiscales = [
        {
            "version": version,
            "axes": [{"name": axis, "type": "space"} for axis in axes],
            "datasets": [{"path": "0"}, {"path": "1"}],
        }
    ]
    return (
        {"multiscales": multiscales} if version == "0.4" else {"ome": {"multiscales": multiscales}}
    )


@pytest.mark.parametrize(("version", "zarr_format"), [("0.4", 2), ("0.5", 3)])
def test_ome_zarr(home, version, zarr_format):
    data = random_volume((10, 60, 70), "|u1")
    uri = storage.join(home, "segment.zarr")
    group = zarr.create_group(
        storage.zarr_store(uri), zarr_format=zarr_format, attributes=ome(version)
    )
    for level, pixels in enumerate([data, data[::2, ::2, ::2]]):
        array = group.create_array(str(level), shape=pixels.shape, chunks=(10, 16, 16), dtype="u1")
        array[:] = pixels
    assert_reads(open_segment(uri, window=4), data[3:7])
    assert_reads(open_segment(uri, level="1"), data[::2, ::2, ::2])
    assert_reads(open_segment(storage.join(uri, "1")), data[::2, ::2, ::2])
    with pytest.raises(InkdaskError, match=r"segment\.zarr has no level '7'; it has 0, 1"):
        open_segment(uri, level="7")


def test_singleton_axes_do_not_count(tmp_path):
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
def test_other_arrays_are_refused(tmp_path, data, message):
    create(str(tmp_path / "x.zarr"), data, chunks=data.shape)
    with pytest.raises(InkdaskError, match=rf"x\.zarr is {message}"):
        open_segment(str(tmp_path / "x.zarr"))


def test_a_group_without_arrays_is_refused(tmp_path):
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
def test_a_damaged_array_is_one_sentence(tmp_path, zarr_format, spoil, message):
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
def test_a_damaged_group_is_one_sentence(tmp_path, name):
    uri = tmp_path / "x.zarr"
    zarr_format = 3 if name == "zarr.json" else 2
    zarr.create_group(str(uri), zarr_format=zarr_format, attributes=ome("0.4"))
    cut_off(uri / name) if name != ".zgroup" else (uri / name).write_text("{")
    with pytest.raises(InkdaskError, match=r"x\.zarr cannot be read \(JSONDecodeError"):
        open_segment(str(uri))


def test_multiscales_without_paths_are_one_sentence(tmp_path):
    attributes = {"multiscales": [{"version": "0.4", "datasets": [{}]}]}
    zarr.create_group(str(tmp_path / "x.zarr"), zarr_format=2, attributes=attributes)
    with pytest.raises(InkdaskError, match=r"x\.zarr cannot be read \(KeyError: 'path'\)\.$"):
        open_segment(str(tmp_path / "x.zarr"))


def test_a_group_in_the_place_of_a_level_is_named(tmp_path):
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


def test_a_corrupt_chunk_names_array_and_position(tmp_path):
    uri = tmp_path / "x.zarr"
    create(str(uri), random_volume((4, 64, 64), "|u1"), chunks=(4, 32, 32))
    (uri / "c" / "0" / "1" / "0").write_bytes(b"spoiled")
    segment = open_segment(str(uri))
    with pytest.raises(
        InkdaskError, match=r"x\.zarr cannot be read at rows 0 to 64, columns 0 to 64"
    ):
        segment.volume.compute()


# Masks.


def write_mask(uri, mask):
    storage.write_bytes(uri, imagecodecs.png_encode(mask.astype(np.uint8) * 255))


@pytest.fixture
def mask():
    return np.random.default_rng(5).random(SHAPE[1:]) < 0.5


def test_mask_beside_the_layers(home, pixels, mask):
    uri = storage.join(home, "20230702")
    write_layers(storage.join(uri, "layers"), pixels)
    write_mask(storage.join(uri, "20230702_supervision_mask.png"), mask)  # of something else
    assert open_segment(uri).mask is None
    plain = open_segment(uri).identity
    write_mask(storage.join(uri, "20230702_mask.png"), mask)
    segment = pickle.loads(pickle.dumps(open_segment(uri)))
    assert segment.mask_uri == storage.join(uri, "20230702_mask.png")
    assert segment.mask.dtype == bool
    assert segment.identity != plain
    assert open_segment(uri, mask="none").mask is None
    assert open_segment(uri, mask="none").identity == plain
    np.testing.assert_array_equal(segment.mask.compute(), mask)
    cropped = segment.crop(slice(10, 60), slice(70, 120))
    np.testing.assert_array_equal(cropped.mask.compute(), mask[10:60, 70:120])


def test_mask_by_path(tmp_path, pixels, mask):
    write_layers(tmp_path / "layers", pixels)
    write_mask(str(tmp_path / "b_mask.png"), mask)
    assert open_segment(str(tmp_path)).mask is None
    np.testing.assert_array_equal(
        open_segment(str(tmp_path), mask=str(tmp_path / "b_mask.png")).mask.compute(), mask
    )
    tifffile.imwrite(tmp_path / "mask.tif", mask.astype(np.uint8))
    segment = open_segment(str(tmp_path), mask=str(tmp_path / "mask.tif"))
    np.testing.assert_array_equal(segment.mask.compute(), mask)


def test_a_mask_whose_high_bytes_are_zero_is_refused(tmp_path, pixels, mask):
    write_layers(tmp_path / "layers", pixels)
    tifffile.imwrite(tmp_path / "mask.tif", mask.astype(np.uint16))
    with pytest.raises(InkdaskError, match=r"mask\.tif has uint16 values, and a TIFF needs uint8"):
        open_segment(str(tmp_path), mask=str(tmp_path / "mask.tif"))


def test_a_mask_of_another_size_or_place_is_refused(tmp_path, pixels, mask):
    write_layers(tmp_path / "layers", pixels)
    write_mask(str(tmp_path / "small.png"), mask[:50])
    with pytest.raises(
        InkdaskError,
        match=r"small\.png has 130 x 50 pixels, the layers have 130 x 100; MASK_PATH=none reads ",
    ):
        open_segment(str(tmp_path), mask=str(tmp_path / "small.png"))
    with pytest.raises(InkdaskError, match=r"none\.png does not exist"):
        open_segment(str(tmp_path), mask=str(tmp_path / "none.png"))


# Descriptions.


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        ({}, "TIFF, one strip, uncompressed"),
        ({"rowsperstrip": 16, "compression": "lzw"}, "TIFF, 16-row strips, LZW"),
        ({"tile": (64, 64), "compression": "zlib"}, "TIFF, 64 x 64 tiles, DEFLATE"),
    ],
)
def test_describe(tmp_path, options, layout):
    write_layers(tmp_path / "layers", random_volume((6, 1000, 1000)), **options)
    segment = open_segment(str(tmp_path), (1, 4))
    before = storage.counters()
    description = describe(segment)
    assert (storage.counters() - before).bytes_read <= 0.5 * segment.stored_bytes
    assert description.layout == layout
    assert description.shape == (3, 1000, 1000)
    assert description.dtype == "uint16"
    assert description.layers == (1, 2, 3)
    assert description.stored_bytes == sum(
        (tmp_path / "layers" / f"{number:02d}.tif").stat().st_size for number in (1, 2, 3)
    )
    assert description.empty_share == pytest.approx(0.2, abs=0.1)


def test_describe_reads_no_whole_pictures(tmp_path, pixels):
    for number, layer in enumerate(pixels):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    segment = open_segment(str(tmp_path))
    before = storage.counters()
    assert describe(segment).layout == "PNG"
    assert describe(segment).empty_share is None
    assert storage.counters() == before
