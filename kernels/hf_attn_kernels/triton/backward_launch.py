"""The launches of the backward: delta, dq and dk/dv or both at once, the gradient of a bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .backward import delta_kernel
from .bias_grad import bias_grad_kernel
from .config import DELTA_ROWS, JOINT_HEAD_DIM, Tiles, chip_of
from .descriptors import refusal, rows_of, tiles_of
from .dkdv import dkdv_kernel
from .dq import dq_kernel
from .forward_launch import Outputs
from .launch import (
    Inputs,
    Launch,
    Shape,
    batch_stride,
    blocks_of,
    heads_together,
    on_device,
    parts_arguments,
    shared_arguments,
    tiled,
    tiles_for,
)
from .options import ruled_out


@dataclass(frozen=True)
class Gradients:
    """What the backward writes."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    dbias: Tensor | None  # float32; None when nobody asks for it
    dq_sum: Tensor | None = None  # like dq but float32 and 0: dq/scaling is added up in it instead


def backward_launches(
    x: Inputs, o: Outputs, dout: Tensor, dlse: Tensor | None, delta: Tensor, grads: Gradients,
    chip: str,
) -> list[Launch]:  # fmt: skip
    """delta, then dq, dk/dv (one kernel where there is a dq_sum) and the bias's gradient.

    All tensors but q, k, v and bias are contiguous.
    """
    shape = x.shape
    lse_sb, lse_sh = shape.lse_strides(o.lse)
    tma = not ruled_out("descriptors") and _refusal(x, o.lse, dout, chip) is None
    shared = {
        **shared_arguments(x), "DOut": dout, "Lse": o.lse, **parts_arguments(o.parts, x.q),
        "Delta": delta, "o_sb": batch_stride(o.out, shape.packed), "lse_sb": lse_sb,
        "lse_sh": lse_sh,
    }  # fmt: skip
    launches = [_delta_launch(shared, shape, o.out, dlse, DELTA_ROWS.get(chip, 64))]
    if grads.dq_sum is None:
        launches.append(_dq_launch(shared, x, dout, grads.dq, chip, tma))
    launches.append(_dkdv_launch(shared, x, dout, grads, chip, tma))
    if grads.dbias is not None:
        launches.append(_bias_grad_launch(shared, x, grads.dbias, chip))
    return launches


def serves_joint(shape: Shape) -> bool:
    """Whether dq may be added up beside dk and dv."""
    return max(shape.head_dim, shape.head_dim_v) <= JOINT_HEAD_DIM


def _refusal(x: Inputs, lse: Tensor, dout: Tensor, chip: str) -> str | None:
    if x.shape.packed:  # masked and unmasked tiles share a loop, and a neighbour is not to be read
        return "a packed batch"
    return refusal(x, chip, (x.q, dout, lse))


def _described(
    x: Inputs, dout: Tensor, t: Tiles, shared: dict[str, Any], tma: bool
) -> dict[str, Any]:
    """The tensors in tiles of `t` where the copy engine brings them."""
    if not tma:
        return dict.fromkeys(("QTiles", "KTiles", "VTiles", "DOutTiles"))
    width, width_v = shared["BLOCK_D"], shared["BLOCK_DV"]
    return {
        "QTiles": tiles_of(x.q, t.block_m, width), "KTiles": tiles_of(x.k, t.block_n, width),
        "VTiles": tiles_of(x.v, t.block_n, width_v),
        "DOutTiles": tiles_of(dout, t.block_m, width_v),
    }  # fmt: skip


def _dq_launch(
    shared: dict[str, Any], x: Inputs, dout: Tensor, dq: Tensor, chip: str, tma: bool
) -> Launch:
    shape, t = x.shape, tiles_for("dq", x, chip, tma=tma)
    blocks_m = blocks_of(shape.q_len, t.block_m)
    heads = shape.batch * shape.heads_kv
    together = heads_together(x.pattern, heads, x.bytes_of_head(shape.k_len)) * shape.group
    arguments = {
        **shared, **_described(x, dout, t, shared, tma), "together": together, "DQ": dq, "TMA": tma,
        "dq_sb": batch_stride(dq, shape.packed), "blocks_m": blocks_m,
    }  # fmt: skip
    return tiled("dq", dq_kernel, t, (blocks_m * shape.batch * shape.heads_q,), arguments)


