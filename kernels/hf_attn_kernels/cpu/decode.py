"""One query that sees all its keys, heads packed into rows: the decode step of a long cache.

One fused call is enough, but not the fastest where keys are many: its matmuls want more rows.

Shape letters as in :mod:`..problem`; G query heads per key head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .context import combine, fused_forward

# keys from which the fused call is left for something faster
LONG_KEYS = 4096
# pieces that the keys of a cache are cut into where its tokens come first
PIECES = 8
# elements of keys that are converted to float32 together
SLAB_ELEMENTS = 2**20


def one_query(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, *, need_lse: bool = True
) -> tuple[Tensor, Tensor | None]:
    """q ``[b, Hkv, G, D]``, k and v ``[b, Hkv, K, D]`` -> the same as q, and lse ``[b, Hkv, G]``.

    Without `need_lse` None may come in its place.
    """
    batch, heads, length = k.shape[:3]
    if batch > 1 or length < LONG_KEYS:
        out, lse = fused_forward(q, k, v, scale=scaling)
        return out, lse
    if heads > 1 and k.stride(2) > k.stride(1):
        return _tokens_first(q, k, v, scaling)
    return _heads_first(q, k, v, scaling, need_lse)


def _tokens_first(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """A head's own keys are far apart: cut into pieces that go through one call as its batch, all
    heads of a piece are read while it is near."""
    out, lse = combine(in_pieces(q, k, v, scaling, PIECES))
    return out.to(q.dtype), lse


def in_pieces(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, count: int
) -> list[tuple[Tensor, Tensor]]:
    """The keys in `count` equal pieces and perhaps a rest: out and lse over each, to be combined.

    q ``[1, Hkv, G, D]``, k and v ``[1, Hkv, K, D]`` with K >= `count`.
    """
    length = k.shape[2]
    piece = length // count
    cut = count * piece
    pieces = (x[0, :, :cut].unflatten(1, (count, piece)).transpose(0, 1) for x in (k, v))
    outs, lses = fused_forward(q.expand(count, -1, -1, -1), *pieces, scale=scaling)
    parts = [*zip(outs.split(1), lses.split(1), strict=True)]
    if cut < length:
        parts.append(fused_forward(q, k[:, :, cut:], v[:, :, cut:], scale=scaling))
    return parts


def _heads_first(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, need_lse: bool
) -> tuple[Tensor, Tensor | None]:
    """All scores of the row, float32 also for half types; then the values where they lie."""
    heads, dim = k.shape[1], k.shape[3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    rows = q[0].to(dtype) * scaling  # [Hkv, G, D]
    slab = max(SLAB_ELEMENTS // (heads * dim), 128)
    near = torch.empty(heads, slab, dim, dtype=dtype)
    scores = torch.cat(
        [
            torch.bmm(rows, near[:, : part.shape[1]].copy_(part).transpose(1, 2))
            for part in k[0].split(slab, dim=1)
        ],
        dim=-1,
    )  # [Hkv, G, K]
    lse = torch.logsumexp(scores, dim=-1)[None] if need_lse else None
    weights = torch.softmax(scores, dim=-1).to(v.dtype)
    return torch.bmm(weights, v[0])[None], lse
