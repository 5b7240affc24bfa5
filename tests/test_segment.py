"""Segments in buckets and on disks: found, checked, identified, described, refused by name."""

import logging
import os
import pickle
import struct
import tracemalloc

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

import inkdask
from inkdask import storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.reading import volume
from inkdask.samples import sample
from inkdask.segment import identify, name_of, open_segment
from inkdask.storage import s3 as s3_module
from tests.files import SHAPE, assert_reads, encode, own_messages, random_volume, write_layers
from tests.oracle import depth_slope

# Where layers are.


@pytest.mark.parametrize(
    ("home", "folder", "digits"),
    [
        ("local", "layers", 2),
        ("local", "surface_volume", 3),
        ("local", "", 2),
        ("local", "20240301.tifs", 2),
        ("s3", "layers", 3),
        ("s3", "", 2),
    ],
    indirect=["home"],
)
def test_layers_are_found(home, folder, digits, pixels):
    where = storage.join(home, "20240301", folder) if folder else storage.join(home, "20240301")
    write_layers(where, pixels, digits=digits)
    storage.write_bytes(storage.join(where, "composite.png"), b"not a layer")
    segment = open_segment(storage.join(home, "20240301"))
    assert segment.name == "20240301"
    assert segment.layers == tuple(range(6))
    assert segment.dtype == np.uint16
    assert_reads(segment, pixels >> 8)


def test_path_with_slash_at_its_end_opens_the_same_segment(home, pixels):
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
def test_name_is_that_of_the_folder(path, name, tmp_path, monkeypatch):
    (tmp_path / "20230702").mkdir()
    monkeypatch.chdir(tmp_path / "20230702")
    assert name_of(path) == name


@pytest.mark.parametrize(
    ("home", "suffix"),
    [*(("local", kind) for kind in ("png", "jpg", "jpeg", "tiff", "TIF")), ("s3", "png")],
    indirect=["home"],
)
def test_layers_of_every_suffix_are_read(home, suffix):
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


