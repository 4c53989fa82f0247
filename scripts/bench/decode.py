"""The decode slice: shapes, and this package over pages beside it over a contiguous cache.

One query sees all keys, so the order of a row's pages changes nothing: a table that shuffles them
makes a paged cache of the contiguous one, in the same memory and with the same answer.

Legend as in :mod:`hf_attn_patch.bench.baselines`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from hf_attn_patch.bench.baselines import Attention, Shape
from hf_attn_patch.bench.results import OURS

PAGE_SIZES = (16, 64, 256)
HEADS = ((32, 8), (32, 32), (64, 8))  # 4, 1 and 8 query heads per KV head
BATCHES = (1, 8, 64, 256)
KEYS = (1024, 8192, 65536)
# K and V of a shape; a device of 141 GB also holds what the contenders need beside them
MOST_BYTES = 120 * 2**30


def shapes() -> Iterator[Shape]:
    for heads_q, heads_kv in HEADS:
        for batch in BATCHES:
            for seq_k in KEYS:
                yield _shape(batch, heads_q, heads_kv, seq_k)
    yield _shape(1, 32, 8, 131072)
    yield _shape(64, 32, 1, 8192)


def _shape(batch: int, heads_q: int, heads_kv: int, seq_k: int) -> Shape:
    return Shape(
        pass_="decode",
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=128,
        seq_q=1,
        seq_k=seq_k,
    )


def too_large(shape: Shape) -> str | None:
    """Why a decode shape is not measured, or None."""
    if shape.pass_ != "decode" or shape.kv_bytes <= MOST_BYTES:
        return None
    need, most = (n / 2**30 for n in (shape.kv_bytes, MOST_BYTES))
    return f"{shape}: K and V are {need:.0f} GiB, the limit is {most:.0f} GiB"


def over_pages(q: Tensor, k: Tensor, v: Tensor, shape: Shape, *, page_size: int) -> Tensor:
    """This package's `flash_attn_with_kvcache` over k and v cut into pages, shuffled by row.

    Raises ValueError where the order of pages would matter, or the last page would not be full.
    """
    from hf_attn_kernels import flash_attn_with_kvcache

    if shape.seq_q != 1 or shape.window is not None or shape.seq_k % page_size:
        raise ValueError(f"pages of {page_size} need one query, no window and full pages")
    table, lengths = tables(shape, page_size, q.device)
    k_pages, v_pages = (x.view(-1, page_size, *x.shape[2:]) for x in (k, v))
    out = flash_attn_with_kvcache(
        q, k_pages, v_pages, cache_seqlens=lengths, block_table=table, causal=shape.causal
    )
    assert isinstance(out, Tensor)  # a pair only when the LSE is asked for
    return out


@functools.lru_cache(maxsize=len(PAGE_SIZES))
def tables(shape: Shape, page_size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Block table `[B, pages of a row]`, every row's own pages in a random order, and lengths."""
    generator = torch.Generator().manual_seed(0)
    pages = shape.seq_k // page_size
    order = torch.rand(shape.batch, pages, generator=generator).argsort(dim=1)
    table = order + torch.arange(shape.batch)[:, None] * pages
    lengths = torch.full((shape.batch,), shape.seq_k, dtype=torch.int32, device=device)
    return table.to(device, torch.int32), lengths


PAGED: dict[str, Attention] = {
    f"{OURS}:page{size}": functools.partial(over_pages, page_size=size) for size in PAGE_SIZES
}
