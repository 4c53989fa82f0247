"""Tiles of the MLA decode kernel: a table by chip family, element size and rank.

The accumulator is as wide as the latent, so a tile takes a whole processor: one block each, and
splits are counted for that.
"""

from __future__ import annotations

from functools import lru_cache

from .decode_config import DecodeConfig, padded

# (bytes of an element of q, largest padded rank) -> tiles, fewest rows first
Table = dict[tuple[int, int], tuple[DecodeConfig, ...]]

SM_90: Table = {
    (2, 256): (DecodeConfig(16, 64, 4, 3), DecodeConfig(64, 64, 8, 3)),
    (2, 512): (DecodeConfig(16, 32, 8, 3), DecodeConfig(64, 64, 8, 2)),
    (4, 256): (DecodeConfig(16, 16, 8, 1),),
    (4, 512): (DecodeConfig(16, 16, 8, 1),),
}
# 64 rows go through tensor memory and some calls spilled; 32 go through registers
SM_100: Table = SM_90 | {
    (2, 512): (DecodeConfig(16, 64, 8, 3), DecodeConfig(32, 64, 8, 2)),
    (4, 256): (DecodeConfig(16, 16, 8, 1, 128),),
}
SM_80: Table = {
    (2, 256): (DecodeConfig(16, 64, 4, 2), DecodeConfig(64, 32, 8, 2)),
    (2, 512): (DecodeConfig(16, 32, 4, 2), DecodeConfig(32, 32, 8, 2)),
    (4, 256): (DecodeConfig(16, 16, 8, 1),),
    (4, 512): (DecodeConfig(16, 16, 8, 1),),
}
# 64 KiB of shared memory
SMALL: Table = {
    (2, 256): (DecodeConfig(16, 32, 4, 1), DecodeConfig(32, 32, 8, 1)),
    (2, 512): (DecodeConfig(16, 16, 4, 1), DecodeConfig(32, 16, 8, 1)),
    (4, 256): (DecodeConfig(16, 16, 8, 1),),
    (4, 512): (DecodeConfig(16, 16, 8, 1),),
}
# a thread has twice the registers where a block has no more than four waves
GFX942: Table = SMALL | {
    (2, 256): (DecodeConfig(16, 32, 4, 1), DecodeConfig(32, 32, 4, 1)),
    (4, 512): (DecodeConfig(16, 16, 4, 1),),
}
# small and unequal, so that short tests cross many tile borders
_TINY = (DecodeConfig(16, 32, 1, 1), DecodeConfig(32, 16, 1, 1))
INTERPRETER: Table = {(2, 512): _TINY, (4, 512): _TINY}

# rows are chips as `config.chip_of` names them
TABLES = {
    "sm_80": SM_80,
    "sm_89": SMALL,  # 99 KiB
    "sm_90": SM_90,
    "sm_100": SM_100,
    "gfx942": GFX942,
    "xpu": SMALL,
    "interpreter": INTERPRETER,
}
# (chip, bytes, padded rank) -> tiles over float8, where widening beside those above spills
FLOAT8: dict[tuple[str, int, int], tuple[DecodeConfig, ...]] = {
    ("sm_80", 2, 256): (DecodeConfig(16, 32, 4, 2), SM_80[2, 256][1]),
    ("sm_80", 2, 512): SM_80[2, 512][:1],
    ("sm_100", 2, 512): SM_100[2, 512][:1],
}
MAX_RANK, MAX_ROPE = 512, 128


@lru_cache(maxsize=1024)
def config_for(chip: str, itemsize: int, rank: int, rows: int, stored: int) -> DecodeConfig:
    """The tile for `rows` rows of heads and queries: the smallest that holds them, else the last.

    Args:
        chip: a key of TABLES.
        itemsize: bytes of an element of q.
        rank: columns of the latent, at most MAX_RANK.
        stored: bytes of an element of the cache.
    """
    table = TABLES[chip]
    width = min(w for size, w in table if size == itemsize and w >= padded(rank))
    tiles = table[(itemsize, width)]
    if stored < itemsize:
        tiles = FLOAT8.get((chip, itemsize, width), tiles)
    return next((tile for tile in tiles if tile.block_m >= rows), tiles[-1])
