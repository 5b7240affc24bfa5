"""Test pages of evidence: controls, their numbers, and what the page says."""

import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inkdask
from inkdask import cli, storage
from inkdask.controls import evidencing
from inkdask.controls.page import EXPLAINED
from inkdask.controls.scores import reproduced
from inkdask.demo import synthetic
from inkdask.errors import InkdaskError, SettingsError
from inkdask.pictures.picture import open_picture
from tests.files import grids, write_layers
from tests.jobs import network
from tests.oracle import papyrus

pytestmark = pytest.mark.usefixtures("own_tiles")

LAYERS, HEIGHT, WIDTH = 12, 230, 300


def paints(x):
    """Logits of the same strokes, whatever the layers are: (b, 1, 4, 4)."""
    stroke = torch.tensor([[-9.0, 9, -9, -9], [-9, 9, 9, -9], [-9, 9, -9, -9], [-9, -9, -9, 9]])
    return stroke.expand(len(x), 1, 4, 4) + 0 * x.mean()


@pytest.fixture
def segment(tmp_path):
    volume = papyrus((LAYERS, HEIGHT, WIDTH), holes=False)
    write_layers(tmp_path / "segment/layers", volume, tile=(64, 64))
    return str(tmp_path / "segment")


@pytest.fixture
def pages(monkeypatch):
    """The pages that are written, as they were told."""
    pages, write = [], evidencing.write_page

    def noted(page, stem):
        pages.append(page)
        write(page, stem)

    monkeypatch.setattr(evidencing, "write_page", noted)
    return pages


def predicted(segment, model=network, **options):
    options = {"layers": (4, 8), "stride": 32, **options}
    return inkdask.run(segment, model=model, **options).removesuffix(".png") + ".zarr"


def test_controls_of_the_demo_reproduce_little(tmp_path, capsys, pages):
    options = {"text": ("ΑΦΟΒ",), "height": 192, "width": 448, "layers": 78}
    synthetic.write_segment(tmp_path / "demo", **options)
    prediction = predicted(tmp_path / "demo", "demo", layers=(26, 52), pixel_resolution_um=7.91)
    capsys.readouterr()
    cli.main(["evidence", prediction, "--second-stride", "64"])
    png, html = capsys.readouterr().out.split()
    (page,) = pages
    titles = [it.title for it in page.controls]
    assert titles == ["Layers reversed", "Window off the sheet", "Layers shuffled", "Stride 64"]
    assert all(it.reproduced <= 0.20 for it in page.controls[:3])
    assert page.controls[3].reproduced > 0.9  # the same strokes, from other tiles
    assert page.agreement > 10
    with Image.open(png) as image:
        assert image.size == (1984, 2806)  # A4
        told = json.loads(image.text["inkdask-evidence"])
    assert told["command"] == page.command
    assert told["digest"] == page.digest
    said = Path(html).read_text()
    assert "0.51 mm wide (64 pixels of 7.91 micrometers)" in said
    assert "A letter is about 3 mm high" in said
    assert page.verdict in said
    assert said.count("data:image/png;base64,") == len(page.panels) == 8
    assert not re.search(r"(src|href)=\"(?!data:)", said)
    assert page.facts["layers"] == "26 (26:52)"
    assert "sha256" in page.facts["model"]


def test_network_that_paints_letters_anywhere_is_shown_as_such(segment, pages):
    prediction = predicted(segment, paints)
    _, html = inkdask.evidence(prediction, model=paints)
    (page,) = pages
    assert [round(it.reproduced, 2) for it in page.controls] == [1, 1, 1]
    assert page.verdict == "The controls reproduce at most 100 % of the prediction's contrast."
    said = Path(html).read_text()
    assert page.verdict.replace("'", "'") in said
    assert said.count("reproduces 100 % of the contrast") == 3


def test_page_never_says_real_or_fake_and_explains_itself_in_two_sentences(segment, pages):
    png, html = inkdask.evidence(predicted(segment), model=network)
    words = re.sub(r"data:[^\"]+", "", Path(html).read_text()).lower()
    assert not re.search(r"\b(real|fake|genuine|false|true)\b", words)
    assert EXPLAINED.count(". ") + EXPLAINED.endswith(".") == 2
    assert EXPLAINED in Path(html).read_text()
    assert png.endswith("prediction_network_04_08_evidence.png")


