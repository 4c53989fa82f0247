"""From an MLA call's tensors to kernel launches: split-KV over latents, contiguous or paged.

All heads and queries of a row share tiles, so the latents are read once for every BM of them. Grid
and number of splits depend on shapes only, never on the lengths in device memory: nothing waits for
the device and a CUDA graph can capture it.

Shape letters as in :mod:`..mla`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..fp8 import is_float8
from ..problem import MlaProblem
from .config import chip_of
from .decode import DTYPES, on
from .decode_config import MAX_SPLITS, DecodeConfig, choose_splits, padded, processors
from .decode_kernel import RECORD_TAIL, reduce_kernel
from .decode_launch import readable, row_stride, strides
from .launch import Launch
from .mla_config import MAX_RANK, MAX_ROPE, config_for
from .mla_kernel import mla_kernel
from .primitives import LOG2E


def mla_attention(p: MlaProblem) -> tuple[Tensor, Tensor]:
    """out ``[B, Q, H, R]`` and the natural log-sum-exp ``[B, H, Q]`` float32.

    Raises:
        ValueError: a dtype, a rank or a width of the rotated key that the kernel has no tiles for.
    """
    _check(p)
    batch, q_len, heads, _ = p.q_latent.shape
    out = p.q_latent.new_empty(p.q_latent.shape)
    lse = out.new_empty(batch, heads, q_len, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    device = out.device
    chip, units = chip_of(device.type, device.index), processors(device)
    with on(device):
        for launch in launches(p, out, lse, chip, units):
            launch.run()
    return out, lse


def _check(p: MlaProblem) -> None:
    rank, rope = p.q_latent.shape[-1], p.q_rope.shape[-1]
    if p.q_latent.dtype not in DTYPES:
        raise ValueError(
            f"dtype {p.q_latent.dtype} is not supported by the Triton MLA kernel; possible: "
            + ", ".join(str(d).removeprefix("torch.") for d in DTYPES)
        )
    if rank > MAX_RANK or rope > MAX_ROPE:
        raise ValueError(
            f"a latent of {rank} columns beside a rotated key of {rope} is not supported by the "
            f"Triton MLA kernel; possible: up to {MAX_RANK} and {MAX_ROPE}. Use "
            "attn_implementation='triton_fa2' for this model."
        )


def launches(p: MlaProblem, out: Tensor, lse: Tensor, chip: str, units: int) -> list[Launch]:
    """The MLA kernel, and the reduce kernel when the keys are split.

    Args:
        chip: row of the tile table.
        units: multiprocessors of the chip.
    """
    batch, q_len, heads, rank = p.q_latent.shape
    sizes = (p.q_latent.element_size(), rank, q_len * heads, p.latent.element_size())
    config = config_for(chip, *sizes)
    tiles_m = -(-q_len * heads // config.block_m)
    splits = p.num_splits
    if splits <= 0:
        keys = _longest_view(p, -(-config.block_m // heads))
        # the tables' tiles take a processor each, and `choose_splits` counts two
        splits = choose_splits(tiles_m * batch, keys, config.block_n, max(units // 2, 1))
    splits = min(splits, MAX_SPLITS)
    partial = None
    if splits > 1:
        record = rank + RECORD_TAIL.value
        partial = out.new_empty(batch * q_len * heads * splits * record, dtype=torch.float32)
    decode = Launch(
        "mla", mla_kernel, (splits * tiles_m * batch,),
        _arguments(p, config, splits, out, lse, partial, chip),
        config.num_warps, config.num_stages, config.max_registers,
    )  # fmt: skip
    if partial is None:
        return [decode]
    block_s = triton.next_power_of_2(splits)
    block_c = min(padded(rank), max(16, 8192 // block_s))
    arguments = {
        "partial": partial, "s_aux": None, "out": out, "lse": lse, "cu_q": None, "q_len": q_len,
        "heads": heads, "rows": batch, "DV": rank, "SPLITS": splits, "BLOCK_S": block_s,
        "BLOCK_C": block_c,
    }  # fmt: skip
    grid = (batch * q_len * heads, -(-rank // block_c))
    return [decode, Launch("reduce", reduce_kernel, grid, arguments, 4, 1)]


def _longest_view(p: MlaProblem, tokens: int) -> int:
    """Keys that a tile of `tokens` tokens visits at most."""
    left, right = p.pattern.window_left, p.pattern.window_right
    return p.capacity if left < 0 or right < 0 else min(p.capacity, left + right + tokens)


def _arguments(
    p: MlaProblem, config: DecodeConfig, splits: int, out: Tensor, lse: Tensor,
    partial: Tensor | None, chip: str,
) -> dict[str, Any]:  # fmt: skip
    _, q_len, heads, rank = p.q_latent.shape
    rope, mask, pattern = p.q_rope.shape[-1], p.key_mask, p.pattern
    steps = [s for t in (p.q_latent, p.q_rope, p.latent, p.k_rope) for s in strides(t)]
    names = ("ql_sb", "ql_st", "ql_sh", "qr_sb", "qr_st", "qr_sh", "l_sb", "l_st", "r_sb", "r_st")
    return {
        "q_latent": p.q_latent, "q_rope": p.q_rope, "latent": readable(p.latent, chip),
        "k_rope": readable(p.k_rope, chip), "out": out, "lse": lse, "partial": partial,
        "seqlens": p.seqlens_k, "block_table": p.block_table, "leftpad": p.leftpad,
        "key_mask": None if mask is None else mask.contiguous().view(torch.uint8),
        "latent_descale": p.latent_descale, "rope_descale": p.rope_descale,
        **dict(zip(names, steps, strict=True)),
        "table_sb": row_stride(p.block_table), "mask_sb": 0 if mask is None else mask.shape[1],
        "q_len": q_len, "k_len": p.latent.shape[1], "room": p.capacity if p.latent.shape[0] else 0,
        "pages": p.latent.shape[0],
        "window_left": pattern.window_left, "window_right": pattern.window_right,
        "scale": pattern.scaling * LOG2E.value,
        "H": heads, "R": rank, "P": rope, "BLOCK_R": padded(rank), "BLOCK_P": padded(rope),
        "BM": config.block_m, "BN": config.block_n,
        "PAGE_SIZE": 0 if p.block_table is None else p.latent.shape[1], "SPLITS": splits,
        "HAS_LEFT": pattern.window_left >= 0, "HAS_RIGHT": pattern.window_right >= 0,
        "FLOAT8": is_float8(p.latent),
    }  # fmt: skip
