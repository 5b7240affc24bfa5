"""Exports of a stored prediction: read back equal by other libraries, whole or not there."""

import io
import itertools
import json
import logging
import shutil
import struct
import subprocess
import sys
from dataclasses import replace

import dask.array as da
import numpy as np
import png
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import inkdask
from inkdask import cli, storage
from inkdask.errors import InkdaskError, SettingsError
from inkdask.pictures.bands import bands, in_order
from inkdask.pictures.colour import colour_table
from inkdask.pictures.picture import open_picture
from inkdask.pictures.png import write_png
from inkdask.pictures.pyramid import halve, level_shapes, write_pyramid
from inkdask.pictures.reading import read_facts
from inkdask.pictures.scale_bar import ScaleBar, with_scale_bar
from inkdask.pictures.tiff import write_tiff
from inkdask.progress import Meter
from tests.files import random_volume, read_picture, write_layers
from tests.jobs import made_of

pytestmark = pytest.mark.usefixtures("own_environment")

HEIGHT, WIDTH = 620, 210
TOLD = replace(made_of("nowhere"), created="ποτέ")


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    pixels = np.cumsum(rng.integers(-3, 4, (HEIGHT, WIDTH)), axis=1) + 128
    return np.clip(pixels, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def stored(tmp_path_factory, pixels):
    uri = str(tmp_path_factory.mktemp("stored") / "p.zarr")
    write_pyramid(da.from_array(pixels, chunks=128), uri, TOLD, 8.0, (64, 32))
    return uri


@pytest.fixture
def prediction(tmp_path, stored):
    """A stored prediction of 8 um pixels, which begins at row 64 and column 32 of its segment."""
    return shutil.copytree(stored, str(tmp_path / "prediction_toy_00_03.zarr"))


@settings(max_examples=20)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    channels=st.sampled_from([None, 3]),
    chunk=st.integers(5, 40),
)
def test_png_is_read_back_equal(tmp_path_factory, height, width, channels, chunk):
    path = tmp_path_factory.mktemp("png") / "picture.png"
    shape = (height, width, channels)[: 3 if channels else 2]
    pixels = np.random.default_rng(height).integers(0, 256, shape, dtype=np.uint8)
    write_png(da.from_array(pixels, chunks=(chunk, chunk, 3)[: len(shape)]), path, {}, 7.91)
    with Image.open(path) as image:
        assert image.mode == ("RGB" if channels else "L")
        assert np.array_equal(np.asarray(image), pixels)
    rows = np.vstack(list(png.Reader(filename=str(path)).asDirect()[2]))  # checks every checksum
    assert np.array_equal(rows.reshape(shape), pixels)


def test_png_of_many_strips_is_one_stream(tmp_path, monkeypatch):
    monkeypatch.setattr("inkdask.pictures.png.STRIP", 1000)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 90), dtype=np.uint8)
    write_png(da.from_array(pixels, chunks=64), tmp_path / "p.png", {"inkdask": "οὐ"})
    with Image.open(tmp_path / "p.png") as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.text == {"inkdask": "οὐ"}


