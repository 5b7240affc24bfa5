"""Layers in int8 against whole-number arithmetic, and the network against itself in float32."""

import copy
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from inkdask import predictor
from inkdask.errors import InkdaskError
from inkdask.models import hardware, int8, registry, weights
from inkdask.models.int8 import ZERO, Int8Linear, convert, quantise_
from inkdask.models.timesformer import TimeSformer
from inkdask.predictor import Predictor
from inkdask.specs import ModelSpec, Network
from tests.files import own_messages
from tests.marks import needs_vnni

LAYERS, TILE = 5, 16


@pytest.fixture
def network():
    """A small network whose logits are spread over some units."""
    torch.manual_seed(0)
    module = TimeSformer(LAYERS, TILE, patch=8, dim=64, depth=3, heads=2, head_dim=32)
    module.eval().requires_grad_(False)
    module.to_out[1].weight.mul_(4)
    return module


@pytest.fixture
def tiles():
    return torch.rand(5, 1, LAYERS, TILE, TILE, generator=torch.Generator().manual_seed(1))


@given(seed=st.integers(0, 99), magnitude=st.floats(1e-20, 1e20))
def test_quantised_tokens_are_within_half_a_step(seed, magnitude):
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(7, 12, generator=generator) * magnitude
    values, scale = quantise_(tokens.clone())
    assert values.dtype is torch.uint8
    assert scale == pytest.approx(tokens.abs().max().item() / 127)
    back = (values.double() - ZERO) * scale
    assert (back - tokens.double()).abs().max() <= (0.5 + 1e-3) * scale


def test_quantised_zeros_are_zeros():
    values, _ = quantise_(torch.zeros(3, 4))
    assert (values == ZERO).all()


@needs_vnni
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_int8_layer_equals_the_product_of_whole_numbers(activation):
    torch.manual_seed(0)
    weight, bias = torch.randn(48, 64), torch.randn(48)
    weight[5] = 0
    values, scale = quantise_(torch.randn(33, 64))
    got = Int8Linear(weight, bias, torch.float32, activation)(values, scale)

    steps = weight.double().abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
    rows = (weight.double() / steps).round()
    exact = (values.double() - ZERO) @ rows.T * steps.T * scale + bias
    expected = nn.functional.gelu(exact) if activation == "gelu" else exact
    assert (got - expected).abs().max() < 1e-4


@needs_vnni
def test_int8_layer_adds_its_result():
    torch.manual_seed(0)
    layer = Int8Linear(torch.randn(48, 64), torch.randn(48), torch.float32)
    values, scale = quantise_(torch.randn(33, 64))
    tokens = torch.randn(2, 34, 48)
    expected = tokens.clone()
    expected[1, 1:] += layer(values, scale)
    layer.add_to_(tokens[1, 1:], values, scale)
    torch.testing.assert_close(tokens, expected)


@needs_vnni
@torch.inference_mode()
def test_class_token_is_more_exact_than_patches(network, monkeypatch):
    """So small a share would round to nothing at the scale of the patches."""
    torch.manual_seed(0)
    time, _, feed_forward = network.layers[0]
    start = torch.randn(2, 1 + LAYERS * 4, 64)
    values = torch.randn(*start.shape[:2], 64)
    values[:, 0] *= 1e-3
    monkeypatch.setattr(int8, "mix", lambda *_: values.clone())
    got = int8.Int8Attention(time, torch.float32)(start.clone(), None, None) - start
    lost = (got - time.fn.to_out(values)).abs()
    assert lost[:, 0].max() < 1e-6
    assert lost[:, 1:].max() > 1e-3

    hidden = torch.rand(1 + LAYERS * 4, 256)
    hidden[0] *= 1e-2
    monkeypatch.setattr(Int8Linear, "forward", lambda *_: hidden.clone())
    start = torch.zeros(1, *start.shape[1:])
    (got,) = int8.Int8FeedForward(feed_forward, torch.float32)(start)
    expected = feed_forward.fn.net[3](hidden.square())
    lost = (got - expected).abs()
    assert lost[0].max() < 1e-5
    assert lost[1:].max() > 1e-4


@needs_vnni
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_network_is_close_to_the_plain_one(network, tiles, dtype):
    expected = network(tiles).sigmoid()
    assert expected.std() > 0.1
    convert(network, dtype)
    got = network(tiles).sigmoid()
    assert 1e-4 < (got - expected).abs().max() < 0.02


@needs_vnni
@torch.inference_mode()
@pytest.mark.parametrize("tile", [8, 24])
def test_int8_network_takes_tiles_of_another_size(network, tile):
    other = TimeSformer(LAYERS, tile, patch=8, dim=64, depth=3, heads=2, head_dim=32, k=2).eval()
    other.load_state_dict(network.state_dict(), strict=True)
    tiles = torch.rand(3, 1, LAYERS, tile, tile)
    expected = other(tiles).sigmoid()
    convert(other, torch.bfloat16)
    got = other(tiles).sigmoid()
    assert got.shape == (3, 1, 2, 2)
    assert (got - expected).abs().max() < 0.02


