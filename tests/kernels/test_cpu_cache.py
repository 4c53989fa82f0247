"""The CPU backend over KV caches, contiguous and paged, against the float64 oracle.

Whatever no query may see is NaN: behind a row's length, before its left padding, unused pages and
pages that a window has left behind (-1 in the table).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from kernel_cases import assert_within_budget
from torch import Tensor

from hf_attn_kernels import flash_attn_with_kvcache
from hf_attn_kernels.cpu import attention_with_cache
from hf_attn_kernels.cpu.extension_decode import LANES, MOST_QUERIES
from hf_attn_kernels.cpu.pages import PagedKeys
from hf_attn_kernels.problem import CacheProblem, Pattern
from hf_attn_kernels.reference import attention_reference

NAN = float("nan")
F16, BF16 = torch.float16, torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    lengths: tuple[int, ...] = (111, 0, 63)
    tokens: int = 1
    heads_q: int = 4
    heads_kv: int = 2
    dim: int = 16
    dim_v: int = 16
    dtype: torch.dtype = torch.float32
    causal: bool = True
    left: int = -1
    sinks: int = 0
    softcap: float = 0.0
    s_aux: bool = False
    alibi: bool = False
    leftpad: tuple[int, ...] = ()
    page: int = 0
    moved: bool = False  # batch_idx sends rows elsewhere


BASE = (
    Case(name="one-query"),
    Case(name="K1", lengths=(1, 1)),
    Case(name="equal-rows", lengths=(63, 63, 63)),
    Case(name="Q3", tokens=3),
    Case(name="Q40-more-queries-than-keys", tokens=40, lengths=(7, 257)),
    Case(name="full-Q5", tokens=5, causal=False),
    Case(name="mha", heads_kv=4),
    Case(name="mqa-bf16", heads_kv=1, dtype=BF16),
    Case(name="fp16", dtype=F16, tokens=2),
    Case(name="DV24", dim_v=24),
    Case(name="window-1", left=0, tokens=3),
    Case(name="window", left=20, tokens=3),
    Case(name="window-is-K", left=110),
    Case(name="window-beyond-K", left=500),
    Case(name="window-sinks", left=20, sinks=5, tokens=3),
    Case(name="window-sinks-many-queries", left=9, sinks=2, tokens=40, lengths=(111, 50)),
    Case(name="softcap", softcap=3.0, tokens=2),
    Case(name="s_aux-empty-row", s_aux=True),
    Case(name="alibi", alibi=True, tokens=3),
    Case(name="streamed", lengths=(5000, 4100)),
    Case(name="streamed-bf16", lengths=(5000,), dtype=BF16, tokens=2),
    Case(name="streamed-fp16-window", lengths=(5000,), dtype=F16, left=4500, sinks=3),
)
CONTIGUOUS = (
    *BASE,
    Case(name="moved-rows", moved=True),
    Case(name="leftpad", leftpad=(5, 0, 60), tokens=2),
    Case(name="leftpad-hides-row", leftpad=(5, 0, 63)),
    Case(name="leftpad-window-sinks-alibi", leftpad=(7, 0, 1), left=20, sinks=3, alibi=True),
)
PAGED = tuple(
    replace(case, name=f"{case.name}-page{size}", page=size) for size in (16, 64) for case in BASE
)


def compiled_serves(case: Case) -> bool:
    """Whether the compiled extension takes the case; else torch's path does with it as without."""
    return case.tokens <= MOST_QUERIES and case.dim % LANES == case.dim_v % LANES == 0


@dataclass(frozen=True)
class Inputs:
    q: Tensor  # [B, Q, Hq, D]
    k: list[Tensor]  # of each row [length, Hkv, D]
    v: list[Tensor]
    s_aux: Tensor | None
    slopes: Tensor | None


def make_inputs(case: Case) -> Inputs:
    torch.manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape).to(case.dtype)

    return Inputs(
        q=normal(len(case.lengths), case.tokens, case.heads_q, case.dim),
        k=[normal(n, case.heads_kv, case.dim) for n in case.lengths],
        v=[normal(n, case.heads_kv, case.dim_v) for n in case.lengths],
        s_aux=normal(case.heads_q) if case.s_aux else None,
        slopes=torch.rand(1, case.heads_q) if case.alibi else None,
    )


def contiguous(case: Case, rows: list[Tensor], order: list[int]) -> Tensor:
    cache = torch.full((len(rows), max(case.lengths) + 3, *rows[0].shape[1:]), NAN)
    cache = cache.to(case.dtype)
    for b, row in enumerate(rows):
        start = case.leftpad[b] if case.leftpad else 0
        cache[order[b], start : len(row)] = row[start:]
    return cache