def test_bands_are_lower_where_pictures_are_wide(monkeypatch):
    monkeypatch.setattr("inkdask.pictures.bands.BAND", 1 << 20)
    wide = da.zeros((2000, 4000), dtype=np.uint8, chunks=(1000, 1000))
    assert next(bands(wide, "PNG")).shape == ((1 << 20) // 4000, 4000)
    narrow = da.zeros((2000, 400), dtype=np.uint8, chunks=(1000, 100))
    assert [len(band) for band in bands(narrow, "PNG")] == [1000, 1000]


def test_in_order_takes_a_few_items_ahead():
    taken = []

    def items():
        for number in range(1000):
            taken.append(number)
            yield number

    answers = in_order(lambda number: number * 2, items())
    assert next(answers) == 0
    assert len(taken) < 100
    assert list(answers) == [number * 2 for number in range(1, 1000)]


def test_export_writes_the_same_pixels_in_all_kinds(home, prediction, pixels):
    names = ("p.png", "p.tif", "z.tiff", "p.zarr")
    targets = [storage.join(home, "pictures", name) for name in names]
    assert inkdask.export(prediction, targets[:2] + targets[3:]) == targets[:2] + targets[3:]
    inkdask.export(prediction, targets[2], compression="zstd")

    with Image.open(io.BytesIO(storage.read_bytes(targets[0]))) as image:
        assert np.array_equal(np.asarray(image), pixels)
        assert image.info["dpi"] == pytest.approx((3175, 3175), abs=1)
    for target, compression in zip(targets[1:3], ("ADOBE_DEFLATE", "ZSTD"), strict=True):
        with tifffile.TiffFile(io.BytesIO(storage.read_bytes(target))) as tiff:
            page = tiff.pages.first
            assert np.array_equal(page.asarray(), pixels)
            assert tiff.is_bigtiff
            assert page.is_tiled
            assert page.compression.name == compression
            assert page.tags["ResolutionUnit"].value == tifffile.RESUNIT.CENTIMETER
            assert page.get_resolution(tifffile.RESUNIT.MICROMETER) == pytest.approx((1 / 8, 1 / 8))
    copy = open_picture(targets[3])
    assert np.array_equal(copy.levels[0].compute(), pixels)
    assert (copy.pixel_um, copy.corner) == (8.0, (64, 32))
    assert {entry.name for entry in storage.list_folder(storage.join(home, "pictures"))} == set(
        names
    )


def test_overview_is_smaller_and_knows_its_scale(prediction, pixels, tmp_path):
    inkdask.export(prediction, tmp_path / "p.jpg", max_side=400)
    with Image.open(tmp_path / "p.jpg") as image:
        assert image.size == (105, 310)
        assert image.info["dpi"] == pytest.approx((25400 / 16,) * 2, abs=1)
        assert json.loads(image.info["comment"])["created"] == "ποτέ"
        off = np.abs(np.asarray(image).astype(int) - halve(pixels))
        assert off.mean() < 2
    inkdask.export(prediction, tmp_path / "small.png", max_side=200)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "small.png")), halve(halve(pixels)))


def test_region_that_begins_in_the_last_row_of_a_chunk_is_read_in_chunks(stored, pixels):
    part = open_picture(stored).crop((32, 64 + 127, 32 + WIDTH, 64 + HEIGHT))
    assert part.levels[0].chunks[0][0] == 128
    np.testing.assert_array_equal(part.levels[0].compute(), pixels[127:])


def test_export_of_a_region_is_cut_out(prediction, pixels, tmp_path):
    inkdask.export(
        prediction, [tmp_path / "part.png", tmp_path / "part.zarr"], roi_xyxy="132,164,232,214"
    )
    assert np.array_equal(np.asarray(Image.open(tmp_path / "part.png")), pixels[100:150, 100:200])
    part = open_picture(str(tmp_path / "part.zarr"))
    assert part.corner == (164, 132)


def test_export_of_a_region_beyond_the_picture_is_cut_with_a_note(
    prediction, pixels, tmp_path, caplog
):
    inkdask.export(prediction, tmp_path / "part.tif", roi_xyxy="0,0,132,4000")
    assert np.array_equal(tifffile.imread(tmp_path / "part.tif"), pixels[:, :100])
    assert (
        f"ROI_XYXY 0,0,132,4000 reaches beyond {prediction}, which shows 32,64,242,684 of its "
        "segment: 32,64,132,684 is read"
    ) in caplog.text
    words = read_facts(str(tmp_path / "part.tif")).provenance.export
    assert words[-2:] == ("--roi-xyxy", "32,64,132,684")


