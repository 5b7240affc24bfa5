"""Packed layers against plain ones."""

import copy

import numpy as np
import pytest
import torch

from inkdask.models import weights
from inkdask.models.fast import prepare
from inkdask.models.packed import PackedLinear, pack_if_it_can
from inkdask.models.timesformer import TimeSformer
from inkdask.predictor import Predictor
from inkdask.specs import ModelSpec, Network
from tests.marks import needs_packing

LAYERS, TILE = 5, 16


@pytest.fixture
def network():
    torch.manual_seed(0)
    module = TimeSformer(LAYERS, TILE, patch=8, dim=64, depth=3, heads=2, head_dim=32)
    return module.eval().requires_grad_(False)


@needs_packing
@torch.inference_mode()
@pytest.mark.parametrize("activation", ["none", "gelu"])
@pytest.mark.parametrize("bias", [None, torch.linspace(-1, 1, 48)])
def test_packed_layer_equals_the_plain_one(activation, bias):
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64) / 8, torch.randn(2, 7, 64)
    bias = None if bias is None else bias.bfloat16()
    got = PackedLinear(weight.bfloat16(), bias, activation)(x)
    exact = x.bfloat16().double() @ weight.bfloat16().double().T
    exact = exact if bias is None else exact + bias.double()
    expected = torch.nn.functional.gelu(exact) if activation == "gelu" else exact
    assert got.dtype is torch.bfloat16
    torch.testing.assert_close(got.double(), expected, rtol=0.01, atol=0.002)


@needs_packing
@torch.inference_mode()
def test_packed_network_is_close_to_the_plain_one(network):
    tiles = torch.rand(3, 1, LAYERS, TILE, TILE).bfloat16()
    prepare(network, torch.bfloat16)
    expected = network(tiles)
    assert pack_if_it_can(network)
    assert not torch.equal(network(tiles), expected)  # packed kernels round elsewhere
    torch.testing.assert_close(network(tiles), expected, rtol=0, atol=0.02)


@needs_packing
@torch.inference_mode()
@pytest.mark.parametrize("tile", [8, 24])
def test_packed_network_takes_tiles_of_another_size(network, tile):
    other = TimeSformer(LAYERS, tile, patch=8, dim=64, depth=3, heads=2, head_dim=32, k=2).eval()
    other.load_state_dict(network.state_dict(), strict=True)
    tiles = torch.rand(3, 1, LAYERS, tile, tile).bfloat16()
    prepare(other, torch.bfloat16)
    expected = other(tiles)
    assert expected.shape == (3, 1, 2, 2)
    assert pack_if_it_can(other)
    torch.testing.assert_close(other(tiles), expected, rtol=0, atol=0.02)


@needs_packing
def test_predictor_runs_packed_layers(network, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda _: copy.deepcopy(network))
    model = ModelSpec("small", "small", "none", LAYERS, TILE, pixels_per_logit=8)
    options = {"precision": "bfloat16", "batch_size": 2}
    ours = Predictor(Network(model, LAYERS, TILE, 2, 255.0, 255.0, "0", **options))
    block = np.random.default_rng(0).integers(1, 255, (LAYERS, 40, 40), dtype=np.uint8)
    ours.predict(block, np.array([(0, 0), (8, 24)]))
    assert any(isinstance(child, PackedLinear) for child in ours._form.forward.modules())


def test_other_network_or_dtype_is_not_packed():
    for module in torch.nn.Linear(3, 3).bfloat16(), TimeSformer(LAYERS, TILE, patch=8, depth=1):
        before = copy.deepcopy(module).state_dict()
        assert not pack_if_it_can(module)
        assert module.state_dict().keys() == before.keys()
