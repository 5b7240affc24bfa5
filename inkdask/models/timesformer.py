"""TimeSformer with divided space-time attention, as trained for ink detection.

Reference: Bertasius, Wang and Torresani, "Is Space-Time Attention All You Need for Video
Understanding?", ICML 2021 (arXiv:2102.05095), in the layout of the package `timesformer-pytorch`.
The layers of a surface volume take the place of the frames of a video.

Parameters carry the names of that package. Checkpoints have these names behind the prefix
``backbone.``, except ``normalization.``, which stands without a prefix.

The network gives the logits of that package, up to rounding, with 10 % less work:

- Only the class token leaves the network, so the last layer computes its feed-forward and output
  projection for one token of 417. One query alone needs the keys and values of its spatial
  attention, so they are never formed: ``q . (K x) = (K^T q) . x``.
- Attention runs fused (but see `attend_by_products`). Its tensors are views in the order of the
  tokens, except where the key of the class token joins a row of keys.

Overlapping tiles could share the embedding, time attention and spatial keys of a patch in the first
block. Left out, because it saves 3.9 % at most and needs a second way through the network.

Axes: b tiles, t tokens (the class token and all patches), f frames, n patches of a frame (y x), h
heads, e width of a head, d width of a token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

Grid = tuple[int, int]  # f, n
Rotation = tuple[Tensor, Tensor]  # cosines and sines that broadcast against (b, f, n, h, e)

MOST_ROWS = 65535  # in one call of a fused kernel, because a GPU's grid has no more on its y axis


class TimeSformer(nn.Module):
    """Logits of a tile from patches of its layers.

    Parameters
    ----------
    layers
        Number of layers (the frames) of a tile.
    tile, patch
        Sides of a tile and of a patch, in pixels. No weight depends on the tile's.
    dim, depth, heads, head_dim
        Width of a token, number of blocks, number of attention heads and their width.
    normalization
        Whether the input passes a batch norm first, as in some checkpoints.
    k
        Side of the square of logits, which the class token gives. Default: a logit for each patch.
    """

    def __init__(
        self,
        layers: int = 26,
        tile: int = 64,
        patch: int = 16,
        dim: int = 512,
        depth: int = 8,
        heads: int = 6,
        head_dim: int = 64,
        normalization: bool = False,
        k: int | None = None,
    ) -> None:
        super().__init__()
        if tile % patch:
            raise ValueError(f"a tile of {tile} pixels is no whole number of patches of {patch}")
        self.shape = layers, tile // patch, patch  # f, patches a side, pixels a side
        self.k, self.heads = k or tile // patch, heads
        self.attention_dtype: torch.dtype | None = None  # None for that of the tiles
        self.normalization = nn.BatchNorm3d(1) if normalization else nn.Identity()
        self.to_patch_embedding = Linear(patch * patch, dim)
        self.cls_token = nn.Parameter(torch.randn(1, dim))
        self.frame_rot_emb = FrameRotation(head_dim)
        self.image_rot_emb = ImageRotation(head_dim)
        self.layers = nn.ModuleList(Block(dim, heads, head_dim) for _ in range(depth - 1))
        self.layers.append(LastBlock(dim, heads, head_dim))
        self.to_out = nn.Sequential(nn.LayerNorm(dim), Linear(dim, self.k * self.k))

    def forward(self, x: Tensor) -> Tensor:
        """Return logits ``(b, 1, k, k)`` of tiles ``(b, 1, layers, tile, tile)``."""
        dtype = self.attention_dtype or x.dtype
        f, g, p = self.shape
        frames = self.frame_rot_emb(f, self.heads, dtype)
        places = self.image_rot_emb(g, self.heads, dtype)
        patches = rearrange(self.normalization(x), "b 1 f (y p) (x q) -> b (f y x) (p q)", p=p, q=p)
        first = repeat(self.cls_token, "1 d -> b 1 d", b=len(x))
        x = torch.cat((first, self.to_patch_embedding(patches)), dim=1)
        x = x.float()  # because blocks add small shares, which bfloat16 would round away
        for block in self.layers:
            x = block(x, (f, g * g), frames, places)
        return rearrange(self.to_out(x), "b 1 (y x) -> b 1 y x", y=self.k)


class Linear(nn.Linear):
    """A linear layer that converts its input to the dtype of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out)`` from ``(..., in)``."""
        return super().forward(x.to(self.weight.dtype))


class Residual(nn.Module):
    """A function of normalised tokens, added to the tokens."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Add the function to tokens ``(b, t, d)`` in place, and return them."""
        return x.add_(self.share(x, *args))

    def share(self, x: Tensor, *args: Any) -> Tensor:
        """Return the function of tokens ``(b, t, d)``, which stay as they are."""
        return self.fn(self.norm(x), *args)


