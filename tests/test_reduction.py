"""What is stored of a run: grids of this job and of others, pictures made of them, parts."""

import json
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
from inkdask import preparation
from inkdask.errors import InkdaskError, SettingsError
from inkdask.grids import choose
from inkdask.parts import assign, estimate
from inkdask.pictures.overlay import flatten, open_ground
from inkdask.pictures.picture import open_picture
from inkdask.plan import Plan
from inkdask.provenance import fingerprint
from inkdask.reduction import output_stem
from inkdask.settings import Settings
from inkdask.store import GridStore, differences, digest
from tests.files import grids, ome, read_picture, write_layers
from tests.oracle import depth_slope, papyrus
from tests.test_runs import (  # noqa: F401
    HEIGHT,
    LAYERS,
    WIDTH,
    count_tiles,
    network,
    own_tiles,
    segment,
    share_done,
    volume,
)

FEW = {"stride": 64, "chunk_size": 512}  # tiles and chunks, where their number does not matter


def test_one_unreadable_tile_stops_no_other_chunk(segment, tmp_path, capsys):
    """And when the file is as it was, the rest is computed and nothing else."""
    options = {"model": network, "layers": (0, LAYERS)}
    whole = read_picture(inkdask.run(segment, zarr_output_dir=tmp_path / "whole", **options))
    layer = Path(segment, "layers", "02.tif")
    kept = tmp_path / "kept.tif"
    shutil.copy2(layer, kept)
    with tifffile.TiffFile(layer) as file:
        page = file.pages[0]
        place, size = page.dataoffsets[25], page.databytecounts[25]
    with layer.open("r+b") as file:
        file.seek(place)
        file.write(bytes(size))
    os.utime(layer, ns=(kept.stat().st_atime_ns, kept.stat().st_mtime_ns))

    capsys.readouterr()
    Path(inkdask_picture := f"{segment}/predictions/prediction_network_00_05.png").unlink()
    with pytest.raises(InkdaskError, match=r"02\.tif .* of 50 chunks were not computed") as caught:
        inkdask.run(segment, **options)
    failed = int(str(caught.value).split("(")[-1].split(" of 50")[0])
    assert 0 < failed <= 4
    assert f"{50 - failed} completed, {failed} failed" in capsys.readouterr().err
    assert not Path(inkdask_picture).exists()
    assert share_done(str(tmp_path / "partitions")) == pytest.approx(1 - failed / 50)

    shutil.copy2(kept, layer)
    again = read_picture(inkdask.run(segment, **options))
    assert f"{failed} completed\n" in capsys.readouterr().err
    assert np.array_equal(again, whole)


CHANGES = [
    {"model": "other"}, {"stride": 32}, {"divisor": 255}, {"clip": 100}, {"layers": (0, 4)},
    {"force_reverse": True}, {"tile": 32}, {"model_in_chans": 3}, {"precision": "float32"},
    {"z_downsample_mean_factor": 2}, {"chunk_size": 256}, {"roi_xyxy": (0, 0, 640, 128)},
]  # fmt: skip


@pytest.mark.parametrize("change", [*CHANGES, "input"], ids=str)
def test_what_shapes_a_grid_is_in_its_fingerprint(segment, change):
    """A changed job never takes an old grid, and refuses one that is named."""
    options = {"model": network, "layers": (0, LAYERS)}
    job = Settings.of(s3_path=segment, **options)
    plan = Plan.of(segment, job)
    before = fingerprint(plan)
    if change == "input":
        os.utime(Path(segment, "layers", "03.tif"), ns=(0, 0))
    else:
        options |= change
        if options["model"] == "other":
            options["model"] = lambda x: network(x) + 1
    after = fingerprint(Plan.of(segment, Settings.of(s3_path=segment, **options)))
    assert digest(before) != digest(after)
    assert " there and " in differences(before, after)


def test_a_grid_that_is_named_and_is_another_job_s_is_refused(segment, tmp_path):
    grid = str(tmp_path / "mine.zarr")
    options = {"model": network, "layers": (0, LAYERS), "roi_xyxy": (0, 0, 300, 200)}
    inkdask.run(segment, grid=grid, **options)
    with pytest.raises(InkdaskError, match=r"mine\.zarr is another job's: stride is 16 t"):
        inkdask.run(segment, grid=grid, stride=32, **options)
    with pytest.raises(InkdaskError, match=r"mine\.zarr is another job's: divisor is 200.0 there"):
        inkdask.run(segment, grid=grid, step="reduce", divisor=255, **options)


