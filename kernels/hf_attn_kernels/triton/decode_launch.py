"""From a cache call's tensors to kernel launches: splits, strides, flags and grids.

Shape letters as in :mod:`.decode`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..fp8 import is_float8
from ..problem import Pattern
from .decode_config import (
    MAX_SPLITS,
    WIDENS_FLOAT8,
    DecodeConfig,
    choose_splits,
    config_for,
    padded,
)
from .decode_kernel import RECORD_TAIL, decode_kernel, reduce_kernel
from .launch import Launch
from .primitives import LOG2E


@dataclass(frozen=True, kw_only=True)
class Cache:
    """Tensors of a call beside its pattern; those of a :class:`..problem.CacheProblem`, checked."""

    q: Tensor  # [B, Q, Hq, D], or [T, Hq, D] with cu_q
    k: Tensor
    v: Tensor
    seqlens: Tensor | None = None  # [B]; with cu_q the keys' offsets [B + 1]
    cu_q: Tensor | None = None
    block_table: Tensor | None = None
    batch_idx: Tensor | None = None
    leftpad: Tensor | None = None
    key_mask: Tensor | None = None
    s_aux: Tensor | None = None
    slopes: Tensor | None = None  # [1 | B, Hq]
    k_descale: Tensor | None = None  # [1 | B, Hkv]
    v_descale: Tensor | None = None
    new_keys: int = 0  # of each row, that `seqlens` does not count
    max_q: int = 0  # longest packed sequence
    max_k: int = 0

    @property
    def batch(self) -> int:
        return self.q.shape[0] if self.cu_q is None else self.cu_q.shape[0] - 1

    @property
    def longest(self) -> int:
        """Queries of the longest row."""
        return self.q.shape[1] if self.cu_q is None else self.max_q

    @property
    def room(self) -> int:
        """Keys that a row of the cache holds; a cache without rows or pages holds none."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.k.shape[1] if self.k.shape[0] else 0


def new_outputs(q: Tensor, v: Tensor, *, packed: bool) -> tuple[Tensor, Tensor]:
    """out ``[B, Q, Hq, Dv]`` and log-sum-exp ``[B, Hq, Q]`` float32, uninitialised; packed ones
    are filled, because tokens behind the last sequence belong to none."""
    shape = (*q.shape[:-1], v.shape[-1])
    if packed:
        tokens, heads, _ = q.shape
        lse = q.new_full((heads, tokens), float("-inf"), dtype=torch.float32)
        return q.new_zeros(shape), lse
    batch, q_len, heads, _ = q.shape
    return q.new_empty(shape), q.new_empty(batch, heads, q_len, dtype=torch.float32)


