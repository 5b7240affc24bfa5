"""Test the blend against a plain overlap-add, for any tiling, window and output size."""

import importlib.util
import os
import subprocess
import sys
import threading
import types
from importlib.machinery import ModuleSpec
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.functional import interpolate

from inkdask import blending
from inkdask.blending import (
    array_library,
    blend,
    blend_chunk,
    spread,
    strips_of,
    taper,
    upsampling,
    warm_up,
)
from inkdask.families import Family
from inkdask.tiling import Tiling
from tests.files import own_messages

REPOSITORY = Path(__file__).parent.parent


def weights(tile, window, sigma, family):
    """Return a blending window by its formula, float64 (tile, tile)."""
    if window == "upstream":
        along = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(tile) / (tile - 1))
        window = np.outer(along, along)
        return np.maximum(window / window.max(), family.floor)
    distance = np.arange(tile) - (tile - 1) / 2
    along = np.cos(np.pi * distance / tile) ** 2
    if window == "gaussian":
        along = np.maximum(np.exp(-(distance**2) / (2 * (sigma or tile / 2.5) ** 2)), 1e-6)
    return np.outer(along, along)


def overlap_add(grid, valid, tiling, w):
    """Sum upsampled, windowed tiles one by one in float64; return mean and standard deviation."""
    tile = tiling.tile
    total, squares, weight = np.zeros((3, *(max(side, tile) for side in tiling.shape)))
    for i, y in enumerate(tiling.y.origins):
        for j, x in enumerate(tiling.x.origins):
            if np.isnan(grid[i, j]).any():
                continue
            p = torch.from_numpy(grid[i, j].astype(np.float64))[None, None]
            up = interpolate(p, size=(tile, tile), mode="bilinear", align_corners=False)
            place = slice(y, y + tile), slice(x, x + tile)
            total[place] += w * up[0, 0].numpy()
            squares[place] += w * up[0, 0].numpy() ** 2
            weight[place] += w
    mean, square = (
        np.divide(it, weight, out=np.zeros_like(it), where=weight > 0) for it in (total, squares)
    )
    spread = np.sqrt(np.maximum(square - mean**2, 0))
    return [np.where(valid, it[: valid.shape[0], : valid.shape[1]], 0) for it in (mean, spread)]