def test_a_grid_gives_other_pictures_without_model_and_layers(segment, tmp_path):
    whole = read_picture(inkdask.run(segment, model=network))
    [grid] = grids(str(tmp_path / "partitions"))
    gaussian = read_picture(inkdask.run(segment, model=network, blend_mode="gaussian"))
    shutil.rmtree(Path(segment, "layers"))
    out = {"grid": grid, "step": "reduce", "output_path": tmp_path / "out"}
    assert np.array_equal(read_picture(inkdask.run(**out)), whole)
    assert np.array_equal(read_picture(inkdask.run(**out, blend_mode="gaussian")), gaussian)
    reverse = inkdask.run(**out, reverse_video=True)
    assert np.array_equal(read_picture(reverse), 255 - whole)
    part = inkdask.run(**out, roi_xyxy=(200, 100, 900, 333))
    assert part.endswith("_200-100-900-333.png")
    assert np.array_equal(read_picture(part), whole[100:333, 200:900])
    with pytest.raises(InkdaskError, match="beyond the tile grid, which covers 0,0,1300,700"):
        inkdask.run(**out, roi_xyxy=(0, 0, 1301, 10))


def test_the_whole_picture_after_a_region_that_every_tile_touches(segment, tmp_path):
    """Both have the same tiles, and each has a picture of its own."""
    part = inkdask.run(segment, model=network, roi_xyxy=(10, 10, WIDTH - 10, HEIGHT - 10))
    whole = inkdask.run(segment, model=network)
    assert len(grids(str(tmp_path / "partitions"))) == 1
    assert read_picture(whole).shape == (HEIGHT, WIDTH)
    assert np.array_equal(read_picture(whole)[10:-10, 10:-10], read_picture(part))


@pytest.mark.parametrize("num_parts", [1, 2])
def test_the_picture_goes_to_the_segment_that_was_asked_about(segment, tmp_path, num_parts):
    """A segment that was moved is the same job, whose grid was made where it was before."""

    def job(place):
        options = {"model": network, "layers": (0, LAYERS)}
        if num_parts == 1:
            return inkdask.run(place, **options)
        for part in range(num_parts):
            inkdask.run(place, **options, num_parts=num_parts, part_id=part)
        return inkdask.run(place, **options, num_parts=num_parts, step="reduce")

    first = job(segment)
    kept = read_picture(first)
    shutil.rmtree(tmp_path / "segment" / "predictions")
    (tmp_path / "elsewhere").mkdir()
    moved = Path(segment).rename(tmp_path / "elsewhere" / "segment")
    again = job(str(moved))
    assert len(grids(str(tmp_path / "partitions"))) == 1
    assert again == f"{moved}/predictions/prediction_network_00_05.png"
    assert (tmp_path / "result.txt").read_text() == again
    assert not Path(segment).exists()
    assert np.array_equal(read_picture(again), kept)


def test_a_copy_of_a_grid_that_broke_off_has_no_picture_until_it_is_whole(segment, tmp_path):
    options = {"model": network, "layers": (0, LAYERS), "stride": 32, "chunk_size": 256}
    whole = read_picture(inkdask.run(segment, **options))
    (grid,) = grids(str(tmp_path / "partitions"))
    before, lost = count_tiles(tmp_path), GridStore.open(grid).tiles_run()[1, 2]
    Path(grid, "grid", "c", "1", "1", "2", "0", "0").unlink()
    Path(segment, "predictions", "prediction_network_00_05.png").unlink()
    with pytest.raises(InkdaskError, match=r"^1 of \d+ chunks are missing in .*: run STEP=inf"):
        inkdask.run(segment, step="reduce", **options)
    assert np.array_equal(read_picture(inkdask.run(segment, **options)), whole)
    assert 0 < lost <= count_tiles(tmp_path) - before < 2 * lost  # and some to try the network


def test_a_grid_lies_where_it_was_said(segment, tmp_path):
    """Whatever the name of that place, and that of the folder of all grids, ends in."""
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


