"""Test plans: the layers, masks and levels that a job reads and logs."""

from dataclasses import FrozenInstanceError, replace

import dask.array as da
import numpy as np
import pytest
import zarr
from PIL import Image

import inkdask
from inkdask import cli
from inkdask.errors import InkdaskError, SettingsError
from inkdask.parts import estimate
from inkdask.plan import Plan, average_layers, count, span
from inkdask.settings import Settings
from tests.files import ome, own_messages, write_layers, write_segment
from tests.oracle import depth_slope, papyrus

pytestmark = pytest.mark.usefixtures("own_environment")

FIRST = 10  # number of the first of 8 layers


@pytest.mark.parametrize(
    ("options", "says", "layers"),
    [
        ({}, "8 layers (10:18); no mask;", range(10, 18)),
        ({"layers": (12, 15)}, "; 3 of 8 layers, the middle (12:15); ", range(12, 15)),
        ({"layers": (12, 13)}, "; 1 of 8 layers (12:13); ", [12]),
        ({"layers": (12, 13), "force_reverse": True}, "; 1 of 8 layers (12:13); ", [12]),
        ({"force_reverse": True}, "8 layers (10:18 in reverse); ", range(17, 9, -1)),
        ({"model_in_chans": 4}, "; 4 of 8 layers, the middle (12:16); ", range(12, 16)),
        (
            {"layers": (10, 16), "model_in_chans": 3, "force_reverse": True},
            "; 3 of 8 layers (11:14 in reverse); ",
            [13, 12, 11],
        ),
        (
            {"z_downsample_mean_factor": 2, "model_in_chans": 3},
            "; 6 of 8 layers, the middle (11:17) as means of 2; ",
            [(11, 12), (13, 14), (15, 16)],
        ),
        (
            {"z_downsample_mean_factor": 2, "force_reverse": True},
            "; 8 layers (10:18 in reverse) as means of 2; ",
            [(17, 16), (15, 14), (13, 12), (11, 10)],
        ),
    ],
)
@pytest.mark.parametrize("kind", ["tiff", "zarr"])
def test_log_states_the_layers_that_are_read(tmp_path, caplog, kind, options, says, layers):
    pixels = papyrus((8, 70, 90))
    write_layers(tmp_path / "seg" / "layers", pixels, first=FIRST)
    if kind == "zarr":
        options = options | {"surface_volume_zarr": inkdask.prepare(tmp_path / "seg")}
    options = {"model": depth_slope, **options}
    plan = Plan.of(str(tmp_path / "seg"), Settings.of(**options))
    means = [np.mean([pixels[n - FIRST] for n in np.atleast_1d(layer)], 0) for layer in layers]
    read = plan.volume.compute().astype(int)
    assert plan.volume.shape == read.shape
    assert plan.layer_range == options.get("layers", (np.min(layers), np.max(layers) + 1))
    assert np.array_equal(read, np.floor(np.array(means) + 0.5))
    with caplog.at_level("INFO", "inkdask"):
        inkdask.run(tmp_path / "seg", **options)
    [line] = [line for line in caplog.messages if "tiles of" in line]
    assert says in line


@pytest.mark.parametrize("factor", range(1, 10))
def test_mean_of_layers_is_the_nearest_value(factor):
    sums = np.arange(255 * factor + 1)
    layers = np.clip(sums - 255 * np.arange(factor)[:, None, None], 0, 255)
    means = sums / factor
    # As villa's tool rounds means of four, which numpy does too.
    nearest = np.rint(means) if factor == 4 else np.floor(means + 0.5)
    got = average_layers(layers.astype(np.uint8), factor)
    np.testing.assert_array_equal(got[0, 0], nearest)


