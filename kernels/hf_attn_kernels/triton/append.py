"""One kernel before a cache call: rotate q and the new keys, write keys and values in place.

The same as :mod:`..append` in torch's operators. Nothing waits for the device: where a row's keys
go is read by the kernel, and what would lie beyond the cache or its pages is not written.

Shape letters as in :mod:`.decode`; N new keys of each row, R half of the rotated columns.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..fp8 import E4M3_MAX, is_float8
from ..problem import NewKeys
from .decode_config import padded
from .decode_launch import Cache, row_stride, stored_bits
from .launch import Launch

LARGEST = tl.constexpr(E4M3_MAX)
MAX_TOKENS = 16  # of a program


@triton.jit
def quantised(x, descale, at):
    """What to store of x in float8_e4m3fn, as bytes: nearest even, saturating, NaN kept.

    The rule of `..fp8.quantise`, by bits: not every chip has an instruction for this format.
    """
    x = x.to(tl.float32)
    if descale is not None:
        x = tl.math.div_rn(x, tl.load(descale + at))
    bits = x.to(tl.uint32, bitcast=True)
    size = tl.minimum(tl.abs(x), LARGEST)
    sized = size.to(tl.uint32, bitcast=True)
    # exponents from -6 on: drop 20 of 23 bits of the mantissa, rounding; the bias falls by 120
    normal = ((sized + 0x7FFFF + ((sized >> 20) & 1)) >> 20) - (120 << 3)
    # below, steps of 2**-9: adding 2**14 leaves their number in the mantissa, rounded
    small = (size + 16384.0).to(tl.uint32, bitcast=True) & 0xF
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x != x, 0x7F, code)
    return (code | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def turned(x_row, d, at, cos, sin, ok, R: tl.constexpr, D: tl.constexpr, PAIRS: tl.constexpr):
    """Columns ``[N, BLOCK_D]`` of rows `x_row` ``[N]``, the first 2 * R rotated to position `at`.

    With PAIRS column 2i turns with 2i + 1, else i with R + i.
    """
    mask = ok[:, None] & (d[None, :] < D)
    x = tl.load(x_row[:, None] + d[None, :], mask=mask, other=0.0)
    if R > 0:
        if PAIRS:
            partner = d ^ 1
            angle = d // 2
            first = d % 2 == 0
        else:
            partner = tl.where(d < R, d + R, d - R)
            angle = tl.where(d < R, d, d - R)
            first = d < R
        mask = ok[:, None] & (d[None, :] < 2 * R)
        other = tl.load(x_row[:, None] + partner[None, :], mask=mask, other=0.0).to(tl.float32)
        where = at.to(tl.int64)[:, None] * R + angle[None, :]
        c = tl.load(cos + where, mask=mask, other=1.0).to(tl.float32)
        s = tl.load(sin + where, mask=mask, other=0.0).to(tl.float32)
        y = x.to(tl.float32) * c + tl.where(first[None, :], -other, other) * s
        x = tl.where(d[None, :] < 2 * R, y.to(x.dtype), x)
    return x


@triton.jit(do_not_specialize=["q_len", "new", "room", "pages", "positions"])
def append_kernel(
    q, k, v, turned_q, k_cache, v_cache, seqlens, block_table, batch_idx, k_descale, v_descale,
    cos, sin,
    q_sb, q_st, q_sh, k_sb, k_st, k_sh, v_sb, v_st, v_sh,
    kc_sb, kc_st, kc_sh, vc_sb, vc_st, vc_sh, table_sb, kd_sb, vd_sb,
    q_len, new, room, pages, positions,
    HQ: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, R: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, TOKENS: tl.constexpr, PAGE_SIZE: tl.constexpr,
    PAIRS: tl.constexpr, ORDERED: tl.constexpr, FLOAT8: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of tokens * (Hkv keys + Hkv values + Hq queries where they turn) * B)."""
    PARTS: tl.constexpr = 2 * HKV + (HQ if R > 0 else 0)
    tiles = tl.cdiv(tl.maximum(new, q_len) if R > 0 else new, TOKENS)
    t = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)  # [TOKENS]
    part = tl.program_id(0) // tiles % PARTS
    head = (part % HKV).to(tl.int64)
    b = (tl.program_id(0) // tiles // PARTS).to(tl.int64)
    held = tl.load(seqlens + b)
    at = held + t  # [TOKENS] position in the row
    ok = (t < new) & (at >= 0) & (at < room) & (part < 2 * HKV)
    if PAGE_SIZE > 0:
        page = tl.load(block_table + b * table_sb + at // PAGE_SIZE, mask=ok, other=-1)
        slot = (at % PAGE_SIZE).to(tl.int64)
    else:
        page = t * 0 + (b.to(tl.int32) if batch_idx is None else tl.load(batch_idx + b))
        slot = at.to(tl.int64)
    ok = ok & (page >= 0) & (page < pages)
    page = page.to(tl.int64)
    if part < HKV:
        dk = tl.arange(0, BLOCK_D)
        k_row = k + b * k_sb + t.to(tl.int64) * k_st + head * k_sh
        keys = turned(k_row, dk, at, cos, sin, ok, R, D, PAIRS)
        if FLOAT8:
            keys = quantised(keys, k_descale, b * kd_sb + head)
        k_to = k_cache + page * kc_sb + slot * kc_st + head * kc_sh
        tl.store(k_to[:, None] + dk[None, :], keys, ok[:, None] & (dk[None, :] < D))
    elif part < 2 * HKV:
        dv = tl.arange(0, BLOCK_DV)
        v_row = v + b * v_sb + t.to(tl.int64) * v_st + head * v_sh
        values = turned(v_row, dv, at, cos, sin, ok, 0, DV, PAIRS)
        if FLOAT8:
            values = quantised(values, v_descale, b * vd_sb + head)
        v_to = v_cache + page * vc_sb + slot * vc_st + head * vc_sh
        tl.store(v_to[:, None] + dv[None, :], values, ok[:, None] & (dv[None, :] < DV))
    elif R > 0:
        dq = tl.arange(0, BLOCK_D)
        head_q = (part - 2 * HKV).to(tl.int64)
        q_ok = t < q_len
        q_at = tl.minimum(tl.maximum(at if ORDERED else held + t * 0, 0), positions - 1)
        q_row = q + b * q_sb + t.to(tl.int64) * q_st + head_q * q_sh
        queries = turned(q_row, dq, q_at, cos, sin, q_ok, R, D, PAIRS)
        q_to = turned_q + ((b * q_len + t) * HQ + head_q) * D
        tl.store(q_to[:, None] + dq[None, :], queries, q_ok[:, None] & (dq[None, :] < D))


def _strides(name: str, x: Tensor) -> dict[str, int]:
    return dict(zip((f"{name}_sb", f"{name}_st", f"{name}_sh"), x.stride()[:3], strict=True))


def append_launch(x: Cache, new: NewKeys) -> tuple[Launch, Tensor | None]:
    """The launch that writes `new` behind what ``x.seqlens`` counts, and where it puts the turned
    q."""
    rotary, (batch, q_len, heads_q, dim) = new.rotary, x.q.shape
    heads_kv, dim_v, count = x.k.shape[2], x.v.shape[3], new.k.shape[1]
    q_turned = None if rotary is None else x.q.new_empty(x.q.shape)
    longest = count if rotary is None else max(count, q_len)
    tokens = min(MAX_TOKENS, triton.next_power_of_2(max(longest, 1)))
    table = x.block_table
    arguments: dict[str, Any] = {
        "q": x.q, "k": new.k, "v": new.v, "turned_q": q_turned, "k_cache": stored_bits(x.k),
        "v_cache": stored_bits(x.v), "seqlens": x.seqlens, "block_table": table,
        "batch_idx": x.batch_idx, "k_descale": x.k_descale, "v_descale": x.v_descale,
        "cos": None if rotary is None else rotary.cos.contiguous(),
        "sin": None if rotary is None else rotary.sin.contiguous(),
        **_strides("q", x.q), **_strides("k", new.k), **_strides("v", new.v),
        **_strides("kc", x.k), **_strides("vc", x.v),
        "table_sb": row_stride(table), "kd_sb": row_stride(x.k_descale),
        "vd_sb": row_stride(x.v_descale), "q_len": q_len, "new": count, "room": x.room,
        "pages": x.k.shape[0], "positions": 0 if rotary is None else rotary.cos.shape[0],
        "HQ": heads_q, "HKV": heads_kv, "D": dim, "DV": dim_v,
        "R": 0 if rotary is None else rotary.cos.shape[1],
        "BLOCK_D": padded(dim), "BLOCK_DV": padded(dim_v), "TOKENS": tokens,
        "PAGE_SIZE": 0 if table is None else x.k.shape[1],
        "PAIRS": rotary is not None and rotary.interleaved,
        "ORDERED": rotary is not None and rotary.ordered, "FLOAT8": is_float8(x.k),
    }  # fmt: skip
    heads = 2 * heads_kv + (0 if rotary is None else heads_q)
    grid = (-(-longest // tokens) * heads * batch,)
    return Launch("append", append_kernel, grid, arguments, 1 if tokens == 1 else 4, 1), q_turned
