"""Calls with a size of 0, in every dimension of every function: an empty answer, or a ValueError.

A query that sees no key gets zeros, and -inf (or its sink) as log-sum-exp. By the CPU's own
operators, by its extension and by Triton's kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from decode_calls import DEVICE
from torch import Tensor

from hf_attn_kernels import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    mla_decode,
    use_backend,
)

BACKENDS = ("triton",) if DEVICE == "cuda" else ("cpu", "extension", "triton")
Sizes = dict[str, int]
Found = tuple[Tensor, Tensor]
FULL: Sizes = {
    "batch": 2, "queries": 2, "keys": 32, "heads": 4, "heads_kv": 2, "head_dim": 16,
    "head_dim_v": 32, "new": 2, "pages": 5, "page_size": 16, "columns": 2,
}  # fmt: skip


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "extension":
        request.getfixturevalue("with_extension")
        yield "cpu"
        return
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def ints(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def dense(s: Sizes, **options: Any) -> Found:
    q = normal(s["batch"], s["queries"], s["heads"], s["head_dim"])
    k = normal(s["batch"], s["keys"], s["heads_kv"], s["head_dim"])
    v = normal(s["batch"], s["keys"], s["heads_kv"], s["head_dim_v"])
    leaves = [q, k, v]
    if options.pop("training", False):
        leaves = [x.requires_grad_() for x in leaves]
    if options.pop("added", False):
        options["bias"] = normal(1, s["heads"], s["queries"], s["keys"]).requires_grad_()
        leaves.append(options["bias"])
    if options.pop("padded", False):
        options["key_padding_mask"] = torch.ones(
            s["batch"], s["keys"], dtype=torch.bool, device=DEVICE
        )
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    if q.requires_grad:
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all(g.shape == x.shape for g, x in zip(grads, leaves, strict=True))
        assert all(not bool(g.isnan().any()) for g in grads)
        if not out.numel():
            assert not any(bool(g.any()) for g in grads)
    return out, lse


def offsets(rows: int, length: int) -> Tensor:
    return ints(range(0, rows * length + 1, length) if length else [0] * (rows + 1))


def packed(s: Sizes, **options: Any) -> Found:
    """The sequences one after the other, and no token behind them."""
    rows, queries, keys = s["batch"], s["queries"], s["keys"]
    leaves = [
        normal(rows * queries, s["heads"], s["head_dim"]),
        normal(rows * keys, s["heads_kv"], s["head_dim"]),
        normal(rows * keys, s["heads_kv"], s["head_dim_v"]),
    ]
    if options.pop("training", False):
        leaves = [x.requires_grad_() for x in leaves]
    out, lse, _ = flash_attn_varlen_func(
        *leaves, offsets(rows, queries), offsets(rows, keys), queries, keys,
        return_attn_probs=True, **options,
    )  # fmt: skip
    if leaves[0].requires_grad:
        grads = torch.autograd.grad(out.sum(), leaves)
        assert all(g.shape == x.shape for g, x in zip(grads, leaves, strict=True))
    shape = (rows, queries, s["heads"], s["head_dim_v"])
    return out.view(shape), lse.view(s["heads"], rows, queries).transpose(0, 1)


def pages(s: Sizes) -> tuple[Tensor, Tensor, Tensor, int]:
    """Pages of keys and of values, a table of them, and the keys that a row can have."""
    lead = (s["pages"], s["page_size"], s["heads_kv"])
    table = torch.full((s["batch"], s["columns"]), -1, dtype=torch.int32, device=DEVICE)
    if s["pages"]:
        count = s["batch"] * s["columns"]
        table = torch.arange(count, device=DEVICE).int().view(table.shape) % s["pages"]
    room = s["columns"] * s["page_size"] if s["pages"] else 0
    return normal(*lead, s["head_dim"]), normal(*lead, s["head_dim_v"]), table, room


def packed_pages(s: Sizes, **options: Any) -> Found:
    rows, queries = s["batch"], s["queries"]
    k, v, table, room = pages(s)
    held = min(room, s["keys"])
    q = normal(rows * queries, s["heads"], s["head_dim"])
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, offsets(rows, queries), offsets(rows, held), queries, held, block_table=table,
        return_attn_probs=True, **options,
    )  # fmt: skip
    shape = (rows, queries, s["heads"], s["head_dim_v"])
    return out.view(shape), lse.view(s["heads"], rows, queries).transpose(0, 1)


def cached(s: Sizes, *, paged: bool, new: bool = False, **options: Any) -> Found:
    if paged:
        k, v, table, room = pages(s)
        options["block_table"] = table
    else:
        room = s["keys"]
        lead = (s["batch"], room, s["heads_kv"])
        k, v = normal(*lead, s["head_dim"]), normal(*lead, s["head_dim_v"])
    q = normal(s["batch"], s["queries"], s["heads"], s["head_dim"])
    held = max(room - s["new"], 0) if new else min(room, s["keys"])
    before = k.clone()
    if new:
        lead = (s["batch"], s["new"], s["heads_kv"])
        options |= {"k": normal(*lead, s["head_dim"]), "v": normal(*lead, s["head_dim_v"])}
        if options.pop("turned", False):
            half = s["head_dim"] // 2
            options |= {
                n: torch.rand(64, half, device=DEVICE) for n in ("rotary_cos", "rotary_sin")
            }
    lengths = torch.full((s["batch"],), held, dtype=torch.int32, device=DEVICE)
    found = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, return_softmax_lse=True, **options
    )
    assert isinstance(found, tuple)
    if new:  # whether anybody asks or not
        assert torch.equal(k, before) == (options["k"].numel() == 0)
    return found


def latents(s: Sizes, *, paged: bool, **options: Any) -> Found:
    """`head_dim_v` is the rank, `head_dim` the columns of the rotated key."""
    rank, rope = s["head_dim_v"], s["head_dim"]
    lead: tuple[int, int] = (s["batch"], s["keys"])
    lengths = None
    if paged:
        _, _, options["block_table"], room = pages(s)
        lead = (s["pages"], s["page_size"])
        lengths = torch.full((s["batch"],), min(room, s["keys"]), dtype=torch.int32, device=DEVICE)
    heads = (s["batch"], s["queries"], s["heads"])
    found = mla_decode(
        normal(*heads, rank), normal(*heads, rope), normal(*lead, rank), normal(*lead, rope),
        softmax_scale=0.3, cache_seqlens=lengths, return_softmax_lse=True, **options,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


FUNCTIONS: dict[str, tuple[Callable[..., Found], dict[str, Any], str]] = {
    "dense": (dense, {}, "batch queries keys heads heads_kv head_dim head_dim_v"),
    "dense-causal-training": (
        dense, {"causal": True, "training": True}, "batch queries keys heads heads_kv head_dim"
    ),
    "dense-bias-training": (
        dense, {"training": True, "added": True}, "batch queries keys heads"
    ),
    "dense-padded": (
        dense, {"padded": True, "window_size": (3, 0), "sink_tokens": 1}, "batch queries keys"
    ),
    "packed": (packed, {}, "batch queries keys heads heads_kv head_dim head_dim_v"),
    "packed-training": (packed, {"training": True, "softcap": 5.0}, "batch queries keys heads"),
    "packed-pages": (
        packed_pages, {"causal": True},
        "batch queries keys heads heads_kv head_dim head_dim_v pages page_size columns",
    ),
    "cache": (
        cached, {"paged": False}, "batch queries keys heads heads_kv head_dim head_dim_v"
    ),
    "cache-new": (
        cached, {"paged": False, "new": True, "causal": True}, "batch queries heads heads_kv new"
    ),
    "cache-new-turned": (
        cached, {"paged": False, "new": True, "causal": True, "turned": True}, "batch queries new"
    ),
    "pages": (
        cached, {"paged": True},
        "batch queries keys heads heads_kv head_dim head_dim_v pages page_size columns",
    ),
    "pages-window": (cached, {"paged": True, "window_size": (3, 0)}, "batch queries columns"),
    "pages-new": (
        cached, {"paged": True, "new": True, "causal": True}, "batch queries heads new page_size"
    ),
    "latents": (
        latents, {"paged": False}, "batch queries keys heads head_dim head_dim_v"
    ),
    "latents-pages": (
        latents, {"paged": True},
        "batch queries keys heads head_dim head_dim_v pages page_size columns",
    ),
}  # fmt: skip
REFUSED = {
    "heads_kv": "0 key/value heads", "head_dim": "head_dim 0|0 columns",
    "head_dim_v": "head_dim 0|0 columns", "page_size": "page_size 0 .*possible: multiples of 16",
}  # fmt: skip
CALLS = [
    pytest.param(name, dimension, id=f"{name}-no-{dimension}")
    for name, (_, _, those) in FUNCTIONS.items()
    for dimension in those.split()
]


@pytest.mark.parametrize(("name", "dimension"), CALLS)
def test_a_size_of_zero(name: str, dimension: str, backend: str, poison_memory: None) -> None:
    function, options, _ = FUNCTIONS[name]
    sizes = FULL | {dimension: 0}
    if dimension in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[dimension]):
            function(sizes, **options)
        return
    out, lse = function(sizes, **options)
    lead, heads = (sizes["batch"], sizes["queries"]), sizes["heads"]
    assert out.shape == (*lead, heads, sizes["head_dim_v"])
    assert lse.shape == (lead[0], heads, lead[1]) and lse.dtype == torch.float32
    if dimension in ("keys", "pages", "columns"):  # there are queries, and they see nothing
        assert out.numel() and not bool(out.any())
        assert bool(torch.isneginf(lse).all())
    elif dimension == "new":
        assert bool(out.isfinite().all()) and bool(lse.isfinite().all())
    else:
        assert not out.numel() and not lse.numel()


@pytest.mark.parametrize("name", ["dense", "packed-pages", "cache", "pages", "latents-pages"])
def test_control_of_full_sizes(name: str, backend: str) -> None:
    function, options, _ = FUNCTIONS[name]
    out, lse = function(FULL, **options)
    assert bool(out.any()) and bool(lse.isfinite().all())


def test_sinks_are_all_that_is_seen(backend: str) -> None:
    s_aux = normal(4)
    for function, options in ((dense, {}), (cached, {"paged": False}), (packed, {})):
        out, lse = function(FULL | {"keys": 0}, s_aux=s_aux, **options)
        assert not bool(out.any())
        torch.testing.assert_close(lse, s_aux[None, :, None].expand_as(lse))


def test_queries_turn_without_new_keys(backend: str) -> None:
    """As many new keys as none: q is rotated all the same."""
    q, cache = normal(1, 2, 2, 16), normal(1, 8, 1, 16)
    turn = torch.rand(8, 8, device=DEVICE)
    held = ints([5])
    got = flash_attn_with_kvcache(
        q, cache, cache, cache[:, :0], cache[:, :0], turn.cos(), turn.sin(), held, causal=True
    )
    from hf_attn_kernels.append import rotate

    at = turn[None, 5:7]
    turned = rotate(q, at.cos(), at.sin(), interleaved=True)
    want = flash_attn_with_kvcache(turned, cache, cache, cache_seqlens=held, causal=True)
    torch.testing.assert_close(got, want)
    assert not torch.allclose(got, flash_attn_with_kvcache(q, cache, cache, cache_seqlens=held))
