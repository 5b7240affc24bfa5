"""TimeSformer with divided space-time attention, as trained for ink detection.

Reference: Bertasius, Wang and Torresani, "Is Space-Time Attention All You Need for Video
Understanding?", ICML 2021 (arXiv:2102.05095), in the layout of the package `timesformer-pytorch`.
The layers of a surface volume take the place of the frames of a video.

Parameters carry the names of that package, so the names in a checkpoint are these names behind
the prefix ``backbone.`` (``normalization.`` stands without a prefix).

The result is that package's, up to rounding, with less work:

- Only the class token leaves the network, so the last layer computes its feed-forward and output
  projection for one token of 417. The keys and values of its spatial attention are needed by one
  query alone, so they are never formed: ``q . (K x) = (K^T q) . x``. Together 10 % of all work.
- Attention runs fused (but see `attend_by_products`), and every tensor it reads or writes is a view
  in the order of the tokens, save where the class token's key joins a row of keys.

Not done: tiles that overlap could share what depends on a patch alone (its embedding, its time
attention and spatial keys in the first block). Measured, that is 3.9 % at the very most, and less
with borders, for a second way through the network.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Grid = tuple[int, int]  # f, n
Rotation = tuple[Tensor, Tensor]  # cos and sin, to broadcast against (b, f, n, h, e), h in full

MOST_ROWS = 65535  # in one call of a fused kernel: a GPU's grid has no more in its second axis


class TimeSformer(nn.Module):
    """Logits of a tile from tokens that are patches of its layers.

    Parameters
    ----------
    layers
        Number of layers (the frames) of a tile.
    tile, patch
        Sides of a tile and of a patch, in pixels. Each of the ``k x k`` patches gets a logit.
    dim, depth, heads, head_dim
        Width of a token, number of blocks, number of attention heads and their width.
    normalization
        Whether the input passes a batch norm first, as in some checkpoints.
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
    ) -> None:
        super().__init__()
        if tile % patch:
            raise ValueError(f"a tile of {tile} pixels is no whole number of patches of {patch}")
        self.shape = layers, tile // patch, patch  # f, g, p
        self.k, self.heads = tile // patch, heads
        self.attention_dtype: torch.dtype | None = None  # None: that of the tiles
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
        b, dtype = len(x), self.attention_dtype or x.dtype
        f, g, p = self.shape  # frames, patches a side, pixels a side
        grid = f, g * g  # f, n: a frame has n patches
        x = self.normalization(x).view(b, f, g, p, g, p)
        patches = x.transpose(3, 4).reshape(b, f * g * g, p * p)
        x = torch.cat((self.cls_token.expand(b, 1, -1), self.to_patch_embedding(patches)), dim=1)
        x = x.float()  # in which tokens add up, so that no block's share is lost
        frames = self.frame_rot_emb(f, self.heads, dtype)
        places = self.image_rot_emb(g, self.heads, dtype)
        for block in self.layers:
            x = block(x, grid, frames, places)  # (b, 1 + f n, d), and (b, 1, d) from the last
        return self.to_out(x).view(b, 1, self.k, self.k)


class Linear(nn.Linear):
    """A linear layer that reads any dtype, and computes in that of its weights."""

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(..., out)`` from ``(..., in)``."""
        return super().forward(x.to(self.weight.dtype))


class Residual(nn.Module):
    """A layer norm and the function that reads its output, whose result is added to the tokens."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.fn = fn

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        """Return ``x``, ``(b, tokens, d)``, to which it has been added in place."""
        return x.add_(self.share(x, *args))

    def share(self, x: Tensor, *args: Any) -> Tensor:
        """Return the function of the normalised ``x``, ``(b, tokens, d)``, which stays as it is."""
        return self.fn(self.norm(x), *args)