@pytest.mark.parametrize("shape", [(1500, 2301), (1301, 777, 3), (512, 512), (513, 40)])
def test_tiff_has_smaller_images_that_are_means_of_the_one_before(tmp_path, shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    write_tiff(da.from_array(pixels, chunks=(600, 600, 3)[: len(shape)]), tmp_path / "p.tif", "", 8)
    with tifffile.TiffFile(tmp_path / "p.tif") as tiff:
        (series,) = tiff.series
        assert [level.shape[:2] for level in series.levels] == level_shapes(shape[:2])
        for number, level in enumerate(series.levels):
            assert np.array_equal(level.asarray(), pixels)
            page = level.pages[0]
            assert page.is_tiled
            assert page.is_reduced == (number > 0)
            side = page.get_resolution(tifffile.RESUNIT.MICROMETER)[0]
            assert side == pytest.approx(1 / (8 * 2**number))
            channels = [pixels[..., n] for n in range(3)] if len(shape) == 3 else [pixels]
            pixels = np.stack([halve(channel) for channel in channels], axis=-1)
            pixels = pixels if len(shape) == 3 else pixels[..., 0]
    levels = len(level_shapes(shape[:2]))
    assert (f"{levels} levels" in read_facts(str(tmp_path / "p.tif")).kind) == (levels > 1)


def test_levels_of_a_tiff_are_those_of_the_prediction(prediction, tmp_path):
    inkdask.export(prediction, tmp_path / "p.tif")
    with tifffile.TiffFile(tmp_path / "p.tif") as tiff:
        for level, stored in zip(
            tiff.series[0].levels, open_picture(prediction).levels, strict=True
        ):
            assert np.array_equal(level.asarray(), stored.compute())


def test_export_with_a_colour_map_has_its_colours(prediction, pixels, tmp_path):
    inkdask.export(prediction, [tmp_path / "p.png", tmp_path / "p.tif"], colour_map="inferno")
    table = colour_table("inferno")
    assert table[0].sum() < 10
    assert table[255].tolist() == [252, 255, 164]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), table[pixels])
    assert np.array_equal(tifffile.imread(tmp_path / "p.tif"), table[pixels])


def test_reverse_video_is_the_negative_with_its_scale_bar(prediction, pixels, tmp_path):
    bar, reverse = tmp_path / "bar.png", [tmp_path / "p.png", tmp_path / "p.zarr"]
    inkdask.export(prediction, bar, add_scale_bar=True)
    inkdask.export(prediction, reverse, reverse_video=True, add_scale_bar=True)
    assert np.array_equal(read_picture(reverse[0]), 255 - read_picture(bar))
    assert np.array_equal(read_picture(reverse[0])[:500], 255 - pixels[:500])
    assert np.array_equal(open_picture(str(reverse[1])).levels[0].compute(), pixels)


# The scale bar


@pytest.mark.parametrize("ground", [0, 90, 255])
@pytest.mark.parametrize("channels", [None, 3])
def test_scale_bar_is_as_long_as_it_says(ground, channels):
    shape = (450, 1000, channels)[: 3 if channels else 2]
    canvas = da.full(shape, ground, dtype=np.uint8, chunks=(128, 300, 3)[: len(shape)])
    drawn = with_scale_bar(canvas, ScaleBar.of(shape, 10.0, 2500.0)).compute()
    grey = drawn if channels is None else drawn[:, :, 1]
    changed = np.argwhere(grey != ground)
    assert (changed.min(axis=0) > [350, 650]).all()  # at the lower right, and small
    # Somewhere 250 pixels of 10 um are white between black rims, on whatever ground.
    rows = [[(value, len(list(run))) for value, run in itertools.groupby(row)] for row in grey]
    assert any(
        (255, 250) in row and {row[row.index((255, 250)) + side][0] for side in (-1, 1)} == {0}
        for row in rows
    )


def test_scale_bar_that_does_not_fit_becomes_a_shorter_round_one(caplog):
    with caplog.at_level(logging.WARNING):
        bar = ScaleBar.of((600, 1664), 7.91, 10_000.0)
    assert (bar.label, bar.pixels) == ("2 mm", 253)
    assert "1 cm does not fit" in caplog.text
    assert ScaleBar.of((30_000, 30_000), 7.91, 10_000.0).label == "1 cm"
    assert ScaleBar.of((9_000, 9_000), 2.4, 500.0).label == "0.5 mm"
    assert ScaleBar.of((20, 20), 0.5, 10_000.0).pixels <= 7


def test_scale_bar_larger_than_the_picture_is_clipped():
    canvas = da.zeros((7, 5), dtype=np.uint8, chunks=3)
    assert with_scale_bar(canvas, ScaleBar.of((7, 5), 8.0, 10_000.0)).compute().shape == (7, 5)


