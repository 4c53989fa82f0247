"""Few queries over many keys through the compiled extension, where there is one and it is faster.

It reads keys where they lie, so pages are not gathered, and a batch of many rows is one call. What
it does not serve goes to torch's operators by the table below.

Shape letters as in :mod:`..problem`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..device import backend_name
from ..launch_cache import CacheTensors, learn
from ..problem import CacheProblem, Pattern
from .extension import library

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LANES = 16  # head sizes are multiples of the widest vector
# queries of a row up to which it is the faster way; with more rows matmuls are torch's strength
MOST_QUERIES = 4
# elements of keys from which one query over dense keys is worth the way here
LEAST_KEYS = 2**18

_POINTERS = (
    "q", "k", "v", "k_new", "v_new", "out", "lse", "table", "page_of_row", "lengths",
    "first_query", "leftpad", "s_aux", "slopes",
)  # fmt: skip
_NUMBERS = (
    "dtype", "rows", "queries", "new_keys", "heads", "heads_kv", "dim", "dim_v", "pages",
    "page_size", "blocks", "q_row", "q_token", "q_head", "k_page", "k_token", "k_head", "v_page",
    "v_token", "v_head", "k_new_row", "k_new_token", "k_new_head", "v_new_row", "v_new_token",
    "v_new_head", "lse_row", "lse_head", "lse_query", "slopes_row", "window_left", "window_right",
    "sink_tokens", "most_queries", "threads",
)  # fmt: skip


class _Call(ctypes.Structure):
    """``struct Call`` of csrc/call.h, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in _POINTERS),
        *((name, ctypes.c_int64) for name in _NUMBERS),
        ("scaling", ctypes.c_double),
        ("softcap", ctypes.c_double),
    ]


@dataclass(frozen=True)
class Refusal:
    """Why a call is left to torch's operators, and when."""

    why: str
    holds: Callable[[Tensor, Tensor, Tensor], bool]  # of q, k and v


REFUSALS = (
    Refusal("torch.compile or a fake mode traces it", lambda q, k, v: type(q) is not Tensor),
    Refusal("float64 has no vectors there", lambda q, k, v: q.dtype not in DTYPES),
    Refusal("a float8 cache is widened by torch", lambda q, k, v: k.dtype != q.dtype),
    Refusal(
        f"head sizes are multiples of {LANES}",
        lambda q, k, v: q.shape[-1] % LANES != 0 or v.shape[-1] % LANES != 0,
    ),
    Refusal("elements of a head are apart", lambda q, k, v: q.stride(-1) != 1),
)


