"""From checked tensors to kernel launches: outputs, strides, flags and grids."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import Pattern
from .backward import delta_kernel, dkdv_kernel, dq_kernel
from .bias_grad import bias_grad_kernel
from .config import Tiles, chip_of, tiles
from .forward import attention_forward_kernel

NO_BIAS, ADDED, KEEP = 0, 1, 2  # as in primitives


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

    def run(self) -> Any:
        """The compiled kernel; None where there is nothing to do, and from the interpreter."""
        if not all(self.grid):
            return None
        return self.fn[self.grid](
            **self.arguments, num_warps=self.num_warps, num_stages=self.num_stages
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


def padded_dim(head_dim: int) -> int:
    """The power of two that a tile of this head_dim takes; tl.dot needs 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _strides(name: str, x: Tensor, packed: bool) -> dict[str, int]:
    batch, (seq, head) = (0, x.stride()[:2]) if packed else (x.stride(0), x.stride()[1:3])
    return {f"{name}_sb": batch, f"{name}_ss": seq, f"{name}_sh": head}


def _batch_stride(x: Tensor, packed: bool) -> int:
    return 0 if packed else x.stride(0)


def _key_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First kept key and one past the last, ``[B]`` int32, without waiting for the device."""
    length = mask.shape[1]
    kept = mask.to(torch.int32)
    some = kept.amax(dim=1) > 0
    lo = torch.where(some, kept.argmax(dim=1), 0)
    hi = torch.where(some, length - kept.flip(1).argmax(dim=1), 0)
    return lo.to(torch.int32), hi.to(torch.int32)


def _shared_arguments(x: Inputs) -> dict[str, Any]:
    """Arguments that all kernels but delta take."""
    q, bias, pattern, shape = x.q, x.bias, x.pattern, x.shape
    keep_bias = bias is not None and bias.dtype == torch.bool
    bias_bytes = bias.view(torch.uint8) if bias is not None and keep_bias else bias
    # an absent tensor is never read; q stands in for its pointer
    lo, hi = (q, q) if x.key_mask is None else _key_bounds(x.key_mask)
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
        **_strides("q", q, shape.packed), **_strides("k", x.k, shape.packed),
        **_strides("v", x.v, shape.packed),
        **dict(zip(("bias_sb", "bias_sh", "bias_sq", "bias_sk"), bias_strides, strict=True)),
        "slopes_sb": 0 if x.slopes is None or x.slopes.shape[0] == 1 else x.slopes.stride(0),
        "heads_q": shape.heads_q, "groups": shape.heads_q // shape.heads_kv,
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
        "HAS_KEY_MASK": x.key_mask is not None, "DROPOUT": pattern.dropout_p > 0,
        "D": shape.head_dim, "DV": shape.head_dim_v,
        "BLOCK_D": padded_dim(shape.head_dim), "BLOCK_DV": padded_dim(shape.head_dim_v),
        # float32 stays float32: TF32 would keep 10 bits of the mantissa
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip


def _tiled(kernel: str, fn: Any, t: Tiles, grid: tuple[int, ...], args: dict[str, Any]) -> Launch:
    args = {**args, "BLOCK_M": t.block_m, "BLOCK_N": t.block_n}
    return Launch(kernel, fn, grid, args, t.num_warps, t.num_stages)


def _tiles_for(kernel: str, x: Inputs, chip: str) -> Tiles:
    pattern = x.pattern
    heavy = pattern.window_left >= 0 or pattern.softcap > 0 or pattern.dropout_p > 0
    heavy = heavy or x.slopes is not None or x.bias is not None
    head_dim = max(x.shape.head_dim, x.shape.head_dim_v)
    return tiles(kernel, chip, x.q.element_size(), head_dim, heavy=heavy)


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def forward_launch(x: Inputs, out: Tensor, lse: Tensor, chip: str) -> Launch:
    """The forward kernel writing `out` and `lse`, with the tiles of `chip`."""
    shape, t = x.shape, _tiles_for("forward", x, chip)
    blocks_m = _blocks(shape.q_len, t.block_m)
    lse_sb, lse_sh = shape.lse_strides(lse)
    arguments = {
        **_shared_arguments(x), "Out": out, "Lse": lse,
        "SAux": x.q if x.s_aux is None else x.s_aux, "HAS_S_AUX": x.s_aux is not None,
        "o_sb": _batch_stride(out, shape.packed), "lse_sb": lse_sb, "lse_sh": lse_sh,
        "blocks_m": blocks_m,
    }  # fmt: skip
    grid = (blocks_m * shape.batch * shape.heads_q,)
    return _tiled("forward", attention_forward_kernel, t, grid, arguments)


@dataclass(frozen=True)
class Gradients:
    """What the backward writes; dbias is float32 and None when nobody asks for it."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None


