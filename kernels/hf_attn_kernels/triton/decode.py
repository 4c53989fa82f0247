"""Attention of few queries over many keys: split-KV over a contiguous or paged cache.

All query heads of a KV head, and all new tokens, share the rows of one tile, so K and V are read
once per KV head ("GQA packed into M"). The keys are cut into splits that run side by side, and a
second kernel combines them (Flash-Decoding). Grid and number of splits depend on shapes only, never
on the lengths in device memory: nothing waits for the device and a CUDA graph can capture it.

Shape letters: B batch, Q queries, Hq / Hkv query / KV heads, G = Hq / Hkv, K keys a row may have,
D / Dv head_dim of q, k / v.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ..problem import CacheProblem, Pattern, Problem
from .config import chip_of
from .decode_config import (
    MAX_SPLITS,
    DecodeConfig,
    choose_splits,
    config_for,
    padded,
    processors,
)
from .decode_kernel import LOG2E, RECORD_TAIL, decode_kernel, reduce_kernel
from .launch import Launch

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DENSE_MAX_ROWS = 16  # Q * G: one tile; beyond it the forward kernel's larger tiles do better


def attention_with_cache(problem: CacheProblem) -> tuple[Tensor, Tensor]:
    """Run `problem` on Triton.

    Returns:
        out ``[B, Q, Hq, Dv]`` and the natural log-sum-exp ``[B, Hq, Q]`` float32. Rows without a
        visible key are zeros and -inf (or s_aux). Not differentiable.

    Raises:
        ValueError: the dtype is not one of DTYPES.
    """
    p = problem
    return _run_op(
        p.q, p.k_cache, p.v_cache, p.seqlens_k, p.block_table, p.batch_idx, p.leftpad, None,
        p.s_aux, p.alibi_slopes, p.pattern, p.num_splits,
    )  # fmt: skip


def serves_dense(problem: Problem) -> bool:
    """Whether `decode_dense` can stand in for the forward kernel, and should."""
    p = problem
    if p.packed or p.bias is not None or p.pattern.dropout_p > 0:
        return False
    given = (p.q, p.k, p.v, p.s_aux)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given):
        return False
    rows = p.q.shape[1] * (p.q.shape[2] // p.k.shape[2])
    return rows <= DENSE_MAX_ROWS and p.q.dtype in DTYPES


def decode_dense(problem: Problem) -> tuple[Tensor, Tensor]:
    """A dense `problem` that `serves_dense`, over keys given whole; same results as the forward."""
    p, leftpad = problem, None
    if p.pattern.sink_tokens and p.key_padding_mask is not None:
        # sinks count from the first kept key; an all-False row gets 0, where its mask hides all
        leftpad = p.key_padding_mask.to(torch.int32).argmax(dim=1).to(torch.int32)
    return _run_op(
        p.q, p.k, p.v, None, None, None, leftpad, p.key_padding_mask, p.s_aux, p.alibi_slopes,
        p.pattern, 0,
    )  # fmt: skip


def _run_op(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, block_table: Tensor | None,
    batch_idx: Tensor | None, leftpad: Tensor | None, key_mask: Tensor | None,
    s_aux: Tensor | None, slopes: Tensor | None, pattern: Pattern, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.dtype not in DTYPES:
        raise ValueError(
            f"dtype {q.dtype} is not supported by the Triton decode kernel; possible: "
            + ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        )
    out, lse = torch.ops.hf_attn.decode(
        q, k, v, seqlens, block_table, batch_idx, leftpad, key_mask, s_aux, slopes,
        pattern.scaling, pattern.window_left, pattern.window_right, pattern.softcap,
        pattern.sink_tokens, num_splits,
    )  # fmt: skip
    return out, lse


@dataclass(frozen=True)
class Cache:
    """Tensors of a call beside its pattern; slopes ``[1 | B, Hq]``."""

    q: Tensor
    k: Tensor
    v: Tensor
    seqlens: Tensor | None
    block_table: Tensor | None
    batch_idx: Tensor | None
    leftpad: Tensor | None
    key_mask: Tensor | None
    s_aux: Tensor | None
    slopes: Tensor | None

    @property
    def capacity(self) -> int:
        """Keys that a row may have."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.k.shape[1]


