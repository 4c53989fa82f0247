"""How a piece of work is cut: blocks of queries, each with the tiles of keys that it reads.

Keys that no query of a block may see are never read: a window of W keys costs O(S * W).

Shape letters as in :mod:`..problem`; m queries of a block, n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from ..problem import UNBOUNDED, Pattern
from .pages import Keys, read_range
from .work import Work


class Kind(Enum):
    FULL = "every query sees every key"
    CAUSAL = "square, lower triangle"
    MASKED = "an additive mask says"


@dataclass(frozen=True)
class Tile:
    """Keys read together: one or two local ranges (sink tokens, then the window)."""

    spans: tuple[tuple[int, int], ...]
    kind: Kind

    def read(self, x: Keys) -> Tensor:
        """``[b, K, H, D]`` -> ``[b, n, H, D]``; a view where the tile is one range."""
        parts = [read_range(x, k0, k1) for k0, k1 in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    def slabs(self, most: int) -> Iterator[tuple[int, int, int]]:
        """The ranges in pieces of at most `most` keys: (place in the tile, first key, end)."""
        place = 0
        for k0, k1 in self.spans:
            for start in range(k0, k1, most):
                end = min(start + most, k1)
                yield place, start, end
                place += end - start

    @property
    def key_count(self) -> int:
        return sum(k1 - k0 for k0, k1 in self.spans)

    def add_to(self, x: Tensor, grad: Tensor) -> None:
        """The inverse of :meth:`read`: adds ``[b, n, H, D]`` where it came from."""
        done = 0
        for k0, k1 in self.spans:
            x[:, k0:k1] += grad[:, done : done + k1 - k0]
            done += k1 - k0

    def indices(self) -> Tensor:
        """``[n]`` local key indices."""
        return torch.cat([torch.arange(k0, k1) for k0, k1 in self.spans])


@dataclass(frozen=True)
class Block:
    """Queries ``q0 <= i < q1`` of a piece. Without tiles they see nothing: zeros."""

    q0: int
    q1: int
    tiles: tuple[Tile, ...]


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """What changes scores besides q and k, and which keys count."""

    pattern: Pattern
    alibi_slopes: Tensor | None = None  # [1 | B, Hq]
    bias: Tensor | None = None  # [1 | B, 1 | Hq, 1 | Q, K]

    @property
    def adds(self) -> bool:
        return self.alibi_slopes is not None or self.bias is not None


# a window's tiles begin at a multiple of this: matmuls are slower at odd sizes
KEY_ALIGN = 16


def causal_blocks(work: Work) -> Iterator[Block]:
    """Plain causal attention as few large calls: SDPA's own triangle, a rectangle before it."""
    q_len, k_len, offset = work.query_count, work.key_count, work.offset
    blind = min(max(-offset, 0), q_len)  # these queries come before the first key
    if blind:
        yield Block(0, blind, ())
    square_end = max(min(k_len - offset, q_len), blind)  # from here on every key is seen
    if blind < square_end:
        before = blind + offset
        after = before + square_end - blind
        tiles = [Tile(((before, after),), Kind.CAUSAL)]
        if before:
            tiles.insert(0, Tile(((0, before),), Kind.FULL))
        yield Block(blind, square_end, tuple(tiles))
    if square_end < q_len:
        tiles = [Tile(((0, k_len),), Kind.FULL)] if k_len else []
        yield Block(square_end, q_len, tuple(tiles))


def query_blocks(work: Work, scoring: Scoring, *, rows: int, tile_keys: int) -> Iterator[Block]:
    """Blocks of at most `rows` queries whose tiles hold at most about `tile_keys` keys."""
    for q0 in range(0, work.query_count, rows):
        q1 = min(q0 + rows, work.query_count)
        yield Block(q0, q1, tuple(_tiles(work, scoring, q0, q1, tile_keys)))


def _tiles(work: Work, scoring: Scoring, q0: int, q1: int, tile_keys: int) -> Iterator[Tile]:
    p, k_len = scoring.pattern, work.key_count
    low, high = 0, k_len
    first, last = q0 + work.offset, q1 - 1 + work.offset  # keys on the diagonal
    holes = work.positions is not None
    sinks = 0
    if not holes:
        if p.window_right != UNBOUNDED:
            high = min(high, last + p.window_right + 1)
        if p.window_left != UNBOUNDED:
            low = max(first - p.window_left, 0)
            sinks = min(p.sink_tokens, high)
            if low <= sinks:
                low = 0
            low -= 0 if work.exact else low % KEY_ALIGN
    if high <= min(low, sinks) or (high <= low and not sinks):
        return
    if low >= high:  # only the sinks are left
        low, high = 0, sinks
    sinks = sinks if low > sinks else 0
    # keys that the whole block sees: no mask needed
    seen_from = 0 if p.window_left == UNBOUNDED else last - p.window_left
    seen_to = k_len if p.window_right == UNBOUNDED else first + p.window_right + 1
    plain = not scoring.adds and not holes
    spans = [(k0, min(k0 + tile_keys, high)) for k0 in range(low, high, tile_keys)]
    for number, (k0, k1) in enumerate(spans):
        full = plain and k0 >= seen_from and k1 <= seen_to
        both: tuple[tuple[int, int], ...] = ((k0, k1),)
        if number == 0 and sinks:
            both = ((0, sinks), *both)
            full = full and sinks <= seen_to
        yield Tile(both, Kind.FULL if full else Kind.MASKED)
