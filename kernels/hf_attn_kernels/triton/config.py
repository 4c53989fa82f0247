"""Tile sizes: a table by chip, kernel, element size and head_dim. Nothing is tuned at run time.

An autotuner costs microseconds at every launch and picks other tiles in other runs; a table costs
one lookup. `scripts/aot_report.py` compiles every entry ahead of time and reports its shared
memory, registers and spills. Add a chip by adding its rows.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tiles:
    """Rows and columns of a tile and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    # of a thread: 128 let two blocks of 8 warps share a processor; 255 keep the assembler from
    # spilling a few to make room for one more block
    max_registers: int | None = None


KERNELS = ("forward", "dq", "dkdv", "joint", "bias_grad")
# what heads that run side by side may read again and again; H100 has 50 MB of cache, in two halves
CACHE_BYTES = 16 * 2**20
JOINT_HEAD_DIM = 128  # beyond it three accumulators leave too small a tile to gain anything
DELTA_ROWS = {"sm_100": 16}  # 64 elsewhere; there all loads come before the first sum
COPY_ENGINE = frozenset({"sm_90", "sm_100", "interpreter"})  # chips that take tensor descriptors

# head_dim is rounded up to one of these; rows below give one Tiles for each
HEAD_DIMS = (64, 128, 256, 512)

T = Tiles
Row = dict[str, dict[int, tuple[Tiles, ...]]]

# float32 goes through the vector units, where tiles differ little from chip to chip
_FP32: dict[str, tuple[Tiles, ...]] = {
    "forward": (T(64, 32, 8, 1), T(32, 32, 8, 1), T(16, 16, 4, 1), T(16, 16, 8, 1)),
    "dq": (T(32, 32, 8, 1), T(32, 32, 4, 1), T(16, 16, 4, 1)),
    "dkdv": (T(16, 32, 8, 1), T(16, 32, 8, 1), T(16, 16, 4, 1)),
    "joint": (T(32, 16, 8, 1), T(16, 32, 8, 1)),
    "bias_grad": (T(32, 32, 4, 1), T(32, 32, 8, 1), T(16, 16, 8, 1)),
}
# the same where another assembler spills: fewer threads, or one more stage
_FP32_80 = _FP32 | {
    "dq": (T(32, 32, 4, 2), T(32, 32, 4, 1), T(16, 16, 4, 1)),
    "dkdv": (T(16, 32, 4, 2), T(16, 32, 4, 2), T(16, 16, 4, 1)),
}
_FP32_100 = _FP32 | {
    "forward": (T(64, 32, 8, 2), T(32, 32, 8, 1), T(16, 16, 4, 1), T(16, 16, 8, 1)),
    "dq": (T(32, 32, 8, 1), T(32, 32, 4, 1), T(16, 16, 4, 2)),
    "dkdv": (T(16, 32, 8, 1), T(16, 32, 8, 1), T(16, 16, 4, 1, 255)),
}
_FP32_942 = _FP32 | {
    "dkdv": (T(16, 32, 8, 1), T(16, 32, 4, 1), T(16, 16, 4, 1)),
    "joint": (T(32, 16, 8, 1), T(16, 32, 4, 1)),
}


def _row(half: dict[str, tuple[Tiles, ...]], single: dict[str, tuple[Tiles, ...]] = _FP32) -> Row:
    return {
        kernel: {2: tiles, 4: single[kernel]} if kernel in single else {2: tiles}
        for kernel, tiles in half.items()
    }


