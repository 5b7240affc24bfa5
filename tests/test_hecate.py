"""Hecate against outputs of the upstream network, from a checkpoint as it is published."""

import numpy as np
import pytest
import torch

from inkdask.errors import InkdaskError
from inkdask.models import weights
from inkdask.models.networks import BUILDERS
from inkdask.models.registry import resolve
from tests.upstream import golden, hecate_file, of_hecate, state_of, volume


@pytest.fixture(scope="module")
def tensors():
    """Weights of 9.6 um; those of 2.4 um differ in the first convolution."""
    with torch.device("meta"):
        module = BUILDERS["ink_hecate_9_6um"]()
    return state_of(module, of_hecate)


def logits_of(kind, content, x, path):
    """Return logits (y, x) of a tile, and the network's module, from the content of a file."""
    checkpoint = weights.Checkpoint(path, content["ema_model"])
    module = weights.fit(BUILDERS[kind](layers=len(x), tile=x.shape[-1]), checkpoint, kind)
    x = torch.from_numpy(x / np.float32(content["config"]["image_normalization"]["divisor"]))
    with torch.inference_mode():
        return module(x[None, None])[0, 0]


@pytest.mark.slow
def test_logits_at_9_6_um_are_those_of_upstream(tensors, tmp_path):
    tile = volume("hecate_9.6um-64", (16, 64, 64))
    logits = logits_of("ink_hecate_9_6um", hecate_file(tensors, False), tile, tmp_path)
    expected = torch.from_numpy(golden("hecate_9.6um-64")["logits"])
    assert logits.shape == (64, 64)
    assert (logits[::4, ::4] - expected).abs().max() < 1e-4
    assert expected.std() > 0.05  # a picture, not a grey sheet


@pytest.mark.slow
def test_logits_at_2_4_um_leave_out_columns_without_data(tensors, tmp_path):
    with torch.device("meta"):
        fine = BUILDERS["ink_hecate_2_4um"]()
    conv = state_of(fine.conv1, lambda name: f"canonical.backbone.conv1.{name}")
    content = hecate_file(tensors | conv, True)
    tile = volume("hecate_2.4um-masked", (64, 128, 96), (0, 50, 0, 61))
    logits = logits_of("ink_hecate_2_4um", content, tile, tmp_path)
    expected = torch.from_numpy(golden("hecate_2.4um-masked")["logits"])
    assert (logits - expected).abs().max() < 1e-4
    assert (logits[:12, :15] == 0).all()
    assert (logits[13:] != 0).all()


@pytest.fixture
def checkpoint(tmp_path):
    """A file that says what the checkpoint of 2.4 um says, with few of its weights."""
    path = tmp_path / "mine.pth"
    few = {"canonical.depth_coordinate_scale": torch.zeros(())}
    torch.save(hecate_file(few, True), path)
    return path


def test_checkpoint_says_all_of_the_model(checkpoint):
    network = resolve(str(checkpoint))
    shape = (network.model.architecture, network.layers, network.tile, network.k)
    assert shape == ("ink_hecate_2_4um", 64, 256, 64)
    assert (network.model.stride, network.model.pixel_um) == (128, 2.4)
    assert (network.clip, network.divisor) == (None, 200)


@pytest.mark.parametrize("side", [7, 3])
def test_weights_without_a_config_are_recognised_by_their_shapes(side, tmp_path):
    path = tmp_path / "bare.pth"
    shape = (64, 1, side, side, side)
    torch.save({"depth_coordinate_scale": torch.ones(()), "conv1.weight": torch.ones(shape)}, path)
    expected = {7: "ink_hecate_2_4um", 3: "ink_hecate_9_6um"}[side]
    assert resolve(str(path)).model.architecture == expected


@pytest.mark.parametrize(("values", "fault"), [
    ({"layers": 26}, "says 64 layers"),
    ({"clip": 200}, "CLIP means nothing for model .*, whose voxels are divided by 200: leave CLIP"),
    ({"tile": 144}, "must be a multiple of 32 pixels, not 144"),
])  # fmt: skip
def test_settings_that_do_not_fit_are_refused(checkpoint, values, fault):
    with pytest.raises(InkdaskError, match=fault):
        weights.load(resolve(str(checkpoint), **values))