def test_scale_bar_without_pixel_size_is_refused(tmp_path, pixels, capsys):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(da.from_array(pixels), uri, None)
    with pytest.raises(SettingsError, match="PIXEL_RESOLUTION_UM"):
        inkdask.export(uri, tmp_path / "p.png", add_scale_bar=True)
    assert not (tmp_path / "p.png").exists()
    inkdask.export(uri, tmp_path / "p.png", add_scale_bar=True, pixel_resolution_um=8)
    assert not np.array_equal(np.asarray(Image.open(tmp_path / "p.png")), pixels)


def test_job_without_pixel_size_fails_before_it_reads(segment):
    with pytest.raises(SettingsError, match="PIXEL_RESOLUTION_UM is not set"):
        inkdask.run(segment[0], model="demo", add_scale_bar=True, model_in_chans=3)
    assert [path.name for path in segment[0].iterdir()] == ["layers"]


# The overlay


@pytest.fixture
def segment(tmp_path):
    volume = random_volume((3, 690, 250))
    write_layers(tmp_path / "segment" / "layers", volume, compression="zlib", rowsperstrip=64)
    return tmp_path / "segment", volume >> 8


@pytest.mark.parametrize(("how", "flat"), [("max", np.max), ("mean", np.mean)])
def test_overlay_shows_ink_over_papyrus(tmp_path, segment, how, flat):
    place, volume = segment
    ink = np.zeros((HEIGHT, WIDTH), np.uint8)
    ink[300:330, 100:200] = 255
    uri = str(tmp_path / "p.zarr")
    write_pyramid(da.from_array(ink, chunks=128), uri, made_of(str(place)), None, (64, 32))
    inkdask.export(uri, tmp_path / "black.png", overlay=how, opacity=1)
    inkdask.export(uri, tmp_path / "red.png", overlay=how, colour_map="Reds", opacity=1)
    black, red = (
        np.asarray(Image.open(tmp_path / f"{n}.png")).astype(int) for n in ("black", "red")
    )
    letter = ink > 0
    under = flat(volume, axis=0)[64 : 64 + HEIGHT, 32 : 32 + WIDTH]
    papyrus = (under > 0) & ~letter
    assert black[letter].max() < 20
    assert (red[letter] == colour_table("Reds")[255]).all()
    assert np.array_equal(black[papyrus], red[papyrus])
    assert not black[(under == 0) & ~letter].any()
    # The papyrus is brighter where its layers are, from dark brown to ivory.
    assert np.corrcoef(black[papyrus].sum(axis=1), under[papyrus])[0, 1] > 0.95
    assert black[papyrus].sum(axis=1).min() < 200
    assert black[papyrus].sum(axis=1).max() > 650


def test_overlay_of_an_overview_is_halved(tmp_path, segment, prediction):
    inkdask.export(
        prediction, tmp_path / "p.jpg", overlay="max", segment=str(segment[0]), max_side=200
    )
    assert Image.open(tmp_path / "p.jpg").size == (53, 155)


# Mistakes


