"""Integer maths of tiles and chunks: tiles once, pixels covered, overlaps long enough."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inkdask.errors import SettingsError
from inkdask.tiling import Axis, Tiling

TILING = Tiling.of((512, 640), tile=64, stride=16, chunk=256)


@st.composite
def axes(draw):
    tile = draw(st.integers(1, 70))
    stride = draw(st.integers(1, tile))
    return Axis(
        length=draw(st.integers(1, 900)), tile=tile, stride=stride, chunk=draw(st.integers(1, 300))
    )


@given(axes())
def test_tiles_cover_every_pixel_and_stay_inside(axis):
    covered = np.zeros(max(axis.length, axis.tile), bool)
    for origin in axis.origins:
        covered[origin : origin + axis.tile] = True
    assert covered.all()
    assert (np.diff(axis.origins) > 0).all()
    assert (np.diff(axis.origins) <= axis.stride).all()
    assert axis.origins[-1] == max(axis.length - axis.tile, 0)


@given(axes())
def test_tiles_are_owned_by_exactly_one_chunk(axis):
    owned = [axis.local_origins(i) + axis.edges[i] for i in range(len(axis.chunks))]
    assert np.array_equal(np.concatenate(owned), axis.origins)
    assert sum(axis.chunks) == axis.length
    assert all(len(tiles) for tiles in owned)


@given(axes())
def test_halo_holds_the_tiles_of_its_chunk(axis):
    for i, size in enumerate(axis.chunks):
        last = i == len(axis.chunks) - 1
        have = size if last else size + axis.halo
        assert axis.local_origins(i)[-1] + axis.tile <= max(have, axis.tile)
        assert axis.halo <= size or len(axis.chunks) == 1


@given(axes())
def test_chunk_reads_up_to_the_end_of_its_last_tile(axis):
    for i, edge in enumerate(axis.edges[:-1].tolist()):
        end = int(edge + axis.local_origins(i)[-1] + axis.tile)
        assert axis.reading(i) == slice(edge, min(end, axis.length))


@given(axes())
def test_depth_holds_all_tiles_that_reach_a_chunk(axis):
    for i in range(len(axis.chunks)):
        start, stop = axis.edges[i], axis.edges[i + 1]
        reaching = axis.origins[(axis.origins < stop) & (axis.origins + axis.tile > start)]
        delivered = axis.reaching_origins(i) + start
        assert set(reaching) <= set(delivered)
        # Dask's overlap would merge chunks that are shorter than its depth.
        assert axis.depth <= axis.grid_chunks[i] or len(axis.chunks) == 1


@given(axes())
def test_chunks_are_multiples_of_the_stride_and_at_least_a_tile_long(axis):
    assert all(edge % axis.stride == 0 for edge in axis.edges[:-1])
    if len(axis.chunks) > 1:
        assert min(axis.chunks) >= axis.tile
        assert max(axis.chunks) < axis.step + 2 * axis.tile
        assert len(set(axis.grid_chunks[:-1])) == 1


@given(axes(), st.data())
def test_reach_of_a_box_has_the_same_tiles(axis, data):
    start = data.draw(st.integers(0, axis.length - 1))
    stop = data.draw(st.integers(start + 1, axis.length))
    first, last = axis.reach(start, stop)
    assert first <= start < stop <= last <= axis.length
    inside = Axis(last - first, axis.tile, axis.stride, axis.chunk)
    touching = (axis.origins < stop) & (axis.origins + axis.tile > start)
    assert np.array_equal(inside.origins + first, axis.origins[touching])


@given(axes(), st.data())
def test_reaching_chunks_own_all_tiles_of_a_box(axis, data):
    start = data.draw(st.integers(0, axis.length - 1))
    stop = data.draw(st.integers(start + 1, axis.length))
    found = axis.reaching_chunks(start, stop)
    touching = (axis.origins < stop) & (axis.origins + axis.tile > start)
    owners = np.searchsorted(axis.rows, np.flatnonzero(touching), "right") - 1
    assert 0 <= found.start <= owners.min()  # a slice counts negative numbers from its end
    assert owners.max() < found.stop
    last = np.searchsorted(axis.edges, stop - 1, "right") - 1
    assert found.start >= owners.min() - 1
    assert found.stop == last + 1


@given(axes())
def test_passes_halve_the_stride_and_begin_with_both_borders(axis):
    strides = [axis.stride << halvings for halvings in reversed(range(axis.passes))]
    assert axis.tile / 2 < strides[0] <= axis.tile
    for number, origin in enumerate(axis.origins):
        is_last = number == len(axis.origins) - 1
        expected = [number * axis.stride % stride == 0 or is_last for stride in strides]
        assert axis.pass_of_tile[number] == expected.index(True), origin


@given(axes())
def test_tiles_of_a_chunk_are_in_one_pass_each(axis):
    tiling = Tiling(axis, axis)
    for row in {0, len(axis.chunks) - 1}:
        passes = [tiling.in_passes(row, 0, last - 1, last) for last in range(tiling.passes)]
        assert all(mask.dtype == bool for mask in passes)
        assert np.array_equal(sum(mask.astype(int) for mask in passes), np.ones(passes[0].shape))
        for last, mask in enumerate(passes):
            assert np.count_nonzero(mask) == (
                tiling.tiles_until(last)[row, 0] - tiling.tiles_until(last - 1)[row, 0]
            )
    done = np.arange(np.prod(tiling.block_shape)).reshape(tiling.block_shape) % (tiling.passes + 1)
    for place, there in np.ndenumerate(tiling.tiles_there(done - 1)):
        assert there == np.count_nonzero(tiling.in_passes(*place, -1, done[place] - 1))


def test_tiling_of_known_image_has_known_grid():
    assert TILING.grid_shape == (29, 37)
    assert TILING.tiles == 1073
    assert TILING.chunks == ((256, 256), (256, 256, 128))
    assert TILING.grid_chunks == ((16, 13), (16, 16, 5))


@pytest.mark.parametrize("stride", [1, 64])
def test_tiling_takes_any_stride_up_to_the_tile(stride):
    tiling = Tiling.of((512, 640), tile=64, stride=stride, chunk=256)
    assert tiling.stride == stride
    assert {tiling: 1}[Tiling.of((512, 640), tile=64, stride=stride, chunk=256)]  # as a key


@pytest.mark.parametrize(("value", "name"), [(Axis(9, 4, 2, 8), "tile"), (TILING, "y")])
def test_places_are_frozen(value, name):
    """Because chunks that are stored were cut by them."""
    with pytest.raises(FrozenInstanceError):
        setattr(value, name, None)


@pytest.mark.parametrize("stride", [-1, 0, 65])
def test_tiling_refuses_stride_below_one_or_above_tile(stride):
    with pytest.raises(SettingsError, match="STRIDE"):
        Tiling.of((512, 640), tile=64, stride=stride, chunk=256)
