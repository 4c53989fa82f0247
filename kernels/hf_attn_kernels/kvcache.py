"""The door to attention over a KV cache: check the arguments and describe the work.

Semantics are those of FlashAttention-2: ``flash_attn_with_kvcache`` writes new keys and values in
place behind the valid ones and leaves `cache_seqlens` itself to the caller;
``flash_attn_varlen_func`` with a block_table reads keys that lie in pages already.

Shape letters as in :mod:`.problem`; Knew new keys of each row, R half of the rotated columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .cache_validation import (
    CacheView,
    check_batch,
    check_cache,
    check_extras,
    check_int32,
    check_new,
    check_no_grad,
    check_packed,
    check_pages,
    check_rotary,
    check_values,
    row_lengths,
)
from .device import backend_name
from .launch_cache import KnownCall
from .problem import CacheProblem, NewKeys, Pattern, Rotary


def cache_problem(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    pattern: Pattern,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    num_splits: int = 0,
    call: KnownCall | None = None,
) -> CacheProblem:
    """Check the arguments of :func:`.api.flash_attn_with_kvcache` and describe the work.

    Returns:
        The problem; nothing is written yet, that is the backend's.

    Raises:
        ValueError: arguments do not fit, or a gradient is wanted.
    """
    view = CacheView(k_cache, v_cache, block_table, cache_batch_idx)
    if q.dim() != 4:
        raise ValueError(f"q must be [batch, length, heads, head_dim], got shape {tuple(q.shape)}")
    batch = q.shape[0]
    check_cache(q, view)
    check_batch(view, batch, q.device)
    check_no_grad(q, k_cache, v_cache, k, v, s_aux)
    for name, t in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if t is not None:
            check_int32(name, t, (batch,), q.device)
    check_extras(q, view, batch, alibi_slopes, s_aux, k_descale, v_descale)
    if num_splits < 0:
        raise ValueError(f"num_splits must be 0 (chosen for you) or more, got {num_splits}")
    new = None
    if k is not None or v is not None:
        k, v = check_new(q, view, k, v, cache_seqlens)
        new = NewKeys(k=_unit_stride(k), v=_unit_stride(v))
    seqlens = row_lengths(cache_seqlens, batch, view.capacity, q.device)
    count = 0 if new is None else new.k.shape[1]
    check_values(view, seqlens, count, batch, cache_leftpad)
    if q.is_cpu and backend_name(q.device) == "triton":  # interpreted
        queries = torch.full_like(seqlens, q.shape[1])
        check_pages(view, seqlens + count, queries, pattern, cache_leftpad, count)
    if rotary_cos is not None or rotary_sin is not None:
        cos, sin = check_rotary(q, new, rotary_cos, rotary_sin, view.capacity)
        # without causality or a window q's tokens have no order: FlashAttention-2 puts all at the
        # first new position
        ordered = pattern.window_left >= 0 or pattern.window_right >= 0
        assert new is not None  # or check_rotary had raised
        rotary = Rotary(cos=cos, sin=sin, interleaved=rotary_interleaved, ordered=ordered)
        new = NewKeys(k=new.k, v=new.v, rotary=rotary)
    return CacheProblem(
        q=_unit_stride(q),
        k_cache=k_cache,
        v_cache=v_cache,
        seqlens_k=seqlens,
        new=new,
        pattern=pattern,
        block_table=_contiguous(block_table),
        batch_idx=_contiguous(cache_batch_idx),
        leftpad=_contiguous(cache_leftpad),
        s_aux=_contiguous(s_aux),
        alibi_slopes=_rows(alibi_slopes),
        k_descale=_rows(k_descale),
        v_descale=_rows(v_descale),
        num_splits=num_splits,
        call=call,
    )


def packed_cache_problem(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    *,
    pattern: Pattern,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    block_table: Tensor,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
    call: KnownCall | None = None,
) -> CacheProblem:
    """Check the arguments of :func:`.api.flash_attn_varlen_func` with a block_table.

    Raises:
        ValueError: arguments do not fit, or a gradient is wanted.
    """
    view = CacheView(k_pages, v_pages, block_table, None)
    if q.dim() != 3:
        raise ValueError(f"q must be [total, heads, head_dim], got shape {tuple(q.shape)}")
    check_cache(q, view, names=("k", "v"))
    lengths = (max_seqlen_q, max_seqlen_k)
    rows = check_packed(q, view, cu_seqlens_q, cu_seqlens_k, lengths)
    check_batch(view, rows, q.device)
    check_no_grad(q, k_pages, v_pages, s_aux)
    check_extras(q, view, rows, alibi_slopes, s_aux, k_descale, v_descale)
    if q.device.type == "cpu":
        check_values(view, cu_seqlens_k.diff(), 0, rows, None)
        if backend_name(q.device) == "triton":
            check_pages(view, cu_seqlens_k.diff(), cu_seqlens_q.diff(), pattern)
    return CacheProblem(
        q=_unit_stride(q),
        k_cache=k_pages,
        v_cache=v_pages,
        pattern=pattern,
        block_table=block_table.contiguous(),
        cu_seqlens_q=cu_seqlens_q.contiguous(),
        cu_seqlens_k=cu_seqlens_k.contiguous(),
        max_seqlen_q=int(max_seqlen_q),
        max_seqlen_k=int(max_seqlen_k),
        s_aux=_contiguous(s_aux),
        alibi_slopes=_rows(alibi_slopes),
        k_descale=_rows(k_descale),
        v_descale=_rows(v_descale),
        call=call,
    )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _rows(x: Tensor | None) -> Tensor | None:
    """``[H]`` or ``[1 | B, H]`` -> ``[1 | B, H]``, contiguous."""
    if x is None:
        return None
    return (x if x.dim() == 2 else x[None]).contiguous()
