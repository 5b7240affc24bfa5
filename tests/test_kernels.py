"""Kernels for a GPU: in Triton's interpreter, compiled without a GPU, and on a GPU."""

import copy
import os
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu

from inkdask.models import timesformer
from inkdask.models.fast import agree, prepare
from inkdask.models.hardware import full_float32
from inkdask.models.timesformer import TimeSformer, ink_timesformer

triton = pytest.importorskip("triton", reason="Triton comes with torch for CUDA alone")
kernels = pytest.importorskip("inkdask.models.kernels")

by_interpreter = os.environ.get("TRITON_INTERPRET") == "1"  # read when Triton is imported
interpreted = pytest.mark.skipif(not by_interpreter, reason="needs TRITON_INTERPRET=1")
compiled = pytest.mark.skipif(by_interpreter, reason="TRITON_INTERPRET=1 compiles nothing")
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    compiled,
]

CLIPS = [(200.0, 200.0), (255.0, 255.0), (90.5, 40.0), (100.1, 0.3)]
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.uint8: "*u8",
    torch.int64: "*i64",
}


@pytest.fixture(autouse=True)
def poisoned():
    """Fill new tensors with NaN, so that a value that no kernel writes shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


def network(layers, tile, patch, heads, head_dim, k=None, normalization=False, dtype=torch.float32):
    """Small network of two blocks with random weights and norms."""
    torch.manual_seed(layers)
    built = TimeSformer(layers, tile, patch, 48, 2, heads, head_dim, normalization).eval()
    built.requires_grad_(False)
    if k:
        built.k = k
        built.to_out[1] = timesformer.Linear(48, k * k)
    for norm in (m for m in built.modules() if isinstance(m, torch.nn.LayerNorm)):
        norm.weight.copy_(torch.rand(norm.weight.shape) + 0.5)
        norm.bias.copy_(torch.randn(norm.bias.shape))
    prepare(built, dtype)
    return built.requires_grad_(False)


def check_mix(axis, f, g, heads, e, dtype, atol, device="cpu"):
    """Compare `mix` of random queries, keys and values with the plain one in float32.

    Without ``atol`` it may be as far from it as the plain one of the same dtype.
    """
    torch.manual_seed(f + g)
    qkv = 2 * torch.randn(3, 1 + f * g * g, 3 * heads * e, device=device).to(dtype)
    embedding = (timesformer.FrameRotation if axis == 1 else timesformer.ImageRotation)(e)
    length = f if axis == 1 else g * g
    where = embedding.to(device), (f if axis == 1 else g)
    plain, ours = (where[0](where[1], h, torch.float32) for h in (heads, 1))
    expected = timesformer.mix(qkv.float(), heads, axis, (f, g * g), plain)
    if atol is None:
        plain = where[0](where[1], heads, dtype)
        rounded = timesformer.mix(qkv, heads, axis, (f, g * g), plain)
        atol = (rounded.float() - expected).abs().max().item()
    got = kernels.mix(qkv, heads, axis, (f, g * g), torch.stack(ours).view(2, length, e))
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), expected, atol=atol, rtol=0)


def check_gather(block, at, tile, clip, divisor, dtype):
    """Compare `gather` with the plain way, exactly; ``block`` and ``at`` are on the CPU."""
    cut = torch.stack([block[:, y : y + tile, x : x + tile] for y, x in at])[:, None]
    expected = cut.float().clamp_(max=clip).div_(divisor).to(dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    got = kernels.gather(block.to(device), at.to(device), tile, clip, divisor, dtype)
    assert torch.equal(got.cpu(), expected)


def voxels(*shape):
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


def large_block():
    """Voxels with offsets beyond 2^31; pages that nobody writes take no memory."""
    block = torch.from_numpy(np.zeros((4, 40_000, 20_000), np.uint8))
    block[:, -16:, -16:] = voxels(4, 16, 16)
    return block


# In the interpreter.


@interpreted
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 0.01)])
@pytest.mark.parametrize(
    ("axis", "f", "g", "heads", "e"),
    [
        (1, 26, 2, 2, 64),  # two rows in a block, as in the trained network
        (2, 5, 4, 2, 64),  # four rows in a block; the last block is not full
        (1, 5, 3, 3, 16),
        (2, 7, 1, 1, 32),  # one patch a row
        (1, 1, 2, 2, 32),
        (2, 2, 6, 1, 16),
        (2, 1, 8, 1, 16),
        (1, 65, 2, 1, 16),  # 128 places for a row
        (2, 2, 11, 1, 16),
        (1, 128, 1, 1, 16),
    ],
)
def test_mix_gives_the_values_of_the_plain_network(axis, f, g, heads, e, dtype, atol):
    check_mix(axis, f, g, heads, e, dtype, atol)


@interpreted
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 0.01)])
@pytest.mark.parametrize("d", [48, 512])
def test_add_norm_adds_in_place_and_normalises(d, dtype, atol):
    norm = torch.nn.LayerNorm(d, eps=1e-3).requires_grad_(False)
    norm.weight.copy_(torch.randn(d))
    norm.bias.copy_(torch.randn(d))
    x, share = 3 * torch.randn(2, 5, d) + 1, torch.randn(2, 5, d).to(dtype)
    expected = x + share.float()
    y = kernels.add_norm(x, share, norm)
    assert y.dtype is dtype
    assert torch.equal(x, expected)
    torch.testing.assert_close(y.float(), norm(expected), atol=atol, rtol=0)


@interpreted
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 0.01)])
@pytest.mark.parametrize("c", [192, 2048])
def test_geglu_multiplies_values_with_their_gates(c, dtype, atol):
    x = torch.randn(2, 5, 2 * c).to(dtype)
    value, gate = x.float().chunk(2, -1)
    got = kernels.geglu(x)
    assert got.dtype is dtype
    torch.testing.assert_close(got.float(), value * gelu(gate), atol=atol, rtol=0)


@interpreted
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-5), (torch.float16, 0.02)])
@pytest.mark.parametrize(
    ("layers", "tile", "patch", "heads", "head_dim", "k", "normalization"),
    [
        (5, 24, 8, 2, 32, None, True),
        (1, 16, 16, 3, 16, 4, False),
        (9, 8, 4, 2, 64, 3, False),
        (2, 20, 4, 1, 16, 2, False),
    ],
)
def test_fused_network_gives_the_logits_of_the_plain_one(
    layers, tile, patch, heads, head_dim, k, normalization, dtype, atol
):
    plain = network(layers, tile, patch, heads, head_dim, k, normalization)
    x = torch.rand(2, 1, layers, tile, tile).to(dtype)
    expected = plain(x.float())
    assert expected.std() > 0.2
    rounded = copy.deepcopy(plain)
    prepare(rounded, dtype)
    fused = kernels.FusedTimeSformer(rounded)
    got = fused(x)
    assert (got.dtype, fused.k) == (dtype, plain.k)
    assert got.shape == (2, 1, plain.k, plain.k)
    torch.testing.assert_close(got.float(), expected, atol=atol, rtol=0)


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("tile", [5, 64, 96])
@pytest.mark.parametrize(("clip", "divisor"), CLIPS)
def test_gather_cuts_clips_and_divides(tile, clip, divisor, dtype):
    at = torch.tensor([(0, 0), (3, 7), (4, 21), (4, 21)])
    check_gather(voxels(3, tile + 4, tile + 21), at, tile, clip, divisor, dtype)


@interpreted
def test_gather_reads_blocks_of_more_than_two_gigabytes():
    check_gather(
        large_block(), torch.tensor([(39_990, 19_990), (0, 1)]), 8, 200.0, 200.0, torch.float32
    )


# Without a GPU, in either mode.


@pytest.mark.parametrize(
    ("layers", "tile", "patch", "head_dim", "named"),
    [
        (129, 16, 8, 16, "129 frames"),
        (3, 48, 4, 16, "144 patches"),
        (3, 16, 8, 48, "heads 48 wide"),
        (3, 16, 8, 8, "heads 8 wide"),
    ],
)
def test_network_beyond_the_kernels_is_refused(layers, tile, patch, head_dim, named):
    with pytest.raises(ValueError, match=named):
        kernels.FusedTimeSformer(network(layers, tile, patch, 2, head_dim))


def test_fused_network_shares_weights_and_keeps_rotations_in_float32():
    plain = network(3, 16, 8, 2, 16, dtype=torch.bfloat16)
    fused = kernels.FusedTimeSformer(plain)
    weights = [weight.data_ptr() for weight in plain.parameters()]
    assert [weight.data_ptr() for weight in fused.parameters()] == weights
    assert {fused.frames.dtype, fused.places.dtype} == {torch.float32}
    assert fused.frames.abs().max() <= 1


# Compiled without a GPU.


def launches():
    """Launches of one forward pass for some networks, and of `gather`, without a device."""
    seen = {}

    def record(kernel, *arguments, grid, warmup, num_warps):
        constants, signature, aligned = {}, {}, {}
        for i, (parameter, value) in enumerate(zip(kernel.params, arguments, strict=True)):
            if parameter.is_constexpr:
                constants[parameter.name], kind = value, "constexpr"
            elif isinstance(value, torch.Tensor):
                aligned[(i,)], kind = [["tt.divisibility", 16]], POINTERS[value.dtype]
            else:
                kind = {int: "i32", float: "fp32"}[type(value)]
            signature[parameter.name] = kind
        source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
        seen[f"{kernel.__name__} {signature} {constants}"] = source, num_warps

    with pytest.MonkeyPatch.context() as patched, torch.device("meta"):
        patched.setattr(triton.runtime.jit.JITFunction, "run", record)
        for layers, tile in ((26, 64), (26, 96), (65, 128)):
            built = TimeSformer(layers, tile, depth=2).eval().requires_grad_(False)
            prepare(built, torch.bfloat16)
            x = torch.empty(3, 1, layers, tile, tile, dtype=torch.bfloat16)
            assert kernels.FusedTimeSformer(built)(x).shape == (3, 1, built.k, built.k)
            block, at = torch.empty(layers, 99, 99, dtype=torch.uint8), torch.empty(3, 2).long()
            kernels.gather(block, at, tile, 200.0, 200.0, torch.bfloat16)
    return seen


@pytest.fixture(scope="module", params=[80, 90])
def binaries(request, tmp_path_factory):
    """Folder with the kernels compiled for one generation of GPUs."""
    folder = tmp_path_factory.mktemp("kernels")
    target = triton.backends.compiler.GPUTarget("cuda", request.param, 32)
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        for number, (source, num_warps) in enumerate(launches().values()):
            built = triton.compile(source, target=target, options={"num_warps": num_warps})
            (folder / f"{number}-{source.fn.__name__}.cubin").write_bytes(built.asm["cubin"])
    return folder


@compiled
def test_kernels_compile_without_a_gpu_and_spill_no_registers(binaries):
    files = sorted(binaries.glob("*.cubin"))
    assert {file.stem.partition("-")[2] for file in files} == {
        name for name, value in vars(kernels).items() if isinstance(value, triton.JITFunction)
    } - {"_rotate"}  # a part of another
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip("this build of Triton has no cuobjdump, which reads spills")
    for file in files:
        command = [tool, "--dump-resource-usage", "--dump-sass", file]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        assert "EXIT" in said, file.name
        used = dict(re.findall(r"(STACK|LOCAL|REG):(\d+)", said))
        assert (used["STACK"], used["LOCAL"]) == ("0", "0"), f"{file.name}: {used}"
        assert not re.search(r"\b(LDL|STL)\b", said), file.name


# On a GPU.


class TestGPU:
    pytestmark = gpu

    @pytest.mark.parametrize(
        ("axis", "f", "g"), [(1, 26, 4), (2, 26, 4), (2, 5, 6), (2, 3, 8), (1, 65, 2), (2, 2, 11)]
    )
    def test_mix_gives_the_values_of_the_plain_network(self, axis, f, g):
        with full_float32():
            check_mix(axis, f, g, 6, 64, torch.bfloat16, None, "cuda")

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("tile", [5, 64, 96])
    @pytest.mark.parametrize(("clip", "divisor"), CLIPS)
    def test_gather_cuts_clips_and_divides(self, tile, clip, divisor, dtype):
        at = torch.tensor([(0, 0), (3, 7), (4, 21), (4, 21)])
        check_gather(voxels(3, tile + 4, tile + 21), at, tile, clip, divisor, dtype)

    def test_gather_reads_blocks_of_more_than_two_gigabytes(self):
        at = torch.tensor([(39_990, 19_990), (0, 1)])
        check_gather(large_block(), at, 8, 200.0, 200.0, torch.bfloat16)

    @pytest.mark.parametrize(("layers", "tile"), [(26, 64), (26, 96), (65, 64)])
    @torch.inference_mode()
    def test_fused_network_gives_the_probabilities_of_the_plain_one(self, layers, tile):
        """In bfloat16, for 64 tiles, against float32."""
        torch.manual_seed(0)
        plain = ink_timesformer(layers, tile).eval().cuda()
        plain.to_out[1].weight.mul_(4)
        at = torch.randint(0, 99, (64, 2))
        block = voxels(layers, 99 + tile, 99 + tile)
        x = kernels.gather(block.cuda(), at.cuda(), tile, 200.0, 200.0, torch.float32)
        with full_float32():
            expected = plain(x)
        assert expected.std() > 0.3
        prepare(plain, torch.bfloat16)
        fused = kernels.FusedTimeSformer(plain)
        assert agree(fused(x.bfloat16()), expected, 0.03)
