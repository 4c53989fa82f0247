"""Attention over a PagedCache: the new keys go into their pages, the queries read pages in place.

Shape letters as in :mod:`..cache.page_storage`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from hf_attn_kernels import flash_attn_with_kvcache

from ..cache.page_storage import PagedLayer
from ..cache.step import DeviceTable, Step
from ..masking import formats

if TYPE_CHECKING:
    from .call import Call

INSTEAD = "use transformers' DynamicCache"


@torch.compiler.disable  # type: ignore[untyped-decorator]  # tables are kept in plain Python
def run(call: Call, layer: PagedLayer, dense: Callable[[Call], Tensor]) -> Tensor:
    """``[B, S, Hq, Dv]``; `dense` attends to the call's own keys alone.

    Raises:
        ValueError: a mask or a feature that pages cannot serve.
    """
    step, table = begin(call, layer)
    q, k, v = (x.transpose(1, 2) for x in (call.query, call.key, call.value))
    k, v = k.to(layer.compute_dtype), v.to(layer.compute_dtype)
    if step.fresh:  # nothing to read back
        layer.write(k, v, table.slots(step))
        return dense(call)
    # keys that all come at the end of their row are appended by the kernel itself
    together = step.whole and not table.doubles
    if together:
        layer.set_scales(k, v)
    else:
        layer.write(k, v, table.slots(step))
    k_pages, v_pages = layer.pages
    out = flash_attn_with_kvcache(
        q.to(layer.compute_dtype),
        k_pages,
        v_pages,
        k=k if together else None,
        v=v if together else None,
        cache_seqlens=step.held if together else step.grown,
        block_table=table.table,
        softmax_scale=call.scaling,
        causal=True,
        window_size=(-1 if call.window is None else call.window - 1, 0),
        softcap=call.softcap or 0.0,
        s_aux=call.s_aux,
        sink_tokens=call.sinks if call.window is not None else 0,
        k_descale=layer.k_descale,
        v_descale=layer.v_descale,
    )
    if together:
        layer.cache.wrote(layer)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out.contiguous()


def begin(call: Call, layer: PagedLayer) -> tuple[Step, DeviceTable]:
    """The step that a call is a layer's part of, and where its pages are.

    Raises:
        ValueError: a mask or a feature that pages cannot serve.
    """
    cache, (batch, _, new, _) = layer.cache, call.query.shape
    visible = formats.read(call.mask, layer.length + new)
    _check(call, layer, visible)
    return cache.enter(layer, batch, new, visible.padding), cache.on_device[layer.window]


def columns(
    layer: PagedLayer, step: Step, table: DeviceTable
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What a layer's pages hold, as the batch's columns: keys ``[B, Hkv, columns, D]``, values, and
    the mask ``[B, columns]`` of those that are tokens, None if all are.
    """
    assert table.table is not None
    size, width = layer.cache.page_size, step.length + step.new
    place = torch.arange(width, device=layer.device) - width + step.grown[:, None].long()
    page = table.table.gather(1, place.clamp_min(0) // size)  # [B, columns]
    held = (place >= 0) & (page >= 0)  # else padding, or behind the window
    page, inside = page.clamp_min(0).long(), place % size
    found = []
    for pages, descale in zip(layer.pages, (layer.k_descale, layer.v_descale), strict=True):
        x = pages[page, inside]  # [B, columns, Hkv, D]
        if descale is not None:
            x = x.float() * descale[:, None]
        x = x.to(layer.compute_dtype).masked_fill(~held[..., None, None], 0)
        found.append(x.transpose(1, 2))
    padded = any(count != width for count in step.after)
    return found[0], found[1], place >= 0 if padded else None


def _check(call: Call, layer: PagedLayer, visible: formats.Visible) -> None:
    kind = layer.cache.config.model_type
    wrong = None
    if not call.causal or not visible.banded or visible.dense is not None:
        wrong = "a mask of its own beside causality, windows and padding"
    elif visible.offsets is not None or call.cu_seqlens_q is not None:
        wrong = "packed sequences, which a cache cannot continue"
    elif call.position_bias is not None:
        wrong = "a position bias, which the kernels over pages do not add"
    elif call.dropout:
        wrong = "dropout, which belongs to training (model.eval() turns it off)"
    if wrong is not None:
        raise ValueError(
            f"a PagedCache cannot serve this {kind!r} model: it asks for {wrong}; {INSTEAD}"
        )
    if torch.is_grad_enabled() and call.key.requires_grad:
        raise ValueError(
            "a PagedCache keeps no gradients: call the model under torch.no_grad(), or train "
            "without a cache (use_cache=False)"
        )
    narrower = layer.window is None or (call.window is not None and call.window <= layer.window)
    if not narrower:
        raise ValueError(
            f"layer {layer.number} looks back {call.window or 'without a limit'}, but this cache "
            f"keeps {layer.window} tokens for it, as the model's config said: {INSTEAD}"
        )
