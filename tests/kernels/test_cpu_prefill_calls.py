"""Which calls the compiled prefill serves: plain ones of transformers, chunks over a cache and over
pages, under torch.compile; what it leaves to torch, and that `plan` says so.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from extension_calls import count_prefills, pages
from kernel_cases import Case, assert_within_budget, make_data, run_kernel
from test_cpu_attention import problem_of
from torch import Tensor

from hf_attn_kernels import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from hf_attn_kernels.cpu import blockwise, extension, extension_prefill, plan
from hf_attn_kernels.dispatch import plain_attention
from hf_attn_kernels.reference import attention_reference

CPU = torch.device("cpu")
F32, BF16 = torch.float32, torch.bfloat16
NAN = float("nan")


@pytest.fixture
def served(with_extension: list[object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The extension serves what it can; gives a list that grows by each prefill that it served."""
    return count_prefills(monkeypatch)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("left", [-1, 0, 20, 500], ids=lambda left: f"left{left}")
@pytest.mark.parametrize(
    ("q_len", "k_len", "causal"), [(64, 64, True), (70, 333, True), (64, 333, False)], ids=str
)
def test_plain_calls(
    q_len: int, k_len: int, causal: bool, left: int, dtype: torch.dtype, served: list[object]
) -> None:
    """As transformers lays them out; also windows and chunks, for which torch has no short way."""
    q, k, v = (
        torch.randn(2, n, heads, 32).to(dtype).transpose(1, 2)
        for n, heads in ((q_len, 6), (k_len, 2), (k_len, 2))
    )
    with torch.no_grad():
        out = plain_attention(q, k, v, 0.3, causal=causal, window_left=left)
        few = plain_attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], 0.3, causal=causal)
    assert out is not None and out.is_contiguous() and few is not None and len(served) == 2
    exact, eager = (
        attention_reference(
            *(x.transpose(1, 2) for x in (q, k, v)), causal=causal, softmax_scale=0.3,
            window_size=(left, -1), dtype=dtype_,
        )[0]
        for dtype_ in (torch.float64, dtype)
    )  # fmt: skip
    assert_within_budget("out", out, eager, exact)


def test_a_chunk_over_a_contiguous_cache(served: list[object]) -> None:
    q, k, v = (torch.randn(3, n, h, 32) for n, h in ((20, 4), (150, 2), (150, 2)))
    lengths = torch.tensor([150, 20, 97], dtype=torch.int32)
    k[1, 20:], v[1, 20:], k[2, 97:], v[2, 97:] = (NAN,) * 4
    out = flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
    for row, n in enumerate(lengths.tolist()):
        mine = (q[row : row + 1], k[row : row + 1, :n], v[row : row + 1, :n])
        exact, _ = attention_reference(*mine, causal=True)
        torch.testing.assert_close(out[row : row + 1].double(), exact, rtol=1e-5, atol=1e-5)
    assert len(served) == 1


REFUSED = {
    "float64": (Case(dtype=torch.float64), "float64"),
    "D24": (Case(head_dim=24), "multiples of 16"),
    "DV40": (Case(head_dim_v=40), "multiples of 16"),
    "alibi": (Case(alibi="heads"), "ALiBi"),
    "bias": (Case(bias=(1, 1, 63)), "bias"),
    "dropout": (Case(dropout_p=0.5), "dropout"),
    "no-queries": (Case(q_len=0, k_len=5), "nothing to compute"),
}


@pytest.mark.parametrize(("case", "why"), REFUSED.values(), ids=REFUSED)
def test_what_is_left_to_torch(case: Case, why: str, served: list[object]) -> None:
    data = make_data(case, CPU)
    call = blockwise.call_of(problem_of(data.q, data.k, data.v, case, data.options, data.cu))
    if case.dropout_p:
        pattern = replace(call.scoring.pattern, dropout_p=case.dropout_p)
        call = replace(call, scoring=replace(call.scoring, pattern=pattern))
    assert why in (extension_prefill.refusal(call) or "") and not extension_prefill.serves(call)
    run_kernel(data)
    assert not served


