"""A whole call: every piece of work, block by block, forward and backward.

Shape letters as in :mod:`..problem`. Packed batches come as dense ones of a single row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..problem import UNBOUNDED, Problem
from . import engine_matmul, engine_sdpa
from .context import Context, sum_dtype
from .pages import Keys, PagedKeys
from .segments import NO_SEQUENCE, Work, dense_works, packed_works
from .tiling import Block, Scoring

FLASH, MATMUL = "flash", "matmul"
# log-sum-exps beyond it are too coarse to make weights of: 32 times an ordinary score's rounding.
# A row is there that an added mask hides by finfo.min, or by -10,000
FAR = 1000.0


@dataclass(frozen=True, kw_only=True)
class Call:
    """Checked tensors of one call, as a dense batch."""

    q: Tensor  # [B, Q, Hq, D]
    k: Keys  # [B, K, Hkv, D]
    v: Keys  # [B, K, Hkv, Dv]
    works: list[Work]
    scoring: Scoring
    s_aux: Tensor | None
    seed: int = 0


@dataclass(frozen=True)
class Gradients:
    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    bias: Tensor | None


def call_of(problem: Problem) -> Call:
    """The call as a dense batch, cut into pieces."""
    q, k, v = problem.q, problem.k, problem.v
    if problem.packed:
        assert problem.cu_seqlens_q is not None and problem.cu_seqlens_k is not None
        works = packed_works(problem.cu_seqlens_q, problem.cu_seqlens_k, q.shape[0])
        q, k, v = q[None], k[None], v[None]
    else:
        works = dense_works(q.shape[0], q.shape[1], k.shape[1], problem.key_padding_mask)
    if q.numel() == 0:  # no queries, or no heads of them
        works = []
    slopes = problem.alibi_slopes
    return Call(
        q=q,
        k=k,
        v=v,
        works=works,
        scoring=Scoring(
            pattern=problem.pattern,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 2 else slopes[None],
            bias=problem.bias,
        ),
        s_aux=problem.s_aux,
        seed=0 if problem.dropout_seed is None else int(problem.dropout_seed),
    )


def forward(call: Call, engine: str, ctx: Context | None = None) -> tuple[Tensor, Tensor]:
    """out ``[B, Q, Hq, Dv]`` and lse ``[B, Hq, Q]`` in the dtype of sums, both contiguous.

    `ctx` is that of calls of the same scoring before, whose buffers and masks are used again.
    """
    batch, length, heads, _ = call.q.shape
    dtype = sum_dtype(call.q.dtype)
    ctx = ctx or Context(scoring=call.scoring, dtype=dtype, seed=call.seed)
    out = call.q.new_empty(batch, length, heads, call.v.shape[-1])
    lse = call.q.new_empty(batch, heads, length, dtype=dtype)
    run = engine_sdpa.forward if engine == FLASH else engine_matmul.forward
    for work in _split(call, engine):
        q = call.q[work.rows, work.queries]
        k, v = work.select_keys(call.k), work.select_keys(call.v)
        for block in _blocks(call, work, engine):
            part = slice(work.queries.start + block.q0, work.queries.start + block.end)
            if not block.tiles:
                out[work.rows, part] = 0.0
                sink = None if work.number == NO_SEQUENCE else call.s_aux
                lse[work.rows, :, part] = float("-inf") if sink is None else sink[:, None]
                continue
            o, ell = run(ctx, work, block, q[:, block.q0 : block.end], k, v)
            if call.s_aux is not None:
                o, ell = _with_sink(o, ell, call.s_aux.view(*o.shape[1:3], 1))
            _store(out[work.rows, part], o, block.strip)
            _store(lse[work.rows, :, part].transpose(1, 2), ell, block.strip)
    return out, lse


def backward(
    call: Call, engine: str, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None,
    bias_needs_grad: bool,
) -> Gradients:  # fmt: skip
    """Gradients from the forward's results; every tile is computed again.

    Args:
        grad_out: ``[B, Q, Hq, Dv]``; grad_lse: ``[B, Hq, Q]`` or None. A gradient of the
            log-sum-exp needs the matmul engine.
    """
    dtype = sum_dtype(call.q.dtype)
    assert isinstance(call.k, Tensor) and isinstance(call.v, Tensor)  # caches have no gradient
    ctx = Context(scoring=call.scoring, dtype=dtype, seed=call.seed)
    delta = torch.einsum("bqhd,bqhd->bhq", grad_out.to(dtype), out.to(dtype))
    if grad_lse is not None:
        assert engine == MATMUL
        delta = delta - grad_lse
    lse = lse.masked_fill(torch.isneginf(lse), float("inf"))  # exp(s - inf) = 0: no gradient there
    grad_s_aux = None
    if call.s_aux is not None:
        share = (call.s_aux.to(dtype)[:, None] - lse).exp()
        grad_s_aux = -(share * delta).sum(dim=(0, 2)).to(call.s_aux.dtype)
    bias = call.scoring.bias
    grad_bias = (
        torch.zeros_like(bias, dtype=dtype) if bias is not None and bias_needs_grad else None
    )
    grad_q = torch.zeros_like(call.q, memory_format=torch.contiguous_format)
    grad_k = torch.zeros(call.k.shape, dtype=dtype)
    grad_v = torch.zeros(call.v.shape, dtype=dtype)
    sums = (grad_q, grad_k, grad_v, grad_bias)
    far = (lse.abs() > FAR) & lse.isfinite()
    if not bool(far.any()):
        _add_gradients(ctx, call, engine, (out, grad_out, lse, delta), None, sums)
    else:
        near = lse.masked_fill(far, float("inf"))
        _add_gradients(ctx, call, engine, (out, grad_out, near, delta), None, sums)
        _add_gradients(ctx, call, MATMUL, (out, grad_out, lse, delta), far, sums)
    return Gradients(
        q=grad_q,
        k=grad_k.to(call.k.dtype),
        v=grad_v.to(call.v.dtype),
        s_aux=grad_s_aux,
        bias=None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
    )


def _add_gradients(
    ctx: Context, call: Call, engine: str, given: tuple[Tensor, Tensor, Tensor, Tensor],
    far: Tensor | None, sums: tuple[Tensor, Tensor, Tensor, Tensor | None],
) -> None:  # fmt: skip
    """Adds to `sums`, those of q, k, v and bias, from `given`: out, its gradient, lse and delta.

    With `far` ``[B, Hq, Q]`` the share of those rows alone, whose log-sum-exp is not to be trusted.
    """
    out, grad_out, lse, delta = given
    grad_q, grad_k, grad_v, grad_bias = sums
    dtype = ctx.dtype
    assert isinstance(call.k, Tensor) and isinstance(call.v, Tensor)
    for work in _split(call, engine):
        q, o, do = (x[work.rows, work.queries] for x in (call.q, out, grad_out))
        k, v = work.select_keys(call.k), work.select_keys(call.v)
        assert isinstance(k, Tensor) and isinstance(v, Tensor)
        dk, dv = grad_k[work.key_rows, work.keys], grad_v[work.key_rows, work.keys]
        if work.positions is not None:
            dk, dv = torch.zeros(k.shape, dtype=dtype), torch.zeros(v.shape, dtype=dtype)
        ell, dl = lse[work.rows, :, work.queries], delta[work.rows, :, work.queries]
        for block in (one for strip in _blocks(call, work, engine) for one in strip.each()):
            if not block.tiles:
                continue
            i = slice(block.q0, block.q1)
            if engine == FLASH:
                dq = engine_sdpa.backward(
                    ctx, work, block, q[:, i], k, v, o[:, i], ell[:, :, i], do[:, i], dk, dv
                )
            else:
                peak, rest = None, ell[:, :, i]
                if far is not None:
                    mine = far[work.rows, :, work.queries][:, :, i]
                    if not bool(mine.any()):
                        continue
                    peak, rest = engine_matmul.parted_lse(ctx, work, block, q[:, i], k, call.s_aux)
                    rest = rest.masked_fill(~mine, float("inf"))
                dq = engine_matmul.backward(
                    ctx, work, block, q[:, i], k, v, rest, peak, dl[:, :, i], do[:, i], dk, dv,
                    grad_bias,
                )  # fmt: skip
            grad_q[work.rows, work.queries][:, i] += dq
        if work.positions is not None:
            for whole, part in ((grad_k, dk), (grad_v, dv)):
                whole[work.key_rows, work.keys].index_add_(1, work.positions, part)


def _store(place: Tensor, x: Tensor, strip: int) -> None:
    """Writes ``[s or b, Hkv, G, m, ...]`` to its place, ``[b, s * m, Hq, ...]``."""
    if strip > 1:
        place = place[0].unflatten(0, (strip, -1))  # [s, m, Hq, ...]
    place.unflatten(2, x.shape[1:3]).copy_(x.movedim(3, 1))


def _blocks(call: Call, work: Work, engine: str) -> Iterator[Block]:
    heads, heads_kv = call.q.shape[2], call.k.shape[2]
    if engine == FLASH:
        paged = isinstance(call.k, PagedKeys)
        return engine_sdpa.blocks(work, call.scoring, heads, heads_kv, call.q.shape[3], paged=paged)
    return engine_matmul.blocks(work, call.scoring, heads // heads_kv, heads_kv)


def _split(call: Call, engine: str) -> Iterator[Work]:
    """The pieces; long queries row by row for matmuls, so that a tile of scores stays small, and
    for windows, so that blocks can take the place of the batch."""
    p = call.scoring.pattern
    whole = engine == FLASH and p.window_left == UNBOUNDED and p.window_right in (UNBOUNDED, 0)
    for work in call.works:
        if whole or work.row_count == 1 or work.query_count < 16:
            yield work
            continue
        for row in range(work.row_count):
            yield replace(
                work,
                rows=slice(work.rows.start + row, work.rows.start + row + 1),
                key_rows=slice(work.key_rows.start + row, work.key_rows.start + row + 1),
                number=work.number + row,
            )


def _with_sink(out: Tensor, lse: Tensor, s_aux: Tensor) -> tuple[Tensor, Tensor]:
    """One more logit ``[Hkv, G, 1]`` in the denominator of out ``[b, Hkv, G, m, Dv]``."""
    total = torch.logaddexp(lse, s_aux.to(lse.dtype))
    safe = total.masked_fill(torch.isneginf(total), 0.0)
    return out.to(lse.dtype) * (lse - safe).exp()[..., None], total
