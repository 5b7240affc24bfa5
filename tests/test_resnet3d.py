"""ResNet3D: the names and shapes of its checkpoints, and its result restated step by step."""

import importlib

import pytest
import torch
import torch.nn.functional as F

from inkdask.models import convolutions, resnet3d
from inkdask.models.depth_cnn import DepthCNN
from inkdask.models.fast import prepare
from inkdask.models.networks import BUILDERS
from inkdask.models.resnet3d import Decoder2D, Decoder3D, ResNet3D

BLOCKS = {50: [3, 4, 6, 3], 101: [3, 4, 23, 3], 152: [3, 8, 36, 3]}
NORM = ("weight", "bias", "running_mean", "running_var")


def norm(name, channels):
    return {f"{name}.{value}": (channels,) for value in NORM} | {f"{name}.num_batches_tracked": ()}


def encoder_shapes(depth):
    shapes = {"conv1.weight": (64, 1, 7, 7, 7)} | norm("bn1", 64)
    inputs = 64
    for stage, (blocks, width) in enumerate(zip(BLOCKS[depth], [64, 128, 256, 512], strict=True)):
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            shapes |= {
                f"{at}.conv1.weight": (width, inputs, 1, 1, 1),
                f"{at}.conv2.weight": (width, width, 3, 3, 3),
                f"{at}.conv3.weight": (4 * width, width, 1, 1, 1),
                **norm(f"{at}.bn1", width),
                **norm(f"{at}.bn2", width),
                **norm(f"{at}.bn3", 4 * width),
            }
            if block == 0:
                shapes |= {f"{at}.downsample.0.weight": (4 * width, inputs, 1, 1, 1)}
                shapes |= norm(f"{at}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes


DECODER_2D = {
    "decoder.convs.0.0.weight": (256, 768, 3, 3),
    **norm("decoder.convs.0.1", 256),
    "decoder.convs.1.0.weight": (512, 1536, 3, 3),
    **norm("decoder.convs.1.1", 512),
    "decoder.convs.2.0.weight": (1024, 3072, 3, 3),
    **norm("decoder.convs.2.1", 1024),
    "decoder.logit.weight": (1, 256, 1, 1),
    "decoder.logit.bias": (1,),
}

DECODER_3D = {
    "decoder.channel_reduce.0.0.weight": (64, 256, 1, 1, 1),
    "decoder.channel_reduce.0.1.weight": (64,),
    "decoder.channel_reduce.0.1.bias": (64,),
    "decoder.channel_reduce.1.0.weight": (128, 512, 1, 1, 1),
    "decoder.channel_reduce.1.1.weight": (128,),
    "decoder.channel_reduce.1.1.bias": (128,),
    "decoder.channel_reduce.2.0.weight": (256, 1024, 1, 1, 1),
    "decoder.channel_reduce.2.1.weight": (256,),
    "decoder.channel_reduce.2.1.bias": (256,),
    "decoder.channel_reduce.3.0.weight": (512, 2048, 1, 1, 1),
    "decoder.channel_reduce.3.1.weight": (512,),
    "decoder.channel_reduce.3.1.bias": (512,),
    "decoder.decoder_blocks.0.conv1.weight": (256, 768, 3, 3, 3),
    "decoder.decoder_blocks.0.gn1.weight": (256,),
    "decoder.decoder_blocks.0.gn1.bias": (256,),
    "decoder.decoder_blocks.0.conv2.weight": (256, 256, 3, 3, 3),
    "decoder.decoder_blocks.0.gn2.weight": (256,),
    "decoder.decoder_blocks.0.gn2.bias": (256,),
    "decoder.decoder_blocks.0.shortcut.weight": (256, 768, 1, 1, 1),
    "decoder.decoder_blocks.1.conv1.weight": (128, 384, 3, 3, 3),
    "decoder.decoder_blocks.1.gn1.weight": (128,),
    "decoder.decoder_blocks.1.gn1.bias": (128,),
    "decoder.decoder_blocks.1.conv2.weight": (128, 128, 3, 3, 3),
    "decoder.decoder_blocks.1.gn2.weight": (128,),
    "decoder.decoder_blocks.1.gn2.bias": (128,),
    "decoder.decoder_blocks.1.shortcut.weight": (128, 384, 1, 1, 1),
    "decoder.decoder_blocks.2.conv1.weight": (64, 192, 3, 3, 3),
    "decoder.decoder_blocks.2.gn1.weight": (64,),
    "decoder.decoder_blocks.2.gn1.bias": (64,),
    "decoder.decoder_blocks.2.conv2.weight": (64, 64, 3, 3, 3),
    "decoder.decoder_blocks.2.gn2.weight": (64,),
    "decoder.decoder_blocks.2.gn2.bias": (64,),
    "decoder.decoder_blocks.2.shortcut.weight": (64, 192, 1, 1, 1),
    "decoder.depth_collapse.attn_conv.weight": (1, 64, 1, 1, 1),
    "decoder.depth_collapse.attn_conv.bias": (1,),
    "decoder.logit.weight": (1, 64, 1, 1),
    "decoder.logit.bias": (1,),
}


@pytest.mark.parametrize(
    ("name", "depth", "decoder"),
    [
        ("ink_resnet3d_50", 50, DECODER_2D),
        ("ink_resnet3d_101", 101, DECODER_2D),
        ("ink_resnet3d_152", 152, DECODER_2D),
        ("ink_resnet3d_152_decoder3d", 152, DECODER_3D),
    ],
)
def test_real_network_has_the_names_and_shapes_of_checkpoints(name, depth, decoder):
    with torch.device("meta"):
        network = BUILDERS[name](layers=26, tile=256).eval()
        logits = network(torch.empty(1, 1, 26, 256, 256))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes == encoder_shapes(depth) | decoder
    assert logits.shape == (1, 1, 64, 64)


def restated(state, x, depth, decode):
    """The network once more, from its state dict, with nothing but functions."""

    def batch_norm(x, at):
        mean, var, weight, bias = (
            state[f"{at}.{name}"].view(-1, *[1] * (x.ndim - 2))
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / torch.sqrt(var + 1e-5) * weight + bias

    def conv(x, at, **options):
        function = F.conv3d if x.ndim == 5 else F.conv2d
        return function(x, state[f"{at}.weight"], state.get(f"{at}.bias"), **options)

    def group_norm(x, at):
        return F.group_norm(x, 32, state[f"{at}.weight"], state[f"{at}.bias"])

    def relu(x):
        return x.clamp(min=0)

    x = relu(batch_norm(conv(x, "conv1", stride=(1, 2, 2), padding=3), "bn1"))
    x = F.max_pool3d(x, (1, 3, 3), (1, 2, 2), (0, 1, 1))
    maps = []
    for stage, blocks in enumerate(BLOCKS[depth]):
        for block in range(blocks):
            at = f"layer{stage + 1}.{block}"
            stride = 2 if stage > 0 and block == 0 else 1
            y = relu(batch_norm(conv(x, f"{at}.conv1"), f"{at}.bn1"))
            y = relu(batch_norm(conv(y, f"{at}.conv2", stride=stride, padding=1), f"{at}.bn2"))
            y = batch_norm(conv(y, f"{at}.conv3"), f"{at}.bn3")
            if block == 0:
                x = batch_norm(conv(x, f"{at}.downsample.0", stride=stride), f"{at}.downsample.1")
            x = relu(x + y)
        maps.append(x)
    return decode(maps, conv, batch_norm, group_norm, relu)


def in_the_plane(maps, conv, batch_norm, group_norm, relu):
    maps = [m.max(dim=2).values for m in maps]
    x = maps[3]
    for i in (2, 1, 0):
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        at = f"decoder.convs.{i}"
        x = relu(batch_norm(conv(torch.cat([maps[i], x], 1), f"{at}.0", padding=1), f"{at}.1"))
    return conv(x, "decoder.logit")


def in_space(maps, conv, batch_norm, group_norm, relu):
    maps = [
        relu(group_norm(conv(m, f"decoder.channel_reduce.{i}.0"), f"decoder.channel_reduce.{i}.1"))
        for i, m in enumerate(maps)
    ]
    x = maps[3]
    for block, skip in enumerate(reversed(maps[:3])):
        at = f"decoder.decoder_blocks.{block}"
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        x = torch.cat([x, skip], 1)
        y = relu(group_norm(conv(x, f"{at}.conv1", padding=1), f"{at}.gn1"))
        y = group_norm(conv(y, f"{at}.conv2", padding=1), f"{at}.gn2")
        x = relu(y + conv(x, f"{at}.shortcut"))
    weights = torch.exp(conv(x, "decoder.depth_collapse.attn_conv"))
    return conv((x * weights).sum(2) / weights.sum(2), "decoder.logit")


def randomize(network):
    """Give every batch norm statistics and an affine map of its own, as training does."""
    torch.manual_seed(0)
    for name, value in network.state_dict().items():
        if value.ndim == 1 and ("bn" in name or ".1." in name or "gn" in name):
            value.uniform_(0.5, 1.5) if not name.endswith("mean") else value.normal_(0, 0.1)
    return network


@pytest.fixture(autouse=True)
def one_thread():
    """Let a single core compute, because steps of small networks are short."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def small(monkeypatch):
    """Let the networks have an eighth of their channels."""
    monkeypatch.setattr(resnet3d, "WIDTHS", (8, 16, 32, 64))
    monkeypatch.setattr(resnet3d, "MAPS", (32, 64, 128, 256))


def give_kernels_of_a_gpu(monkeypatch):
    """Let the CPU have the fused kernels; return the scales of the maps that they add."""
    scales = []

    def add_relu(x, weight, plus, scale, bias, *rest):
        assert x.is_contiguous(memory_format=torch.channels_last_3d)
        assert plus.isfinite().all()
        scales.append(scale)
        return F.relu(F.conv3d(x, weight, bias, *rest) + scale * plus)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(convolutions, "_has_kernels", lambda x: True)
    return scales


DECODERS = {"2d": (Decoder2D, in_the_plane), "3d": (lambda: Decoder3D((32, 32, 64, 64)), in_space)}
CASES = [  # network, decoder and tile; depths of checkpoints, and an odd one
    (50, "2d", (26, 32, 64)),
    (50, "2d", (17, 64, 32)),
    (50, "3d", (17, 64, 32)),
    (101, "2d", (9, 32, 32)),
    (152, "2d", (9, 32, 32)),
    (152, "3d", (62, 32, 32)),
]


def small_network(depth, decoder, shape):
    """A network with its tile, and the logits restated."""
    make, decode = DECODERS[decoder]
    network = randomize(ResNet3D(depth, make()).eval())
    x = torch.rand(2, 1, *shape)
    return network, x, restated(network.state_dict(), x, depth, decode)


@torch.inference_mode()
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(("depth", "decoder", "shape"), CASES)
def test_logits_are_those_restated_plain_prepared_and_fused(monkeypatch, depth, decoder, shape):
    network, x, expected = small_network(depth, decoder, shape)
    assert expected.std() > 0
    # More for the decoder in space, because torch's group norm is less exact channels-last.
    tolerance = {"2d": 1e-4, "3d": 3e-3}[decoder] * expected.std()
    got = network(x)
    assert got.shape == (2, 1, shape[1] // 4, shape[2] // 4)
    assert (got - expected).abs().max() < tolerance

    prepare(network, torch.float32)
    names = network.state_dict()
    assert not any("bn" in name for name in names)
    assert "layer1.0.conv1.bias" in names
    assert (network(x) - expected).abs().max() < tolerance

    scales = give_kernels_of_a_gpu(monkeypatch)
    assert (network(x) - expected).abs().max() < tolerance
    assert scales == [0.0, 1.0] * sum(BLOCKS[depth])  # conv2 and conv3 of each block


@torch.inference_mode()
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("decoder", DECODERS)
def test_logits_in_bfloat16_are_near_those_restated(decoder):
    network, x, expected = small_network(50, decoder, (9, 64, 32))
    prepare(network, torch.bfloat16)
    off = (network(x.bfloat16()).float() - expected).abs()
    assert off.max() < 0.3 * expected.std()
    assert off.mean() < 0.05 * expected.std()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.inference_mode()
@pytest.mark.parametrize("decoder", DECODERS)
def test_gpu_gives_the_logits_restated(decoder):
    make, decode = DECODERS[decoder]
    network = randomize(ResNet3D(50, make()).eval())
    x = torch.rand(2, 1, 17, 64, 64)
    expected = restated(network.state_dict(), x, 50, decode)
    prepare(network.cuda(), torch.bfloat16)
    off = (network(x.cuda().bfloat16()).float().cpu() - expected).abs()
    assert off.max() < 0.3 * expected.std()
    assert off.mean() < 0.05 * expected.std()


@torch.inference_mode()
@pytest.mark.usefixtures("small")
def test_normalization_is_a_batch_norm_of_the_input():
    network = ResNet3D(50, Decoder2D(), normalization=True).eval()
    network.normalization.load_state_dict(
        {
            "weight": torch.tensor([1.5]),
            "bias": torch.tensor([-0.2]),
            "running_mean": torch.tensor([0.4]),
            "running_var": torch.tensor([0.09]),
            "num_batches_tracked": torch.tensor(1),
        }
    )
    x = torch.rand(1, 1, 4, 32, 32)
    got = network(x)
    network.normalization = torch.nn.Identity()
    expected = network((x - 0.4) / (0.09 + 1e-5) ** 0.5 * 1.5 - 0.2)
    torch.testing.assert_close(got, expected)


def test_networks_are_in_the_registry_of_timm():
    importlib.import_module("inkdask.models.in_timm")
    timm = importlib.import_module("timm")
    assert set(timm.list_models("ink*")) >= {
        "ink_depth_cnn",
        "ink_resnet3d_101",
        "ink_resnet3d_152",
        "ink_resnet3d_152_decoder3d",
        "ink_resnet3d_50",
        "ink_timesformer",
    }
    assert isinstance(timm.create_model("ink_depth_cnn", layers=3, tile=64), DepthCNN)
