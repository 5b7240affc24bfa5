"""All layers in one TIFF: pages, or one page before the pixels of all."""

import pickle

import numpy as np
import pytest
import tifffile

import inkdask
from inkdask import cli, storage
from inkdask.errors import InkdaskError
from inkdask.reading import images, tiff_header, volume
from inkdask.segment import identify, open_segment
from tests.files import assert_reads, random_volume
from tests.oracle import depth_slope, papyrus

KINDS = {
    "pages": {"photometric": "minisblack", "metadata": None},
    "shaped": {"photometric": "minisblack"},
    "one page": {"photometric": "minisblack", "truncate": True},
    "ImageJ": {"imagej": True},
    "ImageJ, one page": {"imagej": True, "truncate": True, "metadata": {"axes": "ZYX"}},
    "OME": {"ome": True, "photometric": "minisblack"},
    "LZW": {"photometric": "minisblack", "compression": "lzw", "rowsperstrip": 16},
    "tiles": {"photometric": "minisblack", "tile": (32, 32), "compression": "zlib"},
}


def stack(path, pixels, **options):
    """Write a stack to a local path."""
    tifffile.imwrite(path, pixels, **options)
    return str(path)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["stack.tif", "layers/stack.tif", "layers/00.TIFF", "05.tif"])
def test_stack_of_every_kind_and_name_is_read(tmp_path, pixels, kind, name):
    (tmp_path / "seg" / "layers").mkdir(parents=True)
    stack(tmp_path / "seg" / name, pixels, **KINDS[kind])
    uri = str(tmp_path / "seg" / "stack.tif") if name == "stack.tif" else str(tmp_path / "seg")
    if name == "05.tif":
        (tmp_path / "seg" / "layers").rmdir()
    segment = pickle.loads(pickle.dumps(open_segment(uri)))
    assert segment.layers == tuple(range(6))
    assert segment.source.words.endswith(", pages of a stack")
    assert segment.stored_bytes == storage.entry(segment.source.images[0].uri).size
    assert_reads(segment, pixels >> 8)
    part = open_segment(uri, (2, 5))
    assert_reads(part.crop(slice(7, 50), slice(100, 130)), pixels[2:5, 7:50, 100:130] >> 8)
    assert identify(uri, (2, 5), None, "0") == (part.identity, None)
    with pytest.raises(InkdaskError, match="^Layers 06, 07 missing in"):
        open_segment(uri, (2, 8))


def test_stack_is_read_from_s3_by_ranges(s3, tmp_path):
    pixels = random_volume((6, 400, 500))
    data = stack(tmp_path / "a.tif", pixels, **KINDS["ImageJ, one page"])
    storage.put_file(data, f"{s3}/scroll/a.tif")
    before = storage.counters().bytes_read
    segment = open_segment(f"{s3}/scroll/a.tif", (2, 3))
    assert segment.name == "a"
    assert_reads(segment, pixels[2:3] >> 8)
    assert storage.counters().bytes_read - before < pixels[0].nbytes + 4 * tiff_header.HEADER_READ


def test_layers_of_a_stack_that_cannot_be_cut_are_decoded_each(tmp_path, pixels, monkeypatch):
    for name in ("BLOCK_SIDE", "WHOLE_BYTES"):
        monkeypatch.setattr(volume, name, 16)
    uri = stack(tmp_path / "a.tif", pixels, photometric="minisblack", compression="lzw")
    segment = open_segment(uri)
    assert isinstance(segment.source.block(slice(0, 1), slice(0, 1)), images.DecodedBlock)
    assert_reads(segment.take(slice(None, None, -1)), pixels[::-1] >> 8)
    assert_reads(segment, pixels >> 8)


@pytest.mark.parametrize("colours", ["contig", "separate"])
def test_stack_of_colours_is_read_as_the_first(tmp_path, pixels, colours):
    axis = {"contig": -1, "separate": 1}[colours]
    data = np.stack([pixels, pixels // 2, pixels // 3], axis)
    uri = stack(tmp_path / "a.tif", data, photometric="rgb", planarconfig=colours)
    assert_reads(open_segment(uri), pixels >> 8)


def test_channels_are_not_taken_for_layers(tmp_path, pixels, caplog):
    channels = np.stack([pixels, pixels // 2])
    stack(tmp_path / "00.tif", channels, imagej=True, metadata={"axes": "ZCYX"}, truncate=True)
    assert_reads(open_segment(tmp_path), pixels[:1] >> 8)
    assert "00.tif has several pages, of which the first is read" in caplog.text


def test_stacks_among_numbered_layers_are_read_as_their_first_page(tmp_path, pixels, caplog):
    for number in range(2):
        stack(tmp_path / f"{number:02d}.tif", pixels[number:], **KINDS["ImageJ, one page"])
    assert_reads(open_segment(tmp_path), pixels[:2] >> 8)
    assert "has several pages, of which the first is read (2 such layers)" in caplog.text


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"OME"}))  # whose description comes last
def test_stack_that_is_cut_off_is_not_taken_for_whole(tmp_path, pixels, kind):
    stack(tmp_path / "a.tif", pixels, **KINDS[kind])
    data = (tmp_path / "a.tif").read_bytes()
    (tmp_path / "a.tif").write_bytes(data[:-1000])
    with pytest.raises(InkdaskError, match=r"a\.tif(:| is truncated: its pixels reach to byte)"):
        open_segment(tmp_path / "a.tif")


@pytest.mark.usefixtures("own_environment")
def test_job_and_info_take_a_stack(tmp_path, capsys):
    pixels = papyrus((6, 70, 90))
    uri = stack(tmp_path / "20240301.tif", pixels, **KINDS["shaped"])
    done = inkdask.run(uri, model=depth_slope, output_path=str(tmp_path / "out"))
    expected = inkdask.predict(pixels, model=depth_slope).map.compute()
    got = tifffile.imread(inkdask.export(done.replace(".png", ".zarr"), [str(tmp_path / "p.tif")]))
    np.testing.assert_allclose(got / 255, expected, atol=1.01 / 255)
    cli.main(["info", uri])
    rows = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert (rows["layers"], rows["segment"]) == ("6 (0:6)", uri)
    cli.main(["info", str(tmp_path / "p.tif")])
    assert "picture" in capsys.readouterr().out