@pytest.mark.parametrize("reverse", [False, True])
def test_averaging_names_layer_without_pair(tmp_path, caplog, reverse):
    pixels = papyrus((8, 70, 90))
    write_layers(tmp_path / "seg" / "layers", pixels, first=FIRST)
    options = {"model": depth_slope, "z_downsample_mean_factor": 2, "force_reverse": reverse}
    settings = Settings.of(layers=(10, 17), **options)
    plan = Plan.of(str(tmp_path / "seg"), settings)
    means = pixels[:6].reshape(3, 2, 70, 90).mean(axis=1)  # the same in both directions
    means = means[::-1] if reverse else means
    assert np.array_equal(plan.volume.compute(), np.floor(means + 0.5))
    assert f"; 6 of 8 layers (10:16{' in reverse' * reverse}) as means of 2; " in str(plan)
    caplog.clear()
    with caplog.at_level("WARNING", "inkdask"):
        inkdask.run(tmp_path / "seg", layers=(10, 17), **options)
        inkdask.check(tmp_path / "seg", layers=(10, 16), **options)
        inkdask.check(tmp_path / "seg", layers=(10, 17), model_in_chans=2, **options)
    assert own_messages(caplog) == [
        "Layers 16:17 are left out: 7 layers are no multiple of Z_DOWNSAMPLE_MEAN_FACTOR=2"
    ]


