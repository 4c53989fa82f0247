"""One block of queries in plain matmuls: every feature, forward and backward, sums in float32.

Scores are made in float32 also for half types (the keys of a tile are converted, not the cache), so
that softmax sees no rounded score; only the product with the values runs in bfloat16, where the
CPU's own instruction is twice as fast. One tile of scores at a time: memory does not grow with K.

Shape letters as in :mod:`..problem`; G query heads per key head, m queries, n keys of a tile,
N = b * Hkv. A group's heads are packed into the rows: ``[N, G * m, ...]``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_invariance import batch_invariant
from . import philox
from .context import Context
from .masks import bias_tile, key_positions
from .pages import Keys, PagedKeys, read_range
from .segments import Work
from .tiling import Block, Scoring, Tile, query_blocks

# elements of one tile's scores, all heads together: about what a core's own cache holds
SCORE_ELEMENTS = 2**20
# elements of keys or values that are converted together
SLAB_ELEMENTS = 2**20
# rows of a packed matmul that a block aims at, and least keys of a tile
PACKED_ROWS = 256
TILE_KEYS = 512


def blocks(work: Work, scoring: Scoring, groups: int, heads_kv: int) -> Iterator[Block]:
    lead = work.row_count * heads_kv
    rows = max(PACKED_ROWS // groups, 16)
    if work.query_count == 1 or not batch_invariant():  # the rows of padding are not counted
        rows = min(rows, work.query_count or 1)
    keys = max(SCORE_ELEMENTS // (lead * groups * rows), TILE_KEYS)
    return query_blocks(work, scoring, rows=rows, tile_keys=keys)


@dataclass
class _Scores:
    """Scores of a tile before the softmax, ``[N, G * m, n]``, and what their gradient needs."""

    scores: Tensor
    slope: Tensor | None  # derivative of the softcap


def forward(
    ctx: Context, work: Work, block: Block, q: Tensor, k: Keys, v: Keys
) -> tuple[Tensor, Tensor]:
    """q ``[b, m, Hq, D]``, k and v ``[b, K, Hkv, D]`` -> out ``[b, Hkv, G, m, Dv]``, lse the same
    without Dv, both in the dtype of sums."""
    assert block.tiles  # a block that sees nothing is the caller's
    batch, m, heads, _ = q.shape
    heads_kv = k.shape[2]
    rows = _packed(q, heads_kv, ctx.dtype) * ctx.scoring.pattern.scaling  # [N, G * m, D]
    acc = peak = total = None
    for tile in block.tiles:
        s = _scores(ctx, work, block, tile, rows, k, q.shape).scores
        high = s.amax(dim=-1, keepdim=True)  # [N, G * m, 1]
        if peak is not None:
            high = torch.maximum(high, peak)
        safe = high.masked_fill(torch.isneginf(high), 0.0)
        p = s.sub_(safe).exp_()
        share = p.sum(dim=-1, keepdim=True)
        if ctx.scoring.pattern.dropout_p:
            p *= _dropout(ctx, work, block, tile, q.shape, heads_kv)
        part = _times_values(ctx, tile, p, v)  # [N, G * m, Dv]
        if acc is None or total is None or peak is None:
            acc, total = part, share
        else:
            decay = (peak - safe).exp_()
            acc, total = acc.mul_(decay).add_(part), total.mul_(decay).add_(share)
        peak = high
    assert acc is not None and total is not None and peak is not None
    empty = total == 0
    out = acc.div_(total.masked_fill_(empty, 1.0))
    lse = total.log_().add_(peak)  # peak is -inf where the row saw nothing
    by_head = (batch, heads_kv, heads // heads_kv, m)
    return out.view(*by_head, -1), lse.view(by_head)


def backward(
    ctx: Context,
    work: Work,
    block: Block,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    peak: Tensor | None,
    delta: Tensor,
    grad_out: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_bias: Tensor | None,
) -> Tensor:
    """Adds to grad_k, grad_v ``[b, K, Hkv, D]`` and grad_bias; returns that of q ``[b, m, Hq, D]``.

    lse ``[b, Hq, m]`` is +inf for rows that see nothing; with a `peak` it is what that leaves, see
    :func:`parted_lse`. delta ``[b, Hq, m]`` is the row sum of grad_out * out, less the gradient of
    the log-sum-exp.
    """
    batch, m, heads, dim = q.shape
    heads_kv = k.shape[2]
    lead, packed = batch * heads_kv, heads // heads_kv * m
    scaling = ctx.scoring.pattern.scaling
    rows = _packed(q, heads_kv, ctx.dtype) * scaling
    grad_rows = _packed(grad_out, heads_kv, ctx.dtype)
    lse, delta = lse.reshape(lead, packed, 1), delta.reshape(lead, packed, 1)
    peak = None if peak is None else peak.reshape(lead, packed, 1)
    grad_q = torch.zeros_like(rows)
    for tile in block.tiles:
        made = _scores(ctx, work, block, tile, rows, k, q.shape)
        keys, values = (_heads_first(tile.read(x), ctx.dtype) for x in (k, v))
        s = made.scores if peak is None else made.scores.sub_(peak)
        p = s.sub_(lse).exp_()
        dp = torch.bmm(grad_rows, values.transpose(1, 2))
        kept = p
        if ctx.scoring.pattern.dropout_p:
            scale = _dropout(ctx, work, block, tile, q.shape, heads_kv)
            dp *= scale
            kept = p * scale
        dv = torch.bmm(kept.transpose(1, 2), grad_rows)
        ds = dp.sub_(delta).mul_(p)  # gradient of the score after bias
        if grad_bias is not None:
            _add_bias_grad(grad_bias, ds.view(batch, heads, m, -1), work, block, tile)
        if made.slope is not None:
            ds *= made.slope
        grad_q.baddbmm_(ds, keys, alpha=scaling)
        tile.add_to(grad_k, _unpacked_keys(torch.bmm(ds.transpose(1, 2), rows), batch))
        tile.add_to(grad_v, _unpacked_keys(dv, batch))
    return grad_q.view(batch, heads, m, dim).transpose(1, 2)


def parted_lse(
    ctx: Context, work: Work, block: Block, q: Tensor, k: Tensor, s_aux: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The largest score of each row, and the log of the sum of weights beside it: ``[b, Hq, m]``.

    Far from 0 their sum, the log-sum-exp, would round the second away.
    """
    batch, m, heads, _ = q.shape
    rows = _packed(q, k.shape[2], ctx.dtype) * ctx.scoring.pattern.scaling
    peak = rows.new_full((*rows.shape[:2], 1), float("-inf"))
    if s_aux is not None:
        peak = s_aux.to(ctx.dtype)[None, :, None].expand(batch, -1, m).reshape(peak.shape)
    total = torch.zeros_like(peak) if s_aux is None else torch.ones_like(peak)
    for tile in block.tiles:
        s = _scores(ctx, work, block, tile, rows, k, q.shape).scores
        high = torch.maximum(peak, s.amax(dim=-1, keepdim=True))
        safe = high.masked_fill(torch.isneginf(high), 0.0)
        total = total * (peak - safe).exp() + s.sub_(safe).exp_().sum(dim=-1, keepdim=True)
        peak = high
    return peak.view(batch, heads, m), total.log().view(batch, heads, m)


