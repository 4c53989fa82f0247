"""transformers' attention call turned into a kernel call.

Shapes as transformers has them: query ``[B, Hq, Q, D]``, key ``[B, Hkv, K, D]``, value
``[B, Hkv, K, Dv]`` (key and value heads are not repeated); the answer is ``[B, Q, Hq, Dv]``. Head
counts come from the tensors only: under tensor parallelism the config's are too large.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_attn_kernels import flash_attn_func, flash_attn_varlen_func
from hf_attn_kernels.dispatch import plain_attention

from ..cache.page_storage import layer_of
from ..masking import formats
from ..swa_config import SwaSettings
from ..transformers_compat import compat
from . import keywords, packing, paged
from .call import Call, one_dtype
from .weights import attention_weights


def attend(
    name: str,
    settings: SwaSettings,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    position_ids: Tensor | None = None,
    indices: Tensor | None = None,
    cache: Any = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    output_attentions: bool = False,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of the implementation `name`; see :mod:`..registration.functions`.

    Args:
        position_ids: ``[1, Q]``, read only to tell packed sequences apart, see :mod:`.packing`.
        indices: ``[B, Q, n]``, the only keys that each query sees besides what the mask hides
            (DeepSeek's sparse attention); served by a dense mask.
        output_attentions: return the weights ``[B, Hq, Q, K]`` too; they cost a pass of their own.

    Raises:
        ValueError: a mask, a cache or a keyword that it does not read.
    """
    if cache is not None:
        raise ValueError(
            f"attn_implementation={name!r} got the cache of continuous batching (generate_batch), "
            "which it does not read; use attn_implementation='triton_paged_flash2'"
        )
    if kwargs:
        keywords.refuse_unserved(name, kwargs)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None and attention_mask.dtype == formats.STATED:
        attention_mask, causal = formats.unstated(attention_mask), True
    if indices is not None:
        attention_mask = _only(indices, attention_mask, key, bool(causal))
    window = sliding_window
    if causal and settings.window is not None:
        window = settings.narrow(sliding_window)
    packed = cu_seq_lens_q is not None and cu_seq_lens_k is not None
    if not packed and cu_seq_lens_q is not cu_seq_lens_k:
        raise ValueError(
            "packed sequences are told by cu_seq_lens_q and cu_seq_lens_k together, got only one "
            "of them: pass both, the same tensor for self-attention"
        )
    longest_q, longest_k = max_length_q, max_length_k
    if not packed and packing.may_be_packed(position_ids, query.shape[0], query.shape[2]):
        told = documents_of(position_ids, attention_mask, query, key)
        if told is not None:
            packed, (cu_seq_lens_q, longest_q) = True, told
            cu_seq_lens_k, longest_k = cu_seq_lens_q, longest_q
    weights = compat.records_attentions() if not output_attentions else True
    # a small model's decode step is over before the call is described
    if (
        attention_mask is s_aux is position_bias is cu_seq_lens_q is cu_seq_lens_k is None
        and scaling
        and not (dropout or softcap or settings.sinks or weights)
        and layer_of(key) is None
    ):
        left = -1 if window is None else window - 1
        out = plain_attention(query, key, value, scaling, causal=bool(causal), window_left=left)
        if out is not None:
            return out, None
    call = Call(
        query=query,
        key=key,
        value=value,
        mask=attention_mask,
        causal=bool(causal),
        window=window,
        sinks=settings.sinks if causal else 0,
        scaling=scaling,
        softcap=softcap,
        dropout=dropout,
        s_aux=s_aux,
        position_bias=position_bias,
        cu_seqlens_q=cu_seq_lens_q if packed else None,
        cu_seqlens_k=cu_seq_lens_k if packed else None,
        max_seqlen_q=query.shape[0] * query.shape[2] if longest_q is None else int(longest_q),
        max_seqlen_k=key.shape[0] * key.shape[2] if longest_k is None else int(longest_k),
    )
    if not weights:
        return run(call), None
    if layer_of(key) is not None:
        raise ValueError(
            "output_attentions with a PagedCache is not possible: earlier keys lie in pages. Use "
            "transformers' DynamicCache for that call."
        )
    return run(call), attention_weights(call)


def _only(indices: Tensor, mask: Tensor | None, key: Tensor, causal: bool) -> Tensor:
    """``[B, 1, Q, K]`` bool: what a mask shows, and of that the keys at `indices` ``[B, Q, n]``."""
    if layer_of(key) is not None:
        raise ValueError(
            "a PagedCache cannot serve sparse attention (indices=): use transformers' DynamicCache"
        )
    batch, queries, _ = indices.shape
    keys = key.shape[2]
    chosen = torch.zeros(batch, queries, keys, dtype=torch.bool, device=key.device)
    chosen = chosen.scatter(-1, indices.long(), True)[:, None]
    visible = formats.read(mask, keys)
    if visible.dense is not None and visible.dense.is_floating_point():
        return visible.dense.masked_fill(~chosen, float("-inf"))
    if visible.dense is not None:
        return visible.dense & chosen
    if visible.offsets is not None or visible.keys < keys:
        raise ValueError(
            "sparse attention (indices=) over packed sequences or a cache longer than its mask is "
            "not possible; load the model with attn_implementation='sdpa'"
        )
    if visible.padding is not None:
        chosen = chosen & visible.padding[:, None, None]
    if visible.banded and causal:
        chosen = chosen & torch.ones_like(chosen[:1]).tril(keys - queries)
    return chosen