@pytest.mark.parametrize("depth", [4, 7])
def test_middle_layer_is_the_same_of_files_and_of_an_array(tmp_path, depth):
    pixels = papyrus((depth, 70, 90))
    write_layers(tmp_path / "seg" / "layers", pixels, first=FIRST)
    for source in (str(tmp_path / "seg"), pixels):
        middle = Plan.of(source, Settings.of(model=depth_slope)).middle_layer
        assert np.array_equal(middle.compute(), pixels[depth // 2][None])


def test_middle_layers_are_read_however_the_segment_is_given(tmp_path):
    pixels = papyrus((31, 70, 90))
    write_layers(tmp_path / "seg" / "layers", pixels, first=FIRST)
    segment = inkdask.open_segment(tmp_path / "seg")
    for factor, middle in ((1, pixels[2:28]), (2, None)):
        options = {"model": "demo", "model_in_chans": 13 if factor == 2 else None}
        settings = Settings.of(z_downsample_mean_factor=factor, **options)
        plans = [Plan.of(it, settings) for it in (str(tmp_path / "seg"), segment, pixels)]
        for plan, opened in zip(plans, [(12, 38), (10, 41), (2, 28)], strict=True):
            assert plan is plans[2] or "; 26 of 31 layers, the middle (12:38)" in str(plan)
            assert plan.opened == opened
        first, *others = [plan.volume.compute() for plan in plans]
        assert len(first) == 26 // factor
        assert middle is None or np.array_equal(first, middle)
        for other in others:
            assert np.array_equal(other, first)
    maps = [inkdask.predict(it, model="demo").map.compute() for it in (tmp_path / "seg", segment)]
    assert np.array_equal(*maps)


@pytest.mark.parametrize(
    ("layers", "chans", "says"),
    [
        ((0, 30), None, "30 layers are given (0:30), but model demo reads 26, as inkdask's list of "
         "models says. Name 26 with START_LAYER and END_LAYER, or set MODEL_IN_CHANS to the number "
         "that it was trained on; 26 crops the range about its centre."),
        ((0, 20), None, "20 layers are given (0:20), but model demo reads 26, as inkdask's list of "
         "models says. Name 26 with START_LAYER and END_LAYER, or set MODEL_IN_CHANS to the number "
         "that it was trained on."),
        ((0, 20), 25, "20 layers are given (0:20), but model demo reads 25, as MODEL_IN_CHANS "
         "says. Name 25 with START_LAYER and END_LAYER, or set MODEL_IN_CHANS to the number that "
         "it was trained on."),
    ],
)  # fmt: skip
def test_channel_mismatch_says_what_was_asked_and_by_whom(tmp_path, layers, chans, says):
    write_layers(tmp_path / "seg" / "layers", papyrus((31, 70, 90)))
    with pytest.raises(InkdaskError) as caught:
        inkdask.predict(tmp_path / "seg", model="demo", layers=layers, model_in_chans=chans)
    assert str(caught.value) == f"Channel mismatch: {says}"


def test_channel_mismatch_of_a_whole_segment_names_the_variable(tmp_path):
    write_layers(tmp_path / "seg" / "layers", papyrus((6, 70, 90)))
    for source in (tmp_path / "seg", inkdask.open_segment(tmp_path / "seg"), papyrus((6, 70, 90))):
        with pytest.raises(InkdaskError, match=r"^Channel mismatch: .*26.*MODEL_IN_CHANS"):
            inkdask.predict(source, model="demo")


def test_plan_says_where_its_volume_comes_from(tmp_path):
    pixels = papyrus((4, 70, 90))
    write_layers(tmp_path / "seg" / "layers", pixels)
    for source, name in ((str(tmp_path / "seg"),) * 2, (pixels, "array")):
        plan = Plan.of(source, Settings.of(model=depth_slope))
        assert str(plan).startswith(f"{name}: 90 x 70 pixels (x, y); 4 layers (0:4); no mask; ")
        assert str(plan).endswith("px at stride 16; model depth_slope")
        mirrored = Plan.of(source, Settings.of(model=depth_slope, tta="mirror"))
        assert str(mirrored) == f"{plan}, four passes for mirror images"
        assert plan.region.xyxy == (0, 0, 90, 70)
        assert plan.roi_xyxy is None
        assert plan.name == ("array" if source is pixels else "seg")
        assert plan.source == (None if source is pixels else source)
    segment = inkdask.open_segment(tmp_path / "seg")
    plan = Plan.of(segment, Settings.of(model=depth_slope))
    assert (plan.source, plan.name, plan.mask_path) == (segment.uri, "seg", None)


@pytest.mark.parametrize(
    ("layers", "words"),
    [([4], "4:5"), ([3, 4], "3:5"), ([4, 3], "3:5 in reverse"), ([9, 8, 7], "7:10 in reverse")],
)
def test_span_names_first_layer_end_and_direction(layers, words):
    assert span(layers) == words
    assert count(layers) == f"{len(layers)} layer{'' if len(layers) == 1 else 's'}"


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("factor", [1, 2])
def test_cut_is_one_block_of_volume_and_mask(tmp_path, mask, factor):
    pixels, papyrus_there = papyrus((4, 170, 190)), np.zeros((170, 190), bool)
    papyrus_there[20:90, 30:120] = True
    write_layers(tmp_path / "seg" / "layers", pixels, tile=(64, 64))
    if mask:
        Image.fromarray(papyrus_there).save(tmp_path / "seg" / "seg_mask.png")
    settings = Settings.of(model=depth_slope, z_downsample_mean_factor=factor)
    for source in (str(tmp_path / "seg"), pixels):
        plan = Plan.of(source, settings)
        volume, cut_mask = plan.cut(slice(5, 100), slice(7, 150))
        assert volume.numblocks == (1, 1, 1)
        expected = plan.volume.compute()[:, 5:100, 7:150]
        assert np.array_equal(volume.compute(), expected)
        if mask and source is not pixels:
            assert cut_mask.numblocks == (1, 1)
            assert np.array_equal(cut_mask.compute(), papyrus_there[5:100, 7:150])
        else:
            assert cut_mask is None


def test_millions_of_chunks_are_refused():
    volume = da.zeros((3, 40_000, 40_000), dtype=np.uint8, chunks=(3, 1024, 1024))
    options = {"model": depth_slope, "tile": 32, "chunk_size": 1}
    with pytest.raises(SettingsError, match="^CHUNK_SIZE makes 390,625 chunks of 64 x 64 pixels"):
        Plan.of(volume, Settings.of(**options))
    assert Plan.of(volume, Settings.of(**options, roi_xyxy=(0, 0, 90, 90))).tiling.tiles


def test_plan_is_frozen():
    plan = Plan.of(papyrus((3, 70, 90)), Settings.of(model=depth_slope))
    with pytest.raises(FrozenInstanceError):
        plan.layers = (1,)


def test_array_cut_between_layers_is_averaged_across_the_cut():
    pixels = papyrus((6, 70, 90))
    lazy = da.from_array(pixels, chunks=(1, 40, 50))
    options = {"model": depth_slope, "z_downsample_mean_factor": 2}
    plans = [Plan.of(it, Settings.of(**options)) for it in (lazy, pixels)]
    assert np.array_equal(*(plan.volume.compute() for plan in plans))


def test_array_of_uint16_is_read_by_its_high_bytes():
    pixels = papyrus((3, 70, 90)).astype(np.uint16) << 8 | 0x7F
    plan = Plan.of(pixels, Settings.of(model=depth_slope))
    assert np.array_equal(plan.volume.compute(), pixels >> 8)


def test_mask_of_the_segment_goes_with_its_prepared_layers(tmp_path):
    write_layers(tmp_path / "seg" / "layers", papyrus((4, 70, 90)))
    prepared = inkdask.prepare(tmp_path / "seg", output_path=tmp_path / "elsewhere")
    for name in ("seg_mask.png", "other.png"):
        Image.new("L", (90, 70), 255).save(tmp_path / "seg" / name)
    options = {"model": depth_slope, "surface_volume_zarr": prepared}
    for mask_path in (None, str(tmp_path / "seg" / "other.png")):
        settings = Settings.of(mask_path=mask_path, **options)
        plan = Plan.of(str(tmp_path / "seg"), settings)
        assert plan.segment.mask_uri == (mask_path or str(tmp_path / "seg" / "seg_mask.png"))
        assert plan.mask_path == mask_path


def test_mask_holds_for_every_family(tmp_path):
    write_layers(tmp_path / "seg" / "layers", papyrus((4, 70, 90)))
    Image.new("L", (90, 70), 255).save(tmp_path / "seg" / "seg_mask.png")
    for mask_path in (None, "none"):
        settings = Settings.of(model=depth_slope, mask_path=mask_path)
        plan = Plan.of(str(tmp_path / "seg"), settings)
        model = replace(plan.network.model, architecture="ink_hybrid_3d2d")
        plan = replace(plan, network=replace(plan.network, model=model))
        assert plan.family.is_masked == (mask_path is None)


def test_dask_array_is_not_computed():
    volume = da.zeros((3, 70, 90), dtype=np.uint8).map_blocks(lambda _: 1 / 0, dtype=np.uint8)
    assert Plan.of(volume, Settings.of(model=depth_slope)).volume.shape == (3, 70, 90)


def test_log_names_the_mask(tmp_path, caplog, monkeypatch):
    write_layers(tmp_path / "seg" / "layers", papyrus((4, 70, 90)))
    Image.new("L", (90, 70), 255).save(tmp_path / "seg" / "seg_mask.png")
    caplog.set_level("INFO", "inkdask")
    inkdask.check(tmp_path / "seg", model=depth_slope)
    monkeypatch.setenv("MASK_PATH", "none")
    inkdask.check(tmp_path / "seg", model=depth_slope)
    masked, plain = [line for line in caplog.messages if "tiles of" in line]
    assert "; mask seg_mask.png; " in masked
    assert "; no mask; " in plain


def test_mask_of_wrong_size_stops_only_jobs_that_read_it(tmp_path, capsys, caplog, monkeypatch):
    monkeypatch.setenv("DIRECTION", "forward")  # else it is told that nobody named it
    segment = tmp_path / "seg"
    write_layers(segment / "layers", papyrus((4, 70, 90)))
    Image.new("L", (45, 35), 255).save(segment / "seg_mask.png")
    with pytest.raises(InkdaskError, match=r"seg_mask\.png has .*MASK_PATH=none"):
        inkdask.run(segment, model=depth_slope)
    stored = inkdask.run(segment, model=depth_slope, mask_path="none").replace(".png", ".zarr")
    assert inkdask.prepare(segment)
    capsys.readouterr()
    cli.main(["info", str(segment), "--mask-path", "none"])
    assert "none" in capsys.readouterr().out
    overlay = str(tmp_path / "overlay.png")
    inkdask.export(stored, [overlay], overlay="mean")
    inkdask.export(stored, [overlay], overlay="mean", segment=str(segment))
    assert not own_messages(caplog)  # a grid without a mask is compared without a mask


def test_reduce_finds_parts_made_without_the_mask(tmp_path):
    write_layers(tmp_path / "seg" / "layers", papyrus((4, 70, 90)))
    Image.new("L", (90, 70), 255).save(tmp_path / "seg" / "seg_mask.png")
    options = {"model": depth_slope, "num_parts": 2, "mask_path": "none"}
    for number in range(2):
        inkdask.run(tmp_path / "seg", part_id=number, **options)
    assert inkdask.run(tmp_path / "seg", step="reduce", **options)


def test_plan_reads_the_ome_zarr_level_of_the_settings(tmp_path):
    pixels = papyrus((8, 140, 180))
    group = zarr.create_group(str(tmp_path / "seg.zarr"), attributes=ome("0.5"))
    for level, scaled in enumerate([pixels, pixels[:, ::2, ::2]]):
        array = group.create_array(str(level), shape=scaled.shape, chunks=(8, 64, 64), dtype="u1")
        array[:] = scaled
    names = set()
    for level in "01":
        settings = Settings.of(model=depth_slope, ome_zarr_level=level)
        plan = Plan.of(str(tmp_path / "seg.zarr"), settings)
        assert np.array_equal(plan.volume.compute(), pixels if level == "0" else scaled)
        names.add(plan.segment.identity)
    assert len(names) == 2


@pytest.mark.parametrize("roi", [(0, 230, 301, 231), (301, 0, 400, 9)])
def test_region_beyond_the_segment_is_refused(roi):
    with pytest.raises(SettingsError, match=r"ROI_XYXY .* lies beyond .* 301 x 230 pixels"):
        inkdask.predict(papyrus((6, 230, 301)), depth_slope, roi_xyxy=roi)


def test_region_larger_than_the_segment_is_cut_with_a_note(tmp_path, caplog):
    ink = inkdask.predict(papyrus((3, 230, 301)), depth_slope, roi_xyxy=(5, 8, 4000, 4000))
    assert ink.map.shape == (222, 296)
    assert [line for line in caplog.messages if "ROI" in line] == [
        "ROI_XYXY 5,8,4000,4000 reaches beyond the segment, which has 301 x 230 pixels (x, y): "
        "5,8,301,230 is read"
    ]
    write_layers(tmp_path / "seg" / "layers", papyrus((3, 90, 100)))
    options = {"model": depth_slope, "stride": 32}
    uri = inkdask.run(tmp_path / "seg", roi_xyxy=(0, 0, 4000, 50), **options)
    assert uri.endswith("_0-0-100-50.png")
    assert inkdask.run(tmp_path / "seg", roi_xyxy=(0, 0, 100, 50), **options) == uri


def test_small_tile_gets_a_stride_that_fits():
    assert inkdask.predict(papyrus((6, 70, 70)), depth_slope, tile=8).tiling.stride == 8


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.ones((9, 70, 70), np.float32), "uint8 or uint16, but the array is float32"),
        (np.ones((70, 70), np.uint8), "three axes"),
    ],
)
def test_plan_refuses_array_that_is_no_volume(array, says):
    with pytest.raises(InkdaskError, match=says):
        inkdask.predict(array, depth_slope)


