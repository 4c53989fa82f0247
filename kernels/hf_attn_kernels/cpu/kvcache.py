"""Attention over a KV cache, contiguous or paged: the same pieces, blocks and tiles.

A row's valid keys become one piece of work, so padding, empty rows and other rows' memory are never
read. Pages are gathered, and float8 widened, tile by tile into a buffer; the cache as a whole never
is.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..append import rotated, written
from ..batch_invariance import batch_invariant
from ..fp8 import is_float8
from ..problem import UNBOUNDED, CacheProblem
from . import blockwise, extension_decode, extension_prefill
from .cache_op import by_operators, serve
from .choice import Traits, choose
from .context import Context, combine, sum_dtype
from .engine_sdpa import PAGED_KEYS_DECODE, gathered_forward
from .pages import Keys, PagedKeys
from .segments import Work
from .tiling import Scoring


@dataclass(frozen=True)
class Row:
    """One row of the batch, or one packed sequence."""

    number: int
    queries: slice  # of a packed q; of a batch the whole length
    start: int  # keys start <= j < end are valid
    end: int


def attention_with_cache(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """out ``[B, Q, Hq, Dv]`` (packed ``[Tq, Hq, Dv]``) and the natural log-sum-exp ``[B, Hq, Q]``
    (packed ``[Hq, Tq]``), float32; no gradient."""
    if torch.compiler.is_compiling() or type(problem.q) is not Tensor:  # or a fake mode traces
        return by_operators(problem)
    return _attention(problem)


@serve
def _attention(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        problem = rotated(problem)
        if problem.q.numel() == 0:  # what is to be written is written all the same
            return _no_queries(written(problem))
        found = extension_decode.attention(problem)
        if found is None:
            problem = written(problem)
        elif found.whole:
            return found.out, found.lse
        if problem.block_table is not None or is_float8(problem.k_cache):
            out, lse = _row_by_row(problem, found)
        else:
            out, lse = _forward(problem, _flat_call(problem))
    return out, lse.to(torch.float32)


def _no_queries(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    q = problem.q
    lead, (tokens, heads) = q.shape[:-3], q.shape[-3:-1]
    out = q.new_empty(*q.shape[:-1], problem.v_cache.shape[-1])
    return out, q.new_empty(*lead, heads, tokens, dtype=torch.float32)


def _forward(
    problem: CacheProblem, call: blockwise.Call, ctx: Context | None = None
) -> tuple[Tensor, Tensor]:
    return extension_prefill.attention(call) or blockwise.forward(call, _engine(problem), ctx)


def _engine(problem: CacheProblem) -> str:
    traits = Traits(
        dtype=problem.q.dtype,
        head_dim=problem.q.shape[-1],
        head_dim_v=problem.v_cache.shape[-1],
        softcap=problem.pattern.softcap > 0,
    )
    return choose(traits).engine


def _one_tile(
    ctx: Context, problem: CacheProblem, row: Row, call: blockwise.Call
) -> tuple[Tensor, Tensor] | None:
    """The shortest way: one query whose keys are one tile, without planning blocks and tiles. None
    where there is more to it. A batch of short rows decodes in half the time."""
    p, k, v = problem.pattern, call.k, call.v
    low = row.start if p.window_left == UNBOUNDED else max(row.start, row.end - 1 - p.window_left)
    if (
        call.q.shape[1] > 1
        or not 0 < row.end - low <= PAGED_KEYS_DECODE
        or problem.alibi_slopes is not None
        or problem.s_aux is not None
        or (p.sink_tokens and low > row.start)
        or _engine(problem) != blockwise.FLASH
    ):
        return None
    assert isinstance(k, PagedKeys) and isinstance(v, PagedKeys)
    near = ctx.buffer("page keys", (k.gathered_elements(PAGED_KEYS_DECODE),), k.dtype)
    keys = k.read(low, row.end, near).transpose(1, 2)
    near = ctx.buffer("page values", (v.gathered_elements(PAGED_KEYS_DECODE),), v.dtype)
    values = v.read(low, row.end, near).transpose(1, 2)
    out, lse = combine(gathered_forward(call.q, keys, values, p.scaling))
    return out.reshape(call.q.shape), lse.reshape(1, -1, 1)


def _row_by_row(
    problem: CacheProblem, found: extension_decode.Found | None
) -> tuple[Tensor, Tensor]:
    """`found` has the rows of few queries already."""
    q, heads = problem.q, problem.q.shape[-2]
    if found is None:
        shape = (heads, q.shape[0]) if problem.packed else (q.shape[0], heads, q.shape[1])
        out = q.new_zeros(*q.shape[:-1], problem.v_cache.shape[-1])
        lse = q.new_full(shape, float("-inf"), dtype=sum_dtype(q.dtype))
    else:
        out, lse = found.out, found.lse
    scoring = Scoring(pattern=problem.pattern, alibi_slopes=problem.alibi_slopes)
    ctx = Context(scoring=scoring, dtype=sum_dtype(q.dtype))
    for row, call in zip(_rows(problem), _row_calls(problem), strict=True):
        if found is not None and call.q.shape[1] <= extension_decode.MOST_QUERIES:
            continue
        part, part_lse = _one_tile(ctx, problem, row, call) or _forward(problem, call, ctx)
        if problem.packed:
            out[row.queries], lse[:, row.queries] = part[0], part_lse[0]
        else:
            out[row.number], lse[row.number] = part[0], part_lse[0]
    return out, lse


def _rows(problem: CacheProblem) -> Iterator[Row]:
    """Rows with their lengths; packed sequences without queries are left out."""
    if problem.cu_seqlens_q is not None:
        assert problem.cu_seqlens_k is not None
        ends = problem.cu_seqlens_k.diff().tolist()
        bounds = problem.cu_seqlens_q.tolist()
        for number, end in enumerate(ends):
            if bounds[number] < bounds[number + 1]:
                yield Row(number, slice(bounds[number], bounds[number + 1]), 0, end)
        return
    assert problem.seqlens_k is not None
    starts = [0] * problem.q.shape[0] if problem.leftpad is None else problem.leftpad.tolist()
    whole = slice(0, problem.q.shape[1])
    for number, (start, end) in enumerate(zip(starts, problem.seqlens_k.tolist(), strict=True)):
        yield Row(number, whole, min(start, end), end)


def _flat_call(problem: CacheProblem) -> blockwise.Call:
    """One call over the cache as it lies; neighbouring rows of one length are one piece."""
    works: list[Work] = []
    rows = list(_rows(problem))
    at = range(len(rows)) if problem.batch_idx is None else problem.batch_idx.tolist()
    first = 0
    while first < len(rows):
        row, last = rows[first], first + 1
        while (
            not batch_invariant()
            and last < len(rows)
            and (rows[last].start, rows[last].end) == (row.start, row.end)
            and at[last] == at[last - 1] + 1
        ):
            last += 1
        works.append(_work(row, slice(first, last), at[first]))
        first = last
    return _call(problem, problem.q, problem.k_cache, problem.v_cache, works)


def _row_calls(problem: CacheProblem) -> Iterator[blockwise.Call]:
    """One call a row: its pages, read as one sequence. A float8 row that lies whole is one page."""
    if problem.block_table is not None:
        tables = problem.block_table
    elif problem.batch_idx is not None:
        tables = problem.batch_idx[:, None]
    else:
        tables = torch.arange(problem.q.shape[0], dtype=torch.int32)[:, None]
    for row in _rows(problem):
        number = row.number
        q = problem.q[None, row.queries] if problem.packed else problem.q[number : number + 1]
        k, v = (
            PagedKeys(cache, tables[number], 0, q.dtype, _row(descale, number))
            for cache, descale in (
                (problem.k_cache, problem.k_descale),
                (problem.v_cache, problem.v_descale),
            )
        )
        yield _call(problem, q, k, v, [_work(row, slice(0, 1), 0)])


def _row(x: Tensor | None, number: int) -> Tensor | None:
    """``[H]``: a row of ``[1 | B, H]``."""
    if x is None:
        return None
    return x[0] if x.shape[0] == 1 else x[number]


def _work(row: Row, rows: slice, at: int) -> Work:
    queries = row.queries.stop - row.queries.start
    return Work(
        rows=rows,  # of the call's q; `number` stays the batch's
        key_rows=slice(at, at + rows.stop - rows.start),
        queries=slice(0, queries),
        keys=slice(row.start, row.end),
        number=row.number,
        offset=row.end - queries - row.start,
        first=row.start,
        exact=True,
    )


def _call(problem: CacheProblem, q: Tensor, k: Keys, v: Keys, works: list[Work]) -> blockwise.Call:
    scoring = Scoring(pattern=problem.pattern, alibi_slopes=problem.alibi_slopes)
    return blockwise.Call(q=q, k=k, v=v, works=works, scoring=scoring, s_aux=problem.s_aux)
