"""Attention weights, for ``output_attentions=True``: a pass of its own that the kernels never make.

It costs what eager attention costs, ``[B, Hq, Q, K]``, and only where it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..masking import formats
from . import packing

if TYPE_CHECKING:
    from .call import Call


def attention_weights(call: Call) -> Tensor:
    """``[B, Hq, Q, K]`` in the query's dtype: the softmax of a call's scores, before dropout.

    A row that sees no key has weights of 0. Sink logits (`s_aux`) take their share, as eager
    attention has it, and are not among the columns.
    """
    query, key = call.query, call.key
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if call.scaling is None else call.scaling
    scores = query.float() @ key.repeat_interleave(groups, dim=1).float().mT * scale
    if call.softcap:
        scores = torch.tanh(scores / call.softcap) * call.softcap
    if call.position_bias is not None:
        scores = scores + call.position_bias[..., : scores.shape[-1]]
    visible = formats.read(call.mask, key.shape[2])
    if visible.dense is not None and visible.dense.is_floating_point():
        scores = scores + visible.dense
    seen = _seen(call, visible)
    scores = scores.masked_fill(~seen, float("-inf"))
    if call.s_aux is not None:
        sinks = call.s_aux.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    weights = scores.softmax(-1)[..., : key.shape[2]]
    return weights.masked_fill(~seen.any(-1, keepdim=True), 0.0).to(query.dtype)


def _seen(call: Call, visible: formats.Visible) -> Tensor:
    """``[B|1, H|1, Q, K]`` bool: who sees whom."""
    queries, keys, device = call.query.shape[2], call.key.shape[2], call.query.device
    column = torch.arange(keys, device=device)[None]
    seen = (column < visible.keys).expand(queries, keys)[None, None]
    offsets_q, offsets_k = call.cu_seqlens_q, call.cu_seqlens_k
    if offsets_q is None:
        offsets_q = offsets_k = visible.offsets
    if offsets_q is not None and offsets_k is not None:
        seen = seen & packing.same_document(offsets_q, offsets_k, queries, keys)
    if visible.banded:
        row = torch.arange(queries, device=device)[:, None] + visible.keys - queries
        if call.causal:
            seen = seen & (column <= row)
        if call.window is not None:
            near = column > row - call.window
            near = (
                near | (column < call.sinks) if call.causal else near & (column < row + call.window)
            )
            seen = seen & near
    for part in (visible.padding, visible.dense):
        if part is not None and part.dtype == torch.bool:
            wide = part[:, None, None] if part.dim() == 2 else part
            seen = seen & torch.nn.functional.pad(wide, (0, keys - wide.shape[-1]))
    return seen
