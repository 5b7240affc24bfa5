"""The synthetic segment: reproducible, in the form of a scanned one, with hidden ink."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from inkdask.demo import auc, letters, synthetic
from inkdask.errors import InkdaskError

SMALL = {"height": 160, "width": 352}
TEXT = ("ΝΗΔΥΜΟΣ", "ΥΠΝΟΣ")


@pytest.fixture(scope="module")
def made():
    return synthetic.segment(height=400, width=1040)


def test_segment_is_the_same_for_the_same_seed():
    volume, truth = synthetic.segment(TEXT, **SMALL, layers=5, seed=1)
    again, truth_again = synthetic.segment(TEXT, **SMALL, layers=5, seed=1)
    other, _ = synthetic.segment(TEXT, **SMALL, layers=5, seed=2)
    np.testing.assert_array_equal(volume, again)
    np.testing.assert_array_equal(truth, truth_again)
    assert (volume != other).mean() > 0.5


def test_segment_is_zero_outside_the_papyrus_alone(made):
    volume, truth = made
    assert volume.shape == (26, *truth.shape)
    assert truth.shape == (400, 1040)
    assert (volume.dtype, truth.dtype) == (np.uint16, np.bool_)
    papyrus = volume[0] > 0
    # After the shift to uint8 too, each layer is zero outside the papyrus and nowhere inside.
    assert (((volume >> 8) > 0) == papyrus).all()
    assert 0.6 < papyrus.mean() < 0.95
    assert not (truth & ~papyrus).any()
    assert 0.08 < truth.mean() < 0.25
    # Some tiles have no data.
    height, width = truth.shape
    corners = [
        papyrus[y : y + 64, x : x + 64].any() for y in (0, height - 64) for x in (0, width - 64)
    ]
    assert not all(corners)


def test_layers_and_their_mean_hide_the_ink(made):
    volume, truth = made
    papyrus = volume[0] > 0
    seen = [auc(layer[papyrus], truth[papyrus]) for layer in volume >> 8]
    assert 0.4 < min(seen) <= max(seen) < 0.6
    assert 0.4 < auc((volume >> 8).sum(axis=0)[papyrus], truth[papyrus]) < 0.6


@pytest.mark.parametrize("character", letters.ALPHABET)
def test_letters_lie_within_their_boxes(character):
    rng = np.random.default_rng(0)
    page = letters.write([character], (160, 160), (40, 40), 80, rng)
    assert page.dtype == np.float32
    assert 0 <= page.min() <= page.max() == 1
    y, x = np.nonzero(page)
    assert 10 < y.min() < 60
    assert 110 < y.max() < 150
    assert 25 < x.min() < 60
    assert x.max() < 50 + 80 * (letters.GLYPHS[character][0] + 0.1)


def test_letter_height_fills_the_page():
    letter = letters.letter_height(TEXT, 100, 10_000)
    assert letter * (letters.LINE_PITCH + 1) == pytest.approx(100)
    assert letters.letter_height(TEXT, 10_000, 100) < letter


def test_segment_refuses_unknown_letter():
    with pytest.raises(InkdaskError, match="cannot write 'Q'"):
        synthetic.segment(("ΑΒQ",), **SMALL)


def test_write_segment_stores_volume_and_truth(tmp_path):
    volume, truth = synthetic.write_segment(tmp_path, text=TEXT, **SMALL, layers=7, seed=4)
    files = sorted((tmp_path / "layers").iterdir())
    assert [file.name for file in files] == [f"{z:02d}.tif" for z in range(7)]
    np.testing.assert_array_equal(np.stack([tifffile.imread(file) for file in files]), volume)
    with tifffile.TiffFile(files[0]) as tif:
        assert len(tif.pages[0].dataoffsets) > 1  # many strips
    picture = np.asarray(Image.open(tmp_path / "truth.png"))
    np.testing.assert_array_equal(picture, truth * np.uint8(255))


def test_write_segment_replaces_an_earlier_one(tmp_path):
    synthetic.write_segment(tmp_path, text=TEXT, **SMALL, layers=7)
    synthetic.write_segment(tmp_path, text=TEXT, **SMALL, layers=5)
    assert len(list((tmp_path / "layers").iterdir())) == 5


@pytest.mark.parametrize(
    "name", ["layers/00.tif", "layers/99.tif", "truth.png", "side-by-side.png", "predictions/x.png"]
)
def test_write_segment_refuses_files_that_it_did_not_make(tmp_path, name):
    mine = tmp_path / name
    if name == "layers/99.tif":  # beside those of an earlier demo
        synthetic.write_segment(tmp_path, text=TEXT, **SMALL, layers=2)
    mine.parent.mkdir(exist_ok=True)
    mine.write_bytes(b"years of work")
    before = sorted(path for path in tmp_path.rglob("*") if path.is_file())
    with pytest.raises(InkdaskError, match=r"is not of an earlier demo: choose another folder\.$"):
        synthetic.write_segment(tmp_path, text=TEXT, **SMALL)
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == before
    assert mine.read_bytes() == b"years of work"
