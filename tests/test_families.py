"""Maps as the people of a network make them: layers, window and borders."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch

import inkdask
from inkdask import memory, plan, storage
from inkdask.blending import blend_chunk
from inkdask.families import Family, family_of
from inkdask.models.hybrid_3d2d import ink_hybrid_3d2d
from inkdask.models.networks import BUILDERS
from inkdask.settings import Settings
from inkdask.sharing import shared
from inkdask.specs import ModelSpec, Network
from inkdask.store import decode, encode
from inkdask.tiling import Tiling
from tests.files import read_picture
from tests.oracle import depth_slope, naive_map, papyrus
from tests.upstream import golden, hecate_file, hybrid_file, of_hecate, state_of, volume


def segment(folder, values):
    """Write a volume as layers of a segment, and return its folder."""
    (folder / "layers").mkdir()
    for number, layer in enumerate(values):
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", layer)
    return folder


@pytest.fixture(scope="module")
def hecate(tmp_path_factory):
    """The checkpoint of 9.6 um; half a gigabyte, so it is removed after the tests."""
    with torch.device("meta"):
        module = BUILDERS["ink_hecate_9_6um"]()
    path = tmp_path_factory.mktemp("hecate") / "hecate_9.6um.pth"
    torch.save(hecate_file(state_of(module, of_hecate), False), path)
    yield path
    path.unlink()


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory):
    with torch.device("meta"):
        module = ink_hybrid_3d2d()
    path = tmp_path_factory.mktemp("hybrid") / "step-075000.pth"
    torch.save(hybrid_file(state_of(module, str)), path)
    return path


@pytest.fixture
def options(tmp_path):
    return {
        "precision": "float32",
        "blend_mode": "upstream",
        "zarr_output_dir": str(tmp_path / "grids"),
        "result_file": str(tmp_path / "result.txt"),
    }


def off(uri, name):
    """Return the largest difference of a picture from upstream's map, in steps of uint8."""
    expected = golden(name)["probability_uint8"]
    assert len(np.unique(expected)) > 20
    return np.abs(read_picture(uri).astype(int) - expected).max()


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_job_makes_both_maps_of_hecate(hecate, options, tmp_path):
    values = volume("hecate_9.6um-map", (21, 80, 100), (0, 30, 0, 37))
    uris = inkdask.run(segment(tmp_path, values), model=hecate, direction="both", **options)
    forward, reverse = uris.splitlines()
    assert off(forward, "hecate_9.6um-map") <= 1
    assert off(reverse, "hecate_9.6um-map-reverse") <= 1


@pytest.mark.slow
def test_job_makes_the_map_of_the_hybrid(hybrid, options, tmp_path):
    values = volume("hybrid_3d2d-map", (21, 200, 150), (0, 30, 0, 50))
    uri = inkdask.run(segment(tmp_path, values), model=hybrid, **options)
    assert off(uri, "hybrid_3d2d-map") <= 1
    assert read_picture(uri)[:30, :50].all()  # pixels without data have values there
    uri = inkdask.run(tmp_path, model=hybrid, **options | {"blend_mode": "hann"})
    assert not read_picture(uri)[:30, :50].any()  # and not here


@pytest.mark.parametrize(
    ("architecture", "depth", "count", "forward", "reverse"),
    [
        ("ink_hecate_2_4um", 65, 64, (0, 63), (64, 1)),
        ("ink_hecate_9_6um", 21, 16, (2, 17), (18, 3)),
        ("ink_hybrid_3d2d", 21, 17, (2, 18), (18, 2)),
        ("ink_hybrid_3d2d", 28, 17, (6, 22), (22, 6)),
        ("ink_resnet3d_152_decoder3d", 65, 62, (1, 62), (62, 1)),
        ("ink_resnet3d_152_decoder3d", 109, 62, (23, 84), (84, 23)),
        ("ink_timesformer", 27, 26, (0, 25), (25, 0)),
    ],
)
def test_middle_layers_are_those_of_the_family(architecture, depth, count, forward, reverse):
    for is_reversed, ends in enumerate((forward, reverse)):
        kept = family_of(architecture).centre(depth, count, bool(is_reversed))
        assert (len(kept), kept[0], kept[-1]) == (count, *ends)


def window_of(tile, floor):
    edge = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(tile) / (tile - 1))
    window = np.outer(edge, edge)
    return np.maximum(window / window.max(), floor)


