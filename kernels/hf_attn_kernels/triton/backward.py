"""The backward kernels: delta, then dq, then dk and dv, then the gradient of an added bias.

After Dao, "FlashAttention-2" (2023), with dq apart from dk/dv: every output element is written once
by one program, so the result is the same bits every time. Scores are computed again and become
weights by the stored log-sum-exp. Tiles that every row sees skip the mask by a uniform branch: one
loop instead of the forward's three saves the registers that the second accumulator needs. GQA: the
program of a key/value head loops over the query heads of its group.
"""

import triton
import triton.language as tl

from .primitives import (
    ADDED,
    LOG2E,
    dropout_keep,
    kept_bounds,
    key_ranges,
    load_rows,
    score_tile,
    sequence_bounds,
    visible,
)


@triton.jit
def delta_kernel(
    Out, DOut, DLse, Delta, CuQ, o_sb, lse_sb, lse_sh, blocks_m, heads_q, q_len,
    PACKED: tl.constexpr, HAS_DLSE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Delta ``[B, Hq, Q]`` = sum(out * dout) - dlse, the row term of the softmax's gradient."""
    pid = tl.program_id(0)
    b = pid // blocks_m // heads_q
    h = pid // blocks_m % heads_q
    q_start, q_len, _, _ = sequence_bounds(b, CuQ, CuQ, q_len, q_len, PACKED)
    first_row = pid % blocks_m * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    ok = rows < q_len
    cols = tl.arange(0, BLOCK_DV)
    stride = heads_q * DV
    shift = b.to(tl.int64) * o_sb + q_start.to(tl.int64) * stride + h.to(tl.int64) * DV
    o = load_rows(Out + shift, first_row, stride, cols, ok, BLOCK_M, DV, BLOCK_DV, True)
    do = load_rows(DOut + shift, first_row, stride, cols, ok, BLOCK_M, DV, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = b.to(tl.int64) * lse_sb + h.to(tl.int64) * lse_sh + q_start
    if HAS_DLSE:
        delta -= tl.load(DLse + at + rows, mask=ok, other=0.0)
    tl.store(Delta + at + rows, delta, mask=ok)


@triton.jit
def _weights(
    qk, dp, lse, delta, i, j, ok, bias_base, bias_stride_q, bias_stride_k, slope, offset, scaling,
    softcap, seed, stream, keep_threshold, keep_scale,
    USE_OK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Weights as the values saw them (dropout applied) and the gradient of the scores.

    `lse` is base 2 and `delta` plain, both broadcastable to the tile. The gradient is of the score
    behind the softcap (what a bias gets); the caller takes it through the softcap with `t`.
    """
    s, t = score_tile(
        qk, i, j, ok, bias_base, bias_stride_q, bias_stride_k, slope, offset, scaling, softcap,
        SOFTCAP, HAS_ALIBI, BIAS,
    )  # fmt: skip
    if (not SOFTCAP) and (not HAS_ALIBI) and (BIAS != ADDED):
        p = tl.exp2(s * (scaling * LOG2E) - lse)
    else:
        p = tl.exp2(s - lse)
    if USE_OK:
        p = tl.where(ok, p, 0.0)
    dropped = p
    if DROPOUT:
        kept = dropout_keep(seed, i, j, stream, keep_threshold)
        dropped = tl.where(kept, p * keep_scale, 0.0)
        dp = tl.where(kept, dp * keep_scale, 0.0)
    ds = p * (dp - delta)
    return dropped, ds, t


@triton.jit
def _load_lse(base, rows, ok):
    """Base-2 log-sum-exp; a row that saw nothing gets +inf, so that its weights come out as 0."""
    lse = tl.load(base + rows, mask=ok, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def _dq_span(
    dq, q, do, lse, delta, start, full_start, full_end, end,
    k_base, v_base, stride_k, stride_v, key_mask, bias_base, bias_stride_q, bias_stride_k, seed,
    stream, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
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
        k = load_rows(k_base, n0, stride_k, offs_d, col_ok, BLOCK_N, D, BLOCK_D, True)
        v = load_rows(v_base, n0, stride_v, offs_dv, col_ok, BLOCK_N, DV, BLOCK_DV, True)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        _, ds, t = _weights(
            qk, dp, lse[:, None], delta[:, None], i, j, ok, bias_base, bias_stride_q,
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


@triton.jit
def dq_kernel(
    Q, K, V, DOut, Lse, Delta, DQ, Slopes, Bias, KeyMask, KeyLo, KeyHi, CuQ, CuK, Seed,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, dq_sb, lse_sb, lse_sh,
    bias_sb, bias_sh, bias_sq, bias_sk, slopes_sb,
    blocks_m, heads_q, groups, q_len, k_len, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DQ ``[B, Q, Hq, D]`` contiguous; the walk over the keys is the forward's."""
    pid = tl.program_id(0)
    block = pid % blocks_m
    if HAS_RIGHT:
        block = blocks_m - 1 - block
    b = pid // blocks_m // heads_q
    h = pid // blocks_m % heads_q
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

    rows = first_row + tl.arange(0, BLOCK_M)
    row_ok = rows < q_len
    b64 = b.to(tl.int64)
    h64 = h.to(tl.int64)
    kv_head = (h // groups).to(tl.int64)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    o_ss = heads_q * DV
    q_base = Q + b64 * q_sb + q_start.to(tl.int64) * q_ss + h64 * q_sh
    do_base = DOut + b64 * o_sb + q_start.to(tl.int64) * o_ss + h64 * DV
    k_base = K + b64 * k_sb + k_start.to(tl.int64) * k_ss + kv_head * k_sh
    v_base = V + b64 * v_sb + k_start.to(tl.int64) * v_ss + kv_head * v_sh
    bias_base = Bias + b64 * bias_sb + h64 * bias_sh
    key_mask = KeyMask + b64 * k_len
    row_at = b64 * lse_sb + h64 * lse_sh + q_start
    q = load_rows(q_base, first_row, q_ss, offs_d, row_ok, BLOCK_M, D, BLOCK_D, True)
    do = load_rows(do_base, first_row, o_ss, offs_dv, row_ok, BLOCK_M, DV, BLOCK_DV, True)
    lse = _load_lse(Lse + row_at, rows, row_ok)
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
        dq = _dq_span(
            dq, q, do, lse, delta, sink_start, hi, hi, sink_end,
            k_base, v_base, k_ss, v_ss, key_mask, bias_base, bias_sq, bias_sk, seed,
            b * heads_q + h, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens,
            scaling, softcap, keep_threshold, keep_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS, HAS_KEY_MASK,
            DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
        )  # fmt: skip
    dq = _dq_span(
        dq, q, do, lse, delta, lo, a, c, hi,
        k_base, v_base, k_ss, v_ss, key_mask, bias_base, bias_sq, bias_sk, seed,
        b * heads_q + h, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens,
        scaling, softcap, keep_threshold, keep_scale,
        HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS, HAS_KEY_MASK,
        DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION,
    )  # fmt: skip

    dq_ss = heads_q * D
    out = DQ + b64 * dq_sb + q_start.to(tl.int64) * dq_ss + h64 * D
    ptrs = out + rows.to(tl.int64)[:, None] * dq_ss + offs_d[None, :]
    ok = row_ok[:, None] & (offs_d < D)[None, :]
    tl.store(ptrs, (dq * scaling).to(DQ.dtype.element_ty), mask=ok)


@triton.jit
def _row_ranges(
    first_key, last_key, k_lo, k_hi, q_len, offset, left, right, sink_tokens,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SINK_TOKENS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Query ranges of a tile of keys: ``[lo, a)`` and ``[c, hi)`` need a mask, ``[a, c)`` none."""
    lo = first_key * 0
    hi = q_len
    full_lo = lo
    full_hi = q_len
    if HAS_RIGHT:
        lo = tl.maximum(first_key - offset - right, 0)
        full_lo = tl.maximum(last_key - offset - right, 0)
    if HAS_LEFT:
        hi = tl.minimum(q_len, last_key - offset + left + 1)
        full_hi = tl.minimum(q_len, first_key - offset + left + 1)
        if HAS_SINK_TOKENS:  # a sink is seen by every later row
            hi = tl.where(first_key < k_lo + sink_tokens, q_len, hi)
    # a tile with keys that are padded away, or past the end, is masked throughout
    whole = (first_key >= k_lo) & (last_key < k_hi)
    full_hi = tl.where(whole, full_hi, 0)
    hi = tl.maximum(hi, 0)
    lo = tl.minimum(lo, hi) // BLOCK_M * BLOCK_M
    a = tl.minimum((full_lo + BLOCK_M - 1) // BLOCK_M * BLOCK_M, hi)
    c = tl.maximum(a, tl.maximum(full_hi, 0) // BLOCK_M * BLOCK_M)
    return lo, a, c, hi


@triton.jit
def _dkdv_span(
    dk, dv, k, v, start, full_start, full_end, end,
    q_base, do_base, stride_q, stride_o, lse_base, delta_base, bias_base, bias_stride_q,
    bias_stride_k, seed, stream, slope, cols, col_ok, q_len, k_lo, k_hi, offset, left, right,
    sink_tokens, scaling, softcap, keep_threshold, keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    j = cols[:, None]
    for m0 in range(start, end, BLOCK_M):
        m0 = tl.multiple_of(m0, BLOCK_M)
        rows = m0 + tl.arange(0, BLOCK_M)
        row_ok = rows < q_len
        i = rows[None, :]
        q = load_rows(q_base, m0, stride_q, offs_d, row_ok, BLOCK_M, D, BLOCK_D, True)
        do = load_rows(do_base, m0, stride_o, offs_dv, row_ok, BLOCK_M, DV, BLOCK_DV, True)
        lse = _load_lse(lse_base, rows, row_ok)
        delta = tl.load(delta_base + rows, mask=row_ok, other=0.0)
        ok = col_ok[:, None] & row_ok[None, :]
        qk = tl.dot(k, tl.trans(q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        p, ds, t = _weights(
            qk, dp, lse[None, :], delta[None, :], i, j, ok, bias_base, bias_stride_q,
            bias_stride_k, slope, offset, scaling, softcap, seed, stream, keep_threshold,
            keep_scale, HAS_KEY_MASK, SOFTCAP, HAS_ALIBI, BIAS, DROPOUT,
        )  # fmt: skip
        if m0 < full_start or m0 >= full_end:
            seen = visible(
                i, j, k_lo, k_hi, offset, left, right, sink_tokens, HAS_LEFT, HAS_RIGHT,
                HAS_SINK_TOKENS,
            )  # fmt: skip
            p = tl.where(seen, p, 0.0)
            ds = tl.where(seen, ds, 0.0)
        if SOFTCAP:
            ds = ds * (1.0 - t * t)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)  # [BLOCK_N, BLOCK_DV]
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
    return dk, dv


@triton.jit
def dkdv_kernel(
    Q, K, V, DOut, Lse, Delta, DK, DV_, Slopes, Bias, KeyMask, KeyLo, KeyHi, CuQ, CuK, Seed,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, dk_sb, dv_sb, lse_sb, lse_sh,
    bias_sb, bias_sh, bias_sq, bias_sk, slopes_sb,
    blocks_n, heads_q, groups, q_len, k_len, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """DK ``[B, K, Hkv, D]`` and DV_ ``[B, K, Hkv, DV]``, contiguous: BLOCK_N keys of one head."""
    pid = tl.program_id(0)
    heads_kv = heads_q // groups
    b = pid // blocks_n // heads_kv
    kv_head = pid // blocks_n % heads_kv
    q_start, q_len, k_start, k_len = sequence_bounds(b, CuQ, CuK, q_len, k_len, PACKED)
    first_key = pid % blocks_n * BLOCK_N
    if first_key >= k_len:
        return
    offset = k_len - q_len
    k_lo, k_hi = kept_bounds(b, KeyLo, KeyHi, k_len, HAS_KEY_MASK)
    lo, a, c, hi = _row_ranges(
        first_key, first_key + BLOCK_N - 1, k_lo, k_hi, q_len, offset, left, right, sink_tokens,
        HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, BLOCK_M, BLOCK_N,
    )  # fmt: skip

    cols = first_key + tl.arange(0, BLOCK_N)
    in_seq = cols < k_len
    col_ok = (cols >= k_lo) & (cols < k_hi)
    b64 = b.to(tl.int64)
    kv64 = kv_head.to(tl.int64)
    if HAS_KEY_MASK:
        col_ok = col_ok & (tl.load(KeyMask + b64 * k_len + cols, mask=col_ok, other=0) != 0)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    o_ss = heads_q * DV
    k_base = K + b64 * k_sb + k_start.to(tl.int64) * k_ss + kv64 * k_sh
    v_base = V + b64 * v_sb + k_start.to(tl.int64) * v_ss + kv64 * v_sh
    k = load_rows(k_base, first_key, k_ss, offs_d, col_ok, BLOCK_N, D, BLOCK_D, True)
    v = load_rows(v_base, first_key, v_ss, offs_dv, col_ok, BLOCK_N, DV, BLOCK_DV, True)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)

    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_DV], tl.float32)
    for g in range(groups):
        h = kv_head * groups + g
        h64 = h.to(tl.int64)
        q_base = Q + b64 * q_sb + q_start.to(tl.int64) * q_ss + h64 * q_sh
        do_base = DOut + b64 * o_sb + q_start.to(tl.int64) * o_ss + h64 * DV
        row_at = b64 * lse_sb + h64 * lse_sh + q_start
        bias_base = Bias + b64 * bias_sb + h64 * bias_sh
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(Slopes + b * slopes_sb + h)
        dk, dv = _dkdv_span(
            dk, dv, k, v, lo, a, c, hi,
            q_base, do_base, q_ss, o_ss, Lse + row_at, Delta + row_at, bias_base, bias_sq,
            bias_sk, seed, b * heads_q + h, slope, cols, col_ok, q_len, k_lo, k_hi, offset,
            left, right, sink_tokens, scaling, softcap, keep_threshold, keep_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS,
            HAS_KEY_MASK, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, PRECISION,
        )  # fmt: skip

    dk_ss = heads_kv * D
    dv_ss = heads_kv * DV
    wide = cols.to(tl.int64)[:, None]
    dk_base = DK + b64 * dk_sb + k_start.to(tl.int64) * dk_ss + kv64 * D
    dv_base = DV_ + b64 * dv_sb + k_start.to(tl.int64) * dv_ss + kv64 * DV
    dk_ok = in_seq[:, None] & (offs_d < D)[None, :]
    dv_ok = in_seq[:, None] & (offs_dv < DV)[None, :]
    dk = (dk * scaling).to(DK.dtype.element_ty)
    tl.store(dk_base + wide * dk_ss + offs_d[None, :], dk, mask=dk_ok)
    tl.store(dv_base + wide * dv_ss + offs_dv[None, :], dv.to(DV_.dtype.element_ty), mask=dv_ok)
