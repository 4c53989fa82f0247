"""A table without a page for a key that is seen: an error, and never another page's keys.

Where values can be read (CPU tensors) it is a ValueError. A GPU cannot raise without waiting: there
the kernels answer NaN, and write no new key that has no page. The second is shown by interpreted
kernels whose door is left open.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from decode_calls import DEVICE, ints
from torch import Tensor

from hf_attn_kernels import (
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    mla_decode,
    use_backend,
)
from hf_attn_kernels.kvcache import cache_problem, packed_cache_problem
from hf_attn_kernels.problem import Pattern

pytest.importorskip("triton")
ON_CPU = pytest.mark.skipif(DEVICE != "cpu", reason="a GPU's values are not read")
Call = dict[str, Any]
ROWS, LENGTHS = 3, (70, 40, 65)


def table(page_size: int, **missing: int) -> Tensor:
    """Pages of the rows one after the other; ``row0=1`` takes block 1 of row 0 away."""
    blocks = 96 // page_size
    found = torch.arange(ROWS * blocks, dtype=torch.int32).view(ROWS, blocks) + 1
    for row, block in missing.items():
        found[int(row.removeprefix("row")), block] = -1
    return found.to(DEVICE)


def caches(page_size: int) -> tuple[Tensor, Tensor]:
    """Page 0 belongs to nobody, and is full of ones."""
    g = torch.Generator().manual_seed(0)
    lead = (ROWS * 96 // page_size + 1, page_size, 2)
    k, v = torch.randn(*lead, 32, generator=g), torch.randn(*lead, 16, generator=g)
    k[0], v[0] = 1.0, 1.0
    return k.to(DEVICE), v.to(DEVICE)


def queries(tokens: int) -> Tensor:
    g = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, tokens, 4, 32, generator=g).to(DEVICE)


def run_open(call: Call, pattern: Pattern, splits: int) -> tuple[Tensor, Tensor]:
    """By the kernels, whatever the table says."""
    from hf_attn_kernels.triton.decode import attention_with_cache

    problem = cache_problem(**call, pattern=pattern)  # no backend is forced: nothing looks at pages
    return attention_with_cache(replace(problem, num_splits=splits))


WINDOW = Pattern(scaling=0.2, window_left=20, window_right=0, sink_tokens=2)
CAUSAL = Pattern(scaling=0.2, window_right=0)


@pytest.mark.parametrize(
    ("tokens", "page_size", "splits"), [(1, 16, 1), (1, 48, 3), (9, 16, 3), (9, 48, 1)]
)
def test_kernels_answer_nan(tokens: int, page_size: int, splits: int) -> None:
    k, v = caches(page_size)
    call = {"q": queries(tokens), "k_cache": k, "v_cache": v, "cache_seqlens": ints(LENGTHS)}
    want = run_open(call | {"block_table": table(page_size)}, CAUSAL, splits)
    got = run_open(call | {"block_table": table(page_size, row1=0)}, CAUSAL, splits)
    for mine, right in zip(got, want, strict=True):
        assert bool(mine[1].isnan().all())
        assert torch.equal(mine[[0, 2]], right[[0, 2]]) and bool(right.isfinite().all())


@pytest.mark.parametrize("splits", [1, 3])
def test_kernels_do_without_pages_that_nobody_sees(splits: int) -> None:
    """Hidden by a window, or behind a row's last key; a sink's page is seen."""
    k, v = caches(16)
    call = {"q": queries(1), "k_cache": k, "v_cache": v, "cache_seqlens": ints(LENGTHS)}
    want = run_open(call | {"block_table": table(16)}, WINDOW, splits)
    hidden = table(16, row0=1, row1=3, row2=1)
    for mine, right in zip(run_open(call | {"block_table": hidden}, WINDOW, splits), want,
                           strict=True):  # fmt: skip
        assert torch.equal(mine, right)
    sink = run_open(call | {"block_table": table(16, row0=0)}, WINDOW, splits)[0]
    assert bool(sink[0].isnan().all()) and torch.equal(sink[1:], want[0][1:])


def sees(pattern: Pattern, lengths: tuple[int, ...], tokens: int, missing: Tensor) -> Tensor:
    """``[B, Q]`` whether a query sees a key of a missing page; `missing` is bool ``[B, K]``."""
    found = torch.zeros(len(lengths), tokens, dtype=torch.bool)
    for row, length in enumerate(lengths):
        for token in range(tokens):
            position = length - tokens + token
            left = 0 if pattern.window_left < 0 else max(position - pattern.window_left, 0)
            keys = {*range(pattern.sink_tokens), *range(left, position + 1)}
            found[row, token] = any(bool(missing[row, key]) for key in keys)
    return found


@pytest.mark.parametrize(
    ("pattern", "splits"), [(CAUSAL, 3), (WINDOW, 1), (WINDOW, 3)], ids=["causal", "window", "3"]
)
def test_only_queries_that_see_the_page_are_nan(pattern: Pattern, splits: int) -> None:
    """Beside others in one tile; a page of the sinks, at the window's start, and at the end."""
    k, v = caches(16)
    tokens = 5
    call = {"q": queries(tokens), "k_cache": k, "v_cache": v, "cache_seqlens": ints(LENGTHS)}
    want = run_open(call | {"block_table": table(16)}, pattern, splits)
    some = 0
    for missing in (0, 2, 4):
        pages = table(16, **{f"row{row}": missing for row in range(ROWS)})
        absent = (pages < 0).repeat_interleave(16, dim=1).cpu()
        nan = sees(pattern, LENGTHS, tokens, absent).to(DEVICE)  # [B, Q]
        some += int((nan.any(1) & ~nan.all(1)).sum())
        out, lse = run_open(call | {"block_table": pages}, pattern, splits)
        for mine, right in ((out, want[0]), (lse.transpose(1, 2), want[1].transpose(1, 2))):
            assert bool(mine[nan].isnan().all())
            assert torch.equal(mine[~nan], right[~nan])
    assert some > 0  # rows of which only some queries see it, or nothing is shown