def _packed(x: Tensor, heads_kv: int, dtype: torch.dtype) -> Tensor:
    """``[b, m, Hq, D]`` -> ``[N, G * m, D]``."""
    batch, m, heads, dim = x.shape
    return x.transpose(1, 2).to(dtype).reshape(batch * heads_kv, heads // heads_kv * m, dim)


def _heads_first(part: Tensor, dtype: torch.dtype, copy: Tensor | None = None) -> Tensor:
    """``[b, n, Hkv, D]`` -> ``[N, n, D]``, dense in each head; `copy` is where a copy may go."""
    part = part.transpose(1, 2)
    batch, heads, n, dim = part.shape
    if copy is None:
        return part.to(dtype).reshape(batch * heads, n, dim)
    return copy[: part.numel()].view(part.shape).copy_(part).view(batch * heads, n, dim)


def _read(ctx: Context, x: Keys, k0: int, k1: int, most: int) -> Tensor:
    """A slab ``[b, k1 - k0, Hkv, D]``; pages are gathered where the slab before it was."""
    near = None
    if isinstance(x, PagedKeys):
        near = ctx.buffer("pages", (x.gathered_elements(most),), x.dtype)
    return read_range(x, k0, k1, near)


def _slab(x: Keys, lead: int) -> int:
    """Keys that are converted together, so that the copy is still in the cache when it is read."""
    return max(SLAB_ELEMENTS // (lead * x.shape[-1]), 16)


def _lies_heads_first(v: Keys, dtype: torch.dtype) -> bool:
    """Whether a range ``[b, n, Hkv, D]`` of values can be multiplied where it lies."""
    if not isinstance(v, Tensor) or v.dtype != dtype or v.stride(1) != v.shape[3]:
        return False
    return v.shape[0] == 1 or v.stride(0) == v.shape[2] * v.stride(2)


def _times_values(ctx: Context, tile: Tile, p: Tensor, v: Keys) -> Tensor:
    """Weights ``[N, G * m, n]`` times the tile's values: ``[N, G * m, Dv]``, dtype of sums."""
    if v.dtype == torch.bfloat16:
        p = ctx.buffer("weights", tuple(p.shape), v.dtype).copy_(p)
    lead, dim = p.shape[0], v.shape[-1]
    in_place = _lies_heads_first(v, p.dtype)
    most = tile.key_count if in_place else _slab(v, lead)
    out: Tensor | None = None
    for place, k0, k1 in tile.slabs(most):
        copy = None
        if not in_place:
            copy = ctx.buffer("values", (lead * min(most, k1 - k0) * dim,), p.dtype)
        values = _heads_first(_read(ctx, v, k0, k1, most), p.dtype, copy)
        part = torch.bmm(p[..., place : place + k1 - k0], values).to(ctx.dtype)
        out = part if out is None else out.add_(part)
    assert out is not None
    return out


def _unpacked_keys(x: Tensor, batch: int) -> Tensor:
    """``[N, n, D]`` -> ``[b, n, Hkv, D]``."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def _scores(
    ctx: Context, work: Work, block: Block, tile: Tile, rows: Tensor, k: Keys, shape: torch.Size
) -> _Scores:
    """rows ``[N, G * m, D]`` are scaled already."""
    lead, dim = rows.shape[0], rows.shape[2]
    s = ctx.buffer("scores", (lead, rows.shape[1], tile.key_count), ctx.dtype)
    most = _slab(k, lead)
    for place, k0, k1 in tile.slabs(most):
        copy = ctx.buffer("keys", (lead * min(most, k1 - k0) * dim,), ctx.dtype)
        keys = _heads_first(_read(ctx, k, k0, k1, most), ctx.dtype, copy).transpose(1, 2)
        if k1 - k0 == tile.key_count:
            torch.bmm(rows, keys, out=s)
        else:
            s[..., place : place + k1 - k0] = torch.bmm(rows, keys)
    slope = None
    if cap := ctx.scoring.pattern.softcap:
        s = s.div_(cap).tanh_()
        slope = 1.0 - s * s
        s = s.mul_(cap)
    mask = ctx.masks(work, block, tile)
    if mask is not None:
        batch, m, heads, _ = shape
        by_head = s.view(batch, heads, m, -1)
        by_head += mask.add
    return _Scores(s, slope)


def _dropout(
    ctx: Context, work: Work, block: Block, tile: Tile, shape: torch.Size, heads_kv: int
) -> Tensor:
    """``[N, G * m, n]``: 0 where a weight is dropped, else 1 / (1 - p)."""
    batch, _, heads, _ = shape
    at = key_positions(work, tile)
    first = work.number * heads
    scale = philox.keep_scale(
        ctx.seed,
        ctx.scoring.pattern.dropout_p,
        torch.arange(first, first + batch * heads),
        torch.arange(block.q0, block.q1),
        at + work.first,
        ctx.dtype,
    )
    return scale.view(batch * heads_kv, -1, at.numel())


def _add_bias_grad(grad_bias: Tensor, ds: Tensor, work: Work, block: Block, tile: Tile) -> None:
    """Adds ds ``[b, Hq, m, n]``, summed over what the bias repeats, at the tile's place."""
    at = key_positions(work, tile)
    have = bias_tile(grad_bias, work, block, at).shape
    for dim, size in enumerate(have[:3]):
        if size == 1:
            ds = ds.sum(dim=dim, keepdim=True)
    part = grad_bias if grad_bias.shape[0] == 1 else grad_bias[work.number : work.number + have[0]]
    if part.shape[2] > 1:
        part = part[:, :, block.q0 : block.q1]
    part.index_add_(3, at + work.first, ds)
