"""How well a paged cache uses its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .block_table import GONE, PageTables


@dataclass(frozen=True, kw_only=True)
class CacheStats:
    """Pages of all layer kinds together; bytes of keys and values.

    Args:
        internal_waste: percent of the used pages' places that hold no token.
        external_waste: percent of the memory that no sequence uses, kept pages not counted in.
        hit_rate: share of the tokens given to ``start()`` that were found in pages.
    """

    page_size: int  # tokens
    pages: int
    used: int
    free: int
    kept: int  # without an owner, found again by their contents
    shared: int  # with more than one owner
    bytes: int
    used_bytes: int
    internal_waste: float
    external_waste: float
    hit_rate: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def filled(tables: PageTables, tokens: Sequence[int]) -> int:
    """Places of the used pages that hold a token; a shared page counts once."""
    size = tables.page_size
    held: dict[int, int] = {}
    for row, count in zip(tables.rows, tokens, strict=True):
        for column, page in enumerate(row):
            if page != GONE:
                held[page] = max(held.get(page, 0), min(size, count - column * size))
    return sum(held.values())


def percent(part: float, whole: float) -> float:
    return 100 * part / whole if whole else 0.0
