"""The forward on Hopper, in Gluon: one warpgroup's warp loads, two warpgroups compute, out of step.

After Shah et al., "FlashAttention-3" (2024). A block computes 2 x ROWS queries of one head. The
producer copies tiles of keys and values into a ring of STAGES by the copy engine (TMA). Each
consumer has ROWS queries; it starts the scores of the next tile and the values of this one, then
computes the next weights while the tensor cores work. The consumers take turns to start products,
so that one computes exponentials while the other multiplies.

Barriers: `full` is completed by the copy engine's bytes, `free` by both consumers, `turn` by the
other consumer. The phase that somebody waits for is counted from the tiles, so all three must go
over the same number of them, which is at least one: a tile that nobody sees is masked.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

LOG2E = gl.constexpr(1.4426950408889634)
# its name from Triton 3.9 on, and the one before
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared


@gluon.jit
def _produce(
    q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, b, h,
    kv_head, first_row, first_key, tiles,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    for half in gl.static_range(2):
        mbarrier.expect(q_full.index(half), q_desc.block_type.nbytes)
        at = [b, h, first_row + half * ROWS, 0]
        load_tile(q_desc, at, q_full.index(half), q_tile.index(half))
    for n in range(tiles):
        stage = n % STAGES
        before = (n // STAGES & 1) ^ 1  # of a stage never used before, a fresh barrier lets pass
        at = [b, kv_head, first_key + n * BLOCK_N, 0]
        mbarrier.wait(k_free.index(stage), before)
        mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes)
        load_tile(k_desc, at, k_full.index(stage), k_ring.index(stage))
        mbarrier.wait(v_free.index(stage), before)
        mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
        load_tile(v_desc, at, v_full.index(stage), v_ring.index(stage))


@gluon.jit
def _matrix(tile, BLOCK: gl.constexpr, D: gl.constexpr):
    """The copy engine's ``[1, 1, BLOCK, D]`` as the matrix that it is: the same bytes."""
    return tile.reshape([BLOCK, D])