def backward_launches(
    x: Inputs, out: Tensor, lse: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor,
    grads: Gradients, chip: str,
) -> list[Launch]:  # fmt: skip
    """delta, then dq, dk/dv and the bias's gradient; all but q, k, v and bias are contiguous."""
    shape = x.shape
    lse_sb, lse_sh = shape.lse_strides(lse)
    rows = {"o_sb": _batch_stride(out, shape.packed), "lse_sb": lse_sb, "lse_sh": lse_sh}
    shared = {**_shared_arguments(x), **rows, "DOut": dout, "Lse": lse, "Delta": delta}
    launches = [_delta_launch(shared, shape, out, dlse)]

    t = _tiles_for("dq", x, chip)
    blocks_m = _blocks(shape.q_len, t.block_m)
    arguments = {**shared, "DQ": grads.dq, "blocks_m": blocks_m}
    arguments["dq_sb"] = _batch_stride(grads.dq, shape.packed)
    launches.append(
        _tiled("dq", dq_kernel, t, (blocks_m * shape.batch * shape.heads_q,), arguments)
    )

    t = _tiles_for("dkdv", x, chip)
    blocks_n = _blocks(shape.k_len, t.block_n)
    arguments = {**shared, "DK": grads.dk, "DV_": grads.dv, "blocks_n": blocks_n}
    arguments["dk_sb"] = _batch_stride(grads.dk, shape.packed)
    arguments["dv_sb"] = _batch_stride(grads.dv, shape.packed)
    launches.append(
        _tiled("dkdv", dkdv_kernel, t, (blocks_n * shape.batch * shape.heads_kv,), arguments)
    )
    if grads.dbias is not None:
        launches.append(_bias_grad_launch(shared, x, grads.dbias, chip))
    return launches


def _delta_launch(shared: dict[str, Any], shape: Shape, out: Tensor, dlse: Tensor | None) -> Launch:
    block_m = 64
    blocks_m = _blocks(shape.q_len, block_m)
    names = (
        "DOut", "Delta", "CuQ", "o_sb", "lse_sb", "lse_sh", "heads_q", "q_len", "PACKED", "DV",
        "BLOCK_DV",
    )  # fmt: skip
    arguments = {name: shared[name] for name in names}
    arguments |= {
        "Out": out, "DLse": shared["Delta"] if dlse is None else dlse,
        "HAS_DLSE": dlse is not None, "blocks_m": blocks_m, "BLOCK_M": block_m,
    }  # fmt: skip
    grid = (blocks_m * shape.batch * shape.heads_q,)
    return Launch("delta", delta_kernel, grid, arguments, num_warps=4, num_stages=1)


def _bias_grad_launch(shared: dict[str, Any], x: Inputs, dbias: Tensor, chip: str) -> Launch:
    shape, t = x.shape, _tiles_for("bias_grad", x, chip)
    bias_batch, bias_heads, bias_queries, max_k = dbias.shape
    arguments = {name: value for name, value in shared.items() if name != "BIAS"}
    arguments |= {
        "DBias": dbias, "batch": shape.batch, "bias_batch": bias_batch, "bias_heads": bias_heads,
        "bias_queries": bias_queries, "max_k": max_k,
        "blocks_m": _blocks(shape.q_len, t.block_m),
    }  # fmt: skip
    own_blocks = 1 if bias_queries == 1 else _blocks(bias_queries, t.block_m)
    grid = (_blocks(max_k, t.block_n), own_blocks, bias_batch * bias_heads)
    return _tiled("bias_grad", bias_grad_kernel, t, grid, arguments)


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def run_forward(x: Inputs) -> tuple[Tensor, Tensor]:
    """Out, lse."""
    out, lse = x.shape.empty_outputs(x.q)
    with _on(x.q.device):
        forward_launch(x, out, lse, chip_of(x.q.device.type, x.q.device.index)).run()
    return out, lse


def run_backward(
    x: Inputs, dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, bias_needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dbias, ds_aux; the last two have 0 elements where not asked for."""
    # packed: tokens behind the last sequence belong to none, their gradient is 0
    new = torch.zeros if x.shape.packed else torch.empty
    dq, dk, dv = (new(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v))
    dbias = None
    if x.bias is not None and bias_needs_grad:
        dbias = torch.zeros(x.bias.shape, dtype=torch.float32, device=x.q.device)
    delta = torch.zeros_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    launches = backward_launches(
        x, out, lse, dout.contiguous(), dlse, delta, Gradients(dq, dk, dv, dbias),
        chip_of(x.q.device.type, x.q.device.index),
    )  # fmt: skip
    with _on(x.q.device):
        for launch in launches:
            launch.run()
    empty = x.q.new_empty
    ds_aux = empty(0) if x.s_aux is None else _sink_gradient(x.s_aux, lse, delta)
    if dbias is not None and x.bias is not None:
        return dq, dk, dv, dbias.to(x.bias.dtype), ds_aux
    return dq, dk, dv, empty(0), ds_aux


def _sink_gradient(s_aux: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink has a weight but no value: of the softmax's gradient only -weight * delta is left."""
    weight = torch.exp(s_aux.float()[:, None] - lse)
    weight = torch.where(torch.isneginf(lse), 0.0, weight)  # rows of no sequence
    return -(weight * delta).sum(dim=1 if lse.dim() == 2 else (0, 2)).to(s_aux.dtype)
