"""MLA decode calls as data: latent caches of every layout, NaN where nothing may be read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from kernel_cases import assert_within_budget
from torch import Tensor

from hf_attn_kernels import mla_decode
from hf_attn_kernels.fp8 import quantise, widened
from hf_attn_kernels.reference import mla_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")


@dataclass(frozen=True, kw_only=True)
class Case:
    name: str
    lengths: tuple[int, ...] = (111, 63)
    tokens: int = 1
    heads: int = 4
    rank: int = 32
    rope: int = 16
    nope: int = 16
    dim_v: int = 12
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    leftpad: tuple[int, ...] | None = None
    masked: bool = False  # some keys hidden by a mask; rows then have one length
    page_size: int = 0
    free_hidden: bool = False  # pages that the window hides are freed: -1 in the table
    float8: bool = False
    splits: int = 2


@dataclass(frozen=True)
class Inputs:
    q_nope: Tensor
    q_rope: Tensor
    latent: list[Tensor]  # of each row, [length, R]
    k_rope: list[Tensor]
    w_uk: Tensor
    w_uv: Tensor
    keep: list[Tensor]  # [length] bool
    descale: tuple[Tensor, Tensor] | None


def make_inputs(case: Case) -> Inputs:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=g, dtype=torch.float64) * scale).to(
            DEVICE, case.dtype
        )

    batch, spread = len(case.lengths), case.rank**-0.5
    latent = [normal(n, case.rank) for n in case.lengths]
    k_rope = [normal(n, case.rope) for n in case.lengths]
    descale = None
    if case.float8:  # the oracle sees what is stored
        descale = (torch.tensor([0.02], device=DEVICE), torch.tensor([0.5], device=DEVICE))
        latent, k_rope = (
            [rounded(row, d) for row in rows]
            for rows, d in zip((latent, k_rope), descale, strict=True)
        )
    keep = [torch.ones(n, dtype=torch.bool, device=DEVICE) for n in case.lengths]
    for b, row in enumerate(keep):
        row[: case.leftpad[b] if case.leftpad else 0] = False
        if case.masked:
            row[torch.rand(len(row), generator=g).to(DEVICE) < 0.4] = False
    return Inputs(
        q_nope=normal(batch, case.tokens, case.heads, case.nope),
        q_rope=normal(batch, case.tokens, case.heads, case.rope),
        latent=latent,
        k_rope=k_rope,
        w_uk=normal(case.heads, case.nope, case.rank, scale=spread),
        w_uv=normal(case.heads, case.dim_v, case.rank, scale=spread),
        keep=keep,
        descale=descale,
    )


def rounded(row: Tensor, descale: Tensor) -> Tensor:
    stored = quantise(row[None, :, None], descale[None])[0]
    return widened(stored, descale, torch.float32)[:, 0].to(row.dtype)


def scale_of(case: Case) -> float:
    return float((case.nope + case.rope) ** -0.5)


def place(
    case: Case, rows: list[Tensor], keep: list[Tensor], descale: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The cache, NaN where nothing may be read, and its block table."""
    rows = [row.masked_fill(~k[:, None], NAN) for row, k in zip(rows, keep, strict=True)]
    columns, size = rows[0].shape[1], case.page_size
    if not size:
        extra = 0 if case.masked else 5
        cache = torch.full((len(rows), max(map(len, rows)) + extra, columns), NAN, device=DEVICE)
        cache = cache.to(case.dtype)
        for b, row in enumerate(rows):
            cache[b, : len(row)] = row
        return stored(cache, descale), None
    blocks = [-(-n // size) for n in case.lengths]
    order = torch.randperm(sum(blocks) + 3, generator=torch.Generator().manual_seed(7)).tolist()
    table = torch.full((len(rows), max(blocks) + 2), -1, dtype=torch.int32)
    pages = torch.full((len(order), size, columns), NAN, device=DEVICE).to(case.dtype)
    for b, (row, n) in enumerate(zip(rows, case.lengths, strict=True)):
        first = 0 if case.window[0] < 0 else max(0, n - case.tokens - case.window[0])
        for block in range(blocks[b]):
            page = order.pop()
            if case.free_hidden and (block + 1) * size <= first:
                continue
            table[b, block] = page
            piece = row[block * size : (block + 1) * size]
            pages[page, : len(piece)] = piece
    return stored(pages, descale), table.to(DEVICE)


def stored(cache: Tensor, descale: Tensor | None) -> Tensor:
    return cache if descale is None else quantise(cache[:, :, None], descale[None])[:, :, 0]


def absorbed(case: Case, x: Inputs) -> Tensor:
    return torch.einsum("bqhn,hnr->bqhr", x.q_nope.double(), x.w_uk.double()).to(case.dtype)


def run(case: Case, x: Inputs, **changes: Any) -> tuple[Tensor, Tensor]:
    """Latents ``[B, Q, H, R]`` and log-sum-exp; `changes` break the call on purpose."""
    d_latent, d_rope = x.descale or (None, None)
    latent, table = place(case, x.latent, x.keep, d_latent)
    k_rope, _ = place(case, x.k_rope, x.keep, d_rope)

    def ints(values: tuple[int, ...] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.int32, device=DEVICE)

    arguments: dict[str, Any] = {
        "softmax_scale": scale_of(case),
        "cache_seqlens": None if case.masked else ints(case.lengths),
        "block_table": table,
        "cache_leftpad": ints(case.leftpad),
        "key_mask": torch.stack(x.keep) if case.masked else None,
        "causal": case.causal,
        "window_size": case.window,
        "num_splits": case.splits,
        "latent_descale": d_latent,
        "rope_descale": d_rope,
    }
    found = mla_decode(
        absorbed(case, x), x.q_rope, latent, k_rope, return_softmax_lse=True,
        **(arguments | changes),
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


def check(case: Case, x: Inputs, got: tuple[Tensor, Tensor]) -> None:
    """Values after W_UV, and the log-sum-exp, within the error budget of the case's dtype."""
    assert got[0].dtype == case.dtype and got[1].dtype == torch.float32
    true, eager = (expected(case, x, dtype) for dtype in (torch.float64, case.dtype))
    values = torch.einsum("bqhr,hvr->bqhv", got[0].double(), x.w_uv.double()).to(case.dtype)
    assert_within_budget("out", values, eager[0], true[0])
    assert_within_budget("lse", got[1], eager[1].float(), true[1])


def expected(case: Case, x: Inputs, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    parts = []
    for b in range(len(case.lengths)):
        start = case.leftpad[b] if case.leftpad else 0
        parts.append(
            mla_reference(
                x.q_nope[b : b + 1], x.q_rope[b : b + 1], x.latent[b][None, start:],
                x.k_rope[b][None, start:], x.w_uk, x.w_uv, softmax_scale=scale_of(case),
                causal=case.causal, window_size=case.window,
                key_padding_mask=x.keep[b][None, start:], dtype=dtype,
            )
        )  # fmt: skip
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)