# TABLE[chip][kernel][bytes of an element] = Tiles for head_dim up to 64, 128, 256 (forward: 512).
# Rows "<kernel> tma" serve the copy engine's way; for "window" and "heavy" at the end see `tiles`.
TABLE: dict[str, Row] = {
    "sm_80": _row({
        "forward": (T(128, 64, 8, 2), T(128, 32, 8, 3), T(64, 32, 8, 2), T(32, 32, 8, 1)),
        "dq": (T(64, 64, 8, 2), T(64, 32, 4, 2), T(64, 32, 8, 2)),
        "dkdv": (T(32, 64, 4, 2), T(32, 64, 8, 2), T(64, 32, 8, 2)),
        "dkdv window": (T(32, 64, 4, 2), T(32, 64, 8, 2), T(64, 32, 8, 2)),
        "dkdv heavy": (T(32, 64, 4, 2), T(32, 64, 8, 1), T(64, 32, 8, 2)),
        "joint": (T(32, 64, 4, 2), T(32, 64, 8, 2)),
        "joint window": (T(32, 64, 4, 2), T(32, 64, 8, 2)),
        "joint heavy": (T(32, 64, 8, 2), T(32, 64, 8, 2)),
        "bias_grad": (T(64, 64, 8, 1), T(32, 32, 4, 1), T(32, 32, 8, 1)),
    }, _FP32_80),
    "sm_89": _row({  # also 8.6 and 12.x: 99 KiB of shared memory
        "forward": (T(128, 64, 8, 2), T(128, 32, 8, 3), T(64, 32, 8, 1), T(32, 16, 8, 1)),
        "dq": (T(64, 64, 8, 2), T(64, 32, 4, 3), T(32, 32, 4, 2)),
        "dkdv": (T(32, 64, 4, 2), T(32, 64, 8, 2), T(32, 32, 8, 2)),
        "dkdv window": (T(32, 64, 4, 2), T(32, 64, 8, 2), T(32, 32, 8, 2)),
        "dkdv heavy": (T(32, 64, 4, 2), T(32, 64, 8, 1), T(32, 32, 8, 2)),
        "joint": (T(32, 64, 4, 2), T(32, 64, 8, 2)),
        "joint window": (T(32, 64, 4, 2), T(32, 64, 8, 2)),
        "joint heavy": (T(32, 64, 8, 2), T(32, 32, 4, 3)),
        "bias_grad": (T(64, 32, 8, 1), T(32, 32, 4, 1), T(32, 32, 8, 1)),
    }, _FP32_80),
    "sm_90": _row({
        "forward": (T(128, 128, 8, 2), T(128, 64, 8, 3), T(128, 64, 8, 2), T(64, 16, 8, 2)),
        "dq": (T(128, 64, 8, 2), T(128, 64, 8, 2), T(64, 64, 8, 2)),
        "dkdv": (T(64, 128, 8, 2), T(32, 128, 8, 2), T(32, 64, 8, 1)),
        "bias_grad": (T(64, 64, 4, 1), T(64, 64, 8, 1), T(32, 32, 8, 1)),
        "forward heavy": (T(128, 64, 8, 3), T(128, 64, 8, 3), T(128, 32, 8, 2), T(64, 16, 8, 2)),
        "dkdv heavy": (T(64, 128, 8, 2), T(32, 64, 8, 2), T(32, 32, 8, 2)),
        # with 128 registers two blocks fit, one multiplies while the other takes exponentials
        "forward tma": (
            T(128, 128, 8, 2, 128), T(128, 64, 8, 2, 128), T(128, 64, 8, 2), T(64, 16, 8, 2),
        ),
        "forward tma window": (
            T(128, 64, 8, 2, 128), T(128, 64, 8, 2, 128), T(128, 64, 8, 2), T(64, 16, 8, 2),
        ),
        "forward tma heavy": (
            T(128, 64, 8, 2), T(128, 64, 8, 2), T(128, 64, 8, 2), T(64, 16, 8, 2),
        ),
        "dq tma": (T(128, 64, 8, 2), T(128, 64, 8, 2), T(128, 32, 8, 2)),
        "dkdv tma": (T(64, 64, 4, 2), T(64, 64, 4, 2), T(64, 64, 8, 2)),
        "dkdv tma window": (T(64, 64, 4, 2), T(64, 64, 4, 2), T(32, 64, 8, 2)),
        "dkdv tma heavy": (T(64, 64, 4, 2), T(64, 64, 8, 2), T(32, 64, 8, 2)),
        "joint": (T(64, 64, 8, 2), T(32, 64, 8, 2)),
        "joint heavy": (T(32, 64, 8, 1), T(32, 64, 8, 1)),
        "joint tma": (T(64, 64, 4, 2), T(64, 64, 4, 2)),
        "joint tma window": (T(64, 64, 4, 2), T(64, 64, 8, 2)),
        "joint tma heavy": (T(64, 64, 4, 2), T(64, 64, 8, 2)),
    }),
    "gfx942": _row({  # 64 KiB of LDS
        "forward": (T(128, 64, 4, 1), T(128, 32, 4, 1), T(64, 32, 4, 1), T(16, 16, 4, 1)),
        "dq": (T(64, 64, 4, 1), T(64, 32, 4, 1), T(32, 32, 4, 1)),
        "dkdv": (T(64, 64, 4, 1), T(32, 32, 4, 1), T(32, 32, 4, 1)),
        "joint": (T(64, 64, 4, 1), T(32, 32, 4, 1)),
        "bias_grad": (T(32, 32, 4, 1), T(32, 32, 4, 1), T(16, 16, 4, 1)),
    }, _FP32_942),
}  # fmt: skip
# the same shared memory; accumulators lie in a memory of their own, products are twice as fast
TABLE["sm_100"] = TABLE["sm_90"] | _row({
    "forward": (T(128, 128, 8, 1), T(128, 64, 8, 3), T(128, 32, 8, 2), T(64, 16, 8, 2)),
    "dq": (T(128, 64, 8, 2), T(128, 64, 8, 2, 255), T(64, 64, 8, 2)),
    "dkdv": (T(64, 128, 8, 2), T(32, 128, 8, 1), T(32, 32, 8, 2)),
    "forward heavy": (T(128, 64, 8, 3), T(128, 64, 8, 1), T(128, 32, 8, 2), T(64, 16, 8, 2)),
    "dkdv heavy": (T(64, 128, 8, 2), T(32, 64, 4, 1), T(32, 32, 8, 2)),
    "forward tma": (T(128, 128, 8, 2), T(128, 128, 8, 2), T(128, 64, 8, 2), T(64, 16, 8, 2)),
    "forward tma window": (T(128, 64, 4, 2), T(128, 64, 8, 2), T(128, 64, 8, 2), T(64, 16, 8, 2)),
    "forward tma heavy": (T(128, 64, 4, 2), T(128, 64, 8, 2), T(128, 64, 8, 2), T(64, 16, 8, 2)),
    "dkdv tma": (T(64, 64, 4, 2), T(64, 64, 8, 2), T(64, 32, 8, 2)),
    "dkdv tma window": (T(64, 64, 4, 2), T(64, 64, 8, 2), T(32, 64, 8, 1)),
    "dkdv tma heavy": (T(64, 64, 4, 2), T(64, 64, 8, 2), T(32, 64, 8, 1)),
    "joint tma": (T(64, 64, 4, 2), T(64, 64, 8, 2)),
    "joint tma heavy": (T(64, 64, 4, 2), T(64, 64, 4, 1)),
}, _FP32_100)  # fmt: skip
TABLE["xpu"] = TABLE["sm_89"]  # not measured: the smallest tiles
# the interpreter's tiles are small and unequal, so that short tests cross many tile borders
TABLE["interpreter"] = {k: {2: (T(32, 16, 4, 1),) * 4, 4: (T(32, 16, 4, 1),) * 4} for k in KERNELS}