def test_estimate_of_work_respects_the_mask(tmp_path):
    """Otherwise one part would do all the work."""
    segment = write_segment(tmp_path / "seg", papyrus((6, 230, 301)))
    mask = np.zeros((230, 301), np.uint8)
    mask[:, :100] = 255
    Image.fromarray(mask).save(segment / "seg_mask.png")
    work = estimate(Plan.of(segment, Settings.of(model=depth_slope)))
    assert (work[:, -1] == 0).all()
    assert (work[:, 0] > 0).all()


@pytest.mark.parametrize(
    ("options", "gpus", "side"),
    [
        ({}, ["threads"], 2048),
        ({}, [], 1024),
        ({"scheduler_address": "tcp://gpus:8786"}, ["tcp://gpus:8786"], 2048),
        ({"cluster": "local"}, ["cuda"], 1024),
        ({"chunk_size": 512}, ["threads"], 512),
    ],
)
def test_chunks_are_larger_where_workers_have_gpus(tmp_path, monkeypatch, options, gpus, side):
    write_segment(tmp_path / "seg", np.ones((3, 70, 90), np.uint8))
    monkeypatch.delenv("CHUNK_SIZE", raising=False)
    monkeypatch.setattr(inkdask.plan, "has_gpus", gpus.__contains__)
    settings = Settings.of(model=depth_slope, tile=64, stride=16, **options)
    assert Plan.of(str(tmp_path / "seg"), settings).tiling.y.chunk == side
