"""The shortest way: calls that one fused call answers whole, without planning blocks and tiles.

A decode step of a small model is over before a plan is made, and it comes once a layer and token.

Shape letters as in :mod:`..problem`; G query heads per key head.
"""

from __future__ import annotations

from torch import Tensor

from ..problem import UNBOUNDED, Problem
from .context import fused_forward
from .one_query import one_query


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


def _one_query(problem: Problem, low: int, need_lse: bool) -> tuple[Tensor, Tensor | None] | None:
    """The last position sees the keys from `low` on; its heads are packed, so K is read once."""
    if low and problem.pattern.sink_tokens:
        return None
    q = problem.q
    k, v = (x[:, low:].transpose(1, 2) for x in (problem.k, problem.v))
    packed = q.view(q.shape[0], k.shape[1], -1, q.shape[3])  # [B, Hkv, G, D]
    out, lse = one_query(packed, k, v, problem.pattern.scaling, need_lse=need_lse)
    if lse is not None:
        lse = lse.reshape(q.shape[0], q.shape[2], 1)
    return out.reshape(q.shape), lse