def test_controls_are_the_layers_that_they_say(segment, monkeypatch):
    jobs = []
    fill = evidencing.fill_together
    monkeypatch.setattr(evidencing, "fill_together", lambda some: (jobs.extend(some), fill(some)))
    inkdask.evidence(predicted(segment), model=network)
    backwards, moved, shuffled = (job.recipe for job in jobs)
    assert backwards.layers == (7, 6, 5, 4)
    assert moved.layers == (8, 9, 10, 11)
    assert sorted(shuffled.layers) == [4, 5, 6, 7]
    assert abs(np.corrcoef(shuffled.layers, range(4))[0, 1]) < 0.5
    volume = papyrus((LAYERS, HEIGHT, WIDTH), holes=False)
    for job in jobs:
        picture = evidencing.Reading.of(job).grey
        array = np.ascontiguousarray(volume[list(job.recipe.layers)])
        exact = inkdask.predict(array, model=network, stride=32).map.compute()
        np.testing.assert_allclose(picture / 255, exact, atol=1 / 255 + 1e-3)


@pytest.mark.slow
def test_page_costs_the_controls_once_and_the_prediction_never(segment):
    prediction = predicted(segment)
    before = storage.counters().tiles
    inkdask.evidence(prediction, model=network)
    ran = storage.counters().tiles - before
    tiles = inkdask.predict(segment, model=network, layers=(4, 8), stride=32).tiling.tiles
    assert ran == 3 * tiles
    inkdask.evidence(prediction, model=network)
    assert storage.counters().tiles - before == ran


def test_page_of_a_part_whose_grid_is_gone(segment, tmp_path, pages):
    prediction = predicted(segment)
    for grid in grids(str(tmp_path / "partitions")):
        storage.filesystem(grid)[0].rm(grid, recursive=True)
    png, _ = inkdask.evidence(prediction, model=network, roi_xyxy=(64, 32, 4000, 132))
    right = open_picture(prediction).shape[1]  # where the region is cut
    assert png.endswith(f"_evidence_64-32-{right}-132.png")
    assert pages[0].ink.shape == (100, right - 64)
    stored = np.asarray(open_picture(prediction).levels[0])
    np.testing.assert_array_equal(pages[0].ink, stored[32:132, 64:])


def test_segment_without_layers_beyond_the_window_says_so(tmp_path, pages):
    write_layers(tmp_path / "thin/layers", papyrus((4, 150, 150), holes=False))
    prediction = predicted(str(tmp_path / "thin"), layers=(0, 4))
    _, html = inkdask.evidence(prediction, model=network)
    assert pages[0].controls[1].grey is None
    said = Path(html).read_text()
    assert "not possible" in said
    assert "the segment has no layers beyond those of the window" in said


def test_second_model_is_shown_beside(segment, pages):
    inkdask.evidence(predicted(segment), model=network, second_model=paints, batch_size=8)
    assert pages[0].controls[-1].title == "Second model"
    assert abs(pages[0].controls[-1].reproduced) < 0.5


@pytest.mark.slow
def test_prediction_keeps_the_digests_of_its_pages(segment, pages, capsys):
    prediction = predicted(segment)
    assert open_picture(prediction).provenance.evidence == ()
    inkdask.evidence(prediction, model=network)
    inkdask.evidence(prediction, model=network)
    assert open_picture(prediction).provenance.evidence == (pages[0].digest,)
    assert pages[0].digest == pages[1].digest


