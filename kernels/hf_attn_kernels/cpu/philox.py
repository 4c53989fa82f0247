"""Philox4x32-10 in torch integer ops: the same dropout as the Triton kernels, bit for bit.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). A weight's counter is
(key index in its sequence, query index in its sequence, row * heads + head, 0), its key the seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def first_word(seed: int, c0: Tensor, c1: Tensor, c2: Tensor) -> Tensor:
    """First output word of the counters (c0, c1, c2, 0), broadcast: int64 in [0, 2**32)."""
    c0, c1, c2 = torch.broadcast_tensors(c0, c1, c2)
    c3 = torch.zeros_like(c0)
    key0, key1 = seed & _LOW, (seed >> 32) & _LOW
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _LOW, (key1 + _WEYL[1]) & _LOW
    return c0


def _multiply(x: Tensor, factor: int) -> tuple[Tensor, Tensor]:
    """High and low word of x * factor. In halves: the full product would not fit a signed int64."""
    low, high = x & 0xFFFF, x >> 16
    part = low * factor
    carried = high * factor + (part >> 16)
    return carried >> 16, ((carried & 0xFFFF) << 16) | (part & 0xFFFF)


def keep_scale(
    seed: int, p: float, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype
) -> Tensor:
    """``[len(heads), len(queries), len(keys)]``: 0 where dropped, 1 / (1 - p) where kept.

    Args:
        heads: row * Hq + head of every entry, int64; queries, keys: indices within the sequence.
    """
    word = first_word(seed, keys[None, None, :], queries[None, :, None], heads[:, None, None])
    return (word >= int(p * 2**32)).to(dtype).div_(1.0 - p)