def test_the_level_of_an_ome_zarr_is_known_to_its_grid(volume, tmp_path):
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


def test_an_overlay_shows_the_layers_that_were_read(volume, tmp_path):
    """Of an array that the reference tool prepared, whose layers have no numbers."""
    place, first = str(tmp_path / "prepared.zarr"), 17
    zarr.create_array(place, data=np.moveaxis(volume, 0, 2), chunks=(128, 128, 1), zarr_format=2)
    layers = (first, first + LAYERS)
    uri = inkdask.run(place, model=network, layers=layers, model_in_chans=3)
    opened = open_ground(open_picture(uri.replace(".png", ".zarr")), "mean")
    assert np.array_equal(opened.pixels.compute(), flatten(volume[1:-1], "mean"))


def test_a_relative_place_is_said_in_full(segment, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    inkdask.run("segment", model=network, roi_xyxy=(0, 0, 64, 64), output_path="out")
    [picture] = (tmp_path / "out").glob("*.png")
    assert (tmp_path / "result.txt").read_text() == str(picture)


def test_reduce_says_which_grids_are_there_and_how_they_differ(segment, tmp_path):
    options = {"model": network, "roi_xyxy": (0, 0, 300, 200)}
    with pytest.raises(InkdaskError, match="No tile grid in .* it has none"):
        inkdask.run(segment, step="reduce", **options)
    first = inkdask.run(segment, **options)
    found = read_picture(first)
    with pytest.raises(InkdaskError, match="stride is 16 there and 32 here; run STEP=inference"):
        inkdask.run(segment, step="reduce", stride=32, **options)
    with pytest.raises(InkdaskError, match="model is network there and lambda here"):
        inkdask.run(segment, step="reduce", model=lambda x: x, roi_xyxy=(0, 0, 300, 200))
    inkdask.run(segment, stride=32, **options)
    with pytest.raises(InkdaskError, match="2 tile grids .* stride is .* name one with --grid"):
        inkdask.run(segment, step="reduce", **options)
    again = inkdask.run(segment, step="reduce", stride=16, **options)
    assert np.array_equal(read_picture(again), found)
    Path(segment, "layers", "01.tif").touch()
    with pytest.raises(InkdaskError, match="the input was another"):
        inkdask.run(segment, step="reduce", stride=16, **options)


def test_reduce_takes_the_grid_that_is_meant(segment, tmp_path, monkeypatch, caplog):
    """Not that of a region that was tried first, nor one of other chunks that was given up."""
    options = {"model": network, "output_path": tmp_path / "out", "stride": 64}
    expected = read_picture(inkdask.run(segment, **options, zarr_output_dir=tmp_path / "other"))
    part = read_picture(inkdask.run(segment, **options, roi_xyxy=(0, 0, 200, 300)))
    inkdask.run(segment, **options, chunk_size=192, num_parts=2, part_id=0)
    for number in range(2):
        inkdask.run(segment, **options, num_parts=2, part_id=number)
    assert len(grids(str(tmp_path / "partitions"))) == 3
    for named in ("128", ""):  # by its chunks, and as the one that is complete
        monkeypatch.setenv("CHUNK_SIZE", named)
        whole = inkdask.run(segment, **options, step="reduce", num_parts=2)
        assert np.array_equal(read_picture(whole), expected)
    found = {grid: GridStore.attributes(grid) for grid in grids(str(tmp_path / "partitions"))}
    last_first = dict(reversed(found.items()))
    assert choose(found, Settings.of()) == choose(last_first, Settings.of())
    region = inkdask.run(segment, **options, step="reduce", roi_xyxy=(0, 0, 200, 300))
    assert np.array_equal(read_picture(region), part)
    expected = r"CHUNK_SIZE=192, NUM_PARTS=2 and PART_ID=1 first"
    monkeypatch.setenv("CHUNK_SIZE", "192")
    with pytest.raises(InkdaskError, match=r"in .*: run STEP=inference with NUM_PARTS=2 and PART"):
        inkdask.run(segment, **options, step="reduce", num_parts=2)
    (grid,) = (g for g in grids(str(tmp_path / "partitions")) if share_done_of(g) < 1)
    monkeypatch.setenv("CHUNK_SIZE", "128")
    with pytest.raises(InkdaskError, match=expected):
        inkdask.run(grid=grid, step="reduce", num_parts=2)


def test_a_grid_of_other_tiles_is_not_taken_because_it_is_complete(segment):
    options = {"model": network, "chunk_size": 512}
    inkdask.run(segment, **options, stride=64)
    inkdask.run(segment, **options, stride=32, num_parts=2, part_id=0)
    with pytest.raises(InkdaskError, match="2 tile grids .* stride is .* name one with --grid"):
        inkdask.run(segment, **options, num_parts=2, step="reduce")


def test_other_masks_and_levels_are_other_jobs(segment, volume, tmp_path):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[:, :700] = 255
    Image.fromarray(mask).save(tmp_path / "m.png")
    options = {"model": network, "output_path": tmp_path / "out", **FEW}
    plain = read_picture(inkdask.run(segment, **options, mask_path="none"))
    masked = read_picture(inkdask.run(segment, **options, mask_path=tmp_path / "m.png"))
    options["step"] = "reduce"
    with pytest.raises(InkdaskError, match="tile grids are of this job.* name one with --grid"):
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


def test_grids_of_a_segment_before_and_after_a_change_are_told_apart(segment, tmp_path):
    """Also where the layers cannot be looked at any more."""
    options = {"model": network, "output_path": tmp_path / "out", **FEW}
    inkdask.run(segment, **options)
    Path(segment, "layers", "01.tif").touch()
    latest = read_picture(inkdask.run(segment, **options))
    assert np.array_equal(read_picture(inkdask.run(segment, **options, step="reduce")), latest)
    shutil.rmtree(Path(segment, "layers"))
    with pytest.raises(InkdaskError, match="input is .* in the first and .* name one with --grid"):
        inkdask.run(segment, **options, step="reduce")


def share_done_of(grid):
    return (GridStore.open(grid).tiles_run() >= 0).mean()


def test_reduce_needs_no_more_of_a_grid_than_its_region(segment, tmp_path):
    options = {"model": network, "zarr_output_dir": tmp_path / "parts"}
    whole = read_picture(inkdask.run(segment, model=network))
    inkdask.run(segment, **options, num_parts=2, part_id=1)
    (grid,) = grids(str(tmp_path / "parts"))
    done = GridStore.open(grid).tiles_run() >= 0
    row, column = np.argwhere(done[1:, 1:] & done[:-1, 1:] & done[1:, :-1] & done[:-1, :-1])[0] + 1
    x, y = 128 * column, 128 * row
    region = inkdask.run(grid=grid, step="reduce", roi_xyxy=(x, y, x + 50, y + 40))
    assert np.array_equal(read_picture(region), whole[y : y + 40, x : x + 50])
    for roi in ((0, 0, 50, 40), (x, 0, x + 50, y + 40)):
        with pytest.raises(InkdaskError, match="chunks are missing"):
            inkdask.run(grid=grid, step="reduce", roi_xyxy=roi)


def test_no_more_than_a_few_grids_are_named(segment, tmp_path):
    for stride in (16, 32, 48, 64):
        inkdask.run(segment, model=network, stride=stride, roi_xyxy=(0, 0, 70, 70))
    with pytest.raises(InkdaskError, match="stride is 16 there and 8 .*; and 1 that differ more;"):
        inkdask.run(segment, model=network, stride=8, step="reduce")


def test_a_picture_of_other_words_is_replaced_with_a_word(segment, caplog):
    options = {"model": network, "roi_xyxy": (0, 0, 100, 90)}
    with caplog.at_level("INFO", "inkdask"):
        inkdask.run(segment, **options)
        inkdask.run(segment, **options)
        assert "replaced" not in caplog.text
        inkdask.run(segment, **options, stride=32)
        assert "_0-0-100-90.zarr is replaced: its stride is 16 there and 32 here" in caplog.text
        inkdask.run(segment, **options, stride=32, blend_mode="gaussian")
    assert "is replaced: its blend_mode is hann there and gaussian here" in caplog.text


def test_a_job_without_any_data_says_so(tmp_path, volume, caplog):
    write_layers(tmp_path / "segment" / "layers", volume * 0)
    inkdask.run(tmp_path / "segment", model=network)
    assert "No tile has data: are these the right layers" in caplog.text


def test_parts_are_cut_where_the_work_is_even(tmp_path, monkeypatch):
    """Most of the segment is empty, and no part gets more than its share of the rest."""
    volume = papyrus((LAYERS, HEIGHT, WIDTH))
    volume[:, :500] = 0
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
    assert work[:3].sum() <= truth.sum()


@given(arrays(np.int32, st.tuples(st.integers(1, 9), st.integers(1, 9)),
              elements=st.integers(0, 4096)), st.integers(1, 12))  # fmt: skip
def test_every_chunk_belongs_to_one_part(work, num_parts):
    part = assign(work, num_parts).ravel()
    assert ((part >= 0) & (part < num_parts)).all()
    assert (np.diff(part) >= 0).all()
    cost = work.ravel() + 1
    for number in set(part):
        assert cost[part == number].sum() <= cost.sum() / num_parts + cost.max()


@pytest.mark.parametrize("roi", [(0, 200, 400, 300), (300, 0, 400, 300)])
def test_a_region_before_the_grid_is_refused(segment, tmp_path, roi):
    grid = tmp_path / "mine.zarr"
    inkdask.run(segment, model=network, roi_xyxy=(280, 190, 420, 310), grid=grid)
    with pytest.raises(SettingsError, match="beyond the tile grid"):
        inkdask.run(grid=grid, step="reduce", roi_xyxy=roi)


def test_a_reversed_grid_is_not_taken_unsaid(segment):
    inkdask.run(segment, model=network, force_reverse=True, roi_xyxy=(0, 0, 100, 100))
    with pytest.raises(InkdaskError, match="force_reverse is True there and False here"):
        inkdask.run(segment, model=network, step="reduce")


def test_grids_of_earlier_versions_are_passed_over(segment, tmp_path):
    """They may lack what is said of a grid now, and their tiles cannot be read."""
    options = {"model": network, **FEW}
    expected = inkdask.run(segment, **options)
    (grid,) = grids(str(tmp_path / "partitions"))
    older = Path(grid).with_name("segment-older.zarr")
    shutil.copytree(grid, older)
    metadata = json.loads((older / "zarr.json").read_text())
    metadata["attributes"]["fingerprint"]["format"] -= 1
    del metadata["attributes"]["origin"]["ome_zarr_level"]
    (older / "zarr.json").write_text(json.dumps(metadata))
    assert inkdask.run(segment, **options, step="reduce") == expected


def test_grids_may_lie_among_pictures(segment):
    options = {"model": network, "zarr_output_dir": f"{segment}/predictions", **FEW}
    first = inkdask.run(segment, **options)
    assert inkdask.run(segment, step="reduce", **options) == first


def test_the_result_file_is_tried_before_the_picture_is_made(segment, tmp_path):
    grid = tmp_path / "mine.zarr"
    inkdask.run(segment, model=network, grid=grid, roi_xyxy=(0, 0, 100, 100))
    with pytest.raises(InkdaskError, match="is a folder"):
        inkdask.run(grid=grid, step="reduce", output_path=tmp_path / "b", result_file=tmp_path)
    assert not (tmp_path / "b").exists()


def test_a_model_of_the_hub_makes_no_folder():
    origin = {"source": "s3://b/seg", "layer_range": (0, 26), "roi_xyxy": None}
    stem = output_stem(Settings.of(), origin, "owner/model")
    assert stem == "s3://b/seg/predictions/prediction_owner_model_00_26"


@pytest.mark.parametrize("options", [{}, {"z_downsample_mean_factor": 2}, {"mask": True}])
def test_a_chunk_at_the_corner_is_tried_alone(tmp_path, options):
    """With means of layers, and with a mask, as the chunks that are computed together."""
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


def test_an_overlay_over_layers_that_have_changed_says_so(segment, tmp_path, caplog):
    uri = inkdask.run(segment, model=network, roi_xyxy=(0, 0, 300, 300)).replace(".png", ".zarr")
    says = "is not what it was when the prediction was made"
    inkdask.export(uri, tmp_path / "a.png", overlay="mean")
    assert says not in caplog.text
    os.utime(Path(segment, "layers", "03.tif"), ns=(0, 0))
    inkdask.export(uri, tmp_path / "b.png", overlay="mean")
    assert says in caplog.text
