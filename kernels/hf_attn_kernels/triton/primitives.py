"""Pieces that the forward and backward kernels share: addresses, visibility, scores, dropout.

Index tiles `i` (query, within its sequence) and `j` (key) are passed already broadcastable, so one
helper serves ``[BLOCK_M, BLOCK_N]`` tiles and their transpose alike. Offsets that multiply a stride
are int64: a long batch has more than 2**31 elements.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-(2.0**127))  # of an added bias that is finite
NO_BIAS = tl.constexpr(0)
ADDED = tl.constexpr(1)  # bias is added to the score
KEEP = tl.constexpr(2)  # bias is a mask, nonzero = keep


@triton.jit
def place(pid, blocks, together):
    """Block and head (of all rows' heads) of a program: `together` heads go block by block.

    With a causal mask the longest blocks of many heads come before the shortest of any, so that the
    last programs to start are short ones; but only of as many heads as the cache can serve.
    """
    first = pid // (blocks * together) * together
    side_by_side = tl.minimum(together, tl.num_programs(0) // blocks - first)
    rest = pid - first * blocks
    return rest // side_by_side, first + rest % side_by_side


@triton.jit
def sequence_bounds(b, CuQ, CuK, q_len, k_len, PACKED: tl.constexpr):
    """First query, query length, first key, key length of sequence b."""
    if PACKED:
        q_start = tl.load(CuQ + b)
        k_start = tl.load(CuK + b)
        q_len = tl.load(CuQ + b + 1) - q_start
        k_len = tl.load(CuK + b + 1) - k_start
    else:
        q_start = b * 0
        k_start = b * 0
    return q_start, q_len, k_start, k_len


@triton.jit
def kept_bounds(b, KeyLo, KeyHi, k_len, HAS_KEY_MASK: tl.constexpr):
    """Keys before the first and after the last kept one need no visit."""
    if HAS_KEY_MASK:
        lo = tl.load(KeyLo + b)
        hi = tl.minimum(tl.load(KeyHi + b), k_len)
    else:
        lo = b * 0
        hi = k_len
    return lo, hi


@triton.jit
def key_ranges(
    first_row, last_row, k_lo, k_hi, offset, left, right,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Key ranges of a tile of rows: ``[lo, a)`` and ``[b, hi)`` need a mask, ``[a, b)`` none.

    lo is a multiple of BLOCK_N; so are a and b unless they equal hi.
    """
    lo = k_lo
    hi = k_hi
    full_lo = k_lo
    full_hi = k_hi
    if HAS_LEFT:
        lo = tl.maximum(lo, first_row + offset - left)
        full_lo = tl.maximum(full_lo, last_row + offset - left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, last_row + offset + right + 1)
        full_hi = tl.minimum(full_hi, first_row + offset + right + 1)
    hi = tl.maximum(hi, 0)
    full_hi = tl.maximum(full_hi, 0)
    lo = tl.minimum(lo, hi) // BLOCK_N * BLOCK_N
    a = tl.minimum((full_lo + BLOCK_N - 1) // BLOCK_N * BLOCK_N, hi)
    b = tl.maximum(a, full_hi // BLOCK_N * BLOCK_N)
    return lo, a, b, hi


@triton.jit
def load_rows(
    base, first, stride, cols, row_ok, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    MASK_ROWS: tl.constexpr,
):  # fmt: skip
    """``[ROWS, BLOCK_D]`` tile of a row-major matrix from row `first`; what is outside reads as 0.

    The one 64-bit product is a scalar: offsets within a tile are small, and 32-bit ones cost half
    the registers. Where they are not small `stride` must be 64 bits wide, see :func:`far_apart`.
    """
    local = tl.arange(0, ROWS)[:, None] * stride + cols[None, :]
    ptrs = base + tl.cast(first, tl.int64) * stride + local
    if MASK_ROWS:
        if D == BLOCK_D:
            return tl.load(ptrs, mask=row_ok[:, None], other=0.0)
        return tl.load(ptrs, mask=row_ok[:, None] & (cols < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(cols < D)[None, :], other=0.0)


@triton.jit
def far_apart(stride, WIDE: tl.constexpr):
    """A stride of rows, 64 bits wide with WIDE: a tile of them may reach beyond 2**31 elements."""
    if WIDE:
        stride = tl.cast(stride, tl.int64)
    return stride


@triton.jit
def copy_rows(tiles, b, h, first, ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """The same tile by the copy engine, of a ``[B, H, S, D]`` descriptor; outside it reads as 0."""
    return tiles.load([b, h, first, 0]).reshape(ROWS, BLOCK_D)


@triton.jit
def visible(
    i, j, k_lo, k_hi, offset, left, right, sink_tokens,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SINK_TOKENS: tl.constexpr,
):  # fmt: skip
    """Which (query, key) pairs the window and the kept range allow."""
    ok = (j >= k_lo) & (j < k_hi)
    if HAS_LEFT:
        near = j >= i + offset - left
        if HAS_SINK_TOKENS:
            near = near | (j < k_lo + sink_tokens)
        ok = ok & near
    if HAS_RIGHT:
        ok = ok & (j <= i + offset + right)
    return ok


@triton.jit
def tanh(x):
    """From exp2, so that every target and the interpreter have it; to a few float32 roundings.

    Near 0 a polynomial of Moshier's Cephes library: 1 - exp2(...) would cancel there, and a softcap
    multiplies what is lost.
    """
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    z = x * x
    p = z * -5.70498872745e-3 + 2.06390887954e-2
    p = p * z - 5.37397155531e-2
    p = p * z + 1.33314422036e-1
    p = p * z - 3.33332819422e-1
    return tl.where(z < 0.390625, x + x * (z * p), tl.where(x < 0, -far, far))


@triton.jit
def score_tile(
    qk, i, j, in_bounds, bias_base, bias_stride_q, bias_stride_k, slope, offset, scaling, softcap,
    SOFTCAP: tl.constexpr, HAS_ALIBI: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Dot products -> base-2 scores, the tanh of the softcap, and the bias mask.

    Without softcap, ALiBi and added bias the scores are returned unscaled: the caller folds the
    scale into its exponent, one multiplication less for each element.
    """
    t = 0.0
    if SOFTCAP:
        t = tanh(qk * (scaling / softcap))
        s = t * (softcap * LOG2E)
    elif HAS_ALIBI or BIAS == ADDED:
        s = qk * (scaling * LOG2E)
    else:
        s = qk
    if HAS_ALIBI:
        s -= slope * LOG2E * tl.abs(i + offset - j).to(tl.float32)
    if BIAS != NO_BIAS:
        ptrs = bias_base + i.to(tl.int64) * bias_stride_q + j.to(tl.int64) * bias_stride_k
        value = tl.load(ptrs, mask=in_bounds, other=0)
        if BIAS == ADDED:
            # finfo.min hides by a number, and would be -inf in base 2. Chosen after the product, so
            # that no compiler fuses it with the sum: forward and backward must round alike
            wide = value.to(tl.float32)
            low = (wide < LOWEST) & (wide > float("-inf"))
            s += tl.where(low, LOWEST * LOG2E, tl.where(low, LOWEST, wide) * LOG2E)
        else:
            s = tl.where(value != 0, s, float("-inf"))
    return s, t


@triton.jit
def dropout_keep(seed, i, j, stream, threshold):
    """True where a weight is kept: a function of seed and position alone, whatever the tiling.

    Philox4x32-10 (Salmon et al. 2011) with counter (key, query, batch * heads + head, 0).
    """
    zero = i * 0 + j * 0
    word, _, _, _ = tl.philox(seed, j + zero, i + zero, stream + zero, zero)
    return word.to(tl.uint32, bitcast=True).to(tl.int64) >= threshold
