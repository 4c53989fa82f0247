"""Additive masks of single tiles: windows, bias, ALiBi; never larger than a tile.

Shape letters as in :mod:`..problem`; m queries of a block, n keys of a tile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..problem import UNBOUNDED
from .segments import Work, broadcast_row
from .tiling import Block, Kind, Scoring, Tile


@dataclass(frozen=True)
class Mask:
    """`add` ``[1 | b, 1 | Hq, m, n]``; `dead` of the same rank with n = 1: rows that see no key."""

    add: Tensor
    dead: Tensor | None


class Masks:
    """Makes the mask of a tile; a window's inner blocks share one."""

    def __init__(self, scoring: Scoring, dtype: torch.dtype) -> None:
        self.scoring = scoring
        self.dtype = dtype
        self._made: dict[tuple[object, ...], Mask] = {}

    def __call__(self, work: Work, block: Block, tile: Tile) -> Mask | None:
        """The tile's mask, None where every query sees every key or SDPA's triangle hides them."""
        if tile.kind is not Kind.MASKED:
            return None
        if self.scoring.adds or work.positions is not None:
            return self._make(work, block, tile)
        key = self._key(work, block, tile)
        mask = self._made.get(key)
        if mask is None:
            if len(self._made) >= 16:  # inner blocks repeat one key, edges do not come back
                self._made.clear()
            mask = self._made[key] = self._make(work, block, tile)
        return mask

    def _key(self, work: Work, block: Block, tile: Tile) -> tuple[object, ...]:
        """Equal keys, equal masks: positions relative to the first query's diagonal."""
        p = self.scoring.pattern
        first = block.q0 + work.offset
        spans: tuple[object, ...] = tuple((k0 - first, k1 - first) for k0, k1 in tile.spans)
        if p.sink_tokens and tile.spans[0][0] < p.sink_tokens:
            sink = tile.spans[0]
            apart = len(tile.spans) == 2 and tile.spans[1][0] >= p.sink_tokens
            unhidden = p.window_right == UNBOUNDED or sink[1] <= first + p.window_right + 1
            # sinks apart from the window and visible to all look the same wherever the window is
            spans = (sink, spans[1]) if apart and unhidden else (tile.spans, first)
        return block.q1 - block.q0, spans

    def _make(self, work: Work, block: Block, tile: Tile) -> Mask:
        add = additive_mask(work, self.scoring, block, tile, self.dtype)
        dead = torch.isneginf(add.amax(dim=-1, keepdim=True))
        return Mask(add, dead if bool(dead.any()) else None)


def additive_mask(
    work: Work, scoring: Scoring, block: Block, tile: Tile, dtype: torch.dtype
) -> Tensor:
    """``[1 | b, 1 | Hq, m, n]`` to be added to the scores: bias, ALiBi, -inf where hidden."""
    p = scoring.pattern
    at = key_positions(work, tile)
    i = torch.arange(block.q0, block.q1)[:, None] + work.offset
    visible = torch.ones(block.q1 - block.q0, at.numel(), dtype=torch.bool)
    if p.window_left != UNBOUNDED:
        visible = at >= i - p.window_left
        if p.sink_tokens:
            visible |= at < p.sink_tokens
    if p.window_right != UNBOUNDED:
        visible = visible & (at <= i + p.window_right)
    mask = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))[None, None]
    if scoring.alibi_slopes is not None:
        slopes = broadcast_row(scoring.alibi_slopes, work).to(dtype)
        mask = mask - slopes[:, :, None, None] * (i - at).abs()
    if scoring.bias is not None:
        bias = bias_tile(scoring.bias, work, block, at)
        if bias.dtype == torch.bool:
            mask = mask.masked_fill(~bias, float("-inf"))
        else:
            mask = mask + bias.to(dtype)
    return mask


def bias_tile(bias: Tensor, work: Work, block: Block, at: Tensor) -> Tensor:
    """``[1 | b, 1 | Hq, 1 | m, n]``: the part of the bias at key positions `at`."""
    part = broadcast_row(bias, work)
    if part.shape[2] > 1:
        part = part[:, :, block.q0 : block.q1]
    return part[..., at + work.first]


def key_positions(work: Work, tile: Tile) -> Tensor:
    """``[n]`` int64: where the tile's keys stand, counted from the piece's first."""
    at = tile.indices()
    return at if work.positions is None else work.positions[at]
