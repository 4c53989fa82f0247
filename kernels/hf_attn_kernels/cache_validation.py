"""Checks at the door of a KV cache. As in :mod:`.validation`, every message says what would fit.

Lengths and page numbers are tensors whose values are read, and checked, on the CPU only: on a GPU
that would wait for the device. There the kernels keep within the cache whatever the values are.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from .fp8 import E4M3, is_float8
from .problem import NewKeys, Pattern
from .validation import (
    ALL_FLOATS,
    FLOAT_DTYPES,
    check_alibi,
    check_dtypes,
    check_heads,
    check_offsets,
    values_readable,
)

PAGE_MULTIPLE = 16


@dataclass(frozen=True)
class CacheView:
    """Where each row's keys are: a row of a contiguous cache, or pages."""

    k_cache: Tensor
    v_cache: Tensor
    block_table: Tensor | None
    batch_idx: Tensor | None

    @property
    def capacity(self) -> int:
        """Keys that a row may have."""
        blocks = 1 if self.block_table is None else self.block_table.shape[1]
        return blocks * self.k_cache.shape[1]


def check_cache(
    q: Tensor, view: CacheView, names: tuple[str, str] = ("k_cache", "v_cache")
) -> None:
    """Shapes and dtypes of q and the cache; `names` are what the caller knows the caches by."""
    paged = view.block_table is not None
    layout = "[pages, page_size, heads, head_dim]" if paged else "[batch, length, heads, head_dim]"
    for name, t in zip(names, (view.k_cache, view.v_cache), strict=True):
        if t.dim() != 4:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(t.shape)}")
        if t.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in head_dim (its last dimension), got strides "
                f"{t.stride()}"
            )
    if is_float8(view.k_cache) and is_float8(view.v_cache):
        _check_float8_query(q)
    else:
        check_dtypes(q, view.k_cache, view.v_cache)
    check_heads(q, view.k_cache, view.v_cache)
    if view.k_cache.shape[:2] != view.v_cache.shape[:2]:
        raise ValueError(
            f"{names[0]} and {names[1]} must agree in all but head_dim, got "
            f"{tuple(view.k_cache.shape)} and {tuple(view.v_cache.shape)}"
        )


def _check_float8_query(q: Tensor) -> None:
    allowed = ALL_FLOATS if q.device.type == "cpu" else FLOAT_DTYPES
    if q.dtype not in allowed:
        raise ValueError(
            f"q of a float8 cache must be of a wider dtype, got {q.dtype}; possible: "
            + ", ".join(str(d).removeprefix("torch.") for d in allowed)
        )


def check_batch(view: CacheView, batch: int, device: torch.device) -> None:
    """The rows of the table, or of a contiguous cache, are those of q."""
    table = view.block_table
    if table is None:
        if view.batch_idx is None and view.k_cache.shape[0] != batch:
            raise ValueError(
                f"q has batch {batch} and k_cache {view.k_cache.shape[0]} rows; they must be "
                f"equal, or cache_batch_idx [{batch}] must say which row of the cache belongs to "
                "each row of q"
            )
        return
    if view.batch_idx is not None:
        raise ValueError(
            "cache_batch_idx selects rows of a contiguous cache and got a block_table beside it; "
            "reorder the rows of the block_table instead"
        )
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(
            f"block_table must be [{batch}, max_blocks] (batch, pages of a row), got "
            f"{tuple(table.shape)}"
        )
    check_int32("block_table", table, tuple(table.shape), device)
    page_size = view.k_cache.shape[1]
    if page_size == 0 or page_size % PAGE_MULTIPLE:
        raise ValueError(
            f"page_size {page_size} (the second dimension of the keys' pages) is not supported; "
            f"possible: multiples of {PAGE_MULTIPLE}"
        )


def check_no_grad(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "attention over a KV cache has no backward, and an argument requires a gradient; call "
            "it under torch.no_grad(), or train with flash_attn_func"
        )


