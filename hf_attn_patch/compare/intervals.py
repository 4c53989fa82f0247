"""How sure a mean over tokens is: standard errors of blocks, and the bootstrap over documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK = 64  # neighbouring tokens are correlated: errors are taken between blocks of this many
FEWEST_DOCUMENTS = 8  # with fewer of them, blocks are drawn instead
ROUNDS, CHUNK = 2000, 100

Interval = tuple[float, float]


def block_mean(values: Tensor) -> tuple[float, float]:
    """Mean of `values` [N] and its standard error, from the means of whole blocks of BLOCK.

    With fewer than two blocks the error is taken between single values; of one value it is NaN.
    """
    blocks = len(values) // BLOCK
    parts = values[: blocks * BLOCK].view(blocks, BLOCK).mean(1) if blocks > 1 else values
    error = parts.std().item() / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    return values.mean().item(), error


def blocks_of(count: int) -> Tensor:
    """The block that each of `count` tokens belongs to, [count] int64."""
    return torch.arange(count) // BLOCK


def bootstrap(values: Tensor, units: Tensor, seed: int = 0) -> Interval | None:
    """95% interval of the mean of `values` [N], drawing whole units.

    `units` [N] int64 says which unit each value is of. The percentile bootstrap of Koehn (2004).
    Values that are differences to the source on the same tokens make it a paired one; the same
    seed draws the same units for every candidate. None for fewer than two units.
    """
    _, index = units.unique(return_inverse=True)
    count = int(index.max()) + 1
    if count < 2:
        return None
    sums = torch.zeros(count, dtype=torch.float64).index_add(0, index, values.double())
    sizes = torch.bincount(index, minlength=count).double()
    generator = torch.Generator().manual_seed(seed)
    means = []
    for _ in range(ROUNDS // CHUNK):
        drawn = torch.randint(count, (CHUNK, count), generator=generator)
        means.append(sums[drawn].sum(1) / sizes[drawn].sum(1))
    ends = torch.cat(means).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    low, high = ends.tolist()
    return low, high
