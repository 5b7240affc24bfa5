"""TIFF layers by byte ranges: every layout reads as by tifffile, and each byte is read once."""

import io
import itertools
import pickle
import struct
import subprocess
import sys
import tracemalloc
from dataclasses import FrozenInstanceError, fields

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from inkdask import storage
from inkdask.errors import InkdaskError
from inkdask.reading import tiff, tiff_header, volume
from inkdask.reading.volume import TiffStack, lazy
from inkdask.segment import open_segment
from inkdask.storage.parallel import THREADS
from tests import damage
from tests.files import encode, random_volume, write_layers

SHAPE = (2, 290, 333)
CODECS = [None, "lzw", "zlib", "packbits", "zstd"]
LAYOUTS = {
    "one-strip": {},
    "16-rows": {"rowsperstrip": 16},
    "odd-rows": {"rowsperstrip": 37},
    "tiles": {"tile": (256, 256)},
}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Cut small images into many blocks."""
    monkeypatch.setattr(volume, "BLOCK_SIDE", 128)
    monkeypatch.setattr(tiff_header, "CUT_ROWS", 16)
    monkeypatch.setattr(tiff, "RUN_BYTES", 50_000)


def by_tifffile(folder, layers=SHAPE[0]):
    """Read layers by tifffile, uint8 (z, y, x)."""
    files = [storage.read_bytes(f"{folder}/{number:02d}.tif") for number in range(layers)]
    pixels = np.stack([tifffile.imread(io.BytesIO(data)) for data in files])
    return (pixels >> 8).astype(np.uint8) if pixels.dtype.itemsize == 2 else pixels


def open_image(data, tmp_path, name="image.tif"):
    path = tmp_path / name
    path.write_bytes(data)
    return tiff_header.read_header(str(path), len(data))


@pytest.mark.parametrize(
    ("home", "codec", "layout", "dtype"),
    [
        *itertools.product(["local"], CODECS, LAYOUTS, ["|u1", "<u2", ">u2"]),
        ("local", "lzma", "16-rows", "<u2"),
        ("local", 32946, "16-rows", "<u2"),  # deflate, as written before Adobe
        ("s3", None, "one-strip", "<u2"),
        ("s3", "lzw", "16-rows", ">u2"),
        ("s3", "zlib", "tiles", "|u1"),
    ],
    indirect=["home"],
)
def test_layers_of_every_layout_read_as_by_tifffile(home, codec, layout, dtype):
    pixels = random_volume(SHAPE, dtype)
    order = ">" if dtype[0] == ">" else "<"
    folder = storage.join(home, "layers")
    write_layers(folder, pixels, compression=codec, byteorder=order, **LAYOUTS[layout])
    expected = by_tifffile(folder)
    segment = pickle.loads(pickle.dumps(open_segment(home)))
    np.testing.assert_array_equal(segment.volume.compute(scheduler="synchronous"), expected)
    rng = np.random.default_rng(len(f"{codec} {layout} {dtype}"))
    for _ in range(3):
        y, x = (np.sort(rng.choice(side + 1, 2, replace=False)).tolist() for side in SHAPE[1:])
        window = segment.crop(slice(*y), slice(*x)).volume
        np.testing.assert_array_equal(
            window.compute(scheduler="synchronous"), expected[:, y[0] : y[1], x[0] : x[1]]
        )


@pytest.mark.parametrize(
    ("layout", "codec", "words"),
    [
        ("one-strip", None, "one strip, uncompressed"),
        ("16-rows", "lzw", "16-row strips, LZW"),
        ("tiles", "zlib", "256 x 128 tiles, DEFLATE"),
    ],
)
def test_image_says_how_it_is_cut(tmp_path, layout, codec, words):
    how = LAYOUTS[layout] if layout != "tiles" else {"tile": (128, 256)}
    data = encode(random_volume(SHAPE)[0], compression=codec, **how)
    assert open_image(data, tmp_path).words == f"TIFF, {words}"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One image in several layouts: a list of (TiffImage, uint8 pixels)."""
    folder = tmp_path_factory.mktemp("files")
    found = []
    pixels = random_volume(SHAPE)[0]
    for codec, layout in itertools.product([None, "lzw"], LAYOUTS):
        data = encode(pixels, compression=codec, **LAYOUTS[layout])
        found.append((open_image(data, folder, f"{codec}-{layout}.tif"), pixels >> 8))
    return found


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_box_of_mixed_layouts_is_read(files, data):
    y = sorted(data.draw(st.lists(st.integers(0, SHAPE[1]), min_size=2, max_size=2, unique=True)))
    x = sorted(data.draw(st.lists(st.integers(0, SHAPE[2]), min_size=2, max_size=2, unique=True)))
    block = tiff.TiffBlock.of([image for image, _ in files], slice(*y), slice(*x))
    expected = np.stack([pixels for _, pixels in files])[:, y[0] : y[1], x[0] : x[1]]
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(block)).read(), expected)


