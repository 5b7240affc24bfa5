"""Test the Dask program against the naive sliding window, with plain functions as networks."""

import dask
import dask.array as da
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inkdask import plan
from inkdask.blending import blend
from inkdask.errors import InkdaskError
from inkdask.failures import Failure, fallible
from inkdask.inference import infer, over_chunks, tiles_with_data
from inkdask.specs import InferredChunk
from inkdask.tiling import Tiling
from tests.oracle import depth_slope, naive_map, network_of, papyrus, picture


def quarters(x):
    """Logits from the mean of each sixteenth of a tile over a few layers: (b, 1, 4, 4)."""
    return 8 * torch.nn.functional.adaptive_avg_pool2d(x[:, :, 1::2].mean(2), 4) - 3


def identity(x):
    """Logits whose probabilities are the pixels of the first layer: (b, 1, t, t)."""
    return torch.logit(x[:, :, 0])


def ink_map(volume, network, stride, chunk, **blending):
    tiling = Tiling.of(volume.shape[1:], network.tile, stride, chunk)
    inferred = infer(volume, tiling, network)
    return blend(inferred.grid, inferred.valid, tiling, **blending), inferred


@settings(max_examples=25, deadline=None)
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    stride=st.integers(3, 16),
    chunk=st.integers(16, 64),
    seed=st.integers(0, 9),
)
def test_any_image_gives_the_naive_map(height, width, stride, chunk, seed):
    volume = papyrus((4, height, width), seed)
    network = network_of(quarters, layers=4, tile=16)
    lazy, _ = ink_map(da.from_array(volume, chunks=(2, 37, 41)), network, stride, chunk)
    expected = naive_map(volume, quarters, tile=16, stride=stride)
    np.testing.assert_allclose(lazy.compute(scheduler="sync"), expected, atol=2e-6)


def test_map_does_not_depend_on_chunks():
    volume = papyrus((6, 700, 530))
    network = network_of(quarters, layers=6)
    pictures = [
        picture(ink_map(da.from_array(volume, chunks=-1), network, 16, chunk)[0].compute())
        for chunk in (128, 256, 1000)
    ]
    for other in pictures[1:]:
        difference = np.abs(other.astype(int) - pictures[0])
        assert difference.max() <= 1
        assert np.count_nonzero(difference) <= difference.size / 10_000


@pytest.mark.parametrize("shape", [(256, 256), (203, 251), (40, 30), (64, 64), (65, 500)])
def test_identity_network_returns_the_layer(shape):
    """75 % overlap, origins aligned to the stride and not, and images smaller than a tile."""
    rng = np.random.default_rng(1)
    volume = rng.integers(1, 200, (2, *shape), dtype=np.uint8)
    network = network_of(identity, layers=2, k=64)
    lazy, _ = ink_map(da.from_array(volume, chunks=-1), network, 16, 128)
    np.testing.assert_allclose(lazy.compute(), volume[0] / 200, atol=3e-6)


def test_each_tile_with_data_runs_once_and_empty_tiles_never():
    volume = papyrus((3, 400, 500))
    seen = []

    def counted(x):
        seen.append(len(x))
        assert x.flatten(1).any(1).all()
        return quarters(x)

    network = network_of(counted, layers=3, digest="counted")
    _, inferred = ink_map(da.from_array(volume, chunks=-1), network, 16, 128)
    grid = inferred.grid.compute()
    ran = ~np.isnan(grid[:, :, 0, 0])
    assert 0 < ran.sum() < ran.size
    assert sum(seen) == ran.sum()


def test_empty_volume_runs_no_network():
    def never(x):
        raise AssertionError("no tile has data")

    network = network_of(never, layers=2, digest="never")
    lazy, inferred = ink_map(da.zeros((2, 200, 200), dtype="uint8", chunks=100), network, 16, 128)
    assert not lazy.compute().any()
    assert np.isnan(inferred.grid.compute()).all()


def test_nothing_is_computed_when_the_graph_is_built():
    def read(block):
        raise AssertionError("read too early")

    volume = da.zeros((2, 900, 900), dtype="uint8", chunks=(2, 300, 300)).map_blocks(
        read, dtype="uint8"
    )
    with dask.config.set(scheduler=read):
        ink_map(volume, network_of(quarters, layers=2), 16, 256)


def test_slice_of_the_map_has_a_small_graph():
    volume = da.zeros((26, 40_000, 40_000), dtype="uint8", chunks=(26, 1000, 1000))
    lazy, _ = ink_map(volume, network_of(quarters, layers=26), 16, 1024)
    (window,) = dask.optimize(lazy[20_000:20_500, 20_000:20_500])
    assert len(window.__dask_graph__()) < 220  # of 30,000


def test_volume_of_wrong_depth_is_refused():
    lazy, _ = ink_map(da.ones((5, 64, 64), dtype="uint8"), network_of(quarters, layers=4), 16, 128)
    with pytest.raises(Exception, match="Channel mismatch.*5.*4"):
        lazy.compute()


@given(st.data())
def test_tiles_with_data_match_a_search_of_each_tile(data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    seen = rng.random((40, 50)) < data.draw(st.sampled_from([0.0, 0.01, 0.1]))
    ys, xs = np.array([0, 5, 11, 32]), np.array([0, 7, 42])
    expected = [[seen[y : y + 8, x : x + 8].any() for x in xs] for y in ys]
    assert np.array_equal(tiles_with_data(seen, ys, xs, 8), expected)


def test_two_tilings_of_a_volume_give_two_arrays():
    """Computed together, the arrays must not share blocks."""
    volume = da.from_array(papyrus((2, 300, 300)), chunks=-1)
    tilings = [Tiling.of((300, 300), 64, stride, 128) for stride in (16, 32)]
    got = dask.compute(*(over_chunks(height_of, tiling, volume).blocks[0, 0] for tiling in tilings))
    assert got == (128 + 48, 128 + 32)


def height_of(block, tiling, block_id):
    return block.shape[1]


def test_failed_block_fails_only_the_chunks_that_need_it():
    """A failure passes through a mean of layers and a mask."""
    tiling = Tiling.of((400, 400), 64, 16, 128)
    blocks = da.from_array(papyrus((4, 400, 400), holes=False), chunks=(4, 50, 400))

    @fallible
    def third_is_broken(block, block_id):
        if block_id[1] == 2:
            raise InkdaskError("strip 2 is corrupt")
        return block

    broken = blocks.map_blocks(third_is_broken, dtype=np.uint8, meta=np.empty((0, 0, 0), np.uint8))
    halved = plan.average(broken, 2)
    mask = da.ones((400, 400), chunks=90, dtype=bool)
    network = network_of(depth_slope, layers=2)
    (chunks,) = dask.compute(infer(halved, tiling, network, mask).chunks.to_delayed().tolist())
    failed = np.array([[isinstance(chunk, Failure) for chunk in row] for row in chunks])
    assert failed.any(axis=1).tolist() == failed.all(axis=1).tolist() == [True, True, False]
    assert len({chunk.cause for row in chunks[:2] for chunk in row}) == 1
    assert isinstance(chunks[2][0], InferredChunk)
    with pytest.raises(InkdaskError, match="strip 2 is corrupt"):
        infer(halved, tiling, network).grid.compute()


def test_large_full_tile_has_data():
    """The tile has more pixels than 16 bits can count."""
    at = np.array([0])
    assert tiles_with_data(np.ones((256, 256), bool), at, at, 256).all()
