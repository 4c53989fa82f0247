"""FlashAttention-2's three functions: same names, arguments and meaning, any supported device.

Signatures follow the ``flash_attn`` package (Dao, "FlashAttention-2", 2023) so that these can
stand where those stand; what ours add is keyword-only and comes last. Each function checks its
arguments, describes the work as a :class:`.problem.Problem` and hands it to the backend of the
tensors' device.

Shape letters as in :mod:`.problem`. Causal and windowed masks are aligned to the bottom right:
query i sees key j only if ``i + K - Q - left <= j <= i + K - Q + right``.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from . import dispatch
from .kvcache import cache_problem, packed_cache_problem
from .launch_cache import CacheTensors, known_call, run_known
from .problem import Problem
from .validation import check_pattern, check_problem

Result = Tensor | tuple[Tensor, Tensor | None, None]


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    *,
    s_aux: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sink_tokens: int = 0,
) -> Result:
    """Attention over a batch of equal lengths, padded or not.

    Args:
        q: ``[B, Q, Hq, D]``; k: ``[B, K, Hkv, D]``; v: ``[B, K, Hkv, Dv]``. Hkv divides Hq (GQA
            and MQA; nothing is repeated). float16, bfloat16 or float32, on the CPU also float64.
        dropout_p: probability that a weight is dropped (Philox, seeded from torch's generator).
        softmax_scale: factor of ``q @ k``; ``D ** -0.5`` by default.
        causal: a query sees no later key.
        window_size: keys visible to the left and right of the diagonal, -1 for all.
        softcap: scores become ``softcap * tanh(score / softcap)``; 0 for off.
        alibi_slopes: ``[Hq]`` or ``[B, Hq]`` float32; adds ``-slope * |i + K - Q - j|``.
        deterministic: gradients are the same bits in every run; the default, other than in
            FlashAttention-2. False lets a GPU's backward add up q's gradient in any order, with
            two of seven matrix products less, unless torch.use_deterministic_algorithms is on.
        return_attn_probs: also return the log-sum-exp, as FlashAttention-2 does.
        s_aux: ``[Hq]`` one more logit in each row's denominator (attention sinks of gpt-oss).
        bias: ``[1|B, 1|Hq, 1|Q, K]``, bool (True = keep) or added after the softcap; a floating
            bias gets a gradient. A row that it hides whole by a finite number (finfo.min) weighs
            its keys as eager attention does, about alike; by -inf or False it sees nothing.
        key_padding_mask: ``[B, K]`` bool, True = keep; any pattern. Hides keys, moves nothing.
        sink_tokens: that many positions of each row, from its first kept key on, stay visible
            whatever the left window hides (StreamingLLM, Xiao et al. 2023).

    Sizes of 0 give an empty answer, but for head_dim, KV heads and the page size of a cache, which
    are refused; this holds for all functions.

    Returns:
        ``[B, Q, Hq, Dv]``; a query that sees no key gets zeros. With `return_attn_probs` a triple
        of it, the natural log-sum-exp ``[B, Hq, Q]`` float32 (``s_aux`` included; differentiable)
        and None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit.
        ImportError: GPU tensors and Triton is not installed.
    """
    pattern = check_pattern(
        q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sink_tokens=sink_tokens,
        dropout_p=dropout_p,
    )
    return _run(
        Problem(
            q=_unit_stride(q),
            k=_unit_stride(k),
            v=_unit_stride(v),
            pattern=pattern,
            s_aux=s_aux,
            alibi_slopes=alibi_slopes,
            bias=bias,
            key_padding_mask=key_padding_mask,
            dropout_seed=_dropout_seed(dropout_p, q.device),
            need_lse=return_attn_probs,
            deterministic=deterministic,
        )
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = True,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
    *,
    s_aux: Tensor | None = None,
    bias: Tensor | None = None,
    sink_tokens: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Result:
    """Attention over sequences packed end to end; no token sees another sequence.

    Args:
        q: ``[Tq, Hq, D]``; k: ``[Tk, Hkv, D]``; v: ``[Tk, Hkv, Dv]``. With a block_table k and v
            are pages, read in place: ``[pages, page_size, Hkv, D]`` and ``[..., Dv]``.
        cu_seqlens_q: ``[R + 1]`` int32, where each sequence's queries begin; the last is the end.
        cu_seqlens_k: the same of the keys. An empty sequence is fine. With a block_table only the
            differences count, which are the sequences' numbers of keys.
        max_seqlen_q: longest query of the batch or more; max_seqlen_k: the same of the keys.
        block_table: ``[R, max_blocks]`` int32, page numbers of each sequence; -1 for unused
            entries and for pages that a window hides from every query. A key that is seen must have
            a page, see :func:`flash_attn_with_kvcache`. Inference only, without dropout and bias.
        bias: ``[1|R, 1|Hq, 1|max_seqlen_q, max_seqlen_k]``, counted from each sequence's own start.
        k_descale: with float8 pages, see :func:`flash_attn_with_kvcache`; so is v_descale.

    The other arguments are those of :func:`flash_attn_func`, with R in the place of B.

    Returns:
        ``[Tq, Hq, Dv]``, or with `return_attn_probs` also the log-sum-exp ``[Hq, Tq]`` and None.
        Queries behind the last sequence get zeros.

    Raises:
        ValueError: arguments do not fit; with a block_table also: a gradient, dropout or a bias is
            asked for, or a page is missing.
    """
    call = None
    if block_table is not None:
        _refuse_with_pages(dropout_p > 0, "dropout_p", "it belongs to training")
        _refuse_with_pages(bias is not None, "bias", "the kernels over pages add none")
        call = known_call(
            CacheTensors(
                q, k, v, cu_seqlens_k, cu_seqlens_q, block_table=block_table, slopes=alibi_slopes,
                s_aux=s_aux, k_descale=k_descale, v_descale=v_descale,
            ),
            (max_seqlen_q, max_seqlen_k, softmax_scale, causal, *window_size, softcap, sink_tokens),
        )  # fmt: skip
        found = run_known(call)
        if found is not None:
            out, lse = found
            return (out, lse, None) if return_attn_probs else out
    pattern = check_pattern(
        q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sink_tokens=sink_tokens,
        dropout_p=dropout_p,
    )
    if block_table is not None:
        problem = packed_cache_problem(
            q,
            k,
            v,
            pattern=pattern,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=max_seqlen_q,
            max_seqlen_k=max_seqlen_k,
            block_table=block_table,
            alibi_slopes=alibi_slopes,
            s_aux=s_aux,
            k_descale=k_descale,
            v_descale=v_descale,
            call=call,
        )
        out, lse = dispatch.load(q.device).attention_with_cache(problem)
        return (out, lse, None) if return_attn_probs else out
    if k_descale is not None or v_descale is not None:
        raise ValueError("k_descale and v_descale are for float8 pages; give a block_table too")
    return _run(
        Problem(
            q=_unit_stride(q),
            k=_unit_stride(k),
            v=_unit_stride(v),
            pattern=pattern,
            s_aux=s_aux,
            alibi_slopes=alibi_slopes,
            bias=bias,
            cu_seqlens_q=cu_seqlens_q,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_q=int(max_seqlen_q),
            max_seqlen_k=int(max_seqlen_k),
            dropout_seed=_dropout_seed(dropout_p, q.device),
            need_lse=return_attn_probs,
            deterministic=deterministic,
        )
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
    *,
    s_aux: Tensor | None = None,
    sink_tokens: int = 0,
    k_descale: Tensor | None = None,
    v_descale: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of new queries over a KV cache, contiguous or paged; inference only.

    Given `k` and `v` are first written into the cache, in place, behind `cache_seqlens`.

    Args:
        q: ``[B, Q, Hq, D]``.
        k_cache: ``[Bc, K, Hkv, D]``, or with a block_table ``[pages, page_size, Hkv, D]``; of q's
            dtype or float8_e4m3fn. v_cache: the same with Dv.
        k: ``[B, Knew, Hkv, D]`` to append; v: ``[B, Knew, Hkv, Dv]``.
        rotary_cos: ``[positions, rotary_dim / 2]``, applied to the new k at its position and to q;
            rotary_sin: the same shape.
        cache_seqlens: valid keys of each row before the append: an int or ``[B]`` int32. None: the
            cache is full.
        cache_batch_idx: ``[B]`` int32, the cache row of each row of q (contiguous caches only).
        cache_leftpad: ``[B]`` int32, keys to skip at the start of each row.
        block_table: ``[B, max_blocks]`` int32 page numbers; -1 for unused entries and for pages
            that a window hides. A key that is seen, or new, must have a page: else ValueError and
            nothing is written. Only on a GPU, whose values nobody waits for, a query that
            sees it gets NaN, and new keys without a page are left out.
        rotary_interleaved: pairs (0, 1), (2, 3) ... (GPT-J) instead of (0, d/2), ... (GPT-NeoX).
        num_splits: pieces the keys are cut into and combined from; 0 lets the backend choose.
        return_softmax_lse: also return the log-sum-exp.
        k_descale: ``[Hkv]`` or ``[B, Hkv]`` float32, of a float8 cache: a stored number times it is
            the value. New keys are divided by it, rounded, and held to ±448. None is 1.
        v_descale: the same of the values.

    The other arguments are those of :func:`flash_attn_func`.

    Returns:
        ``[B, Q, Hq, Dv]``, with `return_softmax_lse` also ``[B, Hq, Q]`` float32.

    Raises:
        ValueError: arguments do not fit.
    """
    call = None
    if isinstance(cache_seqlens, Tensor):
        call = known_call(
            CacheTensors(
                q, k_cache, v_cache, cache_seqlens, None, k, v, rotary_cos, rotary_sin, block_table,
                cache_batch_idx, cache_leftpad, alibi_slopes, s_aux, k_descale, v_descale,
            ),
            (softmax_scale, causal, *window_size, softcap, rotary_interleaved, num_splits,
             sink_tokens),
        )  # fmt: skip
    found = run_known(call)
    if found is not None:
        out, lse = found
        return (out, lse) if return_softmax_lse else out
    pattern = check_pattern(
        q.shape[-1],
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=softcap,
        sink_tokens=sink_tokens,
        dropout_p=0.0,
    )
    problem = cache_problem(
        q,
        k_cache,
        v_cache,
        pattern=pattern,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        rotary_interleaved=rotary_interleaved,
        cache_seqlens=cache_seqlens,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
        s_aux=s_aux,
        k_descale=k_descale,
        v_descale=v_descale,
        num_splits=num_splits,
        call=call,
    )
    out, lse = dispatch.load(q.device).attention_with_cache(problem)
    return (out, lse) if return_softmax_lse else out


def _run(problem: Problem) -> Result:
    check_problem(problem)
    if problem.key_padding_mask is not None and problem.key_padding_mask.shape[1] == 0:
        problem = replace(problem, key_padding_mask=None)  # there is no first key to look for
    out, lse = dispatch.load(problem.q.device).attention(problem)
    return (out, lse, None) if problem.need_lse else out


def _refuse_with_pages(given: bool, name: str, why: str) -> None:
    if given:
        raise ValueError(
            f"flash_attn_varlen_func got a block_table and {name}, which do not go together: {why};"
            f" leave {name} out, or give k and v as [total, heads, head_dim]"
        )


def _unit_stride(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _dropout_seed(dropout_p: float, device: torch.device) -> Tensor | None:
    # drawn on the device: no host sync, and torch.manual_seed makes it reproducible
    if dropout_p <= 0.0:
        return None
    return torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64)
