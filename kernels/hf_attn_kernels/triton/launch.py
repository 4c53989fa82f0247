"""From checked tensors to kernel launches: what both directions share, strides, flags, tiles."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import Pattern
from .config import CACHE_BYTES, Tiles, tiles
from .options import ruled_out

NO_BIAS, ADDED, KEEP = 0, 1, 2  # as in primitives
GRID_LIMITS = (2**31 - 1, 65535, 65535)  # CUDA's, of the programs along each axis
LARGEST_TILE = 256  # rows; no tile of the table has more


@dataclass(frozen=True)
class Shape:
    """Sizes of a call, dense or packed."""

    batch: int
    q_len: int  # longest, when packed
    k_len: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    packed: bool

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return self.heads_q // self.heads_kv

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor | None, max_q: int, max_k: int) -> Shape:
        dense = cu_q is None
        return Shape(
            batch=q.shape[0] if cu_q is None else cu_q.shape[0] - 1,
            q_len=q.shape[1] if dense else max_q,
            k_len=k.shape[1] if dense else max_k,
            heads_q=q.shape[-2],
            heads_kv=k.shape[-2],
            head_dim=q.shape[-1],
            head_dim_v=v.shape[-1],
            packed=not dense,
        )

    def empty_outputs(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Out and lse. Packed ones are filled: tokens behind the last sequence belong to none."""
        out_shape = (*q.shape[:-1], self.head_dim_v)
        if self.packed:
            lse_shape: tuple[int, ...] = (self.heads_q, q.shape[0])
            lse = q.new_full(lse_shape, float("-inf"), dtype=torch.float32)
            return q.new_zeros(out_shape), lse
        lse_shape = (self.batch, self.heads_q, self.q_len)
        return q.new_empty(out_shape), q.new_empty(lse_shape, dtype=torch.float32)

    def lse_parts(self, lse: Tensor, bias: Tensor | None) -> Tensor:
        """What an added bias makes the backward need in the place of `lse`, ``[2, ...]`` float32:
        the largest base-2 score of a row, and log2 of the sum of its weights beside that. Of a row
        that the bias hides (finfo.min) their sum would keep the first alone. Else 0 elements."""
        if bias is None or bias.dtype == torch.bool:
            return lse.new_empty(0)
        new = lse.new_zeros if self.packed else lse.new_empty
        return new((2, *lse.shape))

    def lse_strides(self, lse: Tensor) -> tuple[int, int]:
        """Of batch and head; a packed lse has no batch."""
        return (0, lse.stride(0)) if self.packed else (lse.stride(0), lse.stride(1))


@dataclass(frozen=True)
class Launch:
    """One kernel with its grid and arguments: run it, or compile it ahead of time."""

    kernel: str  # row of the tile table, or "delta"
    fn: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int
    max_registers: int | None = None

    def run(self) -> Any:
        """The compiled kernel; None where there is nothing to do, and from the interpreter.

        Raises:
            ValueError: the call needs more programs than a launch may have.
        """
        if not all(self.grid):
            return None
        if any(have > most for have, most in zip(self.grid, GRID_LIMITS, strict=False)):
            raise ValueError(
                f"the {self.kernel} kernel needs a grid of {self.grid} programs for this call; "
                f"possible: up to {GRID_LIMITS}. Give it fewer rows at a time"
            )
        capped = {} if self.max_registers is None else {"maxnreg": self.max_registers}
        return self.fn[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages, **capped
        )


@dataclass(frozen=True)
class Inputs:
    """What both directions take; the tensors of :class:`..problem.Problem`, checked."""

    q: Tensor
    k: Tensor
    v: Tensor
    s_aux: Tensor | None
    slopes: Tensor | None  # [1 | B, Hq]
    bias: Tensor | None
    key_mask: Tensor | None
    cu_q: Tensor | None
    cu_k: Tensor | None
    seed: Tensor | None
    max_q: int
    max_k: int
    pattern: Pattern

    @property
    def shape(self) -> Shape:
        return Shape.of(self.q, self.k, self.v, self.cu_q, self.max_q, self.max_k)

    def bytes_of_head(self, length: int) -> int:
        """Of two tensors that are as wide as k and v, `length` tokens of one head."""
        return length * (self.k.shape[-1] + self.v.shape[-1]) * self.k.element_size()


def padded_dim(head_dim: int) -> int:
    """The power of two that a tile of this head_dim takes; tl.dot needs 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides(name: str, x: Tensor, packed: bool) -> dict[str, int]:
    batch, (seq, head) = (0, x.stride()[:2]) if packed else (x.stride(0), x.stride()[1:3])
    return {f"{name}_sb": batch, f"{name}_ss": seq, f"{name}_sh": head}


def batch_stride(x: Tensor, packed: bool) -> int:
    """0 when packed: there is one row of tokens."""
    return 0 if packed else x.stride(0)


def _key_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First kept key and one past the last, ``[B]`` int32, without waiting for the device."""
    length = mask.shape[1]
    kept = mask.to(torch.int32)
    some = kept.amax(dim=1) > 0
    lo = torch.where(some, kept.argmax(dim=1), 0)
    hi = torch.where(some, length - kept.flip(1).argmax(dim=1), 0)
    return lo.to(torch.int32), hi.to(torch.int32)


