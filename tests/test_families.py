"""Maps as the people of a network make them: layers, window and borders."""

import tracemalloc

import numpy as np
import pytest
import tifffile
import torch

import inkdask
from inkdask import memory
from inkdask.blending import blend_chunk
from inkdask.families import Family, family_of
from inkdask.models.hybrid_3d2d import ink_hybrid_3d2d
from inkdask.models.networks import BUILDERS
from inkdask.store import decode, encode
from inkdask.tiling import Tiling
from tests.files import read_picture
from tests.oracle import naive_map
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


def test_job_makes_the_map_of_hecate(hecate, options, tmp_path):
    values = volume("hecate_9.6um-map", (21, 80, 100), (0, 30, 0, 37))
    uri = inkdask.run(segment(tmp_path, values), model=hecate, chunk_size=64, **options)
    assert off(uri, "hecate_9.6um-map") <= 1
    options["force_reverse"] = True
    uri = inkdask.run(tmp_path, model=hecate, **options)
    assert off(uri, "hecate_9.6um-map-reverse") <= 1


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
