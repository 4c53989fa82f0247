"""One layer of a conversion, and the configuration that the result needs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .kv_heads import change_kv_heads
from .plan import EXACT, Work, parts_of


def convert_layer(work: Work, layer: int) -> dict[str, Tensor]:
    """The rewritten tensors of one layer by name, in their stored dtype and form."""
    layout, plan = work.family.layout, work.plan
    names = parts_of(work, layer)
    heads, dtypes = {}, {}
    for part, name in names.items():
        tensor = work.source.read(name)
        if not tensor.isfinite().all():
            raise ValueError(f"{name} holds NaN or infinity: the source checkpoint is damaged")
        dtypes[part] = tensor.dtype
        count = plan.kv_heads_before if part.role in ("k", "v") else plan.query_heads
        if plan.method != EXACT:
            tensor = tensor.to(_wider(tensor.dtype))
        heads[part] = layout.split(tensor, part, count)
    result = change_kv_heads(heads, plan.kv_heads_after, work.method)
    return {name: layout.join(result[part].to(dtypes[part]), part) for part, name in names.items()}


def _wider(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize == 2 else torch.float64


def config_after(work: Work) -> dict[str, Any]:
    """The source's config with head counts spelled out: absent, some families assume others."""
    return {
        **work.source.config,
        work.family.kv_heads_key: work.plan.kv_heads_after,
        work.family.head_dim_key: work.plan.head_dim,
    }