def documents_of(
    position_ids: Tensor | None, mask: Tensor | None, query: Tensor, key: Tensor
) -> packing.Documents | None:
    """What positions tell of packed sequences, where no mask says more."""
    assert position_ids is not None
    layer = layer_of(key)  # whose earlier keys lie in pages
    visible = formats.read(mask, key.shape[2] + (0 if layer is None else layer.length))
    whole = visible.banded and visible.padding is None and visible.offsets is None
    if not whole and not formats.positions_tell(mask):
        return None
    keys = visible.keys
    if torch.compiler.is_compiling():
        packing.assert_one_document(position_ids)
    elif keys == query.shape[2]:
        return packing.documents(position_ids)
    elif packing.starts_over(position_ids):
        raise ValueError(
            "position_ids tell of packed sequences, and a cache already holds "
            f"{keys - query.shape[2]} keys: packed sequences cannot be continued. Give them in "
            "one call, each sequence whole."
        )
    return None


def run(call: Call) -> Tensor:
    """``[B, Q, Hq, Dv]``, contiguous."""
    layer = layer_of(call.key)
    return _run_dense(call) if layer is None else paged.run(call, layer, _run_dense)


def _run_dense(call: Call) -> Tensor:
    """Over the keys of the call itself."""
    visible = formats.read(call.mask, call.key.shape[2])
    # to the kernels' [B, S, H, D]
    q, k, v = (x.transpose(1, 2) for x in one_dtype(call.query, call.key, call.value))
    common: dict[str, Any] = {
        "dropout_p": call.dropout,
        "softmax_scale": call.scaling,
        "softcap": call.softcap or 0.0,
        "s_aux": call.s_aux,
    }
    if visible.banded:
        common |= _band(call)
    packed = call.cu_seqlens_q is not None or visible.offsets is not None
    extras = (visible.dense, visible.padding, call.position_bias)
    if packed and all(extra is None for extra in extras):
        return _run_packed(call, visible, q, k, v, common)
    if packed:
        visible = _within_documents(call, visible)
    bias = _bias(call, visible)
    if visible.keys < k.shape[1]:
        k, v = k[:, : visible.keys], v[:, : visible.keys]
    padding = visible.padding
    if padding is not None and padding.shape[0] != q.shape[0]:
        padding = padding.expand(q.shape[0], -1)
    out = flash_attn_func(q, k, v, bias=bias, key_padding_mask=padding, **common)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out.contiguous()


def _within_documents(call: Call, visible: formats.Visible) -> formats.Visible:
    """Packed sequences, and a mask or a bias beside them: both apply, by a dense mask."""
    offsets_q, offsets_k = call.cu_seqlens_q, call.cu_seqlens_k
    if offsets_q is None:
        offsets_q = offsets_k = visible.offsets
    assert offsets_q is not None and offsets_k is not None
    dense = packing.same_document(offsets_q, offsets_k, call.query.shape[2], call.key.shape[2])
    if visible.padding is not None:
        dense = dense & visible.padding[:, None, None]
    elif visible.dense is not None and visible.dense.dtype == torch.bool:
        dense = dense & visible.dense
    elif visible.dense is not None:
        dense = visible.dense.masked_fill(~dense, float("-inf"))
    return replace(visible, padding=None, dense=dense, offsets=None)


def _band(call: Call) -> dict[str, Any]:
    before = -1 if call.window is None else call.window - 1
    after = 0 if call.causal else before
    return {
        "causal": call.causal,
        "window_size": (before, after),
        "sink_tokens": call.sinks if call.window is not None else 0,
    }


def _run_packed(
    call: Call,
    visible: formats.Visible,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    common: dict[str, Any],
) -> Tensor:
    offsets_q = offsets_k = visible.offsets
    longest_q = longest_k = visible.longest
    if call.cu_seqlens_q is not None:  # they overrule whatever mask was made beside them
        offsets_q, offsets_k = call.cu_seqlens_q, call.cu_seqlens_k
        longest_q, longest_k = call.max_seqlen_q, call.max_seqlen_k
        common = common | _band(call)
    assert offsets_q is not None and offsets_k is not None
    out = flash_attn_varlen_func(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        offsets_q.to(torch.int32),
        offsets_k.to(torch.int32),
        longest_q,
        longest_k,
        **common,
    )
    assert isinstance(out, Tensor)
    return out.view(*q.shape[:-1], v.shape[-1])


def _bias(call: Call, visible: formats.Visible) -> Tensor | None:
    bias = call.position_bias
    if bias is not None and bias.shape[-1] > visible.keys:
        bias = bias[..., : visible.keys]
    if bias is None or visible.dense is None:
        return visible.dense if bias is None else bias
    if visible.dense.dtype == torch.bool:
        return bias.masked_fill(~visible.dense, float("-inf"))
    return bias + visible.dense
