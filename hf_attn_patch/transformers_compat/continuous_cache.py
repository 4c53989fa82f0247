"""The paged cache of transformers' continuous batching, as it lies in memory.

Touches names that transformers does not promise to keep: attributes of ``PagedAttentionCache`` and
of its allocators, which differ between releases; see :mod:`.private_names`.

The manager speaks of slots: ``read_index`` and ``write_index`` hold numbers of places for single
tokens. Slot s is token ``s % page_size`` of page ``s // page_size`` of the tensors below, in both
releases.

Letters: P page_size, Hkv key/value heads, D head_dim, T tokens of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from . import private_names

PAGE_MULTIPLE = 16  # what the kernels can tile


@dataclass(frozen=True, kw_only=True)
class LayerPages:
    """Where the keys and values of one layer are."""

    group: int  # which of the manager's index tensors and block tables are this layer's
    first_of_group: bool  # the others of the group share what it finds out
    kind: str  # the layer's key in what the manager keeps by attention type
    ring: int | None  # slots in which position p stands at p % ring; None: every position has one
    sentinel: int  # in read_index of a ring: the new tokens, which are not in the pages yet
    trash_page: int  # may be written, is never read
    k_pages: Tensor  # [pages, P, Hkv, D]
    v_pages: Tensor

    @property
    def page_size(self) -> int:
        return self.k_pages.shape[1]


def layer_pages(cache: Any, layer_idx: int) -> LayerPages:
    """The pages of a layer.

    Raises:
        ValueError: not the cache of transformers' manager, or pages that the kernels cannot read.
    """
    try:
        if hasattr(cache, "layer_to_allocator"):  # newer
            found = _from_allocator(cache, layer_idx)
        else:
            found = _from_groups(cache, layer_idx)
    except AttributeError as error:
        if isinstance(cache, _managers_cache()):
            raise ValueError(
                f"continuous batching is not possible with transformers {private_names.version()}: "
                f"{error}, where the pages of a layer were expected (`hf-attn check` lists what "
                "has changed). Use generate(), or attn_implementation='sdpa'."
            ) from error
        raise ValueError(
            f"cache= must be the PagedAttentionCache that transformers' continuous batching makes, "
            f"got {type(cache).__name__}; pass other caches to the model as past_key_values="
        ) from error
    if found.page_size % PAGE_MULTIPLE:
        raise ValueError(
            f"continuous batching has pages of {found.page_size} tokens, which "
            f"'triton_paged_flash2' cannot read; possible: multiples of {PAGE_MULTIPLE}, such as "
            "ContinuousBatchingConfig(page_size=64), in transformers 5.17 called block_size"
        )
    return found


def _managers_cache() -> type:
    from transformers.generation.continuous_batching import PagedAttentionCache

    theirs: type = PagedAttentionCache
    return theirs


def windowed_keys(
    cache: Any,
    layer_idx: int,
    key: Tensor,
    value: Tensor,
    read_index: list[Tensor],
    write_index: list[Tensor],
) -> tuple[Tensor, Tensor]:
    """transformers' own update of a ring: what is still visible is read, then the new is written.

    Args:
        key: ``[T, Hkv, D]``, value: the same.

    Returns:
        Keys and values of all sequences, oldest first: ``[sum of their lengths, Hkv, D]``.
    """
    if hasattr(cache, "layer_to_allocator"):
        allocator = cache.layer_to_allocator[layer_idx]
        k, v = allocator.update(
            key,
            value,
            layer_idx,
            read_index[allocator.index],
            write_index[allocator.index],
        )
    else:
        new = (x.transpose(0, 1)[None] for x in (key, value))
        k, v = cache.update(*new, layer_idx, read_index, write_index)
    return k, v


def _from_allocator(cache: Any, layer_idx: int) -> LayerPages:
    allocator = cache.layer_to_allocator[layer_idx]
    k_pages, v_pages = allocator._kv_page_views[layer_idx]
    return LayerPages(
        group=allocator.index,
        first_of_group=allocator.layer_indices[0] == layer_idx,
        kind=allocator.layer_type,
        ring=getattr(allocator, "sliding_window", None),
        sentinel=allocator.sentinel_index,
        trash_page=allocator.write_trash_index // allocator.tokens_per_page,
        k_pages=k_pages,
        v_pages=v_pages,
    )


def _from_groups(cache: Any, layer_idx: int) -> LayerPages:
    group, member = cache.layer_index_to_group_indices[layer_idx]
    window = cache.sliding_windows[layer_idx]
    shape = (-1, cache.block_size, *cache.key_cache[member].shape[1:])
    return LayerPages(
        group=group,
        first_of_group=member == 0,
        kind="full_attention" if window == 1 else "sliding_attention",  # 1 is its word for none
        ring=None if window == 1 else window,
        sentinel=cache.sentinel_index,
        trash_page=cache.write_trash_index // cache.block_size,
        k_pages=cache.key_cache[member].view(shape),
        v_pages=cache.value_cache[member].view(shape),
    )