def _dkdv_launch(
    shared: dict[str, Any], x: Inputs, dout: Tensor, grads: Gradients, chip: str, tma: bool
) -> Launch:
    shape, sums = x.shape, grads.dq_sum
    kernel = "dkdv" if sums is None else "joint"
    t = tiles_for(kernel, x, chip, tma=tma)
    blocks_n = blocks_of(shape.k_len, t.block_n)
    heads = shape.batch * shape.heads_kv
    together = heads_together(x.pattern, heads, x.bytes_of_head(shape.q_len) * shape.group)
    arguments = {
        **shared, **_described(x, dout, t, shared, tma), "TMA": tma, "together": together,
        "blocks_n": blocks_n, "DK": grads.dk, "DV_": grads.dv,
        "dk_sb": batch_stride(grads.dk, shape.packed),
        "dv_sb": batch_stride(grads.dv, shape.packed),
        "DQSum": x.q if sums is None else sums, "DQTiles": None, "LseTiles": None,
        "DeltaTiles": None, "ADD_DQ": sums is not None,
        "dq_sb": 0 if sums is None else batch_stride(sums, shape.packed),
    }  # fmt: skip
    if tma:
        arguments["LseTiles"] = rows_of(shared["Lse"], t.block_m)
        arguments["DeltaTiles"] = rows_of(shared["Delta"], t.block_m)
    if tma and sums is not None:
        arguments["DQTiles"] = tiles_of(sums, t.block_m, shared["BLOCK_D"])
    return tiled(kernel, dkdv_kernel, t, (blocks_n * shape.batch * shape.heads_kv,), arguments)


def _delta_launch(
    shared: dict[str, Any], shape: Shape, out: Tensor, dlse: Tensor | None, block_m: int
) -> Launch:
    blocks_m = blocks_of(shape.q_len, block_m)
    names = (
        "DOut", "Delta", "CuQ", "o_sb", "lse_sb", "lse_sh", "heads_q", "q_len", "PACKED", "DV",
        "BLOCK_DV", "WIDE",
    )  # fmt: skip
    arguments = {name: shared[name] for name in names}
    arguments |= {
        "Out": out, "DLse": shared["Delta"] if dlse is None else dlse,
        "HAS_DLSE": dlse is not None, "blocks_m": blocks_m, "BLOCK_M": block_m,
    }  # fmt: skip
    grid = (blocks_m * shape.batch * shape.heads_q,)
    return Launch("delta", delta_kernel, grid, arguments, num_warps=4, num_stages=1)


def _bias_grad_launch(shared: dict[str, Any], x: Inputs, dbias: Tensor, chip: str) -> Launch:
    shape, t = x.shape, tiles_for("bias_grad", x, chip)
    bias_batch, bias_heads, bias_queries, max_k = dbias.shape
    arguments = {name: value for name, value in shared.items() if name != "BIAS"}
    arguments |= {
        "DBias": dbias, "batch": shape.batch, "bias_batch": bias_batch, "bias_heads": bias_heads,
        "bias_queries": bias_queries, "max_k": max_k,
        "blocks_m": blocks_of(shape.q_len, t.block_m),
    }  # fmt: skip
    own_blocks = blocks_of(bias_queries, t.block_m)
    grid = (blocks_of(max_k, t.block_n) * own_blocks * bias_batch * bias_heads,)
    return tiled("bias_grad", bias_grad_kernel, t, grid, arguments)


def run_backward(
    x: Inputs, dout: Tensor, dlse: Tensor | None, o: Outputs, bias_needs_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv, dbias, ds_aux; the last two have 0 elements where not asked for."""
    # packed: tokens behind the last sequence belong to none, their gradient is 0; so is that of
    # keys without queries, for which nothing is launched
    some = o.out.numel() > 0
    new = torch.empty if some and not x.shape.packed else torch.zeros
    dq, dk, dv = (new(t.shape, dtype=t.dtype, device=t.device) for t in (x.q, x.k, x.v))
    dbias = None
    if x.bias is not None and bias_needs_grad:
        dbias = torch.zeros(x.bias.shape, dtype=torch.float32, device=x.q.device)
    dq_sum = None
    deterministic = deterministic or torch.are_deterministic_algorithms_enabled()
    if not deterministic and serves_joint(x.shape):
        dq_sum = torch.zeros_like(dq, dtype=torch.float32)
    delta = torch.zeros_like(o.lse)
    dlse = None if dlse is None else dlse.contiguous()
    launches = backward_launches(
        x, o, dout.contiguous(), dlse, delta, Gradients(dq, dk, dv, dbias, dq_sum),
        chip_of(x.q.device.type, x.q.device.index),
    )  # fmt: skip
    with on_device(x.q.device):
        for launch in launches if some else ():
            launch.run()
    if dq_sum is not None:
        torch.mul(dq_sum, x.pattern.scaling, out=dq)
    empty = x.q.new_empty
    ds_aux = empty(0) if x.s_aux is None else _sink_gradient(x.s_aux, o.lse, delta)
    if dbias is not None and x.bias is not None:
        return dq, dk, dv, dbias.to(x.bias.dtype), ds_aux
    return dq, dk, dv, empty(0), ds_aux


def _sink_gradient(s_aux: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """A sink has a weight but no value: of the softmax's gradient only -weight * delta is left."""
    weight = torch.exp(s_aux.float()[:, None] - lse)
    weight = torch.where(torch.isneginf(lse), 0.0, weight)  # rows of no sequence
    return -(weight * delta).sum(dim=1 if lse.dim() == 2 else (0, 2)).to(s_aux.dtype)
