"""Layers as a lazy volume: what is read, when, and where."""

import logging
import pickle

import dask
import imagecodecs
import numpy as np
import pytest

from inkdask import storage
from inkdask.errors import InkdaskError, UnavailableError
from inkdask.reading import images, volume
from inkdask.segment import Segment, open_segment
from inkdask.storage.parallel import THREADS
from tests.files import SHAPE, assert_reads, random_volume, write_layers


def test_building_the_volume_reads_nothing(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = open_segment(str(tmp_path))
    before = storage.counters()
    array = segment.volume
    assert array.dtype == np.uint8
    assert array.shape == SHAPE
    assert array[:, 10:20].sum().dask
    assert storage.counters() == before


def test_dask_names_follow_from_files_layers_and_crop(tmp_path, pixels):
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


def test_tasks_are_picklable(tmp_path, pixels):
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
def test_block_size_follows_layout_and_limits(shape, options, steps):
    unit = options.get("unit", (1, shape[2]))
    assert volume.block_step(shape, unit) == steps


@pytest.mark.parametrize("options", [{"tile": (32, 32)}, {"rowsperstrip": 16}])
def test_cost_of_tiffs_is_what_a_read_fetches(tmp_path, options):
    write_layers(tmp_path, random_volume((3, 200, 300)), compression="lzw", **options)
    segment = open_segment(tmp_path)
    for source in (segment.source, segment.source.take(slice(1, 2))):
        for window in ((slice(0, 200), slice(0, 300)), (slice(30, 70), slice(0, 32))):
            before = storage.counters().bytes_read
            source.block(*window).read()
            assert source.cost(*window) == storage.counters().bytes_read - before
    assert segment.source.can_be_sampled
    assert not segment.source.reads_all_layers
    assert segment.source.decoding_bytes == segment.source.scratch_bytes == 0


def test_decoded_layers_say_what_they_take_in_memory_and_on_disk(tmp_path, pixels):
    for number, layer in enumerate(pixels):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    source = open_segment(tmp_path).source
    assert source.scratch_bytes == pixels.size
    assert source.decoding_bytes == 2 * pixels.nbytes
    assert source.cost(slice(0, 10), slice(0, 10)) == pixels.size  # one chunk of the copy
    assert not source.can_be_sampled


def test_blocks_are_read_by_the_function_given(tmp_path, pixels):
    write_layers(tmp_path / "layers", pixels, tile=(32, 32))
    imagecodecs.imwrite(tmp_path / "m.png", (pixels[0] > 0).astype(np.uint8))
    segment = open_segment(tmp_path, mask=tmp_path / "m.png").crop(slice(10, 60), slice(0, 130))
    volume, mask = segment.lazy(inverted)
    assert volume.name != segment.volume.name
    assert (volume.dtype, mask.dtype) == (np.uint8, bool)
    np.testing.assert_array_equal(volume, 255 - (pixels[:, 10:60] >> 8))
    np.testing.assert_array_equal(mask, pixels[0, 10:60] == 0)
    assert len(mask.dask) == mask.npartitions  # nothing is mapped over what was read


def inverted(block):
    """Read a block, and turn light to dark."""
    return ~block.read()


def test_crop_of_a_crop_counts_from_its_corner(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = open_segment(str(tmp_path)).crop(slice(10, 90), slice(20, 130))
    assert_reads(segment, (pixels >> 8)[:, 10:90, 20:130])
    assert_reads(segment.crop(slice(5, 6), slice(0, 110)), (pixels >> 8)[:, 15:16, 20:130])
    for rows, columns in [
        ((0, 81), (0, 1)),
        ((5, 5), (0, 1)),
        ((0, 1), (-1, 4)),
        ((-5, 50), (0, 50)),
        ((0, 1), (9, 111)),
    ]:
        with pytest.raises(InkdaskError, match="do not lie in .* 110 x 80 pixels"):
            segment.crop(slice(*rows), slice(*columns))


def test_reading_through_faults_gives_the_same_pixels(s3, faults, pixels):
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
def test_layers_that_cannot_be_cut_are_decoded_once(tmp_path, kind, monkeypatch, caplog):
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
    """More layers than the pool has threads: they must not wait for each other."""
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


def test_scratch_lies_in_the_folder_of_the_worker(tmp_path, pixels):
    distributed = pytest.importorskip("distributed")
    for number, layer in enumerate(pixels):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    segment = open_segment(str(tmp_path))
    scratch = tmp_path / "scratch"
    with (
        distributed.LocalCluster(
            n_workers=1,
            threads_per_worker=2,
            processes=False,
            dashboard_address=None,
            local_directory=str(scratch),
        ) as cluster,
        distributed.Client(cluster) as client,
    ):
        np.testing.assert_array_equal(client.compute(segment.volume).result(), pixels >> 8)
        assert list(scratch.rglob("inkdask-tmp-*/0.zarr"))
    assert not list(scratch.rglob("*.zarr"))


def test_picture_on_a_silent_server_is_unavailable_not_corrupt(tmp_path, pixels, monkeypatch):
    """A job tries again what is unavailable, and not what is corrupt."""
    (tmp_path / "00.png").write_bytes(imagecodecs.png_encode(pixels[0]))
    segment = open_segment(str(tmp_path))

    def silent(uri, etag):
        raise UnavailableError(f"{uri} does not answer.")

    monkeypatch.setattr(storage, "read_bytes", silent)
    with pytest.raises(UnavailableError, match=r"00\.png does not answer"):
        segment.volume.compute()
