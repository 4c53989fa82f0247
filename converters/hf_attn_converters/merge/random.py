"""K and V heads drawn anew, at the size of those they replace: the GQA paper's lower bound."""

from __future__ import annotations

import torch
from torch import Tensor

from ..families.layouts import LayerHeads
from .method import LayerFacts, MergeMethod


def merge(layer: LayerHeads, count: int, facts: LayerFacts) -> LayerHeads:
    generator = torch.Generator().manual_seed(facts.seed)
    return {part: _draw(heads, count, generator) for part, heads in sorted(layer.items())}


def _draw(heads: Tensor, count: int, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(count, *heads.shape[1:], generator=generator, dtype=heads.dtype)
    return drawn * heads.square().mean().sqrt()


METHOD = MergeMethod(
    name="random",
    summary="new K and V heads drawn at random; only a lower bound to compare others with",
    touches=("k", "v"),
    merge=merge,
)
