"""The gradient of q: the forward's walk over the keys, once more."""

import triton
import triton.language as tl

from .backward import load_lse, load_parts, weights
from .primitives import (
    ADDED,
    copy_rows,
    far_apart,
    kept_bounds,
    key_ranges,
    load_rows,
    place,
    sequence_bounds,
    visible,
)


@triton.jit
def _span(
    dq, q, do, lse, peak, delta, start, full_start, full_end, end, k_tiles, v_tiles, b, kv_head,
    k_base, v_base, stride_k, stride_v, key_mask, bias_base, bias_stride_q, bias_stride_k, seed,
    stream, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    i = rows[:, None]
    for n0 in range(start, end, BLOCK_N):
        n0 = tl.multiple_of(n0, BLOCK_N)
        cols = n0 + tl.arange(0, BLOCK_N)
        j = cols[None, :]
        col_ok = (cols >= k_lo) & (cols < k_hi)
        if HAS_KEY_MASK:
            col_ok = col_ok & (tl.load(key_mask + cols, mask=col_ok, other=0) != 0)
        ok = row_ok[:, None] & col_ok[None, :]
        if TMA:
            k = copy_rows(k_tiles, b, kv_head, n0, BLOCK_N, BLOCK_D)
            v = copy_rows(v_tiles, b, kv_head, n0, BLOCK_N, BLOCK_DV)
        else:
            k = load_rows(k_base, n0, stride_k, offs_d, col_ok, BLOCK_N, D, BLOCK_D, True)
            v = load_rows(v_base, n0, stride_v, offs_dv, col_ok, BLOCK_N, DV, BLOCK_DV, True)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        _, ds, t = weights(
            qk, dp, lse[:, None], peak[:, None], delta[:, None], i, j, ok, bias_base, bias_stride_q,
            bias_stride_k, slope, offset, scaling, softcap, seed, stream, keep_threshold,
            keep_scale, HAS_KEY_MASK, SOFTCAP, HAS_ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        if n0 < full_start or n0 >= full_end:
            seen = visible(
                i, j, k_lo, k_hi, offset, left, right, sink_tokens, HAS_LEFT, HAS_RIGHT,
                HAS_SINK_TOKENS,
            )  # fmt: skip
            ds = tl.where(seen, ds, 0.0)
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
    return dq


@triton.jit(do_not_specialize=["together"])
def dq_kernel(
    Q, K, V, DOut, Lse, LseParts, Delta, DQ, Slopes, Bias, KeyMask, KeyLo, KeyHi, CuQ, CuK, Seed,
    QTiles, KTiles, VTiles, DOutTiles,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, dq_sb, lse_sb, lse_sh,
    parts_s,
    bias_sb, bias_sh, bias_sq, bias_sk, slopes_sb,
    blocks_m, together, heads_q, groups, q_len, k_len, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DQ ``[B, Q, Hq, D]`` contiguous; the walk over the keys is the forward's."""
    block, head = place(tl.program_id(0), blocks_m, together)
    if HAS_RIGHT:
        block = blocks_m - 1 - block
    b = head // heads_q
    h = head % heads_q
    q_start, q_len, k_start, k_len = sequence_bounds(b, CuQ, CuK, q_len, k_len, PACKED)
    first_row = block * BLOCK_M
    if first_row >= q_len:
        return
    last_row = tl.minimum(first_row + BLOCK_M, q_len) - 1
    offset = k_len - q_len
    k_lo, k_hi = kept_bounds(b, KeyLo, KeyHi, k_len, HAS_KEY_MASK)
    lo, a, c, hi = key_ranges(
        first_row, last_row, k_lo, k_hi, offset, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )

    q_ss, k_ss, v_ss = far_apart(q_ss, WIDE), far_apart(k_ss, WIDE), far_apart(v_ss, WIDE)
    rows = first_row + tl.arange(0, BLOCK_M)
    row_ok = rows < q_len
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    kv_head = (h // groups).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    o_ss = far_apart(heads_q * DV, WIDE)
    q_base = Q + b64 * q_sb + q_start.to(tl.int64) * q_ss + h64 * q_sh
    do_base = DOut + b64 * o_sb + q_start.to(tl.int64) * o_ss + h64 * DV
    k_base = K + b64 * k_sb + k_start.to(tl.int64) * k_ss + kv_head * k_sh
    v_base = V + b64 * v_sb + k_start.to(tl.int64) * v_ss + kv_head * v_sh
    bias_base = Bias + b64 * bias_sb + h64 * bias_sh
    key_mask = KeyMask + b64 * k_len
    row_at = b64 * lse_sb + h64 * lse_sh + q_start
    if TMA:
        q = copy_rows(QTiles, b, h, first_row, BLOCK_M, BLOCK_D)
        do = copy_rows(DOutTiles, b, h, first_row, BLOCK_M, BLOCK_DV)
    else:
        q = load_rows(q_base, first_row, q_ss, offs_d, row_ok, BLOCK_M, D, BLOCK_D, True)
        do = load_rows(do_base, first_row, o_ss, offs_dv, row_ok, BLOCK_M, DV, BLOCK_DV, True)
    peak = tl.zeros([BLOCK_M], tl.float32)
    if BIAS == ADDED:
        peak, lse = load_parts(LseParts + row_at, parts_s, rows, row_ok)
    else:
        lse = load_lse(Lse + row_at, rows, row_ok)
    delta = tl.load(Delta + row_at + rows, mask=row_ok, other=0.0)
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + b * slopes_sb + h)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)

    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_SINK_TOKENS:
        sink_start = k_lo // BLOCK_N * BLOCK_N
        sink_end = tl.minimum(tl.minimum(k_lo + sink_tokens, k_hi), lo)
        dq = _span(
            dq, q, do, lse, peak, delta, sink_start, hi, hi, sink_end, KTiles, VTiles, b,
            h // groups, k_base, v_base, k_ss, v_ss, key_mask, bias_base, bias_sq, bias_sk, seed,
            b * heads_q + h, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens,
            scaling, softcap, keep_threshold, keep_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS, HAS_KEY_MASK,
            DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, TMA,
        )  # fmt: skip
    dq = _span(
        dq, q, do, lse, peak, delta, lo, a, c, hi, KTiles, VTiles, b, h // groups,
        k_base, v_base, k_ss, v_ss, key_mask, bias_base, bias_sq, bias_sk, seed,
        b * heads_q + h, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens,
        scaling, softcap, keep_threshold, keep_scale,
        HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS, HAS_KEY_MASK,
        DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, TMA,
    )  # fmt: skip

    dq_ss = heads_q * D
    out = DQ + b64 * dq_sb + q_start.to(tl.int64) * dq_ss + h64 * D
    ptrs = out + rows.to(tl.int64)[:, None] * dq_ss + offs_d[None, :]
    ok = row_ok[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, (dq * scaling).to(DQ.dtype.element_ty), mask=ok)
