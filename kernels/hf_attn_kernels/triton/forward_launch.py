"""Which forward kernel runs, and its launch. FORWARD is the one place that chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from . import gluon_launch
from .config import chip_of
from .descriptors import refusal, tiles_of
from .forward import attention_forward_kernel
from .launch import (
    Inputs,
    Launch,
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
class Outputs:
    """What a forward kernel writes."""

    out: Tensor
    lse: Tensor
    parts: Tensor  # see `Shape.lse_parts`

    @staticmethod
    def of(x: Inputs) -> Outputs:
        out, lse = x.shape.empty_outputs(x.q)
        return Outputs(out, lse, x.shape.lse_parts(lse, x.bias))


@dataclass(frozen=True, kw_only=True)
class ForwardKernel:
    """A way to compute the forward."""

    name: str
    refuses: Callable[[Inputs, str], str | None]  # why not this call on this chip; None: it serves
    launch: Callable[[Inputs, Outputs, str], Launch]  # writing those, on this chip


def _launch(x: Inputs, o: Outputs, chip: str, *, tma: bool) -> Launch:
    shape, t = x.shape, tiles_for("forward", x, chip, tma=tma)
    blocks_m = blocks_of(shape.q_len, t.block_m)
    lse_sb, lse_sh = shape.lse_strides(o.lse)
    heads = shape.batch * shape.heads_kv
    together = heads_together(x.pattern, heads, x.bytes_of_head(shape.k_len))
    arguments = {
        **shared_arguments(x), "Out": o.out, "Lse": o.lse, **parts_arguments(o.parts, x.q),
        "SAux": x.q if x.s_aux is None else x.s_aux, "HAS_S_AUX": x.s_aux is not None,
        "o_sb": batch_stride(o.out, shape.packed), "lse_sb": lse_sb, "lse_sh": lse_sh,
        "blocks_m": blocks_m, "together": together * shape.group,
        "QTiles": None, "KTiles": None, "VTiles": None, "TMA": tma,
    }  # fmt: skip
    if tma:
        width, width_v = arguments["BLOCK_D"], arguments["BLOCK_DV"]
        arguments["KTiles"] = tiles_of(x.k, t.block_n, width)
        arguments["VTiles"] = tiles_of(x.v, t.block_n, width_v)
        if not shape.packed:
            arguments["QTiles"] = tiles_of(x.q, t.block_m, width)
    grid = (blocks_m * shape.batch * shape.heads_q,)
    return tiled("forward", attention_forward_kernel, t, grid, arguments)


def _by_descriptors(x: Inputs, o: Outputs, chip: str) -> Launch:
    return _launch(x, o, chip, tma=True)


def _by_pointers(x: Inputs, o: Outputs, chip: str) -> Launch:
    return _launch(x, o, chip, tma=False)


def _no_descriptors(x: Inputs, chip: str) -> str | None:
    return refusal(x, chip, () if x.shape.packed else (x.q,))


def _by_gluon(x: Inputs, o: Outputs, chip: str) -> Launch:
    return gluon_launch.forward_launch(x, o.out, o.lse)


# the first that serves a call runs; the last serves all
FORWARD = (
    ForwardKernel(name="gluon", refuses=gluon_launch.refusal, launch=_by_gluon),
    ForwardKernel(name="descriptors", refuses=_no_descriptors, launch=_by_descriptors),
    ForwardKernel(name="pointers", refuses=lambda x, chip: None, launch=_by_pointers),
)


def forward_kernel(x: Inputs, chip: str) -> ForwardKernel:
    """The first of FORWARD that is not ruled out and serves `x` on `chip`."""
    return next(way for way in FORWARD if not ruled_out(way.name) and way.refuses(x, chip) is None)


def forward_launch(x: Inputs, o: Outputs, chip: str) -> Launch:
    """The kernel that writes `o`, with the tiles of `chip`."""
    return forward_kernel(x, chip).launch(x, o, chip)


def run_forward(x: Inputs) -> Outputs:
    o = Outputs.of(x)
    with on_device(x.q.device):
        forward_launch(x, o, chip_of(x.q.device.type, x.q.device.index)).run()
    return o