def check_int32(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if t.dtype != torch.int32 or tuple(t.shape) != shape:
        raise ValueError(
            f"{name} must be an int32 tensor of shape {list(shape)}, got {t.dtype} {list(t.shape)}"
        )
    _check_device(name, t, device)


def _check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def check_extras(
    q: Tensor, view: CacheView, batch: int, slopes: Tensor | None, s_aux: Tensor | None,
    k_descale: Tensor | None, v_descale: Tensor | None,
) -> None:  # fmt: skip
    heads_q, heads_kv = q.shape[-2], view.k_cache.shape[2]
    if slopes is not None:
        check_alibi(slopes, batch, heads_q)
        _check_device("alibi_slopes", slopes, q.device)
    if s_aux is not None:
        _check_device("s_aux", s_aux, q.device)
        if tuple(s_aux.shape) != (heads_q,):
            raise ValueError(f"s_aux must be [{heads_q}] (query heads), got {tuple(s_aux.shape)}")
    for name, t in (("k_descale", k_descale), ("v_descale", v_descale)):
        if t is None:
            continue
        if not is_float8(view.k_cache):
            raise ValueError(
                f"{name} is for caches of {E4M3}, got a cache of {view.k_cache.dtype}; leave it out"
            )
        shapes = ((heads_kv,), (1, heads_kv), (batch, heads_kv))
        if tuple(t.shape) not in shapes or t.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 [{heads_kv}] or [{batch}, {heads_kv}] (batch, KV heads), "
                f"got {t.dtype} {list(t.shape)}"
            )
        _check_device(name, t, q.device)


def check_new(
    q: Tensor, view: CacheView, k: Tensor | None, v: Tensor | None, seqlens: int | Tensor | None
) -> tuple[Tensor, Tensor]:
    """The new k and v, both of which are there."""
    if k is None or v is None:
        missing = "k" if k is None else "v"
        raise ValueError(f"k and v are appended together, {missing} is missing")
    if seqlens is None:
        raise ValueError(
            "k and v are appended behind cache_seqlens, which is missing; give an int or an int32 "
            f"tensor [{q.shape[0]}] of the keys each row holds already"
        )
    for name, t, cache in (("k", k, view.k_cache), ("v", v, view.v_cache)):
        wanted = (q.shape[0], k.shape[1] if k.dim() == 4 else "new", *cache.shape[2:])
        if tuple(t.shape) != wanted:
            raise ValueError(
                f"{name} must be [{', '.join(map(str, wanted))}] (batch, new keys, heads, head_dim "
                f"as in {name}_cache), got {tuple(t.shape)}"
            )
        if is_float8(cache) and t.dtype != q.dtype:
            raise ValueError(
                f"{name} must be {q.dtype} like q, got {t.dtype}; it is made float8 when written"
            )
        if not is_float8(cache) and t.dtype != cache.dtype:
            raise ValueError(f"{name} must be {cache.dtype} like {name}_cache, got {t.dtype}")
        _check_device(name, t, q.device)
    return k, v


def row_lengths(
    seqlens: int | Tensor | None, batch: int, capacity: int, device: torch.device
) -> Tensor:
    """``[B]`` int32 on `device`."""
    if isinstance(seqlens, Tensor):
        check_int32("cache_seqlens", seqlens, (batch,), device)
        return seqlens.contiguous()
    length = capacity if seqlens is None else seqlens
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= capacity:
        raise ValueError(
            f"cache_seqlens must be 0 to {capacity} (what a row of the cache holds), got "
            f"{seqlens!r}"
        )
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def check_packed(
    q: Tensor, view: CacheView, cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]
) -> int:
    """Number of sequences that both offsets describe."""
    for name, cu in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
        if cu.dim() != 1 or cu.numel() < 1:
            raise ValueError(
                f"{name} must be a 1-D int32 tensor of sequences + 1 offsets, got "
                f"{tuple(cu.shape)} {cu.dtype}"
            )
        check_int32(name, cu, tuple(cu.shape), q.device)
    rows = cu_q.numel() - 1
    if cu_k.numel() - 1 != rows:
        raise ValueError(
            f"cu_seqlens_q describes {rows} sequences and cu_seqlens_k {cu_k.numel() - 1}; they "
            "must be equal"
        )
    if values_readable(cu_q):
        offsets_k = cu_k.tolist()  # keys lie in pages: their offsets may end anywhere
        names = ("cu_seqlens_q", "cu_seqlens_k")
        totals = (q.shape[0], max(offsets_k))
        for name, cu, total, most in zip(names, (cu_q, cu_k), totals, longest, strict=True):
            offsets = check_offsets(name, cu.tolist(), total)
            have = max((b - a for a, b in pairwise(offsets)), default=0)
            if have > most:
                raise ValueError(
                    f"max_seqlen_{name[-1]} is {most} and a sequence of {name} has {have} tokens; "
                    "it must be the longest or more"
                )
    return rows


