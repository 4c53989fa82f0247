"""Changing the number of KV heads of one layer: exact expansion, then merging.

transformers maps query head h to KV head h // (Hq / Hkv), so the members of a group are
neighbours: expansion repeats each head in place, merging combines neighbours.
"""

from __future__ import annotations

import math

from torch import Tensor

from ..families.layouts import KV_ROLES, LayerHeads
from .method import LayerFacts, MergeMethod


def check_kv_heads(*, query_heads: int, before: int, after: int) -> None:
    """Raises ValueError unless `after` KV heads can serve `query_heads` query heads."""
    if after < 1 or query_heads % after:
        possible = [n for n in range(1, query_heads + 1) if query_heads % n == 0]
        raise ValueError(
            f"{after} KV heads cannot serve {query_heads} query heads; "
            f"possible: {', '.join(map(str, possible))}"
        )
    if query_heads % before:
        raise ValueError(
            f"the source is broken: its {before} KV heads do not divide "
            f"its {query_heads} query heads"
        )
    if before == after:
        raise ValueError(f"the source already has {after} KV heads: nothing to convert")


def is_exact(before: int, after: int) -> bool:
    """Whether the change loses nothing: each source head is only repeated."""
    return after % before == 0


def expand(heads: Tensor, count: int) -> Tensor:
    """[H, D, ...] -> [count, D, ...], each head repeated count / H times; exact."""
    assert count % heads.shape[0] == 0, (count, heads.shape)
    repeats = count // heads.shape[0]
    return heads if repeats == 1 else heads.repeat_interleave(repeats, dim=0)


def change_kv_heads(
    layer: LayerHeads, after: int, method: MergeMethod, facts: LayerFacts | None = None
) -> LayerHeads:
    """One layer in canonical form with its KV heads changed to `after`.

    6 -> 4 of 12 goes through 12: both divide the query heads, so their least common multiple
    does too, and expanding to it costs nothing in quality. The source's tensors stay as they are.
    """
    before = next(t.shape[0] for part, t in layer.items() if part.role in KV_ROLES)
    common = math.lcm(before, after)
    wide = {p: expand(t, common) if p.role in KV_ROLES else t for p, t in layer.items()}
    if common == after:
        return wide
    touched = {part: x for part, x in wide.items() if part.role in method.touches}
    return {**wide, **method.merge(touched, after, facts or LayerFacts())}
