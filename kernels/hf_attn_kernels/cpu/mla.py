"""Absorbed MLA decode in matmuls: all heads and queries of a row against one tile of latents.

A tile is read (gathered from pages, widened to the dtype of sums) once and serves twice, as keys
and as values, while it is still in the core's own cache.

Shape letters as in :mod:`..mla`; b rows that share a range of keys, M = Q * H, n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..batch_invariance import batch_invariant
from ..fp8 import is_float8
from ..problem import UNBOUNDED, MlaProblem
from .context import sum_dtype
from .pages import Keys, PagedKeys, read_range

TILE_KEYS = 512


@dataclass(frozen=True)
class _Rows:
    """Neighbouring rows of the batch whose valid keys are ``start <= j < end``."""

    rows: slice
    start: int
    end: int
    latent: Keys  # [b, K, 1, R]
    rope: Keys  # [b, K, 1, P]


def mla_attention(p: MlaProblem) -> tuple[Tensor, Tensor]:
    """out ``[B, Q, H, R]`` and the natural log-sum-exp ``[B, H, Q]`` float32; no gradient."""
    batch, q_len, heads, rank = p.q_latent.shape
    out = torch.empty_like(p.q_latent, memory_format=torch.contiguous_format)
    lse = out.new_empty(batch, heads, q_len, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    # under autocast too, sums stay in the dtype of sums
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        for rows in _together(p):
            part, part_lse = _attend(p, rows)  # [b, M, R], [b, M, 1]
            out[rows.rows] = part.view(-1, q_len, heads, rank)
            lse[rows.rows] = part_lse.view(-1, q_len, heads).transpose(1, 2)
    return out, lse


def _together(p: MlaProblem) -> Iterator[_Rows]:
    batch, capacity = p.q_latent.shape[0], p.capacity
    ends = [capacity] * batch if p.seqlens_k is None else p.seqlens_k.tolist()
    starts = [0] * batch if p.leftpad is None else p.leftpad.tolist()
    ranges = [(min(s, e), e) for s, e in zip(starts, ends, strict=True)]
    caches = (p.latent[:, :, None], p.k_rope[:, :, None])
    if p.block_table is not None or is_float8(p.latent):
        table = p.block_table
        if table is None:  # a float8 row that lies whole is one page
            table = torch.arange(batch, dtype=torch.int32)[:, None]
        wide = sum_dtype(p.q_latent.dtype)
        for row, (start, end) in enumerate(ranges):
            latent, rope = (
                PagedKeys(cache, table[row], 0, wide, descale)
                for cache, descale in zip(caches, (p.latent_descale, p.rope_descale), strict=True)
            )
            yield _Rows(slice(row, row + 1), start, end, latent, rope)
        return
    first = 0
    while first < batch:
        last = first + 1
        while not batch_invariant() and last < batch and ranges[last] == ranges[first]:
            last += 1
        rows = slice(first, last)
        yield _Rows(rows, *ranges[first], caches[0][rows], caches[1][rows])
        first = last


def _attend(p: MlaProblem, rows: _Rows) -> tuple[Tensor, Tensor]:
    wide = sum_dtype(p.q_latent.dtype)
    q_latent = p.q_latent[rows.rows].flatten(1, 2).to(wide)  # [b, M, R]
    q_rope = p.q_rope[rows.rows].flatten(1, 2).to(wide)
    scale = p.pattern.scaling
    total = q_latent.new_zeros(*q_latent.shape[:2], 1)
    top = torch.full_like(total, float("-inf"))  # running maximum
    acc = torch.zeros_like(q_latent)
    low, high = _range(p, rows)
    for k0 in range(low, high, TILE_KEYS):
        k1 = min(k0 + TILE_KEYS, high)
        latent, rope = _tile(rows.latent, k0, k1, wide), _tile(rows.rope, k0, k1, wide)
        hidden = None  # [b, n]
        if p.key_mask is not None and not bool((kept := p.key_mask[rows.rows, k0:k1]).all()):
            hidden = ~kept
            latent = latent.masked_fill(hidden[..., None], 0.0)  # 0 * NaN is NaN
        scores = torch.bmm(q_rope, rope.transpose(1, 2))
        scores.baddbmm_(q_latent, latent.transpose(1, 2), beta=scale, alpha=scale)
        if hidden is not None:
            scores.masked_fill_(hidden[:, None], float("-inf"))
        unseen = _unseen(p, rows, k0, k1)
        if unseen is not None:
            scores.masked_fill_(unseen, float("-inf"))
        higher = torch.maximum(top, scores.amax(-1, keepdim=True))
        shift = higher.masked_fill(torch.isneginf(higher), 0.0)  # rows that saw nothing so far
        weights = scores.sub_(shift).exp_()
        fade = top.sub_(shift).exp_()
        total.mul_(fade).add_(weights.sum(-1, keepdim=True))
        acc.mul_(fade).baddbmm_(weights, latent)
        top = higher
    empty = total == 0
    lse = total.log().add_(top).masked_fill_(empty, float("-inf"))
    return acc.div_(total.masked_fill_(empty, 1.0)), lse


def _range(p: MlaProblem, rows: _Rows) -> tuple[int, int]:
    """Keys that some query sees."""
    q_len = p.q_latent.shape[1]
    low, high, diagonal = rows.start, rows.end, rows.end - q_len
    if p.pattern.window_left != UNBOUNDED:
        low = max(low, diagonal - p.pattern.window_left)
    if p.pattern.window_right != UNBOUNDED:
        high = min(high, diagonal + q_len + p.pattern.window_right)
    return low, high


def _unseen(p: MlaProblem, rows: _Rows, k0: int, k1: int) -> Tensor | None:
    """``[M, n]`` bool: what windows and causality hide of a tile; None for nothing."""
    _, q_len, heads, _ = p.q_latent.shape
    left, right, diagonal = p.pattern.window_left, p.pattern.window_right, rows.end - q_len
    cut_left = left != UNBOUNDED and k0 < diagonal + q_len - 1 - left
    cut_right = right != UNBOUNDED and k1 - 1 > diagonal + right
    if not (cut_left or cut_right):
        return None
    distance = torch.arange(k0, k1) - torch.arange(diagonal, diagonal + q_len)[:, None]
    unseen = torch.zeros_like(distance, dtype=torch.bool)
    if cut_left:
        unseen |= distance < -left
    if cut_right:
        unseen |= distance > right
    return unseen.repeat_interleave(heads, dim=0)


def _tile(keys: Keys, k0: int, k1: int, wide: torch.dtype) -> Tensor:
    """``[b, n, columns]``; a view, unless it comes from pages or another dtype."""
    return read_range(keys, k0, k1)[:, :, 0].to(wide)
