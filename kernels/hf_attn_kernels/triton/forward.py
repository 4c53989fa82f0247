"""The forward kernel: one program computes BLOCK_M queries of one head by online softmax.

After Dao, "FlashAttention-2" (2023): keys are visited in tiles of BLOCK_N within the range that the
window leaves, tiles that every row sees apart from those that need a mask. Scores are base 2; the
log-sum-exp that is stored is natural. With TMA the copy engine brings whole tiles, which the host
describes (see :mod:`.descriptors`). It knows where a tensor ends, not where a sequence does: of a
packed batch it brings only the tiles that need no mask.
"""

import triton
import triton.language as tl

from .primitives import (
    ADDED,
    LOG2E,
    copy_rows,
    dropout_keep,
    far_apart,
    kept_bounds,
    key_ranges,
    load_rows,
    place,
    score_tile,
    sequence_bounds,
    visible,
)


@triton.jit
def _span(
    acc, m, total, q, start, end, k_tiles, v_tiles, tile_b, kv_head, k_start,
    k_base, v_base, stride_k, stride_v, key_mask, bias_base, bias_stride_q, bias_stride_k, seed,
    stream, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    MASKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Fold the keys [start, end) into the running sums."""
    COPY: tl.constexpr = TMA and not (PACKED and MASKED)
    RAW: tl.constexpr = (not SOFTCAP) and (not HAS_ALIBI) and (BIAS != ADDED)
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
        LOAD_MASK: tl.constexpr = MASKED or HAS_KEY_MASK
        if COPY:
            k = copy_rows(k_tiles, tile_b, kv_head, k_start + n0, BLOCK_N, BLOCK_D)
        else:
            k = load_rows(k_base, n0, stride_k, offs_d, col_ok, BLOCK_N, D, BLOCK_D, LOAD_MASK)
        qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
        s, _ = score_tile(
            qk, i, j, row_ok[:, None] & col_ok[None, :], bias_base, bias_stride_q, bias_stride_k,
            slope, offset, scaling, softcap, SOFTCAP, HAS_ALIBI, BIAS,
        )  # fmt: skip
        if MASKED:
            ok = visible(
                i, j, k_lo, k_hi, offset, left, right, sink_tokens, HAS_LEFT, HAS_RIGHT,
                HAS_SINK_TOKENS,
            )  # fmt: skip
            if HAS_KEY_MASK:
                ok = ok & col_ok[None, :]
            s = tl.where(ok, s, float("-inf"))
        elif HAS_KEY_MASK:
            s = tl.where(col_ok[None, :], s, float("-inf"))
        if RAW:
            m_new = tl.maximum(m, tl.max(s, 1) * (scaling * LOG2E))
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
        # a row that has seen nothing yet keeps m = -inf; exp2(-inf - -inf) would be NaN
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        if RAW:
            p = tl.exp2(s * (scaling * LOG2E) - m_safe[:, None])
        else:
            p = tl.exp2(s - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        total = total * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        if DROPOUT:
            kept = dropout_keep(seed, i, j, stream, keep_threshold)
            p = tl.where(kept, p * keep_scale, 0.0)
        if COPY:
            v = copy_rows(v_tiles, tile_b, kv_head, k_start + n0, BLOCK_N, BLOCK_DV)
        else:
            v = load_rows(v_base, n0, stride_v, offs_dv, col_ok, BLOCK_N, DV, BLOCK_DV, LOAD_MASK)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)  # [BLOCK_M, BLOCK_DV]
        m = m_new
    return acc, m, total


@triton.jit(do_not_specialize=["together"])
def attention_forward_kernel(
    Q, K, V, Out, Lse, LseParts, SAux, Slopes, Bias, KeyMask, KeyLo, KeyHi, CuQ, CuK, Seed,
    QTiles, KTiles, VTiles,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, lse_sb, lse_sh, parts_s,
    bias_sb, bias_sh, bias_sq, bias_sk, slopes_sb,
    blocks_m, together, heads_q, groups, q_len, k_len, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, HAS_S_AUX: tl.constexpr,
    DROPOUT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """Q ``[B, Q, Hq, D]`` by strides, Out ``[B, Q, Hq, DV]`` contiguous, Lse ``[B, Hq, Q]``; of an
    added bias also LseParts ``[2, B, Hq, Q]``, see `Shape.lse_parts`.

    With TMA also QTiles, KTiles and VTiles: descriptors of q, k, v in tiles of BLOCK_M or BLOCK_N.
    """
    block, head = place(tl.program_id(0), blocks_m, together)
    if HAS_RIGHT:
        block = blocks_m - 1 - block  # the longest rows of a causal mask first
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
    tile_b = b * 0 if PACKED else b
    offs_d = tl.arange(0, BLOCK_D)
    if TMA and not PACKED:
        q = copy_rows(QTiles, tile_b, h, first_row, BLOCK_M, BLOCK_D)
    else:
        q_base = Q + b64 * q_sb + q_start.to(tl.int64) * q_ss + h64 * q_sh
        q = load_rows(q_base, first_row, q_ss, offs_d, row_ok, BLOCK_M, D, BLOCK_D, True)
    k_base = K + b64 * k_sb + k_start.to(tl.int64) * k_ss + kv_head * k_sh
    v_base = V + b64 * v_sb + k_start.to(tl.int64) * v_ss + kv_head * v_sh
    bias_base = Bias + b64 * bias_sb + h64 * bias_sh
    key_mask = KeyMask + b64 * k_len
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(Slopes + b * slopes_sb + h)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if HAS_S_AUX:  # a logit with no value: it is where the online softmax starts
        m = tl.zeros([BLOCK_M], tl.float32) + tl.load(SAux + h).to(tl.float32) * LOG2E
        total = total + 1.0
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    # one masked pass over the keys that stay visible outside the window, then the window in three
    if HAS_SINK_TOKENS:
        sink_start = k_lo // BLOCK_N * BLOCK_N
        sink_end = tl.minimum(tl.minimum(k_lo + sink_tokens, k_hi), lo)
        acc, m, total = _span(
            acc, m, total, q, sink_start, sink_end, KTiles, VTiles, tile_b, h // groups, k_start,
            k_base, v_base, k_ss, v_ss, key_mask, bias_base, bias_sq, bias_sk, seed,
            b * heads_q + h, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens,
            scaling, softcap, keep_threshold, keep_scale,
            True, HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS, HAS_KEY_MASK,
            DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, TMA, PACKED,
        )  # fmt: skip
    for part in tl.static_range(3):
        start = lo if part == 0 else (a if part == 1 else c)
        end = a if part == 0 else (c if part == 1 else hi)
        acc, m, total = _span(
            acc, m, total, q, start, end, KTiles, VTiles, tile_b, h // groups, k_start,
            k_base, v_base, k_ss, v_ss, key_mask, bias_base, bias_sq, bias_sk, seed,
            b * heads_q + h, slope, rows, row_ok, k_lo, k_hi, offset, left, right, sink_tokens,
            scaling, softcap, keep_threshold, keep_scale,
            part != 1, HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS,
            HAS_KEY_MASK, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_N, PRECISION, TMA, PACKED,
        )  # fmt: skip

    total_safe = tl.where(total == 0.0, 1.0, total)
    acc = acc / total_safe[:, None]
    lse = tl.where(total == 0.0, float("-inf"), m / LOG2E + tl.log(total_safe))
    offs_dv = tl.arange(0, BLOCK_DV)
    o_ss = heads_q * DV
    o_base = Out + b64 * o_sb + q_start.to(tl.int64) * o_ss + h64 * DV
    o_ptrs = o_base + rows.to(tl.int64)[:, None] * o_ss + offs_dv[None, :]
    tl.store(o_ptrs, acc.to(Out.dtype.element_ty), mask=row_ok[:, None] & (offs_dv < DV)[None, :])
    row_at = b64 * lse_sb + h64 * lse_sh + q_start
    tl.store(Lse + row_at + rows, lse, mask=row_ok)
    if BIAS == ADDED:
        peak = tl.where(total == 0.0, 0.0, m)
        rest = tl.where(total == 0.0, float("inf"), tl.log2(total_safe))
        tl.store(LseParts + row_at + rows, peak, mask=row_ok)
        tl.store(LseParts + parts_s + row_at + rows, rest, mask=row_ok)