def check_rotary(
    q: Tensor, new: NewKeys | None, cos: Tensor | None, sin: Tensor | None, capacity: int
) -> tuple[Tensor, Tensor]:
    """cos and sin, both of which are there."""
    if new is None:
        raise ValueError("rotary_cos and rotary_sin rotate q and the new k, but k is missing")
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin come together; one of them is missing")
    if cos.dim() != 2 or cos.shape != sin.shape or not 1 <= cos.shape[1] <= q.shape[3] // 2:
        raise ValueError(
            f"rotary_cos and rotary_sin must both be [positions, 1 to {q.shape[3] // 2}] (half of "
            f"the rotated columns), got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    for name, t in (("rotary_cos", cos), ("rotary_sin", sin)):
        _check_device(name, t, q.device)
    if cos.shape[0] < capacity:
        raise ValueError(
            f"rotary_cos covers {cos.shape[0]} positions and a row of the cache {capacity}; it "
            "must cover them all"
        )
    return cos, sin


def check_pages(
    view: CacheView, ends: Tensor, queries: Tensor, pattern: Pattern, leftpad: Tensor | None = None,
    new: int = 0,
) -> None:  # fmt: skip
    """That the table has a page for each key that a query sees, and for the new ones.

    For tensors that can be read. On a GPU nobody may wait for them: the kernels write no new key
    without a page, and what is asked of a missing one comes out as NaN.

    Args:
        ends: ``[B]`` keys of each row, the `new` ones counted; queries: ``[B]`` of each row.
    """
    table = view.block_table
    if table is None or not values_readable(table) or not table.numel():
        return
    key = torch.arange(view.capacity)
    end, zeros = ends[:, None], torch.zeros_like(ends)[:, None]
    start = zeros if leftpad is None else leftpad[:, None]
    low, high, first = start, end, end - queries[:, None]  # where the first query stands
    if pattern.window_left >= 0:
        low = torch.maximum(low, first - pattern.window_left)
    if pattern.window_right >= 0:
        high = torch.minimum(high, end + pattern.window_right)
    seen = (key >= low) & (key < high)
    if pattern.window_left >= 0:
        seen |= (key >= start) & (key < torch.minimum(start + pattern.sink_tokens, high))
    seen &= queries[:, None] > 0
    absent = table.repeat_interleave(view.k_cache.shape[1], dim=1) < 0  # [B, K]
    if bool((absent & (key >= end - new) & (key < end)).any()):
        raise ValueError(
            f"block_table has no page for some of the {new} new keys (negative entries); allocate "
            "pages before appending"
        )
    if bool((absent & seen).any()):
        row, at = (absent & seen).nonzero()[0].tolist()
        raise ValueError(
            "block_table has no page (a negative entry) for keys that a query sees: keys from "
            f"{at} on of row {row}; only pages that a window hides may be missing"
        )


def check_values(
    view: CacheView, seqlens: Tensor, new: int, batch: int, leftpad: Tensor | None
) -> None:
    """What only the tensors' values show: on the CPU, where reading them costs nothing."""
    if not values_readable(seqlens) or batch == 0:
        return
    low, high = (int(end) for end in seqlens.aminmax())
    if low < 0 or high + new > view.capacity:
        raise ValueError(
            f"a row of the cache has room for {view.capacity} keys, so the keys it holds already "
            f"must be 0 to {view.capacity - new} with {new} to be appended, got {low} to {high}; "
            "give more pages a row (block_table's columns) or a longer cache"
        )
    if leftpad is not None and bool(((leftpad < 0) | (leftpad > seqlens + new)).any()):
        raise ValueError(
            f"cache_leftpad must be 0 to the length of its row, got {leftpad.tolist()} for lengths "
            f"{(seqlens + new).tolist()}"
        )
    rows = view.k_cache.shape[0]
    if view.batch_idx is not None and bool(((view.batch_idx < 0) | (view.batch_idx >= rows)).any()):
        raise ValueError(
            f"cache_batch_idx must be 0 to {rows - 1} (rows of k_cache), got "
            f"{view.batch_idx.tolist()}"
        )
    table = view.block_table
    if table is not None and table.numel() and int(table.max()) >= rows:
        raise ValueError(
            f"block_table names page {int(table.max())}; the cache has pages 0 to {rows - 1}"
        )
