"""A call over a cache as torch sees it: two operators, what is appended and what is read.

For torch.compile and fake modes, which cannot look into lengths and pages; every other call goes
straight to :mod:`.kvcache`. Values are looked at, and refused, when an operator runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..append import appended
from ..cache_validation import CacheView, check_packed, check_values
from ..namespace import NAMESPACE, OPS
from ..problem import CacheProblem, NewKeys, Pattern, Rotary

Attend = Callable[[CacheProblem], tuple[Tensor, Tensor]]

_attend: list[Attend] = []  # what runs when the operator does


def serve(attend: Attend) -> Attend:
    """Makes `attend` what the operator runs."""
    _attend[:] = [attend]
    return attend


def by_operators(p: CacheProblem) -> tuple[Tensor, Tensor]:
    """As :func:`.kvcache.attention_with_cache`."""
    q, lengths, new = p.q, p.seqlens_k, p.new
    if new is not None:
        assert lengths is not None
        rotary = new.rotary
        turn = (None, None) if rotary is None else (rotary.cos, rotary.sin)
        turned = OPS.cpu_append(
            q, new.k, new.v, p.k_cache, p.v_cache, lengths, p.block_table, p.batch_idx,
            p.k_descale, p.v_descale, *turn, rotary is not None and rotary.interleaved,
            rotary is not None and rotary.ordered,
        )  # fmt: skip
        q = q if rotary is None else turned
        lengths = lengths + new.k.shape[1]
    pattern = p.pattern
    out, lse = OPS.cpu_cache(
        q, p.k_cache, p.v_cache, lengths, p.cu_seqlens_q, p.cu_seqlens_k, p.block_table,
        p.batch_idx, p.leftpad, p.s_aux, p.alibi_slopes, p.k_descale, p.v_descale, p.max_seqlen_q,
        p.max_seqlen_k, pattern.scaling, pattern.window_left, pattern.window_right,
        pattern.softcap, pattern.sink_tokens,
    )  # fmt: skip
    return out, lse


def _cache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor | None, cu_q: Tensor | None,
    cu_k: Tensor | None, table: Tensor | None, batch_idx: Tensor | None, leftpad: Tensor | None,
    s_aux: Tensor | None, slopes: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, max_q: int, max_k: int, scaling: float, left: int, right: int,
    softcap: float, sink_tokens: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    view = CacheView(k_cache, v_cache, table, batch_idx)
    if cu_q is not None and cu_k is not None:
        rows = check_packed(q, view, cu_q, cu_k, (max_q, max_k))
        check_values(view, cu_k.diff(), 0, rows, None)
    elif lengths is not None:
        check_values(view, lengths, 0, q.shape[0], leftpad)
    pattern = Pattern(
        scaling=scaling, window_left=left, window_right=right, softcap=softcap,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    return _attend[0](
        CacheProblem(
            q=q, k_cache=k_cache, v_cache=v_cache, pattern=pattern, seqlens_k=lengths,
            block_table=table, batch_idx=batch_idx, leftpad=leftpad, cu_seqlens_q=cu_q,
            cu_seqlens_k=cu_k, max_seqlen_q=max_q, max_seqlen_k=max_k, s_aux=s_aux,
            alibi_slopes=slopes, k_descale=k_descale, v_descale=v_descale,
        )
    )  # fmt: skip


def _append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor,
    table: Tensor | None, batch_idx: Tensor | None, k_descale: Tensor | None,
    v_descale: Tensor | None, cos: Tensor | None, sin: Tensor | None, interleaved: bool,
    ordered: bool,
) -> Tensor:  # fmt: skip
    check_values(CacheView(k_cache, v_cache, table, batch_idx), lengths, k.shape[1], len(q), None)
    rotary = None
    if cos is not None and sin is not None:
        rotary = Rotary(cos=cos, sin=sin, interleaved=interleaved, ordered=ordered)
    problem = CacheProblem(
        q=q, k_cache=k_cache, v_cache=v_cache, pattern=Pattern(scaling=1.0), seqlens_k=lengths,
        new=NewKeys(k=k, v=v, rotary=rotary), block_table=table, batch_idx=batch_idx,
        k_descale=k_descale, v_descale=v_descale,
    )  # fmt: skip
    turned = appended(problem).q
    return q.new_empty(0) if rotary is None else turned


_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "cpu_cache(Tensor q, Tensor k_cache, Tensor v_cache, Tensor? lengths, Tensor? cu_q, "
    "Tensor? cu_k, Tensor? table, Tensor? batch_idx, Tensor? leftpad, Tensor? s_aux, "
    "Tensor? slopes, Tensor? k_descale, Tensor? v_descale, int max_q, int max_k, float scaling, "
    "int left, int right, float softcap, int sink_tokens) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "cpu_append(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, "
    "Tensor lengths, Tensor? table, Tensor? batch_idx, Tensor? k_descale, Tensor? v_descale, "
    "Tensor? cos, Tensor? sin, bool interleaved, bool ordered) -> Tensor"
)
_LIBRARY.impl("cpu_cache", _cache, "CPU")
_LIBRARY.impl("cpu_append", _append, "CPU")


@torch.library.register_fake(f"{NAMESPACE}::cpu_cache", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(q: Tensor, k_cache: Tensor, v_cache: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    lead, (tokens, heads) = q.shape[:-3], q.shape[-3:-1]
    out = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    return out, q.new_empty(*lead, heads, tokens, dtype=torch.float32)


@torch.library.register_fake(f"{NAMESPACE}::cpu_append", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(q: Tensor, *rest: object) -> Tensor:
    return q.new_empty(q.shape if rest[9] is not None else 0)
