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

from . import philox
from .context import Context
from .masks import bias_tile
from .tiling import Block, Scoring, Tile, query_blocks
from .work import Work

# elements of one tile's scores, all heads together: what stays in a core's second-level cache or near
SCORE_ELEMENTS = 2**20
# rows of a packed matmul that a block aims at, and keys of a tile
PACKED_ROWS = 256
TILE_KEYS = 1024


def blocks(work: Work, scoring: Scoring, groups: int, heads_kv: int) -> Iterator[Block]:
    lead = work.row_count * heads_kv
    rows = max(PACKED_ROWS // groups, 16)
    rows = min(rows, work.query_count or 1)
    keys = min(max(SCORE_ELEMENTS // (lead * groups * rows), 256), TILE_KEYS)
    return query_blocks(work, scoring, rows=rows, tile_keys=keys)


@dataclass
class _Scores:
    """Scores of a tile before the softmax, ``[N, G * m, n]``, and what their gradient needs."""

    scores: Tensor
    slope: Tensor | None  # derivative of the softcap


def forward(
    ctx: Context, work: Work, block: Block, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor, Tensor]:
    """q ``[b, m, Hq, D]``, k and v ``[b, K, Hkv, D]`` -> out ``[b, Hq, m, Dv]``, lse ``[b, Hq, m]``,
    both in the dtype of sums."""
    assert block.tiles  # a block that sees nothing is the caller's
    batch, m, heads, _ = q.shape
    heads_kv = k.shape[2]
    rows = _packed(q, heads_kv, ctx.dtype)  # [N, G * m, D]
    value_dtype = torch.bfloat16 if v.dtype == torch.bfloat16 else ctx.dtype
    acc = peak = total = None
    for tile in block.tiles:
        s = _scores(ctx, work, block, tile, rows, _keys_of(tile, k, ctx.dtype), q.shape).scores
        values = _keys_of(tile, v, value_dtype)
        high = s.amax(dim=-1, keepdim=True)  # [N, G * m, 1]
        if peak is not None:
            high = torch.maximum(high, peak)
        safe = high.masked_fill(torch.isneginf(high), 0.0)
        p = s.sub_(safe).exp_()
        share = p.sum(dim=-1, keepdim=True)
        if ctx.scoring.pattern.dropout_p:
            p *= _dropout(ctx, work, block, tile, q.shape, heads_kv)
        part = torch.bmm(p.to(value_dtype), values).to(ctx.dtype)  # [N, G * m, Dv]
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
    return out.view(batch, heads, m, -1), lse.view(batch, heads, m)


def backward(
    ctx: Context,
    work: Work,
    block: Block,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    delta: Tensor,
    grad_out: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
    grad_bias: Tensor | None,
) -> Tensor:
    """Adds to grad_k, grad_v ``[b, K, Hkv, D]`` and grad_bias; returns q's gradient ``[b, m, Hq, D]``.

    lse ``[b, Hq, m]`` is +inf for rows that see nothing; delta ``[b, Hq, m]`` is the row sum of
    grad_out * out, less the gradient of the log-sum-exp.
    """
    batch, m, heads, dim = q.shape
    heads_kv = k.shape[2]
    lead, packed = batch * heads_kv, heads // heads_kv * m
    scaling = ctx.scoring.pattern.scaling
    rows, grad_rows = _packed(q, heads_kv, ctx.dtype), _packed(grad_out, heads_kv, ctx.dtype)
    lse, delta = lse.reshape(lead, packed, 1), delta.reshape(lead, packed, 1)
    grad_q = torch.zeros_like(rows)
    for tile in block.tiles:
        keys, values = _keys_of(tile, k, ctx.dtype), _keys_of(tile, v, ctx.dtype)
        made = _scores(ctx, work, block, tile, rows, keys, q.shape)
        p = made.scores.sub_(lse).exp_()
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
        ds *= scaling
        grad_q.baddbmm_(ds, keys)
        tile.add_to(grad_k, _unpacked_keys(torch.bmm(ds.transpose(1, 2), rows), batch))
        tile.add_to(grad_v, _unpacked_keys(dv, batch))
    return grad_q.view(batch, heads, m, dim).transpose(1, 2)


def _packed(x: Tensor, heads_kv: int, dtype: torch.dtype) -> Tensor:
    """``[b, m, Hq, D]`` -> ``[N, G * m, D]``."""
    batch, m, heads, dim = x.shape
    return x.transpose(1, 2).to(dtype).reshape(batch * heads_kv, heads // heads_kv * m, dim)


def _keys_of(tile: Tile, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The tile's keys or values, heads first and contiguous: ``[N, n, D]``."""
    part = tile.read(x).transpose(1, 2)
    batch, heads, n, dim = part.shape
    copy = torch.empty(batch, heads, n, dim, dtype=dtype)
    return copy.copy_(part).view(batch * heads, n, dim)


def _unpacked_keys(x: Tensor, batch: int) -> Tensor:
    """``[N, n, D]`` -> ``[b, n, Hkv, D]``."""
    return x.view(batch, -1, *x.shape[1:]).transpose(1, 2)


def _scores(
    ctx: Context, work: Work, block: Block, tile: Tile, rows: Tensor, keys: Tensor, shape: torch.Size
) -> _Scores:
    p = ctx.scoring.pattern
    s = torch.bmm(rows, keys.transpose(1, 2))
    slope = None
    if p.softcap:
        s = s.mul_(p.scaling / p.softcap).tanh_()
        slope = 1.0 - s * s
        s = s.mul_(p.softcap)
    else:
        s = s.mul_(p.scaling)
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
    batch, m, heads, _ = shape
    at = tile.indices()
    if work.positions is not None:
        at = work.positions[at]
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
    at = tile.indices()
    if work.positions is not None:
        at = work.positions[at]
    have = bias_tile(grad_bias, work, block, at).shape
    for dim, size in enumerate(have[:3]):
        if size == 1:
            ds = ds.sum(dim=dim, keepdim=True)
    part = grad_bias if grad_bias.shape[0] == 1 else grad_bias[work.number : work.number + have[0]]
    if part.shape[2] > 1:
        part = part[:, :, block.q0 : block.q1]
    part.index_add_(3, at + work.first, ds)
