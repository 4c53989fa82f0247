"""flash_attn_with_kvcache: append, rotary embedding, checks at the door, decoding step by step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hf_attn_kernels import flash_attn_with_kvcache, use_backend
from hf_attn_kernels.append import appended, rotate
from hf_attn_kernels.kvcache import cache_problem
from hf_attn_kernels.problem import CacheProblem, Pattern
from hf_attn_kernels.reference import attention_reference

NAN = float("nan")
B, HQ, HKV, D, PAGE = 2, 4, 2, 16, 16
CAUSAL = Pattern(scaling=D**-0.5, window_right=0)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def arguments(**changes: Any) -> dict[str, Any]:
    """A valid contiguous call that appends 2 keys to rows of 3 and 7."""
    call = {
        "q": normal(B, 2, HQ, D, seed=1),
        "k_cache": torch.full((B, 40, HKV, D), NAN),
        "v_cache": torch.full((B, 40, HKV, D), NAN),
        "k": normal(B, 2, HKV, D, seed=2),
        "v": normal(B, 2, HKV, D, seed=3),
        "cache_seqlens": lengths(3, 7),
        "pattern": CAUSAL,
    }
    return call | changes


def paged(**changes: Any) -> dict[str, Any]:
    call = arguments(
        k_cache=torch.full((6, PAGE, HKV, D), NAN),
        v_cache=torch.full((6, PAGE, HKV, D), NAN),
        block_table=torch.tensor([[4, 1, -1], [0, 5, -1]], dtype=torch.int32),
        cache_seqlens=lengths(15, 16),
    )
    return call | changes


def after(**call: Any) -> CacheProblem:
    """The problem after its new keys are written."""
    return appended(cache_problem(**call))


# -- append ---------------------------------------------------------------------------------------


def written(cache: Tensor) -> Tensor:
    """Bool ``[rows, positions]`` of a cache that was NaN."""
    return ~cache.isnan().any(dim=-1).any(dim=-1)


@pytest.mark.parametrize("as_int", [True, False], ids=["int", "tensor"])
def test_append_contiguous(as_int: bool) -> None:
    call = arguments(cache_seqlens=5 if as_int else lengths(5, 5))
    problem = after(**call)
    for new, cache in ((call["k"], problem.k_cache), (call["v"], problem.v_cache)):
        assert torch.equal(cache[:, 5:7], new)
        assert int(written(cache).sum()) == 4
    assert problem.seqlens_k.tolist() == [7, 7] and problem.seqlens_k.dtype == torch.int32
    assert problem.k_cache is call["k_cache"]


def test_append_rows_by_index_leaves_the_lengths_alone() -> None:
    given = lengths(3, 7)
    call = arguments(
        k_cache=torch.full((4, 40, HKV, D), NAN), v_cache=torch.full((4, 40, HKV, D), NAN),
        cache_batch_idx=lengths(2, 0), cache_seqlens=given,
    )  # fmt: skip
    problem = after(**call)
    assert torch.equal(problem.k_cache[2, 3:5], call["k"][0])
    assert torch.equal(problem.v_cache[0, 7:9], call["v"][1])
    assert int(written(problem.k_cache).sum()) == 4
    assert given.tolist() == [3, 7] and problem.seqlens_k.tolist() == [5, 9]


def test_append_across_a_page_border() -> None:
    call = paged()
    problem = after(**call)
    assert torch.equal(problem.k_cache[4, 15], call["k"][0, 0])
    assert torch.equal(problem.k_cache[1, 0], call["k"][0, 1])
    assert torch.equal(problem.v_cache[5, :2], call["v"][1])
    assert int(written(problem.v_cache).sum()) == 4


def test_append_into_a_strided_cache() -> None:
    both = torch.full((B, 40, 2, HKV, D), NAN)
    call = arguments(k_cache=both[:, :, 0], v_cache=both[:, :, 1])
    after(**call)
    assert torch.equal(both[0, 3:5, 0], call["k"][0]) and torch.equal(both[1, 7:9, 1], call["v"][1])


def test_nothing_reads_values_off_the_cpu() -> None:
    """On a device without values nothing may wait for one."""
    for call in (arguments(), paged()):
        off = {n: t.to("meta") if isinstance(t, Tensor) else t for n, t in call.items()}
        problem = after(**off, rotary_cos=torch.empty(64, 4, device="meta"),
                                rotary_sin=torch.empty(64, 4, device="meta"))  # fmt: skip
        assert problem.seqlens_k.shape == (B,)


def test_without_new_keys_the_cache_is_full_by_default() -> None:
    problem = after(**arguments(k=None, v=None, cache_seqlens=None))
    assert problem.seqlens_k.tolist() == [40, 40]
    problem = after(**paged(k=None, v=None, cache_seqlens=None))
    assert problem.seqlens_k.tolist() == [48, 48]


# -- rotary embedding -----------------------------------------------------------------------------


def rotary_tables(columns: int, positions: int = 64) -> tuple[Tensor, Tensor]:
    angle = torch.arange(positions)[:, None] / 10.0 ** (torch.arange(columns) / columns)
    return angle.cos(), angle.sin()


def rotated(x: Tensor, position: int, columns: int, interleaved: bool) -> Tensor:
    """One token ``[H, D]`` by complex multiplication."""
    angle = position / 10.0 ** (torch.arange(columns, dtype=torch.float64) / columns)
    turn = torch.polar(torch.ones_like(angle), angle)
    head = x[:, : 2 * columns].double()
    pairs = head.unflatten(1, (columns, 2)) if interleaved else head.unflatten(1, (2, columns)).mT
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    flat = turned.flatten(1) if interleaved else turned.mT.flatten(1)
    return torch.cat([flat.to(x.dtype), x[:, 2 * columns :]], dim=1)


@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
@pytest.mark.parametrize("columns", [8, 3], ids=["whole", "partial"])
def test_rotary_turns_new_keys_and_queries(interleaved: bool, columns: int) -> None:
    cos, sin = rotary_tables(columns)
    call = arguments(rotary_cos=cos, rotary_sin=sin, rotary_interleaved=interleaved)
    problem = after(**call)
    for b, start in enumerate((3, 7)):
        for i in range(2):
            want_k = rotated(call["k"][b, i], start + i, columns, interleaved)
            want_q = rotated(call["q"][b, i], start + i, columns, interleaved)
            torch.testing.assert_close(problem.k_cache[b, start + i], want_k)
            torch.testing.assert_close(problem.q[b, i], want_q)
            assert torch.equal(problem.v_cache[b, start + i], call["v"][b, i])


@pytest.mark.parametrize(
    ("pattern", "positions"),
    [(Pattern(scaling=1.0), (7, 7)), (Pattern(scaling=1.0, window_left=4), (7, 8))],
    ids=["full", "window"],
)
def test_rotary_of_queries_follows_the_mask(pattern: Pattern, positions: tuple[int, int]) -> None:
    """FlashAttention-2: without an order among the new tokens, all queries sit at the first."""
    cos, sin = rotary_tables(8)
    call = arguments(rotary_cos=cos, rotary_sin=sin, pattern=pattern)
    problem = after(**call)
    for i, position in enumerate(positions):
        want = rotated(call["q"][1, i], position, 8, True)
        torch.testing.assert_close(problem.q[1, i], want)


def test_rotary_of_half_precision_is_computed_in_float32() -> None:
    cos, sin = rotary_tables(8)
    x = normal(1, 1, HQ, D).to(torch.bfloat16)
    turned = rotate(x, cos[None, 5:6], sin[None, 5:6], interleaved=False)
    want = rotated(x[0, 0], 5, 8, False)
    assert turned.dtype == torch.bfloat16
    torch.testing.assert_close(turned[0, 0], want)


# -- step by step ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpu", "triton"])
@pytest.mark.parametrize("page_size", [0, PAGE], ids=["contiguous", "paged"])
@pytest.mark.parametrize("interleaved", [True, False], ids=["interleaved", "halves"])
def test_decoding_in_steps_equals_attention_over_all(
    backend: str, page_size: int, interleaved: bool
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    total, steps = 21, (14, 1, 4, 2)
    q, k, v = (normal(B, total, h, D, seed=s) for s, h in enumerate((HQ, HKV, HKV)))
    cos, sin = rotary_tables(8)
    positions = torch.arange(total)
    turned_q, turned_k = (
        rotate(x, cos[positions][None], sin[positions][None], interleaved=interleaved)
        for x in (q, k)
    )
    options: dict[str, Any] = {"causal": True, "window_size": (9, 0), "sink_tokens": 2}
    want, want_lse = attention_reference(turned_q, turned_k, v, **options)

    table = None
    shape = (B, 32)
    if page_size:
        table = torch.tensor([[3, 0], [1, 4]], dtype=torch.int32)
        shape = (5, page_size)
    k_cache, v_cache = (torch.full((*shape, HKV, D), NAN) for _ in range(2))
    held = 0
    for step in steps:
        new = slice(held, held + step)
        with use_backend(backend):
            result = flash_attn_with_kvcache(
                q[:, new], k_cache, v_cache, k[:, new], v[:, new], rotary_cos=cos, rotary_sin=sin,
                cache_seqlens=lengths(held, held), block_table=table, return_softmax_lse=True,
                rotary_interleaved=interleaved, **options,
            )  # fmt: skip
        assert isinstance(result, tuple)
        torch.testing.assert_close(result[0].double(), want[:, new], rtol=0, atol=2e-6)
        torch.testing.assert_close(
            result[1].double(), want_lse[:, :, new], rtol=0, atol=2e-6, check_dtype=False
        )
        held += step


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_left_padding_is_skipped(backend: str) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    q, k, v = normal(B, 1, HQ, D), normal(B, 20, HKV, D, seed=1), normal(B, 20, HKV, D, seed=2)
    k[0, :6], v[0, :6] = NAN, NAN
    with use_backend(backend):
        out = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths(18, 20), cache_leftpad=lengths(6, 0)
        )
    assert isinstance(out, Tensor)
    first = attention_reference(q[:1], k[:1, 6:18], v[:1, 6:18])[0]
    second = attention_reference(q[1:], k[1:], v[1:])[0]
    torch.testing.assert_close(out.double(), torch.cat([first, second]), rtol=0, atol=2e-6)


# -- the door -------------------------------------------------------------------------------------

BAD_INPUT: dict[str, tuple[dict[str, Any], str]] = {
    "q-3d": (arguments(q=normal(2, HQ, D)), r"q must be \[batch, length, heads, head_dim\], got"),
    "cache-3d": (arguments(k_cache=normal(40, HKV, D)), r"k_cache must be \[batch, length"),
    "paged-cache-3d": (paged(k_cache=normal(6, HKV, D)), r"k_cache must be \[pages, page_size"),
    "head-stride": (
        arguments(k_cache=torch.zeros(B, 40, D, HKV).mT), "k_cache must be contiguous in head_dim"
    ),
    "dtype": (arguments(k_cache=torch.zeros(B, 40, HKV, D).half()), "share one dtype"),
    "new-dtype": (arguments(k=normal(B, 2, HKV, D).half()), "k must be torch.float32 like"),
    "heads": (arguments(q=normal(B, 2, 3, D)), "3 query heads cannot be shared by 2"),
    "caches-differ": (arguments(v_cache=torch.zeros(B, 39, HKV, D)), "must agree in all but"),
    "batch": (
        arguments(k_cache=torch.zeros(3, 40, HKV, D), v_cache=torch.zeros(3, 40, HKV, D)),
        r"batch 2 and k_cache 3 rows.*cache_batch_idx \[2\]",
    ),
    "k-without-v": (arguments(v=None), "k and v are appended together, v is missing"),
    "new-without-lengths": (arguments(cache_seqlens=None), "cache_seqlens, which is missing"),
    "new-shape": (arguments(v=normal(B, 3, HKV, D)), r"v must be \[2, 2, 2, 16\].*got \(2, 3,"),
    "lengths-int64": (
        arguments(cache_seqlens=lengths(3, 7).long()), r"cache_seqlens must be an int32 tensor of"
    ),
    "lengths-shape": (arguments(cache_seqlens=lengths(3)), r"shape \[2\], got torch.int32 \[1\]"),
    "lengths-float": (arguments(cache_seqlens=3.5), "cache_seqlens must be 0 to 40.*got 3.5"),
    "lengths-int-high": (arguments(cache_seqlens=41), "cache_seqlens must be 0 to 40.*got 41"),
    "no-room": (arguments(cache_seqlens=lengths(3, 39)), "room for 40 keys.*0 to 38 .*got 3 to"),
    "negative": (arguments(cache_seqlens=lengths(-1, 7)), "got -1 to 7"),
    "index-high": (arguments(cache_batch_idx=lengths(0, 2)), r"cache_batch_idx must be 0 to 1"),
    "index-dtype": (arguments(cache_batch_idx=lengths(0, 1).long()), "batch_idx must be an int32"),
    "leftpad-high": (arguments(cache_leftpad=lengths(6, 0)), "cache_leftpad must be 0 to the"),
    "table-dtype": (paged(block_table=torch.zeros(2, 3).long()), "block_table must be an int32"),
    "table-shape": (paged(block_table=lengths(0, 1)), r"block_table must be \[2, max_blocks\]"),
    "table-and-index": (paged(cache_batch_idx=lengths(0, 1)), "reorder the rows of the block"),
    "table-page-high": (
        paged(block_table=torch.tensor([[4, 1], [0, 6]], dtype=torch.int32)),
        "names page 6; the cache has pages 0 to 5",
    ),
    "page-size": (
        paged(k_cache=torch.zeros(6, 24, HKV, D), v_cache=torch.zeros(6, 24, HKV, D)),
        "page_size 24 .*multiples of 16",
    ),
    "s_aux-shape": (arguments(s_aux=normal(3)), r"s_aux must be \[4\]"),
    "alibi-shape": (arguments(alibi_slopes=normal(3)), r"alibi_slopes must be \[4\] or \[2, 4\]"),
    "splits": (arguments(num_splits=-1), "num_splits must be 0"),
    "gradient": (arguments(q=normal(B, 2, HQ, D).requires_grad_()), "no backward.*torch.no_grad"),
    "rotary-without-k": (
        arguments(k=None, v=None, rotary_cos=torch.ones(64, 8), rotary_sin=torch.ones(64, 8)),
        "k is missing",
    ),
    "rotary-half": (arguments(rotary_cos=torch.ones(64, 8)), "one of them is missing"),
    "rotary-wide": (
        arguments(rotary_cos=torch.ones(64, 9), rotary_sin=torch.ones(64, 9)), r"1 to 8\]"
    ),
    "rotary-short": (
        arguments(rotary_cos=torch.ones(39, 8), rotary_sin=torch.ones(39, 8)),
        "covers 39 positions and a row of the cache 40",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_says_what_is_wrong(name: str) -> None:
    call, message = BAD_INPUT[name]
    with pytest.raises(ValueError, match=message):
        cache_problem(**call)


def test_a_refused_call_leaves_the_cache_alone() -> None:
    call = arguments(cache_seqlens=lengths(3, 39))
    with pytest.raises(ValueError, match="has room for 40 keys"):
        cache_problem(**call)
    assert not bool(written(call["k_cache"]).any())


@pytest.mark.parametrize("compiled", [False, True], ids=["torch", "extension"])
def test_new_keys_without_a_page(compiled: bool, request: pytest.FixtureRequest) -> None:
    """Whoever writes them finds that; the row that has its pages is not written either."""
    served = request.getfixturevalue("with_extension") if compiled else []
    call = paged(cache_seqlens=lengths(16, 31))
    pattern = {"softmax_scale": call.pop("pattern").scaling, "causal": True}
    with pytest.raises(ValueError, match="no page for some of the 2 new keys"):
        flash_attn_with_kvcache(**call, **pattern)
    assert not bool(written(call["k_cache"]).any()) and len(served) == compiled
    call["cache_seqlens"][1] = 30
    flash_attn_with_kvcache(**call, **pattern)
    assert int(written(call["k_cache"]).sum()) == 4 and len(served) == 2 * compiled


def test_what_the_backends_get() -> None:
    slopes = torch.rand(HQ)
    problem = cache_problem(**arguments(q=normal(B, HQ, 2, D).transpose(1, 2), alibi_slopes=slopes))
    assert isinstance(problem, CacheProblem)
    assert problem.alibi_slopes is not None and problem.alibi_slopes.shape == (1, HQ)
    assert problem.q.stride(-1) == 1
