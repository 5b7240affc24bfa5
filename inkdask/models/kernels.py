"""TimeSformer on an NVIDIA GPU: its attention, norms and gates as kernels of their own, in Triton.

Between two products of matrices a GPU waits for memory, so each kernel reads its input once and
writes its result once. Nothing is kept of rotated queries and keys, of rows with the class token,
and of scores. The logits are those of `inkdask.models.timesformer` up to rounding: the kernels
compute in float32 and round only what they write, and the operands of products.

Triton builds a kernel at its first call, in less than a second, and keeps it on disk. So these
kernels serve jobs that are too short for a compiler.

Axes have the letters of `inkdask.models.timesformer`. Names in capitals are constants of a kernel:
W is the width ``h e``; L, B, D and C are lengths of blocks, powers of two.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from einops import rearrange, repeat
from torch import Tensor, nn

from inkdask.models.timesformer import Grid, TimeSformer

LONGEST_ROW = 128  # because a row's scores stay in registers
HEAD_WIDTHS = 16, 32, 64, 128


class FusedTimeSformer(nn.Module):
    """A TimeSformer for inference that runs these kernels.

    Parameters
    ----------
    network
        Network with its weights, on its device and in its dtype. Its modules are shared.

    Raises
    ------
    ValueError
        For more frames, patches a frame, or another width of heads than the kernels take.
    """

    frames: Tensor
    places: Tensor

    def __init__(self, network: TimeSformer) -> None:
        super().__init__()
        f, g, _ = network.shape
        if max(f, g * g) > LONGEST_ROW:
            raise ValueError(
                f"{f} frames of {g * g} patches are more than the {LONGEST_ROW} of a kernel's row"
            )
        self.network, self.k = network, network.k
        frames = torch.stack(network.frame_rot_emb(f, 1, torch.float32))
        places = torch.stack(network.image_rot_emb(g, 1, torch.float32))
        if (e := frames.shape[-1]) not in HEAD_WIDTHS:
            raise ValueError(f"heads are {e} wide, and the kernels take {HEAD_WIDTHS}")
        self.register_buffer("frames", frames.view(2, f, e), persistent=False)
        self.register_buffer("places", places.view(2, g * g, e), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, k, k)`` of tiles ``(b, 1, f, t, t)`` in the dtype of weights."""
        network = self.network
        f, g, p = network.shape
        grid = f, g * g

        def attended(attention: Any, y: Tensor, rotation: Tensor) -> Tensor:
            qkv = attention.to_qkv(y)
            return attention.to_out(mix(qkv, attention.heads, attention.axis, grid, rotation))

        patches = rearrange(
            network.normalization(x), "b 1 f (y p) (x q) -> b (f y x) (p q)", p=p, q=p
        )
        first = repeat(network.cls_token, "1 d -> b 1 d", b=len(x))
        share = torch.cat((first, network.to_patch_embedding(patches)), 1)
        x = torch.zeros_like(share, dtype=torch.float32)  # the tokens; each share is added to them
        blocks: list[Any] = list(network.layers)
        for time, space, feed_forward in blocks[:-1]:
            share = attended(time.fn, add_norm(x, share, time.norm), self.frames)
            share = attended(space.fn, add_norm(x, share, space.norm), self.places)
            expand, _, _, shrink = feed_forward.fn.net
            share = shrink(geglu(expand(add_norm(x, share, feed_forward.norm))))
        time, space, feed_forward = blocks[-1]
        share = attended(time.fn, add_norm(x, share, time.norm), self.frames)
        y = add_norm(x, share, space.norm)
        logits = network.to_out(feed_forward(x[:, :1] + space.fn(y)))
        return rearrange(logits, "b 1 (y x) -> b 1 y x", y=self.k)


def mix(qkv: Tensor, heads: int, axis: int, grid: Grid, rotation: Tensor) -> Tensor:
    """Return what `inkdask.models.timesformer.mix` does, ``(b, t, h e)`` from ``(b, t, 3 h e)``.

    Parameters
    ----------
    qkv
        Queries, keys and values of all tokens, contiguous, in the dtype of the result.
    heads, axis
        Number of heads; axis of rows, 1 or 2.
    grid, rotation
        ``(f, n)``; cosines and sines of the places on that axis, float32 ``(2, f or n, e)``.
    """
    b, tokens, width = qkv.shape
    e = width // (3 * heads)
    rows, length = grid if axis == 2 else grid[::-1]
    block = max(16, triton.next_power_of_2(length))  # 16 is the least that products take
    out = qkv.new_empty(b, tokens, heads * e)
    _attend_in_rows[(b * rows * heads,)](
        qkv, rotation, out, axis, rows, length, heads, e, block,
        num_warps={16: 1, 128: 8}.get(block, 4),
    )  # fmt: skip
    _attend_class_token[(b * heads,)](qkv, out, tokens, heads, e, 128, num_warps=4)
    return out


