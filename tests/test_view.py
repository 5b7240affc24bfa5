"""Looking at segments and predictions: what is shown is right, and looking costs little."""

import base64
import io
import json
import re
import subprocess
import sys
import threading
import time
import types
import zlib

import dask.array as da
import numpy as np
import pytest
import tifffile
import torch
from PIL import Image

import inkdask
from inkdask import background, paces, storage
from inkdask.box import Box
from inkdask.errors import InkdaskError
from inkdask.view import html as html_module
from inkdask.view import tiles, words
from inkdask.view.kept import Kept
from inkdask.view.sampling import Budget, Layer, look, shrink
from inkdask.view.tiles import MOST, SIDE, UNKNOWN, Ink, Papyrus
from tests.oracle import papyrus
from tests.test_runs import wait_until

SHAPE = 5, 460, 620
WHOLE = Box.at((0, 0), SHAPE[1:])
PART = Box(100, 360, 120, 510)  # predictions are of this part
SMALL = Box.at((0, 0), PART.shape)
ADVICE = "Zoom in or draw a box to compute a part."
TILES = {"tile": 32, "stride": 16, "chunk_size": 128}


def mean_of_tile(x):
    """Logits from the brightness of quarters of a tile: (b, 1, 4, 4)."""
    return 8 * torch.nn.functional.adaptive_avg_pool2d(x.mean(2), 4) - 2


@pytest.fixture(autouse=True)
def nothing_is_known():
    """Equal predictions share a background, but those of different tests must not."""
    background._known.clear()
    paces._seconds.clear()


@pytest.fixture(scope="module")
def volume():
    return papyrus(SHAPE)


def write(folder, volume, **how):
    (folder / "layers").mkdir(parents=True)
    for number, layer in enumerate(volume, 3):
        tifffile.imwrite(folder / "layers" / f"{number:02d}.tif", layer, **how)
    return inkdask.open_segment(str(folder))


@pytest.fixture(scope="module", params=[{"tile": (64, 64)}, {"rowsperstrip": 32}])
def layout(request, tmp_path_factory, volume):
    """The volume as a segment: once in tiles, once in strips."""
    return write(tmp_path_factory.mktemp("segment"), volume, **request.param)


@pytest.fixture(scope="module")
def segment(tmp_path_factory, volume):
    return write(tmp_path_factory.mktemp("segment"), volume, tile=(64, 64))


