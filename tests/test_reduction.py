"""Test stored grids: which one a job takes, parts, and the pictures made of them."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

import inkdask
from inkdask import cli, preparation, reduction, store, workflow
from inkdask.errors import InkdaskError, SettingsError
from inkdask.identity import differences
from inkdask.job import output_stem
from inkdask.parts import assign, estimate
from inkdask.pictures.overlay import flatten, open_ground
from inkdask.pictures.picture import open_picture
from inkdask.plan import Plan
from inkdask.provenance import recipe_of
from inkdask.settings import Settings
from inkdask.store import GridStore
from tests.files import grids, ome, read_picture, write_layers
from tests.jobs import ORIGIN, count_tiles, network
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_tiles")

LAYERS, HEIGHT, WIDTH = 5, 330, 700  # 2 x 5 chunks
FEW = {"stride": 64, "chunk_size": 512}  # for tests that need no more tiles or chunks


@pytest.fixture(scope="module")
def volume():
    return papyrus((LAYERS, HEIGHT, WIDTH))


@pytest.fixture
def segment(tmp_path, volume):
    """Folder of layers in TIFF tiles of 128 pixels."""
    folder = tmp_path / "segment"
    write_layers(folder / "layers", volume, tile=(128, 128), compression="deflate")
    return str(folder)


def share_done(grid):
    return GridStore.open(grid)[0].chunks_done().mean()


def grid_in(folder):
    """The only grid in a folder."""
    (grid,) = grids(str(folder))
    return grid


def test_unreadable_tile_fails_only_its_chunks_and_resumes(segment, tmp_path, capsys):
    """The job computes only the failed chunks once the file is restored."""
    options = {"model": network, "layers": (0, LAYERS), "stride": 32}
    whole = read_picture(inkdask.run(segment, zarr_output_dir=tmp_path / "whole", **options))
    layer = Path(segment, "layers", "02.tif")
    kept = tmp_path / "kept.tif"
    shutil.copy2(layer, kept)
    with tifffile.TiffFile(layer) as file:
        page = file.pages[0]
        place, size = page.dataoffsets[8], page.databytecounts[8]
    with layer.open("r+b") as file:
        file.seek(place)
        file.write(bytes(size))
    os.utime(layer, ns=(kept.stat().st_atime_ns, kept.stat().st_mtime_ns))

    capsys.readouterr()
    Path(inkdask_picture := f"{segment}/predictions/prediction_network_00_05.png").unlink()
    with pytest.raises(InkdaskError, match=r"02\.tif .* of 10 chunks were not computed") as caught:
        inkdask.run(segment, **options)
    failed = int(str(caught.value).split("(")[-1].split(" of 10")[0])
    assert 0 < failed <= 4
    assert f"{10 - failed} completed, {failed} failed" in capsys.readouterr().err
    assert not Path(inkdask_picture).exists()
    assert share_done(grid_in(tmp_path / "partitions")) == pytest.approx(1 - failed / 10)

    shutil.copy2(kept, layer)
    again = read_picture(inkdask.run(segment, **options))
    assert f"{failed} completed\n" in capsys.readouterr().err
    assert np.array_equal(again, whole)


CHANGES = [
    {"model": "other"}, {"stride": 32}, {"divisor": 255}, {"clip": 100}, {"layers": (0, 4)},
    {"force_reverse": True}, {"tile": 32}, {"model_in_chans": 3}, {"precision": "float32"},
    {"z_downsample_mean_factor": 2}, {"chunk_size": 256}, {"roi_xyxy": (0, 0, 640, 128)},
    {"tta": "mirror"},
]  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "input"], ids=str)
def test_changed_job_has_another_recipe(segment, change):
    options = {"model": network, "layers": (0, LAYERS)}
    job = Settings.of(s3_path=segment, **options)
    plan = Plan.of(segment, job)
    before = recipe_of(plan)
    if change == "input":
        os.utime(Path(segment, "layers", "03.tif"), ns=(0, 0))
    else:
        options |= change
        if options["model"] == "other":
            options["model"] = lambda x: network(x) + 1
    after = recipe_of(Plan.of(segment, Settings.of(s3_path=segment, **options)))
    assert before.digest != after.digest
    assert " there and " in differences(before, after)


def test_named_grid_of_another_job_is_refused(segment, tmp_path):
    grid = str(tmp_path / "mine.zarr")
    options = {"model": network, "layers": (0, LAYERS), "roi_xyxy": (0, 0, 300, 200)}
    inkdask.run(segment, grid=grid, **options)
    with pytest.raises(InkdaskError, match=r"mine\.zarr is another job's: stride is 16 t"):
        inkdask.run(segment, grid=grid, stride=32, **options)
    with pytest.raises(InkdaskError, match=r"mine\.zarr is another job's: divisor is 200.0 there"):
        inkdask.run(segment, grid=grid, step="reduce", divisor=255, **options)


def test_grid_without_model_and_layers_gives_other_pictures(segment, tmp_path, caplog):
    options = {"model": network, "stride": 32}
    whole = read_picture(inkdask.run(segment, **options))
    grid = grid_in(tmp_path / "partitions")
    gaussian = read_picture(inkdask.run(segment, **options, blend_mode="gaussian"))
    shutil.rmtree(Path(segment, "layers"))
    out = {"grid": grid, "step": "reduce", "output_path": tmp_path / "out"}
    assert np.array_equal(read_picture(inkdask.run(**out)), whole)
    assert np.array_equal(read_picture(inkdask.run(**out, blend_mode="gaussian")), gaussian)
    reverse = inkdask.run(**out, reverse_video=True)
    assert np.array_equal(read_picture(reverse), 255 - whole)
    part = inkdask.run(**out, roi_xyxy=(200, 100, 600, 303))
    assert part.endswith("_200-100-600-303.png")
    assert np.array_equal(read_picture(part), whole[100:303, 200:600])
    cut = inkdask.run(**out, roi_xyxy=(600, 0, 4000, 10))
    assert cut.endswith("_600-0-700-10.png")
    assert np.array_equal(read_picture(cut), whole[:10, 600:])
    assert "beyond the tile grid, which covers 0,0,700,330: 600,0,700,10 is read" in caplog.text


def test_region_with_all_tiles_shares_the_grid_of_the_whole(segment, tmp_path):
    """Both jobs have the same tiles, and each job has its own picture."""
    options = {"model": network, "stride": 32}
    part = inkdask.run(segment, **options, roi_xyxy=(10, 10, WIDTH - 10, HEIGHT - 10))
    whole = inkdask.run(segment, **options)
    assert len(grids(str(tmp_path / "partitions"))) == 1
    assert read_picture(whole).shape == (HEIGHT, WIDTH)
    assert np.array_equal(read_picture(whole)[10:-10, 10:-10], read_picture(part))


def test_parts_of_a_region_beyond_the_segment_are_reduced(segment, tmp_path):
    whole = read_picture(inkdask.run(segment, model=network, stride=32))
    beyond, cut = (600, 200, 4000, 4000), (600, 200, WIDTH, HEIGHT)
    options = {
        "model": network,
        "stride": 32,
        "num_parts": 2,
        "zarr_output_dir": tmp_path / "parts",
    }
    for part in range(2):
        inkdask.run(segment, **options, roi_xyxy=beyond, part_id=part)
    for roi in (beyond, cut):
        uri = inkdask.run(segment, **options, roi_xyxy=roi, step="reduce")
        assert uri.endswith("_600-200-700-330.png")
        assert np.array_equal(read_picture(uri), whole[200:, 600:])


def test_moved_segment_starts_another_job(segment, tmp_path):
    """Another segment may have the same name, sizes and times, so the place counts."""
    options = {"model": network, "layers": (0, LAYERS), **FEW}
    kept = read_picture(inkdask.run(segment, **options))
    (tmp_path / "elsewhere").mkdir()
    moved = Path(segment).rename(tmp_path / "elsewhere" / "segment")
    again = inkdask.run(moved, **options)
    assert len(grids(str(tmp_path / "partitions"))) == 2
    assert again == f"{moved}/predictions/prediction_network_00_05.png"
    assert not Path(segment).exists()
    assert np.array_equal(read_picture(again), kept)
    assert inkdask.run(moved, **options, step="reduce") == again


def test_incomplete_grid_copy_makes_no_picture(segment, tmp_path):
    options = {"model": network, "layers": (0, LAYERS), "stride": 32}
    whole = read_picture(inkdask.run(segment, **options))
    grid, before = grid_in(tmp_path / "partitions"), count_tiles(tmp_path)
    stored, _ = GridStore.open(grid)
    tiles = stored.grid().blocks[1, 2].compute()
    Path(grid, "g1", "grid", "c", "1", "2", "0", "0").unlink()
    Path(segment, "predictions", "prediction_network_00_05.png").unlink()
    with pytest.raises(InkdaskError, match=r"^1 of \d+ chunks are missing in .*: run STEP=inf"):
        inkdask.run(segment, step="reduce", **options)
    assert np.array_equal(read_picture(inkdask.run(segment, **options)), whole)
    lost = np.count_nonzero(~np.isnan(tiles[:, :, 0, 0]))
    assert 0 < lost <= count_tiles(tmp_path) - before < 2 * lost  # and trial tiles


def test_grid_lies_at_the_given_place(segment, tmp_path):
    """A grid needs no ending, and a folder of grids may end in .zarr."""
    options = {"model": network, "roi_xyxy": (0, 0, 300, 200)}
    whole = read_picture(inkdask.run(segment, grid=tmp_path / "mine", **options))
    again = inkdask.run(grid=tmp_path / "mine", step="reduce", output_path=tmp_path / "again")
    assert np.array_equal(read_picture(again), whole)
    folder = tmp_path / "all.zarr"
    for stride in (16, 32):
        inkdask.run(segment, zarr_output_dir=folder, stride=stride, **options)
    assert len(grids(str(folder))) == 2
    found = inkdask.run(segment, zarr_output_dir=folder, step="reduce", stride=16, **options)
    assert np.array_equal(read_picture(found), whole)


def test_reduce_and_overlay_use_the_ome_zarr_level_of_the_grid(volume, tmp_path):
    place = str(tmp_path / "seg.zarr")
    group = zarr.create_group(place, attributes=ome("0.5"))
    for level, pixels in enumerate([volume, volume[:, ::2, ::2]]):
        group.create_array(str(level), data=pixels, chunks=(LAYERS, 128, 128))
    options = {"model": network, "ome_zarr_level": "1"}
    inkdask.run(place, num_parts=1, **options)
    picture = inkdask.run(place, model=network, step="reduce", output_path=tmp_path / "out")
    assert read_picture(picture).shape == volume[0, ::2, ::2].shape
    overlay = inkdask.export(picture.replace(".png", ".zarr"), tmp_path / "o.png", overlay="mean")
    assert read_picture(*overlay).shape[:2] == volume[0, ::2, ::2].shape


def test_overlay_of_array_without_layer_numbers_shows_the_layers_read(volume, tmp_path):
    """The reference tool prepares such arrays."""
    place, first = str(tmp_path / "prepared.zarr"), 17
    zarr.create_array(place, data=np.moveaxis(volume, 0, 2), chunks=(128, 128, 1), zarr_format=2)
    layers = (first, first + LAYERS)
    uri = inkdask.run(place, model=network, layers=layers, model_in_chans=3, **FEW)
    opened = open_ground(open_picture(uri.replace(".png", ".zarr")), "mean")
    assert np.array_equal(opened.pixels.compute(), flatten(volume[1:-1], "mean"))


def test_result_file_holds_absolute_path_after_relative_output_path(segment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inkdask.run("segment", model=network, roi_xyxy=(0, 0, 64, 64), output_path="out")
    [picture] = (tmp_path / "out").glob("*.png")
    assert (tmp_path / "result.txt").read_text() == str(picture)


def test_reduce_without_matching_job_names_the_differences(segment, tmp_path):
    options = {"model": network, "roi_xyxy": (0, 0, 300, 200)}
    with pytest.raises(InkdaskError, match="No job in .* is this one: it has none; run STEP=inf"):
        inkdask.run(segment, step="reduce", **options)
    found = read_picture(inkdask.run(segment, **options))
    with pytest.raises(InkdaskError, match="stride is 16 there and 32 here; run STEP=inference"):
        inkdask.run(segment, step="reduce", stride=32, **options)
    with pytest.raises(InkdaskError, match="model is network there and lambda here"):
        inkdask.run(segment, step="reduce", model=lambda x: x, roi_xyxy=(0, 0, 300, 200))
    inkdask.run(segment, stride=32, **options)
    says = "2 jobs in .* stride is .* in the first and .* name one with --grid"
    with pytest.raises(InkdaskError, match=says):
        inkdask.run(segment, step="reduce", **options)
    again = inkdask.run(segment, step="reduce", stride=16, **options)
    assert np.array_equal(read_picture(again), found)
    Path(segment, "layers", "01.tif").touch()
    with pytest.raises(InkdaskError, match="is old: the layers had another size, time"):
        inkdask.run(segment, step="reduce", stride=16, **options)


@pytest.mark.slow
def test_reduce_ignores_jobs_of_other_regions_and_chunks(segment, tmp_path, monkeypatch):
    options = {"model": network, "output_path": tmp_path / "out", "stride": 64}
    expected = read_picture(inkdask.run(segment, **options, zarr_output_dir=tmp_path / "other"))
    part = read_picture(inkdask.run(segment, **options, roi_xyxy=(0, 0, 200, 300)))
    inkdask.run(segment, **options, chunk_size=192, num_parts=2, part_id=0)
    for number in range(2):
        inkdask.run(segment, **options, num_parts=2, part_id=number)
    assert len(grids(str(tmp_path / "partitions"))) == 3
    whole = inkdask.run(segment, **options, step="reduce", num_parts=2)
    assert np.array_equal(read_picture(whole), expected)
    region = inkdask.run(segment, **options, step="reduce", roi_xyxy=(0, 0, 200, 300))
    assert np.array_equal(read_picture(region), part)
    monkeypatch.setenv("CHUNK_SIZE", "")
    with pytest.raises(InkdaskError, match=r"2 jobs in .* chunk_size is .* in the first"):
        inkdask.run(segment, **options, step="reduce", num_parts=2)
    monkeypatch.setenv("CHUNK_SIZE", "192")
    with pytest.raises(InkdaskError, match=r"with CHUNK_SIZE=192, NUM_PARTS=2 and PART_ID=1 first"):
        inkdask.run(segment, **options, step="reduce", num_parts=2)
    (grid,) = (g for g in grids(str(tmp_path / "partitions")) if share_done(g) < 1)
    monkeypatch.setenv("CHUNK_SIZE", "128")
    with pytest.raises(InkdaskError, match=r"CHUNK_SIZE=192, NUM_PARTS=2 and PART_ID=1 first"):
        inkdask.run(grid=grid, step="reduce", num_parts=2)


def test_same_job_in_other_words_runs_no_tile(segment, tmp_path):
    region = {"roi_xyxy": (200, 0, 400, 200)}
    inkdask.run(segment, model=network, **region)
    before = count_tiles(tmp_path)
    words = {**region, "layers": (0, 5), "tile": 64, "stride": 16, "clip": 200, "model_in_chans": 5}
    inkdask.run(f"{segment}/", model=network, **words)
    assert count_tiles(tmp_path) == before + 1  # inkdask tries a callable on one tile
    assert len(list((tmp_path / "partitions" / "jobs").iterdir())) == 1


def test_damaged_grid_blocks_no_other(segment, tmp_path):
    options = {"model": network, **FEW}
    expected = inkdask.run(segment, **options)
    inkdask.run(segment, model=network, roi_xyxy=(0, 0, 70, 70))
    for grid in grids(str(tmp_path / "partitions")):
        if GridStore.label(grid).origin.roi_xyxy:
            Path(grid, "zarr.json").write_text("{")
    assert inkdask.run(segment, **options, step="reduce") == expected


def change_first_rows(array, volume):
    """Change values of an array without changing its identity."""
    array[:, :128] = 255 - volume[:, :128]


class StoppedError(BaseException):
    """Interrupt at a place that the test chooses."""


@pytest.mark.parametrize("when", ["before", "while", "after"])
def test_interrupted_overwrite_starts_anew_on_the_advised_command(
    tmp_path, volume, monkeypatch, when
):
    place, options = tmp_path / "v.zarr", {"model": network, "output_path": tmp_path / "out", **FEW}
    array = zarr.create_array(str(place), data=volume, chunks=(5, 128, 128))
    old = read_picture(inkdask.run(place, **options))
    change_first_rows(array, volume)
    monkeypatch.setattr(store, "restarted", [])
    target, name = {
        "before": (workflow, "settle"),
        "while": (GridStore, "check_place"),
        "after": (workflow, "fill"),
    }[when]

    def stop(*_):
        raise StoppedError

    with monkeypatch.context() as context:
        context.setattr(target, name, stop)
        with pytest.raises(StoppedError):
            inkdask.run(place, **options, overwrite=True)
    advice = cli._interrupted(["run", str(place), "--overwrite"])
    anew = {"overwrite": True} if when != "after" else {}
    assert ("without --overwrite resumes" in advice) == (not anew)
    before = count_tiles(tmp_path)
    new = read_picture(inkdask.run(place, **options, **anew))
    assert count_tiles(tmp_path) > before
    assert not np.array_equal(new, old)
    fresh = inkdask.run(place, **options, zarr_output_dir=tmp_path / "fresh")
    assert np.array_equal(new, read_picture(fresh))


def test_parts_that_start_anew_share_the_new_generation(tmp_path, volume):
    place = tmp_path / "v.zarr"
    options = {"model": network, "output_path": tmp_path / "out", "stride": 64, "num_parts": 3}
    array = zarr.create_array(str(place), data=volume, chunks=(5, 128, 128))
    for part in range(3):
        inkdask.run(place, **options, part_id=part)
    change_first_rows(array, volume)
    for part in (1, 0, 2):
        inkdask.run(place, **options, part_id=part, overwrite=True)
    grid, label = GridStore.open(grid_in(tmp_path / "partitions"))
    assert label.generation == 2
    got = read_picture(inkdask.run(place, **options, step="reduce"))
    whole = {**options, "num_parts": 1, "zarr_output_dir": tmp_path / "fresh"}
    assert np.array_equal(got, read_picture(inkdask.run(place, **whole)))
    assert not Path(grid.uri, "g1").exists()  # the picture needs it no more


@pytest.mark.parametrize("num_parts", [1, 2])
def test_layers_changed_during_a_job_make_no_picture(segment, tmp_path, volume, num_parts):
    changed = []

    def meddling(x):
        if len(x) > 1 and not changed:
            write_layers(Path(segment, "layers"), 255 - volume, tile=(128, 128))
            changed.append(True)
        return network(x)

    options = {"model": meddling, "num_parts": num_parts, **FEW}
    with pytest.raises(InkdaskError, match="changed while the job ran: the layers had"):
        inkdask.run(segment, **options)
    assert not Path(segment, "predictions").exists()
    grid, _ = GridStore.open(grid_in(tmp_path / "partitions"))
    grid.make_arrays()
    assert not grid.chunks_done().any()  # because restored files would resume with these tiles
    for part in range(num_parts):
        uri = inkdask.run(segment, **options, part_id=part)
    if num_parts > 1:
        uri = inkdask.run(segment, **options, step="reduce")
    plain = inkdask.run(segment, model=network, **FEW, zarr_output_dir=tmp_path / "other")
    assert np.array_equal(read_picture(uri), read_picture(plain))


def test_single_reversed_layer_in_parts_is_reduced(segment):
    options = {"model": network, "layers": (2, 3), "force_reverse": True, "num_parts": 2, **FEW}
    for part in range(2):
        inkdask.run(segment, **options, part_id=part)
    assert inkdask.run(segment, **options, step="reduce").endswith("_02_03.png")
    with pytest.raises(InkdaskError, match="force_reverse is True there and False here"):
        inkdask.run(segment, **{**options, "force_reverse": False}, step="reduce")


@pytest.mark.slow
def test_reduce_tells_masks_and_levels_apart(segment, volume, tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :400] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    options = {"model": network, "output_path": tmp_path / "out", **FEW}
    plain = read_picture(inkdask.run(segment, **options, mask_path="none"))
    masked = read_picture(inkdask.run(segment, **options, mask_path=tmp_path / "m.png"))
    options["step"] = "reduce"
    with pytest.raises(InkdaskError, match="2 jobs in .* mask_path is .* name one with --grid"):
        inkdask.run(segment, **options)
    for named, expected in ("none", plain), (tmp_path / "m.png", masked):
        assert np.array_equal(
            read_picture(inkdask.run(segment, **options, mask_path=named)), expected
        )

    place = tmp_path / "levels.zarr"
    group = zarr.create_group(str(place), attributes=ome("0.5"))
    shapes = []
    for level, pixels in enumerate((volume, volume[:, ::2, ::2])):
        group.create_array(str(level), data=pixels, chunks=(LAYERS, 64, 64))
        asked = {"model": network, "ome_zarr_level": str(level), **FEW}
        inkdask.run(place, **asked)
        again = inkdask.run(place, **asked, step="reduce")
        shapes.append(read_picture(again).shape)
    assert shapes == [(HEIGHT, WIDTH), (HEIGHT // 2, WIDTH // 2)]


def test_reduce_takes_the_latest_job_of_the_same_settings(segment, tmp_path):
    """The layers may be gone by then."""
    options = {"model": network, "output_path": tmp_path / "out", **FEW}
    inkdask.run(segment, **options)
    Path(segment, "layers", "01.tif").touch()
    latest = read_picture(inkdask.run(segment, **options))
    assert len(grids(str(tmp_path / "partitions"))) == 2
    assert np.array_equal(read_picture(inkdask.run(segment, **options, step="reduce")), latest)
    shutil.rmtree(Path(segment, "layers"))
    assert np.array_equal(read_picture(inkdask.run(segment, **options, step="reduce")), latest)


def test_region_needs_only_its_own_chunks(segment, tmp_path):
    options = {"model": network, "zarr_output_dir": tmp_path / "parts", "stride": 32}
    whole = read_picture(inkdask.run(segment, model=network, stride=32))
    inkdask.run(segment, **options, num_parts=3, part_id=2)
    grid = grid_in(tmp_path / "parts")
    done = GridStore.open(grid)[0].chunks_done()
    done[0] |= True  # no tile reaches into the first row from a row before it
    inkdask.run(segment, **options, num_parts=3, part_id=0)
    done = GridStore.open(grid)[0].chunks_done()
    column = int(np.argwhere(done[0])[0][0])
    x = 128 * column
    region = inkdask.run(grid=grid, step="reduce", roi_xyxy=(x, 0, x + 50, 40))
    assert np.array_equal(read_picture(region), whole[:40, x : x + 50])
    missing = 128 * int(np.argwhere(~done[0])[0][0]) if not done[0].all() else WIDTH - 50
    for roi in ((missing, 0, missing + 50, 40), (x, 140, x + 50, 180)):
        with pytest.raises(InkdaskError, match="chunks are missing"):
            inkdask.run(grid=grid, step="reduce", roi_xyxy=roi)


def test_reduce_names_at_most_three_jobs(segment, tmp_path):
    for stride in (16, 32, 48, 64):
        inkdask.run(segment, model=network, stride=stride, roi_xyxy=(0, 0, 70, 70))
    with pytest.raises(InkdaskError, match="stride is .* there and 8 .*; and 1 that differ more;"):
        inkdask.run(segment, model=network, stride=8, step="reduce")


def test_picture_that_another_job_replaces_at_once_is_success(
    segment, tmp_path, monkeypatch, capsys
):
    """Between two moves of the other job there is no picture."""
    real = reduction.write_pyramid

    def write_pyramid(picture, uri, *others):
        counted = real(picture, uri, *others)
        shutil.rmtree(uri)
        return counted

    monkeypatch.setattr(reduction, "write_pyramid", write_pyramid)
    result = tmp_path / "result"
    uri = inkdask.run(segment, model=depth_slope, tile=64, stride=32, result_file=str(result))
    assert result.read_text() == uri
    papyrus = np.count_nonzero(inkdask.open_segment(segment).volume.max(0).compute())
    share = f"{100 * np.count_nonzero(read_picture(uri) > 127) / papyrus:.2g}"
    assert f"{share} % of the papyrus above 0.5" in capsys.readouterr().err


def test_run_logs_that_it_replaces_another_picture(segment, caplog):
    options = {"model": network, "roi_xyxy": (0, 0, 100, 90)}
    with caplog.at_level("INFO", "inkdask"):
        inkdask.run(segment, **options)
        inkdask.run(segment, **options)
        assert "replaced" not in caplog.text
        inkdask.run(segment, **options, stride=32)
        assert "_0-0-100-90.zarr is replaced: its stride is 16 there and 32 here" in caplog.text
        inkdask.run(segment, **options, stride=32, blend_mode="gaussian")
    assert "is replaced: its blend_mode is hann there and gaussian here" in caplog.text


def test_job_without_data_warns(tmp_path, volume, caplog):
    write_layers(tmp_path / "segment" / "layers", volume * 0)
    inkdask.run(tmp_path / "segment", model=network)
    assert "No tile has data: are these the right layers" in caplog.text


def test_parts_of_a_mostly_empty_segment_have_even_work(tmp_path, monkeypatch):
    """Most of the segment is empty."""
    volume = papyrus((LAYERS, HEIGHT, WIDTH))
    volume[:, :220] = 0
    write_layers(tmp_path / "segment" / "layers", volume, rowsperstrip=16)
    settings = Settings.of(s3_path=str(tmp_path / "segment"), model=network)
    monkeypatch.setattr(preparation, "SHARD", 128)
    monkeypatch.setattr(preparation, "CHUNK", 64)
    prepared = inkdask.prepare(tmp_path / "segment")
    truth = None
    for options in ({}, {"surface_volume_zarr": prepared}):
        plan = Plan.of(settings.s3_path, Settings.of(**settings.model_dump() | options))
        work = estimate(plan)
        if truth is None:
            truth = work
        part = assign(work, 3)
        shares = [truth[part == number].sum() / truth.sum() for number in range(3)]
        assert max(shares) < 0.5
        assert (np.diff(part.ravel()) >= 0).all()
    assert work[:1].sum() <= truth.sum()


@given(arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)),
              elements=st.integers(0, 4096)), st.integers(1, 12))  # fmt: skip
def test_chunk_belongs_to_one_part(work, num_parts):
    part = assign(work, num_parts).ravel()
    assert ((part >= 0) & (part < num_parts)).all()
    assert (np.diff(part) >= 0).all()
    cost = work.ravel() + 1
    for number in set(part):
        assert cost[part == number].sum() <= cost.sum() / num_parts + cost.max()


@pytest.mark.parametrize("roi", [(0, 200, 100, 300), (300, 0, 400, 100)])
def test_region_outside_the_grid_is_refused(segment, tmp_path, roi):
    grid = tmp_path / "mine.zarr"
    inkdask.run(segment, model=network, roi_xyxy=(280, 190, 420, 310), grid=grid)
    with pytest.raises(SettingsError, match="beyond the tile grid"):
        inkdask.run(grid=grid, step="reduce", roi_xyxy=roi)


def test_reduce_refuses_reversed_grid_without_the_setting(segment):
    inkdask.run(segment, model=network, force_reverse=True, roi_xyxy=(0, 0, 100, 100))
    with pytest.raises(InkdaskError, match="force_reverse is True there and False here"):
        inkdask.run(segment, model=network, step="reduce")


def test_reduce_finds_grid_among_pictures(segment):
    options = {"model": network, "zarr_output_dir": f"{segment}/predictions", **FEW}
    first = inkdask.run(segment, **options)
    assert inkdask.run(segment, step="reduce", **options) == first


def test_reduce_refuses_unwritable_result_file_before_the_picture(segment, tmp_path):
    grid = tmp_path / "mine.zarr"
    inkdask.run(segment, model=network, grid=grid, roi_xyxy=(0, 0, 100, 100))
    with pytest.raises(InkdaskError, match="is a folder"):
        inkdask.run(grid=grid, step="reduce", output_path=tmp_path / "b", result_file=tmp_path)
    assert not (tmp_path / "b").exists()


def test_model_of_the_hub_gives_a_file_name_without_slash():
    stem = output_stem("s3://bucket/seg/predictions", ORIGIN, "owner/model")
    assert stem == "s3://bucket/seg/predictions/prediction_owner_model_00_03"


@pytest.mark.parametrize("options", [{}, {"z_downsample_mean_factor": 2}, {"mask": True}])
def test_chunk_at_the_corner_is_retried_alone(tmp_path, options):
    """A chunk alone takes the mask and the means of layers like chunks together."""
    folder = tmp_path / "seg" / "layers"
    write_layers(folder, papyrus((6, 400, 400), holes=False), tile=(64, 64), compression="deflate")
    options = dict(options)
    if options.pop("mask", False):
        Image.fromarray(np.full((400, 400), 255, np.uint8)).save(tmp_path / "seg" / "seg_mask.png")
    layer = folder / "02.tif"
    data = layer.read_bytes()
    with tifffile.TiffFile(layer) as file:
        place, size = file.pages[0].dataoffsets[-1], file.pages[0].databytecounts[-1]
    layer.write_bytes(data[:place] + bytes(size) + data[place + size :])
    says = r"02\.tif is corrupt at row 384, column 384 .*1 of 9 chunks"
    with pytest.raises(InkdaskError, match=says):
        inkdask.run(tmp_path / "seg", model=depth_slope, **options)


def test_overlay_warns_of_changed_layers(segment, tmp_path, caplog):
    uri = inkdask.run(segment, model=network, roi_xyxy=(0, 0, 300, 300), **FEW)
    uri = uri.replace(".png", ".zarr")
    says = "is not what it was when the prediction was made"
    inkdask.export(uri, tmp_path / "a.png", overlay="mean")
    assert says not in caplog.text
    os.utime(Path(segment, "layers", "03.tif"), ns=(0, 0))
    inkdask.export(uri, tmp_path / "b.png", overlay="mean")
    assert says in caplog.text