def add_norm(x: Tensor, share: Tensor, norm: nn.LayerNorm) -> Tensor:
    """Add a share to tokens ``(b, t, d)`` in place, and return the normalised tokens.

    Tokens are float32. The share and the result have the dtype of the weights. Both are contiguous.
    """
    y = torch.empty_like(share)
    d = x.shape[-1]
    block = triton.next_power_of_2(d)
    _add_norm[(x.numel() // d,)](
        x, share, norm.weight, norm.bias, y, norm.eps, d, block, num_warps=4
    )
    return y


def geglu(x: Tensor) -> Tensor:
    """Return the gated values ``(b, t, c)`` of values and gates, contiguous ``(b, t, 2 c)``."""
    c = x.shape[-1] // 2
    out = x.new_empty(*x.shape[:-1], c)
    _geglu[(out.numel() // c,)](x, out, c, triton.next_power_of_2(c), num_warps=8)
    return out


def gather(
    block: Tensor, at: Tensor, tile: int, clip: float, divisor: float, dtype: torch.dtype
) -> Tensor:
    """Return tiles of a block for the network, ``(b, 1, z, tile, tile)``.

    Parameters
    ----------
    block
        Voxels, contiguous uint8 ``(z, h, w)``.
    at
        First row and column of each tile, contiguous int64 ``(b, 2)``.
    tile
        Side of a tile in pixels.
    clip, divisor
        A voxel becomes ``min(voxel, clip) / divisor``, computed in float32.
    dtype
        Dtype of the result.
    """
    z, h, w = block.shape
    out = torch.empty(len(at), 1, z, tile, tile, dtype=dtype, device=block.device)
    some = 2048
    grid = len(at), triton.cdiv(z * tile * tile, some)
    _gather[grid](block, at, out, z, h, w, clip, divisor, tile, some, num_warps=4)
    return out


@triton.jit
def _attend_in_rows(
    qkv, rotation, out,
    AXIS: tl.constexpr, ROWS: tl.constexpr, LENGTH: tl.constexpr,
    HEADS: tl.constexpr, E: tl.constexpr, L: tl.constexpr,
):  # fmt: skip
    """Let the patches of one row attend to each other and to the class token, in one head."""
    W: tl.constexpr = HEADS * E
    TOKENS: tl.constexpr = 1 + ROWS * LENGTH
    program = tl.program_id(0)
    head, row = program % HEADS, program // HEADS % ROWS
    tile = (program // (HEADS * ROWS)).to(tl.int64)  # because a batch has more than 2^31 bytes
    i, e = tl.arange(0, L), tl.arange(0, E)
    token = 1 + (i * ROWS + row if AXIS == 1 else row * LENGTH + i)
    inside = (i < LENGTH)[:, None]
    first = qkv + tile * (TOKENS * 3 * W) + head * E + e
    at = first[None] + token[:, None] * (3 * W)
    q = tl.load(at, mask=inside, other=0)
    k = tl.load(at + W, mask=inside, other=0)
    v = tl.load(at + 2 * W, mask=inside, other=0)
    place = rotation + i[:, None] * E + e[None]
    cos = tl.load(place, mask=inside, other=0)
    sin = tl.load(place + LENGTH * E, mask=inside, other=0)
    q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
    scale: tl.constexpr = E**-0.5
    scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    scores = tl.where((i < LENGTH)[None], scores, float("-inf"))
    k0, v0 = tl.load(first + W).to(tl.float32), tl.load(first + 2 * W).to(tl.float32)
    score0 = tl.sum(q.to(tl.float32) * k0[None], 1) * scale  # of the class token
    top = tl.maximum(tl.max(scores, 1), score0)
    p, p0 = tl.exp(scores - top[:, None]), tl.exp(score0 - top)
    values = tl.dot(p.to(v.dtype), v, input_precision="ieee") + p0[:, None] * v0[None]
    values = values / (tl.sum(p, 1) + p0)[:, None]
    to = out + tile * (TOKENS * W) + head * E + token[:, None] * W + e[None]
    tl.store(to, values.to(v.dtype), mask=inside)


@triton.jit
def _rotate(x, cos, sin):
    """Rotate every pair of neighbours along the last axis; see `timesformer.as_rotation`."""
    one, other = tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    swapped = tl.reshape(tl.join(other, one), (x.shape[0], x.shape[1]))
    return (x.to(tl.float32) * cos + swapped.to(tl.float32) * sin).to(x.dtype)


@triton.jit
def _attend_class_token(
    qkv, out, TOKENS: tl.constexpr, HEADS: tl.constexpr, E: tl.constexpr, B: tl.constexpr
):
    """Let the class token attend to all tokens, in one head and B tokens at a time."""
    W: tl.constexpr = HEADS * E
    program = tl.program_id(0)
    head, tile = program % HEADS, (program // HEADS).to(tl.int64)
    e = tl.arange(0, E)
    first = qkv + tile * (TOKENS * 3 * W) + head * E + e
    q = tl.load(first).to(tl.float32) * E**-0.5
    top = float("-inf")
    total = 0.0
    values = tl.zeros((E,), tl.float32)
    for start in range(0, TOKENS, B):
        token = start + tl.arange(0, B)
        inside = token < TOKENS
        at = first[None] + token[:, None] * (3 * W)
        k = tl.load(at + W, mask=inside[:, None], other=0).to(tl.float32)
        v = tl.load(at + 2 * W, mask=inside[:, None], other=0).to(tl.float32)
        scores = tl.where(inside, tl.sum(k * q[None], 1), float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 0))
        p, kept = tl.exp(scores - higher), tl.exp(top - higher)
        total = total * kept + tl.sum(p, 0)
        values = values * kept + tl.sum(p[:, None] * v, 0)
        top = higher
    to = out + tile * (TOKENS * W) + head * E + e
    tl.store(to, (values / total).to(out.dtype.element_ty))


@triton.jit
def _add_norm(x, share, weight, bias, y, eps, D: tl.constexpr, B: tl.constexpr):
    """Add its share to one token, and normalise the token."""
    i = tl.arange(0, B)
    inside = i < D
    at = tl.program_id(0).to(tl.int64) * D + i
    token = tl.load(x + at, mask=inside, other=0)
    token += tl.load(share + at, mask=inside, other=0).to(tl.float32)
    tl.store(x + at, token, mask=inside)
    centred = tl.where(inside, token - tl.sum(token, 0) / D, 0)
    scale = tl.rsqrt(tl.sum(centred * centred, 0) / D + eps)
    w, b = tl.load(weight + i, mask=inside, other=0), tl.load(bias + i, mask=inside, other=0)
    tl.store(y + at, (centred * scale * w + b).to(y.dtype.element_ty), mask=inside)


@triton.jit
def _geglu(x, out, C: tl.constexpr, B: tl.constexpr):
    """Multiply the values of one token with its gates."""
    i = tl.arange(0, B)
    inside = i < C
    token = tl.program_id(0).to(tl.int64)
    value = tl.load(x + token * (2 * C) + i, mask=inside, other=0).to(tl.float32)
    gate = tl.load(x + token * (2 * C) + C + i, mask=inside, other=0).to(tl.float32)
    gate *= 0.5 + 0.5 * tl.erf(gate * 0.5**0.5)
    tl.store(out + token * C + i, (value * gate).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["h", "w"])
def _gather(block, at, out, z, h, w, clip, divisor, T: tl.constexpr, B: tl.constexpr):
    """Cut B voxels of one tile."""
    tile = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * B + tl.arange(0, B)
    inside = i < z * (T * T)
    y = tl.load(at + 2 * tile) + i // T % T
    x = tl.load(at + 2 * tile + 1) + i % T
    layer = (i // (T * T)).to(tl.int64)  # because a block may have more than 2^31 voxels
    voxel = tl.load(block + (layer * h + y) * w + x, mask=inside, other=0).to(tl.float32)
    voxel = tl.div_rn(tl.minimum(voxel, clip), divisor)
    tl.store(out + tile * z * (T * T) + i, voxel.to(out.dtype.element_ty), mask=inside)