@pytest.mark.parametrize(
    ("rank", "splits", "pattern"), [(48, 1, CAUSAL), (16, 3, replace(WINDOW, sink_tokens=0))]
)
def test_kernels_over_latents_answer_nan(rank: int, splits: int, pattern: Pattern) -> None:
    from hf_attn_kernels.problem import MlaProblem
    from hf_attn_kernels.triton.mla import mla_attention

    g = torch.Generator().manual_seed(0)
    tokens = 5
    q, k = torch.randn(ROWS, tokens, 4, rank + 16, generator=g), torch.randn(19, 16, rank + 16)

    def run(pages: Tensor) -> tuple[Tensor, Tensor]:
        problem = MlaProblem(
            q_latent=q[..., :rank].to(DEVICE), q_rope=q[..., rank:].to(DEVICE),
            latent=k[..., :rank].to(DEVICE), k_rope=k[..., rank:].to(DEVICE), pattern=pattern,
            seqlens_k=ints(LENGTHS), block_table=pages, num_splits=splits,
        )  # fmt: skip
        out, lse = mla_attention(problem)
        return out, lse.transpose(1, 2)

    want = run(table(16))
    for row, missing in ((0, 2), (1, 0), (2, 4)):
        pages = table(16, **{f"row{row}": missing})
        absent = (pages < 0).repeat_interleave(16, dim=1).cpu()
        nan = sees(pattern, LENGTHS, tokens, absent).to(DEVICE)
        assert bool(nan[row].any()) or (row, pattern.window_left) == (1, 20)
        for mine, right in zip(run(pages), want, strict=True):
            assert bool(mine[nan].isnan().all()) and torch.equal(mine[~nan], right[~nan])


def test_packed_rows_answer_nan() -> None:
    from hf_attn_kernels.triton.decode import attention_with_cache

    k, v = caches(16)
    cu = torch.tensor([0, 2, 4, 6], dtype=torch.int32, device=DEVICE)
    cu_k = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    found = []
    for pages in (table(16), table(16, row2=4)):
        problem = packed_cache_problem(
            queries(2).flatten(0, 1), k, v, pattern=CAUSAL, cu_seqlens_q=cu, cu_seqlens_k=cu_k,
            max_seqlen_q=2, max_seqlen_k=70, block_table=pages,
        )  # fmt: skip
        found.append(attention_with_cache(problem)[0])
    # of the last row's two queries only the last one sees key 64
    assert bool(found[1][5:].isnan().all()) and torch.equal(found[0][:5], found[1][:5])


