"""Continuous batching: attention over the pages of transformers' manager, where they lie.

transformers schedules the requests, owns the pages and says with each call which slots of them are
whose. Its own attention collects every key and value of the batch into one tensor, in every layer
and step; here the slots become a block table, once per pass for all layers of a kind, and the
kernels read the pages.

Layers with a window have a ring of W slots per request: position p stands in slot ``p % W``. While
a request has no more than W keys in play (what its queries see and the queries themselves), the
ring holds exactly these and is read in place: a full one has a single query, which sees all of it,
and the order of keys within a softmax does not matter. A longer piece of prompt overwrites keys
that its first queries still see: for such a batch the visible keys are copied out first, at most
W - 1 and the piece itself per request.

Letters: T tokens of the batch, R requests in it, Hq and Hkv heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hf_attn_kernels import flash_attn_varlen_func, flash_attn_with_kvcache

from ..transformers_compat import batching_update
from ..transformers_compat.continuous_cache import LayerPages, layer_pages, windowed_keys
from . import batching_tables, keywords

ByKind = dict[str, Any] | Any  # newer releases say it for each kind of layer
Found = TypeVar("Found")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One pass through one layer: the new tokens of all requests, end to end."""

    q: Tensor  # [T, Hq, D]
    k: Tensor  # [T, Hkv, D]
    v: Tensor
    cu_q: Tensor  # [R + 1] int32
    cu_k: Tensor  # [R + 1] int32: what a request's queries see of earlier tokens, and the new ones
    longest_q: int
    longest_k: int
    read: Tensor  # [cu_k[-1]] int64 slots, oldest first; empty where no request has earlier tokens
    write: Tensor  # [T] int64 slots
    positions: Tensor | None  # [T], None if the model does not pass them on


# what other calls are served and continuous batching is not
NOT_OVER_PAGES = ("indices", "output_attentions", "position_bias")
# what the manager says of its batch, in one release or another, and this does not need
MANAGERS = frozenset({"logits_indices", "logits_processor_args", "max_seqlen_k", "max_seqlen_q"})


def refuse_without_pages() -> NoReturn:
    """A batch of the manager's came and its cache did not.

    Raises:
        ValueError: always.
    """
    import transformers

    raise ValueError(
        "continuous batching (generate_batch) with 'triton_paged_flash2' got a batch without the "
        "cache that holds its pages: either this model's layers share the keys of other layers, or "
        f"transformers {transformers.__version__} hands its cache over in a way that this release "
        "of hf-attn-patch does not know (`hf-attn check` lists what is missing). Use generate(), "
        "or attn_implementation='sdpa'."
    )


def _refuse_unserved(given: dict[str, Any]) -> None:
    served = keywords.SERVED | MANAGERS
    beside = {name: value for name, value in given.items() if name not in served}
    keywords.refuse_unserved("triton_paged_flash2", beside)
    wrong = next((name for name in NOT_OVER_PAGES if given.get(name) is not None), None)
    if given.get("is_causal") is False:
        wrong = "is_causal=False"
    if wrong is not None and given.get(wrong) is not False:
        raise ValueError(
            f"continuous batching (generate_batch) is not possible for a model whose attention "
            f"asks for {wrong}; call generate() instead"
        )