def test_evidence_refuses_what_it_cannot_compare(segment, tmp_path):
    prediction = predicted(segment, spread=True)
    with pytest.raises(InkdaskError, match="was made by a Python function"):
        inkdask.evidence(prediction)
    for stride in (0, -16, 5000):
        sentence = rf"^SECOND_STRIDE: input should be [^\n]*, but is {stride}\.$"
        with pytest.raises(SettingsError, match=sentence):
            inkdask.evidence(prediction, model=network, second_stride=stride)
    with pytest.raises(InkdaskError, match="has other weights now"):
        inkdask.evidence(prediction, model=paints)
    spread = prediction.replace(".zarr", "_spread.zarr")
    with pytest.raises(InkdaskError, match="does not say what segment"):
        inkdask.evidence(spread, model=network)
    Path(segment, "layers/05.tif").touch()
    with pytest.raises(InkdaskError, match="the layers had another size, time"):
        inkdask.evidence(prediction, model=network)


def test_reproduced_contrast():
    rng = np.random.default_rng(0)
    ink = rng.integers(0, 256, (60, 60)).astype(np.uint8)
    everywhere = np.ones(ink.shape, bool)
    assert reproduced(ink, ink, everywhere) == 1
    assert reproduced(ink, 255 - ink, everywhere) == pytest.approx(-1)
    assert reproduced(ink, ink // 2, everywhere) == pytest.approx(0.5, abs=0.01)
    assert abs(reproduced(ink, rng.permutation(ink.ravel()).reshape(60, 60), everywhere)) < 0.06
    assert reproduced(ink * 0, ink, everywhere) == 0


def test_picture_says_depth_direction_and_size_of_its_window(segment, capsys):
    prediction = predicted(segment, force_reverse=True, layers=(6, 10), pixel_resolution_um=7.91)
    told = open_picture(prediction).provenance
    assert told.recipe.direction == "reverse"
    assert told.origin.offset == 2.0  # layers 6 to 9 of 0 to 11
    assert told.window_um == pytest.approx(64 * 7.91)
    inkdask.evidence(prediction, model=network)
    (digest,) = open_picture(prediction).provenance.evidence
    capsys.readouterr()
    cli.main(["info", prediction])
    said = capsys.readouterr().out
    assert "4 (6:10 in reverse), +2 from the middle" in said
    assert "64 px at stride 32 (506.2 um)" in said
    assert digest in said


def test_pages_of_two_segments_in_one_folder_are_both_kept(segment, tmp_path, pages):
    other = str(tmp_path / "other")
    write_layers(f"{other}/layers", papyrus((LAYERS, HEIGHT, WIDTH), seed=1, holes=False))
    options = {"model": network, "output_path": tmp_path / "out", "second_model": " "}
    names = [f"prediction_{name}_network_04_08_evidence" for name in ("segment", "other")]
    left = tmp_path / "out" / f".{names[0]}.png.01234567.part"  # of a process long dead
    left.parent.mkdir()
    left.touch()
    os.utime(left, (1, 1))
    first, second = (inkdask.evidence(predicted(it), **options) for it in (segment, other))
    assert not left.exists()
    assert [Path(uri).name for uri in first] == [f"{names[0]}.png", f"{names[0]}.html"]
    assert [Path(uri).name for uri in second] == [f"{names[1]}.png", f"{names[1]}.html"]
    assert segment in Path(first[1]).read_text()
    # A picture that has the segment's name has it once.
    shared = predicted(segment, output_path=tmp_path / "pictures")
    again = inkdask.evidence(shared, **options)
    assert again == first
    assert {len(page.controls) for page in pages} == {3}  # a blank second model is none
    assert not any("--second-model" in page.command for page in pages)


def test_page_of_a_path_that_is_not_utf_8_is_written(tmp_path):
    folder = tmp_path / os.fsdecode(b"seg\xff <b>")
    write_layers(folder / "layers", papyrus((4, 150, 150), holes=False))
    prediction = predicted(str(folder), layers=(0, 4))
    png, html = inkdask.evidence(prediction, model=network)
    with Image.open(png) as image:
        assert json.loads(image.text["inkdask-evidence"])["segment"] == str(folder)
    said = Path(html).read_text(encoding="utf-8")
    assert f"<dd>{tmp_path}/seg\\udcff &lt;b&gt;</dd>" in said
    assert Path(inkdask.sweep(str(folder), network, offsets=[0], strides=[64]).table).exists()