@gluon.jit
def _weights(
    s, m, total, n0, rows, k_len, offset, left, right, all_from, all_to, scale,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, BLOCK_N: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Scores of the tile at `n0` to weights; the new peak and sum, and what the old ones are worth.

    Every row sees the keys ``[all_from, all_to)``: a tile inside needs no mask.
    """
    if (n0 < all_from) | (n0 + BLOCK_N > all_to):
        j = (n0 + gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT)))[None, :]
        i = rows[:, None] + offset
        seen = (j < k_len) & (j >= 0)
        if HAS_LEFT:
            seen = seen & (j >= i - left)
        if HAS_RIGHT:
            seen = seen & (j <= i + right)
        s = gl.where(seen, s, float("-inf"))
    m_new = gl.maximum(m, gl.max(s, 1) * scale)
    # a row that has seen nothing yet keeps m = -inf; exp2(-inf - -inf) would be NaN
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(s * scale - m_safe[:, None])
    alpha = gl.exp2(m - m_safe)
    return p, m_new, total * alpha + gl.sum(p, 1), alpha


@gluon.jit
def _consume(
    q_tile, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, turn, Out, Lse, SAux, b, h,
    heads_q, first_row, first_key, tiles, q_len, k_len, left, right, scaling,
    o_sb, lse_sb, lse_sh,
    HALF: gl.constexpr, HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_S_AUX: gl.constexpr,
    D: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    OTHER: gl.constexpr = 1 - HALF
    first_row = first_row + HALF * ROWS
    rows = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SCORES))
    offset = k_len - q_len
    all_from = 0
    all_to = k_len
    if HAS_LEFT:
        all_from = gl.maximum(all_from, first_row + ROWS - 1 + offset - left)
    if HAS_RIGHT:
        all_to = gl.minimum(all_to, first_row + offset + right + 1)
    scale = scaling * LOG2E

    m = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    total = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    if HAS_S_AUX:  # a logit with no value: it is where the online softmax starts
        m = total + gl.load(SAux + h).to(gl.float32) * LOG2E
        total = total + 1.0
    nothing = gl.full([ROWS, BLOCK_N], 0.0, gl.float32, SCORES)
    acc = gl.full([ROWS, D], 0.0, gl.float32, SUMS)

    mbarrier.wait(q_full.index(HALF), 0)
    q = _matrix(q_tile.index(HALF), ROWS, D)
    mbarrier.wait(turn.index(HALF), OTHER)
    mbarrier.wait(k_full.index(0), 0)
    k = _matrix(k_ring.index(0), BLOCK_N, D)
    s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
    mbarrier.arrive(turn.index(OTHER))
    s = warpgroup_mma_wait(0, deps=(s,))
    mbarrier.arrive(k_free.index(0))
    p, m, total, alpha = _weights(
        s, m, total, first_key, rows, k_len, offset, left, right, all_from, all_to, scale,
        HAS_LEFT, HAS_RIGHT, BLOCK_N, SCORES,
    )  # fmt: skip
    mbarrier.wait(v_full.index(0), 0)
    for n in range(1, tiles):
        p16 = gl.convert_layout(p.to(v_ring.dtype), WEIGHTS)
        stage = n % STAGES
        last = (n - 1) % STAGES
        lap = n // STAGES & 1
        mbarrier.wait(turn.index(HALF), (n & 1) ^ OTHER)
        mbarrier.wait(k_full.index(stage), lap)
        k = _matrix(k_ring.index(stage), BLOCK_N, D)
        s = warpgroup_mma(q, k.permute((1, 0)), nothing, use_acc=False, is_async=True)
        v = _matrix(v_ring.index(last), BLOCK_N, D)
        acc = warpgroup_mma(p16, v, acc, is_async=True)
        mbarrier.arrive(turn.index(OTHER))
        s = warpgroup_mma_wait(1, deps=(s,))
        mbarrier.arrive(k_free.index(stage))
        p, m, total, alpha = _weights(
            s, m, total, first_key + n * BLOCK_N, rows, k_len, offset, left, right, all_from,
            all_to, scale, HAS_LEFT, HAS_RIGHT, BLOCK_N, SCORES,
        )  # fmt: skip
        # Here, and not where the values are used: across a wait that is a loop of its own no
        # compiler moves the exponentials behind the end of the products.
        mbarrier.wait(v_full.index(stage), lap)
        acc, _ = warpgroup_mma_wait(0, deps=(acc, p16))
        mbarrier.arrive(v_free.index(last))
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, SUMS))[:, None]
    v = _matrix(v_ring.index((tiles - 1) % STAGES), BLOCK_N, D)
    p16 = gl.convert_layout(p.to(v_ring.dtype), WEIGHTS)
    acc = warpgroup_mma(p16, v, acc, is_async=True)
    acc, _ = warpgroup_mma_wait(0, deps=(acc, p16))

    total_safe = gl.where(total == 0.0, 1.0, total)
    lse = gl.where(total == 0.0, float("-inf"), m / LOG2E + gl.log(total_safe))
    acc = acc / gl.convert_layout(total_safe, gl.SliceLayout(1, SUMS))[:, None]
    b64 = gl.to_tensor(b).to(gl.int64)
    gl.store(
        Lse + b64 * lse_sb + gl.to_tensor(h).to(gl.int64) * lse_sh + rows, lse, mask=rows < q_len
    )
    own = first_row + gl.arange(0, ROWS, gl.SliceLayout(1, SUMS))
    cols = gl.arange(0, D, gl.SliceLayout(0, SUMS))
    base = Out + b64 * o_sb + h * D
    ptrs = base + own.to(gl.int64)[:, None] * (heads_q * D) + cols[None, :]
    gl.store(ptrs, acc.to(Out.dtype.element_ty), mask=(own < q_len)[:, None])


@gluon.jit
def hopper_forward_kernel(
    q_desc, k_desc, v_desc, Out, Lse, SAux, o_sb, lse_sb, lse_sh,
    blocks_m, heads_q, groups, q_len, k_len, left, right, scaling,
    HAS_LEFT: gl.constexpr, HAS_RIGHT: gl.constexpr, HAS_S_AUX: gl.constexpr, D: gl.constexpr,
    ROWS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Q, K and V ``[B, H, S, D]`` by descriptors of tiles ``[1, 1, ROWS | BLOCK_N, D]``; Out
    ``[B, Q, Hq, D]`` contiguous, Lse ``[B, Hq, Q]`` by strides. Four warps are launched: they are
    the first consumer."""
    pid = gl.program_id(0)
    block = pid % blocks_m
    if HAS_RIGHT:
        block = blocks_m - 1 - block  # the longest rows of a causal mask first
    b = pid // blocks_m // heads_q
    h = pid // blocks_m % heads_q
    first_row = block * (2 * ROWS)
    last_row = gl.minimum(first_row + 2 * ROWS, q_len) - 1
    offset = k_len - q_len
    lo = 0
    hi = k_len
    if HAS_LEFT:
        lo = gl.maximum(lo, first_row + offset - left)
    if HAS_RIGHT:
        hi = gl.minimum(hi, last_row + offset + right + 1)
    lo = gl.minimum(lo, gl.maximum(hi - 1, 0)) // BLOCK_N * BLOCK_N
    tiles = gl.maximum(gl.cdiv(hi - lo, BLOCK_N), 1)

    DTYPE: gl.constexpr = q_desc.dtype
    q_tile = gl.allocate_shared_memory(DTYPE, [2, 1, 1, ROWS, D], q_desc.layout)
    k_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], k_desc.layout)
    v_ring = gl.allocate_shared_memory(DTYPE, [STAGES, 1, 1, BLOCK_N, D], v_desc.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(q_full.index(i), count=1)
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
        mbarrier.init(v_full.index(i), count=1)
        mbarrier.init(k_free.index(i), count=2)
        mbarrier.init(v_free.index(i), count=2)

    # written out: a tuple that gets a name loses its constants
    gl.warp_specialize(
        [
            (_consume, (
                q_tile, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, turn, Out, Lse,
                SAux, b, h, heads_q, first_row, lo, tiles, q_len, k_len, left, right, scaling,
                o_sb, lse_sb, lse_sh, 0, HAS_LEFT, HAS_RIGHT, HAS_S_AUX, D, ROWS, BLOCK_N, STAGES,
            )),
            (_consume, (
                q_tile, k_ring, v_ring, q_full, k_full, v_full, k_free, v_free, turn, Out, Lse,
                SAux, b, h, heads_q, first_row, lo, tiles, q_len, k_len, left, right, scaling,
                o_sb, lse_sb, lse_sh, 1, HAS_LEFT, HAS_RIGHT, HAS_S_AUX, D, ROWS, BLOCK_N, STAGES,
            )),
            (_produce, (
                q_desc, k_desc, v_desc, q_tile, k_ring, v_ring, q_full, k_full, v_full, k_free,
                v_free, b, h, h // groups, first_row, lo, tiles, ROWS, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [240, 24],
    )  # fmt: skip
