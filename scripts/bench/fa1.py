"""FlashAttention-1 as its paper has it, to measure what its successors gained; for nothing else.

After Dao et al., "FlashAttention" (2022), algorithms 1 and 4: keys and values in the outer loop,
queries in the inner one. So the output (forward) and q's gradient (backward) go through memory once
for every tile of keys, and only batch x heads programs run at a time. They are float32 until the
end: rounded at every tile they would miss the accuracy that a contender must have.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_attn_patch.bench.baselines import Shape

LOG2E = tl.constexpr(1.4426950408889634)
BLOCK = 64  # queries and keys of a tile


@triton.jit
def _tile(base, first, stride, length, BLOCK: tl.constexpr, D: tl.constexpr):
    """Pointers to ``[BLOCK, D]`` of a row-major matrix, and which rows there are."""
    rows = first + tl.arange(0, BLOCK)
    at = rows[:, None].to(tl.int64) * stride + tl.arange(0, D)[None, :]
    return base + at, (rows < length)[:, None]


@triton.jit
def _scores(q, k, first_row, first_key, q_len, k_len, scale, CAUSAL: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    """Base-2 scores of a tile, -inf where a row sees nothing."""
    i = first_row + tl.arange(0, BLOCK)[:, None]
    j = first_key + tl.arange(0, BLOCK)[None, :]
    seen = (j < k_len) & (i < q_len)
    if CAUSAL:
        seen = seen & (j <= i + k_len - q_len)
    return tl.where(seen, tl.dot(q, tl.trans(k)) * scale, float("-inf"))


@triton.jit
def _forward(
    Q, K, V, Out, Peak, Total, q_sb, k_sb, heads, groups, q_len, k_len, scale,
    CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) // heads
    h = tl.program_id(0) % heads
    q_ss = heads * D
    k_ss = heads // groups * D
    q_base = Q + b * q_sb + h * D
    out_base = Out + b * q_sb + h * D
    k_base = K + b * k_sb + h // groups * D
    v_base = V + b * k_sb + h // groups * D
    sums = tl.program_id(0).to(tl.int64) * q_len
    for first_key in range(0, k_len, BLOCK):
        k_ptrs, k_ok = _tile(k_base, first_key, k_ss, k_len, BLOCK, D)
        v_ptrs, _ = _tile(v_base, first_key, k_ss, k_len, BLOCK, D)
        k = tl.load(k_ptrs, mask=k_ok, other=0.0)
        v = tl.load(v_ptrs, mask=k_ok, other=0.0)
        start = first_key * 0
        if CAUSAL:
            start = tl.maximum(first_key - (k_len - q_len), 0) // BLOCK * BLOCK
        for first_row in range(start, q_len, BLOCK):
            rows = first_row + tl.arange(0, BLOCK)
            q_ptrs, ok = _tile(q_base, first_row, q_ss, q_len, BLOCK, D)
            o_ptrs, _ = _tile(out_base, first_row, q_ss, q_len, BLOCK, D)
            q = tl.load(q_ptrs, mask=ok, other=0.0)
            s = _scores(q, k, first_row, first_key, q_len, k_len, scale, CAUSAL, BLOCK)
            m = tl.load(Peak + sums + rows, mask=rows < q_len, other=float("-inf"))
            total = tl.load(Total + sums + rows, mask=rows < q_len, other=0.0)
            out = tl.load(o_ptrs, mask=ok, other=0.0)
            m_new = tl.maximum(m, tl.max(s, 1))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - m_safe[:, None])
            kept = total * tl.exp2(m - m_safe)
            total_new = kept + tl.sum(p, 1)
            share = 1.0 / tl.where(total_new == 0.0, 1.0, total_new)
            out = (out * kept[:, None] + tl.dot(p.to(v.dtype), v)) * share[:, None]
            tl.store(o_ptrs, out, mask=ok)
            tl.store(Peak + sums + rows, m_new, mask=rows < q_len)
            tl.store(Total + sums + rows, total_new, mask=rows < q_len)
        tl.debug_barrier()  # the next tile of keys reads what was written here


@triton.jit
def _backward(
    Q, K, V, Out, DOut, Peak, Total, DQ, DK, DV, q_sb, k_sb, heads, groups, q_len, k_len, scale,
    scaling, CAUSAL: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    heads_kv = heads // groups
    b = tl.program_id(0).to(tl.int64) // heads_kv
    kv_head = tl.program_id(0) % heads_kv
    q_ss = heads * D
    k_ss = heads_kv * D
    kv_shift = b * k_sb + kv_head * D
    for first_key in range(0, k_len, BLOCK):
        k_ptrs, k_ok = _tile(K + kv_shift, first_key, k_ss, k_len, BLOCK, D)
        v_ptrs, _ = _tile(V + kv_shift, first_key, k_ss, k_len, BLOCK, D)
        dk_ptrs, _ = _tile(DK + kv_shift, first_key, k_ss, k_len, BLOCK, D)
        dv_ptrs, _ = _tile(DV + kv_shift, first_key, k_ss, k_len, BLOCK, D)
        k = tl.load(k_ptrs, mask=k_ok, other=0.0)
        v = tl.load(v_ptrs, mask=k_ok, other=0.0)
        dk = tl.zeros([BLOCK, D], tl.float32)
        dv = tl.zeros([BLOCK, D], tl.float32)
        start = first_key * 0
        if CAUSAL:
            start = tl.maximum(first_key - (k_len - q_len), 0) // BLOCK * BLOCK
        for h in range(kv_head * groups, kv_head * groups + groups):
            shift = b * q_sb + h * D
            sums = (b * heads + h) * q_len
            for first_row in range(start, q_len, BLOCK):
                rows = first_row + tl.arange(0, BLOCK)
                q_ptrs, ok = _tile(Q + shift, first_row, q_ss, q_len, BLOCK, D)
                o_ptrs, _ = _tile(Out + shift, first_row, q_ss, q_len, BLOCK, D)
                do_ptrs, _ = _tile(DOut + shift, first_row, q_ss, q_len, BLOCK, D)
                dq_ptrs, _ = _tile(DQ + shift, first_row, q_ss, q_len, BLOCK, D)
                q = tl.load(q_ptrs, mask=ok, other=0.0)
                do = tl.load(do_ptrs, mask=ok, other=0.0)
                out = tl.load(o_ptrs, mask=ok, other=0.0)
                m = tl.load(Peak + sums + rows, mask=rows < q_len, other=0.0)
                total = tl.load(Total + sums + rows, mask=rows < q_len, other=0.0)
                s = _scores(q, k, first_row, first_key, q_len, k_len, scale, CAUSAL, BLOCK)
                m = tl.where(m == float("-inf"), 0.0, m)
                p = tl.exp2(s - m[:, None]) / tl.where(total == 0.0, 1.0, total)[:, None]
                dv += tl.dot(tl.trans(p.to(do.dtype)), do)
                dp = tl.dot(do, tl.trans(v))
                delta = tl.sum(do.to(tl.float32) * out, 1)
                ds = (p * (dp - delta[:, None])).to(q.dtype)
                dk += tl.dot(tl.trans(ds), q)
                dq = tl.load(dq_ptrs, mask=ok, other=0.0)
                tl.store(dq_ptrs, dq + tl.dot(ds, k) * scaling, mask=ok)
        tl.store(dk_ptrs, (dk * scaling).to(DK.dtype.element_ty), mask=k_ok)
        tl.store(dv_ptrs, dv.to(DV.dtype.element_ty), mask=k_ok)
        tl.debug_barrier()


class _FlashAttention1(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        batch, q_len, heads, dim = q.shape
        out = torch.zeros_like(q, dtype=torch.float32)
        peak, total = (q.new_full((batch, heads, q_len), x, dtype=torch.float32)
                       for x in (float("-inf"), 0.0))  # fmt: skip
        _forward[(batch * heads,)](
            q, k, v, out, peak, total, *_how(q, k), CAUSAL=causal, D=dim, BLOCK=BLOCK,
            num_warps=_warps(dim), num_stages=1,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, out, peak, total)
        ctx.causal = causal
        return out.to(q.dtype)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, out, peak, total = ctx.saved_tensors
        dq, dk, dv = torch.zeros_like(out), torch.empty_like(k), torch.empty_like(v)
        dim = q.shape[-1]
        _backward[(k.shape[0] * k.shape[2],)](
            q, k, v, out, dout.contiguous(), peak, total, dq, dk, dv, *_how(q, k), dim**-0.5,
            CAUSAL=ctx.causal, D=dim, BLOCK=BLOCK, num_warps=_warps(dim), num_stages=1,
        )  # fmt: skip
        return dq.to(q.dtype), dk, dv, None


def _how(q: Tensor, k: Tensor) -> tuple[Any, ...]:
    heads = q.shape[2]
    scale = q.shape[-1] ** -0.5 * LOG2E.value
    sizes = heads, heads // k.shape[2], q.shape[1], k.shape[1]
    return q.stride(0), k.stride(0), *sizes, scale


def _warps(dim: int) -> int:
    return 8 if dim > 64 else 4


def flash_attention_1(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """A contender: ``[B, S, H, D]``, contiguous, D a power of two from 16 on; differentiable.

    Raises:
        ValueError: a window, another head size or layout; it was not made for them.
    """
    dim = shape.head_dim
    plain = all(x.is_contiguous() for x in (q, k, v)) and dim >= 16 and dim & (dim - 1) == 0
    if shape.window is not None or not plain:
        raise ValueError("FlashAttention-1 here has no windows, only contiguous tensors and "
                         f"head_dim a power of two from 16 on; got {shape}")  # fmt: skip
    out: Tensor = _FlashAttention1.apply(q, k, v, shape.causal)
    return out