def _strides(x: Tensor) -> list[int]:
    """Of all dimensions but the last. A dimension of one element takes no step: its stride says
    nothing about alignment, and may not make Triton compile again."""
    return [0 if n == 1 else step for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True)]


def _longest_view(pattern: Pattern, capacity: int, tokens: int) -> int:
    """Keys that a tile of `tokens` tokens visits at most."""
    if pattern.window_left < 0 or pattern.window_right < 0:
        return capacity
    window = pattern.window_left + pattern.window_right + tokens + pattern.sink_tokens
    return min(capacity, window)


def launches(
    x: Cache, pattern: Pattern, num_splits: int, out: Tensor, lse: Tensor, chip: str, units: int
) -> list[Launch]:
    """The decode kernel, and the reduce kernel when the keys are split.

    Args:
        num_splits: 0 to choose.
        chip: row of the tile table.
        units: multiprocessors of the chip.
    """
    batch, q_len, heads_q, dim = x.q.shape
    heads_kv, dim_v = x.k.shape[2], x.v.shape[-1]
    groups = heads_q // heads_kv
    config = config_for(chip, x.q.element_size(), max(dim, dim_v), q_len * groups)
    tiles_m = -(-q_len * groups // config.block_m)
    if num_splits <= 0:
        keys = _longest_view(pattern, x.capacity, -(-config.block_m // groups))
        num_splits = choose_splits(tiles_m * heads_kv * batch, keys, config.block_n, units)
    splits = min(num_splits, MAX_SPLITS)
    partial = None
    if splits > 1:
        record = dim_v + RECORD_TAIL.value
        partial = x.q.new_empty(batch * q_len * heads_q * splits * record, dtype=torch.float32)
    decode = Launch(
        "decode", decode_kernel, (tiles_m * splits, heads_kv, batch),
        _decode_arguments(x, pattern, config, splits, out, lse, partial), config.num_warps,
        config.num_stages,
    )  # fmt: skip
    if partial is None:
        return [decode]
    # 8192 numbers of the splits' outputs at a time keep the reduction in registers
    block_s = triton.next_power_of_2(splits)
    block_c = min(padded(dim_v), max(16, 8192 // block_s))
    arguments = {
        "partial": partial, "s_aux": x.s_aux, "out": out, "lse": lse, "q_len": q_len,
        "heads": heads_q, "DV": dim_v, "SPLITS": splits, "BLOCK_S": block_s, "BLOCK_C": block_c,
    }  # fmt: skip
    grid = (batch * q_len * heads_q, -(-dim_v // block_c))
    return [decode, Launch("reduce", reduce_kernel, grid, arguments, 4, 1)]


def _decode_arguments(
    x: Cache, pattern: Pattern, config: DecodeConfig, splits: int, out: Tensor, lse: Tensor,
    partial: Tensor | None,
) -> dict[str, Any]:  # fmt: skip
    steps = [*_strides(x.q), *_strides(x.k), *_strides(x.v)]
    # strides in units of up to 16 bytes, so that the compiler can vectorise also where a stride is
    # no multiple of 16 elements
    unit = math.gcd(16 // x.q.element_size(), *steps)
    names = ("q_sb", "q_st", "q_sh", "k_sb", "k_st", "k_sh", "v_sb", "v_st", "v_sh")
    softcap = pattern.softcap
    slopes, table, mask = x.slopes, x.block_table, x.key_mask
    return {
        "q": x.q, "k": x.k, "v": x.v, "out": out, "lse": lse, "partial": partial,
        "seqlens": x.seqlens, "block_table": table, "batch_idx": x.batch_idx,
        "leftpad": x.leftpad, "key_mask": None if mask is None else mask.view(torch.uint8),
        "alibi": slopes, "s_aux": x.s_aux,
        **{name: step // unit for name, step in zip(names, steps, strict=True)},
        "table_sb": 0 if table is None else table.stride(0),
        "mask_sb": 0 if mask is None else mask.stride(0),
        "alibi_sb": 0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0),
        "q_len": x.q.shape[1], "k_len": 0 if x.seqlens is not None else x.k.shape[1],
        "window_left": pattern.window_left, "window_right": pattern.window_right,
        "sink_tokens": pattern.sink_tokens,
        "scale": pattern.scaling / softcap if softcap else pattern.scaling * LOG2E.value,
        "softcap": softcap,
        "G": x.q.shape[2] // x.k.shape[2], "D": x.q.shape[3], "DV": x.v.shape[3],
        "BLOCK_D": padded(x.q.shape[3]), "BLOCK_DV": padded(x.v.shape[3]),
        "BM": config.block_m, "BN": config.block_n,
        "PAGE_SIZE": 0 if table is None else x.k.shape[1], "SPLITS": splits,
        "HAS_LEFT": pattern.window_left >= 0, "HAS_RIGHT": pattern.window_right >= 0,
        "HAS_SINKS": pattern.sink_tokens > 0 and pattern.window_left >= 0,
        "HAS_SOFTCAP": softcap > 0, "VEC": unit,
    }  # fmt: skip


def new_outputs(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Uninitialised out ``[B, Q, Hq, Dv]`` and log-sum-exp ``[B, Hq, Q]`` float32."""
    batch, q_len, heads_q, _ = q.shape
    out = q.new_empty(batch, q_len, heads_q, v.shape[-1])
    return out, q.new_empty(batch, heads_q, q_len, dtype=torch.float32)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Triton launches on the current device; switching costs microseconds, so only where needed."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


def _decode(
    q: Tensor, k: Tensor, v: Tensor, seqlens: Tensor | None, block_table: Tensor | None,
    batch_idx: Tensor | None, leftpad: Tensor | None, key_mask: Tensor | None,
    s_aux: Tensor | None, slopes: Tensor | None, scaling: float, left: int, right: int,
    softcap: float, sink_tokens: int, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out, lse = new_outputs(q, v)
    if out.shape[0] == 0 or out.shape[1] == 0:
        return out, lse
    slopes = slopes[None] if slopes is not None and slopes.dim() == 1 else slopes
    x = Cache(
        q, k, v, seqlens, block_table, batch_idx, leftpad,
        None if key_mask is None else key_mask.contiguous(),
        None if s_aux is None else s_aux.contiguous(),
        None if slopes is None else slopes.contiguous(),
    )  # fmt: skip
    pattern = Pattern(
        scaling=scaling, window_left=left, window_right=right, softcap=softcap,
        sink_tokens=sink_tokens,
    )  # fmt: skip
    chip, units = chip_of(q.device.type, q.device.index), processors(q.device)
    with _on(q.device):
        for launch in launches(x, pattern, num_splits, out, lse, chip, units):
            launch.run()
    return out, lse


# A bare Library costs a third of what custom_op does at each call, and inference needs no autograd
_LIBRARY = torch.library.Library("hf_attn", "FRAGMENT")
_LIBRARY.define(
    "decode(Tensor q, Tensor k, Tensor v, Tensor? seqlens, Tensor? block_table, Tensor? batch_idx, "
    "Tensor? leftpad, Tensor? key_mask, Tensor? s_aux, Tensor? slopes, float scaling, int left, "
    "int right, float softcap, int sink_tokens, int num_splits) -> (Tensor, Tensor)"
)
_LIBRARY.impl("decode", _decode, "CompositeExplicitAutograd")


@torch.library.register_fake("hf_attn::decode", lib=_LIBRARY)
def _(q: Tensor, k: Tensor, v: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    return new_outputs(q, v)
