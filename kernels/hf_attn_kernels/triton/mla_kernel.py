"""The absorbed MLA decode kernel: one split of a row's latents against a tile of heads and queries.

Shape letters as in :mod:`..mla`; S splits, BM / BN tile rows / keys. Scores and log-sum-exps are
base 2 inside. A tile of latents is loaded once and serves as keys and as values.
"""

import triton
import triton.language as tl

from .decode_kernel import LN2, RECORD_TAIL, misses_page, widened, within


@triton.jit
def key_rows(
    base, k_off, columns, N: tl.constexpr, BLOCK: tl.constexpr, kept, MASKED: tl.constexpr
):  # fmt: skip
    """``[BN, BLOCK]`` tile; columns from N on are 0, and with MASKED keys that are not kept."""
    at = base + k_off[:, None] + columns[None, :]
    if MASKED:
        return tl.load(at, mask=kept[:, None] & (columns[None, :] < N), other=0.0)
    if BLOCK == N:
        return tl.load(at)
    return tl.load(at, mask=columns[None, :] < N, other=0.0)


@triton.jit(do_not_specialize=["q_len", "k_len", "room", "pages", "window_left", "window_right"])
def mla_kernel(
    q_latent, q_rope, latent, k_rope, out, lse, partial,
    seqlens, block_table, leftpad, key_mask, latent_descale, rope_descale,
    ql_sb, ql_st, ql_sh, qr_sb, qr_st, qr_sh, l_sb, l_st, r_sb, r_st, table_sb, mask_sb,
    q_len, k_len, room, pages, window_left, window_right, scale,
    H: tl.constexpr, R: tl.constexpr, P: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Grid (S * tiles of Q * H rows * B).

    Rows have `q_len` queries and the keys in `seqlens`, without it `k_len`. `room` is what a row of
    the cache holds, `pages` its pages: neither is left, whatever lengths and table say. `scale`
    turns a dot product into a base-2 score.
    """
    split = tl.program_id(0) % SPLITS
    tile_m = tl.program_id(0) // SPLITS
    tiles_m = tl.cdiv(q_len * H, BM)
    b = (tile_m // tiles_m).to(tl.int64)
    m0 = tile_m % tiles_m * BM
    kv_len = k_len if seqlens is None else tl.load(seqlens + b)
    kv_len = tl.minimum(kv_len, room)
    start = 0 if leftpad is None else tl.maximum(tl.load(leftpad + b), 0)

    m = m0 + tl.arange(0, BM)  # [BM] row = token * H + head
    row_ok = m < q_len * H
    token = m // H
    head = m % H
    r = tl.arange(0, BLOCK_R)
    p = tl.arange(0, BLOCK_P)

    diagonal = kv_len - q_len  # token i sits at key position i + diagonal
    first_token = m0 // H
    last_token = tl.minimum((m0 + BM - 1) // H, q_len - 1)
    # keys [lo, hi) that some row of this tile sees, and [all_lo, all_hi) that every row sees
    lo = start
    hi = kv_len
    all_lo = start
    all_hi = kv_len
    if HAS_LEFT:
        lo = tl.maximum(lo, first_token + diagonal - window_left)
        all_lo = tl.maximum(all_lo, last_token + diagonal - window_left)
    if HAS_RIGHT:
        hi = tl.minimum(hi, last_token + diagonal + window_right + 1)
        all_hi = tl.minimum(all_hi, first_token + diagonal + window_right + 1)
    first_tile = lo // BN
    tiles = tl.where(hi > lo, tl.cdiv(hi, BN) - first_tile, 0)
    per_split = tl.cdiv(tiles, SPLITS)
    begin = first_tile + split * per_split
    end = first_tile + tl.minimum((split + 1) * per_split, tiles)

    # [BM, BLOCK_R] and [BM, BLOCK_P]
    q_row = b * ql_sb + token.to(tl.int64) * ql_st + head.to(tl.int64) * ql_sh
    ql = tl.load(
        q_latent + q_row[:, None] + r[None, :], mask=row_ok[:, None] & (r[None, :] < R), other=0.0
    )
    q_row = b * qr_sb + token.to(tl.int64) * qr_st + head.to(tl.int64) * qr_sh
    qr = tl.load(
        q_rope + q_row[:, None] + p[None, :], mask=row_ok[:, None] & (p[None, :] < P), other=0.0
    )
    latent_scale = 1.0
    rope_scale = 1.0
    if latent_descale is not None:
        latent_scale = tl.load(latent_descale)
    if rope_descale is not None:
        rope_scale = tl.load(rope_descale)

    top = tl.full([BM], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([BM], tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([BM, BLOCK_R], tl.float32)
    # The next tile's page numbers travel with the loop: loaded where they are used they would take
    # the pipeline's stages from the latents.
    table = block_table + b * table_sb if PAGE_SIZE > 0 else block_table
    if PAGE_SIZE > 0:
        n = begin * BN + tl.arange(0, BN)
        at = tl.minimum(tl.maximum(n, lo), hi - 1)
        numbers = tl.load(table + at // PAGE_SIZE, mask=(n * 0 + begin) < end, other=0)
    for tile in tl.range(begin, end):
        n = tile * BN + tl.arange(0, BN)
        at = tl.minimum(tl.maximum(n, lo), hi - 1)  # what no row sees is never read
        if PAGE_SIZE == 0:
            l_off = b * l_sb + at.to(tl.int64) * l_st
            r_off = b * r_sb + at.to(tl.int64) * r_st
        else:
            page = within(numbers, pages)
            place = (at % PAGE_SIZE).to(tl.int64)
            l_off = page * l_sb + place * l_st
            r_off = page * r_sb + place * r_st
            next_n = tl.minimum(tile + 1, end - 1) * BN + tl.arange(0, BN)
            numbers = tl.load(table + tl.minimum(tl.maximum(next_n, lo), hi - 1) // PAGE_SIZE)
        kept = at >= 0  # [BN]
        if key_mask is not None:
            kept = tl.load(key_mask + b * mask_sb + at) != 0
        keys = key_rows(latent, l_off, r, R, BLOCK_R, kept, key_mask is not None)
        ropes = key_rows(k_rope, r_off, p, P, BLOCK_P, kept, key_mask is not None)
        if FLOAT8:
            keys = widened(keys, ql.dtype)
            ropes = widened(ropes, ql.dtype)
        # [BM, BN]
        if latent_descale is not None or rope_descale is not None:
            scores = tl.dot(ql, tl.trans(keys), input_precision="ieee") * latent_scale
            scores += tl.dot(qr, tl.trans(ropes), input_precision="ieee") * rope_scale
        else:
            scores = tl.dot(qr, tl.trans(ropes), input_precision="ieee")
            scores = tl.dot(ql, tl.trans(keys), scores, input_precision="ieee")
        scores = scores * scale
        if key_mask is not None:
            scores = tl.where(kept[None, :], scores, float("-inf"))
        if (tile * BN < all_lo) | (tile * BN + BN > all_hi):
            position = token[:, None] + diagonal
            seen = (n[None, :] >= start) & (n[None, :] < kv_len)
            if HAS_LEFT:
                seen = seen & (n[None, :] >= position - window_left)
            if HAS_RIGHT:
                seen = seen & (n[None, :] <= position + window_right)
            scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(higher == float("-inf"), 0.0, higher)  # rows that saw nothing so far
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        top = higher
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(keys.dtype), keys, acc, input_precision="ieee")

    if PAGE_SIZE > 0:
        row_lo = start + token * 0
        row_hi = kv_len + token * 0
        if HAS_LEFT:
            row_lo = tl.maximum(row_lo, token + diagonal - window_left)
        if HAS_RIGHT:
            row_hi = tl.minimum(row_hi, token + diagonal + window_right + 1)
        misses = misses_page(table, lo, hi, row_lo, row_hi, split, SPLITS, PAGE_SIZE)
        total = tl.where(misses > 0, float("nan"), total)  # no number is the answer
    # normalised here too, so that combining splits needs the log-sum-exp alone
    some = tl.where(total == 0.0, 1.0, total)
    result = acc * (latent_scale / some)[:, None]
    row_lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(some))
    # row m of a batch row is row m of its part of [B, Q, H, R]; offsets in a tile need no 64 bits
    first = b * q_len * H + m0
    local = tl.arange(0, BM)[:, None]
    o_mask = row_ok[:, None] & (r[None, :] < R)
    if SPLITS == 1:
        tl.store(out + first * R + local * R + r[None, :], result.to(out.dtype.element_ty), o_mask)
        tl.store(lse + (b * H + head) * q_len + token, row_lse * LN2, row_ok)
    else:
        RECORD: tl.constexpr = R + RECORD_TAIL
        record = partial + (first * SPLITS + split) * RECORD
        tl.store(record + local * (SPLITS * RECORD) + r[None, :], result, o_mask)
        tl.store(record + R + tl.arange(0, BM) * (SPLITS * RECORD), row_lse, row_ok)
