"""The hybrid and its normalisation against outputs of upstream."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from inkdask.errors import InkdaskError
from inkdask.models import weights
from inkdask.models.fast import prepare
from inkdask.models.hybrid_3d2d import ink_hybrid_3d2d
from inkdask.models.normalisation import robust_mad
from inkdask.models.registry import resolve
from tests.upstream import golden, hybrid_file, state_of, volume


@pytest.fixture(scope="module")
def tensors():
    with torch.device("meta"):
        module = ink_hybrid_3d2d()
    return state_of(module, str)


@pytest.fixture(scope="module")
def checkpoint(tensors, tmp_path_factory):
    path = tmp_path_factory.mktemp("hybrid") / "step-075000.pth"
    torch.save(hybrid_file(tensors), path)
    return path


def test_checkpoint_says_all_of_the_model(checkpoint):
    network = resolve(str(checkpoint))
    assert network.model.architecture == "ink_hybrid_3d2d"
    assert (network.layers, network.tile, network.model.stride, network.k) == (17, 128, 64, 128)
    assert (network.clip, network.divisor) == (None, None)


def test_logits_are_those_of_upstream(checkpoint):
    expected = golden("hybrid_3d2d-128")
    tile = torch.from_numpy(volume("hybrid_3d2d-128", (17, 128, 128)))[None]
    x = robust_mad(tile)
    assert (x[0, :, ::16, ::16] - torch.from_numpy(expected["normalised"])).abs().max() < 1e-5
    module = weights.load(resolve(str(checkpoint)))
    with torch.inference_mode():
        logits = module(x[:, None])
        assert (logits[0, 0, ::8, ::8] - torch.from_numpy(expected["logits"])).abs().max() < 1e-4
        assert expected["logits"].std() > 0.1


@pytest.mark.parametrize("second", [False, True])
def test_weights_without_a_config_are_recognised(tensors, second, tmp_path):
    """A safetensors file may keep either of the two names of a tensor."""
    path = tmp_path / "copy.safetensors"
    if second:
        doubled = hybrid_file(tensors)["model"]
        kept = {k: v.clone() for k, v in doubled.items() if ".conv." not in k and ".norm." not in k}
        assert any(".all_modules.0." in name for name in kept)
    else:
        kept = {f"module.{name}": value for name, value in tensors.items()}
    save_file(kept, path)
    network = resolve(str(path))
    assert (network.model.architecture, network.divisor) == ("ink_hybrid_3d2d", None)
    loaded = weights.load(network).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("name", ["clip", "divisor"])
def test_clip_and_divisor_mean_nothing(checkpoint, name):
    words = f"{name.upper()} means nothing for model .*step-075000.pth, whose voxels are clipped to"
    with pytest.raises(InkdaskError, match=words):
        resolve(str(checkpoint), **{name: 255})


def test_unknown_normalisation_is_reported(tensors, tmp_path):
    path = tmp_path / "other.pth"
    content = hybrid_file(dict(list(tensors.items())[:3]))
    content["config"]["image_normalization"] = {"mode": "zscore"}
    torch.save(content, path)
    with pytest.raises(InkdaskError, match=r"other.pth wants a normalisation .*: mode zscore\."):
        resolve(str(path))


def by_hand(tile):
    """Robust MAD with numpy, of one tile."""
    x = tile.astype(np.float32)
    low, high = np.percentile(x, (1, 99))
    clipped = np.clip(x, low, high)
    middle = np.median(clipped)
    spread = 1.4826 * np.median(np.abs(clipped - middle))
    if spread < 1e-6:
        spread = next((s for s in (x.std(), (high - low) / 2) if s >= 1e-6), 1)
    return (clipped - middle) / spread


def test_robust_mad_is_of_each_tile_alone():
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (3, 5, 7), dtype=np.uint8)  # an odd number of voxels
    padded = np.where(np.arange(7) < 3, noise, 0)  # zeros are more than half: no deviation
    few = np.zeros_like(noise)
    few[0, 0, 0] = 200  # no deviation, and equal percentiles
    flat = np.full_like(noise, 7)
    dark = (noise // 40).astype(np.uint8)
    tiles = np.stack([noise, padded, few, flat, dark]).astype(np.uint8)
    got = robust_mad(torch.from_numpy(tiles)).numpy()
    assert got.dtype == np.float32
    assert not np.median(np.abs(padded - np.median(padded)))
    for mine, tile in zip(got, tiles, strict=True):
        np.testing.assert_allclose(mine, by_hand(tile), rtol=1e-5, atol=1e-5)


def test_robust_mad_of_an_even_number_of_voxels():
    tile = np.array([0, 1, 3, 10, 11, 200], np.uint8).reshape(1, 1, 2, 3)
    got = robust_mad(torch.from_numpy(tile)).numpy()
    np.testing.assert_allclose(got[0], by_hand(tile[0]), rtol=1e-5, atol=1e-5)


def test_prepared_network_keeps_the_layout_that_its_norms_read():
    """An instance norm copies channels-last maps, which costs a quarter of the time on a CPU."""
    module = ink_hybrid_3d2d()
    prepare(module, torch.float32)
    convs = [it for it in module.modules() if isinstance(it, torch.nn.Conv2d)]
    assert convs
    assert all(conv.weight.is_contiguous() for conv in convs)
