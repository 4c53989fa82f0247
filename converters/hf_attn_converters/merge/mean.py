"""Mean pooling: each new KV head is the mean of its group (Ainslie et al., 2305.13245)."""

from __future__ import annotations

from torch import Tensor

from ..families.layouts import LayerHeads
from .method import LayerFacts, MergeMethod


def pool(heads: Tensor, count: int) -> Tensor:
    """[H, D, ...] -> [count, D, ...]: the mean of each H / count neighbours."""
    groups = heads.reshape(count, -1, *heads.shape[1:])  # [count, g, D, ...]
    # Sum and divide rather than mean(): n equal half-precision values sum exactly in float32
    # (float32 in float64), so pooling an expansion gives back its source bit by bit.
    return groups.sum(dim=1).div(groups.shape[1])


def merge(layer: LayerHeads, count: int, facts: LayerFacts) -> LayerHeads:
    return {part: pool(heads, count) for part, heads in layer.items()}


METHOD = MergeMethod(
    name="mean",
    summary="mean of each group's K and V; needs no data, loses much without uptraining",
    touches=("k", "v"),
    merge=merge,
)
