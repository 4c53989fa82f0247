"""Multi-head latent attention without expanding the cache: "absorbed" decode.

MLA (DeepSeek-V2, 2024) caches one latent and one rotated key a token, shared by all heads; a head's
own keys and values are products of the latent with its weights. Moved to the query's side, those
weights leave attention over the cache as it lies: one key/value head of R + P columns whose first R
are the values too.

Shape letters: B batch, Q queries, H heads, K keys, R rank of the latent, P columns of the rotated
key. Causal and windowed masks are aligned to the bottom right, as in :mod:`.api`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .cache_validation import (
    CacheView,
    check_batch,
    check_int32,
    check_no_grad,
    check_pages,
    check_values,
    row_lengths,
)
from .device import backend_name
from .fp8 import E4M3, is_float8
from .namespace import NAMESPACE, OPS
from .problem import MlaProblem, Pattern
from .validation import ALL_FLOATS, FLOAT_DTYPES, check_pattern


def mla_decode(
    q_latent: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    *,
    softmax_scale: float,
    cache_seqlens: int | Tensor | None = None,
    block_table: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    key_mask: Tensor | None = None,
    causal: bool = True,
    window_size: tuple[int, int] = (-1, -1),
    num_splits: int = 0,
    latent_descale: Tensor | None = None,
    rope_descale: Tensor | None = None,
    return_softmax_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of absorbed queries over a latent cache that already holds the new tokens.

    Args:
        q_latent: ``[B, Q, H, R]``, each head's query times its key weights: ``q @ W_UK``.
        q_rope: ``[B, Q, H, P]``, the rotated part. float16, bfloat16 or float32, on the CPU also
            float64; sums are in float32 (float64 for float64).
        latent: ``[B, K, R]``, or with a block_table ``[pages, page_size, R]``; of q's dtype or
            float8_e4m3fn. k_rope: the same with P.
        softmax_scale: factor of the scores. No default: it comes from the unabsorbed head_dim.
        cache_seqlens: valid keys of each row, the new ones included: an int or ``[B]`` int32.
            None: the cache is full.
        block_table: ``[B, max_blocks]`` int32 page numbers; -1 for unused entries and for pages
            that a window hides. A key that is seen must have a page: else ValueError, and on a GPU,
            whose values nobody waits for, NaN for the queries that see it.
        cache_leftpad: ``[B]`` int32, keys to skip at the start of each row.
        key_mask: ``[B, K]`` bool, True = keep; hides keys of a contiguous cache, moves nothing.
        causal: a query sees no later key.
        window_size: keys visible to the left and right of the diagonal, -1 for all.
        num_splits: pieces the keys are cut into and combined from; 0 lets the backend choose.
        latent_descale: ``[1]`` float32, of a float8 cache: a stored number times it is the value.
            None is 1.
        rope_descale: the same of the rotated keys.
        return_softmax_lse: also return the natural log-sum-exp.

    Returns:
        ``[B, Q, H, R]``, weighted sums of latents, to be multiplied with each head's value weights;
        a query that sees no key gets zeros. With `return_softmax_lse` also ``[B, H, Q]`` float32.

    Raises:
        ValueError: shapes, dtypes or devices do not fit, or a gradient is asked for.
    """
    pattern = check_pattern(
        1,
        softmax_scale=softmax_scale,
        causal=causal,
        window_size=window_size,
        softcap=0.0,
        sink_tokens=0,
        dropout_p=0.0,
    )
    check_no_grad(q_latent, q_rope, latent, k_rope)
    _check_shapes(q_latent, q_rope, latent, k_rope, block_table)
    view = CacheView(latent[:, :, None], k_rope[:, :, None], block_table, None)
    batch, device = q_latent.shape[0], q_latent.device
    check_batch(view, batch, device)
    seqlens = None
    if cache_seqlens is not None or block_table is not None:
        seqlens = row_lengths(cache_seqlens, batch, view.capacity, device)
        check_values(view, seqlens, 0, batch, cache_leftpad)
        if device.type == "cpu" and backend_name(device) == "triton":  # interpreted
            queries = torch.full_like(seqlens, q_latent.shape[1])
            check_pages(view, seqlens, queries, pattern, cache_leftpad)
    if cache_leftpad is not None:
        check_int32("cache_leftpad", cache_leftpad, (batch,), device)
    _check_key_mask(key_mask, latent, block_table)
    _check_descales(latent, latent_descale, rope_descale)
    out, lse = OPS.mla_decode(
        q_latent, q_rope, latent, k_rope, seqlens,
        None if block_table is None else block_table.contiguous(), cache_leftpad, key_mask,
        latent_descale, rope_descale, pattern.scaling, pattern.window_left, pattern.window_right,
        num_splits,
    )  # fmt: skip
    return (out, lse) if return_softmax_lse else out