@pytest.fixture(params=[7, 256])
def strip(request, monkeypatch):
    """Cut chunks into many strips, or into one."""
    monkeypatch.setattr(blending, "STRIP", request.param)
    strips_of.cache_clear()
    yield
    strips_of.cache_clear()


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_blend_and_spread_equal_overlap_add(strip, data):
    window = data.draw(st.sampled_from(["hann", "gaussian", "upstream"]))
    tile = data.draw(st.integers(3 if window == "upstream" else 2, 24))
    k = data.draw(st.integers(1, tile))
    shape = data.draw(st.tuples(st.integers(1, 130), st.integers(1, 130)))
    stride = data.draw(st.integers(max(tile // 5, 1), tile))
    tiling = Tiling.of(shape, tile, stride, chunk=data.draw(st.integers(1, 80)))
    sigma = data.draw(st.sampled_from([0.0, 3.0]))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    grid = rng.random((*tiling.grid_shape, k, k), np.float32)
    grid[rng.random(tiling.grid_shape) < 0.3] = np.nan
    valid = rng.random(shape) < 0.8

    given_ = (
        da.from_array(grid, chunks=(*tiling.grid_chunks, k, k)),
        da.from_array(valid, chunks=tiling.chunks),
    )
    family = Family(data.draw(st.sampled_from([0.0, 0.001])), data.draw(st.booleans()))
    is_masked = family.is_masked or window != "upstream"
    there = valid if is_masked else np.ones_like(valid)
    mean, _ = overlap_add(grid, there, tiling, weights(tile, window, sigma, family))
    separable = "hann" if window == "upstream" else window
    _, deviation = overlap_add(grid, valid, tiling, weights(tile, separable, sigma, family))
    for lazy, exact in (
        (blend(*given_, tiling, window, sigma, family), mean),
        (spread(*given_, tiling, window, sigma), deviation),
    ):
        assert lazy.chunks == tiling.chunks
        assert lazy.dtype == np.float32
        got = lazy.compute(scheduler="sync")
        assert got.dtype == np.float32
        np.testing.assert_allclose(got, exact, atol=2e-6)
        assert got.min() >= 0


def test_tiles_that_agree_have_no_spread_and_opposite_ones_the_largest():
    tiling = Tiling.of((64, 64), 32, 16, 64)
    agreed = np.full((*tiling.grid_shape, 4, 4), 0.7, np.float32)
    apart = np.indices(tiling.grid_shape).sum(axis=0)[..., None, None] % 2 * np.ones((4, 4))
    valid = da.ones((64, 64), dtype=bool, chunks=tiling.chunks)
    chunks = (*tiling.grid_chunks, 4, 4)
    same = spread(da.from_array(agreed, chunks), valid, tiling).compute()
    assert same.max() < 1e-6
    opposite = spread(da.from_array(apart.astype(np.float32), chunks), valid, tiling).compute()
    assert opposite[24, 24] == pytest.approx(0.5, abs=1e-3)  # in the middle of four tiles


def test_hann_window_has_positive_ends_and_a_constant_sum():
    w = taper(64)
    assert w.min() > 0
    for stride in (32, 16):
        sums = w.reshape(-1, stride).sum(axis=0)
        np.testing.assert_allclose(sums, 64 / stride / 2)


def test_narrow_gaussian_window_is_positive_everywhere():
    assert taper(64, "gaussian", 1.0).min() >= 1e-7


@pytest.mark.parametrize(("tile", "k"), [(64, 4), (64, 64), (5, 1), (7, 3)])
def test_upsampling_equals_that_of_torch(tile, k):
    values = np.eye(k)
    expected = interpolate(
        torch.from_numpy(values)[None], size=tile, mode="linear", align_corners=False
    )[0].numpy()  # (k, tile)
    np.testing.assert_allclose(upsampling(tile, k), expected.T, atol=1e-12)


@pytest.mark.parametrize("pixels", [40, 600])
@pytest.mark.parametrize(("k", "margin"), [(1, 0), (3, 0), (3, 5), (4, 11)])
@pytest.mark.parametrize(("window", "sigma"), [("hann", 0.0), ("gaussian", 0.0), ("gaussian", 2.0)])
def test_strips_are_the_window_and_the_interpolation(pixels, k, margin, window, sigma):
    """With a margin both reach beyond the tile, as for tiles of a coarse pass."""
    tile, origins = 12, (0, 9, 28, *range(30, pixels - 12, 10))
    wide = tile + 2 * margin
    w = weights(wide, window, sigma * wide / tile, None).diagonal() ** 0.5
    middles = (np.arange(k) + 0.5) * tile / k - 0.5
    u = [np.interp(np.arange(-margin, tile + margin), middles, value) for value in np.eye(k)]
    B, W = (
        np.zeros((pixels + 2 * wide, len(origins), k)),
        np.zeros((pixels + 2 * wide, len(origins))),
    )
    for number, origin in enumerate(origins):
        place = slice(wide + origin - margin, wide + origin - margin + wide)
        W[place, number], B[place, number] = w, w[:, None] * np.transpose(u)
    B, W = B[wide:-wide], W[wide:-wide]
    ends = []
    for strip in strips_of(origins, pixels, tile, k, window, sigma, margin):
        ends += [strip.pixels.start, strip.pixels.stop]
        there = slice(k * strip.tiles.start, k * strip.tiles.stop)
        np.testing.assert_allclose(strip.w, W[strip.pixels, strip.tiles], atol=1e-12)
        flat = B[strip.pixels].reshape(len(strip.w), -1)
        np.testing.assert_allclose(strip.B, flat[:, there], atol=1e-12)
        assert np.count_nonzero(flat) == np.count_nonzero(flat[:, there])  # no tile is left out
        assert strip.w.any(0)[[0, -1]].all()  # and none is there for nothing
    assert ends == sorted([0, *2 * [*range(256, pixels, 256)], pixels])


class OnGpu(np.ndarray):
    """Array that must be fetched, like an array of CuPy."""

    def get(self):
        return np.array(self)


def standing_in_for_cupy():
    module = types.ModuleType("cupy")
    module.__spec__ = ModuleSpec("cupy", None)
    module.isnan, module.float32, module.float64 = np.isnan, np.float32, np.float64
    module.asarray = lambda array: np.asarray(array).view(OnGpu)
    module.where = lambda *arrays: np.where(*arrays).view(OnGpu)
    module.zeros = lambda *shape: np.zeros(*shape).view(OnGpu)
    return module


@pytest.fixture
def cold(monkeypatch):
    """As in a process that has not begun to warm CuPy up, and has not imported it."""
    monkeypatch.setattr(blending, "_warming", threading.Lock())
    monkeypatch.setattr(blending, "_cupy_is_ready", threading.Event())
    monkeypatch.delitem(sys.modules, "cupy", raising=False)


def wait_until_warm():
    for thread in threading.enumerate():
        if thread.name == "inkdask-cupy":
            thread.join()


def chunk_to_blend():
    tiling = Tiling.of((100, 90), 16, 4, 128)
    rng = np.random.default_rng(0)
    grid = rng.random((*tiling.grid_shape, 4, 4), np.float32)
    grid[3:9, 2:5] = np.nan
    return grid, rng.random((100, 90)) < 0.9, np.array([0]), np.array([0]), tiling, "hann", 0.0


def test_cupy_blends_once_its_kernels_are_built(cold, monkeypatch):
    expected = blend_chunk(*chunk_to_blend())
    monkeypatch.setitem(sys.modules, "cupy", cupy := standing_in_for_cupy())
    built, users = threading.Event(), []

    def isnan(array):
        users.append(threading.current_thread().name)
        assert built.wait(60)  # as long as kernels are compiled
        return np.isnan(array)

    cupy.isnan = isnan
    for _ in range(2):
        warm_up()
        assert array_library() is np
        assert np.array_equal(blend_chunk(*chunk_to_blend()), expected)
    built.set()
    wait_until_warm()
    assert array_library() is cupy
    got = blend_chunk(*chunk_to_blend())
    assert type(got) is np.ndarray
    assert np.array_equal(got, expected)
    ours = threading.current_thread().name
    assert users == ["inkdask-cupy", "inkdask-cupy", ours]  # the warm-up ran once, with two shapes


def test_process_without_gpu_blends_with_numpy(cold, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", standing_in_for_cupy())
    blend_chunk(*chunk_to_blend())
    assert array_library() is np


def run(code, folder):
    """Run Python code in a process that imports modules from ``folder``."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(REPOSITORY)])}
    command = [sys.executable, "-c", code, str(folder)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


SLOW_KERNELS = """
import pathlib, threading, time
import numpy
from numpy import float32, float64
class ndarray(numpy.ndarray): pass
steps = pathlib.Path(__file__).with_name("steps")
def slow(function):
    def call(*arrays):
        with steps.open("a") as file:
            file.write(function.__name__ + "\\n")
        end = time.monotonic() + 30
        while threading.main_thread().is_alive() and time.monotonic() < end:
            time.sleep(0.01)  # as long as the program runs, however slow the machine is
        return function(*arrays)
    return call
asarray, isnan, where, zeros = map(
    slow, (numpy.asarray, numpy.isnan, numpy.where, numpy.zeros)
)
"""

END_EARLY = """
import pathlib, sys, time
from inkdask.blending import warm_up
warm_up()
while not pathlib.Path(sys.argv[1], "steps").exists():
    time.sleep(0.01)
"""


def test_process_ends_while_cupy_builds_kernels(tmp_path):
    (tmp_path / "cupy.py").write_text(SLOW_KERNELS)
    done = run(END_EARLY, tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert len((tmp_path / "steps").read_text().split()) < 6  # of 20


@pytest.mark.parametrize("fault", ["import", "kernels", "later"])
def test_numpy_blends_when_cupy_fails(fault, cold, monkeypatch, tmp_path, caplog):
    """A driver may be too old for CuPy, and the job must still write its picture."""
    expected = blend_chunk(*chunk_to_blend())
    reason = "cudaErrorInsufficientDriver: CUDA driver version is insufficient"

    def fail(array):
        raise RuntimeError(reason)

    if fault == "import":
        (tmp_path / "cupy.py").write_text(f"raise ImportError({reason!r})")
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.setitem(sys.modules, "cupy", cupy := standing_in_for_cupy())
        if fault == "kernels":
            cupy.asarray = fail
    with caplog.at_level("INFO", "inkdask"):
        warm_up()
        wait_until_warm()
        if fault == "later":
            assert array_library() is cupy
            cupy.asarray = fail
        for _ in range(2):
            assert np.array_equal(blend_chunk(*chunk_to_blend()), expected)
            warm_up()
        wait_until_warm()
    assert array_library() is np
    assert caplog.text.count("CuPy cannot blend, NumPy does: cudaErrorInsufficientDriver") == 1


def test_process_without_cupy_blends_with_numpy(cold, caplog):
    if importlib.util.find_spec("cupy"):
        pytest.skip("CuPy is installed")
    with caplog.at_level("INFO", "inkdask"):
        warm_up()
        wait_until_warm()
    assert array_library() is np
    assert not own_messages(caplog)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_cupy_blend_equals_numpy_blend(cold):
    cupy = pytest.importorskip("cupy")
    expected = blend_chunk(*chunk_to_blend())
    warm_up()
    wait_until_warm()
    assert array_library() is cupy
    got = blend_chunk(*chunk_to_blend())
    assert type(got) is np.ndarray
    np.testing.assert_allclose(got, expected, atol=1e-6)