def assembled(picture, shape, level, *of_layer):
    """Put all tiles of a level together."""
    step = 1 << level
    height, width = (-(-length // step) for length in shape)
    out = np.zeros((height, width), np.uint8)
    for row in range(-(-height // SIDE)):
        for column in range(-(-width // SIDE)):
            tile = picture.tile(*of_layer, level, row, column)
            out[row * SIDE :, column * SIDE :][: tile.shape[0], : tile.shape[1]] = tile
    return out


def test_tiles_of_a_layer_are_its_pixels(layout, volume):
    shown = Papyrus.of_segment(layout)
    assert shown.numbers == (3, 4, 5, 6, 7)
    for index in (0, 3):
        np.testing.assert_array_equal(assembled(shown, SHAPE[1:], 0, index), volume[index])


@pytest.mark.parametrize("level", [1, 2, 3])
def test_coarse_tiles_are_means_of_squares(layout, volume, level, monkeypatch):
    monkeypatch.setattr(tiles, "OVERVIEW", 200)  # so that some levels come from an overview
    got = assembled(Papyrus.of_segment(layout), SHAPE[1:], level, 2)
    step = 1 << level
    padded = np.pad(volume[2].astype(float), [(0, -n % step) for n in SHAPE[1:]], "constant",
                    constant_values=np.nan)  # fmt: skip
    squares = padded.reshape(padded.shape[0] // step, step, -1, step)
    assert np.abs(got - np.nanmean(squares, axis=(1, 3))).max() <= 1  # a mean of rounded means


def test_cropped_segment_shows_its_box(layout, volume):
    cropped = layout.crop(slice(101, 400), slice(33, 577))
    shown = Papyrus.of_segment(cropped)
    np.testing.assert_array_equal(assembled(shown, (299, 544), 0, 1), volume[1, 101:400, 33:577])


def test_dear_box_is_sampled_in_the_right_places(layout):
    layer = Layer.of_segment(layout, 2)
    before = storage.counters().bytes_read
    sampled = look(layer, WHOLE, 16, Budget(SHAPE[1] * SHAPE[2] / 2, 1000))
    assert storage.counters().bytes_read - before < 0.55 * SHAPE[1] * SHAPE[2]
    exact = shrink(layer.read(WHOLE), 16)
    assert sampled.shape == exact.shape
    assert np.corrcoef(sampled.ravel(), exact.ravel())[0, 1] > 0.5


def test_sampled_ramp_stays_a_ramp():
    ramp = np.add.outer(np.arange(512), np.arange(1024)) / 6.1
    layer = Layer.of_array(da.from_array(ramp.astype(np.uint8), chunks=(32, 32)))
    sampled = look(layer, Box(0, 512, 0, 1024), 8, Budget(1e9, 100)).astype(int)
    inner = (slice(8, -8), slice(8, -8))  # nothing lies beyond the outermost pieces
    assert np.abs(sampled - shrink(ramp.astype(np.uint8), 8))[inner].max() <= 4


def test_tiles_asked_for_again_read_nothing(layout):
    shown = Papyrus.of_segment(layout)
    assembled(shown, SHAPE[1:], 0, 1)
    before = storage.counters().bytes_read
    assembled(shown, SHAPE[1:], 0, 1)
    assert storage.counters().bytes_read == before


def test_kept_arrays_are_made_once_and_bounded():
    kept, made = Kept(1000), []

    def make():
        made.append(1)
        time.sleep(0.05)
        return np.zeros(400, np.uint8)

    threads = [threading.Thread(target=kept.get, args=("a", make)) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    kept.get("b", make)
    kept.get("c", make)  # "a" goes
    kept.get("b", make)
    assert len(made) == 3
    kept.get("a", make)
    assert len(made) == 4
    with pytest.raises(ZeroDivisionError):
        kept.get("d", lambda: 1 / 0)
    assert kept.get("d", make).size == 400


def test_array_dropped_while_it_is_made_is_made_anew():
    kept = Kept(1000)

    def out_of_date():
        kept.drop("a")  # what it is made of changes
        return np.zeros(400, np.uint8)

    kept.get("a", out_of_date)
    assert kept.get("a", lambda: np.ones(400, np.uint8)).all()
    for key in "bcd":
        kept.get(key, lambda: np.zeros(400, np.uint8))
    assert kept._bytes == 800


def test_tile_that_changes_while_it_is_read_is_sent_again(ink, monkeypatch):
    pytest.importorskip("anywidget")
    shown = ink.show()
    sent, key = threading.Semaphore(0), (1, 0, 0, 0, 0)
    values = iter([1, 2])

    def read(*_):
        value = next(values)
        if value == 1:
            shown._on_change(1, WHOLE)
        return np.full((2, 2), value, np.uint8)

    tiles_sent = []

    def send(content, buffers=None):
        if content["kind"] == "tile":
            tiles_sent.append(buffers[0][0])
            sent.release()

    monkeypatch.setattr(shown._inks[0], "tile", read)
    monkeypatch.setattr(shown.canvas, "send", send)
    shown._on_message(None, {"kind": "tiles", "wanted": [list(key)]}, None)
    assert sent.acquire(timeout=60)
    assert sent.acquire(timeout=60)
    assert tiles_sent == [1, 2]


# --- predictions


@pytest.fixture
def part(segment):
    return segment.crop(*PART.slices)


@pytest.fixture
def ink(part):
    return inkdask.predict(part, model=mean_of_tile, **TILES)


def expected_values(ink):
    return np.rint(ink.map.compute() * MOST).astype(int)


def compute(ink, box=SMALL):
    """Have the background compute a box of a prediction."""
    ink.background.focus(box)
    ink.wait()


def test_ink_is_computed_where_somebody_looks_and_no_tile_twice(ink):
    shown = Ink.of(ink)
    assert (assembled(shown, SMALL.shape, 0) == UNKNOWN).all()
    before = storage.counters().tiles
    expected = expected_values(ink)
    all_tiles = storage.counters().tiles - before
    ink.background.see(Box(140, 150, 140, 150))
    ink.wait()
    assert 1 <= np.count_nonzero(ink.background.known) <= 4  # those that reach into it
    near = assembled(shown, SMALL.shape, 0)[128:260, 128:256]
    assert np.abs(near - expected[128:260, 128:256]).max() <= 1

    compute(ink)
    assert ink.background.known.all()
    assert storage.counters().tiles - before == 2 * all_tiles
    got = assembled(shown, SMALL.shape, 0)
    assert np.abs(got - expected).max() <= 1


def test_predictions_of_two_windows_share_their_tiles(part, ink):
    other = inkdask.predict(part, model=mean_of_tile, **TILES, blend_mode="gaussian")
    assert other.background is ink.background
    assert Ink.of(other) is not Ink.of(ink)
    before = storage.counters().tiles
    compute(ink, Box(0, 200, 0, 200))
    assert storage.counters().tiles > before
    got = Ink.of(other).tile(0, 0, 0)[:200, :200]
    expected = np.rint(other.map[:200, :200].compute() * MOST)
    assert np.abs(got - expected).max() <= 1


def test_spread_of_opinions_is_a_layer_of_its_own(ink):
    pytest.importorskip("anywidget")
    viewer = ink.show(spread=True)
    shown = viewer._inks[1]
    assert shown is Ink.of(ink, is_spread=True) is not Ink.of(ink)
    compute(ink)
    expected = ink.spread.compute()
    assert expected.max() > 0.03
    got = assembled(shown, SMALL.shape, 0)
    assert np.abs(got - 2 * MOST * expected).max() <= 1
    assert np.abs(assembled(viewer._inks[0], SMALL.shape, 0) - expected_values(ink)).max() <= 1
    titles = ["", "spread of opinions"]
    assert [panel["title"] for panel in viewer.canvas.panels] == titles
    assert not viewer.controls["beside"].value
    viewer.controls["beside"].value = True
    assert [panel["ink"] for panel in viewer.canvas.panels] == [0, 1, 2]
    assert [panel["most"] for panel in viewer.canvas.panels] == [1, 1, 0.5]
    assert viewer.canvas.columns == 3
    assert len(ink.show().canvas.panels) == 1


def test_many_chunks_wait_to_be_asked_for(ink, monkeypatch):
    monkeypatch.setattr(background, "AUTO_TILES", 10)
    ink.background.see(SMALL)
    ink.wait()
    assert not ink.background.known.any()
    button = words.offer([ink.background], SMALL, SMALL)
    assert button == ("Compute all", f"{ADVICE} Compute all: {ink.tiling.tiles:,} tiles.", True)
    assert words.status([ink.background], button).startswith("0 of 6 chunks computed. Zoom in")
    part = words.offer([ink.background], Box(130, 200, 130, 200), SMALL)
    assert part.sentence == "Compute view: 256 tiles."


def test_looking_does_not_cancel_start(ink, monkeypatch):
    monkeypatch.setattr(background, "AUTO_TILES", 10)
    ink.start()
    ink.background.see(SMALL)
    ink.background.see(Box(0, 10, 0, 10))
    ink.background.choose(None)
    assert not words.offer([ink.background], SMALL, SMALL).is_open  # all is asked for
    ink.wait()
    assert ink.background.known.all()
    assert words.status([ink.background]) == "All 6 chunks computed."


def test_wishes_are_kept_apart_and_served_by_rank(ink, monkeypatch):
    """The wishes of four are there before a chunk is computed; then each is served in turn."""
    runner, order = ink.background, []
    let_go = threading.Event()
    receive = runner._receive

    def note(number, batch, task, chunk):
        let_go.wait(60)
        if runner.work:
            order.append((runner.work.wish, batch[task]))
        receive(number, batch, task, chunk)

    monkeypatch.setattr(runner, "_receive", note)
    monkeypatch.setattr(background, "_abreast", lambda: 1)
    corners = {"see": (0, 0), "choose": (0, 2), "focus": (1, 0)}
    ink.start()
    for wish, (row, column) in corners.items():
        getattr(runner, wish)(Box.at((128 * row + 20, 128 * column + 20), (10, 10)))
    assert runner.work.wish == "focus"
    let_go.set()
    ink.wait()
    assert runner.known.all()
    # `start` was first, and its first chunk was on its way.
    wishes = [wish for wish, _ in order[1:]]
    assert wishes == sorted(wishes, key=("focus", "box", "start").index)
    assert wishes[0] == "focus"
    assert ("box", (0, 2)) in order


def test_failed_look_leaves_words_of_what_failed(ink):
    ink.background.failure = "It is broken."
    assert words.status([ink.background]) == "It is broken."


@pytest.mark.parametrize(
    ("seconds", "says"),
    [(0.2, "a few seconds"), (42, "about 40 s"), (250, "about 4 min"), (9000, "about 2 h")],
)
def test_times_are_rough(seconds, says):
    assert words.about(seconds) == says


def test_description_is_right_while_another_thread_imports_the_network(ink, monkeypatch):
    """`start` imports torch in a thread; a module that is half imported lacks its names."""
    half = types.ModuleType("inkdask.predictor")
    monkeypatch.setitem(sys.modules, "inkdask.predictor", half)
    assert "cost" in ink._repr_html_()


def test_overview_follows_the_chunks(ink, monkeypatch):
    monkeypatch.setattr(tiles, "OVERVIEW", 160)
    shown = Ink.of(ink)
    changed = []
    shown.observers.append(changed.append)
    compute(ink)
    assert Box(0, 128, 0, 128) in changed
    assert changed[-1] is None
    step = -(-260 // shown.overview.shape[0])
    assert step == 4
    expected = shrink(np.rint(ink.map.compute() * MOST).astype(np.uint8), step)
    assert np.abs(shown.overview.astype(int) - expected).max() <= 1


def test_wait_lasts_until_the_observers_know_that_nothing_is_computed(ink):
    runner, go_on, told = ink.background, threading.Event(), []

    def hear(place):
        if place is None:
            told.append(go_on.wait(60))

    runner.observers.append(hear)
    runner.focus(SMALL)
    wait_until(lambda: not runner.is_busy)
    waiting = threading.Thread(target=ink.wait)
    waiting.start()
    waiting.join(0.1)
    assert waiting.is_alive()
    go_on.set()
    waiting.join(60)
    assert told == [True]


def test_region_of_interest_lies_over_its_papyrus(segment, volume):
    ink = inkdask.predict(segment, model=mean_of_tile, **TILES, roi_xyxy=(201, 130, 555, 401))
    below = Papyrus.of_plan(ink.plan)
    np.testing.assert_array_equal(assembled(below, (271, 354), 0, 4), volume[4, 130:401, 201:555])
    compute(ink, Box(0, 271, 0, 354))
    got = assembled(Ink.of(ink), (271, 354), 0)
    assert np.abs(got - expected_values(ink)).max() <= 1


def test_reversed_layers_lie_under_a_reversed_prediction(segment, volume):
    ink = inkdask.predict(segment, model=mean_of_tile, tile=32, stride=16, force_reverse=True)
    below = Papyrus.of_plan(ink.plan)
    assert below.numbers == (7, 6, 5, 4, 3)
    np.testing.assert_array_equal(below.tile(0, 0, 0, 0), volume[4, :SIDE, :SIDE])


def test_failure_in_the_background_is_told(segment):
    def broken(x):
        if x.any():  # what is tried at first is a tile of zeros
            raise InkdaskError("The network is broken.")
        return mean_of_tile(x)

    ink = inkdask.predict(segment, model=broken, tile=32, stride=16)
    with pytest.raises(InkdaskError, match="The network is broken"):  # else parts would be black
        compute(ink, Box(0, 10, 0, 10))
    assert words.status([ink.background]) == "The network is broken."
    assert not ink.background.is_busy


# --- what notebooks show of themselves


def thumbnails(html):
    found = re.findall(r"data:image/jpeg;base64,([^']+)'", html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_segment_describes_itself(segment):
    html = segment._repr_html_()
    assert "620 x 460 pixels" in html
    assert "5 (3:8)" in html
    assert "uint8" in html
    (thumbnail,) = thumbnails(html)
    assert max(thumbnail.size) == 360
    assert np.asarray(thumbnail).std() > 20


def test_middle_lies_on_papyrus(tmp_path):
    volume = np.zeros((1, 700, 1300), np.uint8)
    volume[:, 80:300, 900:1200] = 90
    segment = write(tmp_path / "corner", volume)
    rows, columns = inkdask.view.middle(segment, 200)
    assert (rows.stop - rows.start, columns.stop - columns.start) == (200, 200)
    assert (volume[0, rows, columns] > 0).mean() > 0.95
    assert inkdask.view.middle(segment, 5000) == (slice(0, 700), slice(0, 1300))


def test_middle_of_layers_without_a_thumbnail_is_their_middle(tmp_path):
    (tmp_path / "layers").mkdir()
    Image.fromarray(np.ones((200, 1000), np.uint8)).save(tmp_path / "layers" / "00.png")
    segment = inkdask.open_segment(tmp_path)
    assert inkdask.view.middle(segment, 100) == (slice(50, 150), slice(450, 550))


def test_prediction_describes_itself_and_computes_nothing(ink):
    before = storage.counters().tiles
    html = ink._repr_html_()
    assert storage.counters().tiles == before
    assert "mean_of_tile" in html
    assert "<progress value='0' max='6'>" in html
    compute(ink)
    after = ink._repr_html_()
    assert "<progress value='6' max='6'>" in after
    assert "tiles/s here" in after
    assert np.asarray(thumbnails(after)[0]).tolist() != np.asarray(thumbnails(html)[0]).tolist()


def test_viewers_of_many_noisy_pictures_are_light_in_a_saved_notebook(tmp_path):
    """What a notebook keeps of a viewer: the still, and at most the state of its widgets."""
    widgets = pytest.importorskip("ipywidgets")
    rng = np.random.default_rng(0)
    noise = rng.integers(1, 255, (5, 1100, 1100), np.uint8)
    segment = write(tmp_path / "noise", noise, tile=(64, 64))
    ink = inkdask.predict(segment, model=mean_of_tile, tile=32, stride=32, chunk_size=512)
    shown = Ink.of(ink)
    shown.background.passes[:] = 0  # as if noise was all that came out
    shown._overview[:] = rng.integers(0, 254, shown._overview.shape)
    many = {str(number): ink for number in range(40)}
    for viewer in (segment.show(), ink.show(), inkdask.view.compare(many, columns=8)):
        state = widgets.Widget.get_manager_state(widgets=[*all_of(viewer.widget)])
        kept = len(viewer._static) + len(json.dumps(state))
        print(f"{kept:,} bytes, {len(viewer._static):,} of them the still")
        assert 20_000 < kept < 1_000_000


def all_of(widget):
    """A widget, its layout, and all in it."""
    yield widget
    yield widget.layout
    for child in getattr(widget, "children", ()):
        yield from all_of(child)


def test_array_is_not_computed_to_be_described():
    def explode(block):
        raise AssertionError("computed")

    volume = da.zeros((4, 256, 256), np.uint8, chunks=(4, 64, 64)).map_blocks(explode, dtype="u1")
    html = inkdask.predict(volume, model=mean_of_tile, tile=32, stride=16)._repr_html_()
    assert "nothing is computed yet" in html


def test_names_are_escaped(tmp_path, volume):
    html = write(tmp_path / "<b>bold", volume[:1, :64, :64])._repr_html_()
    assert "<b>bold" not in html


@pytest.mark.parametrize("how", [
    {"tile": (256, 256), "compression": "deflate"},
    {"rowsperstrip": 64, "compression": "deflate"},
])  # fmt: skip
def test_large_segment_on_s3_is_described_at_once(s3, how):
    side, layers = 20_000, 2
    heights = [256] * 79**2 if "tile" in how else [64] * 312 + [32]
    width = 256 if "tile" in how else side
    rng = np.random.default_rng(0)
    noise = np.tile(rng.integers(1, 255, (64, 64), np.uint8), (4, 313))
    encoded = {n: zlib.compress(noise[:n, :width].tobytes()) for n in set(heights)}
    file = io.BytesIO()
    pieces = (encoded[height] for height in heights)
    tifffile.imwrite(file, pieces, shape=(side, side), dtype=np.uint8, **how)
    for number in range(layers):
        storage.write_bytes(f"{s3}/segment/layers/{number:02d}.tif", file.getvalue())
    segment = inkdask.open_segment(f"{s3}/segment")
    stored = segment.stored_bytes
    assert stored > 4e6

    html_module._thumbnails = Kept(32 << 20)
    before, began = storage.counters(), time.process_time()
    html = segment._repr_html_()
    seconds, read = time.process_time() - began, storage.counters() - before
    print(f"{seconds:.2f} s, {read.bytes_read / stored:.3%} of {stored:,} bytes, {read.requests}")
    assert read.bytes_read < 0.01 * stored
    assert read.requests < 250
    assert seconds < 2  # of this process, because the machine may be busy with something else
    assert "20,000 x 20,000" in html
    assert len(thumbnails(html)) == 1

    ink = inkdask.predict(segment, model=mean_of_tile, tile=64, stride=32)
    before = storage.counters()
    assert len(thumbnails(ink._repr_html_())) == 1
    assert (storage.counters() - before).bytes_read < 0.01 * stored


def test_package_does_not_load_widgets_or_browser():
    code = (
        "import sys, inkdask.workflow;"
        "print([m for m in ('ipywidgets', 'anywidget', 'IPython') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