class Attention(nn.Module):
    """Attention in rows of patches that all see the class token, which itself sees everything.

    A row is one axis of the patches ``(b, f, n)``: 1 is time, 2 is space.
    """

    def __init__(self, dim: int, heads: int, head_dim: int, axis: int) -> None:
        super().__init__()
        self.heads, self.width, self.axis = heads, heads * head_dim, axis
        self.to_qkv = Linear(dim, 3 * self.width, bias=False)
        self.to_out = nn.Sequential(Linear(self.width, dim))

    def forward(self, x: Tensor, grid: Grid, rotation: Rotation) -> Tensor:
        """Return ``(b, 1 + f n, d)`` from the same; ``grid`` is ``(f, n)``."""
        return self.to_out(mix(self.to_qkv(x), self.heads, self.axis, grid, rotation))


class ClassTokenAttention(Attention):
    """The same for the class token alone, without forming the keys and values of the patches."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return ``(b, 1, d)`` from ``(b, 1 + f n, d)``; nothing is rotated for a class token."""
        w_q, w_k, w_v = self.to_qkv.weight.unflatten(0, (3, self.heads, -1))  # (h, e, d)
        x = x.to(w_q.dtype)
        q = torch.einsum("bd,hed->bhe", x[:, 0], w_q)
        q = torch.einsum("bhe,hed->bhd", q, w_k)  # queries for the tokens themselves, one a head
        scale = (self.width // self.heads) ** -0.5
        x = x[:, None]
        seen = F.scaled_dot_product_attention(q[:, None], x, x, scale=scale)  # (b, 1, h, d)
        return self.to_out(torch.einsum("bnhd,hed->bnhe", seen, w_v).flatten(2))


def mix(qkv: Tensor, heads: int, axis: int, grid: Grid, rotation: Rotation) -> Tensor:
    """The values of `Attention`, ``(b, 1 + f n, h e)``, from ``(b, 1 + f n, 3 h e)``.

    Parameters
    ----------
    qkv
        Queries, keys and values of all tokens, in the dtype of the result.
    heads, axis
        Number of heads; the axis of rows, 1 or 2.
    grid, rotation
        ``(f, n)``, and how the patches turn with their place on that axis.
    """
    q, k, v = qkv.unflatten(-1, (3, heads, -1)).unbind(2)  # (b, 1 + f n, h, e)
    token = attend(q[:, :1], k, v)  # (b, 1, h, e)

    # The class token's key and value join every row; only patches are rotated.
    rows = [-1, *grid, -1, -1]
    rows[axis] = 1
    first_k, first_v = (t[:, :1, None].expand(rows) for t in (k, v))
    q, k, v = (t[:, 1:].unflatten(1, grid) for t in (q, k, v))  # (b, f, n, h, e)
    q = rotate(q, rotation)
    k = torch.cat((first_k, rotate(k, rotation)), axis)
    v = torch.cat((first_v, v), axis)

    # Beside its own axis, attention takes (b) and (n h) over time, (b f) and (h) over space.
    side = 2 if axis == 1 else 0
    patches = attend(*(t.flatten(side, side + 1) for t in (q, k, v)))
    b, width = len(qkv), qkv.shape[-1] // 3
    return torch.cat((token.view(b, 1, width), patches.reshape(b, -1, width)), 1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of tensors ``(batch, tokens, heads, e)``."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if q.dtype is torch.bfloat16 and q.device.type == "cpu":
        return attend_by_products(q, k, v).transpose(1, 2)
    parts = zip(*(t.split(MOST_ROWS) for t in (q, k, v)), strict=True)
    some = [F.scaled_dot_product_attention(*part) for part in parts]
    return (some[0] if len(some) == 1 else torch.cat(some)).transpose(1, 2)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same of ``(batch, heads, tokens, e)``, in products of many small matrices.

    On a CPU, whose fused kernel is made for long rows of float32, twice as fast in bfloat16.
    """
    batch = q.shape[:2]
    q, k, v = (t.flatten(0, 1) for t in (q, k, v))
    if q.shape[1] == 1:  # the longest rows, spared a transposed copy
        scores = torch.bmm(k, q.transpose(1, 2)).transpose(1, 2)
    else:
        scores = torch.bmm(q.contiguous(), k.contiguous().transpose(1, 2))
    scores = scores.float().mul_(q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1).to(v.dtype), v).unflatten(0, batch)


class FeedForward(nn.Module):
    """A gated feed-forward, ``d -> 2 x 4 d -> d`` (GEGLU; Shazeer, arXiv:2002.05202)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        # Activation and dropout stood in second and third place.
        self.net = nn.ModuleList(
            [Linear(dim, 8 * dim), nn.Identity(), nn.Identity(), Linear(4 * dim, dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(b, tokens, d)`` from the same."""
        expand: Any = self.net[0]
        x = x.to(expand.weight.dtype)
        # One product each, so that either result is contiguous and the activation can be fused.
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
        """Return the next tokens, ``(b, 1 + f n, d)``."""
        time, space, feed_forward = self
        return feed_forward(space(time(x, grid, frames), grid, places))


class LastBlock(Block):
    """The block that is asked for the class token alone."""

    space_attention = ClassTokenAttention

    def forward(self, x: Tensor, grid: Grid, frames: Rotation, places: Rotation) -> Tensor:
        """Return the class token ``(b, 1, d)`` of tokens ``(b, 1 + f n, d)``."""
        space: Any
        time, space, feed_forward = self
        x = time(x, grid, frames)
        return feed_forward(x[:, :1] + space.share(x))


class Rotary(nn.Module):
    """Rotary position embedding (Su et al., arXiv:2104.09864): frequencies to rotations."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Rotary:
        # Frequencies stay float32 whatever the network's dtype: in bfloat16 the angle of the 26th
        # frame would be off by 0.1 radian.
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
        # The checkpoints were trained with the frequencies laid end to end, not pair by pair.
        angles = torch.cat((angles, angles), dim=-1)
        return as_rotation(angles[:, None], heads, dtype)


class ImageRotation(Rotary):
    """Rotations of the places in a tile: half of a head turns with y, half with x."""

    scales: Tensor

    def __init__(self, head_dim: int, max_frequency: float = 10) -> None:
        super().__init__()
        octaves = torch.linspace(0, math.log2(max_frequency / 2), head_dim // 4)
        self.register_buffer("scales", 2**octaves)

    def forward(self, g: int, heads: int, dtype: torch.dtype) -> Rotation:
        """Return the rotations ``(n, h, e)`` of ``g x g`` places."""
        at = torch.linspace(-1, 1, g, device=self.scales.device)
        angles = torch.outer(at, self.scales) * math.pi  # (g, e / 4)
        y, x = angles[:, None].expand(g, g, -1), angles[None].expand(g, g, -1)
        angles = torch.cat((y, x), dim=-1).repeat_interleave(2, dim=-1)  # (g, g, e)
        return as_rotation(angles.flatten(0, 1), heads, dtype)


def as_rotation(angles: Tensor, heads: int, dtype: torch.dtype) -> Rotation:
    """Return cosines and sines ``(..., h, e)`` of angles ``(..., e)``, the same for each head.

    The first of every pair loses, so its sine is negative.
    """
    # Made on the device: a GPU would wait for numbers that come from Python.
    signs = torch.arange(angles.shape[-1], device=angles.device, dtype=angles.dtype) % 2 * 2 - 1
    parts = (part.to(dtype) for part in (angles.cos(), angles.sin() * signs))
    # In full, because a CPU computes slowly what it has to broadcast by rows as short as a head.
    cos, sin = (part.unsqueeze(-2).repeat_interleave(heads, -2) for part in parts)
    return cos, sin


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate every pair of neighbours along the last axis, ``(b, f, n, h, e)``."""
    cos, sin = rotation
    return (x * cos).addcmul_(swap_pairs(x), sin)


def swap_pairs(x: Tensor) -> Tensor:
    """Swap every pair of neighbours along the last axis."""
    if x.dtype is torch.bfloat16 and x.device.type == "cpu":
        pairs = x.view(torch.int32)  # the halves of a whole number, in half the time
        return (pairs << 16).bitwise_or_((pairs >> 16).bitwise_and_(0xFFFF)).view(x.dtype)
    return torch.stack((x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def ink_timesformer(
    layers: int = 26, tile: int = 64, normalization: bool = False, **_: Any
) -> TimeSformer:
    """Build the trained size: dim 512, depth 8, 6 heads, 37.9 million parameters."""
    return TimeSformer(layers, tile, normalization=normalization)
