"""What both engines share within one call, and how partial results are combined."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import Masks
from .tiling import Scoring


@dataclass(frozen=True, kw_only=True)
class Context:
    """One call: how scores are made, in which dtype sums are kept, the masks made so far."""

    scoring: Scoring
    dtype: torch.dtype  # of sums: float64 for float64, else float32
    seed: int = 0  # of dropout
    masks: Masks = field(init=False)
    _buffers: dict[str, Tensor] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "masks", Masks(self.scoring, self.dtype))

    def buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory that the next tile uses again: fresh memory costs page faults."""
        count = math.prod(shape)
        whole = self._buffers.get(name)
        if whole is None or whole.numel() < count or whole.dtype != dtype:
            whole = self._buffers[name] = torch.empty(count, dtype=dtype)
        return whole[:count].view(shape)


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def combine(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from that over each.

    out ``[..., D]`` and lse ``[...]`` in the dtype of sums; an lse of -inf marks an empty set.
    """
    lse = torch.logaddexp(lse1, lse2)
    safe = lse.masked_fill(torch.isneginf(lse), 0.0)
    weight1, weight2 = (lse1 - safe).exp_(), (lse2 - safe).exp_()
    return out1 * weight1[..., None] + out2 * weight2[..., None], lse