@pytest.mark.parametrize(
    ("to", "options", "says"),
    [
        ("p.gif", {}, "p.gif must end in one of .png"),
        ("p.png", {"colour_map": "infernal"}, "no colour map 'infernal'"),
        ("p.png", {"overlay": "median"}, "overlay must be max or mean"),
        ("p.png", {"opacity": 2}, "opacity must be between 0 and 1"),
        ("p.tif", {"compression": "lzw"}, "compression must be deflate or zstd"),
        ("p.png", {"max_side": 0}, "max_side"),
        ("p.jpg", {"max_side": 60_000}, "at most 8,192 pixels"),
        ("p.zarr", {"overlay": "max"}, "p.zarr would be a pyramid"),
        ("prediction_toy_00_03.zarr", {}, "there already"),
        ("p.png", {"roi_xyxy": "0,0,10,10"}, "ROI_XYXY 0,0,10,10"),
        ("p.png", {"no_such": 1}, "no_such"),
        ("p.png", {"overlay": "max", "reverse_video": True}, "REVERSE_VIDEO is for the ink"),
    ],
)
def test_mistake_is_reported_before_anything_is_written(prediction, tmp_path, to, options, says):
    with pytest.raises(SettingsError, match=says) as error:
        inkdask.export(prediction, tmp_path / to, **options)
    assert len(str(error.value).splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["prediction_toy_00_03.zarr"]


@pytest.mark.parametrize("command", [inkdask.export, inkdask.evidence])
def test_picture_instead_of_its_pyramid_is_pointed_to_it(prediction, tmp_path, command):
    picture = prediction.replace(".zarr", ".png")
    inkdask.export(prediction, picture)
    to = [tmp_path / "p.tif"] if command is inkdask.export else []
    with pytest.raises(InkdaskError, match=f"is beside it: {prediction}\\.$"):
        command(picture, *to)


def test_overlay_reports_missing_or_smaller_segment(prediction, tmp_path, segment):
    with pytest.raises(InkdaskError, match="nowhere"):
        inkdask.export(prediction, tmp_path / "p.png", overlay="max")
    small = tmp_path / "small"
    write_layers(small / "layers", segment[1][:, :300])
    with pytest.raises(InkdaskError, match="has 250 x 300 pixels"):
        inkdask.export(prediction, tmp_path / "p.png", overlay="max", segment=str(small))


def test_damaged_prediction_leaves_no_file(prediction, tmp_path):
    chunk = tmp_path / "prediction_toy_00_03.zarr" / "0" / "c" / "4" / "1"
    chunk.write_bytes(b"not zstd")
    before = set(tmp_path.iterdir())
    for name in ("p.png", "p.tif", "p.jpg", "p.zarr"):
        with pytest.raises(InkdaskError, match=r"_03.zarr/0 cannot be read .* at rows 512"):
            inkdask.export(prediction, tmp_path / name)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize("ending", ["tif", "png", "jpg"])
def test_progress_of_an_export_reaches_its_end(prediction, tmp_path, monkeypatch, ending):
    ends, leave = [], Meter.__exit__

    def recorded(meter, *error):
        ends.append((meter.done, meter.total))
        leave(meter, *error)

    monkeypatch.setattr(Meter, "__exit__", recorded)
    inkdask.export(prediction, tmp_path / f"p.{ending}")
    assert ends == [(total, total) for _, total in ends] != []


def test_command_line_prints_the_files(prediction, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.main(["export", prediction, "--to", "a.png", "--to", "b.tif", "--colour-map", "magma"])
    assert capsys.readouterr().out.split() == ["a.png", "b.tif"]
    assert tifffile.imread("b.tif").shape == (HEIGHT, WIDTH, 3)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["export", prediction, "--to", "p.gif"])
    assert stopped.value.code == 2


EXPORT = """
import sys
import inkdask
from inkdask import engine
from inkdask.memory import peak_memory
from inkdask.pictures import exporting

engine.CPU_COUNT = 2  # each thread holds pieces of its own
floor = peak_memory()
inkdask.export(sys.argv[1], sys.argv[2:])
print(peak_memory() - floor)
"""


@pytest.mark.slow
def test_export_memory_does_not_grow_with_the_picture(tmp_path):
    uri = str(tmp_path / "prediction.zarr")
    cheap = da.from_array(np.eye(512, dtype=np.uint8))  # to compress
    write_pyramid(da.tile(cheap, (48, 8)), uri, None)
    files = [str(tmp_path / name) for name in ("p.png", "p.tif", "p.zarr")]
    done = subprocess.run(
        [sys.executable, "-c", EXPORT, uri, *files], capture_output=True, text=True, check=True
    )
    assert int(done.stdout) < 100e6  # the picture has 100 MB, what is imported about 40


def test_export_does_not_replace_another_zarr(home, prediction):
    other = storage.join(home, "volume.zarr")
    zarr.create_array(storage.zarr_store(other), data=np.ones((3, 4, 5), np.uint8))
    with pytest.raises(SettingsError, match="there already"):
        inkdask.export(prediction, other)
    assert storage.zarr_array(other).shape == (3, 4, 5)


def test_scale_bar_of_an_overview_is_as_long_as_it_says(tmp_path):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(da.full((400, 2000), 90, dtype=np.uint8, chunks=500), uri, None, 10.0)
    to = tmp_path / "p.png"
    inkdask.export(uri, to, max_side=1000, add_scale_bar=True, scale_bar_length_um=2000)
    white = read_picture(to) == 255
    lengths = (len(list(run)) for row in white for value, run in itertools.groupby(row) if value)
    assert max(lengths) == 100


def test_jpeg_is_an_overview_by_default(prediction, tmp_path, monkeypatch):
    monkeypatch.setattr("inkdask.pictures.exporting.OVERVIEW", 300)
    inkdask.export(prediction, tmp_path / "p.jpg")
    assert read_picture(tmp_path / "p.jpg").shape == (155, 53)


def test_export_hides_passwords(tmp_path):
    uri = str(tmp_path / "p.zarr")
    write_pyramid(
        da.zeros((62, 53), dtype=np.uint8), uri, made_of("s3://key:marked-secret@bucket/segment")
    )
    inkdask.export(uri, tmp_path / "p.png")
    with Image.open(tmp_path / "p.png") as image:
        assert "bucket/segment" in image.text["inkdask"]
        assert "marked-secret" not in image.text["inkdask"]


def test_export_checks_all_targets_before_it_writes_one(prediction, tmp_path):
    with pytest.raises(SettingsError, match=r"p\.gif must end"):
        inkdask.export(prediction, [tmp_path / "p.png", tmp_path / "p.gif"])
    assert not (tmp_path / "p.png").exists()


def test_given_pixel_size_wins_over_the_stored_one(prediction, tmp_path):
    inkdask.export(prediction, tmp_path / "p.tif", pixel_resolution_um=4)
    with tifffile.TiffFile(tmp_path / "p.tif") as tiff:
        found = tiff.pages.first.get_resolution(tifffile.RESUNIT.MICROMETER)
    assert found == pytest.approx((1 / 4, 1 / 4))


def test_overlay_at_half_opacity_is_the_mean(tmp_path):
    write_layers(tmp_path / "seg" / "layers", random_volume((3, 230, 301)))
    uri, shown = str(tmp_path / "p.zarr"), {}
    volume = str(tmp_path / "seg")
    write_pyramid(da.full((230, 301), 255, dtype=np.uint8), uri, made_of(volume))
    for opacity in (0, 0.5, 1):
        inkdask.export(uri, tmp_path / "p.png", overlay="max", opacity=opacity)
        shown[opacity] = read_picture(tmp_path / "p.png").astype(int)
    assert np.abs(shown[0.5] - (shown[0] + shown[1]) / 2).max() <= 1
    assert np.abs(shown[0] - shown[1]).max() > 100


@pytest.mark.parametrize(("shape", "chunk"), [([9, 9], 0), ([2**40, 9], 1), ([0, 9], 1)])
def test_picture_of_odd_size_is_named(tmp_path, shape, chunk):
    zarr.create_array(tmp_path / "x.zarr", shape=(9, 9), chunks=(3, 3), dtype="u1")
    path = tmp_path / "x.zarr" / "zarr.json"
    metadata = json.loads(path.read_text()) | {"shape": shape}
    metadata["chunk_grid"]["configuration"]["chunk_shape"] = [chunk, 3]
    path.write_text(json.dumps(metadata))
    with pytest.raises(InkdaskError, match=r"x\.zarr (cannot be read|has no pixels|has 1 layers)"):
        open_picture(str(tmp_path / "x.zarr"))


def test_picture_of_several_heights_is_named(tmp_path):
    path = tmp_path / "x.tif"
    tifffile.imwrite(path, np.zeros((9, 9), np.uint8), tile=(16, 16), compression="zlib")
    with tifffile.TiffFile(path) as tif:
        height, tiles = (tif.pages.first.tags[tag].offset for tag in (257, 324))
    data = bytearray(path.read_bytes())
    data[height + 4 : height + 12] = struct.pack("<II", 2, 8)  # two values, at byte 8
    data[tiles : tiles + 2] = struct.pack("<H", 65000)
    path.write_bytes(data)
    with pytest.raises(InkdaskError, match=r"x\.tif cannot be read as a picture: "):
        read_facts(str(path))