@pytest.mark.parametrize("floor", [0.0, 0.001])
@pytest.mark.parametrize("k", [4, 16])
def test_upstream_window_is_blended_over_chunks(floor, k):
    rng = np.random.default_rng(1)
    values = rng.integers(1, 256, (3, 73, 83), dtype=np.uint8)
    values[:, :20, :30] = 0

    def network(x):
        return 300 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, -1] - x[:, :, 0], k)

    lazy = inkdask.predict(values, network, tile=16, stride=8, chunk_size=32)
    family = Family(floor=floor, is_masked=True)
    grid, valid = lazy.grid.compute(), lazy.valid.compute()
    y, x = lazy.tiling.y, lazy.tiling.x
    assert len(y.chunks) > 1
    assert len(x.chunks) > 1
    blended = np.zeros(valid.shape)
    for row, column in np.ndindex(*lazy.tiling.block_shape):
        pixels = slice(*y.edges[row : row + 2]), slice(*x.edges[column : column + 2])
        tiles = tuple(
            slice(max(axis.rows[at] - axis.depth, 0), axis.rows[at + 1])
            for axis, at in ((y, row), (x, column))
        )
        place = np.array([row]), np.array([column])
        how = lazy.tiling, "upstream", 0.0, family
        blended[pixels] = blend_chunk(grid[tiles], valid[pixels], *place, *how)
    expected = naive_map(values, network, 16, 8, window=window_of(16, floor))
    assert np.abs(blended - expected).max() < 1e-5


def test_probabilities_take_the_memory_that_is_expected():
    tiling = Tiling.of((512, 512), 64, 32, 512)
    probabilities = np.random.default_rng(0).random((*tiling.grid_shape, 64, 64), np.float32)
    valid = np.ones(tiling.shape, bool)
    place = np.zeros(1, int), np.zeros(1, int)
    blend_chunk(
        probabilities[:1, :1], valid[:64, :64], *place, Tiling.of((64, 64), 64, 32, 64), "hann", 0
    )
    for window in ("hann", "upstream"):
        tracemalloc.start()
        blend_chunk(decode(encode(probabilities)), valid, *place, tiling, window, 0.0)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 10 < peak / probabilities.size < memory.PROBABILITY


def test_both_directions_come_from_one_read(options, tmp_path):
    rng = np.random.default_rng(3)
    folder = segment(tmp_path, rng.integers(1, 256, (5, 300, 400), dtype=np.uint8))

    def run(**how):
        before = storage.counters()
        uris = inkdask.run(
            folder, model=depth_slope, layers=(0, 5), chunk_size=128, **options | how
        )
        return uris.splitlines(), (storage.counters() - before).bytes_read

    options["zarr_output_dir"] = str(tmp_path / "both")
    both, read = run(direction="both")
    assert [Path(uri).name for uri in both] == [
        "prediction_depth_slope_00_05.png", "prediction_depth_slope_00_05_reverse.png",
    ]  # fmt: skip
    pictures = [read_picture(uri) for uri in both]
    assert (tmp_path / "result.txt").read_text().splitlines() == both
    options["zarr_output_dir"] = str(tmp_path / "single")
    for expected, way in zip(pictures, (False, True), strict=True):
        (uri,), bytes_read = run(force_reverse=way, output_path=str(tmp_path / f"{way}"))
        np.testing.assert_array_equal(read_picture(uri), expected)
        assert read < 1.4 * bytes_read  # headers are read twice
    assert np.abs(pictures[0].astype(int) - pictures[1]).max() > 10
    # What is stored serves a later reduce.
    options["zarr_output_dir"] = str(tmp_path / "both")
    for uri in both:
        Path(uri).unlink()
    del options["precision"]
    again = inkdask.reduce(folder, model=depth_slope, direction="both", layers=(0, 5), **options)
    assert again.splitlines() == both


def test_directions_of_a_family_read_other_layers_of_one_read(tmp_path):
    folder = segment(
        tmp_path, np.arange(1, 22, dtype=np.uint8)[:, None, None].repeat(70, 1).repeat(70, 2)
    )
    spec = ModelSpec("mine", "ink_hecate_9_6um", "nowhere", layers=16, clip=None)
    network = Network(spec, 16, 64, 64, None, 255.0, "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "resolve", lambda *_, **__: network)
        ways = Settings(model="mine", direction="both").each_way()
        made = shared([plan.Plan.of(str(folder), way) for way in ways])
    names = [each.volume.dask.layers.keys() for each in made]
    assert any(name.startswith("read-") for name in names[0] & names[1])
    assert [each.volume[:, 0, 0].compute().tolist() for each in made] == [
        list(range(3, 19)), list(range(19, 3, -1)),
    ]  # fmt: skip
    assert [each.layers[0] for each in made] == [2, 18]


def test_mirrors_are_averaged():
    values = papyrus((3, 70, 81))

    def lopsided(x):
        return 20 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, 0] - x[:, :, 2], 4).cumsum(-1)

    def mirrored(x):
        images = [(), (-1,), (-2,), (-2, -1)]
        parts = [lopsided(x.flip(axes)).flip(axes).sigmoid() for axes in images]
        return torch.logit(sum(parts) / 4, eps=1e-9)

    plain = inkdask.predict(values, lopsided, tile=32, stride=16).map.compute()
    ink = inkdask.predict(values, lopsided, tile=32, stride=16, tta="mirror")
    expected = naive_map(values, mirrored, 32, 16)
    assert np.abs(plain - expected).max() > 0.05
    assert np.abs(ink.map.compute() - expected).max() < 1e-5
    assert "four passes" in str(ink.plan)
