"""One attention call, described; shapes as transformers has them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Call:
    """One attention call, as the layer made it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None  # one of mask_forms
    causal: bool = True
    window: int | None = None  # tokens, the query's own among them
    sinks: int = 0  # first tokens that the window does not hide
    scaling: float | None = None
    softcap: float | None = None
    dropout: float = 0.0
    s_aux: Tensor | None = None  # [Hq]
    position_bias: Tensor | None = None  # [B|1, H|1, Q|1, K], added
    cu_seqlens_q: Tensor | None = None
    cu_seqlens_k: Tensor | None = None
    max_seqlen_q: int = 0
    max_seqlen_k: int = 0


def one_dtype(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under autocast eager's matmuls run in the autocast dtype whatever comes in: so do ours."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(x.to(dtype) if x.dtype != dtype else x for x in tensors)
