"""The oracle: attention written out, dense and slow, in float64 unless told otherwise.

It shares no code with the kernels. Dropout's Philox generator is written again here in numpy, from
Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    sink_tokens: int = 0,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Tensor]:
    """Attention with every feature of :mod:`.api`, computed in `dtype`; differentiable.

    Args:
        q: ``[B, Q, Hq, D]``, or ``[Tq, Hq, D]`` with cu_seqlens; k, v likewise. The other arguments
            mean what they mean in :func:`.api.flash_attn_func`.
        dropout_seed: 64-bit seed of the Philox generator.
        dtype: what everything is computed in; the inputs' own dtype gives "eager's own error".

    Returns:
        out ``[B, Q, Hq, Dv]`` or ``[Tq, Hq, Dv]`` in `dtype`, and the natural log-sum-exp
        ``[B, Hq, Q]`` or ``[Hq, Tq]``.
    """
    options: dict[str, Any] = {
        "softmax_scale": q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale,
        "causal": causal,
        "window_size": window_size,
        "softcap": softcap,
        "s_aux": s_aux,
        "sink_tokens": sink_tokens,
        "dropout_p": dropout_p,
        "dropout_seed": dropout_seed,
        "dtype": dtype,
    }
    outs, lses = [], []
    if cu_seqlens_q is None:
        for b in range(q.shape[0]):
            o, lse = _one(
                q[b], k[b], v[b], b, _row(alibi_slopes, b, 2), _row(bias, b, 4),
                None if key_padding_mask is None else key_padding_mask[b], **options,
            )  # fmt: skip
            outs.append(o)
            lses.append(lse)
        return torch.stack(outs), torch.stack(lses)
    assert cu_seqlens_k is not None
    bounds_q, bounds_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    out = q.new_zeros(*q.shape[:-1], v.shape[-1], dtype=dtype)
    out_lse = torch.full((q.shape[1], q.shape[0]), float("-inf"), dtype=dtype, device=q.device)
    for r, (q0, q1, k0, k1) in enumerate(
        zip(bounds_q, bounds_q[1:], bounds_k, bounds_k[1:], strict=False)
    ):
        local = _row(bias, r, 4)
        if local is not None:
            local = local[..., : k1 - k0]
            local = local if local.shape[-2] == 1 else local[..., : q1 - q0, :]
        o, lse = _one(
            q[q0:q1], k[k0:k1], v[k0:k1], r, _row(alibi_slopes, r, 2), local, None, **options
        )
        out = torch.cat([out[:q0], o, out[q1:]])
        out_lse = torch.cat([out_lse[:, :q0], lse, out_lse[:, q1:]], dim=1)
    return out, out_lse


def mla_reference(
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    w_uk: Tensor,
    w_uv: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Multi-head latent attention as DeepSeek-V2 (2024) defines it: keys and values expanded.

    Args:
        q_nope: ``[B, Q, H, N]``; q_rope: ``[B, Q, H, P]``.
        latent: ``[B, K, R]``; k_rope: ``[B, K, P]``, shared by the heads.
        w_uk: ``[H, N, R]``; w_uv: ``[H, V, R]``: each head's keys and values from the latent.
        options: of :func:`attention_reference`.

    Returns:
        ``[B, Q, H, V]`` and the log-sum-exp ``[B, H, Q]``.
    """
    wide = latent.to(dtype)
    heads = w_uk.shape[0]
    k_nope = torch.einsum("bkr,hnr->bkhn", wide, w_uk.to(dtype))
    values = torch.einsum("bkr,hvr->bkhv", wide, w_uv.to(dtype))
    shared = k_rope.to(dtype)[:, :, None].expand(-1, -1, heads, -1)
    return attention_reference(
        torch.cat([q_nope.to(dtype), q_rope.to(dtype)], dim=-1),
        torch.cat([k_nope, shared], dim=-1),
        values,
        dtype=dtype,
        **options,
    )


def _row(t: Tensor | None, b: int, rank: int) -> Tensor | None:
    """Row b of a tensor whose leading (batch) dimension may be 1 or missing."""
    if t is None or t.dim() < rank:
        return t
    return t[0] if t.shape[0] == 1 else t[b]