def _check_shapes(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, table: Tensor | None
) -> None:
    lead = "pages, page_size" if table is not None else "batch, keys"
    for name, t, rank, layout in (
        ("q_latent", q_latent, 4, "batch, queries, heads, rank"),
        ("q_rope", q_rope, 4, "batch, queries, heads, rope columns"),
        ("latent", latent, 3, f"{lead}, rank"),
        ("k_rope", k_rope, 3, f"{lead}, rope columns"),
    ):
        if t.dim() != rank:
            raise ValueError(f"{name} must be [{layout}], got shape {tuple(t.shape)}")
        if t.device != q_latent.device:
            raise ValueError(f"{name} must be on {q_latent.device}, got {t.device}")
        if t.stride(-1) != 1 and t.shape[-1] != 1:
            raise ValueError(
                f"{name} must be contiguous in its last dimension, got strides {t.stride()}"
            )
    for name, q, name_k, k in (
        ("q_latent", q_latent, "latent", latent),
        ("q_rope", q_rope, "k_rope", k_rope),
    ):
        if q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"{name} has {q.shape[-1]} columns and {name_k} {k.shape[-1]}; they must be equal "
                "(the latent's rank, and the columns of the rotated key)"
            )
        if q.shape[-1] == 0:
            raise ValueError(f"{name} and {name_k} have 0 columns; possible: 1 or more")
    for name, x, like, y in (
        ("q_rope", q_rope, "q_latent", q_latent),
        ("k_rope", k_rope, "latent", latent),
    ):
        if x.shape[:-1] != y.shape[:-1] or x.dtype != y.dtype:
            raise ValueError(
                f"{name} must agree with {like} in dtype and in all but the last dimension, got "
                f"{x.dtype} {tuple(x.shape)} and {y.dtype} {tuple(y.shape)}"
            )
    allowed = ALL_FLOATS if q_latent.device.type == "cpu" else FLOAT_DTYPES
    if q_latent.dtype not in allowed or latent.dtype not in (q_latent.dtype, E4M3):
        raise ValueError(
            f"q_latent is {q_latent.dtype} and latent {latent.dtype}; possible: one of "
            + ", ".join(str(d).removeprefix("torch.") for d in allowed)
            + f" for both, or {E4M3} for the cache"
        )


def _check_key_mask(mask: Tensor | None, latent: Tensor, table: Tensor | None) -> None:
    if mask is None:
        return
    if table is not None:
        raise ValueError(
            "key_mask hides keys of a contiguous cache and got a block_table beside it; give only "
            "the tokens pages, and cache_seqlens and cache_leftpad say which count"
        )
    wanted = tuple(latent.shape[:2])
    if mask.dtype != torch.bool or tuple(mask.shape) != wanted or mask.device != latent.device:
        raise ValueError(
            f"key_mask must be bool {list(wanted)} (batch, keys) on {latent.device}, got "
            f"{mask.dtype} {list(mask.shape)} on {mask.device}"
        )


def _check_descales(latent: Tensor, *descales: Tensor | None) -> None:
    for name, t in zip(("latent_descale", "rope_descale"), descales, strict=True):
        if t is None:
            continue
        if not is_float8(latent):
            raise ValueError(
                f"{name} is for caches of {E4M3}, got a cache of {latent.dtype}; leave it out"
            )
        if tuple(t.shape) != (1,) or t.dtype != torch.float32 or t.device != latent.device:
            raise ValueError(
                f"{name} must be float32 [1] on {latent.device}, got {t.dtype} {list(t.shape)} on "
                f"{t.device}"
            )


# One operator for every backend: torch.compile sees it whole, and a CUDA graph records it.
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")
_LIBRARY.define(
    "mla_decode(Tensor q_latent, Tensor q_rope, Tensor latent, Tensor k_rope, Tensor? seqlens, "
    "Tensor? block_table, Tensor? leftpad, Tensor? key_mask, Tensor? latent_descale, "
    "Tensor? rope_descale, float scaling, int left, int right, int num_splits) -> (Tensor, Tensor)"
)


def _mla_decode(
    q_latent: Tensor, q_rope: Tensor, latent: Tensor, k_rope: Tensor, seqlens: Tensor | None,
    block_table: Tensor | None, leftpad: Tensor | None, key_mask: Tensor | None,
    latent_descale: Tensor | None, rope_descale: Tensor | None, scaling: float, left: int,
    right: int, num_splits: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    problem = MlaProblem(
        q_latent=q_latent, q_rope=q_rope, latent=latent, k_rope=k_rope,
        pattern=Pattern(scaling=scaling, window_left=left, window_right=right), seqlens_k=seqlens,
        block_table=block_table, leftpad=leftpad, key_mask=key_mask,
        latent_descale=latent_descale, rope_descale=rope_descale, num_splits=num_splits,
    )  # fmt: skip
    out, lse = dispatch.load(q_latent.device).mla_attention(problem)
    return out, lse


_LIBRARY.impl("mla_decode", _mla_decode, "CompositeExplicitAutograd")


@torch.library.register_fake(f"{NAMESPACE}::mla_decode", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(q_latent: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    batch, q_len, heads, _ = q_latent.shape
    return (
        q_latent.new_empty(q_latent.shape),
        q_latent.new_empty(batch, heads, q_len, dtype=torch.float32),
    )
