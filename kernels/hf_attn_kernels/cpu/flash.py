"""One block of queries through PyTorch's own flash kernel for the CPU, forward and backward.

It takes GQA without repeating heads, a triangle or an additive mask, and returns the log-sum-exp,
so tiles can be combined; given a row's whole log-sum-exp its backward gives each tile's share.

Shape letters as in :mod:`..problem`; G query heads per key head, m queries, n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..problem import UNBOUNDED
from .context import Context, combine
from .masks import Mask
from .pages import Keys
from .tiling import Block, Kind, Scoring, causal_blocks, query_blocks
from .work import Work

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# up to this many queries a group's heads are packed into the rows: one pass over the keys
PACK_QUERIES = 128
# rows of a packed matmul that a window's block aims at; more would read more outside the window
WINDOW_ROWS = 256
# elements of a mask that bias, ALiBi or holes may take
MASK_ELEMENTS = 2**22


def blocks(work: Work, scoring: Scoring, groups: int) -> Iterator[Block]:
    p = scoring.pattern
    plain = not scoring.adds and work.positions is None
    if plain and p.window_left == UNBOUNDED and p.window_right in (UNBOUNDED, 0):
        if p.window_right == 0 and work.query_count > 1:
            return causal_blocks(work)
        return query_blocks(
            work, scoring, rows=work.query_count or 1, tile_keys=work.key_count or 1
        )
    keys = max(work.key_count, 1)
    if plain:
        rows = min(max(WINDOW_ROWS // groups, 64), 128)
    else:
        mask_heads = 1 if scoring.alibi_slopes is None else scoring.alibi_slopes.shape[1]
        if scoring.bias is not None:
            mask_heads = max(mask_heads, scoring.bias.shape[1])
        rows = max(min(MASK_ELEMENTS // (mask_heads * work.row_count * keys), 128), 8)
    return query_blocks(work, scoring, rows=rows, tile_keys=keys)


def forward(
    ctx: Context, work: Work, block: Block, q: Tensor, k: Keys, v: Keys
) -> tuple[Tensor, Tensor]:
    """q ``[b, m, Hq, D]``, k and v ``[b, K, Hkv, D]`` -> out ``[b, Hkv, G, m, D]``, lse the same
    without D."""
    assert block.tiles  # a block that sees nothing is the caller's
    parts = []
    for tile in block.tiles:
        o, lse = _tile_forward(
            q.transpose(1, 2),
            tile.read(k).transpose(1, 2),
            tile.read(v).transpose(1, 2),
            tile.kind,
            ctx.masks(work, block, tile),
            ctx.scoring.pattern.scaling,
        )
        parts.append((o, lse))
    out, lse = parts[0]
    for o, more in parts[1:]:
        out, lse = combine(out.to(ctx.dtype), lse, o.to(ctx.dtype), more)
    return out, lse


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, mask: Mask | None, scaling: float
) -> tuple[Tensor, Tensor]:
    batch, heads, m, dim = q.shape
    groups = heads // k.shape[1]
    pack = groups > 1 and m <= PACK_QUERIES and kind is not Kind.CAUSAL
    add = None if mask is None else mask.add
    if pack:
        q = q.reshape(batch, k.shape[1], groups * m, dim)
        add = None if add is None else _pack_mask(add, groups)
    out, lse = _forward(q, k, v, 0.0, kind is Kind.CAUSAL, attn_mask=add, scale=scaling)
    if pack:  # a view: copying waits until it is written to its place
        out = out.view(batch, k.shape[1], groups, m, dim)
        lse = lse.reshape(batch, k.shape[1], groups, m)
    else:
        out, lse = (x.unflatten(1, (k.shape[1], groups)) for x in (out, lse))
    if mask is not None and mask.dead is not None:  # the kernel's answer for those is 0
        dead = mask.dead[..., 0]  # [1 | b, 1 | Hq, m]
        dead = dead.unsqueeze(2) if dead.shape[1] == 1 else dead.unflatten(1, (-1, groups))
        lse = lse.masked_fill(dead, float("-inf"))
    return out, lse


def _pack_mask(add: Tensor, groups: int) -> Tensor:
    """``[1 | b, 1 | Hq, m, n]`` -> ``[1 | b, 1 | Hkv, G * m, n]``."""
    if add.shape[1] == 1:
        return add.repeat(1, 1, groups, 1)
    return add.reshape(add.shape[0], add.shape[1] // groups, groups * add.shape[2], add.shape[3])


def backward(
    ctx: Context,
    work: Work,
    block: Block,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_k: Tensor,
    grad_v: Tensor,
) -> Tensor:
    """Adds to grad_k and grad_v ``[b, K, Hkv, D]``; returns the gradient of q ``[b, m, Hq, D]``.

    out and grad_out are ``[b, m, Hq, D]``; lse ``[b, Hq, m]``, +inf for rows that see nothing.
    """
    grad_q: Tensor | None = None
    for tile in block.tiles:
        mask = ctx.masks(work, block, tile)
        dq, dk, dv = _backward(
            grad_out.transpose(1, 2),
            q.transpose(1, 2),
            tile.read(k).transpose(1, 2),
            tile.read(v).transpose(1, 2),
            out.transpose(1, 2),
            lse,
            0.0,
            tile.kind is Kind.CAUSAL,
            attn_mask=None if mask is None else mask.add,
            scale=ctx.scoring.pattern.scaling,
        )
        tile.add_to(grad_k, dk.transpose(1, 2))
        tile.add_to(grad_v, dv.transpose(1, 2))
        dq = dq.transpose(1, 2)
        grad_q = dq if grad_q is None else grad_q.to(ctx.dtype) + dq
    assert grad_q is not None
    return grad_q
