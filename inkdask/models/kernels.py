"""TimeSformer on an NVIDIA GPU: attention, norms, gates and the cutting of tiles, in Triton.

Between two products of matrices a GPU waits for memory, so each kernel reads its input once and
writes its result once. Kernels compute in float32 and round results and operands of products only.
Axes have the letters of `inkdask.models.timesformer`. Names in capitals are constants of a kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from einops import rearrange, repeat
from torch import Tensor, nn

from inkdask.models.timesformer import Grid, TimeSformer

BLOCK = 64  # patches that one program takes, because the tensor cores of Hopper take 64 rows
LONGEST = 128  # patches or frames in a row, because all scores of a row stay in registers


class FusedTimeSformer(nn.Module):
    """A TimeSformer that runs these kernels, for inference.

    It shares the modules of ``network``, which has its weights, its device and its dtype. Rows and
    heads that the kernels do not take are a ValueError.
    """

    frames: Tensor
    places: Tensor

    def __init__(self, network: TimeSformer) -> None:
        super().__init__()
        f, g, _ = network.shape
        frames = torch.stack(network.frame_rot_emb(f, 1, torch.float32)).view(2, f, -1)
        places = torch.stack(network.image_rot_emb(g, 1, torch.float32)).view(2, g * g, -1)
        if (e := frames.shape[-1]) not in (16, 32, 64, 128) or max(f, g * g) > LONGEST:
            raise ValueError(f"no kernel takes {f} frames, {g * g} patches and heads {e} wide")
        self.network, self.k = network, network.k
        self.register_buffer("frames", frames, persistent=False)
        self.register_buffer("places", places, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, k, k)`` of tiles ``(b, 1, f, t, t)`` in the dtype of weights."""
        network = self.network
        f, g, p = network.shape
        x = rearrange(network.normalization(x), "b 1 f (y p) (x q) -> b (f y x) (p q)", p=p, q=p)
        first = repeat(network.cls_token, "1 d -> b 1 d", b=len(x))
        share = torch.cat((first, network.to_patch_embedding(x)), 1)
        x = torch.zeros_like(share, dtype=torch.float32)  # tokens, to which every share is added

        def attend(residual: Any, share: Tensor, rotation: Tensor) -> Tensor:
            qkv = residual.fn.to_qkv(add_norm(x, share, residual.norm))
            mixed = mix(qkv, residual.fn.heads, residual.fn.axis, (f, g * g), rotation)
            return residual.fn.to_out(mixed)

        blocks: list[Any] = list(network.layers)
        for time, space, feed_forward in blocks[:-1]:
            share = attend(time, share, self.frames)
            share = attend(space, share, self.places)
            expand, _, _, shrink = feed_forward.fn.net
            share = shrink(geglu(expand(add_norm(x, share, feed_forward.norm))))
        time, space, feed_forward = blocks[-1]
        normed = add_norm(x, attend(time, share, self.frames), space.norm)
        logits = network.to_out(feed_forward(x[:, :1] + space.fn(normed)))
        return rearrange(logits, "b 1 (y x) -> b 1 y x", y=self.k)


