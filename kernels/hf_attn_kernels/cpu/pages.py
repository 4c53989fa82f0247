"""Keys or values that lie in pages, read as if they were one row of a dense cache."""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor

from ..fp8 import is_float8, widened


class PagedKeys:
    """One sequence of a paged cache ``[pages, page_size, H, D]``; behaves like ``[1, K, H, D]``.

    Only the pages of the range asked for are touched. Neighbouring pages in order are not copied.
    A float8 cache reads as `dtype`, times `descale` ``[H]``: that range, never the whole cache.
    """

    def __init__(
        self,
        cache: Tensor,
        pages: Tensor,  # [max_blocks] int32
        first: int = 0,
        dtype: torch.dtype | None = None,
        descale: Tensor | None = None,
    ) -> None:
        self.cache = cache
        self.pages = pages
        self.first = first  # key that counts as 0
        self.dtype = dtype or cache.dtype
        self.descale = descale

    @property
    def shape(self) -> torch.Size:
        size = self.cache.shape[1]
        return torch.Size((1, self.pages.shape[0] * size - self.first, *self.cache.shape[2:]))

    def starting_at(self, key: int) -> PagedKeys:
        return PagedKeys(self.cache, self.pages, self.first + key, self.dtype, self.descale)

    def gathered_elements(self, keys: int) -> int:
        """Elements that gathering a range of `keys` keys may take: whole pages at both ends."""
        beyond = 0 if is_float8(self.cache) else 2 * self.cache.shape[1]
        return (keys + beyond) * math.prod(self.cache.shape[2:])

    def read(self, k0: int, k1: int, near: Tensor | None = None) -> Tensor:
        """Keys ``k0 <= j < k1``: ``[1, k1 - k0, H, D]``, copied into the flat `near` if given.

        Raises:
            ValueError: the table has no page for some of them.
        """
        size = self.cache.shape[1]
        k0, k1 = k0 + self.first, k1 + self.first
        start = k0 // size
        index = self.pages[start : -(-k1 // size)]
        pages = index.tolist()
        if min(pages) < 0:
            raise ValueError(
                f"block_table has no page (a negative entry) for keys that a query sees: keys {k0} "
                f"to {k1 - 1} of a row lie in pages {pages[:8]}{' ...' if len(pages) > 8 else ''}; "
                "only pages that a window hides may be missing"
            )
        widen = is_float8(self.cache)
        if pages == list(range(pages[0], pages[0] + len(pages))):
            found = self.cache[pages[0] : pages[-1] + 1]
        else:
            found = _gather(self.cache, index, None if widen else near)
        found = found.flatten(0, 1)[None, k0 - start * size : k1 - start * size]
        return self._widened(found, near) if widen else found

    def _widened(self, stored: Tensor, near: Tensor | None) -> Tensor:
        wide = widened(stored, self.descale, torch.promote_types(self.dtype, torch.float32))
        if near is None:
            return wide.to(self.dtype)
        return near[: wide.numel()].view(wide.shape).copy_(wide)


def _gather(cache: Tensor, pages: Tensor, near: Tensor | None) -> Tensor:
    """``[pages, page_size, H, D]``."""
    if near is None:
        return cache.index_select(0, pages)
    shape = (pages.shape[0], *cache.shape[1:])
    return torch.index_select(cache, 0, pages, out=near[: math.prod(shape)].view(shape))


Keys: TypeAlias = Tensor | PagedKeys  # keys or values as an engine reads them, by ranges


def read_range(x: Keys, k0: int, k1: int, near: Tensor | None = None) -> Tensor:
    """``[b, k1 - k0, H, D]``; a view, unless pages had to be gathered (into `near`, if given)."""
    return x.read(k0, k1, near) if isinstance(x, PagedKeys) else x[:, k0:k1]
