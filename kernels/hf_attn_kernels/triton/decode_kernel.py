"""The decode kernels: one split of the keys of one KV head, and the combination of the splits.

Shape letters: B batch, Q queries, Hq / Hkv query / KV heads, G = Hq / Hkv, D / DV head_dim of q, k
/ v, S splits, BM / BN tile rows / keys. Scores and log-sum-exps are base 2 inside.
"""

import triton
import triton.language as tl

from .primitives import LOG2E, tanh

LN2 = tl.constexpr(0.6931471805599453)
# a split's result is one record [DV outputs, log-sum-exp, padding to 16 bytes] of float32
RECORD_TAIL = tl.constexpr(4)
PAGES_AT_ONCE = tl.constexpr(32)  # page numbers that `misses_page` reads together: a warp's


@triton.jit
def widened(stored, to: tl.constexpr):
    """float8_e4m3fn numbers, or their bytes, in dtype `to`; exact, subnormals and NaN too.

    Bytes where the chip has no instruction for this format. Its exponent and mantissa stand at
    the upper end of float32's but for four bits more of exponent: a factor of 2**120.
    """
    if stored.dtype == tl.float8e4nv:
        return stored.to(to)
    bits = stored.to(tl.int8, bitcast=True).to(tl.int32) << 20  # the sign comes 4 times
    x = (bits & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(tl.abs(x) > 448.0, float("nan"), x).to(to)


@triton.jit
def within(number, count):
    """Page numbers as int64, moved into the pool where a table says otherwise.

    A query beside those that see a missing page weighs what it hides of page 0 with 0, as of any
    page: that page must hold finite numbers, or this query is NaN too.
    """
    return tl.minimum(tl.maximum(number, 0), count - 1).to(tl.int64)


@triton.jit
def misses_page(
    table, first, last, row_first, row_last, split, SPLITS: tl.constexpr, PAGE_SIZE: tl.constexpr
):  # fmt: skip
    """``[BM]`` int32, 1 for rows that see a key without a page in this split's share of the pages.

    The tile's rows see keys in [first, last), each row those of [row_first, row_last) ``[BM]``. A
    second look at the table, outside the loop over keys: in it numbers and windows would have to
    be kept in registers. Only where a number is negative is it seen by which rows.
    """
    first_page = first // PAGE_SIZE
    pages = tl.where(last > first, tl.cdiv(last, PAGE_SIZE) - first_page, 0)
    share = tl.cdiv(pages, SPLITS)
    begin = first_page + split * share
    end = first_page + tl.minimum((split + 1) * share, pages)
    offset = tl.arange(0, PAGES_AT_ONCE)
    lowest = offset * 0
    for at in tl.range(begin, end, PAGES_AT_ONCE):
        page = at + offset
        lowest = tl.minimum(lowest, tl.load(table + page, mask=page < end, other=0))
    misses = row_first * 0
    if tl.min(lowest, 0) < 0:
        for at in tl.range(begin, end, PAGES_AT_ONCE):
            page = at + offset
            missing = tl.load(table + page, mask=page < end, other=0) < 0
            key = page[None, :] * PAGE_SIZE
            seen_first = tl.maximum(key, row_first[:, None])
            seen = seen_first < tl.minimum(key + PAGE_SIZE, row_last[:, None])
            misses = tl.maximum(misses, tl.max((seen & missing[None, :]).to(tl.int32), 1))
    return misses


@triton.jit
def tile_keys(
    step, first_tile, sink_tiles, sink_first, start, sink_end, lo, hi,
    HAS_SINKS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """First key of the step-th tile, its key positions ``[BN]``, and these moved to visible keys.

    What no row sees is never read: it may be a freed page, or hold anything.
    """
    tile = first_tile + step - sink_tiles
    if HAS_SINKS:
        tile = tl.where(step < sink_tiles, sink_first + step, tile)
    n = tile * BN + tl.arange(0, BN)
    at = tl.minimum(tl.maximum(n, lo), hi - 1)
    if HAS_SINKS:
        at = tl.where(n < sink_end, tl.maximum(n, start), at)
    return tile * BN, n, at


@triton.jit(
    do_not_specialize=["tiles_m", "q_len", "k_len", "room", "pages", "window_left",
                       "window_right", "sink_tokens"]
)  # fmt: skip
def decode_kernel(
    q, k, v, out, lse, partial,
    seqlens, cu_q, block_table, batch_idx, leftpad, key_mask, alibi, s_aux, k_descale, v_descale,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, table_sb, mask_sb, alibi_sb,
    kd_sb, vd_sb,
    tiles_m, q_len, k_len, room, pages, window_left, window_right, sink_tokens, scale, softcap,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, FLOAT8: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Grid (S * tiles_m * Hkv * B), `tiles_m` tiles of a row's Q * G rows.

    A batch has `q_len` queries a row and, in `seqlens`, its keys beside `k_len` new ones; without
    `seqlens` `k_len` keys. With `cu_q` rows are packed: `cu_q` and `seqlens` are offsets
    ``[B + 1]`` and `q_len` is the tokens of all. `room` is what a row of the cache holds, `pages`
    its pages (or rows): neither is left, whatever the lengths and the table say.

    Strides of q, k and v come in units of VEC elements, so that the compiler knows the alignment of
    a row also where it is no multiple of 16. `scale` turns a dot product into a base-2 score, or
    with HAS_SOFTCAP into the argument of the tanh.
    """
    split = tl.program_id(0) % SPLITS
    tile_m = tl.program_id(0) // SPLITS
    head_kv = tile_m // tiles_m % HKV
    b = (tile_m // tiles_m // HKV).to(tl.int64)
    m0 = tile_m % tiles_m * BM
    heads: tl.constexpr = HKV * G

    # first query in q, first row of out, first of lse and how far its heads are apart
    q_first = b * 0
    o_first = b * q_len
    lse_first = b * heads * q_len
    lse_sh = q_len
    if cu_q is not None:
        q_first = tl.load(cu_q + b).to(tl.int64)
        o_first = q_first
        lse_first = q_first
        q_len = tl.load(cu_q + b + 1) - q_first.to(tl.int32)
        kv_len = tl.load(seqlens + b + 1) - tl.load(seqlens + b)
    elif seqlens is not None:
        kv_len = tl.load(seqlens + b) + k_len
    else:
        kv_len = k_len
    kv_len = tl.minimum(kv_len, room)

    m = m0 + tl.arange(0, BM)  # [BM] row = token * G + head of the group
    row_ok = m < q_len * G
    token = m // G
    head = head_kv * G + m % G
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    start = 0 if leftpad is None else tl.maximum(tl.load(leftpad + b), 0)
    diagonal = kv_len - q_len  # token i sits at key position i + diagonal
    first_token = m0 // G
    last_token = tl.minimum((m0 + BM - 1) // G, q_len - 1)

    # keys [lo, hi) some row of this tile sees through its window, and [start, sink_end) as sinks
    lo = start
    hi = kv_len
    if HAS_LEFT:
        lo = tl.maximum(lo, first_token + diagonal - window_left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, last_token + diagonal + window_right + 1)
    hi = tl.where(first_token < q_len, hi, lo)  # a tile behind a short row's queries
    first_tile = lo // BN
    tiles = tl.where(hi > lo, tl.cdiv(hi, BN) - first_tile, 0)
    sink_tiles = 0
    sink_first = 0
    sink_end = 0
    if HAS_SINKS:
        sink_end = tl.minimum(start + sink_tokens, hi)
        sink_first = start // BN
        sink_tiles = tl.minimum(tl.cdiv(sink_end, BN), first_tile) - sink_first
        sink_tiles = tl.where(hi > lo, tl.maximum(sink_tiles, 0), 0)
    # keys that every row sees: such tiles need no mask
    all_lo = start
    all_hi = kv_len
    if HAS_LEFT:
        all_lo = tl.maximum(all_lo, last_token + diagonal - window_left)
    if HAS_RIGHT:
        all_hi = tl.minimum(all_hi, first_token + diagonal + window_right + 1)

    # [BM, BLOCK_D]
    q_at = q + b * q_sb * VEC + (q_first + token)[:, None] * q_st * VEC
    q_at += head.to(tl.int64)[:, None] * q_sh * VEC + d[None, :]
    queries = tl.load(q_at, mask=row_ok[:, None] & (d[None, :] < D), other=0.0)
    if alibi is not None:
        slope = tl.load(alibi + b * alibi_sb + head, mask=row_ok, other=0.0) * LOG2E
    if k_descale is not None:
        scale *= tl.load(k_descale + b * kd_sb + head_kv)
    row = b if batch_idx is None else within(tl.load(batch_idx + b), pages)
    k_base = k + head_kv.to(tl.int64) * k_sh * VEC
    v_base = v + head_kv.to(tl.int64) * v_sh * VEC
    if PAGE_SIZE == 0:
        k_base += row * k_sb * VEC
        v_base += row * v_sb * VEC

    top = tl.full([BM], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([BM], tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    per_split = tl.cdiv(tiles + sink_tiles, SPLITS)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tiles + sink_tiles)
    # The next tile's page numbers travel with the loop. Loaded where they are used they would take
    # the pipeline's stages, and leave K and V none to be loaded ahead in.
    table = block_table + b * table_sb if PAGE_SIZE > 0 else block_table
    if PAGE_SIZE > 0:
        n0, _, at = tile_keys(
            begin, first_tile, sink_tiles, sink_first, start, sink_end, lo, hi, HAS_SINKS, BN
        )
        # tiles start at multiples of BN: one of these lies in one page
        where = n0 if PAGE_SIZE % BN == 0 else at
        numbers = tl.load(table + where // PAGE_SIZE, mask=begin < end, other=0)
    for step in tl.range(begin, end):
        n0, n, at = tile_keys(
            step, first_tile, sink_tiles, sink_first, start, sink_end, lo, hi, HAS_SINKS, BN
        )
        if PAGE_SIZE == 0:
            k_off = at.to(tl.int64) * k_st * VEC
            v_off = at.to(tl.int64) * v_st * VEC
        else:
            page = within(numbers, pages)
            k_off = page * k_sb * VEC + (at % PAGE_SIZE).to(tl.int64) * k_st * VEC
            v_off = page * v_sb * VEC + (at % PAGE_SIZE).to(tl.int64) * v_st * VEC
            next_n0, _, next_at = tile_keys(
                tl.minimum(step + 1, end - 1), first_tile, sink_tiles, sink_first, start, sink_end,
                lo, hi, HAS_SINKS, BN,
            )  # fmt: skip
            next_where = next_n0 if PAGE_SIZE % BN == 0 else next_at
            numbers = tl.load(table + next_where // PAGE_SIZE)

        # [BN, BLOCK_D]
        if BLOCK_D == D:
            keys = tl.load(k_base + k_off[:, None] + d[None, :])
        else:
            keys = tl.load(k_base + k_off[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)
        if FLOAT8:
            keys = widened(keys, queries.dtype)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [BM, BN]
        scores = scores * scale
        if HAS_SOFTCAP:
            scores = tanh(scores) * (softcap * LOG2E)
        if alibi is not None:
            distance = tl.abs(token[:, None] + diagonal - n[None, :])
            scores -= slope[:, None] * distance.to(tl.float32)
        if key_mask is not None:
            kept = tl.load(key_mask + b * mask_sb + at) != 0  # [BN]
            scores = tl.where(kept[None, :], scores, float("-inf"))
        if (n0 < all_lo) | (n0 + BN > all_hi):
            position = token + diagonal
            seen = (n[None, :] >= start) & (n[None, :] < kv_len)
            if HAS_LEFT:
                in_window = n[None, :] >= position[:, None] - window_left
                if HAS_SINKS:
                    in_window = in_window | (n[None, :] < sink_end)
                seen = seen & in_window
            if HAS_RIGHT:
                seen = seen & (n[None, :] <= position[:, None] + window_right)
            scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # rows that saw nothing so far
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        top = higher

        # [BN, BLOCK_DV]
        v_at = v_base + v_off[:, None] + dv[None, :]
        if key_mask is not None:  # 0 * NaN is NaN: what is masked away must not be read
            values = tl.load(v_at, mask=kept[:, None] & (dv[None, :] < DV), other=0.0)
        elif BLOCK_DV == DV:
            values = tl.load(v_at)
        else:
            values = tl.load(v_at, mask=dv[None, :] < DV, other=0.0)
        if FLOAT8:
            values = widened(values, queries.dtype)
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")

    if PAGE_SIZE > 0:
        row_lo = start + token * 0
        row_hi = kv_len + token * 0
        if HAS_RIGHT:
            row_hi = tl.minimum(row_hi, token + diagonal + window_right + 1)
        if HAS_SINKS:
            sinks_hi = tl.minimum(row_hi, sink_end)
            misses = misses_page(table, start, sink_end, row_lo, sinks_hi, split, SPLITS, PAGE_SIZE)
            total = tl.where(misses > 0, float("nan"), total)
        if HAS_LEFT:
            row_lo = tl.maximum(row_lo, token + diagonal - window_left)
        misses = misses_page(table, lo, hi, row_lo, row_hi, split, SPLITS, PAGE_SIZE)
        total = tl.where(misses > 0, float("nan"), total)  # no number is the answer
    if v_descale is not None:
        acc *= tl.load(v_descale + b * vd_sb + head_kv)
    # [BM] row of the outputs [B, Q, Hq, DV] or [T, Hq, DV]
    o_row = (o_first + token) * heads + head
    if SPLITS == 1 and s_aux is not None:
        extra = tl.load(s_aux + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
        higher = tl.maximum(top, extra)
        total = total * tl.exp2(top - higher) + tl.exp2(extra - higher)
        acc = acc * tl.exp2(top - higher)[:, None]
        top = higher
    # normalised here too, so that the reduce needs the log-sum-exp alone
    some = tl.where(total == 0.0, 1.0, total)
    result = acc / some[:, None]
    row_lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(some))
    o_mask = row_ok[:, None] & (dv[None, :] < DV)
    if SPLITS == 1:
        tl.store(out + o_row[:, None] * DV + dv[None, :], result.to(out.dtype.element_ty), o_mask)
        lse_row = lse_first + head.to(tl.int64) * lse_sh + token
        tl.store(lse + lse_row, row_lse * LN2, row_ok)
    else:
        record = partial + (o_row * SPLITS + split) * (DV + RECORD_TAIL)
        tl.store(record[:, None] + dv[None, :], result, o_mask)
        tl.store(record + DV, row_lse, row_ok)


@triton.jit
def reduce_kernel(
    partial, s_aux, out, lse, cu_q, q_len, heads, rows,
    DV: tl.constexpr, SPLITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (rows of [B, Q, Hq] or [T, Hq], DV / BLOCK_C): combine the splits and the extra logit.

    With `cu_q` ``[rows + 1]`` tokens are packed; those behind the last sequence stay as they are.
    """
    row = tl.program_id(0).to(tl.int64)
    some_row = True if cu_q is None else row // heads < tl.load(cu_q + rows)
    column = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    s = tl.arange(0, BLOCK_S)
    head = row % heads
    record = partial + (row * SPLITS + s) * (DV + RECORD_TAIL)  # [BLOCK_S]
    split_lse = tl.load(record + DV, mask=(s < SPLITS) & some_row, other=float("-inf"))
    top = tl.max(split_lse, 0)
    if s_aux is not None:
        extra = tl.load(s_aux + head).to(tl.float32) * LOG2E
        top = tl.maximum(top, extra)
    shift = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(split_lse - shift)
    total = tl.sum(weights, 0)
    if s_aux is not None:
        total += tl.exp2(extra - shift)
    # [BLOCK_S, BLOCK_C]; a split that saw nothing weighs 0 and may not add 0 * NaN
    wanted = (split_lse > float("-inf"))[:, None] & (column[None, :] < DV)
    pieces = tl.load(record[:, None] + column[None, :], mask=wanted, other=0.0)
    some = tl.where(total == 0.0, 1.0, total)
    result = tl.sum(pieces * weights[:, None], 0) / some
    tl.store(
        out + row * DV + column, result.to(out.dtype.element_ty), mask=(column < DV) & some_row
    )
    if tl.program_id(1) == 0:
        b = row // heads // q_len
        token = row // heads % q_len
        row_lse = tl.where(total == 0.0, float("-inf"), shift + tl.log2(some))
        tl.store(lse + (b * heads + head) * q_len + token, row_lse * LN2, some_row)
