"""Tile sizes and splits of the decode kernel: a table by chip family, dtype and head_dim.

Decode waits for memory, so the tables aim at bytes in flight: two or three stages of K and V tiles,
small enough that two blocks share a multiprocessor. The larger tiles serve a prefill that reads its
keys from pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class DecodeConfig:
    """One tile: `block_m` rows of (token, head in group) against `block_n` keys."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None = None  # as in `config.Tiles`


# (bytes of an element, largest padded head_dim) -> tiles, fewest rows first
Table = dict[tuple[int, int], tuple[DecodeConfig, ...]]

# 160 KiB of shared memory and more
NVIDIA: Table = {
    (2, 64): (
        DecodeConfig(16, 128, 4, 3),
        DecodeConfig(32, 128, 4, 3),
        DecodeConfig(64, 64, 4, 3),
        DecodeConfig(128, 64, 8, 3),
    ),
    (2, 128): (
        DecodeConfig(16, 64, 4, 3),
        DecodeConfig(32, 64, 4, 3),
        DecodeConfig(64, 64, 4, 2),
        DecodeConfig(128, 64, 8, 2),
    ),
    (2, 256): (
        DecodeConfig(16, 32, 4, 3),
        DecodeConfig(32, 32, 4, 3),
        DecodeConfig(64, 32, 8, 2),
    ),
    (2, 512): (DecodeConfig(16, 16, 4, 3), DecodeConfig(32, 16, 8, 2)),
    # capped, or the assembler would rather spill than give up a block of a multiprocessor
    (4, 64): (DecodeConfig(16, 64, 4, 2, 255), DecodeConfig(32, 32, 4, 2)),
    (4, 128): (DecodeConfig(16, 32, 4, 2, 255), DecodeConfig(32, 32, 8, 2, 128)),
    (4, 256): (DecodeConfig(16, 16, 4, 2),),
    (4, 512): (DecodeConfig(16, 16, 8, 2),),
}

# the same where another assembler spills: more stages or fewer keys
SM_80: Table = NVIDIA | {
    (2, 128): (
        *NVIDIA[2, 128][:2],
        DecodeConfig(64, 32, 4, 3),
        DecodeConfig(128, 32, 8, 2),
    ),
    (2, 256): (*NVIDIA[2, 256][:2], DecodeConfig(64, 32, 8, 3)),
    (4, 256): (DecodeConfig(16, 16, 4, 2, 255),),
    (4, 512): (DecodeConfig(16, 16, 8, 2, 255),),
}
SM_100: Table = NVIDIA | {
    (2, 128): (DecodeConfig(16, 64, 4, 3, 255), *NVIDIA[2, 128][1:]),
}

# 64 KiB of shared memory for a block, which is all that gfx942 has
SMALL: Table = {
    (2, 64): (
        DecodeConfig(16, 128, 4, 2),
        DecodeConfig(64, 64, 4, 2),
        DecodeConfig(128, 64, 4, 2),
    ),
    (2, 128): (
        DecodeConfig(16, 64, 4, 2),
        DecodeConfig(64, 64, 4, 2),
        DecodeConfig(128, 64, 8, 1),
    ),
    (2, 256): (DecodeConfig(16, 32, 4, 2), DecodeConfig(64, 32, 4, 1)),
    (2, 512): (DecodeConfig(16, 16, 4, 1),),
    (4, 64): (DecodeConfig(16, 64, 4, 1), DecodeConfig(32, 32, 4, 1)),
    (4, 128): (DecodeConfig(16, 32, 4, 1),),
    (4, 256): (DecodeConfig(16, 16, 4, 1),),
    (4, 512): (DecodeConfig(16, 16, 8, 1),),
}

