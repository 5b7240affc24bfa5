"""Test that lack of memory or disk is reported before anything is computed or written."""

import shutil
from collections import namedtuple

import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from PIL import Image

import inkdask
from inkdask import cli, memory, preflight
from inkdask.errors import InkdaskError
from inkdask.reading import volume
from tests.files import write_layers, write_segment
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def segment(tmp_path):
    return write_segment(tmp_path / "seg", papyrus((6, 230, 301)))


@pytest.fixture
def nearly_full(monkeypatch):
    """List whose last element is the free bytes of every disk."""
    free = [0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free[-1]))
    return free


def assert_refused(says, job, *places):
    with pytest.raises(InkdaskError, match=says) as caught:
        job()
    assert "\n" not in str(caught.value)
    assert not any(place.exists() for place in places)


def test_too_little_memory_is_reported_first(segment, tmp_path, monkeypatch):
    monkeypatch.setattr(preflight, "memory_limit", lambda: 500_000_000)
    says = r"needs about 6\d\d MB of memory in a process, and this machine has 500 MB: .* need less"
    job = lambda: inkdask.run(segment, model=depth_slope)  # noqa: E731
    assert_refused(says, job, segment / "predictions", tmp_path / "partitions")


def test_memory_for_a_mask_and_for_colours_is_counted(segment, tmp_path):
    def decoding(**options):
        return preflight._decoding(inkdask.open_segment(segment, **options))

    assert decoding() == 0
    Image.fromarray(np.full((230, 301), 255, np.uint8)).save(segment / "seg_mask.png")
    assert decoding() == 2 * 230 * 301
    assert decoding(mask="none") == 0
    (tmp_path / "colour").mkdir()
    colours = np.full((230, 301, 3), 9, np.uint8)
    Image.fromarray(colours).save(tmp_path / "colour" / "00.png")
    assert preflight._decoding(inkdask.open_segment(tmp_path / "colour")) == 6 * 230 * 301


def test_smaller_chunk_is_advised_where_it_helps(tmp_path, monkeypatch):
    segment = write_segment(tmp_path / "tall", papyrus((4, 900, 301)))
    monkeypatch.setattr(volume, "BLOCK_SIDE", 16)  # because larger blocks need most memory

    def job(**options):
        return inkdask.run(segment, model=depth_slope, stride=64, **options)

    monkeypatch.setattr(memory, "IMPORTS", 0)
    monkeypatch.setattr(preflight, "memory_limit", lambda: 2_000_000)
    assert_refused("a smaller CHUNK_SIZE needs less", lambda: job(chunk_size=1024))
    assert job(chunk_size=128)


def test_full_disk_is_reported_with_what_goes_there(segment, tmp_path, nearly_full):
    nearly_full.append(1000)
    says = (
        r"The disk of \S+ has 1.0 kB free, and the job writes about 111 kB there: "
        r"tile grid 7.4 kB \(ZARR_OUTPUT_DIR\), picture 69.2 kB \(OUTPUT_PATH\), "
        r"PNG in the making 34.6 kB \(TMPDIR\)"
    )
    job = lambda: inkdask.run(segment, model=depth_slope)  # noqa: E731
    assert_refused(says, job, segment / "predictions", tmp_path / "partitions")
    nearly_full.append(10**6)
    assert inkdask.run(segment, model=depth_slope)


def test_stored_chunks_need_no_more_room(segment, tmp_path, nearly_full):
    nearly_full.append(10**9)
    part = {"model": depth_slope, "num_parts": 2}
    for number in range(2):
        inkdask.run(segment, part_id=number, **part)
    nearly_full.append(100)
    inkdask.run(segment, part_id=1, **part)
    with pytest.raises(InkdaskError, match="has 100 bytes free, .* there: picture"):
        inkdask.run(segment, step="reduce", **part)
    with pytest.raises(InkdaskError, match="tile grid"):
        inkdask.run(segment, part_id=1, overwrite=True, **part)


def test_places_on_s3_need_no_room_on_disk(segment, s3, nearly_full):
    nearly_full.append(40_000)  # enough for the PNG in the making
    options = {"output_path": s3, "zarr_output_dir": f"{s3}/partitions"}
    assert inkdask.run(segment, model=depth_slope, **options)


def test_layers_decoded_whole_need_scratch(tmp_path, nearly_full):
    pixels = papyrus((6, 300, 400))
    (tmp_path / "png" / "layers").mkdir(parents=True)
    for number, layer in enumerate(pixels):
        path = tmp_path / "png" / "layers" / f"{number:02d}.png"
        path.write_bytes(imagecodecs.png_encode(layer))
    nearly_full.append(200_000)
    with pytest.raises(InkdaskError, match=r"decoded layers 216 kB \(TMPDIR\)"):
        inkdask.run(tmp_path / "png", model=depth_slope, stride=64)


