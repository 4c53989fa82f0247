"""The cutting of work into blocks and tiles: every visible key once, no hidden one, few besides."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hf_attn_kernels.cpu import engine_matmul, engine_sdpa
from hf_attn_kernels.cpu.masks import Masks
from hf_attn_kernels.cpu.segments import Work, dense_works
from hf_attn_kernels.cpu.tiling import Block, Kind, Scoring, causal_blocks, query_blocks, strips
from hf_attn_kernels.problem import Pattern
from hf_attn_kernels.reference import visible


def counted(work: Work, scoring: Scoring, blocks: list[Block]) -> Tensor:
    """``[Q, K]``: how often each query sees each of the piece's keys."""
    masks = Masks(scoring, torch.float32)
    seen = torch.zeros(work.query_count, work.key_count, dtype=torch.int64)
    for block in (one for strip in blocks for one in strip.each()):
        for tile in block.tiles:
            at = tile.indices()
            assert int(at.min()) >= 0 and int(at.max()) < work.key_count
            shown = torch.ones(block.q1 - block.q0, len(at), dtype=torch.bool)
            if tile.kind is Kind.CAUSAL:
                shown = shown.tril()
            elif tile.kind is Kind.MASKED:
                mask = masks(work, block, tile)
                assert mask is not None
                shown = mask.add[0, 0] == 0
            seen[block.q0 : block.q1, at] += shown
            if work.exact:
                assert bool(shown.any(dim=0).all()), "read a key that no query of the block sees"
    return seen


def expected(work: Work, p: Pattern, keys: int) -> Tensor:
    """The oracle's visible keys, for those of the piece."""
    keep = torch.zeros(keys, dtype=torch.bool)
    at = torch.arange(keys)[work.keys]
    keep[at if work.positions is None else at[work.positions]] = True
    ok = visible(
        work.query_count,
        keys,
        causal=False,
        window_size=(p.window_left, p.window_right),
        sink_tokens=p.sink_tokens,
        keep=keep,
    )
    return ok[:, keep].long()


def problems(seed: int) -> Iterator[tuple[Work, Pattern, int]]:
    """Random pieces of rows: padded at either side, with holes, more or fewer queries than keys."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(60):
        q_len, k_len = draw.randint(1, 150), draw.randint(1, 150)
        keep = torch.ones(1, k_len, dtype=torch.bool)
        keep[:, : draw.choice([0, 0, draw.randint(0, k_len)])] = False
        if draw.random() < 0.3:
            keep &= torch.rand(1, k_len) > 0.3
        left = draw.choice([-1, 0, 1, 7, 16, 40, 149, 400])
        p = Pattern(
            scaling=1.0,
            window_left=left,
            window_right=draw.choice([-1, 0, 0, 3, 50]),
            sink_tokens=draw.choice([0, 1, 5, 40, 200]) if left >= 0 else 0,
        )
        (work,) = dense_works(1, q_len, k_len, keep)
        yield replace(work, exact=draw.random() < 0.3), p, k_len


@pytest.mark.parametrize("seed", range(5))
def test_every_visible_key_once(seed: int) -> None:
    for work, p, k_len in problems(seed):
        scoring, want = Scoring(pattern=p), expected(work, p, k_len)
        cuts = {
            "flash": engine_sdpa.blocks(work, scoring, 4, 2, 8),
            "matmul": engine_matmul.blocks(work, scoring, 2, 2),
            "small": query_blocks(work, scoring, rows=7, tile_keys=20),
            "strips": strips(query_blocks(work, scoring, rows=8, tile_keys=999), 5),
        }
        for name, blocks in cuts.items():
            got = counted(work, scoring, list(blocks))
            assert torch.equal(got, want), f"{name}: {p} {work}"


def test_a_window_reads_little_more_than_itself() -> None:
    (work,) = dense_works(1, 4096, 4096, None)
    scoring = Scoring(pattern=Pattern(scaling=1.0, window_left=255, window_right=0))
    blocks = list(engine_sdpa.blocks(work, scoring, 8, 2, 64))
    read = sum(
        (block.q1 - block.q0) * block.tiles[0].key_count
        for strip in blocks
        for block in strip.each()
    )
    assert read <= 1.3 * 4096 * 256
    assert len(blocks) <= 12, "inner blocks are joined into strips"


def test_causal_prefill_needs_few_calls() -> None:
    (work,) = dense_works(1, 1000, 3000, None)
    (block,) = causal_blocks(work)
    assert [tile.kind for tile in block.tiles] == [Kind.FULL, Kind.CAUSAL]
    assert [tile.spans for tile in block.tiles] == [((0, 2000),), ((2000, 3000),)]


def test_rows_of_one_padding_stay_together() -> None:
    keep = torch.ones(6, 10, dtype=torch.bool)
    keep[2:4, :3] = False
    keep[5] = False
    works = dense_works(6, 10, 10, keep)
    assert [(w.rows.start, w.rows.stop, w.key_count) for w in works] == [
        (0, 2, 10), (2, 4, 7), (4, 5, 10), (5, 6, 0),
    ]  # fmt: skip