# 99 KiB
SM_89: Table = SMALL | {
    (2, 64): (
        DecodeConfig(16, 128, 4, 2),
        DecodeConfig(64, 64, 4, 2),
        DecodeConfig(128, 64, 8, 2),
    ),
    (2, 128): (DecodeConfig(16, 64, 4, 2), DecodeConfig(64, 32, 8, 2, 255)),
    (2, 256): (DecodeConfig(16, 32, 4, 2), DecodeConfig(64, 32, 8, 2)),
    (4, 64): (DecodeConfig(16, 64, 4, 2, 255), DecodeConfig(32, 32, 4, 1)),
}
# AMD: a thread has twice the registers where a block has no more than four waves
GFX942: Table = SMALL | {(4, 512): (DecodeConfig(16, 16, 4, 1),)}

# float32 products run on the vector units, operands in registers: float8 keys that are widened on
# the way would spill beside a pipeline
FLOAT32_OVER_FLOAT8: Table = {
    (4, 64): (DecodeConfig(16, 64, 8, 1), DecodeConfig(32, 32, 4, 1)),
    (4, 128): (DecodeConfig(16, 32, 8, 1), DecodeConfig(32, 32, 8, 1)),
    (4, 256): (DecodeConfig(16, 16, 8, 1),),
    (4, 512): (DecodeConfig(16, 16, 8, 1),),
}

# the interpreter's tiles are small and unequal, so that short tests cross many tile borders
_TINY = (DecodeConfig(16, 32, 1, 1), DecodeConfig(32, 16, 1, 1))
INTERPRETER: Table = {(2, 512): _TINY, (4, 512): _TINY}

# rows are chips as `config.chip_of` names them
TABLES = {
    "sm_80": SM_80,
    "sm_89": SM_89,
    "sm_90": NVIDIA,
    "sm_100": SM_100,
    "gfx942": GFX942,
    "xpu": SMALL,
    "interpreter": INTERPRETER,
}

WIDENS_FLOAT8 = ("sm_90", "sm_100")  # by an instruction; the row of sm_89 is 8.6's too

BLOCKS_PER_PROCESSOR = 2  # of the 16-row tiles above
# what a split costs besides its keys, in tiles: its prologue, and its share of the combining kernel
SPLIT_TILES, REDUCE_TILES = 2, 2
MAX_SPLITS = 128


def padded(dim: int) -> int:
    """Tile width that holds `dim` columns: a power of two, 16 at least."""
    return max(16, 1 << (dim - 1).bit_length())


@lru_cache(maxsize=1024)
def config_for(chip: str, itemsize: int, dim: int, rows: int, stored: int) -> DecodeConfig:
    """The tile for `rows` rows: the smallest that holds them all, else the largest.

    Args:
        chip: a key of TABLES.
        itemsize: bytes of an element of q.
        dim: the larger head_dim of k and v.
        stored: bytes of an element of the cache.
    """
    table = TABLES[chip]
    if stored < itemsize == 4 and chip != "interpreter":
        table = FLOAT32_OVER_FLOAT8
    width = min(w for size, w in table if size == itemsize and w >= padded(dim))
    tiles = table[(itemsize, width)]
    return next((tile for tile in tiles if tile.block_m >= rows), tiles[-1])


@lru_cache(maxsize=16)
def processors(device: torch.device) -> int:
    """Multiprocessors (compute units, Xe cores) of `device`; 1 for the interpreter."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "xpu":
        return int(torch.xpu.get_device_properties(device).gpu_subslice_count)
    return 1


@lru_cache(maxsize=4096)
def choose_splits(programs: int, keys: int, block_n: int, processors: int) -> int:
    """Splits of the keys that finish first, by shapes alone.

    `programs` blocks each read up to `keys` keys. With s splits the machine runs
    ceil(programs * s / slots) waves, each as long as one split and its overhead; a partial last
    wave is what makes more splits pay even when the blocks outnumber the slots.
    """
    slots = processors * BLOCKS_PER_PROCESSOR
    tiles = -(-keys // block_n)

    def cost(splits: int) -> int:
        waves = -(-programs * splits // slots)
        combine = REDUCE_TILES if splits > 1 else 0
        return waves * (-(-tiles // splits) + SPLIT_TILES) + combine

    return min(range(1, max(1, min(MAX_SPLITS, tiles)) + 1), key=cost)
