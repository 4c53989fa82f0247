"""What both engines share within one call, and how partial results are combined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .masks import Masks
from .tiling import Scoring

# PyTorch's own fused kernel: (q, k, v, dropout_p, is_causal, attn_mask=, scale=) -> (out, lse), on
# [B, H, S, D]; the masked-out row of its lse is 0
fused_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


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


def combine(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over disjoint sets of keys put together, from out ``[..., D]`` and lse ``[...]``
    over each; in the dtype of lse. An lse of -inf marks a set of which nothing is seen."""
    if len(parts) == 1:
        return parts[0]
    lses = torch.stack([lse for _, lse in parts])
    lse = torch.logsumexp(lses, dim=0)
    weights = (lses - lse.masked_fill(torch.isneginf(lse), 0.0)).exp_()
    out = torch.zeros_like(parts[0][0], dtype=lse.dtype)
    for (share, _), weight in zip(parts, weights.unbind(), strict=True):
        out.addcmul_(share.to(out.dtype), weight[..., None])
    return out, lse