@functools.cache
def chip_of(device_type: str, index: int | None) -> str:
    """Row of the table for a device: its own, or that of the nearest chip it resembles.

    Raises:
        ValueError: a device without a row.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "interpreter"
    if device_type == "xpu":
        return "xpu"
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return "gfx942"
    return chip_of_capability(properties.major, properties.minor)


def chip_of_capability(major: int, minor: int) -> str:
    """NVIDIA compute capability -> row of the table.

    Raises:
        ValueError: older than Ampere (no bfloat16 tensor cores).
    """
    if major < 8:
        raise ValueError(
            f"compute capability {major}.{minor} is not supported; the Triton kernels need 8.0 "
            "(Ampere) or newer. Use attn_implementation='sdpa' on this GPU."
        )
    if major == 8:
        return "sm_80" if minor == 0 else "sm_89"
    if major == 9:
        return "sm_90"
    return "sm_100" if major in (10, 11) else "sm_89"  # 12.x: 99 KiB of shared memory, like 8.9


# the rows that serve a kind of call, the best first; "" has neither a window nor costly features
_KINDS = {"": ("",), "window": (" window", " heavy", ""), "heavy": (" heavy", "")}


def tiles(
    kernel: str, chip: str, itemsize: int, head_dim: int, *, kind: str = "", tma: bool = False
) -> Tiles:
    """The entry for a kernel.

    Args:
        head_dim: the larger of q's and v's.
        kind: "window" with a left window, "heavy" with what holds yet more values at once (softcap,
            ALiBi, bias, dropout, always visible tokens), else "".
        tma: the copy engine brings the tiles, which saves registers.

    Raises:
        ValueError: this kernel has no tiles for so large a head_dim.
    """
    table = TABLE[chip]
    ways = (f"{kernel} tma", kernel) if tma else (kernel,)
    names = (way + end for way in ways for end in _KINDS[kind])
    row = next(table[name][itemsize] for name in names if itemsize in table.get(name, ()))
    for limit, entry in zip(HEAD_DIMS, row, strict=False):
        if head_dim <= limit:
            return entry
    raise ValueError(
        f"{kernel} supports head_dim up to {HEAD_DIMS[len(row) - 1]}, got {head_dim}; "
        "use attn_implementation='sdpa'"
    )
