"""The shortest way: calls that one fused call answers whole, without planning blocks and tiles.

A decode step of a small model is over before a plan is made, and it comes once a layer and token.

Shape letters as in :mod:`..problem`; G query heads per key head.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..batch_invariance import batch_invariant
from ..problem import UNBOUNDED, Problem
from . import extension_decode, extension_prefill
from .context import fused_forward
from .decode import LONG_KEYS, one_query

# what PyTorch's fused kernel is made for
DTYPES = (torch.float32, torch.bfloat16)


def attention(problem: Problem, *, need_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """out ``[B, Q, Hq, D]`` and lse ``[B, Hq, Q]``, or None where there is more to it."""
    if problem.packed or problem.s_aux is not None or problem.bias is not None:
        return None
    keep = problem.key_padding_mask
    if problem.alibi_slopes is not None or (keep is not None and not bool(keep.all())):
        return None
    q, k, v = problem.q, problem.k, problem.v
    q_len, k_len = q.shape[1], k.shape[1]
    if not q.numel() or not k_len:
        return None
    p = problem.pattern
    left = UNBOUNDED if p.window_left >= k_len else p.window_left
    if q_len == 1:
        low = 0 if left == UNBOUNDED else max(k_len - 1 - left, 0)
        return _one_query(problem, low, need_lse)
    causal = p.window_right == 0
    if left != UNBOUNDED or not ((causal and q_len == k_len) or p.window_right == UNBOUNDED):
        return None
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out, lse = fused_forward(*heads_first, 0.0, causal, scale=p.scaling)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def plain(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, *, causal: bool, window_left: int
) -> Tensor | None:
    """The whole way of a call without extras, as transformers lays it out: heads first.

    For a small model checking and describing a call takes longer than attention itself.

    Args:
        q: ``[B, Hq, Q, D]``; k, v: ``[B, Hkv, K, D]``.

    Returns:
        ``[B, Q, Hq, D]``, or None where there is more to it, or something does not fit.
    """
    if type(q) is not Tensor or batch_invariant() or torch.compiler.is_compiling():
        return None
    if torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    size, size_k, dtype = q.shape, k.shape, q.dtype
    if len(size) != 4 or len(size_k) != 4 or v.shape != size_k or dtype not in DTYPES:
        return None
    batch, heads, q_len, dim = size
    batch_k, heads_kv, k_len, dim_k = size_k
    if batch_k != batch or dim_k != dim or not heads_kv or heads % heads_kv or 0 in size:
        return None
    if k.dtype != dtype or v.dtype != dtype or not k_len:
        return None
    if q_len > 1:
        found = extension_prefill.plain(q, k, v, scaling, causal=causal, window_left=window_left)
        if found is not None:
            return found
    hides = UNBOUNDED != window_left < k_len - 1
    if q_len == 1 and causal:
        if hides:
            k, v = k[:, :, k_len - 1 - window_left :], v[:, :, k_len - 1 - window_left :]
        served = extension_decode.one_query(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), scaling
        )
        if served is not None:
            return served.out
        packed = q if heads == heads_kv else q.reshape(batch, heads_kv, heads // heads_kv, dim)
        if batch == 1 and k.shape[2] >= LONG_KEYS:
            out, _ = one_query(packed, k, v, scaling, need_lse=False)
        else:
            out = scaled_dot_product_attention(packed, k, v, scale=scaling)
        return out.reshape(batch, 1, heads, dim)
    if hides or (causal and q_len != k_len):
        return None
    gqa = heads != heads_kv
    out = scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scaling, enable_gqa=gqa)
    return out.transpose(1, 2).contiguous()


def _one_query(problem: Problem, low: int, need_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """The last position sees the keys from `low` on; its heads are packed, so K is read once."""
    if low and problem.pattern.sink_tokens:
        return None
    q = problem.q
    k, v = (x[:, low:] for x in (problem.k, problem.v))
    served = extension_decode.one_query(q, k, v, problem.pattern.scaling)
    if served is not None:
        return served.out, served.lse
    k, v = k.transpose(1, 2), v.transpose(1, 2)
    packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
    out, lse = one_query(packed, k, v, problem.pattern.scaling, need_lse=need_lse)
    if lse is not None:
        lse = lse.reshape(q.shape[0], q.shape[2], 1)
    return out.reshape(q.shape), lse