@needs_vnni
@torch.inference_mode()
def test_int8_tile_does_not_depend_on_its_batch(network, tiles):
    convert(network, torch.bfloat16)
    x = tiles.clone()
    expected = network(x)
    near = partial(torch.testing.assert_close, atol=1e-5, rtol=0)
    near(network(x[3:4]), expected[3:4])
    x[1] *= 100
    x[2, 0, 0, 0, 0] = torch.nan
    got = network(x)
    near(got[3:], expected[3:])
    assert (got[1] - expected[1]).abs().max() > 0.1
    assert got[2].isnan().all()
    assert not got[:2].isnan().any()


def spec(precision="int8", **values):
    model = ModelSpec("small", "small", "none", LAYERS, TILE, pixels_per_logit=8)
    return Network(model, LAYERS, TILE, 2, 255.0, 255.0, "0", precision=precision, **values)


def run(ours):
    block = np.random.default_rng(0).integers(1, 255, (LAYERS, 40, 40), dtype=np.uint8)
    return ours.predict(block, np.array([(0, 0), (8, 24), (24, 24)]))


@pytest.fixture
def no_amx(monkeypatch):
    """Run int8 on a CPU that would do better in bfloat16."""
    monkeypatch.setattr(hardware, "has_amx", lambda: False)


@needs_vnni
@pytest.mark.usefixtures("no_amx")
def test_predictor_in_int8_says_so(network, monkeypatch):
    monkeypatch.setattr(weights, "load", lambda _: copy.deepcopy(network))
    ours = Predictor(spec())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(ours)
    assert ours.precision == "int8"


@needs_vnni
@pytest.mark.usefixtures("no_amx")
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_predictor_lets_go_of_mapped_weights(network, monkeypatch, precision):
    """A mapped file stays in memory as long as one of its weights is used."""
    mapped = list(network.state_dict().values())  # kept, or the next tensor may get their address
    monkeypatch.setattr(weights, "load", lambda _: network)
    ours = Predictor(spec(precision))
    run(ours)
    held = [
        value
        for module in ours._form.forward.modules()
        for value in (*module.parameters(), *module.buffers(), *vars(module).values())
        if isinstance(value, torch.Tensor) and value.layout is torch.strided
    ]
    dense = [t for t in held if not t.is_mkldnn and t.numel()]
    assert len(dense) > 20
    assert addresses(mapped).isdisjoint(addresses(dense))


def addresses(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@needs_vnni
@pytest.mark.usefixtures("no_amx")
def test_network_that_int8_distorts_runs_in_float32(network, monkeypatch):
    """One weight of a row is so large that the others become 0."""
    with torch.no_grad():
        network.layers[0][0].fn.to_qkv.weight[:, 0] = 1e4
        network.layers[0][0].norm.weight[0] = 0
        network.layers[0][0].norm.bias[0] = 0
    monkeypatch.setattr(weights, "load", lambda _: copy.deepcopy(network))
    ours = Predictor(spec())
    with pytest.warns(RuntimeWarning, match=r"fast path of 'small' \(quantised, int8 on cpu\)"):
        got = run(ours)
    assert ours.precision == "float32"
    plain = Predictor(spec("float32"))
    np.testing.assert_allclose(got, run(plain), atol=1e-5)


def test_callable_runs_in_its_own_precision():
    ours = Predictor(spec(function=lambda x: x[..., :1, ::8, ::8].mean(2)))
    assert ours.precision == ""


def test_int8_is_refused_where_the_hardware_lacks_it(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    with pytest.raises(InkdaskError, match="needs a CPU with VNNI"):
        Predictor(spec())
    monkeypatch.setattr(predictor, "device_for", lambda _: torch.device("cuda"))
    with pytest.raises(InkdaskError, match="this process has a GPU"):
        Predictor(spec())


def test_int8_runs_in_bfloat16_with_one_warning_where_amx_is_faster(network, monkeypatch, caplog):
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(weights, "load", lambda _: copy.deepcopy(network))
    ours = Predictor(spec(compile=False))
    got = [run(ours) for _ in range(2)]
    assert (ours.precision, ours._form.dtype) == ("bfloat16", torch.bfloat16)
    (sentence,) = own_messages(caplog)
    assert sentence.startswith("Precision int8 is slower than bfloat16 on this CPU, which has AMX")
    plain = run(Predictor(spec(compile=False, precision="bfloat16")))
    np.testing.assert_array_equal(got, [plain, plain])


def test_int8_is_refused_for_other_networks_before_weights_are_fetched(monkeypatch):
    monkeypatch.setattr(registry.hub, "settle", lambda _: pytest.fail("fetched"))
    with pytest.raises(InkdaskError, match="Precision int8 is for timesformer, and model demo"):
        registry.resolve("demo", precision="int8")
