"""Which calls go to the Hopper kernel of :mod:`.gluon_forward`, and how it is launched.

Gluon is an experimental part of Triton and changes between releases, and nothing interprets it. The
kernel's barriers are tested on a machine of threads (tests/support/gluon_machine.py) and its code
is compiled ahead of time; until its tests have passed on a GPU it runs on request
(:mod:`.options`).
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .descriptors import obstacle, tiles_of
from .launch import Inputs, Launch

# of Triton, for which it was compiled without spills; 3.9 spills 128 bytes
RELEASES = ("3.6", "3.7", "3.8")
CONSUMER_ROWS = 64  # queries of a warpgroup, of which a block has two


@dataclass(frozen=True)
class Ring:
    """Keys of a tile, and how many tiles of keys and of values are held."""

    block_n: int
    stages: int


RINGS = {64: Ring(128, 3), 128: Ring(128, 2), 256: Ring(64, 2)}  # by head_dim
WINDOW_RINGS = {64: Ring(64, 4), 128: Ring(64, 3), 256: Ring(64, 2)}  # less beyond the edges


@dataclass(frozen=True)
class Refusal:
    """Why a call is left to the plain kernel, and when."""

    why: str
    holds: Callable[[Inputs], bool]


REFUSALS = (
    Refusal("of 16-bit types only", lambda x: x.q.element_size() != 2),
    Refusal(
        f"head_dim is one of {', '.join(map(str, RINGS))}, of values too",
        lambda x: x.shape.head_dim not in RINGS or x.shape.head_dim_v != x.shape.head_dim,
    ),
    Refusal("packed sequences", lambda x: x.cu_q is not None),
    Refusal("padding", lambda x: x.key_mask is not None),
    Refusal("a bias or ALiBi", lambda x: x.bias is not None or x.slopes is not None),
    Refusal("softcap", lambda x: x.pattern.softcap > 0),
    Refusal("dropout", lambda x: x.pattern.dropout_p > 0),
    Refusal("tokens that stay visible", lambda x: x.pattern.sink_tokens > 0),
    Refusal("no queries or no keys", lambda x: 0 in (x.q.numel(), x.k.numel())),
)


@functools.cache
def available() -> bool:
    """Whether this Triton has the Gluon that the kernel is written in."""
    known = triton.__version__.startswith(tuple(f"{release}." for release in RELEASES))
    return known and importlib.util.find_spec("triton.experimental.gluon") is not None


def refusal(x: Inputs, chip: str) -> str | None:
    """Why the kernel does not serve `x` on a `chip` of the tile table, or None."""
    if chip != "sm_90":
        return f"{chip} is not Hopper"
    if not available():
        return f"Triton {triton.__version__}; the kernel knows {', '.join(RELEASES)}"
    rule = next((rule for rule in REFUSALS if rule.holds(x)), None)
    return rule.why if rule else next(filter(None, map(obstacle, (x.q, x.k, x.v))), None)


def forward_launch(x: Inputs, out: Tensor, lse: Tensor) -> Launch:
    """The kernel writing `out` and `lse`; `x` is one that :func:`refusal` lets pass."""
    from .gluon_forward import hopper_forward_kernel

    shape, pattern = x.shape, x.pattern
    ring = (WINDOW_RINGS if pattern.window_left >= 0 else RINGS)[shape.head_dim]
    blocks_m = triton.cdiv(shape.q_len, 2 * CONSUMER_ROWS)
    lse_sb, lse_sh = shape.lse_strides(lse)
    arguments = {
        "q_desc": _tiles_of(x.q, CONSUMER_ROWS), "k_desc": _tiles_of(x.k, ring.block_n),
        "v_desc": _tiles_of(x.v, ring.block_n), "Out": out, "Lse": lse,
        "SAux": x.q if x.s_aux is None else x.s_aux, "o_sb": out.stride(0),
        "lse_sb": lse_sb, "lse_sh": lse_sh, "blocks_m": blocks_m, "heads_q": shape.heads_q,
        "groups": shape.heads_q // shape.heads_kv, "q_len": shape.q_len, "k_len": shape.k_len,
        "left": pattern.window_left, "right": pattern.window_right, "scaling": pattern.scaling,
        "HAS_LEFT": pattern.window_left >= 0, "HAS_RIGHT": pattern.window_right >= 0,
        "HAS_S_AUX": x.s_aux is not None, "D": shape.head_dim, "ROWS": CONSUMER_ROWS,
        "BLOCK_N": ring.block_n, "STAGES": ring.stages,
    }  # fmt: skip
    grid = (blocks_m * shape.batch * shape.heads_q,)
    return Launch("hopper", hopper_forward_kernel, grid, arguments, num_warps=4, num_stages=1)


_GLUON_TYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16"}


def _tiles_of(x: Tensor, rows: int) -> Any:
    """`x` as :func:`.descriptors.tiles_of`, with the layout that its tiles have on the chip."""
    from triton.experimental.gluon import language as gl
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    plain = tiles_of(x, rows, x.shape[-1])
    dtype = getattr(gl, _GLUON_TYPES[x.dtype])
    layout = gl.NVMMASharedLayout.get_default_for(plain.block_shape, dtype)
    return TensorDescriptor(plain.base, plain.shape, plain.strides, plain.block_shape, layout)
