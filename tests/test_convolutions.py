"""Test the convolutions of ResNet3D: the plain way, the fused way, and both on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inkdask.models import convolutions
from inkdask.models.convolutions import (
    GroupNorm,
    conv_add_relu,
    conv_relu,
    max_over_depth,
    upsample,
    windows,
)

SPACE, PLANE = torch.channels_last_3d, torch.channels_last
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


@pytest.fixture(autouse=True)
def inference():
    torch.manual_seed(0)
    with torch.inference_mode():
        yield


@pytest.fixture
def fused(monkeypatch):
    """Let the CPU have the kernels of a GPU; return the maps that were added."""
    added = []

    def add_relu(x, weight, plus, scale, bias, stride, padding, dilation, groups):
        y = F.conv3d(x, weight, bias, stride, padding, dilation, groups)
        assert x.is_contiguous(memory_format=SPACE)
        assert plus.shape == y.shape
        added.append(plus)
        return F.relu(y + scale * plus)

    monkeypatch.setattr(torch, "cudnn_convolution_add_relu", add_relu)
    monkeypatch.setattr(convolutions, "_has_kernels", lambda x: True)
    return added


def a_map(*shape, device="cpu", dtype=torch.float32):
    return torch.randn(shape, device=device).to(dtype, memory_format=SPACE)


def conv(inputs, outputs, side, stride=1):
    made = nn.Conv3d(inputs, outputs, side, stride, padding=side // 2)
    return made.to(memory_format=SPACE)


CONVOLUTIONS = [(8, 12, 1, 1), (8, 8, 3, 1), (8, 8, 3, 2)]


@pytest.mark.parametrize("shape", CONVOLUTIONS)
def test_fused_convolution_is_the_plain_one(fused, shape):
    made, x = conv(*shape), a_map(2, 8, 5, 7, 6)
    got = conv_relu(x, made, nn.Identity())
    torch.testing.assert_close(got, F.relu(made(x)), rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=SPACE)
    assert len(fused) == (shape[2] == 3)


def test_fused_convolution_adds_no_unwritten_memory(fused):
    """Zero times NaN would be NaN."""
    x = a_map(1, 8, 5, 7, 6)
    conv_relu(x, conv(8, 8, 3, 2), nn.Identity())
    assert torch.equal(fused[0], x[:, :, ::2, ::2, ::2])


@pytest.mark.parametrize("stride", [1, 2, None])
def test_fused_sum_is_the_plain_one(fused, stride):
    side = 1 if stride is None else stride
    project = nn.Identity()
    if stride is not None:
        project = nn.Sequential(conv(6, 12, 1, stride), nn.Identity())
    plus = a_map(2, 12 if stride is None else 6, 5, 7, 6)
    x = a_map(2, 8, *plus[0, 0, ::side, ::side, ::side].shape)
    made, before = conv(8, 12, 1), plus.clone()
    got = conv_add_relu(x, made, nn.Identity(), plus, project)
    torch.testing.assert_close(got, F.relu(made(x) + project(plus)), rtol=1e-5, atol=1e-5)
    assert torch.equal(plus, before)
    assert len(fused) == 1


@pytest.mark.parametrize("unfit", ["norm", "size", "compiler"])
def test_unfit_convolution_runs_plain(fused, monkeypatch, unfit):
    norm, x, made = nn.Identity(), a_map(1, 8, 3, 4, 4), conv(8, 8, 3)
    if unfit == "norm":
        norm = nn.BatchNorm3d(8).eval()
        norm.running_mean.fill_(0.3)
    elif unfit == "size":
        monkeypatch.setattr(convolutions, "MOST_ELEMENTS", x.numel())
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    expected = F.relu(norm(made(x)))
    assert torch.equal(conv_relu(x, made, norm), expected)
    expected = F.relu(norm(made(x)) + x)
    assert torch.equal(conv_add_relu(x, made, norm, x, nn.Identity()), expected)
    assert not fused


def test_products_copy_no_channels_last_map():
    x = a_map(2, 8, 5, 7, 6)
    made = conv(8, 12, 1)
    got = convolutions._product(x, made)
    torch.testing.assert_close(got, F.conv3d(x, made.weight))
    assert got.is_contiguous(memory_format=SPACE)


@pytest.mark.parametrize("z", [1, 17, 26])
def test_depths_as_channels_are_a_convolution_in_space(z):
    x, weight = torch.rand(2, z, 14, 12), torch.randn(5, 7, 7, 7)
    expected = F.conv3d(x[:, None], weight[:, None], stride=(1, 2, 2), padding=3)
    maps, kernel = windows(x, weight)
    assert maps.shape == (2 * z, 8, 14, 12)
    assert maps.is_contiguous(memory_format=PLANE)
    got = F.conv2d(maps, kernel, stride=2, padding=3).unflatten(0, (2, z)).transpose(1, 2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_maximum_over_depth_is_channels_last():
    x = a_map(2, 8, 5, 7, 6)
    got = max_over_depth(x)
    assert torch.equal(got, x.max(dim=2).values)
    assert got.is_contiguous(memory_format=PLANE)


@pytest.mark.parametrize("layout", ["plain", "channels last"])
@pytest.mark.parametrize(
    ("size", "to"),
    [((2, 2), (4, 4)), ((3, 5), (5, 10)), ((3, 2, 2), (5, 4, 4)), ((4, 3, 2), (7, 6, 3))],
)
def test_upsampling_is_linear_and_channels_last(layout, size, to):
    last, mode = (PLANE, "bilinear") if len(size) == 2 else (SPACE, "trilinear")
    x = torch.randn(2, 8, *size)
    expected = F.interpolate(x, size=to, mode=mode)
    got = upsample(x.contiguous(memory_format=last) if layout != "plain" else x, to)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert got.is_contiguous(memory_format=last)


def test_group_norm_on_a_gpu_is_that_of_torch(fused):
    norm = GroupNorm(4, 12)
    norm.weight.data.normal_(), norm.bias.data.normal_()
    x = a_map(2, 12, 5, 7, 6) * torch.arange(1.0, 25.0).view(2, 12, 1, 1, 1) + 3
    expected = F.group_norm(x, 4, norm.weight, norm.bias)
    got = norm(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert got.is_contiguous(memory_format=SPACE)


def test_group_norm_of_a_constant_is_its_bias(fused):
    norm = GroupNorm(4, 12)
    norm.bias.data.normal_()
    got = norm(torch.full((1, 12, 9, 9, 9), 0.1))
    torch.testing.assert_close(
        got, norm.bias.view(1, 12, 1, 1, 1).expand_as(got), atol=0.02, rtol=0
    )


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize("shape", [(64, 128, 1, 1), (64, 64, 3, 1), (64, 64, 3, 2)])
    def test_convolutions_are_those_of_the_cpu(self, shape):
        made, x = conv(*shape), a_map(2, 64, 9, 16, 16)
        expected = F.relu(made(x))
        made.to("cuda", torch.bfloat16)
        got = conv_relu(x.to("cuda", torch.bfloat16), made, nn.Identity())
        torch.testing.assert_close(got.float().cpu(), expected, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("stride", [1, 2])
    def test_sums_are_those_of_the_cpu(self, stride):
        made, project = conv(64, 256, 1), nn.Sequential(conv(32, 256, 1, stride), nn.Identity())
        plus = a_map(2, 32, 9, 16, 16)
        x = a_map(2, 64, *plus[0, 0, ::stride, ::stride, ::stride].shape)
        expected = F.relu(made(x) + project(plus))
        made.to("cuda", torch.bfloat16), project.to("cuda", torch.bfloat16)
        x, plus = (m.to("cuda", torch.bfloat16) for m in (x, plus))
        got = conv_add_relu(x, made, nn.Identity(), plus, project)
        torch.testing.assert_close(got.float().cpu(), expected, rtol=0.02, atol=0.03)

    def test_group_norm_is_that_of_the_cpu(self):
        norm, x = GroupNorm(32, 64), a_map(2, 64, 9, 16, 16) + 1
        expected = norm(x)
        norm.to("cuda", torch.bfloat16)
        got = norm(x.to("cuda", torch.bfloat16))
        torch.testing.assert_close(got.float().cpu(), expected, rtol=0.02, atol=0.03)
        assert got.is_contiguous(memory_format=SPACE)

    def test_upsampling_is_that_of_the_cpu(self):
        x = a_map(2, 64, 4, 3, 2)
        got = upsample(x.to("cuda", torch.bfloat16), (7, 6, 4))
        torch.testing.assert_close(got.float().cpu(), upsample(x, (7, 6, 4)), rtol=0.02, atol=0.03)