def paged(case: Case, x: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled pages, NaN where nothing visible is, and the table."""
    blocks = [-(-n // case.page) for n in case.lengths]
    order = torch.randperm(sum(blocks) + 3).tolist()
    table = torch.full((len(blocks), max(blocks) + 2), -1, dtype=torch.int32)
    pools = [
        torch.full((len(order), case.page, case.heads_kv, d), NAN).to(case.dtype)
        for d in (case.dim, case.dim_v)
    ]
    for b, n in enumerate(case.lengths):
        shown = 0 if case.left < 0 else max(0, n - case.tokens - case.left)
        for block in range(blocks[b]):
            start, end = block * case.page, (block + 1) * case.page
            if end <= shown and start >= case.sinks:
                continue  # freed: the window has passed it
            table[b, block] = order.pop()
            for pool, rows in zip(pools, (x.k, x.v), strict=True):
                piece = rows[b][start:end]
                pool[table[b, block], : len(piece)] = piece
    return pools[0], pools[1], table


def call(case: Case, x: Inputs, shift: int = 0) -> tuple[Tensor, Tensor]:
    table = idx = pad = None
    if case.page:
        k, v, table = paged(case, x)
    else:
        order = list(range(len(case.lengths)))
        if case.moved:
            order = [*order[1:], 0]
            idx = torch.tensor(order, dtype=torch.int32)
        k, v = contiguous(case, x.k, order), contiguous(case, x.v, order)
    if case.leftpad:
        pad = torch.tensor(case.leftpad, dtype=torch.int32)
    pattern = Pattern(
        scaling=case.dim**-0.5,
        window_left=case.left + shift,
        window_right=0 if case.causal else -1,
        softcap=case.softcap,
        sink_tokens=case.sinks,
    )
    return attention_with_cache(
        CacheProblem(
            q=x.q, k_cache=k, v_cache=v, seqlens_k=torch.tensor(case.lengths, dtype=torch.int32),
            pattern=pattern, block_table=table, batch_idx=idx, leftpad=pad, s_aux=x.s_aux,
            alibi_slopes=x.slopes,
        )
    )  # fmt: skip


def check(case: Case, shift: int = 0) -> None:
    x = make_inputs(case)
    out, lse = call(case, x, shift)
    assert out.dtype == case.dtype and lse.dtype == torch.float32
    for b, length in enumerate(case.lengths):
        keep = None
        if case.leftpad:
            keep = (torch.arange(length) >= case.leftpad[b])[None]
        exact, eager = (
            attention_reference(
                x.q[b : b + 1], x.k[b][None], x.v[b][None], causal=case.causal,
                window_size=(case.left, -1), softcap=case.softcap, sink_tokens=case.sinks,
                s_aux=x.s_aux, alibi_slopes=x.slopes, key_padding_mask=keep, dtype=dtype,
            )
            for dtype in (torch.float64, case.dtype)
        )  # fmt: skip
        assert_within_budget(f"out of row {b}", out[b : b + 1], eager[0], exact[0])
        assert_within_budget(f"lse of row {b}", lse[b : b + 1], eager[1].float(), exact[1])


@pytest.mark.parametrize("case", [*CONTIGUOUS, *PAGED], ids=lambda case: case.name)
def test_matches_the_oracle(case: Case, poison_memory: None) -> None:
    check(case)


SERVED = [c for c in (*CONTIGUOUS, *PAGED) if compiled_serves(c)]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_extension_matches_the_oracle(
    case: Case, poison_memory: None, with_extension: list[object]
) -> None:
    check(case)
    assert len(with_extension) == 1


@pytest.mark.parametrize("page", [0, 16], ids=["contiguous", "paged"])
def test_negative_control_of_the_extension(page: int, with_extension: list[object]) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        check(Case(name="", left=20, tokens=3, page=page), shift=-1)
    assert len(with_extension) == 1


@pytest.mark.parametrize("page", [0, 16], ids=["contiguous", "paged"])
def test_negative_control(page: int) -> None:
    with pytest.raises(AssertionError, match="exceeds"):
        check(Case(name="", left=20, tokens=3, page=page), shift=-1)


@pytest.mark.parametrize("page", [0, 32], ids=["contiguous", "paged"])
def test_through_the_public_door(page: int) -> None:
    """Appending step by step gives what causal attention over the whole sequence gives."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 40, h, 16) for h in (4, 2, 2))
    table = None
    if page:
        table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    caches = [torch.full((4, page, 2, 16) if page else (2, 64, 2, 16), NAN) for _ in range(2)]
    outs, start = [], 0
    for size in (7, 1, 31, 1):
        new = slice(start, start + size)
        outs.append(
            flash_attn_with_kvcache(
                q[:, new], *caches, k[:, new], v[:, new], cache_seqlens=start, causal=True,
                block_table=table,
            )
        )  # fmt: skip
        start += size
    exact, _ = attention_reference(q, k, v, causal=True)
    torch.testing.assert_close(torch.cat(outs, dim=1).double(), exact, rtol=1e-5, atol=1e-5)


def test_pages_in_order_are_not_copied() -> None:
    cache = torch.randn(6, 16, 2, 8)

    def table(*pages: int) -> Tensor:
        return torch.tensor(pages, dtype=torch.int32)

    inside = PagedKeys(cache, table(2, 3, 4, -1)).read(5, 40)
    assert inside.data_ptr() == cache[2, 5].data_ptr() and inside.shape == (1, 35, 2, 8)
    apart = PagedKeys(cache, table(2, 4, 3, -1))
    assert torch.equal(apart.read(5, 40)[0, 11:27], cache[4])
    assert torch.equal(apart.starting_at(5).read(0, 35), apart.read(5, 40))


@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["flash", "matmul"])
def test_no_full_gather(softcap: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long row is read in tiles: no single read comes near its whole length."""
    sizes = []
    read = PagedKeys.read

    def noting(self: PagedKeys, k0: int, k1: int, near: Tensor | None = None) -> Tensor:
        sizes.append(k1 - k0)
        return read(self, k0, k1, near)

    monkeypatch.setattr(PagedKeys, "read", noting)
    monkeypatch.setattr("hf_attn_kernels.cpu.engine_matmul.SLAB_ELEMENTS", 2**15)
    check(Case(name="", lengths=(5000,), page=16, softcap=softcap))
    assert max(sizes) <= 2048 and sum(sizes) == 2 * 5000
