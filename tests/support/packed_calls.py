"""Packed calls over pages as data: pools full of NaN but for what a query may see, and tables."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
from decode_calls import DEVICE, NAN
from kernel_cases import assert_within_budget
from torch import Tensor

from hf_attn_kernels import flash_attn_varlen_func
from hf_attn_kernels.fp8 import E4M3, quantise
from hf_attn_kernels.reference import attention_reference

# (queries, keys) of each sequence: decode rows, chunks of a prefill, empty ones
MIXED = ((1, 111), (0, 0), (5, 63), (17, 17), (1, 1), (0, 63), (63, 111))


@dataclass(frozen=True, kw_only=True)
class Packed:
    name: str
    lengths: tuple[tuple[int, int], ...] = MIXED
    page: int = 16
    heads_q: int = 4
    heads_kv: int = 2
    dim: int = 32
    dim_v: int = 32
    dtype: torch.dtype = torch.float32
    causal: bool = True
    left: int = -1
    sinks: int = 0
    softcap: float = 0.0
    s_aux: bool = False
    alibi: bool = False
    float8: str = ""  # "", "one" (no descale), "heads" or "rows"
    spare_tokens: int = 3  # of q, behind the last sequence

    @property
    def cu(self) -> tuple[Tensor, Tensor]:
        q, k = zip(*self.lengths, strict=True)
        return tuple(  # type: ignore[return-value]
            torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=DEVICE) for n in (q, k)
        )


@dataclass(frozen=True)
class Inputs:
    """k and v ``[Tk, Hkv, D]`` are what the pages stand for: of float8 ones the stored numbers
    times their descale, in float32."""

    q: Tensor
    k: Tensor
    v: Tensor
    k_pages: Tensor
    v_pages: Tensor
    table: Tensor
    s_aux: Tensor | None
    slopes: Tensor | None
    k_descale: Tensor | None
    v_descale: Tensor | None


def make_packed(case: Packed) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g).to(DEVICE, case.dtype)

    rows, hkv = len(case.lengths), case.heads_kv
    tokens = sum(n for n, _ in case.lengths) + case.spare_tokens
    keys = sum(n for _, n in case.lengths)
    q = normal(tokens, case.heads_q, case.dim)
    k, v = normal(keys, hkv, case.dim), normal(keys, hkv, case.dim_v)
    descales: list[Tensor | None] = [None, None]
    if case.float8 in ("heads", "rows"):
        shape = (hkv,) if case.float8 == "heads" else (rows, hkv)
        descales = [0.002 + 0.01 * torch.rand(shape, generator=g).to(DEVICE) for _ in "kv"]
    stored = [k, v]
    if case.float8:
        of = torch.repeat_interleave(torch.tensor([n for _, n in case.lengths])).to(DEVICE)
        for i, (x, descale) in enumerate(zip((k, v), descales, strict=True)):
            scale = torch.ones(hkv, device=DEVICE) if descale is None else descale
            scale = scale[of] if scale.dim() == 2 else scale.expand(len(of), hkv)  # [Tk, Hkv]
            stored[i] = quantise(x[:, None], scale)[:, 0]  # a row each
            x = stored[i].float() * scale[:, :, None]
            k, v = (x, v) if i == 0 else (k, x)
    pools, table = paged(case, stored)
    slopes = torch.rand(rows, case.heads_q, generator=g).to(DEVICE) if case.alibi else None
    s_aux = normal(case.heads_q) if case.s_aux else None
    return Inputs(q, k, v, *pools, table, s_aux, slopes, *descales)


def paged(case: Packed, stored: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Shuffled pages, NaN where no query sees; pages that a window hides are -1 in the table."""
    size = case.page
    blocks = [-(-n // size) for _, n in case.lengths]
    order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(7)).tolist()
    pools = [nan_pages(len(order), size, x) for x in stored]
    table = torch.full((len(blocks), max(blocks) + 2), -1, dtype=torch.int32)
    first = 0
    for row, (q_len, k_len) in enumerate(case.lengths):
        shown = 0 if case.left < 0 else max(0, k_len - q_len - case.left)
        for block in range(blocks[row]):
            start, end = block * size, min((block + 1) * size, k_len)
            if (end <= shown and start >= case.sinks) or not q_len:
                continue
            table[row, block] = order.pop()
            for pool, x in zip(pools, stored, strict=True):
                pool[table[row, block], : end - start] = x[first + start : first + end]
        first += k_len
    return pools, table.to(DEVICE)


def nan_pages(count: int, size: int, like: Tensor) -> Tensor:
    shape = (count, size, *like.shape[1:])
    if like.dtype == E4M3:
        bits = torch.full(shape, 0x7F, dtype=torch.uint8, device=DEVICE)  # NaN
        return bits.view(E4M3)
    return torch.full(shape, NAN, dtype=like.dtype, device=DEVICE)


def run_packed(case: Packed, x: Inputs) -> tuple[Tensor, Tensor]:
    cu_q, cu_k = case.cu
    got = flash_attn_varlen_func(
        x.q, x.k_pages, x.v_pages, cu_q, cu_k, max(n for n, _ in case.lengths),
        max(n for _, n in case.lengths), causal=case.causal, window_size=(case.left, -1),
        softcap=case.softcap, alibi_slopes=x.slopes, s_aux=x.s_aux, sink_tokens=case.sinks,
        block_table=x.table, return_attn_probs=True, k_descale=x.k_descale, v_descale=x.v_descale,
    )  # fmt: skip
    assert isinstance(got, tuple) and got[1] is not None
    return got[0], got[1]


def check_packed(case: Packed, x: Inputs, got: tuple[Tensor, Tensor]) -> None:
    """Output and log-sum-exp within the error budget of the case's dtype."""
    exact, eager = (
        attention_reference(
            x.q, x.k, x.v, causal=case.causal, window_size=(case.left, -1), softcap=case.softcap,
            alibi_slopes=x.slopes, s_aux=x.s_aux, sink_tokens=case.sinks, cu_seqlens_q=case.cu[0],
            cu_seqlens_k=case.cu[1], dtype=dtype,
        )
        for dtype in (torch.float64, case.dtype)
    )  # fmt: skip
    assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
    assert_within_budget("out", got[0], eager[0], exact[0])
    assert_within_budget("lse", got[1], eager[1].float(), exact[1])
