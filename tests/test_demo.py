"""The demo: its network, its AUC, its picture, and the whole job."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from inkdask import cli
from inkdask.demo import job as demo
from inkdask.errors import InkdaskError
from inkdask.models import hub, registry, weights
from inkdask.models.depth_cnn import DepthCNN

pytestmark = pytest.mark.xdist_group("demo")  # whose fixture takes long


def test_auc_is_the_share_of_pairs_in_order():
    rng = np.random.default_rng(0)
    truth = rng.random(200) < 0.3
    score = rng.integers(0, 12, 200) + 3 * truth  # with many ties
    ink, bare = score[truth][:, None], score[~truth][None]
    pairs = (ink > bare).mean() + (ink == bare).mean() / 2
    assert demo.auc(score, truth) == pytest.approx(pairs)
    assert demo.auc(truth.astype(int), truth) == 1
    assert demo.auc(np.zeros(200, int), truth) == 0.5


def test_bundled_weights_are_small_and_carry_their_origin():
    path = hub.fetch(registry.KNOWN["demo"])
    assert path.stat().st_size <= 2_000_000
    with safe_open(path, "np") as file:
        metadata = file.metadata()
    assert metadata["licence"] == "MIT"
    assert metadata["trained_by"].startswith("python examples/train_demo.py")


def test_bundled_weights_fit_their_network():
    network = registry.resolve("demo")
    module = weights.load(network)
    assert isinstance(module, DepthCNN)
    assert not module.training
    with torch.inference_mode():
        logits = module(torch.rand(2, 1, network.layers, network.tile, network.tile))
    assert logits.shape == (2, 1, network.k, network.k)


def test_network_gives_a_tile_alone_what_it_gives_in_a_batch():
    module = weights.load(registry.resolve("demo"))
    tiles = torch.rand(2, 1, 26, 64, 64)
    with torch.inference_mode():
        together, alone = module(tiles), module(tiles[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-4, atol=1e-5)


def test_side_by_side_draws_panels_at_one_scale():
    white = np.full((300, 750), 255, np.uint8)
    panels = [("a", 0.5, white), ("b", None, white), ("c", 0.75, white), ("d", None, white)]
    page = demo.side_by_side(panels)
    assert page.width == 1600
    red = np.asarray(page.convert("RGB"))[..., 0]
    bright = (red == red.max()).mean(axis=1) > 0.9
    turns = np.diff(bright.astype(int), prepend=0, append=0)
    starts, ends = np.flatnonzero(turns == 1), np.flatnonzero(turns == -1)
    assert len(starts) == 2
    assert ends[0] - starts[0] == ends[1] - starts[1] == round(740 * 300 / 750)


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    # The demo ignores the settings of the environment, which are for other jobs.
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {
            "TILE_SIZE": "32",
            "STRIDE": "32",
            "FORCE_REVERSE": "true",
            "MODEL": "none",
            "START_LAYER": "3",
            "END_LAYER": "7",
            "OUTPUT_PATH": str(out / "elsewhere"),
            "RESULT_FILE": str(out / "result.txt"),
        }.items():
            patch.setenv(name, value)
        demo.run(out, 128, 256)
        return demo.run(out, 320, 832)


def test_prediction_shows_letters_that_layers_hide(result):
    assert result.auc >= 0.965
    assert result.auc_layer < 0.6
    assert result.auc_mean < 0.6
    assert f"{result.auc:.3f}" in str(result)


def test_second_demo_replaces_the_first(result):
    out = result.truth.parent
    assert result.prediction == out / "predictions" / "prediction_demo_00_26.png"
    prediction, truth = (np.asarray(Image.open(p)) for p in (result.prediction, result.truth))
    assert prediction.shape == truth.shape == (320, 832)
    assert prediction.dtype == np.uint8
    # The AUC is that of the picture on disk.
    papyrus = np.asarray(Image.open(out / "layers" / "00.tif")) > 0
    assert demo.auc(prediction[papyrus], truth[papyrus] > 0) == pytest.approx(result.auc)
    assert Image.open(result.side_by_side).width == 1600
    assert len(list((out / "layers").iterdir())) == 26
    assert not (out / "elsewhere").exists()


def test_demo_reports_unwritable_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(
        InkdaskError, match=r"^The demo cannot write to .*file/demo: Not a directory\.$"
    ):
        demo.run(tmp_path / "file" / "demo", 128, 256)


@pytest.mark.parametrize(
    ("words", "folder"),
    [
        ([], "inkdask-demo"),
        (["--out", ""], "inkdask-demo"),
        (["--out", " "], "inkdask-demo"),
        (["--out", "a b"], "a b"),
    ],
)
def test_demo_without_a_folder_writes_to_its_own(monkeypatch, words, folder):
    places = []
    monkeypatch.setattr("inkdask.demo.run", places.append)
    cli.main(["demo", *words])
    assert places == [Path(folder)]


def test_demo_refuses_a_uri(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        cli.main(["demo", "--out", "s3://bucket/demo"])
    said = "inkdask: The demo cannot write to s3://bucket/demo: --out is a local path, not a URI.\n"
    assert capsys.readouterr().err == said
    assert not list(tmp_path.iterdir())