def visible(
    q_len: int,
    k_len: int,
    *,
    causal: bool,
    window_size: tuple[int, int],
    sink_tokens: int = 0,
    keep: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor:
    """``[Q, K]`` bool: which keys each query may see. `keep` is ``[K]`` bool."""
    i = torch.arange(q_len, device=device)[:, None] + (k_len - q_len)
    j = torch.arange(k_len, device=device)[None, :]
    left, right = window_size
    ok = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if left >= 0:
        in_window = j >= i - left
        if sink_tokens:
            first = 0 if keep is None or not bool(keep.any()) else int(keep.int().argmax())
            in_window = in_window | (j < first + sink_tokens)
        ok &= in_window
    if causal:
        right = 0
    if right >= 0:
        ok &= j <= i + right
    return ok if keep is None else ok & keep[None, :]


def _one(
    q: Tensor, k: Tensor, v: Tensor, b: int, slopes: Tensor | None, bias: Tensor | None,
    keep: Tensor | None, *, softmax_scale: float, causal: bool, window_size: tuple[int, int],
    softcap: float, s_aux: Tensor | None, sink_tokens: int, dropout_p: float, dropout_seed: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One row of the batch: q ``[Q, Hq, D]`` -> out ``[Q, Hq, Dv]``, lse ``[Hq, Q]``."""
    heads_q, groups = q.shape[1], q.shape[1] // k.shape[1]
    queries = q.to(dtype).transpose(0, 1)  # [Hq, Q, D]
    keys = k.to(dtype).transpose(0, 1).repeat_interleave(groups, dim=0)  # [Hq, K, D]
    values = v.to(dtype).transpose(0, 1).repeat_interleave(groups, dim=0)
    if keep is not None:  # what is padded away may hold anything, NaN too
        keys = keys.masked_fill(~keep[None, :, None], 0)
        values = values.masked_fill(~keep[None, :, None], 0)
    q_len, k_len = queries.shape[1], keys.shape[1]
    scores = queries @ keys.transpose(1, 2) * softmax_scale  # [Hq, Q, K]
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if slopes is not None:
        i = torch.arange(q_len, device=q.device)[:, None] + (k_len - q_len)
        distance = (i - torch.arange(k_len, device=q.device)[None, :]).abs()
        scores = scores - slopes.to(dtype)[:, None, None] * distance
    ok = visible(
        q_len, k_len, causal=causal, window_size=window_size, sink_tokens=sink_tokens, keep=keep,
        device=q.device,
    ).expand(heads_q, -1, -1)  # fmt: skip
    if bias is not None:
        if bias.dtype == torch.bool:
            ok = ok & bias
        else:
            scores = scores + bias.to(dtype)
    scores = scores.masked_fill(~ok, float("-inf"))
    if s_aux is not None:
        extra = s_aux.to(dtype)[:, None, None].expand(heads_q, q_len, 1)
        scores = torch.cat([scores, extra], dim=-1)
    # a row that sees nothing: filled before the softmax, so that its gradient is 0 and not NaN
    dead = torch.isneginf(scores).all(dim=-1)
    scores = scores.masked_fill(dead[..., None], 0.0)
    lse = torch.logsumexp(scores, dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., :k_len].masked_fill(dead[..., None], 0.0)
    lse = lse.masked_fill(dead, float("-inf"))
    if dropout_p:
        kept = torch.from_numpy(_dropout_keep(dropout_seed, b, heads_q, q_len, k_len, dropout_p))
        weights = weights * kept.to(q.device) / (1 - dropout_p)
    return (weights @ values).transpose(0, 1), lse


def _dropout_keep(seed: int, b: int, heads: int, q_len: int, k_len: int, p: float) -> np.ndarray:
    """``[Hq, Q, K]`` bool: keep where the first Philox4x32-10 word is at least p * 2**32."""
    low = np.uint64(0xFFFFFFFF)
    head, i, j = np.meshgrid(
        np.arange(heads), np.arange(q_len), np.arange(k_len), indexing="ij", sparse=False
    )
    c = [j.astype(np.uint64), i.astype(np.uint64), (b * heads + head).astype(np.uint64)]
    c.append(np.zeros_like(c[0]))
    key = [np.uint64(seed & 0xFFFFFFFF), np.uint64(seed >> 32 & 0xFFFFFFFF)]
    for _ in range(10):
        product0, product1 = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [
            (product1 >> np.uint64(32)) ^ c[1] ^ key[0],
            product1 & low,
            (product0 >> np.uint64(32)) ^ c[3] ^ key[1],
            product0 & low,
        ]
        key = [(key[0] + np.uint64(0x9E3779B9)) & low, (key[1] + np.uint64(0xBB67AE85)) & low]
    return np.asarray(c[0] >= np.uint64(int(p * 2**32)))