def refusal(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the extension does not serve tensors like these, or None."""
    return next((rule.why for rule in REFUSALS if rule.holds(q, k, v)), None)


@dataclass(frozen=True)
class Found:
    """What was computed."""

    out: Tensor
    lse: Tensor
    whole: bool  # False: packed rows of more than `MOST_QUERIES` queries are left, 0 and -inf


def attention(problem: CacheProblem) -> Found | None:
    """out and lse as :func:`.kvcache.attention_with_cache`, of the rows with at most `MOST_QUERIES`
    queries; new keys, rotated already, are written first. None: nothing is done or written.

    A table that has no page for a key that is seen or written gives None too: torch's path says
    which.
    """
    run = library()
    q, k, v, new = problem.q, problem.k_cache, problem.v_cache, problem.new
    if run is None or torch.compiler.is_compiling() or refusal(q, k, v) is not None:
        return None
    heads, dim_v, whole = q.shape[-2], v.shape[-1], True
    if problem.cu_seqlens_q is not None:
        counts = problem.cu_seqlens_q.diff()
        if not counts.numel() or int(counts.min()) > MOST_QUERIES:
            return None
        whole = int(counts.max()) <= MOST_QUERIES
        out = q.new_zeros(q.shape[0], heads, dim_v)
        lse = q.new_full((heads, q.shape[0]), float("-inf"), dtype=torch.float32)
        rows, queries, strides = problem.cu_seqlens_q.shape[0] - 1, 0, (0, *lse.stride())
        q_strides, lengths = (0, *q.stride()[:2]), problem.cu_seqlens_k
    else:
        rows, queries = q.shape[:2]
        if not 0 < queries <= MOST_QUERIES:
            return None
        out = q.new_empty(rows, queries, heads, dim_v)
        lse = q.new_empty(rows, heads, queries, dtype=torch.float32)
        q_strides, strides, lengths = q.stride()[:3], lse.stride(), problem.seqlens_k
    table, slopes = problem.block_table, problem.alibi_slopes
    s_aux = None if problem.s_aux is None else problem.s_aux.float()
    k_new, v_new = (None, None) if new is None else (new.k, new.v)
    p = problem.pattern
    call = _Call(
        *map(address, (
            q, k, v, k_new, v_new, out, lse, table, problem.batch_idx, lengths,
            problem.cu_seqlens_q, problem.leftpad, s_aux, slopes,
        )),
        DTYPES[q.dtype], rows, queries, 0 if k_new is None else k_new.shape[1], heads, k.shape[2],
        q.shape[-1], dim_v, *k.shape[:2], 0 if table is None else table.shape[1], *q_strides,
        *k.stride()[:3], *v.stride()[:3], *_strides(k_new), *_strides(v_new), *strides,
        heads if slopes is not None and slopes.shape[0] > 1 else 0, p.window_left, p.window_right,
        p.sink_tokens, MOST_QUERIES, torch.get_num_threads(), p.scaling, p.softcap,
    )  # fmt: skip
    if not _done(run, call):
        return None
    known = problem.call
    if known is not None and not problem.packed and s_aux is problem.s_aux and problem.as_given:
        learn(known, DecodePlan(call, out.shape, lse.shape))
    return Found(out, lse, whole)


def one_query(q: Tensor, k: Tensor, v: Tensor, scaling: float) -> Found | None:
    """q ``[B, 1, Hq, D]`` over all of k ``[B, K, Hkv, D]`` and v ``[B, K, Hkv, Dv]``, as if they
    were a cache that is full. None: nothing is done, or it would not be the faster way."""
    if k.numel() < LEAST_KEYS or library() is None or not k.stride(3) == v.stride(3) == 1:
        return None
    lengths = torch.full((k.shape[0],), k.shape[1], dtype=torch.int32)
    pattern = Pattern(scaling=scaling)
    return attention(CacheProblem(q=q, k_cache=k, v_cache=v, pattern=pattern, seqlens_k=lengths))


def _done(run: Callable[..., int], call: _Call) -> bool:
    failed = run(ctypes.byref(call))
    if failed == -2:
        raise MemoryError(f"no memory for the partial results of {call.rows} rows")
    return failed == -1


@dataclass(frozen=True)
class DecodePlan:
    """A batch that was served before: only where its tensors lie is new. Their values, lengths and
    pages, are looked at in C++."""

    call: _Call
    out: torch.Size
    lse: torch.Size

    def __call__(self, x: CacheTensors) -> tuple[Tensor, Tensor] | None:
        """out and lse, or None where the extension is not to be used now, or would not do it."""
        run = library()
        if run is None or backend_name(x.q.device) != "cpu":
            return None
        out, lse = x.q.new_empty(self.out), x.q.new_empty(self.lse, dtype=torch.float32)
        call = _Call.from_buffer_copy(self.call)  # other threads have theirs
        call.q, call.k, call.v = x.q.data_ptr(), x.k_cache.data_ptr(), x.v_cache.data_ptr()
        call.k_new, call.v_new, call.table = map(address, (x.k, x.v, x.block_table))
        call.page_of_row, call.leftpad = map(address, (x.batch_idx, x.leftpad))
        call.s_aux, call.slopes = map(address, (x.s_aux, x.slopes))
        call.lengths, call.out, call.lse = x.seqlens.data_ptr(), out.data_ptr(), lse.data_ptr()
        call.threads = torch.get_num_threads()
        return (out, lse) if _done(run, call) else None


def _strides(x: Tensor | None) -> tuple[int, ...]:
    """Of row, token and head."""
    return (0, 0, 0) if x is None else x.stride()[:3]


def address(x: Tensor | None) -> int | None:
    """Where the elements lie; None, which C++ reads as null, for no tensor."""
    return None if x is None else x.data_ptr()
