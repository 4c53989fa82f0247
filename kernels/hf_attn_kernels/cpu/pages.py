"""Keys or values that lie in pages, read as if they were one row of a dense cache."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor


class PagedKeys:
    """One sequence of a paged cache ``[pages, page_size, H, D]``; behaves like ``[1, K, H, D]``.

    Only the pages of the range asked for are touched. Neighbouring pages in order are not copied.
    """

    def __init__(self, cache: Tensor, pages: list[int], first: int = 0) -> None:
        self.cache = cache
        self.pages = pages
        self.first = first  # key that counts as 0

    @property
    def shape(self) -> torch.Size:
        size = self.cache.shape[1]
        return torch.Size((1, len(self.pages) * size - self.first, *self.cache.shape[2:]))

    @property
    def dtype(self) -> torch.dtype:
        return self.cache.dtype

    def starting_at(self, key: int) -> PagedKeys:
        return PagedKeys(self.cache, self.pages, self.first + key)

    def gathered_elements(self, keys: int) -> int:
        """Elements that gathering a range of `keys` keys may take: whole pages at both ends."""
        return (keys + 2 * self.cache.shape[1]) * math.prod(self.cache.shape[2:])

    def read(self, k0: int, k1: int, near: Tensor | None = None) -> Tensor:
        """Keys ``k0 <= j < k1``: ``[1, k1 - k0, H, D]``, gathered into the flat `near` if given."""
        size = self.cache.shape[1]
        k0, k1 = k0 + self.first, k1 + self.first
        start = k0 // size
        pages = self.pages[start : -(-k1 // size)]
        if pages == list(range(pages[0], pages[0] + len(pages))):
            found = self.cache[pages[0] : pages[-1] + 1]
        else:
            shape = (len(pages), *self.cache.shape[1:])
            found = self.cache.new_empty(shape) if near is None else near[: math.prod(shape)]
            found = found.view(shape)
            torch.index_select(self.cache, 0, torch.tensor(pages), out=found)
        return found.flatten(0, 1)[None, k0 - start * size : k1 - start * size]


Keys: TypeAlias = Tensor | PagedKeys  # keys or values as an engine reads them, by ranges


def read_range(x: Keys, k0: int, k1: int, near: Tensor | None = None) -> Tensor:
    """``[b, k1 - k0, H, D]``; a view, unless pages had to be gathered (into `near`, if given)."""
    return x.read(k0, k1, near) if isinstance(x, PagedKeys) else x[:, k0:k1]
