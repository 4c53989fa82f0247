"""Attention over a KV cache, contiguous or paged: the same pieces, blocks and tiles.

A row's valid keys become one piece of work, so padding, empty rows and other rows' memory are never
read. Pages are gathered tile by tile into heads-first copies; the cache as a whole never is.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..problem import CacheProblem
from . import run
from .choice import Traits, choose
from .pages import Keys, PagedKeys
from .tiling import Scoring
from .work import Work


def attention_with_cache(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """out ``[B, Q, Hq, Dv]`` and the natural log-sum-exp ``[B, Hq, Q]`` float32; no gradient."""
    with torch.no_grad():
        calls = _paged_calls(problem) if problem.block_table is not None else _flat_calls(problem)
        parts = [run.forward(call, _engine(problem, call)) for call in calls]
    if len(parts) == 1:
        out, lse = parts[0]
    else:
        out, lse = (torch.cat(list(column)) for column in zip(*parts, strict=True))
    return out, lse.to(torch.float32)


def _engine(problem: CacheProblem, call: run.Call) -> str:
    traits = Traits(
        dtype=call.q.dtype,
        head_dim=call.q.shape[-1],
        head_dim_v=call.v.shape[-1],
        softcap=problem.pattern.softcap > 0,
    )
    return choose(traits).engine


def _flat_calls(problem: CacheProblem) -> list[run.Call]:
    """One call over the cache as it lies; neighbouring rows of one length are one piece."""
    works: list[Work] = []
    batch, q_len = problem.q.shape[:2]
    starts, ends = _bounds(problem)
    at = list(range(batch)) if problem.batch_idx is None else problem.batch_idx.tolist()
    row = 0
    while row < batch:
        last = row + 1
        while (
            last < batch
            and (starts[last], ends[last]) == (starts[row], ends[row])
            and at[last] == at[last - 1] + 1
        ):
            last += 1
        works.append(_work(row, last, at[row], q_len, starts[row], ends[row]))
        row = last
    return [_call(problem, problem.q, problem.k_cache, problem.v_cache, works)]


def _paged_calls(problem: CacheProblem) -> list[run.Call]:
    """One call a row: its pages, read as one sequence."""
    assert problem.block_table is not None
    starts, ends = _bounds(problem)
    q_len = problem.q.shape[1]
    calls = []
    for row, pages in enumerate(problem.block_table.tolist()):
        work = _work(row, row + 1, 0, q_len, starts[row], ends[row])
        work = replace(work, rows=slice(0, 1))  # of this call's q; `number` stays the batch's row
        k, v = PagedKeys(problem.k_cache, pages), PagedKeys(problem.v_cache, pages)
        calls.append(_call(problem, problem.q[row : row + 1], k, v, [work]))
    return calls


def _bounds(problem: CacheProblem) -> tuple[list[int], list[int]]:
    ends = problem.seqlens_k.tolist()
    if problem.leftpad is None:
        return [0] * len(ends), ends
    return [min(s, e) for s, e in zip(problem.leftpad.tolist(), ends, strict=True)], ends


def _work(row: int, last: int, at: int, q_len: int, start: int, end: int) -> Work:
    return Work(
        rows=slice(row, last),
        key_rows=slice(at, at + last - row),
        queries=slice(0, q_len),
        keys=slice(start, end),
        number=row,
        offset=end - q_len - start,
        first=start,
        exact=True,
    )


def _call(problem: CacheProblem, q: Tensor, k: Keys, v: Keys, works: list[Work]) -> run.Call:
    slopes = problem.alibi_slopes
    return run.Call(
        q=q,
        k=k,
        v=v,
        works=works,
        scoring=Scoring(
            pattern=problem.pattern,
            alibi_slopes=slopes if slopes is None or slopes.dim() == 2 else slopes[None],
        ),
        s_aux=problem.s_aux,
    )