def shared_arguments(x: Inputs) -> dict[str, Any]:
    """Arguments that all kernels but delta take."""
    q, bias, pattern, shape = x.q, x.bias, x.pattern, x.shape
    keep_bias = bias is not None and bias.dtype == torch.bool
    bias_bytes = bias.view(torch.uint8) if bias is not None and keep_bias else bias
    # an absent tensor is never read; q stands in for its pointer
    lo, hi = (q, q) if x.key_mask is None else _key_bounds(x.key_mask)
    q_strides, k_strides, v_strides = (
        _strides(name, t, shape.packed) for name, t in (("q", q), ("k", x.k), ("v", x.v))
    )
    row_strides = (
        q_strides["q_ss"], k_strides["k_ss"], v_strides["v_ss"], shape.heads_q * shape.head_dim_v,
    )  # fmt: skip
    bias_strides = [0, 0, 0, 0]
    if bias is not None:
        bias_strides = [
            0 if n == 1 else step for n, step in zip(bias.shape, bias.stride(), strict=True)
        ]
    return {
        "Q": q, "K": x.k, "V": x.v,
        "Slopes": q if x.slopes is None else x.slopes,
        "Bias": q if bias_bytes is None else bias_bytes,
        "KeyMask": q if x.key_mask is None else x.key_mask.contiguous().view(torch.uint8),
        "KeyLo": lo, "KeyHi": hi,
        "CuQ": q if x.cu_q is None else x.cu_q, "CuK": q if x.cu_k is None else x.cu_k,
        "Seed": q if x.seed is None else x.seed,
        **q_strides, **k_strides, **v_strides,
        **dict(zip(("bias_sb", "bias_sh", "bias_sq", "bias_sk"), bias_strides, strict=True)),
        "slopes_sb": 0 if x.slopes is None or x.slopes.shape[0] == 1 else x.slopes.stride(0),
        "heads_q": shape.heads_q, "groups": shape.group,
        "q_len": shape.q_len, "k_len": shape.k_len,
        "left": pattern.window_left, "right": pattern.window_right,
        "sink_tokens": pattern.sink_tokens, "scaling": pattern.scaling,
        "softcap": pattern.softcap,
        "keep_threshold": int(pattern.dropout_p * 2**32),
        "keep_scale": 1.0 / (1.0 - pattern.dropout_p),
        "PACKED": shape.packed, "HAS_LEFT": pattern.window_left >= 0,
        "HAS_RIGHT": pattern.window_right >= 0, "HAS_SINK_TOKENS": pattern.sink_tokens > 0,
        "SOFTCAP": pattern.softcap > 0, "HAS_ALIBI": x.slopes is not None,
        "BIAS": NO_BIAS if bias is None else (KEEP if keep_bias else ADDED),
        "WIDE": max(row_strides) * LARGEST_TILE >= 2**31,
        "HAS_KEY_MASK": x.key_mask is not None, "DROPOUT": pattern.dropout_p > 0,
        "D": shape.head_dim, "DV": shape.head_dim_v,
        "BLOCK_D": padded_dim(shape.head_dim), "BLOCK_DV": padded_dim(shape.head_dim_v),
        # float32 stays float32: TF32 would keep 10 bits of the mantissa
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def parts_arguments(parts: Tensor, q: Tensor) -> dict[str, Any]:
    """Of a kernel that writes or reads `parts`, see :meth:`Shape.lse_parts`."""
    none = parts.numel() == 0
    return {"LseParts": q if none else parts, "parts_s": 0 if none else parts.stride(0)}


def tiled(kernel: str, fn: Any, t: Tiles, grid: tuple[int, ...], args: dict[str, Any]) -> Launch:
    """The launch of `fn` with tiles `t`."""
    args = {**args, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n}
    return Launch(kernel, fn, grid, args, t.num_warps, t.num_stages, t.max_registers)


def tiles_for(kernel: str, x: Inputs, chip: str, *, tma: bool = False) -> Tiles:
    """The table's entry for a call; `tma`: the copy engine brings its tiles."""
    pattern = x.pattern
    heavy = pattern.softcap > 0 or x.slopes is not None or x.bias is not None
    heavy = heavy or pattern.dropout_p > 0 or pattern.sink_tokens > 0
    if tma:  # a packed batch takes its masked tiles by pointers, beside the descriptors
        heavy = heavy or x.shape.packed
    kind = "heavy" if heavy else "window" if pattern.window_left >= 0 else ""
    head_dim = max(x.shape.head_dim, x.shape.head_dim_v)
    return tiles(kernel, chip, x.q.element_size(), head_dim, kind=kind, tma=tma)


def heads_together(pattern: Pattern, heads: int, head_bytes: int) -> int:
    """How many of `heads` KV heads go block by block, see :func:`.primitives.place`.

    Args:
        head_bytes: what the programs of one head read again and again. A power of two of them fits
            the cache, so that the last set of heads is seldom an odd one out.
    """
    blocks_differ = pattern.window_right >= 0 and pattern.window_left < 0
    if not blocks_differ or not head_bytes or ruled_out("heavy_first"):
        return 1
    return max(1, min(heads, 1 << max(0, (CACHE_BYTES // head_bytes).bit_length() - 1)))


def blocks_of(length: int, block: int) -> int:
    """How many blocks cover `length`."""
    return -(-length // block)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes `device` the current one, which Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
