"""``triton_mla``: attention of a layer that caches latents, absorbed where that is cheaper.

A head's keys and values are ``latent @ W_UK.T`` and ``latent @ W_UV.T``, both parts of the layer's
`kv_b_proj`. Expanded, they are made for the whole cache; absorbed, ``q @ W_UK`` meets the latents
as they are cached, and ``W_UV`` is applied to the answer (DeepSeek-V2, 2024).

Shape letters: B batch, Q queries, H heads (of this rank, under tensor parallelism), K keys, R rank
of the latent, N / P columns of a query without / with rotation, V columns of a value.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_attn_kernels import mla_decode

from ..cache.page_storage import PagedLayer, layer_of
from ..masking import formats
from ..swa_config import OWN_WINDOWS
from ..transformers_compat import compat
from ..transformers_compat import latent_layers as adapter
from . import dense, keywords, packing, paged
from .call import Call, one_dtype


@dataclass(frozen=True)
class Sizes:
    """Columns of a head."""

    nope: int
    rope: int
    value: int
    rank: int

    def absorbs(self, queries: int, keys: int) -> bool:
        """The cost rule: whether absorbed takes fewer multiplications, for each row and head.

        Expanding multiplies every key with the weights once, absorbing every query; a score and its
        share of the answer then cost N + P + V, or 2 R + P. Decoding absorbs from the second token
        on, a prompt never does; in between stands, for DeepSeek's sizes and a long cache, Q = 170.
        """
        weights = self.rank * (self.nope + self.value)
        absorbed = queries * (weights + keys * (2 * self.rank + self.rope))
        expanded = keys * (weights + queries * (self.nope + self.rope + self.value))
        return absorbed <= expanded


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention function of ``triton_mla``; see :mod:`..registration.functions`.

    Args:
        query: ``[B, H, Q, N + P]``.
        key, value: ``[B, 1, K, R]`` and ``[B, 1, K, P]`` from a layer that hands its latents over;
            else ``[B, H, K, N + P]`` and ``[B, H, K, V]``.
        kwargs: as in :func:`.dense.attend`.

    A `kv_b_proj` that does more than to multiply by its weights (hooks, adapters, quantisation,
    a bias) is called for all keys instead, in decoding too.

    Raises:
        ValueError: the layer has no latents, or its `kv_b_proj` cannot run.
    """
    attention_mask, kwargs = _read(query, key, attention_mask, kwargs)
    weights = _weights(module, query)
    if not adapter.hands_over(module):  # loaded with another implementation, or unpickled
        if not torch.compiler.is_compiling():
            adapter.hand_over(module)
        return _dense(module, query, key, value, attention_mask, kwargs)
    layer = layer_of(key)
    if layer is not None:
        return _over_pages(module, weights, query, key, value, attention_mask, layer, kwargs), None
    visible = formats.read(attention_mask, key.shape[2])
    latent, rope = key[:, :, : visible.keys], value[:, :, : visible.keys]
    sizes = _sizes(module)
    wants_gradient = torch.is_grad_enabled() and any(
        x.requires_grad for x in (query, latent, rope, *adapter.parameters(module))
    )
    if (
        weights is None
        or wants_gradient
        or not _plain(visible, kwargs)
        or not sizes.absorbs(query.shape[2], visible.keys)
    ):
        keys, values = adapter.expanded(module, latent, rope)
        return _dense(module, query, keys, values, attention_mask, kwargs)
    padding = visible.padding
    if padding is not None and padding.shape[0] != query.shape[0]:
        padding = padding.expand(query.shape[0], -1)
    out = _absorbed(
        sizes, weights, query, *one_dtype(latent[:, 0], rope[:, 0]),
        softmax_scale=kwargs.get("scaling"), causal=visible.banded and _causal(module, kwargs),
        window_size=_window(kwargs) if visible.banded else (-1, -1), key_mask=padding,
    )  # fmt: skip
    return out, None