def test_numbers_in_a_header_are_read(tmp_path):
    """Tags of microscopes, which tifffile reads into an array."""
    path, numbers = tmp_path / "numbers", np.arange(8, dtype="<u4")
    path.write_bytes(numbers.tobytes())
    file = tifffile.FileHandle(tiff_header._RangeFile(str(path), path.stat().st_size, ""))
    np.testing.assert_array_equal(file.read_array("<u4", 3, offset=8), numbers[2:5])


@pytest.mark.parametrize("dtype", ["|u1", "<u2", ">u2"])
@pytest.mark.parametrize("codec", ["lzw", "zlib", "zstd"])
def test_layer_with_predictor_is_decoded(tmp_path, codec, dtype):
    pixels = random_volume(SHAPE, dtype)[0]
    order = ">" if dtype[0] == ">" else "<"
    for layout in LAYOUTS.values():
        data = encode(pixels, compression=codec, predictor=True, byteorder=order, **layout)
        high = pixels if dtype == "|u1" else pixels >> 8
        np.testing.assert_array_equal(open_image(data, tmp_path).decode(), high)


def written_by_pillow(pixels):
    """A TIFF by libtiff, which puts the tags after the pixels."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "TIFF", compression="tiff_lzw")
    return file.getvalue()


def with_strips_in_another_order(pixels):
    """A TIFF whose last strip lies first in the file; all strips have one size."""
    rows = 29
    strips = pixels.reshape(-1, rows, pixels.shape[1])
    data = encode(strips[::-1].reshape(pixels.shape), rowsperstrip=rows)
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        tag, offsets = tif.pages.first.tags["StripOffsets"], tif.pages.first.dataoffsets
    turned = struct.pack(f"<{len(offsets)}I", *offsets[::-1])
    assert struct.pack(f"<{len(offsets)}I", *offsets) in data
    return data[: tag.valueoffset] + turned + data[tag.valueoffset + len(turned) :]


@pytest.mark.parametrize(
    "write",
    [
        written_by_pillow,
        with_strips_in_another_order,
        lambda pixels: encode(pixels, bigtiff=True, rowsperstrip=16),
        lambda pixels: encode(pixels, bigtiff=True, byteorder=">", tile=(64, 64)),
        lambda pixels: encode(pixels, compression="lzw", rowsperstrip=1),
        lambda pixels: encode(pixels, tile=(512, 512)),
        lambda pixels: encode(pixels, rowsperstrip=2**31),
        lambda pixels: encode(pixels, compression="lzw", tile=(32, 320)),
        lambda pixels: encode(pixels, description="x" * 10_000, rowsperstrip=5),
    ],
)
def test_tiff_of_unusual_structure_is_decoded(tmp_path, write):
    pixels = random_volume(SHAPE, "<u2")[0]
    image = open_image(write(pixels), tmp_path)
    np.testing.assert_array_equal(image.decode(), pixels >> 8)
    assert not image.oddity


def test_piece_of_no_bytes_between_others_hides_none_of_them(tmp_path):
    strips = np.arange(1, 11, dtype=np.uint16)[:, None] << 11
    pixels = strips.repeat(29, axis=0).repeat(SHAPE[2], axis=1)
    # So small that one request has several pieces.
    data = bytearray(encode(pixels, compression="zlib", rowsperstrip=29))
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        tag = tif.pages.first.tags["StripByteCounts"]
        size = tag.valuebytecount // tag.count
    data[tag.valueoffset + 2 * size : tag.valueoffset + 3 * size] = bytes(size)  # of the third
    path = tmp_path / "layers"
    path.mkdir()
    (path / "00.tif").write_bytes(data)
    expected = (pixels >> 8).astype(np.uint8)
    expected[58:87] = 0
    np.testing.assert_array_equal(open_segment(tmp_path).volume.compute()[0], expected)


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1)])
def test_image_of_one_row_or_column_is_decoded(tmp_path, shape):
    pixels = random_volume((1, *shape))[0]
    np.testing.assert_array_equal(open_image(encode(pixels), tmp_path).decode(), pixels >> 8)


def test_tiff_of_jpeg_pieces_is_decoded(tmp_path):
    pixels = random_volume(SHAPE, "|u1")[0]
    for layout in ({"tile": (64, 64)}, {"rowsperstrip": 16}):
        data = encode(pixels, compression="jpeg", **layout)
        expected = tifffile.imread(io.BytesIO(data))
        np.testing.assert_array_equal(open_image(data, tmp_path).decode(), expected)


@pytest.mark.parametrize("layout", [{"tile": (64, 64)}, {"rowsperstrip": 16}])
def test_tiff_of_colour_jpeg_decodes_to_its_first_channel(tmp_path, layout):
    pixels = np.stack([*random_volume((3, 100, 120), "|u1")], axis=-1)
    data = encode(pixels, compression="jpeg", photometric="rgb", **layout)
    expected = tifffile.imread(io.BytesIO(data))
    assert len(np.unique(expected.reshape(-1, 3).mean(0).round())) > 1
    np.testing.assert_array_equal(open_image(data, tmp_path).decode(), expected[..., 0])


def test_pieces_of_no_bytes_decode_to_zero(tmp_path):
    pixels = random_volume((1, 128, 128))[0]
    pixels[:64, 64:] = 0
    tiles = [pixels[:64, :64], None, pixels[64:, :64], pixels[64:, 64:]]
    file = io.BytesIO()
    tifffile.imwrite(file, iter(tiles), shape=pixels.shape, dtype=pixels.dtype, tile=(64, 64))
    image = open_image(file.getvalue(), tmp_path)
    assert 0 in image.counts
    np.testing.assert_array_equal(image.decode(), pixels >> 8)


@pytest.mark.parametrize(
    "options", [{}, {"compression": "lzw", "predictor": True}, {"tile": (64, 64)}]
)
@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_colour_tiff_decodes_to_its_first_channel(tmp_path, planar, options):
    colours = random_volume((3, 100, 120))
    pixels = np.moveaxis(colours, 0, -1) if planar == "contig" else colours
    options = {"rowsperstrip": 10, **options} if "tile" not in options else options
    file = io.BytesIO()
    tifffile.imwrite(file, pixels, photometric="rgb", planarconfig=planar, **options)
    image = open_image(file.getvalue(), tmp_path)
    assert image.oddity == "3 channels, of which the first is read"
    np.testing.assert_array_equal(image.decode(), colours[0] >> 8)


@pytest.mark.parametrize(
    ("photometric", "says"), [("miniswhite", "white that is 0"), ("palette", "a palette")]
)
def test_header_of_inverted_or_palette_values_is_refused(tmp_path, photometric, says):
    colours = {"colormap": np.zeros((3, 256), np.uint16)} if photometric == "palette" else {}
    file = io.BytesIO()
    tifffile.imwrite(file, np.zeros((30, 40), np.uint8), photometric=photometric, **colours)
    with pytest.raises(InkdaskError, match=says):
        open_image(file.getvalue(), tmp_path)


def test_tiff_of_several_pages_decodes_to_the_first(tmp_path):
    pages = random_volume((3, 100, 120))
    file = io.BytesIO()
    tifffile.imwrite(file, pages, photometric="minisblack", metadata=None)
    image = open_image(file.getvalue(), tmp_path)
    assert image.oddity == "several pages, of which the first is read"
    np.testing.assert_array_equal(image.decode(), pages[0] >> 8)


def test_pages_of_other_shapes_are_no_stack(tmp_path):
    page, path = random_volume((1, 100, 120))[0], tmp_path / "pages.tif"
    with tifffile.TiffWriter(path) as writer:
        writer.write(page, photometric="minisblack", metadata=None)
        writer.write(page[:50], photometric="minisblack", metadata=None)
    (image,) = tiff_header.read_stack(str(path), path.stat().st_size)
    assert image.oddity == "several pages, of which the first is read"
    np.testing.assert_array_equal(image.decode(), page >> 8)


def test_stack_of_stacks_is_no_stack(tmp_path):
    pages, path = random_volume((6, 100, 120)), tmp_path / "pages.tif"
    tifffile.imwrite(path, pages.reshape(2, 3, 100, 120), photometric="minisblack")
    (image,) = tiff_header.read_stack(str(path), path.stat().st_size)
    assert image.oddity == "several pages, of which the first is read"
    np.testing.assert_array_equal(image.decode(), pages[0] >> 8)


@pytest.mark.parametrize("code", [7, 33007])
def test_jpeg_of_either_code_is_decoded(tmp_path, code):
    data = encode(random_volume((1, 64, 64), "|u1")[0], compression="jpeg")
    expected = tifffile.imread(io.BytesIO(data))
    image = open_image(with_tag(data, 259, code), tmp_path)
    np.testing.assert_array_equal(image.decode(), expected)


def test_images_in_other_files_are_not_read(tmp_path):
    """Of a set in OME-TIFF each file is what it holds."""
    pages = random_volume((2, 100, 120))
    planes = "".join(
        f'<TiffData FirstZ="{z}"><UUID FileName="{z}.ome.tif">urn:uuid:{z}</UUID></TiffData>'
        for z in range(2)
    )
    description = (
        '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="urn:uuid:0">'
        '<Image ID="Image:0"><Pixels DimensionOrder="XYZCT" ID="Pixels:0" SizeC="1" SizeT="1" '
        f'SizeX="120" SizeY="100" SizeZ="2" Type="uint16"><Channel ID="Channel:0:0"/>{planes}'
        "</Pixels></Image></OME>"
    )
    for number, page in enumerate(pages):
        data = encode(page, description=description, metadata=None)
        (tmp_path / f"{number}.ome.tif").write_bytes(data)
    file = tmp_path / "0.ome.tif"
    (image,) = tiff_header.read_stack(str(file), file.stat().st_size)
    np.testing.assert_array_equal(image.decode(), pages[0] >> 8)


def test_header_is_read_by_one_request(tmp_path):
    before = storage.counters().requests
    open_image(encode(random_volume(SHAPE)[0], rowsperstrip=16), tmp_path)
    assert storage.counters().requests == before + 1


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize(
    "how", [{}, {"truncate": True}, {"imagej": True}, {"compression": "zlib", "rowsperstrip": 16}]
)
def test_images_of_a_stack_are_found_by_one_page_or_more(tmp_path, count, how):
    pages, path = random_volume((count, 100, 120)), tmp_path / "stack.tif"
    tifffile.imwrite(path, pages, photometric="minisblack", **how)
    images = tiff_header.read_stack(str(path), path.stat().st_size)
    assert [image.page for image in images] == list(range(1, count + 1))
    assert all(image.words == f"{image.layout.words}, pages of a stack" for image in images)
    for image, page in zip(images, pages, strict=True):
        np.testing.assert_array_equal(image.decode(), page >> 8)


@pytest.mark.parametrize(("cut_bytes", "rows"), [(1 << 20, 16), (5 * 333 * 2, 4), (10, 1)])
def test_pieces_of_uncompressed_rows_are_chosen(tmp_path, monkeypatch, cut_bytes, rows):
    monkeypatch.setattr(tiff_header, "CUT_BYTES", cut_bytes)
    pixels = random_volume(SHAPE)[0]
    image = open_image(encode(pixels, rowsperstrip=1), tmp_path)
    assert image.layout.piece == (rows, 333)
    assert image.page == 0  # the only one
    np.testing.assert_array_equal(image.decode(), pixels >> 8)


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [
        *(
            (274, value, f"has Orientation {value}, and only 1 can be read")
            for value in range(2, 9)
        ),
        (266, 2, "has FillOrder 2, and only 1 can be read"),
        (274, 1, ""),
    ],
)
def test_tiff_that_is_not_stored_as_it_is_seen_is_refused(tmp_path, tag, value, says):
    pixels = random_volume(SHAPE, "|u1")[0]
    data = encode(pixels, extratags=[(274, 3, 1, value, True)])
    data = data.replace(struct.pack("<HHI", 274, 3, 1), struct.pack("<HHI", tag, 3, 1))
    if not says:
        np.testing.assert_array_equal(open_image(data, tmp_path).decode(), pixels)
        return
    with pytest.raises(InkdaskError, match=rf"image\.tif {says}: save it upright and plain"):
        open_image(data, tmp_path)


def test_packed_values_of_twelve_bits_are_refused(tmp_path):
    """As cameras save them; tifffile reads them as uint16 up to 4,095."""
    data = encode(np.full((16, 32), 1000, np.uint16))
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        start = tif.pages.first.tags["BitsPerSample"].valueoffset
    data = data[:start] + b"\x0c" + data[start + 1 :]
    with pytest.raises(InkdaskError, match=r"no TIFF of uint8 or uint16, but 12-bit values: save"):
        open_image(data, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "cannot be read as a TIFF"),
        (b"<html>not found</html>", "cannot be read as a TIFF"),
        (b"II*\0\xff\xff\xff\x0f", "cannot be read as a TIFF"),
        (encode(np.ones((9, 9), np.float32)), "no TIFF of uint8 or uint16, but float32"),
        (encode(np.ones((9, 9), np.int16)), "no TIFF of uint8 or uint16, but int16"),
        (encode(np.ones((9, 9), bool)), "no TIFF of uint8 or uint16, but bool"),
        (encode(np.ones((9, 9), np.uint8), compression="jpeg2000"), "compressed by .*JPEG"),
    ],
)
def test_header_of_unreadable_file_is_refused(tmp_path, data, message):
    with pytest.raises(InkdaskError, match=rf"odd\.tif .*{message}"):
        open_image(data, tmp_path, "odd.tif")


def with_tag(data, tag, value, kind=None):
    """Change the value in the entry of a tag, and its type."""
    with tifffile.TiffFile(io.BytesIO(data)) as tif:
        at = tif.pages.first.tags[tag].offset
    head = struct.pack("<HH", tag, kind) if kind else data[at : at + 4]
    return data[:at] + head + data[at + 4 : at + 8] + struct.pack("<I", value) + data[at + 12 :]


@pytest.mark.parametrize(
    ("options", "tag", "value", "kind", "message"),
    [
        ({}, 273, 0, None, "is corrupt: its pixels are not where it says"),
        ({}, 278, 2**32 - 1, 9, "is corrupt: it is cut into pieces of 64 x -1"),
        ({}, 279, 2000, 11, "cannot be read as a TIFF: Cannot cast"),  # a float, nearly 0
        ({"tile": (16, 16), "compression": "jpeg"}, 322, 2**31, None, "is corrupt: its pixels are"),
        ({"photometric": "rgb"}, 284, 0, None, "has PlanarConfiguration 0"),
        ({"photometric": "rgb"}, 284, 2, None, "is corrupt: it lists 1 of 3 pieces"),
        ({"rowsperstrip": 16}, 278, 8, None, "is corrupt: it lists 4 of 8 pieces"),
        ({"compression": "zlib", "predictor": True}, 259, 1, None, "has predictor"),
        ({"compression": "zlib", "predictor": True}, 259, 32773, None, "has predictor"),
        ({}, 277, 0, None, "is corrupt: it is cut into"),
        ({}, 257, 2**32 - 1, 9, "has no pixels"),
        ({"compression": "jpeg"}, 262, 2, None, "cannot be read as a TIFF: colours of one sample"),
    ],
)
def test_tags_without_sense_are_refused(tmp_path, options, tag, value, kind, message):
    pixels = random_volume((64, 64, 3) if "photometric" in options else (64, 64, 1), "|u1")
    data = encode(pixels.squeeze(), **options)
    with pytest.raises(InkdaskError, match=rf"odd\.tif {message}"):
        open_image(with_tag(data, tag, value, kind), tmp_path, "odd.tif")


@pytest.mark.parametrize(
    ("tag", "value", "says"),
    [(256, 48, "64 x 64 pixels where 48 x 64 belong"), (257, 32, "64 x 64 .* where 64 x 32")],
)
def test_jpeg_of_another_size_than_its_piece_is_refused(tmp_path, tag, value, says):
    data = encode(random_volume((1, 64, 64), "|u1")[0], compression="jpeg")
    image = open_image(with_tag(data, tag, value), tmp_path)
    with pytest.raises(InkdaskError, match=rf"image\.tif is corrupt at row 0, .*: {says}"):
        image.decode()


def test_empty_tile_takes_no_memory_of_its_own(tmp_path):
    """Its sides are what the file says, and need not be those of the image."""
    data = with_tag(encode(np.zeros((64, 64), np.uint8), tile=(64, 64)), 323, 1 << 20)
    image = open_image(with_tag(data, 325, 0), tmp_path)
    tracemalloc.start()
    assert not image.decode().any()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_tile_without_bounds_is_refused(tmp_path):
    data = encode(random_volume((64, 64, 1), "|u1").squeeze(), tile=(16, 16), compression="zlib")
    data = with_tag(with_tag(data, 322, 2**32 - 1), 323, 2**32 - 1)
    with pytest.raises(InkdaskError, match=r"odd\.tif is corrupt: its pixels are not where"):
        open_image(data, tmp_path, "odd.tif")


@pytest.mark.parametrize("sizes", ['SizeZ="9876543" SizeC="1" SizeT="1"', 'SizeT="9876543"'])
def test_description_of_millions_of_images_is_refused(tmp_path, sizes):
    description = f"<OME><Pixels {sizes}/></OME>"
    data = encode(random_volume(SHAPE)[0], description=description, metadata=None)
    with pytest.raises(InkdaskError, match=r"image\.tif cannot be read .* of too many images"):
        open_image(data, tmp_path)


@pytest.mark.timeout(60)
def test_pages_in_a_circle_are_one_page(tmp_path):
    data = bytearray(encode(random_volume(SHAPE)[0], metadata=None))
    count = struct.unpack_from("<H", data, 8)[0]
    data[10 + 12 * count : 14 + 12 * count] = struct.pack("<I", len(data))  # the next page
    again = struct.pack("<HHHIII", 1, 256, 4, 1, 10, len(data))  # a page before itself
    image = open_image(bytes(data) + again, tmp_path)
    np.testing.assert_array_equal(image.decode(), random_volume(SHAPE)[0] >> 8)


def test_decoder_that_says_nothing_is_named(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(tiff.Layout, "decode", fail)
    with pytest.raises(InkdaskError, match=r"image\.tif is corrupt at .*: MemoryError\.$"):
        open_image(encode(random_volume(SHAPE)[0]), tmp_path).decode()


@pytest.mark.parametrize("codec", [None, "lzw"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_header_of_truncated_file_is_refused(tmp_path, codec, layout):
    data = encode(random_volume(SHAPE)[0], compression=codec, **LAYOUTS[layout])
    with pytest.raises(InkdaskError, match=rf"cut\.tif is truncated: .* has {len(data) - 9} bytes"):
        open_image(data[:-9], tmp_path, "cut.tif")


@pytest.mark.parametrize(
    ("codec", "spoiled"),
    [
        # Each ends the data early or breaks the frame, because these codecs miss other damage.
        ("lzw", b"\x80\x40"),
        ("lzw", bytes.fromhex("805be05038cb")),  # a clear code, and then one that needs a table
        ("zlib", b""),
        ("packbits", b"\x80" * 20_000),
        ("zstd", b""),
    ],
)
def test_decoding_corrupt_pixels_names_file_and_position(tmp_path, codec, spoiled):
    data = bytearray(encode(random_volume(SHAPE)[0], compression=codec, rowsperstrip=37))
    image = open_image(bytes(data), tmp_path, "spoiled.tif")
    start, count = int(image.offsets[3, 0]), int(image.counts[3, 0])
    data[start : start + count] = spoiled[:count].ljust(count, b"\0")
    (tmp_path / "spoiled.tif").write_bytes(data)
    where = rf"spoiled\.tif is corrupt at row 111, column 0 \(bytes {start} to {start + count}\)"
    with pytest.raises(InkdaskError, match=where):
        image.decode()
    # A block that does not meet the strip is read.
    tiff.TiffBlock.of([image], slice(0, 111), slice(0, 333)).read()


def test_decoding_damaged_images_does_not_crash():
    """The LZW decoder of imagecodecs crashes on the images of this seed."""
    command = [sys.executable, "-m", "tests.damage", "2400", "2400"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert set(counts) == set(damage.KINDS)
    assert all(int(refused) > 50 for _, refused in counts.values())


@pytest.mark.parametrize("kind", [tiff.Layout, tiff.TiffImage, tiff.TiffBlock, tiff._Run])
def test_values_that_tasks_share_are_frozen(kind):
    with pytest.raises(FrozenInstanceError):
        setattr(object.__new__(kind), fields(kind)[0].name, None)


@pytest.fixture
def ranges(monkeypatch):
    """Ranges that are read, as (uri, start, stop)."""
    read, real = [], storage.read_range

    def read_range(uri, start, stop, etag=""):
        read.append((uri, start, stop))
        return real(uri, start, stop, etag)

    monkeypatch.setattr(storage, "read_range", read_range)
    return read


@pytest.mark.parametrize(
    ("home", "codec", "layout"),
    [
        *itertools.product(["local"], [None, "lzw"], LAYOUTS),
        ("s3", None, "one-strip"),
        ("s3", "lzw", "tiles"),
    ],
    indirect=["home"],
)
def test_bytes_of_layers_are_each_read_once(home, codec, layout, ranges, monkeypatch):
    monkeypatch.setattr(tiff, "RUN_BYTES", 200_000)
    folder = storage.join(home, "layers")
    write_layers(folder, random_volume((4, 700, 800)), compression=codec, **LAYOUTS[layout])
    size = sum(entry.size for entry in storage.list_folder(folder))
    before = storage.counters()
    segment = open_segment(home)
    opened = storage.counters() - before
    assert opened.bytes_read <= 4 * 2 * tiff_header.HEADER_READ
    ranges.clear()
    array = segment.volume
    assert not ranges
    array.compute()
    assert (storage.counters() - before).bytes_read <= 1.15 * size
    for file in range(4):
        spans = sorted(span for span in ranges if span[0].endswith(f"{file:02d}.tif"))
        assert spans
        assert all(a[2] <= b[1] for a, b in itertools.pairwise(spans))


def test_neighbouring_pieces_are_fetched_by_one_request(tmp_path, ranges, monkeypatch):
    monkeypatch.setattr(tiff, "RUN_BYTES", 1 << 20)
    data = encode(random_volume((1, 256, 256))[0], tile=(64, 64), compression="lzw")
    image = open_image(data, tmp_path)
    ranges.clear()
    image.decode()
    assert len(ranges) == 1
    ranges.clear()
    tiff.TiffBlock.of([image], slice(0, 128), slice(0, 128)).read()
    assert len(ranges) == 2
    monkeypatch.setattr(tiff, "RUN_BYTES", 4096)
    ranges.clear()
    image.decode()
    assert max(stop - start for _, start, stop in ranges) < 4096 + image.counts.max()


def test_crop_of_tiles_reads_few_other_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(volume, "BLOCK_SIDE", 1024)
    pixels = random_volume((2, 1000, 1000))
    write_layers(tmp_path / "layers", pixels, tile=(64, 64))
    segment = open_segment(str(tmp_path))
    before = storage.counters()
    crop = segment.crop(slice(301, 525), slice(420, 644))  # 5 % of the area
    assert crop.shape == (2, 224, 224)
    np.testing.assert_array_equal(crop.volume.compute(), (pixels >> 8)[:, 301:525, 420:644])
    assert (storage.counters() - before).bytes_read <= 0.15 * segment.stored_bytes


def test_graph_holds_large_tables_once(monkeypatch):
    """Sixteen layers of 40,000 compressed one-row strips: 10 MB of offsets, in 625 tasks."""
    monkeypatch.undo()
    height, width, layers = 40_000, 30_000, 16
    layout = tiff.Layout((height, width), "<u2", (1, width), False, 1, 5, 1, None, "")
    counts = np.random.default_rng(0).integers(1000, 60_000, (height, 1))
    offsets = np.cumsum(counts, axis=0) - counts
    images = tuple(
        tiff.TiffImage(
            f"s3://bucket/scroll/segment/layers/{number:02d}.tif", layout, offsets, counts
        )
        for number in range(layers)
    )
    array = lazy(TiffStack(images), "identity")
    graph = dict(array.__dask_graph__())
    assert array.numblocks == (1, 625, 1)
    tables = layers * (offsets.nbytes + counts.nbytes)
    assert sum(len(pickle.dumps(task)) for task in graph.values()) < 1.1 * tables + 2000 * len(
        graph
    )


def test_reading_a_block_takes_little_more_than_its_output(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(tiff, "RUN_BYTES", 1 << 20)
    write_layers(tmp_path / "layers", np.repeat(random_volume((1, 1024, 2048)), 16, axis=0))
    block = open_segment(str(tmp_path)).source.block(slice(0, 1024), slice(0, 2048))
    block.read()
    tracemalloc.start()
    out = block.read()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Each thread holds at most a range; all ranges at once would be 64 MiB.
    assert peak <= out.nbytes + 1.1 * THREADS * tiff.RUN_BYTES
