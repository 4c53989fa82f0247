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
class _Call:
    """Arguments that all kernels of a call share."""

    shape: Shape
    tensors: dict[str, Tensor]
    numbers: dict[str, Any]
    flags: dict[str, Any]


def _strides(name: str, x: Tensor, packed: bool) -> dict[str, int]:
    batch, (seq, head) = (0, x.stride()[:2]) if packed else (x.stride(0), x.stride()[1:3])
    return {f"{name}_sb": batch, f"{name}_ss": seq, f"{name}_sh": head}


def _key_bounds(mask: Tensor) -> tuple[Tensor, Tensor]:
    """First kept key and one past the last, ``[B]`` int32, without waiting for the device."""
    length = mask.shape[1]
    kept = mask.to(torch.int32)
    some = kept.amax(dim=1) > 0
    lo = torch.where(some, kept.argmax(dim=1), 0)
    hi = torch.where(some, length - kept.flip(1).argmax(dim=1), 0)
    return lo.to(torch.int32), hi.to(torch.int32)


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, bias: Tensor | None,
    key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, seed: Tensor | None,
    max_q: int, max_k: int, pattern: Pattern,
) -> _Call:  # fmt: skip
    shape = Shape.of(q, k, v, cu_q, max_q, max_k)
    keep_bias = bias is not None and bias.dtype == torch.bool
    bias_bytes = bias.view(torch.uint8) if bias is not None and keep_bias else bias
    # an absent tensor is never read; q stands in for its pointer
    lo, hi = (q, q) if key_mask is None else _key_bounds(key_mask)
    tensors = {
        "Q": q, "K": k, "V": v,
        "Slopes": q if slopes is None else slopes,
        "Bias": q if bias_bytes is None else bias_bytes,
        "KeyMask": q if key_mask is None else key_mask.contiguous().view(torch.uint8),
        "KeyLo": lo, "KeyHi": hi,
        "CuQ": q if cu_q is None else cu_q, "CuK": q if cu_k is None else cu_k,
        "Seed": q if seed is None else seed,
    }  # fmt: skip
    bias_strides = (
        [0 if size == 1 else step for size, step in zip(bias.shape, bias.stride(), strict=True)]
        if bias is not None
        else [0, 0, 0, 0]
    )
    numbers = {
        **_strides("q", q, shape.packed), **_strides("k", k, shape.packed),
        **_strides("v", v, shape.packed),
        **dict(zip(("bias_sb", "bias_sh", "bias_sq", "bias_sk"), bias_strides, strict=True)),
        "slopes_sb": 0 if slopes is None or slopes.shape[0] == 1 else slopes.stride(0),
        "heads_q": shape.heads_q, "groups": shape.heads_q // shape.heads_kv,
        "q_len": shape.q_len, "k_len": shape.k_len,
        "left": pattern.window_left, "right": pattern.window_right,
        "sink_tokens": pattern.sink_tokens, "scaling": pattern.scaling,
        "softcap": pattern.softcap,
        "keep_threshold": int(pattern.dropout_p * 2**32),
        "keep_scale": 1.0 / (1.0 - pattern.dropout_p),
    }  # fmt: skip
    flags = {
        "PACKED": shape.packed, "HAS_LEFT": pattern.window_left >= 0,
        "HAS_RIGHT": pattern.window_right >= 0, "HAS_SINK_TOKENS": pattern.sink_tokens > 0,
        "SOFTCAP": pattern.softcap > 0, "HAS_ALIBI": slopes is not None,
        "BIAS": NO_BIAS if bias is None else (KEEP if keep_bias else ADDED),
        "HAS_KEY_MASK": key_mask is not None, "DROPOUT": pattern.dropout_p > 0,
        "D": shape.head_dim, "DV": shape.head_dim_v,
        "BLOCK_D": padded_dim(shape.head_dim), "BLOCK_DV": padded_dim(shape.head_dim_v),
        # float32 stays float32: TF32 would keep 10 bits of the mantissa
        "PRECISION": "ieee" if q.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    return _Call(shape, tensors, numbers, flags)


def padded_dim(head_dim: int) -> int:
    """The power of two that a tile of this head_dim takes; tl.dot needs 16 at least."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _on(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _pick(kernel: str, q: Tensor, shape: Shape) -> Tiles:
    chip = chip_of(q.device.type, q.device.index)
    return tiles(kernel, chip, q.element_size(), max(shape.head_dim, shape.head_dim_v))


def _options(t: Tiles, **names: int) -> dict[str, int]:
    return {**names, "num_warps": t.num_warps, "num_stages": t.num_stages}


def launch_forward(
    q: Tensor, k: Tensor, v: Tensor, s_aux: Tensor | None, slopes: Tensor | None,
    bias: Tensor | None, key_mask: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    seed: Tensor | None, max_q: int, max_k: int, pattern: Pattern,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Out, lse."""
    call = _prepare(q, k, v, slopes, bias, key_mask, cu_q, cu_k, seed, max_q, max_k, pattern)
    shape = call.shape
    out, lse = shape.empty_outputs(q)
    t = _pick("forward", q, shape)
    blocks_m = -(-shape.q_len // t.block_m)
    programs = blocks_m * shape.batch * shape.heads_q
    if programs == 0:
        return out, lse
    lse_sb, lse_sh = shape.lse_strides(lse)
    with _on(q.device):
        attention_forward_kernel[(programs,)](
            **call.tensors, Out=out, Lse=lse, SAux=q if s_aux is None else s_aux,
            **call.numbers, o_sb=0 if shape.packed else out.stride(0), lse_sb=lse_sb,
            lse_sh=lse_sh, blocks_m=blocks_m, **call.flags, HAS_S_AUX=s_aux is not None,
            **_options(t, BLOCK_M=t.block_m, BLOCK_N=t.block_n),
        )  # fmt: skip
    return out, lse


def launch_backward(
    dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor,
    s_aux: Tensor | None, slopes: Tensor | None, bias: Tensor | None, key_mask: Tensor | None,
    cu_q: Tensor | None, cu_k: Tensor | None, seed: Tensor | None, max_q: int, max_k: int,
    pattern: Pattern, bias_needs_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias, ds_aux; the last two have 0 elements where not asked for."""
    call = _prepare(q, k, v, slopes, bias, key_mask, cu_q, cu_k, seed, max_q, max_k, pattern)
    shape = call.shape
    new = torch.zeros if shape.packed else torch.empty
    dq, dk, dv = (new(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    dbias = q.new_empty(0)
    if bias is not None and bias_needs_grad:
        dbias = torch.zeros(bias.shape, dtype=torch.float32, device=q.device)
    delta = torch.zeros_like(lse)
    dout = dout.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    lse_sb, lse_sh = shape.lse_strides(lse)
    o_sb = 0 if shape.packed else out.stride(0)
    rows = {"lse_sb": lse_sb, "lse_sh": lse_sh, "o_sb": o_sb}
    shared = {**call.tensors, **call.numbers, **call.flags, **rows}
    shared |= {"DOut": dout, "Lse": lse, "Delta": delta}
    batch_of = (lambda x: 0) if shape.packed else (lambda x: x.stride(0))
    with _on(q.device):
        if shape.q_len and shape.batch:
            _launch_delta(call, out, dout, dlse, delta, rows)
            t = _pick("dq", q, shape)
            blocks_m = -(-shape.q_len // t.block_m)
            dq_kernel[(blocks_m * shape.batch * shape.heads_q,)](
                **shared, DQ=dq, dq_sb=batch_of(dq), blocks_m=blocks_m,
                **_options(t, BLOCK_M=t.block_m, BLOCK_N=t.block_n),
            )  # fmt: skip
        if shape.k_len and shape.batch:
            t = _pick("dkdv", q, shape)
            blocks_n = -(-shape.k_len // t.block_n)
            dkdv_kernel[(blocks_n * shape.batch * shape.heads_kv,)](
                **shared, DK=dk, DV_=dv, dk_sb=batch_of(dk), dv_sb=batch_of(dv),
                blocks_n=blocks_n, **_options(t, BLOCK_M=t.block_m, BLOCK_N=t.block_n),
            )  # fmt: skip
        if dbias.numel():
            _launch_bias_grad(call, shared, dbias, q)
    ds_aux = q.new_empty(0)
    if s_aux is not None:
        # d lse / d s_aux is the weight of the sink, and its value is nothing: only delta is left
        weight = torch.exp(s_aux.float()[:, None] - lse)
        weight = torch.where(torch.isneginf(lse), 0.0, weight)
        axes = 1 if shape.packed else (0, 2)
        ds_aux = -(weight * delta).sum(dim=axes).to(s_aux.dtype)
    if dbias.numel() and bias is not None:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias, ds_aux


def _launch_delta(
    call: _Call, out: Tensor, dout: Tensor, dlse: Tensor | None, delta: Tensor, rows: dict[str, int]
) -> None:
    shape, block_m = call.shape, 64
    blocks_m = -(-shape.q_len // block_m)
    delta_kernel[(blocks_m * shape.batch * shape.heads_q,)](
        Out=out, DOut=dout, DLse=delta if dlse is None else dlse, Delta=delta,
        CuQ=call.tensors["CuQ"], **rows, blocks_m=blocks_m, heads_q=shape.heads_q,
        q_len=shape.q_len, PACKED=shape.packed, HAS_DLSE=dlse is not None, DV=shape.head_dim_v,
        BLOCK_DV=call.flags["BLOCK_DV"], BLOCK_M=block_m, num_warps=4,
    )  # fmt: skip


def _launch_bias_grad(call: _Call, shared: dict[str, Any], dbias: Tensor, q: Tensor) -> None:
    shape = call.shape
    t = _pick("bias_grad", q, shape)
    bias_batch, bias_heads, bias_queries, max_k = dbias.shape
    own_blocks = 1 if bias_queries == 1 else -(-bias_queries // t.block_m)
    arguments = {name: value for name, value in shared.items() if name != "BIAS"}
    grid = (-(-max_k // t.block_n), own_blocks, bias_batch * bias_heads)
    bias_grad_kernel[grid](
        **arguments, DBias=dbias, batch=shape.batch, bias_batch=bias_batch, bias_heads=bias_heads,
        bias_queries=bias_queries, max_q=shape.q_len, max_k=max_k,
        blocks_m=-(-shape.q_len // t.block_m), blocks_n=grid[0],
        **_options(t, BLOCK_M=t.block_m, BLOCK_N=t.block_n),
    )  # fmt: skip
