"""Other attention to compare with: transformers' own, FlashAttention-1, and two libraries.

FlashInfer and FlashAttention-4 take part where they are installed; neither is a requirement.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from hf_attn_patch.bench.baselines import DTYPES, Attention, Shape, dense_mask, transformers_sdpa

from .decode import PAGE_SIZES, tables

WORKSPACE_BYTES = 256 * 2**20  # FlashInfer asks for at least 128 MiB


def transformers_own(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """transformers' sdpa, without a mask where it can do without."""
    mask = None if shape.causal and shape.window is None else dense_mask(shape, q.device)
    return transformers_sdpa(q, k, v, mask, causal=shape.causal)


def flash_attention_1(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """The 2022 algorithm, see :mod:`.fa1`."""
    from .fa1 import flash_attention_1 as run

    return run(q, k, v, shape)


def flash_attention_4(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """FlashAttention-4 (package flash-attn-4), differentiable."""
    from flash_attn.cute import flash_attn_func

    left, right = (None if side < 0 else side for side in shape.window_size)
    causal = shape.causal and shape.window is None
    window = (left, 0 if shape.causal and shape.window is not None else right)
    found = flash_attn_func(q, k, v, causal=causal, window_size=window)
    out: Tensor = found[0] if isinstance(found, tuple) else found
    return out


def flashinfer_prefill(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
    """FlashInfer's ragged prefill, planned once for a shape, as a server plans once for a batch.

    Raises:
        ValueError: a gradient is wanted; it has none.
    """
    if shape.pass_ == "backward":
        raise ValueError("FlashInfer has no backward")
    out: Tensor = _prefill(shape, q.device).run(*(x.flatten(0, 1) for x in (q, k, v)))
    return out.view(q.shape)


def flashinfer_decode(q: Tensor, k: Tensor, v: Tensor, shape: Shape, *, page_size: int) -> Tensor:
    """FlashInfer's decode over k and v cut into pages, those of a row in a random order.

    Raises:
        ValueError: several queries, a window or a page that is not full.
    """
    if shape.seq_q != 1 or shape.window is not None or shape.seq_k % page_size:
        raise ValueError(f"pages of {page_size} need one query, no window and full pages")
    pages = tuple(x.view(-1, page_size, *x.shape[2:]) for x in (k, v))
    out: Tensor = _decode(shape, page_size, q.device).run(q.flatten(0, 1), pages)
    return out.view(q.shape)


@functools.cache
def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)


@functools.lru_cache(maxsize=1)
def _prefill(shape: Shape, device: torch.device) -> Any:
    import flashinfer

    wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(_workspace(device), "NHD")
    starts = [torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * length
              for length in (shape.seq_q, shape.seq_k)]  # fmt: skip
    wrapper.plan(
        *starts, shape.heads_q, shape.heads_kv, shape.head_dim, causal=shape.causal,
        window_left=shape.window_size[0], q_data_type=DTYPES[shape.dtype],
    )  # fmt: skip
    return wrapper


@functools.lru_cache(maxsize=1)
def _decode(shape: Shape, page_size: int, device: torch.device) -> Any:
    import flashinfer

    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(device), "NHD", use_tensor_cores=shape.heads_q // shape.heads_kv >= 4
    )
    table, _ = tables(shape, page_size, device)
    pages = table.shape[1]
    starts = torch.arange(shape.batch + 1, dtype=torch.int32, device=device) * pages
    last = torch.full((shape.batch,), page_size, dtype=torch.int32, device=device)
    wrapper.plan(
        starts, table.flatten(), last, shape.heads_q, shape.heads_kv, shape.head_dim, page_size,
        q_data_type=DTYPES[shape.dtype],
    )  # fmt: skip
    return wrapper


def _installed(package: str, found: dict[str, Attention]) -> dict[str, Attention]:
    return found if importlib.util.find_spec(package) else {}


PREFILL: dict[str, Attention] = {
    "transformers_sdpa": transformers_own,
    "flash_attention_1": flash_attention_1,
    **_installed("flash_attn", {"flash_attention_4": flash_attention_4}),
    **_installed("flashinfer", {"flashinfer": flashinfer_prefill}),
}
DECODE: dict[str, Attention] = _installed("flashinfer", {
    f"flashinfer:page{size}": functools.partial(flashinfer_decode, page_size=size)
    for size in PAGE_SIZES
})  # fmt: skip
