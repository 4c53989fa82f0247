"""Merge methods: the table of all of them. One file per method; each ends in a METHOD literal."""

from __future__ import annotations

from . import csvd, csvd_fit, first, mean, procrustes, random
from .method import LayerFacts, MergeMethod, Method

METHODS: dict[str, MergeMethod] = {
    module.METHOD.name: module.METHOD
    for module in (mean, first, random, procrustes, csvd, csvd_fit)
}


def method_named(name: str) -> MergeMethod:
    """The method called `name`. Raises ValueError, listing the known, for others."""
    if name not in METHODS:
        raise ValueError(f"unknown merge method {name!r}; known: {', '.join(sorted(METHODS))}")
    return METHODS[name]


__all__ = ["METHODS", "LayerFacts", "MergeMethod", "Method", "method_named"]