def launches(
    x: Cache, pattern: Pattern, num_splits: int, out: Tensor, lse: Tensor, chip: str, units: int
) -> list[Launch]:
    """The decode kernel, and the reduce kernel when the keys are split.

    Args:
        num_splits: 0 to choose.
        chip: row of the tile table.
        units: multiprocessors of the chip.
    """
    heads_q, dim = x.q.shape[-2:]
    heads_kv, dim_v = x.k.shape[2], x.v.shape[-1]
    groups = heads_q // heads_kv
    rows = x.longest * groups
    sizes = (x.q.element_size(), max(dim, dim_v), rows, x.k.element_size())
    config = config_for(chip, *sizes)
    tiles_m = -(-rows // config.block_m)
    if num_splits <= 0:
        keys = _longest_view(x, pattern, -(-config.block_m // groups))
        num_splits = choose_splits(tiles_m * heads_kv * x.batch, keys, config.block_n, units)
    splits = min(num_splits, MAX_SPLITS)
    tokens = x.q.shape[0] if x.cu_q is not None else x.batch * x.q.shape[1]
    partial = None
    if splits > 1:
        record = dim_v + RECORD_TAIL.value
        partial = x.q.new_empty(tokens * heads_q * splits * record, dtype=torch.float32)
    decode = Launch(
        "decode", decode_kernel, (splits * tiles_m * heads_kv * x.batch,),
        _decode_arguments(x, pattern, config, tiles_m, splits, out, lse, partial, chip),
        config.num_warps, config.num_stages, config.max_registers,
    )  # fmt: skip
    if partial is None:
        return [decode]
    # 8192 numbers of the splits' outputs at a time keep the reduction in registers
    block_s = triton.next_power_of_2(splits)
    block_c = min(padded(dim_v), max(16, 8192 // block_s))
    arguments = {
        "partial": partial, "s_aux": x.s_aux, "out": out, "lse": lse, "cu_q": x.cu_q,
        "q_len": tokens if x.cu_q is not None else x.q.shape[1], "heads": heads_q,
        "rows": x.batch, "DV": dim_v, "SPLITS": splits, "BLOCK_S": block_s, "BLOCK_C": block_c,
    }  # fmt: skip
    grid = (tokens * heads_q, -(-dim_v // block_c))
    return [decode, Launch("reduce", reduce_kernel, grid, arguments, 4, 1)]


def _longest_view(x: Cache, pattern: Pattern, tokens: int) -> int:
    """Keys that a tile of `tokens` tokens visits at most."""
    keys = x.room if x.cu_q is None else min(x.room, x.max_k)
    if pattern.window_left < 0 or pattern.window_right < 0:
        return keys
    window = pattern.window_left + pattern.window_right + tokens + pattern.sink_tokens
    return min(keys, window)


def strides(x: Tensor) -> list[int]:
    """Of all dimensions but the last. A dimension of one element takes no step: its stride says
    nothing about alignment, and may not make Triton compile again."""
    return [0 if n == 1 else step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def row_stride(x: Tensor | None) -> int:
    """Of a row of ``[1 | B, ...]``."""
    return 0 if x is None or x.shape[0] == 1 else x.stride(0)


def stored_bits(cache: Tensor) -> Tensor:
    """A float8 cache as its bits: the kernel's own arithmetic treats them."""
    return cache.view(torch.uint8) if is_float8(cache) else cache


def readable(cache: Tensor, chip: str) -> Tensor:
    """A cache as a kernel on `chip` reads it: float8 as bits where no instruction widens it."""
    return cache if chip in WIDENS_FLOAT8 else stored_bits(cache)


def _decode_arguments(
    x: Cache, pattern: Pattern, config: DecodeConfig, tiles_m: int, splits: int, out: Tensor,
    lse: Tensor, partial: Tensor | None, chip: str,
) -> dict[str, Any]:  # fmt: skip
    q_steps = strides(x.q) if x.cu_q is None else [0, *strides(x.q)]
    steps = [*q_steps, *strides(x.k), *strides(x.v)]
    # strides in units of up to 16 bytes, so that the compiler can vectorise also where a stride is
    # no multiple of 16 elements
    unit = math.gcd(16 // x.k.element_size(), *steps)
    names = ("q_sb", "q_st", "q_sh", "k_sb", "k_st", "k_sh", "v_sb", "v_st", "v_sh")
    softcap = pattern.softcap
    slopes, table, mask = x.slopes, x.block_table, x.key_mask
    k_len = x.new_keys if x.seqlens is not None else x.k.shape[1]
    return {
        "q": x.q, "k": readable(x.k, chip), "v": readable(x.v, chip), "out": out, "lse": lse,
        "partial": partial,
        "seqlens": x.seqlens, "cu_q": x.cu_q, "block_table": table, "batch_idx": x.batch_idx,
        "leftpad": x.leftpad, "key_mask": None if mask is None else mask.view(torch.uint8),
        "alibi": slopes, "s_aux": x.s_aux, "k_descale": x.k_descale, "v_descale": x.v_descale,
        **{name: step // unit for name, step in zip(names, steps, strict=True)},
        "table_sb": row_stride(table), "mask_sb": row_stride(mask),
        "alibi_sb": row_stride(slopes), "kd_sb": row_stride(x.k_descale),
        "vd_sb": row_stride(x.v_descale),
        "tiles_m": tiles_m, "q_len": x.q.shape[0 if x.cu_q is not None else 1], "k_len": k_len,
        "room": x.room, "pages": x.k.shape[0],
        "window_left": pattern.window_left, "window_right": pattern.window_right,
        "sink_tokens": pattern.sink_tokens,
        "scale": pattern.scaling / softcap if softcap else pattern.scaling * LOG2E.value,
        "softcap": softcap,
        "HKV": x.k.shape[2], "G": x.q.shape[-2] // x.k.shape[2],
        "D": x.q.shape[-1], "DV": x.v.shape[3],
        "BLOCK_D": padded(x.q.shape[-1]), "BLOCK_DV": padded(x.v.shape[3]),
        "BM": config.block_m, "BN": config.block_n,
        "PAGE_SIZE": 0 if table is None else x.k.shape[1], "SPLITS": splits,
        "HAS_LEFT": pattern.window_left >= 0, "HAS_RIGHT": pattern.window_right >= 0,
        "HAS_SINKS": pattern.sink_tokens > 0 and pattern.window_left >= 0,
        "HAS_SOFTCAP": softcap > 0, "FLOAT8": is_float8(x.k), "VEC": unit,
    }  # fmt: skip
