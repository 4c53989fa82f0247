"""What the backward kernels share: delta, and scores that become weights and gradients again.

After Dao, "FlashAttention-2" (2023), with dq (:mod:`.dq`) apart from dk/dv (:mod:`.dkdv`): every
output element is written once by one program, so the result is the same bits every time. Scores are
computed again and become weights by the stored log-sum-exp. Tiles that every row sees skip the mask
by a uniform branch: one loop instead of the forward's three saves the registers that the second
accumulator needs.
"""

import triton
import triton.language as tl

from .primitives import (
    ADDED,
    LOG2E,
    dropout_keep,
    far_apart,
    load_rows,
    score_tile,
    sequence_bounds,
)


@triton.jit
def delta_kernel(
    Out, DOut, DLse, Delta, CuQ, o_sb, lse_sb, lse_sh, blocks_m, heads_q, q_len,
    PACKED: tl.constexpr, HAS_DLSE: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr, WIDE: tl.constexpr,
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
    stride = far_apart(heads_q * DV, WIDE)
    shift = b.to(tl.int64) * o_sb + q_start.to(tl.int64) * stride + h.to(tl.int64) * DV
    o = load_rows(Out + shift, first_row, stride, cols, ok, BLOCK_M, DV, BLOCK_DV, True)
    do = load_rows(DOut + shift, first_row, stride, cols, ok, BLOCK_M, DV, BLOCK_DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    at = b.to(tl.int64) * lse_sb + h.to(tl.int64) * lse_sh + q_start
    if HAS_DLSE:
        delta -= tl.load(DLse + at + rows, mask=ok, other=0.0)
    tl.store(Delta + at + rows, delta, mask=ok)


@triton.jit
def weights(
    qk, dp, lse, peak, delta, i, j, ok, bias_base, bias_stride_q, bias_stride_k, slope, offset,
    scaling, softcap, seed, stream, keep_threshold, keep_scale,
    USE_OK: tl.constexpr, SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BIAS: tl.constexpr,
    DROPOUT: tl.constexpr,
):  # fmt: skip
    """Weights as the values saw them (dropout applied) and the gradient of the scores.

    `lse` is base 2 and `delta` plain, both broadcastable to the tile; with an added bias `lse` is
    what `peak` leaves of it. The gradient is of the score behind the softcap (what a bias gets);
    the caller takes it through the softcap with `t`.
    """
    s, t = score_tile(
        qk, i, j, ok, bias_base, bias_stride_q, bias_stride_k, slope, offset, scaling, softcap,
        SOFTCAP, HAS_ALIBI, BIAS,
    )  # fmt: skip
    if (not SOFTCAP) and (not HAS_ALIBI) and (BIAS != ADDED):
        p = tl.exp2(s * (scaling * LOG2E) - lse)
    elif BIAS == ADDED:  # far from 0 scores are steps apart, and may fall to another than before
        p = tl.exp2(tl.minimum(s - peak, 0.0) - lse)
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
def base_2(lse):
    """Log-sum-exp in base 2; of a row that saw nothing +inf, so that its weights come out as 0."""
    return tl.where(lse == float("-inf"), float("inf"), lse) * LOG2E


@triton.jit
def load_lse(base, rows, ok):
    """In base 2, as :func:`base_2`; +inf where there is no row."""
    return base_2(tl.load(base + rows, mask=ok, other=float("inf")))


@triton.jit
def load_parts(base, apart, rows, ok):
    """The two parts of `Shape.lse_parts`; where there is no row as of one that saw nothing."""
    peak = tl.load(base + rows, mask=ok, other=0.0)
    return peak, tl.load(base + apart + rows, mask=ok, other=float("inf"))
