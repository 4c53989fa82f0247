"""How a piece of work is cut: blocks of queries, each with the tiles of keys that it reads.

Keys that no query of a block may see are never read: a window of W keys costs O(S * W).

Shape letters as in :mod:`..problem`; m queries of a block, n keys of a tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor

from ..batch_invariance import batch_invariant
from ..problem import UNBOUNDED, Pattern
from .pages import Keys, read_range
from .segments import Work


class Kind(Enum):
    FULL = "every query sees every key"
    CAUSAL = "square, lower triangle"
    MASKED = "an additive mask says"


@dataclass(frozen=True)
class Tile:
    """Keys read together: one or two local ranges (sink tokens, then the window)."""

    spans: tuple[tuple[int, int], ...]
    kind: Kind

    def moved(self, by: int) -> Tile:
        return Tile(tuple((k0 + by, k1 + by) for k0, k1 in self.spans), self.kind)

    def read(self, x: Keys, near: Tensor | None = None) -> Tensor:
        """``[b, K, H, D]`` -> ``[b, n, H, D]``; a view where the tile is one range.

        Pages of one range are gathered into the flat `near`, if given.
        """
        if len(self.spans) == 1:
            return read_range(x, *self.spans[0], near)
        return torch.cat([read_range(x, k0, k1) for k0, k1 in self.spans], dim=1)

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
    """Queries ``q0 <= i < q1`` of a piece. Without tiles they see nothing: zeros.

    With `strip` > 1 it stands for that many equal blocks of a window, each as far behind the one
    before it, in queries and in keys, as the block is long.
    """

    q0: int
    q1: int
    tiles: tuple[Tile, ...]
    strip: int = 1

    @property
    def end(self) -> int:
        """Behind the last query, of the whole strip."""
        return self.q0 + self.strip * (self.q1 - self.q0)

    def each(self) -> Iterator[Block]:
        """The blocks of the strip one by one."""
        step = self.q1 - self.q0
        for by in range(0, self.strip * step, step):
            tiles = tuple(tile.moved(by) for tile in self.tiles) if by else self.tiles
            yield Block(self.q0 + by, self.q1 + by, tiles)


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
    """Blocks of at most `rows` queries whose tiles hold at most about `tile_keys` keys.

    With batch invariance they are counted from the query of the first key, and one ends at that of
    the last, so that a row is cut alike however it is padded.
    """
    q0, first, last = 0, 0, work.query_count
    if batch_invariant():
        first, right = max(-work.offset, 0), scoring.pattern.window_right
        if work.positions is None:
            last = work.key_count - work.offset
        if right != UNBOUNDED and first > right:
            q0 = min(first - right, work.query_count)  # these come before all that they may see
            yield Block(0, q0, ())
    while q0 < work.query_count:
        q1 = min(q0 + rows - (q0 - first) % rows, work.query_count)
        if q0 < last < q1:
            q1 = last
        yield Block(q0, q1, tuple(_tiles(work, scoring, q0, q1, tile_keys)))
        q0 = q1


def strips(blocks: Iterable[Block], most: int) -> Iterator[Block]:
    """Puts up to `most` neighbouring blocks together where each is the one before it, moved."""
    strip: Block | None = None
    for block in blocks:
        step = block.q1 - block.q0
        if (
            strip is not None
            and strip.strip < most
            and step == strip.q1 - strip.q0
            and len(block.tiles) == 1
            and len(block.tiles[0].spans) == 1
            and block.tiles == tuple(t.moved(block.q0 - strip.q0) for t in strip.tiles)
        ):
            strip = replace(strip, strip=strip.strip + 1)
            continue
        if strip is not None:
            yield strip
        strip = block
    if strip is not None:
        yield strip


def _tiles(work: Work, scoring: Scoring, q0: int, q1: int, tile_keys: int) -> Iterator[Tile]:
    p, k_len = scoring.pattern, work.key_count
    low, high = 0, k_len
    first, last = q0 + work.offset, q1 - 1 + work.offset  # keys on the diagonal
    sinks = 0
    if p.window_right != UNBOUNDED:
        high = min(high, work.keys_before(last + p.window_right + 1))
    if p.window_left != UNBOUNDED:
        low = work.keys_before(first - p.window_left)
        low -= 0 if work.exact else low % KEY_ALIGN
        sinks = min(work.keys_before(p.sink_tokens), high)
        if low <= sinks:
            low = 0
    if high <= min(low, sinks) or (high <= low and not sinks):
        return
    if low >= high:  # only the sinks are left
        low, high = 0, sinks
    sinks = sinks if low > sinks else 0
    # keys that the whole block sees: no mask needed
    seen_from = 0 if p.window_left == UNBOUNDED else last - p.window_left
    seen_to = k_len if p.window_right == UNBOUNDED else first + p.window_right + 1
    plain = not scoring.adds and work.positions is None
    spans = [(k0, min(k0 + tile_keys, high)) for k0 in range(low, high, tile_keys)]
    for number, (k0, k1) in enumerate(spans):
        full = plain and k0 >= seen_from and k1 <= seen_to
        both: tuple[tuple[int, int], ...] = ((k0, k1),)
        if number == 0 and sinks:
            both = ((0, sinks), *both)
            full = full and sinks <= seen_to
        yield Tile(both, Kind.FULL if full else Kind.MASKED)
