"""The gradients of k and v: a program owns BLOCK_N keys of a head and walks the queries that see
them.

GQA: the program of a key/value head loops over the query heads of its group. On request it adds up
dq on the way: five products for each pair of tiles instead of three here and four in :mod:`.dq`.
"""

import triton
import triton.language as tl

from .backward import base_2, load_lse, load_parts, weights
from .primitives import (
    ADDED,
    LOG2E,
    copy_rows,
    far_apart,
    kept_bounds,
    load_rows,
    place,
    sequence_bounds,
    visible,
)


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
def _span(
    dk, dv, k, v, start, full_start, full_end, end, q_tiles, do_tiles, lse_tiles, delta_tiles,
    dq_tiles, b, h, dq_base, stride_dq, q_base, do_base, stride_q, stride_o, lse_base, parts_base,
    parts_s, delta_base, bias_base, bias_stride_q, bias_stride_k, seed, stream, slope, cols, col_ok,
    q_len, k_lo, k_hi, offset, left, right, sink_tokens, scaling, softcap, keep_threshold,
    keep_scale,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, ADD_DQ: tl.constexpr,
):  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    j = cols[:, None]
    RAW: tl.constexpr = (not SOFTCAP) and (not HAS_ALIBI) and (BIAS != ADDED)
    EARLY_LSE: tl.constexpr = RAW and PRECISION != "ieee"  # float32 would lose its last bits
    EARLY_DELTA: tl.constexpr = not DROPOUT and PRECISION != "ieee"
    unscale = -1.0 / (scaling * LOG2E)
    for m0 in range(start, end, BLOCK_M):
        m0 = tl.multiple_of(m0, BLOCK_M)
        rows = m0 + tl.arange(0, BLOCK_M)
        row_ok = rows < q_len
        i = rows[None, :]
        if TMA:
            q = copy_rows(q_tiles, b, h, m0, BLOCK_M, BLOCK_D)
            do = copy_rows(do_tiles, b, h, m0, BLOCK_M, BLOCK_DV)
            if BIAS != ADDED:
                lse = base_2(lse_tiles.load([b, h, m0]).reshape(BLOCK_M))
            delta = delta_tiles.load([b, h, m0]).reshape(BLOCK_M)
        else:
            q = load_rows(q_base, m0, stride_q, offs_d, row_ok, BLOCK_M, D, BLOCK_D, True)
            do = load_rows(do_base, m0, stride_o, offs_dv, row_ok, BLOCK_M, DV, BLOCK_DV, True)
            if BIAS != ADDED:
                lse = load_lse(lse_base, rows, row_ok)
            delta = tl.load(delta_base + rows, mask=row_ok, other=0.0)
        peak = 0.0
        if BIAS == ADDED:
            peak, lse = load_parts(parts_base, parts_s, rows, row_ok)
            peak = peak[None, :]
        lse = lse[None, :]
        delta = delta[None, :]
        ok = col_ok[:, None] & row_ok[None, :]
        # what is to be taken from a product is where its sum starts: two vectors less to keep
        qk = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        if EARLY_LSE:
            qk = tl.broadcast_to(lse * unscale, (BLOCK_N, BLOCK_M))
            lse = 0.0
        if EARLY_DELTA:
            dp = tl.broadcast_to(-delta, (BLOCK_N, BLOCK_M))
            delta = 0.0
        qk = tl.dot(k, tl.trans(q), qk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v, tl.trans(do), dp, input_precision=PRECISION)
        p, ds, t = weights(
            qk, dp, lse, peak, delta, i, j, ok, bias_base, bias_stride_q, bias_stride_k, slope,
            offset, scaling, softcap, seed, stream, keep_threshold, keep_scale, HAS_KEY_MASK,
            SOFTCAP, HAS_ALIBI, BIAS, DROPOUT,
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
        ds = ds.to(q.dtype)
        dk = tl.dot(ds, q, dk, input_precision=PRECISION)  # [BLOCK_N, BLOCK_D]
        if ADD_DQ:
            part = tl.dot(tl.trans(ds), k, input_precision=PRECISION)  # [BLOCK_M, BLOCK_D]
            if TMA:
                dq_tiles.atomic_add([b, h, m0, 0], part.reshape(1, 1, BLOCK_M, BLOCK_D))
            else:
                at = dq_base + rows.to(tl.int64)[:, None] * stride_dq + offs_d[None, :]
                inside = row_ok[:, None] & (offs_d < D)[None, :]
                tl.atomic_add(at, part, mask=inside, sem="relaxed")
    return dk, dv


@triton.jit(do_not_specialize=["together"])
def dkdv_kernel(
    Q, K, V, DOut, Lse, LseParts, Delta, DK, DV_, DQSum, Slopes, Bias, KeyMask, KeyLo, KeyHi, CuQ,
    CuK, Seed,
    QTiles, KTiles, VTiles, DOutTiles, LseTiles, DeltaTiles, DQTiles,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, dk_sb, dv_sb, dq_sb, lse_sb, lse_sh,
    parts_s, bias_sb, bias_sh, bias_sq, bias_sk, slopes_sb,
    blocks_n, together, heads_q, groups, q_len, k_len, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    BIAS: tl.constexpr, HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr,
    DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, PRECISION: tl.constexpr, TMA: tl.constexpr, ADD_DQ: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """DK ``[B, K, Hkv, D]`` and DV_ ``[B, K, Hkv, DV]``, contiguous: BLOCK_N keys of one head.

    With ADD_DQ each tile's share of dq, not yet scaled, is added to DQSum ``[B, Q, Hq, D]`` float32
    (with TMA by the copy engine, through DQTiles). Who adds first is nobody's choice, so its last
    bits differ from run to run; in return two of seven products fall away.
    """
    block, head = place(tl.program_id(0), blocks_n, together)  # the first keys have most queries
    heads_kv = heads_q // groups
    b = head // heads_kv
    kv_head = head % heads_kv
    q_start, q_len, k_start, k_len = sequence_bounds(b, CuQ, CuK, q_len, k_len, PACKED)
    first_key = block * BLOCK_N
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
    q_ss, k_ss, v_ss = far_apart(q_ss, WIDE), far_apart(k_ss, WIDE), far_apart(v_ss, WIDE)
    o_ss = far_apart(heads_q * DV, WIDE)
    k_base = K + b64 * k_sb + k_start.to(tl.int64) * k_ss + kv64 * k_sh
    v_base = V + b64 * v_sb + k_start.to(tl.int64) * v_ss + kv64 * v_sh
    if TMA:
        k = copy_rows(KTiles, b, kv_head, first_key, BLOCK_N, BLOCK_D)
        v = copy_rows(VTiles, b, kv_head, first_key, BLOCK_N, BLOCK_DV)
    else:
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
        dq_base = DQSum + b64 * dq_sb + q_start.to(tl.int64) * heads_q * D + h64 * D
        row_at = b64 * lse_sb + h64 * lse_sh + q_start
        bias_base = Bias + b64 * bias_sb + h64 * bias_sh
        slope = 0.0
        if HAS_ALIBI:
            slope = tl.load(Slopes + b * slopes_sb + h)
        dk, dv = _span(
            dk, dv, k, v, lo, a, c, hi, QTiles, DOutTiles, LseTiles, DeltaTiles, DQTiles, b, h,
            dq_base, heads_q * D, q_base, do_base, q_ss, o_ss, Lse + row_at, LseParts + row_at,
            parts_s, Delta + row_at,
            bias_base, bias_sq, bias_sk, seed, b * heads_q + h, slope, cols, col_ok, q_len, k_lo,
            k_hi, offset, left, right, sink_tokens, scaling, softcap, keep_threshold, keep_scale,
            HAS_LEFT, HAS_RIGHT, HAS_SINK_TOKENS, SOFTCAP, HAS_ALIBI, BIAS,
            HAS_KEY_MASK, DROPOUT, D, DV, BLOCK_D, BLOCK_DV, BLOCK_M, BLOCK_N, PRECISION, TMA,
            ADD_DQ,
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
