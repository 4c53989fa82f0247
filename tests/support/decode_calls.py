"""Decode calls as data: caches of every layout, filled with NaN where nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from kernel_cases import assert_within_budget
from torch import Tensor

from hf_attn_kernels.problem import CacheProblem, Pattern
from hf_attn_kernels.reference import attention_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    lengths: tuple[int, ...] = (111, 63)
    tokens: int = 1
    heads_q: int = 4
    heads_kv: int = 2
    dim: int = 32
    dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    sink_tokens: int = 0
    softcap: float = 0.0
    s_aux: bool = False
    alibi: bool = False
    leftpad: tuple[int, ...] | None = None
    page_size: int = 0
    free_hidden: bool = False  # pages that the window hides are freed: -1 in the table
    splits: int = 2

    @property
    def pattern(self) -> Pattern:
        left, right = self.window
        return Pattern(
            scaling=self.dim**-0.5,
            window_left=left,
            window_right=0 if self.causal else right,
            softcap=self.softcap,
            sink_tokens=self.sink_tokens if left >= 0 else 0,
        )


@dataclass(frozen=True)
class Inputs:
    q: Tensor
    k: list[Tensor]  # one [length, Hkv, D] for each row
    v: list[Tensor]
    s_aux: Tensor | None
    slopes: Tensor | None


def make_inputs(case: Case, seed: int = 0) -> Inputs:
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, case.dtype)

    dim_v = case.dim_v or case.dim
    return Inputs(
        q=normal(len(case.lengths), case.tokens, case.heads_q, case.dim),
        k=[normal(n, case.heads_kv, case.dim) for n in case.lengths],
        v=[normal(n, case.heads_kv, dim_v) for n in case.lengths],
        s_aux=normal(case.heads_q) if case.s_aux else None,
        slopes=torch.rand(1, case.heads_q, generator=g).to(DEVICE) if case.alibi else None,
    )


def contiguous_cache(rows: list[Tensor], leftpad: tuple[int, ...] | None, extra: int) -> Tensor:
    """``[B, K, Hkv, D]``: the rows, NaN where nothing valid is."""
    longest = max(map(len, rows)) + extra
    cache = torch.full((len(rows), longest, *rows[0].shape[1:]), NAN, device=DEVICE)
    cache = cache.to(rows[0].dtype)
    for b, row in enumerate(rows):
        start = leftpad[b] if leftpad else 0
        cache[b, start : len(row)] = row[start:]
    return cache


def first_visible(case: Case, length: int) -> int:
    """First key that the first token's window shows."""
    left = case.window[0]
    return 0 if left < 0 else max(0, length - case.tokens - left)


def paged_cache(case: Case, k: list[Tensor], v: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Shuffled pages and their table: unused pages and the ends of last pages are NaN."""
    size = case.page_size
    blocks = [-(-n // size) for n in case.lengths]
    total = sum(blocks) + 3
    order = torch.randperm(total, generator=torch.Generator().manual_seed(7)).tolist()
    table = torch.full((len(k), max(blocks) + 2), -1, dtype=torch.int32)
    pages = [
        torch.full((total, size, *t[0].shape[1:]), NAN, dtype=t[0].dtype, device=DEVICE)
        for t in (k, v)
    ]
    for b, n in enumerate(case.lengths):
        for block in range(blocks[b]):
            hidden = (block + 1) * size <= first_visible(case, n) and (
                block * size >= case.sink_tokens
            )
            if case.free_hidden and hidden:
                continue
            page = order.pop()
            table[b, block] = page
            for pool, rows in zip(pages, (k, v), strict=True):
                piece = rows[b][block * size : (block + 1) * size]
                pool[page, : len(piece)] = piece
    return pages[0], pages[1], table.to(DEVICE)


def ints(values: tuple[int, ...] | None) -> Tensor | None:
    return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)


def run(case: Case, x: Inputs) -> tuple[Tensor, Tensor]:
    from hf_attn_kernels.triton.decode import attention_with_cache

    table = None
    if case.page_size:
        k_cache, v_cache, table = paged_cache(case, x.k, x.v)
    else:
        k_cache = contiguous_cache(x.k, case.leftpad, extra=5)
        v_cache = contiguous_cache(x.v, case.leftpad, extra=5)
    lengths = ints(case.lengths)
    assert lengths is not None
    return attention_with_cache(
        CacheProblem(
            q=x.q, k_cache=k_cache, v_cache=v_cache, seqlens_k=lengths, pattern=case.pattern,
            block_table=table, leftpad=ints(case.leftpad), s_aux=x.s_aux, alibi_slopes=x.slopes,
            num_splits=case.splits,
        )
    )  # fmt: skip


def expected(case: Case, x: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    outs, lses = [], []
    for b in range(len(case.lengths)):
        start = case.leftpad[b] if case.leftpad else 0
        out, lse = attention_reference(
            x.q[b : b + 1], x.k[b][None, start:], x.v[b][None, start:], causal=case.causal,
            window_size=case.window, softcap=case.softcap, s_aux=x.s_aux, alibi_slopes=x.slopes,
            sink_tokens=case.sink_tokens, dtype=dtype,
        )  # fmt: skip
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def check(case: Case, x: Inputs, got: tuple[Tensor, Tensor]) -> None:
    """Output and log-sum-exp within the error budget of the case's dtype."""
    true, true_lse = expected(case, x, torch.float64)
    eager, eager_lse = expected(case, x, case.dtype)
    assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
    assert_within_budget("out", got[0], eager, true)
    assert_within_budget("lse", got[1], eager_lse.float(), true_lse)
