"""Attention of few queries over many keys: split-KV over a contiguous or paged cache.

All query heads of a KV head, and all new tokens, share the rows of one tile, so K and V are read once
per KV head ("GQA packed into M"). The keys are cut into splits that run side by side, and a second
kernel combines them (Flash-Decoding). Grid and number of splits depend on shapes only, never on the
lengths in device memory: nothing waits for the device and the launch can be captured in a CUDA graph.

Shape letters: B batch, Q queries, Hq / Hkv query / KV heads, G = Hq / Hkv, K keys of a row, D / DV
head_dim of q, k / v, S splits, BM / BN tile rows / keys. Scores and log-sum-exps are base 2 inside.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..problem import CacheProblem, Pattern, Problem
from .decode_config import DecodeConfig, choose_splits, config_for, tile_rows
from .decode_config import arch_of, processors

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_MAX_ROWS = 16  # Q * G up to which `decode_dense` beats the prefill kernel's 64-row tiles


@triton.jit
def _softcap_tanh(x):
    """tanh from exp2; a short series near 0, where 1 - exp2(...) would cancel."""
    e = tl.exp2(-2.8853900817779268 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-0.3333333333 + square * 0.1333333333))
    return tl.where(square < 0.0025, near, tl.where(x < 0, -far, far))


@triton.jit
def _decode_kernel(
    q, k, v, out, lse, partial,
    seqlens, block_table, batch_idx, leftpad, key_mask, sink_ends, alibi, s_aux,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh, table_sb, mask_sb, alibi_sb,
    q_len, k_len, rows, window_left, window_right, sink_tokens, scale_log2, softcap,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    PAGE_SIZE: tl.constexpr, SPLITS: tl.constexpr,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, VEC: tl.constexpr,
):  # fmt: skip
    """Grid (S * tiles of Q * G rows, Hkv, B). Strides of q, k, v come in units of VEC elements."""
    LOG2E: tl.constexpr = 1.4426950408889634
    split = tl.program_id(0) % SPLITS
    m0 = (tl.program_id(0) // SPLITS) * BM
    head_kv = tl.program_id(1)
    b = tl.program_id(2).to(tl.int64)

    m = m0 + tl.arange(0, BM)  # [BM] row = token * G + head of the group
    row_ok = m < q_len * G
    token = m // G
    head = head_kv * G + m % G
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)

    kv_len = k_len if seqlens is None else tl.load(seqlens + b)
    start = 0 if leftpad is None else tl.load(leftpad + b)
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
    first_tile = lo // BN
    tiles = tl.where(hi > lo, tl.cdiv(hi, BN) - first_tile, 0)
    sink_tiles = 0
    sink_first = 0
    sink_end = 0
    if HAS_SINKS:
        if sink_ends is None:
            sink_end = start + sink_tokens
        else:
            sink_end = tl.load(sink_ends + b)
        sink_end = tl.minimum(sink_end, hi)
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
    q_at = q + b * (q_sb * VEC) + token.to(tl.int64)[:, None] * (q_st * VEC)
    q_at += head[:, None] * (q_sh * VEC) + d[None, :]
    queries = tl.load(q_at, mask=row_ok[:, None] & (d[None, :] < D), other=0.0)
    if alibi is not None:
        slope = tl.load(alibi + b * alibi_sb + head, mask=row_ok, other=0.0) * LOG2E
    row = b if batch_idx is None else tl.load(batch_idx + b).to(tl.int64)
    k_base = k + head_kv.to(tl.int64) * (k_sh * VEC)
    v_base = v + head_kv.to(tl.int64) * (v_sh * VEC)
    if PAGE_SIZE == 0:
        k_base += row * (k_sb * VEC)
        v_base += row * (v_sb * VEC)

    top = tl.full([BM], float("-inf"), tl.float32)  # running maximum
    total = tl.zeros([BM], tl.float32)  # running sum of exp2(score - top)
    acc = tl.zeros([BM, BLOCK_DV], tl.float32)
    per_split = tl.cdiv(tiles + sink_tiles, SPLITS)
    begin = split * per_split
    end = tl.minimum(begin + per_split, tiles + sink_tiles)
    for step in tl.range(begin, end):
        tile = first_tile + step - sink_tiles
        if HAS_SINKS:
            tile = tl.where(step < sink_tiles, sink_first + step, tile)
        n0 = tile * BN
        n = n0 + tl.arange(0, BN)  # [BN] key positions
        # what no row sees is never read: it may be a freed page, or hold anything
        at = tl.minimum(tl.maximum(n, lo), hi - 1)
        if HAS_SINKS:
            at = tl.where(n < sink_end, tl.maximum(n, start), at)
        if PAGE_SIZE == 0:
            k_off = at.to(tl.int64) * (k_st * VEC)
            v_off = at.to(tl.int64) * (v_st * VEC)
        else:
            if PAGE_SIZE % BN == 0:
                page = tl.load(block_table + b * table_sb + n0 // PAGE_SIZE).to(tl.int64)
            else:
                page = tl.load(block_table + b * table_sb + at // PAGE_SIZE).to(tl.int64)
            k_off = page * (k_sb * VEC) + (at % PAGE_SIZE) * (k_st * VEC)
            v_off = page * (v_sb * VEC) + (at % PAGE_SIZE) * (v_st * VEC)

        # [BN, BLOCK_D]
        if BLOCK_D == D:
            keys = tl.load(k_base + k_off[:, None] + d[None, :])
        else:
            keys = tl.load(k_base + k_off[:, None] + d[None, :], mask=d[None, :] < D, other=0.0)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")  # [BM, BN]
        if HAS_SOFTCAP:
            scores = _softcap_tanh(scores * scale_log2) * (softcap * LOG2E)
        else:
            scores = scores * scale_log2
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
        acc = acc * fade[:, None]
        acc = tl.dot(weights.to(values.dtype), values, acc, input_precision="ieee")

    # [BM] row of the outputs [B, Q, Hq, DV]
    heads = tl.num_programs(1) * G
    o_row = (b * q_len + token) * heads + head
    if SPLITS == 1:
        if s_aux is not None:
            extra = tl.load(s_aux + head, mask=row_ok, other=0.0).to(tl.float32) * LOG2E
            higher = tl.maximum(top, extra)
            total = total * tl.exp2(top - higher) + tl.exp2(extra - higher)
            acc = acc * tl.exp2(top - higher)[:, None]
            top = higher
        store, lse_row = out, (b * heads + head) * q_len + token
        lse_scale = 0.6931471805599453
    # normalised here too, so that the reduce needs the log-sum-exp alone
    result = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    row_lse = tl.where(total == 0.0, float("-inf"), top + tl.log2(total))
    o_mask = row_ok[:, None] & (dv[None, :] < DV)
    if SPLITS == 1:
        tl.store(out + o_row[:, None] * DV + dv[None, :], result.to(out.dtype.element_ty), o_mask)
        lse_row = (b * heads + head) * q_len + token
        tl.store(lse + lse_row, row_lse * 0.6931471805599453, row_ok)
    else:
        # partial: [rows, S, DV] outputs, then [rows, S] log-sum-exps
        part = o_row * SPLITS + split
        tl.store(partial + part[:, None] * DV + dv[None, :], result, o_mask)
        lse_base = partial + (rows.to(tl.int64) * SPLITS) * DV
        tl.store(lse_base + part, row_lse, row_ok)