def test_small_calls_are_left_to_torch(
    with_extension: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    least = dict(extension_prefill.LEAST_PRODUCTS)
    served = count_prefills(monkeypatch)
    monkeypatch.setattr(extension_prefill, "LEAST_PRODUCTS", least)
    x = torch.randn(1, 31, 16, 64)  # just below 2**20
    y = torch.randn(1, 33, 16, 64)
    for q, calls in ((x, 0), (y, 1), (x.bfloat16(), 2), (y[:, :3].bfloat16(), 2), (y.half(), 3)):
        flash_attn_func(q, q, q)
        assert len(served) == calls, q.shape
    with torch.no_grad():
        for q, calls in ((x, 3), (y, 4)):
            assert plain_attention(*[q.transpose(1, 2)] * 3, 0.1, causal=True) is not None
            assert len(served) == calls


def test_older_processors_leave_it_to_torch(
    served: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their matmuls are as fast by torch."""
    monkeypatch.setattr(extension_prefill, "CAPABILITY", "AVX512")
    for capability, calls in (("AVX512_VNNI", 1), ("AVX2", 1), ("DEFAULT", 1), ("AVX512", 2)):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda c=capability: c)
        run_kernel(make_data(Case(), CPU))
        assert len(served) == calls


def test_one_query_is_decoding(served: list[object]) -> None:
    run_kernel(make_data(Case(q_len=1, k_len=63), CPU))
    with extension.left_out():
        run_kernel(make_data(Case(), CPU))
    assert not served


def test_the_plan_says_it(served: list[object]) -> None:
    for case, words in (
        (Case(causal=True), "causal: compiled (the CPU extension)"),
        (Case(window=(9, 9), padding="left"), "window (9, 9), row by row: compiled"),
        (Case(alibi="heads"), "full: flash"),
    ):
        data = make_data(case, CPU)
        assert words in plan(problem_of(data.q, data.k, data.v, case, data.options, data.cu))


def test_compiles_as_one_graph(served: list[object]) -> None:
    q, k, v = (torch.randn(2, 40, h, 16, requires_grad=True) for h in (4, 2, 2))

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True)
        assert isinstance(out, Tensor)
        return out.sin()

    results = []
    for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
        out = function(q, k, v)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert len(served) == 2


PAGED = {
    "chunk": {},
    "window": {"window_size": (40, 0)},
    "window-sinks-softcap": {"window_size": (40, 0), "sink_tokens": 5, "softcap": 3.0},
    "full": {"causal": False},
}


@pytest.mark.parametrize("size", [16, 48])
@pytest.mark.parametrize("dtype", [F32, BF16, torch.float16], ids=str)
@pytest.mark.parametrize("options", PAGED.values(), ids=PAGED)
def test_chunks_over_pages(
    options: dict[str, Any], dtype: torch.dtype, size: int, served: list[object]
) -> None:
    """Pages are read where they lie; NaN lies where nothing is and in what the window hides."""
    options = {"causal": True} | options
    queries, keys = (70, 5, 33), (300, 64, 33)
    q = torch.randn(sum(queries), 4, 32).to(dtype)
    k, v = ([torch.randn(n, 2, 32).to(dtype) for n in keys] for _ in range(2))
    starts = [torch.tensor([0, *n], dtype=torch.int32).cumsum(0).int() for n in (queries, keys)]
    torch.manual_seed(1)
    k_pages, table = pages(k, size)
    torch.manual_seed(1)
    v_pages, same = pages(v, size)
    assert torch.equal(table, same)
    left = options.get("window_size", (-1, -1))[0]
    if left >= 0:  # pages that no query sees are given back
        table[0, -(-options.get("sink_tokens", 0) // size) : (300 - 70 - left) // size] = -1

    def attend() -> tuple[Tensor, Tensor]:
        out, lse, _ = flash_attn_varlen_func(
            q, k_pages, v_pages, *starts, max(queries), max(keys), block_table=table,
            return_attn_probs=True, **options,
        )  # fmt: skip
        return out, lse

    out, lse = attend()
    for number, (rows_k, rows_v) in enumerate(zip(k, v, strict=True)):
        mine = slice(*starts[0][number : number + 2].tolist())
        row = (q[None, mine], rows_k[None], rows_v[None])
        exact, exact_lse = attention_reference(*row, **options)
        eager, eager_lse = attention_reference(*row, **options, dtype=dtype)
        assert_within_budget("out", out[None, mine], eager, exact)
        assert_within_budget("lse", lse[None, :, mine], eager_lse.float(), exact_lse)
    assert len(served) == 3
    table[0, 295 // size] = -1
    with pytest.raises(ValueError, match="has no page"):
        attend()
