"""The first head of each group stands for all of it (Ainslie et al., 2305.13245)."""

from __future__ import annotations

from ..families.layouts import LayerHeads
from .method import LayerFacts, MergeMethod


def merge(layer: LayerHeads, count: int, facts: LayerFacts) -> LayerHeads:
    return {part: heads[:: heads.shape[0] // count] for part, heads in layer.items()}


METHOD = MergeMethod(
    name="first",
    summary="the first K and V head of each group; needs no data, loses most of the rest",
    touches=("k", "v"),
    merge=merge,
)