class Attention(nn.Module):
    """Attention within rows of patches and the class token; the class token sees all tokens.

    A row is one axis of the patches ``(b, f, n)``: 1 for time, 2 for space.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, axis: int) -> None:
        super().__init__()
        self.heads, self.width, self.axis = heads, heads * head_dim, axis
        self.to_qkv = Linear(dim, 3 * self.width, bias=False)
        self.to_out = nn.Sequential(Linear(self.width, dim))

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation) -> Tensor:
        """Return ``(b, t, d)`` from the same; ``grid`` is ``(f, n)``."""
        return self.to_out(mix(self.to_qkv(x), self.heads, self.axis, grid, rotation))


class ClassTokenAttention(Attention):
    """Attention of the class token alone, which forms no keys and values of the patches."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return ``(b, 1, d)`` from ``(b, t, d)``; the class token needs no rotation."""
        w_q, w_k, w_v = rearrange(
            self.to_qkv.weight, "(qkv h e) d -> qkv h e d", qkv=3, h=self.heads
        )
        x = x.to(w_q.dtype)
        q = torch.einsum("bd,hed->bhe", x[:, 0], w_q)
        q = torch.einsum("bhe,hed->bhd", q, w_k)  # so that the tokens themselves are the keys
        scale = (self.width // self.heads) ** -0.5
        x = x[:, None]
        seen = F.scaled_dot_product_attention(q[:, None], x, x, scale=scale)
        values = torch.einsum("bnhd,hed->bnhe", seen, w_v)
        return self.to_out(rearrange(values, "b n h e -> b n (h e)"))


def mix(qkv: Tensor, heads: int, axis: int, grid: Grid, rotation: Rotation) -> Tensor:
    """Return the values that `Attention` mixes, ``(b, t, h e)`` from ``(b, t, 3 h e)``.

    Parameters
    ----------
    qkv
        Queries, keys and values of all tokens, in the dtype of the result.
    heads, axis
        Number of heads; axis of rows, 1 or 2.
    grid, rotation
        ``(f, n)``; rotations of the patches by their place on that axis.
    """
    f, n = grid
    q, k, v = rearrange(qkv, "b t (qkv h e) -> qkv b t h e", qkv=3, h=heads)
    token = attend(q[:, :1], k, v).flatten(2)

    # Keys and values of the class token join every row. Only patches are rotated.
    one_a_row = (-1, 1, n, -1, -1) if axis == 1 else (-1, f, 1, -1, -1)
    first_k, first_v = (x[:, :1, None].expand(one_a_row) for x in (k, v))
    q, k, v = rearrange(qkv[:, 1:], "b (f n) (qkv h e) -> qkv b f n h e", f=f, qkv=3, h=heads)
    q = rotate(q, rotation)
    k = torch.cat((first_k, rotate(k, rotation)), axis)
    v = torch.cat((first_v, v), axis)

    # The axis that is no row joins the heads or the tiles, so that every tensor stays a view.
    rows = "b f (n h) e" if axis == 1 else "(b f) n h e"
    patches = attend(*(rearrange(x, f"b f n h e -> {rows}") for x in (q, k, v)))
    patches = rearrange(patches, f"{rows} -> b (f n) (h e)", f=f, n=n, h=heads)
    return torch.cat((token, patches), 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of ``(b, t, h, e)``, in the same shape as ``q``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.dtype is torch.bfloat16 and q.device.type == "cpu":
        return attend_by_products(q, k, v).transpose(1, 2)
    parts = zip(*(x.split(MOST_ROWS) for x in (q, k, v)), strict=True)
    some = [F.scaled_dot_product_attention(*part) for part in parts]
    return (some[0] if len(some) == 1 else torch.cat(some)).transpose(1, 2)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Return the attention of ``(b, h, t, e)``, in products of many small matrices.

    In bfloat16 on a CPU this is twice as fast as the fused kernel, which is made for long rows of
    float32.
    """
    batch = q.shape[:2]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    if q.shape[1] == 1:  # so that the longest rows need no transposed copy
        scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2)
    else:
        scores = torch.bmm(q.contiguous(), k.contiguous().transpose(1, 2))
    scores = scores.float().mul_(q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, batch)


class FeedForward(nn.Module):
    """A gated feed-forward, ``d -> 2 x 4 d -> d`` (GEGLU; Shazeer, arXiv:2002.05202)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Checkpoints count the activation and the dropout as layers 1 and 2.
        self.net = nn.ModuleList(
            [Linear(dim, 8 * dim), nn.Identity(), nn.Identity(), Linear(4 * dim, dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, t, d)`` from the same."""
        expand: Any = self.net[0]
        x = x.to(expand.weight.dtype)
        # Two products, because a contiguous result lets a compiler fuse the activation.
        halves = zip(expand.weight.chunk(2), expand.bias.chunk(2), strict=True)
        value, gate = (F.linear(x, weight, bias) for weight, bias in halves)
        return self.net[3](F.gelu(gate).mul_(value))


class Block(nn.ModuleList):
    """Attention over time, attention over space, feed-forward: 0, 1 and 2 in a checkpoint."""

    space_attention = Attention

    def __init__(self, dim: int, heads: int, head_dim: int) -> None:
        time = Attention(dim, heads, head_dim, axis=1)
        space = self.space_attention(dim, heads, head_dim, axis=2)
        super().__init__(Residual(dim, fn) for fn in (time, space, FeedForward(dim)))

    def forward(self, x: Tensor, grid: Grid, frames: Rotation, places: Rotation) -> Tensor:
        """Return the next tokens, ``(b, t, d)``."""
        time, space, feed_forward = self
        return feed_forward(space(time(x, grid, frames), grid, places))


class LastBlock(Block):
    """The last block, which computes the class token alone."""

    space_attention = ClassTokenAttention

    def forward(self, x: Tensor, grid: Grid, frames: Rotation, places: Rotation) -> Tensor:
        """Return the class token ``(b, 1, d)`` of tokens ``(b, t, d)``."""
        space: Any
        time, space, feed_forward = self
        x = time(x, grid, frames)
        return feed_forward(x[:, :1] + space.share(x))


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864): frequencies to rotations."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # Frequencies stay float32, because in bfloat16 the angle of the 26th frame would be off by
        # 0.1 radian.
        return super()._apply(lambda t: fn(t) if t.is_meta else t.to(fn(t).device), recurse)


class FrameRotation(Rotary):
    """Rotations of the frames."""

    inv_freqs: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.register_buffer("inv_freqs", 1e4 ** (-torch.arange(0, head_dim, 2) / head_dim))

    def forward(self, f: int, heads: int, dtype: torch.dtype) -> Rotation:
        """Return the rotations ``(f, 1, h, e)`` of ``f`` frames."""
        angles = torch.outer(torch.arange(f, device=self.inv_freqs.device), self.inv_freqs)
        # End to end and not pair by pair, because checkpoints were trained so.
        return as_rotation(repeat(angles, "f e -> f 1 (twice e)", twice=2), heads, dtype)


class ImageRotation(Rotary):
    """Rotations of the patches of a frame: half of a head turns with y, the other half with x."""

    scales: Tensor

    def __init__(self, head_dim: int, max_frequency: float = 10) -> None:
        super().__init__()
        octaves = torch.linspace(0, math.log2(max_frequency / 2), head_dim // 4)
        self.register_buffer("scales", 2**octaves)

    def forward(self, g: int, heads: int, dtype: torch.dtype) -> Rotation:
        """Return the rotations ``(n, h, e)`` of ``g x g`` patches."""
        at = torch.linspace(-1, 1, g, device=self.scales.device)
        angles = torch.outer(at, self.scales) * math.pi
        y, x = repeat(angles, "y e -> y x e", x=g), repeat(angles, "x e -> y x e", y=g)
        angles = repeat(torch.cat((y, x), dim=-1), "y x e -> (y x) (e twice)", twice=2)
        return as_rotation(angles, heads, dtype)


def as_rotation(angles: Tensor, heads: int, dtype: torch.dtype) -> Rotation:
    """Return cosines and sines ``(..., h, e)`` of angles ``(..., e)``, the same for each head.

    The sine of the first of every pair is negative, as `rotate` wants it.
    """
    # Made on the device, because a GPU would wait for numbers that come from Python.
    signs = torch.arange(angles.shape[-1], device=angles.device, dtype=angles.dtype) % 2 * 2 - 1
    parts = (part.to(dtype) for part in (angles.cos(), angles.sin() * signs))
    # Copied for every head, because a CPU is slow at broadcasting rows as short as a head.
    cos, sin = (repeat(part, "... e -> ... h e", h=heads).contiguous() for part in parts)
    return cos, sin


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every pair of neighbours along the last axis, ``(b, f, n, h, e)``."""
    cos, sin = rotation
    return (x * cos).addcmul_(swap_pairs(x), sin)


def swap_pairs(x: Tensor) -> Tensor:
    """Swap every pair of neighbours along the last axis."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu":
        pairs = x.view(torch.int32)  # because swapping halves of an integer takes half the time
        return (pairs << 16).bitwise_or_((pairs >> 16).bitwise_and_(0xFFFF)).view(x.dtype)
    return torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def ink_timesformer(
    layers: int = 26, tile: int = 64, normalization: bool = False, k: int = 4, **_: Any
) -> TimeSformer:
    """Build the trained size: dim 512, depth 8, 6 heads, 37.9 million parameters."""
    return TimeSformer(layers, tile, normalization=normalization, k=k)