def test_colour_layers_are_read_with_one_warning(tmp_path, caplog, pixels):
    colours = np.stack([pixels, pixels // 2, pixels // 3], axis=-1)
    write_layers(tmp_path, colours, photometric="rgb")
    with caplog.at_level(logging.WARNING, "inkdask"):
        segment = open_segment(str(tmp_path))
    [warning] = own_messages(caplog)
    assert "00.tif has 3 channels, of which the first is read (6 such layers)" in warning
    assert_reads(segment, pixels >> 8)


def test_jpeg_with_late_frame_header_is_opened(tmp_path, pixels):
    """After a preview or a profile of hundreds of kilobytes."""
    data = imagecodecs.jpeg_encode((pixels[0] >> 8).astype(np.uint8))
    segment = b"\xff\xe2" + (65535).to_bytes(2, "big") + bytes(65533)
    (tmp_path / "00.jpg").write_bytes(data[:2] + 3 * segment + data[2:])
    assert open_segment(str(tmp_path)).shape == (1, *pixels.shape[1:])


def test_sixteen_bit_png_is_read_as_its_high_bytes(tmp_path, pixels):
    for number, layer in enumerate(pixels):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    segment = open_segment(str(tmp_path))
    assert segment.dtype == np.uint16
    assert_reads(segment, pixels >> 8)


@pytest.mark.parametrize("home", ["local", "s3"], indirect=True)
def test_layers_named_by_the_segment_and_a_number_are_read(home, pixels):
    for number, layer in enumerate(pixels):
        name = f"20231122120123_{number:02d}.tif"
        storage.write_bytes(storage.join(home, "layers", name), encode(layer))
    segment = open_segment(home, (1, 5))
    assert segment.layers == (1, 2, 3, 4)
    assert_reads(segment, pixels[1:5] >> 8)
    assert identify(home, (1, 5), None, "0") == (segment.identity, None)
    write_layers(storage.join(home, "layers"), pixels[::-1])
    assert_reads(open_segment(home), pixels[::-1] >> 8)


def test_layers_of_two_segments_in_one_folder_are_refused(tmp_path, pixels):
    for name in ("a_00.tif", "b_01.tif"):
        (tmp_path / name).write_bytes(encode(pixels[0]))
    with pytest.raises(
        InkdaskError, match=r"^No layers found in .*: it holds a_00\.tif, b_01\.tif;"
    ):
        open_segment(tmp_path)


@pytest.mark.parametrize("home", ["local", "s3"], indirect=True)
def test_surface_volumes_of_a_segment_are_named(home, pixels):
    for name in ("1.zarr/0/.zarray", "2.tifs/00.tif", "3.tifs/00.tif"):
        storage.write_bytes(storage.join(home, "surface-volumes", name), encode(pixels[0]))
    storage.write_bytes(storage.join(home, "mesh", "x.tif"), b"")
    names = r"1.zarr \(unreadable\), 2.tifs \(1 layer\), 3.tifs \(1 layer\)"
    for uri in (home, storage.join(home, "surface-volumes")):
        with pytest.raises(InkdaskError, match=f"{uri} has several surface volumes, {names}; name"):
            open_segment(uri)


def test_what_is_there_instead_of_layers_is_named(tmp_path, pixels):
    write_layers(tmp_path / "odd" / "layers", pixels)
    for file in (tmp_path / "odd" / "layers").iterdir():
        file.rename(file.with_name(f"slice-{file.name}"))
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "layers").symlink_to(tmp_path / "gone")
    for name in ("a", "b", "c"):
        (tmp_path / "linked" / name).mkdir()
    (tmp_path / "one.tif").write_bytes(encode(pixels[0]))
    for name, says in (
        (
            "odd",
            r"odd/layers: it holds slice-00\.tif, slice-01\.tif, slice-02\.tif and 3 more; name",
        ),
        (
            "linked",
            r"linked: it holds layers \(a link to nothing\), a, b and 1 more; name a folder",
        ),
        ("one.tif", r"one\.tif: it is a file, and no stack"),
    ):
        with pytest.raises(InkdaskError, match=f"^No layers found in .*{says}"):
            open_segment(tmp_path / name)


# Which layers are read.


@pytest.mark.parametrize(
    ("first", "options", "layers"),
    [
        (0, {}, range(6)),
        (0, {"layers": (2, 5)}, range(2, 5)),
        (3, {"layers": (5, 9)}, range(5, 9)),
        (0, {"count": 4}, range(1, 5)),
        (10, {"count": 3}, range(11, 14)),
        (0, {"layers": (1, 3), "count": 4}, range(1, 3)),
    ],
)
def test_layers_are_chosen_by_range_or_count(tmp_path, first, options, layers, pixels, caplog):
    write_layers(tmp_path / "layers", pixels, first=first)
    with caplog.at_level(logging.DEBUG, "inkdask"):
        segment = open_segment(str(tmp_path), **options)
    assert segment.layers == tuple(layers)
    assert f"layers {' '.join(map(str, layers))} are read, in this order" in caplog.text
    assert_reads(segment, (pixels >> 8)[[number - first for number in layers]])


@pytest.mark.parametrize(
    ("layers", "count", "message"),
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
def test_missing_layers_are_named(tmp_path, layers, count, message, pixels):
    write_layers(tmp_path / "layers", pixels)
    with pytest.raises(InkdaskError, match=message):
        open_segment(str(tmp_path), layers, count=count)


@pytest.mark.parametrize("layers", [(1, 3), [1, 3], "1:3", range(1, 3), slice(1, 3)])
def test_range_of_layers_is_taken_in_every_form(tmp_path, layers, pixels):
    write_layers(tmp_path / "layers", pixels)
    assert open_segment(tmp_path, layers).layers == (1, 2)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("1-3", "^layers must be START:END, such as 0:26, but is '1-3'\\.$"),
        ((0, 2, 1), "^layers must be START:END"),
        (range(0, 4, 2), "^layers must be START:END"),
        ((3, 1), r"^START_LAYER \(3\) must be less than END_LAYER \(1\): the range is empty\.$"),
    ],
)
def test_malformed_range_of_layers_is_refused(tmp_path, layers, message):
    with pytest.raises(SettingsError, match=message):
        open_segment(tmp_path, layers)


def test_path_without_layers_is_explained(tmp_path, pixels):
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "empty").mkdir()
    for name, what in (
        ("nowhere", "does not exist"),
        ("notes.txt", "is a file"),
        ("empty", "is emp"),
    ):
        with pytest.raises(InkdaskError, match=f"^No layers found in .*{name}: it {what}"):
            open_segment(tmp_path / name)
    write_layers(tmp_path / "gap" / "layers", pixels)
    (tmp_path / "gap" / "layers" / "03.tif").unlink()
    with pytest.raises(InkdaskError, match="6 layers are wanted .* it has 5, 00 to 05 without 03"):
        open_segment(tmp_path / "gap", count=6)