# not compiled: making it functional would copy the manager's whole memory for each layer
@torch.compiler.disable  # type: ignore[untyped-decorator]
def attend_pages(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cache: Any,
    *,
    cu_seq_lens_q: Tensor,
    cu_seq_lens_k: ByKind,
    read_index: list[Tensor],
    write_index: list[Tensor],
    block_table: Tensor | None = None,
    position_ids: Tensor | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Write the new keys and values into the manager's pages and attend over them.

    Args:
        query: ``[1, Hq, T, D]``; key, value: ``[1, Hkv, T, D]``.
        cache: transformers' ``PagedAttentionCache``. What comes after it is as its manager passes
            it; the longest lengths are among `kwargs`, by the names of the release.

    Returns:
        ``[1, T, Hq, D]``.

    Raises:
        ValueError: a cache, or pages, that cannot be read.
    """
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    batching_update.taken_over(cache, layer_idx)
    _refuse_unserved(kwargs)
    layer = layer_pages(cache, layer_idx)
    options: dict[str, Any] = {
        "softmax_scale": scaling,
        "softcap": softcap or 0.0,
        "s_aux": s_aux,
        "causal": True,
        "window_size": (-1 if sliding_window is None else sliding_window - 1, 0),
    }
    dtype = layer.k_pages.dtype
    q, k, v = (x[0].transpose(0, 1).to(dtype) for x in (query, key, value))
    cu_k = _of_kind(cu_seq_lens_k, layer)
    if block_table is not None:
        return _one_token_each(cache, layer, q, k, v, cu_k, block_table, options)
    batch = Batch(
        q=q,
        k=k,
        v=v,
        cu_q=cu_seq_lens_q.to(torch.int32),
        cu_k=cu_k.to(torch.int32),
        longest_q=_longest("q", kwargs, layer),
        longest_k=_longest("k", kwargs, layer),
        read=read_index[layer.group],
        write=write_index[layer.group],
        positions=_flat(position_ids, q.shape[0]),
    )
    if batch.read.numel() == 0:
        _write(layer, batch)
        return _varlen(batch, k, v, options)
    if layer.ring is None:
        return _in_place(cache, layer, batch, options)
    if batch.longest_k <= layer.ring and batch.positions is not None:
        # the ring holds what is visible and nothing else, in an order of its own
        return _in_place(cache, layer, batch, options | {"window_size": (-1, 0)})
    visible = windowed_keys(cache, layer_idx, k, v, read_index, write_index)
    return _varlen(batch, *visible, options)


def _in_place(cache: Any, layer: LayerPages, batch: Batch, options: dict[str, Any]) -> Tensor:
    _write(layer, batch)
    table = _shared(cache, layer, batch.write, lambda: _table(layer, batch))
    return _varlen(batch, layer.k_pages, layer.v_pages, options, table)


def _table(layer: LayerPages, batch: Batch) -> Tensor:
    slots, turn = batch.read, None
    if layer.ring is not None:
        assert batch.positions is not None
        slots = slots.masked_scatter(slots == layer.sentinel, batch.write)
        turn = batching_tables.ring_starts(batch.positions, batch.cu_q, layer.ring)
    return batching_tables.block_table(
        slots, batch.cu_k, batch.longest_k, layer.page_size, turn, layer.ring or 0
    )


def _varlen(
    batch: Batch, keys: Tensor, values: Tensor, options: dict[str, Any], table: Tensor | None = None
) -> Tensor:
    out = flash_attn_varlen_func(
        batch.q,
        keys,
        values,
        batch.cu_q,
        batch.cu_k,
        batch.longest_q,
        batch.longest_k,
        block_table=table,
        **options,
    )
    assert isinstance(out, Tensor)  # no log-sum-exp was asked for
    return out[None]


def _one_token_each(
    cache: Any,
    layer: LayerPages,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_k: Tensor,
    tables: Tensor,
    options: dict[str, Any],
) -> Tensor:
    """transformers' fast path for decoding, with its own block tables ``[groups, R, blocks]``."""
    table, earlier = _shared(
        cache,
        layer,
        tables,
        lambda: batching_tables.decode_rows(tables[layer.group], cu_k, layer.trash_page),
    )
    out = flash_attn_with_kvcache(
        q[:, None],
        layer.k_pages,
        layer.v_pages,
        k=k[:, None],
        v=v[:, None],
        cache_seqlens=earlier,
        block_table=table,
        **options,
    )
    assert isinstance(out, Tensor)
    return out.transpose(0, 1)


def _write(layer: LayerPages, batch: Batch) -> None:
    for pages, new in ((layer.k_pages, batch.k), (layer.v_pages, batch.v)):
        pages.view(-1, *pages.shape[2:]).index_copy_(0, batch.write, new)


# per cache and group: what the last pass was about, and what its first layer found out about it
_found: WeakKeyDictionary[Any, dict[int, tuple[Tensor, Any]]] = WeakKeyDictionary()


def _shared(cache: Any, layer: LayerPages, about: Tensor, find: Callable[[], Found]) -> Found:
    """What `find` gives for `about`, found once for all layers of a group."""
    groups = _found.setdefault(cache, {})
    known = groups.get(layer.group)
    # the first layer always looks anew: the manager writes new numbers into the same tensors, and a
    # CUDA graph that is captured after a warm-up with these very tensors must hold the arithmetic
    if known is None or layer.first_of_group or known[0] is not about:
        known = groups[layer.group] = (about, find())
    found: Found = known[1]
    return found


def _of_kind(value: ByKind, layer: LayerPages) -> Any:
    return value[layer.kind] if isinstance(value, dict) else value


def _longest(side: str, kwargs: dict[str, Any], layer: LayerPages) -> int:
    found = kwargs.get(f"max_length_{side}", kwargs.get(f"max_seqlen_{side}"))
    assert found is not None, "transformers' manager always says the longest lengths"
    return int(_of_kind(found, layer))


def _flat(position_ids: Tensor | None, tokens: int) -> Tensor | None:
    # models with several positions per token (images, video) have another shape
    if position_ids is None or tuple(position_ids.shape) != (1, tokens):
        return None
    return position_ids[0]
