"""Whether two models hold the same weights, tensor by tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..loading import LoadedModel

NAMED = 3


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One candidate's weights against the source's, as loaded; bit by bit."""

    label: str
    tensors: int
    different: int  # same name and shape, other values
    unmatched: int  # of another shape, or without a counterpart
    examples: tuple[str, ...] = ()  # names of the first different ones

    @property
    def same(self) -> bool:
        return not (self.different or self.unmatched)


def compare_weights(models: Sequence[LoadedModel]) -> list[Weights]:
    """One per candidate; the first model is the source."""
    source = dict(models[0].model.named_parameters())
    found = []
    for loaded in models[1:]:
        mine = dict(loaded.model.named_parameters())
        alike = [
            name
            for name in source.keys() & mine.keys()
            if source[name].shape == mine[name].shape and source[name].dtype == mine[name].dtype
        ]
        # NaN differs from itself, so a broken model is never called the same
        other = sorted(n for n in alike if not torch.equal(source[n], mine[n].to(source[n].device)))
        found.append(
            Weights(
                label=loaded.label,
                tensors=len(mine),
                different=len(other),
                unmatched=len(source.keys() | mine.keys()) - len(alike),
                examples=tuple(other[:NAMED]),
            )
        )
    return found