def test_prepare_reports_full_disk(segment, tmp_path, nearly_full):
    nearly_full.append(300_000)
    place = tmp_path / "volume.zarr"
    job = lambda: inkdask.prepare(segment, surface_volume_zarr=place)  # noqa: E731
    assert_refused(r"surface volume 415 kB \(SURFACE_VOLUME_ZARR\)", job, place)
    assert inkdask.prepare(segment, surface_volume_zarr=place, use_zarr_compression=True)


def test_memory_of_workers_is_checked(segment):
    distributed = pytest.importorskip("distributed")
    with (
        distributed.LocalCluster(
            n_workers=1, threads_per_worker=1, memory_limit="400MB", processes=False,
            dashboard_address=None,
        ) as cluster,
        distributed.Client(cluster),
        pytest.raises(InkdaskError, match=r"and a worker has 400 MB"),
    ):  # fmt: skip
        inkdask.run(segment, model=depth_slope)


def test_peak_memory_is_that_of_this_process():
    before = memory.peak_memory()
    held = np.ones(100_000_000, np.uint8)
    assert memory.peak_memory() >= before
    assert memory.peak_memory() > held.nbytes
    assert 10**8 < memory.memory_limit() < 10**14
    memory.give_back()


def test_memory_for_decoding_is_counted(segment, monkeypatch):
    monkeypatch.setattr(preflight, "_decoding", lambda segment: 10**15)
    with pytest.raises(InkdaskError, match="of memory in a process"):
        inkdask.run(segment, model=depth_slope)


def test_part_needs_room_for_its_share_only(segment, monkeypatch, tmp_path):
    seen = {}
    monkeypatch.setattr(
        preflight, "check_disks", lambda needs: seen.setdefault(parts, next(iter(needs)).size)
    )
    for parts in (1, 4):
        inkdask.run(
            segment, model=depth_slope, num_parts=parts, zarr_output_dir=tmp_path / str(parts)
        )
    assert seen[4] == pytest.approx(seen[1] / 4)


# Values of few bits in files of sixteen.


def write_values(folder, bits, kind="tif"):
    """Write layers of uint16 whose values have ``bits`` bits."""
    layers = papyrus((6, 230, 301)).astype(np.uint16) << (bits - 8)
    if kind == "zarr":
        zarr.create_array(str(folder), data=layers, chunks=(6, 64, 64))
        return folder
    if kind == "png":
        (folder / "layers").mkdir(parents=True)
        for number, layer in enumerate(layers):
            Image.fromarray(layer).save(folder / "layers" / f"{number:02d}.png")
        return folder
    write_layers(folder / "layers", layers, rowsperstrip=16)
    return folder


@pytest.mark.parametrize("kind", ["tif", "zarr", "png"])
@pytest.mark.parametrize("bits", [8, 10, 12, 16])
def test_values_of_few_bits_in_uint16_are_told(tmp_path, caplog, capsys, kind, bits):
    place = write_values(tmp_path / "seg", bits, kind)
    options = {"model": depth_slope, "output_path": str(tmp_path / "out")}
    works = (
        lambda: cli.main(["info", str(place)]),
        lambda: inkdask.check(place, **options),
        lambda: inkdask.run(place, **options),
        lambda: inkdask.prepare(place),
    )
    for work in works:
        caplog.clear()
        work()
        told = [message for message in caplog.messages if "the largest value sampled" in message]
        assert len(told) == (bits < 16)
        for message in told:
            largest = int(message.split("sampled is ")[1].split(" of 65,535")[0].replace(",", ""))
            assert 0 < largest < 2**bits
            assert message.startswith(f"{place}: ")
            assert f"look like {max(8, largest.bit_length())}-bit values kept in uint16" in message
            assert max(8, largest.bit_length()) == bits


def test_empty_or_damaged_samples_are_not_told(tmp_path, caplog):
    write_layers(tmp_path / "empty" / "layers", np.zeros((6, 230, 301), np.uint16))
    inkdask.check(tmp_path / "empty", model=depth_slope)
    damaged = tmp_path / "damaged" / "layers"
    write_layers(damaged, papyrus((6, 230, 301)).astype(np.uint16), compression="lzw")
    for file in damaged.iterdir():
        with tifffile.TiffFile(file) as tif:
            start = tif.pages.first.dataoffsets[0]
        data = bytearray(file.read_bytes())
        data[start : start + 2] = b"\x80\x40"
        file.write_bytes(data)
    inkdask.check(tmp_path / "damaged", model=depth_slope)  # the job names the chunks that fail
    assert "largest value" not in caplog.text
