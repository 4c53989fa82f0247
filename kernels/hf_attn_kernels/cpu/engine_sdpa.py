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
from .context import Context, combine, fused_forward
from .decode import in_pieces, one_query
from .masks import Mask
from .pages import Keys, PagedKeys
from .segments import Work
from .tiling import Block, Kind, Scoring, Tile, causal_blocks, query_blocks, strips

fused_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default

# up to this many queries a group's heads are packed into the rows: one pass over the keys
PACK_QUERIES = 128
# rows of a packed matmul that a window's block aims at; more would read more outside the window
WINDOW_ROWS = 256
# elements of the queries that one call of a window's strip takes
STRIP_ELEMENTS = 2**21
# queries of a block and keys of a tile where keys must be gathered from pages
PAGED_QUERIES = 256
PAGED_KEYS = 1024
PAGED_KEYS_DECODE = 2048
# elements of a mask that bias, ALiBi or holes may take
MASK_ELEMENTS = 2**22


def blocks(
    work: Work, scoring: Scoring, heads: int, heads_kv: int, dim: int, *, paged: bool = False
) -> Iterator[Block]:
    if paged:
        tile_keys = PAGED_KEYS if work.query_count > 1 else PAGED_KEYS_DECODE
        return query_blocks(work, scoring, rows=PAGED_QUERIES, tile_keys=tile_keys)
    groups = heads // heads_kv
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
        narrow = UNBOUNDED not in (p.window_left, p.window_right) and (
            p.window_left + p.window_right < WINDOW_ROWS
        )
        rows = 32 if narrow else min(max(WINDOW_ROWS // groups, 32), 64)
        each = query_blocks(work, scoring, rows=rows, tile_keys=keys)
        return strips(each, max(STRIP_ELEMENTS // (heads * rows * dim), 1))
    mask_heads = 1 if scoring.alibi_slopes is None else scoring.alibi_slopes.shape[1]
    if scoring.bias is not None:
        mask_heads = max(mask_heads, scoring.bias.shape[1])
    rows = max(min(MASK_ELEMENTS // (mask_heads * work.row_count * keys), 128), 8)
    return query_blocks(work, scoring, rows=rows, tile_keys=keys)


def forward(
    ctx: Context, work: Work, block: Block, q: Tensor, k: Keys, v: Keys
) -> tuple[Tensor, Tensor]:
    """q ``[b, m, Hq, D]``, k and v ``[b, K, Hkv, D]`` -> out ``[b, Hkv, G, m, D]``, lse the same
    without D. Of a strip of s blocks q is ``[1, s * m, Hq, D]`` and the answer's b is s."""
    assert block.tiles  # a block that sees nothing is the caller's
    if block.strip > 1:
        return _strip_forward(ctx, work, block, q, k, v)
    parts: list[tuple[Tensor, Tensor]] = []
    for tile in block.tiles:
        keys, values = (
            tile.read(x, _page_buffer(ctx, name, tile, x)).transpose(1, 2)
            for name, x in (("page keys", k), ("page values", v))
        )
        mask, scaling = ctx.masks(work, block, tile), ctx.scoring.pattern.scaling
        if isinstance(k, PagedKeys) and q.shape[1] == 1 and mask is None:
            pieces = gathered_forward(q, keys, values, scaling)
            parts += [(o.unsqueeze(3), lse.unsqueeze(3)) for o, lse in pieces]
            continue
        parts.append(_tile_forward(q.transpose(1, 2), keys, values, tile.kind, mask, scaling))
    return combine(parts)


def gathered_forward(
    q: Tensor, keys: Tensor, values: Tensor, scaling: float
) -> list[tuple[Tensor, Tensor]]:
    """One query q ``[1, 1, Hq, D]`` over keys ``[1, Hkv, n, D]`` just gathered from pages; out
    ``[1, Hkv, G, D]`` and lse over one part of them or several, to be combined.

    All threads have just written the tile, each its share of the tokens. Each should then read what
    it wrote: out of another core's cache it can come slower than from memory.
    """
    packed = q.reshape(1, keys.shape[1], -1, q.shape[3])
    threads = torch.get_num_threads()
    if 1 < threads <= keys.shape[2]:
        return in_pieces(packed, keys, values, scaling, threads)
    return [fused_forward(packed, keys, values, scale=scaling)]


def _page_buffer(ctx: Context, name: str, tile: Tile, x: Keys) -> Tensor | None:
    """Where a tile's pages are gathered: memory that is still in the cache from the last tile."""
    if not isinstance(x, PagedKeys):
        return None
    return ctx.buffer(name, (x.gathered_elements(tile.key_count),), x.dtype)


def _strip_forward(
    ctx: Context, work: Work, block: Block, q: Tensor, k: Keys, v: Keys
) -> tuple[Tensor, Tensor]:
    """All blocks of a strip as the batch of one call: overlapping views of the keys, one mask."""
    assert isinstance(k, Tensor) and isinstance(v, Tensor) and q.shape[0] == 1
    tile, step = block.tiles[0], block.q1 - block.q0
    ((k0, k1),) = tile.spans
    keys, values = (
        x.as_strided(
            (block.strip, k1 - k0, *x.shape[2:]),
            (step * x.stride(1), *x.stride()[1:]),
            x.storage_offset() + k0 * x.stride(1),
        ).transpose(1, 2)
        for x in (k, v)
    )
    queries = q.reshape(block.strip, step, *q.shape[2:]).transpose(1, 2)
    first = next(block.each())
    mask = ctx.masks(work, first, tile)
    return _tile_forward(queries, keys, values, tile.kind, mask, ctx.scoring.pattern.scaling)


def _tile_forward(
    q: Tensor, k: Tensor, v: Tensor, kind: Kind, mask: Mask | None, scaling: float
) -> tuple[Tensor, Tensor]:
    batch, heads, m, dim = q.shape
    groups = heads // k.shape[1]
    if m == 1 and mask is None:
        out, lse = one_query(q.reshape(batch, k.shape[1], groups, dim), k, v, scaling)
        assert lse is not None  # asked for
        return out.unsqueeze(3), lse.unsqueeze(3)
    pack = groups > 1 and m <= PACK_QUERIES and kind is not Kind.CAUSAL
    add = None if mask is None else mask.add
    if pack:
        q = q.reshape(batch, k.shape[1], groups * m, dim)
        add = None if add is None else _pack_mask(add, groups)
    out, lse = fused_forward(q, k, v, 0.0, kind is Kind.CAUSAL, attn_mask=add, scale=scaling)
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
    No strips: their blocks come one by one.

    out and grad_out are ``[b, m, Hq, D]``; lse ``[b, Hq, m]``, +inf for rows that see nothing.
    """
    grad_q: Tensor | None = None
    for tile in block.tiles:
        mask = ctx.masks(work, block, tile)
        dq, dk, dv = fused_backward(
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
