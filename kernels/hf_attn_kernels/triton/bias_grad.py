"""The gradient of an added bias, summed over the dimensions along which the bias was broadcast.

One program owns one tile of the bias and loops over every batch row, head and query block that used
it, so the sum needs no atomics and is the same bits every time.
"""

import triton
import triton.language as tl

from .backward import load_parts, weights
from .primitives import ADDED, far_apart, kept_bounds, load_rows, sequence_bounds, visible


@triton.jit
def bias_grad_kernel(
    Q, K, V, DOut, Lse, LseParts, Delta, DBias, Slopes, Bias, KeyMask, KeyLo, KeyHi, CuQ, CuK,
    Seed,
    q_sb, q_ss, q_sh, k_sb, k_ss, k_sh, v_sb, v_ss, v_sh, o_sb, lse_sb, lse_sh, parts_s,
    bias_sb, bias_sh, bias_sq, bias_sk, slopes_sb,
    batch, bias_batch, bias_heads, bias_queries, max_k,
    blocks_m, heads_q, groups, q_len, k_len, left, right, sink_tokens, scaling, softcap,
    keep_threshold, keep_scale,
    PACKED: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
    HAS_SINK_TOKENS: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, DROPOUT: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """DBias ``[bias_batch, bias_heads, bias_queries, max_k]`` float32, contiguous.

    Grid: key blocks * bias query blocks * bias_batch * bias_heads. With bias_queries 1 a program
    walks all query blocks and sums their rows.
    """
    blocks_n = tl.cdiv(max_k, BLOCK_N)
    own_blocks = tl.cdiv(bias_queries, BLOCK_M)
    first_key = tl.program_id(0) % blocks_n * BLOCK_N
    own_block = tl.program_id(0) // blocks_n % own_blocks
    own = tl.program_id(0) // blocks_n // own_blocks
    one_row = bias_queries == 1
    block_lo = tl.where(one_row, 0, own_block)
    block_hi = tl.where(one_row, blocks_m, own_block + 1)
    own_b = own // bias_heads
    own_h = own % bias_heads
    b_lo = tl.where(bias_batch == 1, 0, own_b)
    b_hi = tl.where(bias_batch == 1, batch, own_b + 1)
    h_lo = tl.where(bias_heads == 1, 0, own_h)
    h_hi = tl.where(bias_heads == 1, heads_q, own_h + 1)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    cols = first_key + tl.arange(0, BLOCK_N)
    q_ss, k_ss, v_ss = far_apart(q_ss, WIDE), far_apart(k_ss, WIDE), far_apart(v_ss, WIDE)
    o_ss = far_apart(heads_q * DV, WIDE)
    seed = 0
    if DROPOUT:
        seed = tl.load(Seed)

    grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for b in range(b_lo, b_hi):
        b64 = tl.cast(b, tl.int64)
        q_start, n_q, k_start, n_k = sequence_bounds(b, CuQ, CuK, q_len, k_len, PACKED)
        offset = n_k - n_q
        k_lo, k_hi = kept_bounds(b, KeyLo, KeyHi, n_k, HAS_KEY_MASK)
        col_ok = (cols >= k_lo) & (cols < k_hi)
        if HAS_KEY_MASK:
            col_ok = col_ok & (tl.load(KeyMask + b64 * n_k + cols, mask=col_ok, other=0) != 0)
        for h in range(h_lo, h_hi):
            h64 = tl.cast(h, tl.int64)
            kv64 = h64 // groups
            q_base = Q + b64 * q_sb + tl.cast(q_start, tl.int64) * q_ss + h64 * q_sh
            do_base = DOut + b64 * o_sb + tl.cast(q_start, tl.int64) * o_ss + h64 * DV
            k_base = K + b64 * k_sb + tl.cast(k_start, tl.int64) * k_ss + kv64 * k_sh
            v_base = V + b64 * v_sb + tl.cast(k_start, tl.int64) * v_ss + kv64 * v_sh
            bias_base = Bias + b64 * bias_sb + h64 * bias_sh
            row_at = b64 * lse_sb + h64 * lse_sh + q_start
            slope = 0.0
            if HAS_ALIBI:
                slope = tl.load(Slopes + b * slopes_sb + h)
            k = load_rows(k_base, first_key, k_ss, offs_d, col_ok, BLOCK_N, D, BLOCK_D, True)
            v = load_rows(v_base, first_key, v_ss, offs_dv, col_ok, BLOCK_N, DV, BLOCK_DV, True)
            for block in range(block_lo, block_hi):
                first_row = block * BLOCK_M
                rows = first_row + tl.arange(0, BLOCK_M)
                row_ok = rows < n_q
                q = load_rows(q_base, first_row, q_ss, offs_d, row_ok, BLOCK_M, D, BLOCK_D, True)
                do = load_rows(
                    do_base, first_row, o_ss, offs_dv, row_ok, BLOCK_M, DV, BLOCK_DV, True
                )
                peak, lse = load_parts(LseParts + row_at, parts_s, rows, row_ok)
                delta = tl.load(Delta + row_at + rows, mask=row_ok, other=0.0)
                i = rows[:, None]
                j = cols[None, :]
                ok = row_ok[:, None] & col_ok[None, :]
                ok = ok & visible(
                    i, j, k_lo, k_hi, offset, left, right, sink_tokens, HAS_LEFT, HAS_RIGHT,
                    HAS_SINK_TOKENS,
                )  # fmt: skip
                qk = tl.dot(q, tl.trans(k), input_precision=PRECISION)
                dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
                _, ds, _ = weights(
                    qk, dp, lse[:, None], peak[:, None], delta[:, None], i, j, ok, bias_base,
                    bias_sq, bias_sk, slope, offset, scaling, softcap, seed, b * heads_q + h,
                    keep_threshold, keep_scale, True, SOFTCAP, HAS_ALIBI, ADDED, DROPOUT,
                )  # fmt: skip
                if one_row:
                    grad += tl.broadcast_to(tl.sum(ds, 0)[None, :], (BLOCK_M, BLOCK_N))
                else:
                    grad += ds
    rows = own_block * BLOCK_M + tl.arange(0, BLOCK_M)
    base = DBias + own.to(tl.int64) * bias_queries * max_k
    ok = (rows < bias_queries)[:, None] & (cols < max_k)[None, :]
    tl.store(base + rows.to(tl.int64)[:, None] * max_k + cols[None, :], grad, mask=ok)