def test_repr_shows_place_and_size(tmp_path, pixels):
    write_layers(tmp_path / "layers", pixels)
    segment = open_segment(tmp_path)
    assert repr(segment) == f"<Segment {tmp_path}: 6 layers of 130 x 100 pixels (x, y), uint16>"


def test_missing_folder_is_named_with_the_range(home):
    for path in ("nothing", "no/such/folder"):
        uri = storage.join(home, path)
        with pytest.raises(
            InkdaskError, match=f"^No layers found in {uri} for START_LAYER=0, END_"
        ):
            open_segment(uri, (0, 26))


@pytest.mark.parametrize("layers", [(0, 999_999_999), (4, 10**30)])
def test_endless_range_of_layers_is_refused_at_once(tmp_path, pixels, layers):
    write_layers(tmp_path, pixels)
    tracemalloc.start()
    with pytest.raises(InkdaskError, match=rf"^Layers 06, .* and {layers[1] - 14} more missing in"):
        open_segment(tmp_path, layers)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10e6


def test_picture_named_by_the_id_is_no_endless_gap(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    (tmp_path / "20231122120123.tif").write_bytes(encode(pixels[0]))
    with pytest.raises(InkdaskError, match="^Layers 06, .* and 20231122120109 more missing in"):
        open_segment(tmp_path)
    assert open_segment(tmp_path, (0, 6)).layers == tuple(range(6))


@pytest.mark.parametrize("folder", ["layers", "surface_volume", "x.tifs"])
def test_id_of_layers_may_have_underscores(tmp_path, pixels, folder):
    write_layers(tmp_path / folder, pixels)
    for file in (tmp_path / folder).iterdir():
        file.rename(file.with_name(f"PHerc_Paris4_{file.name}"))
    place = tmp_path / folder if folder == "x.tifs" else tmp_path
    assert_reads(open_segment(place), pixels >> 8)
    (tmp_path / folder / "Other_00.tif").write_bytes(encode(pixels[0]))
    with pytest.raises(InkdaskError, match="No layers found"):
        open_segment(place)


def test_pictures_in_a_segment_are_no_layers(tmp_path):
    Image.new("L", (30, 20)).save(tmp_path / "prediction_demo_00_26.png")
    with pytest.raises(InkdaskError, match="No layers found"):
        open_segment(tmp_path)


def test_gap_in_the_range_is_named(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    (tmp_path / "03.tif").unlink()
    for options in ({}, {"count": 4}, {"layers": (2, 6)}):
        with pytest.raises(InkdaskError, match="^Layer 03 missing in"):
            open_segment(str(tmp_path), **options)
    assert open_segment(str(tmp_path), (4, 6)).layers == (4, 5)


@pytest.mark.parametrize("double", ["003.tif", "03.png"])
def test_layer_in_two_files_is_refused(tmp_path, double, pixels):
    write_layers(tmp_path, pixels)
    (tmp_path / double).write_bytes(b"whatever")
    with pytest.raises(
        InkdaskError, match=r"Layer 03 is there twice: .*03\.\w+ and .*03\.\w+; remove"
    ):
        open_segment(str(tmp_path))
    assert open_segment(str(tmp_path), (0, 3)).layers == (0, 1, 2)


def test_jpeg_beside_a_tiff_of_the_layer_is_a_preview(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    for number in (0, 3):
        preview = np.zeros((10, 13), np.uint8)
        (tmp_path / f"{number:02d}.jpg").write_bytes(imagecodecs.jpeg_encode(preview))
    before = open_segment(tmp_path).identity
    assert_reads(open_segment(tmp_path), pixels >> 8)
    assert identify(str(tmp_path), (0, 6), None, "0") == (before, None)


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
def test_odd_layer_is_named(tmp_path, odd, message, pixels):
    write_layers(tmp_path, pixels)
    (tmp_path / "04.tif").write_bytes(odd)
    with pytest.raises(InkdaskError, match=message) as caught:
        open_segment(tmp_path)
    assert "\n" not in str(caught.value)


def test_path_that_is_not_utf8_is_read(tmp_path, pixels):
    place = os.fsdecode(os.fsencode(tmp_path) + b"/seg\xff")
    write_layers(place, pixels)
    assert_reads(open_segment(place, mask=f"{place}/00.tif"), pixels >> 8)
    write_layers(tmp_path / "seg", pixels)
    (tmp_path / "seg" / os.fsdecode(b"\xfe.tif")).write_bytes(b"no layer")
    assert_reads(open_segment(tmp_path / "seg"), pixels >> 8)


def test_picture_of_endless_size_is_refused_at_once(tmp_path, pixels):
    data = bytearray(imagecodecs.png_encode(pixels[0]))
    data[16:24] = struct.pack(">II", 2**31 - 1, 2**31 - 1)
    (tmp_path / "00.png").write_bytes(data)
    with pytest.raises(
        InkdaskError, match=r"00\.png has 1 layers of 2,147,483,647 x 2,147,483,647"
    ):
        open_segment(tmp_path)


def test_jpeg_of_twelve_bits_is_refused(tmp_path, pixels):
    """Its values reach 4,095, and their high byte is next to nothing."""
    (tmp_path / "00.jpg").write_bytes(imagecodecs.jpeg_encode(pixels[0] >> 4, bitspersample=12))
    with pytest.raises(InkdaskError, match=r"00\.jpg has 12-bit values: save it as uint8, or"):
        open_segment(tmp_path)


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("name", ["00.jpg", "00.png"])
def test_picture_that_is_turned_is_refused(tmp_path, pixels, name, orientation):
    exif = Image.Exif()
    exif[274] = orientation
    Image.fromarray((pixels[0] >> 8).astype(np.uint8)).save(tmp_path / name, exif=exif)
    if orientation == 1:
        assert open_segment(tmp_path).shape == (1, *SHAPE[1:])
        return
    with pytest.raises(InkdaskError, match=rf"{name} has Orientation 6, .*: save it upright"):
        open_segment(tmp_path)


@pytest.mark.parametrize(
    ("name", "data"),
    [("00.png", b"\x89PNG"), ("00.jpg", b"nothing"), ("00.png", b"\x89PNG\r\n\x1a\n" + bytes(30))],
)
def test_broken_picture_is_named_at_opening(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InkdaskError, match=rf"{name} cannot be read as a PNG or JPEG"):
        open_segment(str(tmp_path))


def test_jpeg_without_channels_is_refused(tmp_path):
    data = imagecodecs.jpeg_encode(random_volume((1, 20, 30), "|u1")[0])
    at = data.index(b"\xff\xc0")  # the frame header: length, bits, height, width, channels
    (tmp_path / "00.jpg").write_bytes(data[: at + 9] + b"\0" + data[at + 10 :])
    with pytest.raises(InkdaskError, match=r"00\.jpg has no pixels"):
        open_segment(tmp_path)


def test_truncated_picture_is_named_at_reading(tmp_path, pixels):
    (tmp_path / "00.png").write_bytes(imagecodecs.png_encode(pixels[0])[:-3000])
    segment = open_segment(str(tmp_path))
    with pytest.raises(InkdaskError, match=r"00\.png is truncated or corrupt"):
        segment.volume.compute()


def test_file_shortened_after_opening_is_named(tmp_path, pixels):
    write_layers(tmp_path, pixels)
    segment = open_segment(str(tmp_path))
    (tmp_path / "02.tif").write_bytes(b"")
    with pytest.raises(InkdaskError, match=r"02\.tif is truncated: bytes"):
        segment.volume.compute()


def test_denied_or_missing_bucket_is_named(s3, faults):
    with pytest.raises(InkdaskError, match="^The bucket of s3://not-there/seg does not exist"):
        open_segment("s3://not-there/seg")
    faults.inject(["403"])
    with pytest.raises(InkdaskError, match=f"^Access to {s3}/seg is denied"):
        open_segment(f"{s3}/seg")


def test_server_silent_after_the_listing_is_named(s3, faults, monkeypatch, pixels):
    write_layers(f"{s3}/layers", pixels)
    monkeypatch.setattr(s3_module, "READ_TIMEOUT", 0.3)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "silent")
    faults.inject(["stall"], match=r"GET .*\.tif")
    with pytest.raises(InkdaskError, match=rf"^{s3}/layers/0\d\.tif does not answer"):
        open_segment(s3)


# Which segment it is.


def test_identity_of_unpacked_copies_differs_by_place(tmp_path, pixels):
    identities = set()
    for folder in ("a", "b"):
        write_layers(tmp_path / folder / "segment", pixels)
        for file in (tmp_path / folder / "segment").iterdir():
            os.utime(file, ns=(10**18, 10**18))
        identities.add(open_segment(tmp_path / folder / "segment").identity)
    assert len(identities) == 2


def test_identity_is_the_same_however_the_path_is_written(tmp_path, pixels, monkeypatch):
    write_layers(tmp_path / "layers", pixels)
    monkeypatch.chdir(tmp_path)
    paths = [tmp_path, ".", f"{tmp_path}/", f"file://{tmp_path}", "../" + tmp_path.name]
    assert len({open_segment(path).identity for path in paths}) == 1


def test_identity_changes_with_bytes_in_the_middle_of_a_file(tmp_path):
    write_layers(tmp_path, random_volume((2, 200, 200)))
    path = tmp_path / "01.tif"
    before, times = open_segment(tmp_path).identity, path.stat()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert open_segment(tmp_path).identity != before


def test_identity_of_links_changes_with_their_targets(tmp_path, pixels):
    write_layers(tmp_path / "kept", pixels)
    (tmp_path / "layers").mkdir()
    for file in (tmp_path / "kept").iterdir():
        (tmp_path / "layers" / file.name).symlink_to(file)
    before = open_segment(tmp_path).identity
    time = (tmp_path / "kept" / "00.tif").stat().st_mtime + 5
    os.utime(tmp_path / "kept" / "00.tif", (time, time))
    assert open_segment(tmp_path).identity != before


def test_linked_folder_of_layers_is_read(tmp_path, pixels):
    write_layers(tmp_path / "elsewhere", pixels)
    (tmp_path / "segment").mkdir()
    (tmp_path / "segment" / "layers").symlink_to(tmp_path / "elsewhere")
    assert_reads(open_segment(tmp_path / "segment"), pixels >> 8)


@pytest.mark.parametrize("codec", [None, "lzw"])
def test_layer_rewritten_on_s3_after_opening_is_refused(s3, pixels, monkeypatch, codec):
    monkeypatch.setattr(volume, "WHOLE_BYTES", 0)
    monkeypatch.setattr(volume, "BLOCK_SIDE", 10)  # compressed layers are decoded as a whole
    write_layers(f"{s3}/layers", pixels, compression=codec)
    write_mask(f"{s3}/m.png", pixels[0] > 0)
    segment = open_segment(s3, mask=f"{s3}/m.png")
    write_layers(f"{s3}/layers", pixels[:1] + 256, compression=codec)
    write_mask(f"{s3}/m.png", pixels[0] == 0)
    for array, name in ((segment.volume, "layers/00.tif"), (segment.mask, "m.png")):
        with pytest.raises(InkdaskError) as caught:
            array.compute()
        assert str(caught.value) == (
            f"{s3}/{name} has changed since it was opened: run the job again."
        )


# Masks.


def write_mask(uri, mask):
    storage.write_bytes(uri, imagecodecs.png_encode(mask.astype(np.uint8) * 255))


@pytest.fixture
def mask():
    return np.random.default_rng(5).random(SHAPE[1:]) < 0.5


def test_mask_in_the_segment_is_found(home, pixels, mask):
    uri = storage.join(home, "20230702")
    write_layers(storage.join(uri, "layers"), pixels)
    write_mask(storage.join(uri, "20230702_supervision_mask.png"), mask)  # of something else
    assert open_segment(uri).mask is None
    plain = open_segment(uri).identity
    write_mask(storage.join(uri, "20230702_mask.png"), mask)
    segment = pickle.loads(pickle.dumps(open_segment(uri)))
    assert segment.mask_uri == storage.join(uri, "20230702_mask.png")
    assert segment.mask.dtype == bool
    assert segment.identity == plain
    assert open_segment(uri, mask="none").mask is None
    assert open_segment(uri, mask="none").mask_identity is None
    np.testing.assert_array_equal(segment.mask.compute(), mask)
    cropped = segment.crop(slice(10, 60), slice(70, 120))
    np.testing.assert_array_equal(cropped.mask.compute(), mask[10:60, 70:120])


def test_mask_by_path_is_read(tmp_path, pixels, mask):
    write_layers(tmp_path / "layers", pixels)
    write_mask(str(tmp_path / "b_mask.png"), mask)
    assert open_segment(str(tmp_path)).mask is None
    np.testing.assert_array_equal(
        open_segment(str(tmp_path), mask=str(tmp_path / "b_mask.png")).mask.compute(), mask
    )
    tifffile.imwrite(tmp_path / "mask.tif", mask.astype(np.uint8))
    segment = open_segment(str(tmp_path), mask=str(tmp_path / "mask.tif"))
    np.testing.assert_array_equal(segment.mask.compute(), mask)


@pytest.mark.parametrize("codec", [None, "lzw"])
@pytest.mark.parametrize("kind", ["uint16", "rgb", "rgba", "planes", "red"])
def test_mask_of_any_tiff_counts_every_colour_and_no_alpha(tmp_path, pixels, mask, kind, codec):
    write_layers(tmp_path / "layers", pixels)
    colours = np.zeros((*mask.shape, 4), np.uint8)
    colours[..., 0 if kind == "red" else 2] = mask
    colours[..., 3] = 255
    data, options = {
        "uint16": (mask.astype(np.uint16), {}),
        "rgba": (colours, {"photometric": "rgb", "extrasamples": ["unassalpha"]}),
        "planes": (
            np.moveaxis(colours[..., :3], 2, 0),
            {"photometric": "rgb", "planarconfig": "separate"},
        ),
    }.get(kind, (colours[..., :3], {"photometric": "rgb"}))
    tifffile.imwrite(tmp_path / "m.tif", data, compression=codec, **options)
    segment = open_segment(str(tmp_path), mask=str(tmp_path / "m.tif"))
    np.testing.assert_array_equal(segment.mask.compute(), mask)


def test_mask_of_several_pages_is_refused(tmp_path, pixels, mask):
    """Each page may be one colour, and the first alone would be read."""
    write_layers(tmp_path / "layers", pixels)
    pages = np.stack([np.zeros_like(mask, np.uint8), mask.astype(np.uint8)])
    tifffile.imwrite(tmp_path / "m.tif", pages, photometric="minisblack")
    with pytest.raises(InkdaskError, match=r"The mask .*m\.tif has several pages"):
        open_segment(tmp_path, mask=tmp_path / "m.tif")


@pytest.mark.parametrize("folder", ["surface_volume", "layers"])
def test_mask_beside_the_layers_is_that_of_the_segment(home, pixels, mask, folder):
    uri = storage.join(home, "fragment")
    write_layers(storage.join(uri, folder), pixels)
    write_mask(storage.join(uri, "mask.png"), mask)
    write_mask(storage.join(uri, "ir.png"), mask)
    segment = open_segment(uri)
    assert segment.mask_uri == storage.join(uri, "mask.png")
    np.testing.assert_array_equal(segment.mask.compute(), mask)
    write_mask(storage.join(uri, "fragment_mask.png"), ~mask)
    np.testing.assert_array_equal(open_segment(uri).mask.compute(), ~mask)


def test_mask_of_another_size_or_missing_is_refused(tmp_path, pixels, mask):
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
def test_description_reads_little_of_a_segment(tmp_path, options, layout):
    write_layers(tmp_path / "layers", random_volume((6, 1000, 1000)), **options)
    segment = open_segment(str(tmp_path), (1, 4))
    before = storage.counters()
    empty = sample(segment, share=1 / 8).empty
    assert (storage.counters() - before).bytes_read <= 0.5 * segment.stored_bytes
    assert segment.source.words == layout
    assert segment.shape == (3, 1000, 1000)
    assert segment.dtype == "uint16"
    assert segment.layers == (1, 2, 3)
    assert segment.stored_bytes == sum(
        (tmp_path / "layers" / f"{number:02d}.tif").stat().st_size for number in (1, 2, 3)
    )
    assert empty == pytest.approx(0.2, abs=0.1)


def test_description_of_pictures_of_uint8_reads_nothing(tmp_path, pixels):
    for number, layer in enumerate((pixels >> 8).astype(np.uint8)):
        (tmp_path / f"{number:02d}.png").write_bytes(imagecodecs.png_encode(layer))
    segment = open_segment(str(tmp_path))
    before = storage.counters()
    assert segment.source.words == "PNG"
    assert sample(segment).empty is None
    assert storage.counters() == before


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_mask_ignores_alpha(tmp_path, pixels, mode):
    write_layers(tmp_path / "layers", pixels)
    image = Image.new(mode, (130, 100), tuple([0] * (len(mode) - 1) + [255]))
    image.paste(tuple([255] * len(mode)), (20, 10, 60, 50))
    image.save(tmp_path / "m.png")
    mask = open_segment(str(tmp_path), mask=tmp_path / "m.png").mask.compute()
    assert mask[10:50, 20:60].all()
    assert mask.sum() == 40 * 40


def test_mask_identity_changes_when_the_mask_is_written_anew(tmp_path, pixels):
    write_layers(tmp_path / "layers", pixels)
    Image.new("L", (130, 100), 255).save(tmp_path / "m.png")
    found = set()
    for time in (0, 10**9):
        os.utime(tmp_path / "m.png", ns=(time, time))
        segment = open_segment(str(tmp_path), mask=tmp_path / "m.png")
        found.add((segment.identity, segment.mask_identity, segment.mask.name))
    assert len(found) == 2
    assert len({identity for identity, *_ in found}) == 1
    assert len({name for *_, name in found}) == 2


@pytest.mark.parametrize("name", ["03.tif.aux.xml", "03.tiff_old", "04.tif.part", "07.tif/"])
def test_file_named_almost_like_a_layer_is_ignored(tmp_path, pixels, name):
    write_layers(tmp_path, pixels)
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(b"no layer")
    assert open_segment(str(tmp_path)).layers == tuple(range(6))


def test_png_among_tiffs_is_read(tmp_path, pixels):
    write_layers(tmp_path, pixels, rowsperstrip=16)
    (tmp_path / "02.tif").unlink()
    (tmp_path / "02.png").write_bytes(imagecodecs.png_encode(pixels[2]))
    assert_reads(open_segment(str(tmp_path)), pixels >> 8)


def test_colour_png_is_read_as_its_first_channel(tmp_path):
    colours = np.random.default_rng(0).integers(0, 256, (100, 130, 4), dtype=np.uint8)
    (tmp_path / "00.png").write_bytes(imagecodecs.png_encode(colours))
    assert_reads(open_segment(str(tmp_path)), colours[None, ..., 0])


def test_palette_is_refused_in_a_layer_and_taken_in_a_mask(tmp_path, pixels):
    """A layer's values would be the red of its colours, and not what was scanned."""
    write_layers(tmp_path / "layers", pixels)
    image = Image.fromarray((pixels[0] >> 8).astype(np.uint8)).convert("P")
    image.save(tmp_path / "m.png")
    mask = open_segment(tmp_path, mask=tmp_path / "m.png").mask.compute()
    assert np.array_equal(mask, pixels[0] >> 8 > 0)
    image.save(tmp_path / "layers" / "06.png")
    with pytest.raises(InkdaskError, match=r"06\.png has colours of a palette"):
        open_segment(tmp_path)


@pytest.mark.parametrize("name", ["layers", "surface_volume"])
def test_folder_of_layers_is_that_of_its_segment(tmp_path, own_environment, name, monkeypatch):
    segment = tmp_path / "seg"
    write_layers(segment / name, random_volume((3, 90, 100)))
    Image.fromarray(np.eye(90, 100, dtype=np.uint8)).save(segment / "mask.png")
    options = {"model": depth_slope, "stride": 32}
    first = inkdask.run(segment, **options)
    monkeypatch.chdir(segment)
    for call in (inkdask.run, inkdask.reduce, inkdask.check):
        for path in (segment / name, f"{segment}/{name}/", name):
            assert call(path, **options) == first
    assert open_segment(segment / name).mask_uri == str(segment / "mask.png")
    assert not (segment / name / "predictions").exists()


def test_folder_named_layers_may_be_a_segment(tmp_path):
    write_layers(tmp_path / "layers" / "layers", random_volume((3, 9, 10)))
    assert open_segment(tmp_path / "layers").uri == str(tmp_path / "layers")
    write_layers(tmp_path / "two" / "layers", random_volume((3, 9, 10)))
    write_layers(tmp_path / "two" / "surface_volume", random_volume((4, 9, 10)))
    assert open_segment(tmp_path / "two" / "surface_volume").shape == (4, 9, 10)
