"""TimeSformer against the package whose layout its checkpoints have."""

import pytest
import torch
from timesformer_pytorch import TimeSformer as Oracle
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from inkdask.models import timesformer
from inkdask.models.fast import prepare
from inkdask.models.timesformer import (
    TimeSformer,
    attend_by_products,
    ink_timesformer,
    swap_pairs,
)

REAL = {"dim": 512, "depth": 8, "heads": 6, "dim_head": 64, "image_size": 64, "patch_size": 16}
SMALL = {"dim": 48, "depth": 3, "heads": 2, "dim_head": 32, "image_size": 24, "patch_size": 8}
TINY = {"dim": 24, "depth": 1, "heads": 3, "dim_head": 16, "image_size": 16, "patch_size": 16}


def oracle(frames, config=REAL):
    """The package's network; its weights are random, its logits spread over some units."""
    torch.manual_seed(frames)
    classes = (config["image_size"] // config["patch_size"]) ** 2
    network = Oracle(num_frames=frames, num_classes=classes, channels=1, **config).eval()
    with torch.no_grad():
        network.to_out[1].weight.mul_(4)
    return network


def ours(reference, frames, config=REAL):
    network = TimeSformer(
        frames, config["image_size"], config["patch_size"], config["dim"], config["depth"],
        config["heads"], config["dim_head"],
    ).eval()  # fmt: skip
    network.load_state_dict(reference.state_dict(), strict=True)
    return network


def tiles(frames, side=64, n=2):
    return torch.rand(n, 1, frames, side, side, generator=torch.Generator().manual_seed(1))


def logits_of(reference, x):
    out = reference(x.transpose(1, 2))
    k = round(out.shape[1] ** 0.5)
    return out.view(-1, 1, k, k)


@torch.inference_mode()
def test_attention_splits_more_rows_than_a_kernel_takes(monkeypatch):
    x, network = tiles(5, 24, 4), ours(oracle(5, SMALL), 5, SMALL)
    expected = network(x)
    monkeypatch.setattr(timesformer, "MOST_ROWS", 3)
    seen, attend = [], torch.nn.functional.scaled_dot_product_attention

    def count(q, *others, **options):
        seen.append(len(q))
        return attend(q, *others, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    torch.testing.assert_close(network(x), expected)
    assert seen.count(3) > 10


@torch.inference_mode()
def test_real_size_gives_the_logits_of_the_package():
    reference = oracle(30)  # 26 frames are those of test_real_network
    x = tiles(30, n=1)
    expected = logits_of(reference, x)
    assert expected.std() > 0.3
    got = ours(reference, 30)(x)
    assert got.shape == (1, 1, 4, 4)
    assert (got - expected).abs().max() < 1e-4


@torch.inference_mode()
@pytest.mark.parametrize("config", [SMALL, TINY], ids=["small", "tiny"])
@pytest.mark.parametrize(("frames", "n"), [(1, 1), (2, 3), (7, 3)])
def test_other_size_gives_the_logits_of_the_package(config, frames, n):
    reference = oracle(frames, config)
    x = tiles(frames, config["image_size"], n)
    torch.testing.assert_close(
        ours(reference, frames, config)(x), logits_of(reference, x), atol=1e-5, rtol=1e-5
    )


@torch.inference_mode()
def test_tile_of_another_size_gives_the_logits_of_the_package():
    reference = oracle(4)  # as trained on tiles of 64
    for side in (16, 32, 96, 128):
        network = ink_timesformer(layers=4, tile=side).eval()
        network.load_state_dict(reference.state_dict(), strict=True, assign=True)
        x = tiles(4, side, n=1)
        expected = logits_of(reference, x)
        assert expected.shape == (1, 1, 4, 4)
        assert expected.std() > 0.3
        torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=0)


def test_parameters_have_the_names_and_shapes_of_the_package():
    with torch.device("meta"):
        reference, network = oracle(26), ink_timesformer()
    shapes = {name: value.shape for name, value in network.state_dict().items()}
    assert shapes == {name: value.shape for name, value in reference.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == pytest.approx(37.9e6, rel=0.01)


@torch.inference_mode()
def test_bfloat16_network_adds_tokens_in_float32():
    reference = oracle(7, SMALL)
    x = tiles(7, 24)
    network = ours(reference, 7, SMALL)
    prepare(network, torch.bfloat16)
    assert network.layers[1][0].fn.to_qkv.weight.dtype is torch.bfloat16
    seen = []
    for block in network.layers:
        block.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    got = network(x.bfloat16()).float().sigmoid()
    assert (got - logits_of(reference, x).sigmoid()).abs().max() < 0.02
    assert set(seen) == {torch.float32}


@pytest.mark.slow
@torch.no_grad()
def test_network_compiles_as_one_graph():
    network = ours(oracle(2, TINY), 2, TINY)
    x = tiles(2, 16)
    compiled = torch.compile(network, backend="eager", fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(x), network(x))


@torch.inference_mode()
def test_bfloat16_network_keeps_frequencies_in_float32():
    network = ours(oracle(7, SMALL), 7, SMALL)
    before = network.frame_rot_emb.inv_freqs.clone()
    network.to(torch.bfloat16)
    assert network.to_patch_embedding.weight.dtype is torch.bfloat16
    assert torch.equal(network.frame_rot_emb.inv_freqs, before)


@torch.inference_mode()
def test_normalization_is_a_batch_norm_of_the_input():
    plain = ours(oracle(7, SMALL), 7, SMALL)
    network = TimeSformer(7, 24, 8, 48, 3, 2, 32, normalization=True).eval()
    statistics = {"weight": 1.5, "bias": -0.2, "running_mean": 0.4, "running_var": 0.09}
    state = {f"normalization.{name}": torch.tensor([v]) for name, v in statistics.items()}
    state["normalization.num_batches_tracked"] = torch.tensor(3)
    network.load_state_dict(plain.state_dict() | state, strict=True)
    x = tiles(7, 24)
    expected = plain((x - 0.4) / (0.09 + 1e-5) ** 0.5 * 1.5 - 0.2)
    torch.testing.assert_close(network(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(network(x), plain(x), atol=1e-2)


def flops(forward, x):
    # Without fused kernels every product is one that the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        forward(x)
    return counter.get_total_flops()


@torch.inference_mode()
def test_network_needs_nine_percent_fewer_operations_than_the_package():
    with torch.device("meta"):
        reference, network = oracle(26), ink_timesformer().eval()
        x = torch.empty(1, 1, 26, 64, 64)
        plain, saving = flops(lambda x: reference(x.transpose(1, 2)), x), flops(network, x)
    assert plain == pytest.approx(31.7e9, rel=0.02)
    assert saving < 0.91 * plain


def test_tile_that_is_no_whole_number_of_patches_is_refused():
    with pytest.raises(ValueError, match="no whole number of patches"):
        TimeSformer(26, tile=72)


@pytest.mark.parametrize(("queries", "keys"), [(26, 27), (16, 17), (1, 417)])
def test_attention_by_products_equals_fused_attention(queries, keys):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, tokens, 64) for tokens in (queries, keys, keys))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(attend_by_products(q, k, v), expected, atol=1e-5, rtol=0)
    rounded = attend_by_products(*(t.bfloat16() for t in (q, k, v)))
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.float(), expected, atol=0.05, rtol=0)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swap_pairs_keeps_every_bit(dtype):
    x = torch.randn(3, 5, 2, 24).to(dtype)
    x[0, 0, 0, :4] = torch.tensor([torch.nan, -0.0, torch.inf, 1.0])
    part = x[:, 1:, :, 8:16]  # a view, as those of queries are
    expected = torch.stack((part[..., 1::2], part[..., ::2]), dim=-1).flatten(-2)
    for given, want in (
        (part, expected),
        (x[:1], x[:1].unflatten(-1, (-1, 2)).flip(-1).flatten(-2)),
    ):
        got = swap_pairs(given)
        torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
        assert torch.equal(got.signbit(), want.signbit())
