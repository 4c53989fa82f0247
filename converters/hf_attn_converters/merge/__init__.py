"""Merge methods: the table of all of them. One file per method; each ends in a METHOD literal."""

from __future__ import annotations

from . import mean
from .method import MergeMethod

METHODS: dict[str, MergeMethod] = {m.name: m for m in (mean.METHOD,)}


def method_named(name: str) -> MergeMethod:
    """The method called `name`. Raises ValueError, listing the known, for others."""
    if name not in METHODS:
        raise ValueError(f"unknown merge method {name!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


__all__ = ["METHODS", "MergeMethod", "method_named"]
