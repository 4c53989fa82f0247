"""The door to attention over a KV cache: check, rotate, append, describe. One for all backends.

Semantics are those of ``flash_attn_with_kvcache`` in FlashAttention-2: new keys and values are
written in place behind the valid ones, `cache_seqlens` itself is left to the caller.

Lengths and page numbers are tensors whose values are read, and checked, on the CPU only: on a GPU
that would wait for the device. There torch's own indexing stops an append beyond the cache.

Shape letters as in :mod:`.problem`; Knew new keys of each row, R half of the rotated columns.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_alibi, check_dtypes, check_heads
from .problem import CacheProblem, Pattern

PAGE_MULTIPLE = 16


@dataclass(frozen=True, kw_only=True)
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


def cache_problem(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    pattern: Pattern,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    s_aux: Tensor | None = None,
    num_splits: int = 0,
) -> CacheProblem:
    """Check the arguments of :func:`.api.flash_attn_with_kvcache`, append, and describe the rest.

    Returns:
        The problem, with q rotated and `seqlens_k` counting the appended keys.

    Raises:
        ValueError: arguments do not fit, or a gradient is wanted.
    """
    view = CacheView(
        k_cache=k_cache, v_cache=v_cache, block_table=block_table, batch_idx=cache_batch_idx
    )
    batch = _check_cache(q, view)
    _check_no_grad(q, k_cache, v_cache, k, v, s_aux)
    for name, t in (("cache_batch_idx", cache_batch_idx), ("cache_leftpad", cache_leftpad)):
        if t is not None:
            _check_int32(name, t, (batch,), q.device)
    if alibi_slopes is not None:
        check_alibi(alibi_slopes, batch, q.shape[2])
        _check_device("alibi_slopes", alibi_slopes, q.device)
        alibi_slopes = alibi_slopes[None] if alibi_slopes.dim() == 1 else alibi_slopes
    if s_aux is not None:
        _check_device("s_aux", s_aux, q.device)
        if tuple(s_aux.shape) != (q.shape[2],):
            raise ValueError(
                f"s_aux must be [{q.shape[2]}] (query heads), got {tuple(s_aux.shape)}"
            )
    if num_splits < 0:
        raise ValueError(f"num_splits must be 0 (chosen for you) or more, got {num_splits}")

    new = 0 if k is None else k.shape[1] if k.dim() == 4 else -1
    if k is not None or v is not None:
        _check_new(q, view, k, v, cache_seqlens)
    seqlens = _row_lengths(cache_seqlens, batch, view.capacity, q.device)
    _check_values(view, seqlens, max(new, 0), batch, cache_leftpad)
    if rotary_cos is not None or rotary_sin is not None:
        q, k = _rotate_both(
            q, k, rotary_cos, rotary_sin, seqlens, view.capacity, rotary_interleaved, pattern
        )
    if k is not None and v is not None and new:
        _append(view, k, v, seqlens)
        seqlens = seqlens + new
    return CacheProblem(
        q=q if q.stride(-1) == 1 else q.contiguous(),
        k_cache=k_cache,
        v_cache=v_cache,
        seqlens_k=seqlens,
        pattern=pattern,
        block_table=None if block_table is None else block_table.contiguous(),
        batch_idx=None if cache_batch_idx is None else cache_batch_idx.contiguous(),
        leftpad=None if cache_leftpad is None else cache_leftpad.contiguous(),
        s_aux=s_aux,
        alibi_slopes=alibi_slopes,
        num_splits=num_splits,
    )  # fmt: skip


# -- checks ---------------------------------------------------------------------------------------


def _check_cache(q: Tensor, view: CacheView) -> int:
    """Shapes of q and the cache; returns the batch."""
    paged = view.block_table is not None
    layout = "[pages, page_size, heads, head_dim]" if paged else "[batch, length, heads, head_dim]"
    if q.dim() != 4:
        raise ValueError(f"q must be [batch, length, heads, head_dim], got shape {tuple(q.shape)}")
    for name, t in (("k_cache", view.k_cache), ("v_cache", view.v_cache)):
        if t.dim() != 4:
            raise ValueError(f"{name} must be {layout}, got shape {tuple(t.shape)}")
        if t.stride(-1) != 1:
            raise ValueError(
                f"{name} must be contiguous in head_dim (its last dimension), got strides "
                f"{t.stride()}"
            )
    check_dtypes(q, view.k_cache, view.v_cache)
    check_heads(q, view.k_cache, view.v_cache)
    if view.k_cache.shape[:2] != view.v_cache.shape[:2]:
        raise ValueError(
            "k_cache and v_cache must agree in all but head_dim, got "
            f"{tuple(view.k_cache.shape)} and {tuple(view.v_cache.shape)}"
        )
    batch = q.shape[0]
    if view.block_table is not None:
        _check_block_table(view, view.block_table, batch, q.device)
    elif view.batch_idx is None and view.k_cache.shape[0] != batch:
        raise ValueError(
            f"q has batch {batch} and k_cache {view.k_cache.shape[0]} rows; they must be equal, or "
            f"cache_batch_idx [{batch}] must say which row of the cache belongs to each row of q"
        )
    return batch


def _check_block_table(view: CacheView, table: Tensor, batch: int, device: torch.device) -> None:
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
    _check_int32("block_table", table, tuple(table.shape), device)
    page_size = view.k_cache.shape[1]
    if page_size == 0 or page_size % PAGE_MULTIPLE:
        raise ValueError(
            f"page_size {page_size} (k_cache's second dimension) is not supported; possible: "
            f"multiples of {PAGE_MULTIPLE}"
        )


def _check_no_grad(*tensors: Tensor | None) -> None:
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise ValueError(
            "attention over a KV cache has no backward, and an argument requires a gradient; call "
            "it under torch.no_grad(), or train with flash_attn_func"
        )


def _check_int32(name: str, t: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if t.dtype != torch.int32 or tuple(t.shape) != shape:
        raise ValueError(
            f"{name} must be an int32 tensor of shape {list(shape)}, got {t.dtype} {list(t.shape)}"
        )
    _check_device(name, t, device)


def _check_device(name: str, t: Tensor, device: torch.device) -> None:
    if t.device != device:
        raise ValueError(f"{name} must be on {device}, got {t.device}")


def _check_new(
    q: Tensor, view: CacheView, k: Tensor | None, v: Tensor | None, seqlens: int | Tensor | None
) -> None:
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
        if t.dtype != cache.dtype:
            raise ValueError(f"{name} must be {cache.dtype} like {name}_cache, got {t.dtype}")
        _check_device(name, t, q.device)


def _row_lengths(
    seqlens: int | Tensor | None, batch: int, capacity: int, device: torch.device
) -> Tensor:
    """``[B]`` int32 on `device`."""
    if isinstance(seqlens, Tensor):
        _check_int32("cache_seqlens", seqlens, (batch,), device)
        return seqlens.contiguous()
    length = capacity if seqlens is None else seqlens
    if not isinstance(length, int) or isinstance(length, bool) or not 0 <= length <= capacity:
        raise ValueError(
            f"cache_seqlens must be 0 to {capacity} (what a row of the cache holds), got "
            f"{seqlens!r}"
        )
    return torch.full((batch,), length, dtype=torch.int32, device=device)


def _check_values(
    view: CacheView, seqlens: Tensor, new: int, batch: int, leftpad: Tensor | None
) -> None:
    """What only the tensors' values show: on the CPU, where reading them costs nothing."""
    if seqlens.device.type != "cpu" or torch.compiler.is_compiling() or batch == 0:
        return
    low, high = int(seqlens.min()), int(seqlens.max())
    if low < 0 or high + new > view.capacity:
        raise ValueError(
            f"cache_seqlens must be 0 to {view.capacity - new} ({view.capacity} keys fit in a row, "
            f"{new} are to be appended), got {low} to {high}"
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
    if view.block_table is not None:
        _check_pages(view.block_table, view.k_cache, seqlens, new)


def _check_pages(table: Tensor, k_cache: Tensor, seqlens: Tensor, new: int) -> None:
    pages, page_size = k_cache.shape[:2]
    if table.numel() and int(table.max()) >= pages:
        raise ValueError(
            f"block_table names page {int(table.max())}; k_cache has pages 0 to {pages - 1}"
        )
    # pages of read keys may be gone (-1) where a window hides them; the ones written may not
    column = torch.arange(table.shape[1])[None, :]
    written = (column >= (seqlens // page_size)[:, None]) & (
        column * page_size < (seqlens + new)[:, None]
    )
    if new and bool((written & (table < 0)).any()):
        raise ValueError(
            f"block_table has no page for some of the {new} new keys (negative entries); allocate "
            "pages before appending"
        )


# -- rotary embedding -----------------------------------------------------------------------------


def _rotate_both(
    q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, seqlens: Tensor,
    capacity: int, interleaved: bool, pattern: Pattern,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q and k rotated at their positions."""
    if k is None:
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
    first = seqlens.long()[:, None]
    at_k = first + torch.arange(k.shape[1], device=k.device)
    # without causality or a window q's tokens have no order: FlashAttention-2 puts all at the first
    ordered = pattern.window_left >= 0 or pattern.window_right >= 0
    at_q = first + torch.arange(q.shape[1], device=q.device) if ordered else first
    if q.shape[1] > k.shape[1] and ordered:  # positions behind the last appended key
        at_q = at_q.clamp(max=cos.shape[0] - 1)
    return (
        rotate(q, cos[at_q], sin[at_q], interleaved=interleaved),
        rotate(k, cos[at_k], sin[at_k], interleaved=interleaved),
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool) -> Tensor:
    """Rotary embedding (Su et al., "RoFormer", 2021) of the first 2R columns of `x`.

    Args:
        x: ``[B, L, H, D]``; cos, sin: ``[B, L or 1, R]``.
        interleaved: pairs (0, 1), (2, 3) ... instead of (0, R), (1, R + 1) ...

    Returns:
        Like `x`; computed in float32 at least.
    """
    half = cos.shape[-1]
    work = torch.promote_types(x.dtype, torch.float32)
    c, s = cos.to(work)[:, :, None, :], sin.to(work)[:, :, None, :]
    turned, rest = x[..., : 2 * half].to(work), x[..., 2 * half :]
    if interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned[..., :half], turned[..., half:]
    pair = (first * c - second * s, first * s + second * c)
    out = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat([out.to(x.dtype), rest], dim=-1) if rest.shape[-1] else out.to(x.dtype)


# -- append ---------------------------------------------------------------------------------------


def _append(view: CacheView, k: Tensor, v: Tensor, seqlens: Tensor) -> None:
    """Write k and v at positions seqlens, seqlens + 1, ... of each row, in place."""
    position = seqlens.long()[:, None] + torch.arange(k.shape[1], device=k.device)  # [B, Knew]
    if view.block_table is None:
        idx = view.batch_idx
        row = torch.arange(k.shape[0], device=k.device) if idx is None else idx.long()
        where: tuple[Tensor, Tensor] = (row[:, None].expand_as(position), position)
    else:
        pages, page_size = view.k_cache.shape[:2]
        page = view.block_table.gather(1, position // page_size).long()
        # a negative index would count from the end and overwrite another row's page; this one stops
        page = torch.where(page < 0, pages, page)
        where = (page, position % page_size)
    view.k_cache.index_put_(where, k)
    view.v_cache.index_put_(where, v)