def mix(qkv: Tensor, heads: int, axis: int, grid: Grid, rotation: Tensor) -> Tensor:
    """Return what `inkdask.models.timesformer.mix` does, ``(b, t, h e)`` from ``(b, t, 3 h e)``.

    ``rotation`` has cosines and sines of the places in a row, float32 ``(2, f or n, e)``.
    """
    b, tokens, width = qkv.shape
    e = width // (3 * heads)
    length, rows = grid if axis == 1 else grid[::-1]
    block = max(BLOCK, triton.next_power_of_2(length))
    groups = triton.cdiv(rows, block // length)
    out = qkv.new_empty(b, tokens, heads * e)
    _attend_in_rows[(b * groups * heads,)](
        qkv, rotation, out, axis, rows, length, heads, e, block, num_warps=block // 16
    )
    _attend_class_token[(b * heads,)](qkv, out, tokens, heads, e, 128, num_warps=4)
    return out


def add_norm(x: Tensor, share: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Add a share to float32 tokens ``(b, t, d)`` in place, and return the normalised tokens.

    The result has the dtype of the share.
    """
    y, d = torch.empty_like(share), x.shape[-1]
    _add_norm[(x.numel() // d,)](
        x, share, norm.weight, norm.bias, y, norm.eps, d, triton.next_power_of_2(d), num_warps=4
    )
    return y


def geglu(x: Tensor) -> Tensor:
    """Return gated values ``(b, t, c)`` of values and their gates, ``(b, t, 2 c)``."""
    c = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], c)
    _geglu[(out.numel() // c,)](x, out, c, triton.next_power_of_2(c), num_warps=8)
    return out


def gather(
    block: Tensor, at: Tensor, tile: int, clip: float, divisor: float, dtype: torch.dtype
) -> Tensor:
    """Return tiles ``(b, 1, z, tile, tile)`` of ``min(voxel, clip) / divisor`` for the network.

    ``block`` has the voxels, contiguous uint8 ``(z, h, w)``. ``at`` has the first row and column of
    each tile, contiguous int64 ``(b, 2)``. The formula is computed in float32.
    """
    z, h, w = block.shape
    out = torch.empty(len(at), 1, z, tile, tile, dtype=dtype, device=block.device)
    grid = len(at), triton.cdiv(z * tile * tile, 2048)
    _gather[grid](block, at, out, z, h, w, clip, divisor, tile, 2048, num_warps=4)
    return out


@triton.jit
def _attend_in_rows(
    qkv, rotation, out, AXIS: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr,
    HEADS: tl.constexpr, E: tl.constexpr, B: tl.constexpr,
):  # fmt: skip
    # One head of all rows that fit a block: patches attend to their row and to the class token.
    W: tl.constexpr = HEADS * E
    TOKENS: tl.constexpr = 1 + ROWS * LENGTH
    FIT: tl.constexpr = B // LENGTH
    GROUPS: tl.constexpr = (ROWS + FIT - 1) // FIT
    program = tl.program_id(0)
    head, group = program % HEADS, program // HEADS % GROUPS
    tile = (program // (HEADS * GROUPS)).to(tl.int64)  # because a batch may pass 2^31 elements
    i, e = tl.arange(0, B), tl.arange(0, E)
    row, place = group * FIT + i // LENGTH, i % LENGTH
    token = 1 + (place * ROWS + row if AXIS == 1 else row * LENGTH + place)
    inside = ((i < FIT * LENGTH) & (row < ROWS))[:, None]
    first = qkv + tile * (TOKENS * 3 * W) + head * E + e
    at = first[None] + token[:, None] * (3 * W)
    q = tl.load(at, mask=inside, other=0)
    k = tl.load(at + W, mask=inside, other=0)
    v = tl.load(at + 2 * W, mask=inside, other=0)
    angle = rotation + place[:, None] * E + e[None]
    cos, sin = tl.load(angle), tl.load(angle + LENGTH * E)
    q = _rotate(q, cos, sin)
    # Masked again, because Triton would else rotate all keys in every warp, and spill registers.
    k = tl.where(inside, _rotate(k, cos, sin), 0)
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * E**-0.5
    scores = tl.where(row[:, None] == row[None], scores, float("-inf"))
    k0, v0 = tl.load(first + W).to(tl.float32), tl.load(first + 2 * W).to(tl.float32)
    score0 = tl.sum(q.to(tl.float32) * k0[None], 1) * E**-0.5
    top = tl.maximum(tl.max(scores, 1), score0)
    p, p0 = tl.exp(scores - top[:, None]), tl.exp(score0 - top)
    values = tl.dot(p.to(v.dtype), v, input_precision="ieee") + p0[:, None] * v0[None]
    values = values / (tl.sum(p, 1) + p0)[:, None]
    to = out + tile * (TOKENS * W) + head * E + token[:, None] * W + e[None]
    tl.store(to, values.to(v.dtype), mask=inside)


@triton.jit
def _rotate(x, cos, sin):
    # Every pair of neighbours; the first of each has the negative sine.
    one, other = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    swapped = tl.reshape(tl.join(other, one), (x.shape[0], x.shape[1]))
    return (x.to(tl.float32) * cos + swapped.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _attend_class_token(qkv, out, tokens, HEADS: tl.constexpr, E: tl.constexpr, B: tl.constexpr):
    # One head of the class token, which attends to all tokens, B at a time.
    W: tl.constexpr = HEADS * E
    head, tile = tl.program_id(0) % HEADS, (tl.program_id(0) // HEADS).to(tl.int64)
    e = tl.arange(0, E)
    first = qkv + tile * (tokens * 3 * W) + head * E + e
    q = tl.load(first).to(tl.float32) * E**-0.5
    top, total, values = float("-inf"), 0.0, tl.zeros((E,), tl.float32)
    for start in range(0, tokens, B):
        token = start + tl.arange(0, B)
        inside = token < tokens
        at = first[None] + token[:, None] * (3 * W)
        k = tl.load(at + W, mask=inside[:, None], other=0).to(tl.float32)
        v = tl.load(at + 2 * W, mask=inside[:, None], other=0).to(tl.float32)
        scores = tl.where(inside, tl.sum(k * q[None], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        p, kept = tl.exp(scores - higher), tl.exp(top - higher)
        total = total * kept + tl.sum(p, 0)
        values = values * kept + tl.sum(p[:, None] * v, 0)
        top = higher
    tl.store(out + tile * (tokens * W) + head * E + e, (values / total).to(out.dtype.element_ty))


@triton.jit
def _add_norm(x, share, weight, bias, y, eps, D: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    inside = i < D
    at = tl.program_id(0).to(tl.int64) * D + i
    token = tl.load(x + at, mask=inside, other=0)
    token += tl.load(share + at, mask=inside, other=0).to(tl.float32)
    tl.store(x + at, token, mask=inside)
    token = tl.where(inside, token - tl.sum(token, 0) / D, 0)
    token *= tl.rsqrt(tl.sum(token * token, 0) / D + eps)
    token *= tl.load(weight + i, mask=inside, other=0)
    token += tl.load(bias + i, mask=inside, other=0)
    tl.store(y + at, token.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _geglu(x, out, C: tl.constexpr, B: tl.constexpr):
    i = tl.arange(0, B)
    inside = i < C
    token = tl.program_id(0).to(tl.int64)
    value = tl.load(x + token * (2 * C) + i, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x + token * (2 * C) + C + i, mask=inside, other=0).to(tl.float32)
    gate *= 0.5 + 0.5 * tl.erf(gate * 0.5**0.5)
    tl.store(out + token * C + i, (value * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["h", "w"])
def _gather(block, at, out, z, h, w, clip, divisor, T: tl.constexpr, B: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    inside = i < z * (T * T)
    # Rows and columns are int64, as `at` is, because a block may have more than 2^31 voxels.
    y, x = tl.load(at + 2 * tile) + i // T % T, tl.load(at + 2 * tile + 1) + i % T
    voxel = tl.load(block + (i // (T * T) * h + y) * w + x, mask=inside, other=0).to(tl.float32)
    voxel = tl.div_rn(tl.minimum(voxel, clip), divisor)  # rounds as on a CPU
    tl.store(out + tile * z * (T * T) + i, voxel.to(out.dtype.element_ty), mask=inside)