def _read(
    query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> tuple[Tensor | None, dict[str, Any]]:
    """A call's mask and keywords with what they only imply spelled out.

    Raises ValueError for a keyword that may not be ignored.
    """
    beside = {name: value for name, value in kwargs.items() if name not in keywords.SERVED}
    keywords.refuse_unserved(adapter.NAME, beside)
    if mask is not None and mask.dtype == formats.STATED:
        mask, kwargs = formats.unstated(mask), kwargs | {"is_causal": True}
    position_ids = kwargs.get("position_ids")
    if kwargs.get("cu_seq_lens_q") is None and packing.may_be_packed(
        position_ids, query.shape[0], query.shape[2]
    ):
        told = dense.documents_of(position_ids, mask, query, key)
        if told is not None:
            offsets, longest = told
            kwargs = kwargs | {
                "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets,
                "max_length_q": longest, "max_length_k": longest,
            }  # fmt: skip
    if compat.records_attentions():
        kwargs = kwargs | {"output_attentions": True}
    return mask, kwargs


def _dense(
    module: nn.Module, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    return dense.attend(adapter.NAME, OWN_WINDOWS, module, query, keys, values, mask, **kwargs)


def _absorbed(
    sizes: Sizes, weights: Tensor, query: Tensor, latent: Tensor, rope: Tensor, **how: Any
) -> Tensor:
    """``[B, Q, H, V]`` of latents ``[B, K, R]`` and ``[B, K, P]``, or pages of them."""
    query, weights = one_dtype(query, weights)
    batch, heads, q_len, _ = query.shape
    weights = weights.view(heads, sizes.nope + sizes.value, sizes.rank)
    w_uk, w_uv = weights.split([sizes.nope, sizes.value], dim=1)  # [H, N, R], [H, V, R]
    q_nope, q_rope = query.split([sizes.nope, sizes.rope], dim=-1)
    # each head's weights are read once, whatever the batch
    by_head = q_nope.transpose(0, 1).reshape(heads, batch * q_len, sizes.nope)
    q_latent = torch.bmm(by_head, w_uk).view(heads, batch, q_len, -1).permute(1, 2, 0, 3)
    if how["softmax_scale"] is None:
        how["softmax_scale"] = query.shape[-1] ** -0.5
    out = mla_decode(q_latent, q_rope.transpose(1, 2), latent, rope, **how)
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    # weights on the left: for one bfloat16 query a CPU needs a quarter of the other order's time
    by_head = out.permute(2, 3, 0, 1).reshape(heads, sizes.rank, batch * q_len)
    values = torch.bmm(w_uv, by_head)  # [H, V, B * Q]
    return values.view(heads, -1, batch, q_len).permute(2, 3, 0, 1).contiguous()


@torch.compiler.disable  # type: ignore[untyped-decorator]  # tables are kept in plain Python
def _over_pages(
    module: nn.Module, weights: Tensor | None, query: Tensor, latent: Tensor, rope: Tensor,
    mask: Tensor | None, layer: PagedLayer, kwargs: dict[str, Any],
) -> Tensor:  # fmt: skip
    """The new latents go into their pages; a first prompt is expanded, all else absorbed.

    Without `weights` everything is expanded, as often as it is read.
    """
    window = kwargs.get("sliding_window")
    call = Call(
        query=query, key=latent, value=rope, mask=mask, causal=_causal(module, kwargs),
        window=window, dropout=kwargs.get("dropout", 0.0),
        position_bias=kwargs.get("position_bias"), cu_seqlens_q=kwargs.get("cu_seq_lens_q"),
    )  # fmt: skip
    step, table = paged.begin(call, layer)
    keys, values = (x.transpose(1, 2).to(layer.compute_dtype) for x in (latent, rope))
    layer.write(keys, values, table.slots(step))
    if step.fresh:
        keys, values = adapter.expanded(module, latent, rope)
        return _dense(module, query, keys, values, mask, kwargs)[0]
    if weights is None:
        latent, rope, mask = paged.columns(layer, step, table)
        keys, values = adapter.expanded(module, latent, rope)
        return _dense(module, query, keys, values, mask, kwargs)[0]
    pages = (x[:, :, 0] for x in layer.pages)
    return _absorbed(
        _sizes(module), weights, query.to(layer.compute_dtype), *pages,
        softmax_scale=kwargs.get("scaling"), cache_seqlens=step.grown, block_table=table.table,
        window_size=_window(kwargs), latent_descale=layer.k_descale, rope_descale=layer.v_descale,
    )  # fmt: skip


def _plain(visible: formats.Visible, kwargs: dict[str, Any]) -> bool:
    """Whether a call asks for nothing that attention over latents lacks."""
    absent = ("s_aux", "position_bias", "cache", "cu_seq_lens_q", "indices")
    return (
        visible.dense is None
        and visible.offsets is None
        and not any(kwargs.get(name) for name in ("softcap", "dropout", "output_attentions"))
        and all(kwargs.get(name) is None for name in absent)
    )


def _causal(module: nn.Module, kwargs: dict[str, Any]) -> bool:
    given = kwargs.get("is_causal")
    return bool(getattr(module, "is_causal", True) if given is None else given)


def _window(kwargs: dict[str, Any]) -> tuple[int, int]:
    window = kwargs.get("sliding_window")
    return (-1, -1) if window is None else (window - 1, 0)


def _sizes(module: Any) -> Sizes:
    return Sizes(
        module.qk_nope_head_dim, module.qk_rope_head_dim, module.v_head_dim, module.kv_lora_rank
    )


def _weights(module: nn.Module, query: Tensor) -> Tensor | None:
    """``[H * (N + V), R]`` of `kv_b_proj`; None where they are not all that it does."""
    if not callable(getattr(type(module), "expand_kv", None)) or hasattr(module, "indexer"):
        raise ValueError(
            f"attn_implementation={adapter.NAME!r} serves multi-head latent attention that sees "
            f"all its keys, and {type(module).__name__} is none; use "
            "attn_implementation='triton_fa2' (or 'sdpa' where an indexer picks the keys)"
        )
    linear: Any = module.kv_b_proj
    if not adapter.only_multiplies(linear):
        return None
    weight: Tensor = linear.weight
    if not weight.is_floating_point() or weight.device != query.device:
        raise ValueError(
            f"attn_implementation={adapter.NAME!r} multiplies queries with the weights of "
            f"{type(module).__name__}.kv_b_proj, which must be floating-point and on "
            f"{query.device}; they are {weight.dtype} on {weight.device}. Quantise and offload "
            "with a library that replaces the layer, its weight or its forward (that is called "
            "then), or leave kv_b_proj as it is"
        )
    # tensor parallelism: the rows of this process's heads
    return weight.to_local() if isinstance(weight, DTensor) else weight