def test_a_new_key_without_a_page_is_not_written() -> None:
    """Nor does it land in page 0; the query that would see it is NaN, the one before it is not."""
    k, v = caches(16)
    call = {
        "q": queries(2), "k_cache": k, "v_cache": v, "k": torch.full((ROWS, 2, 2, 32), 7.0),
        "v": torch.full((ROWS, 2, 2, 16), 7.0), "cache_seqlens": ints((63, 38, 60)),
        "block_table": table(16, row0=4),
    }  # fmt: skip
    call |= {n: call[n].to(DEVICE) for n in "kv"}
    out, _ = run_open(call, CAUSAL, 2)
    assert bool(out[0, 1].isnan().all())
    assert bool(out[0, 0].isfinite().all()) and bool(out[1:].isfinite().all())
    assert not bool((k[0] != 1.0).any())
    written = (k == 7.0).all(dim=-1).all(dim=-1)  # [pages, page_size]
    assert int(written.sum()) == 5 and bool(written[4, 15])


# -- where values can be read ----------------------------------------------------------------------


@pytest.fixture(params=["cpu", "extension", "triton"])
def reading(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "extension":
        request.getfixturevalue("with_extension")
    with use_backend("triton" if request.param == "triton" else "cpu"):
        yield request.param


def cache_call(**changes: Any) -> Call:
    k, v = caches(16)
    call: Call = {
        "q": queries(1), "k_cache": k, "v_cache": v, "cache_seqlens": ints(LENGTHS),
        "causal": True, "block_table": table(16),
    }  # fmt: skip
    return call | changes


@ON_CPU
def test_a_cache_says_it(reading: str) -> None:
    with pytest.raises(ValueError, match=r"no page .*keys that a query sees"):
        flash_attn_with_kvcache(**cache_call(block_table=table(16, row1=2)))
    hidden = table(16, row0=1, row1=3, row2=5)
    window = {"window_size": (20, 0), "sink_tokens": 2}
    got = flash_attn_with_kvcache(**cache_call(block_table=hidden, **window))
    want = flash_attn_with_kvcache(**cache_call(**window))
    assert torch.equal(got, want)
    for missing in ({"row0": 0}, {"row0": 3}, {"row0": 4}):  # a sink, the window's ends
        with pytest.raises(ValueError, match=r"no page .*keys that a query sees"):
            flash_attn_with_kvcache(**cache_call(block_table=table(16, **missing), **window))


@ON_CPU
def test_appending_says_it(reading: str) -> None:
    call = cache_call(
        k=torch.full((ROWS, 2, 2, 32), 7.0), v=torch.full((ROWS, 2, 2, 16), 7.0),
        cache_seqlens=ints((63, 38, 60)), block_table=table(16, row0=4), q=queries(2),
    )  # fmt: skip
    with pytest.raises(ValueError, match="no page for some of the 2 new keys"):
        flash_attn_with_kvcache(**call)
    assert not bool((call["k_cache"] == 7.0).any())


@ON_CPU
def test_packed_rows_say_it(reading: str) -> None:
    k, v = caches(16)
    cu = torch.tensor([0, 2, 4, 6], dtype=torch.int32)
    cu_k = torch.tensor([0, *LENGTHS]).cumsum(0).int()
    call: Call = {"causal": True, "block_table": table(16, row2=4)}
    with pytest.raises(ValueError, match=r"no page .*keys that a query sees"):
        flash_attn_varlen_func(queries(2).flatten(0, 1), k, v, cu, cu_k, 2, 70, **call)


@ON_CPU
def test_latents_say_it(reading: str) -> None:
    q, pool = torch.randn(ROWS, 1, 4, 32), torch.randn(19, 16, 32)
    call: Call = {"softmax_scale": 0.2, "cache_seqlens": ints(LENGTHS)}
    args = (q, q[..., :16].contiguous(), pool, pool[..., :16].contiguous())
    with pytest.raises(ValueError, match=r"no page .*keys that a query sees"):
        mla_decode(*args, block_table=table(16, row1=0), **call)
    hidden = mla_decode(*args, block_table=table(16, row1=0), window_size=(20, 0), **call)
    assert torch.equal(
        hidden, mla_decode(*args, block_table=table(16), window_size=(20, 0), **call)
    )
