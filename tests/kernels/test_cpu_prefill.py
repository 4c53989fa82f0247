"""Prefill and windows through the compiled extension, against the float64 oracle.

The cases are those of the kernels and of the CPU backend, and random ones. Inputs lie in a fence of
NaN and fresh memory is NaN; padding holds NaN (see kernel_cases).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import test_batch_invariance as invariance
import torch
from extension_calls import count_prefills
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Case, assert_within_budget, check
from test_cpu_attention import CASES, LONG
from torch import Tensor

from hf_attn_kernels import (
    flash_attn_func,
    set_batch_invariant,
)
from hf_attn_kernels.cpu import extension
from hf_attn_kernels.cpu.extension_decode import LANES
from hf_attn_kernels.reference import attention_reference

Fence = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")
F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16
DTYPES = (F32, BF16, F16)
NAN = float("nan")

BLOCKS = [  # across blocks of 64 keys, strips of 48 lines and tasks of 240
    Case(q_len=500, causal=True, heads_q=5, heads_kv=1, batch=1, dtype=BF16),
    Case(q_len=300, k_len=1500, causal=True, batch=1, dtype=BF16, note="prefix"),
    Case(q_len=333, causal=True, window=(63, 0), batch=1, heads_kv=4, dtype=BF16),
    Case(q_len=333, causal=True, window=(64, 0), sink_tokens=70, s_aux=True, batch=1),
    Case(q_len=333, window=(0, 0), batch=1, head_dim=16, head_dim_v=48, dtype=BF16),
    Case(q_len=65, k_len=1030, window=(700, 5), sink_tokens=3, padding="left", dtype=F16),
    Case(q_len=129, k_len=40, causal=True, window=(20, 0), note="rows-without-keys", dtype=BF16),
    Case(q_len=3, k_len=300, causal=True, heads_q=6, heads_kv=6, dtype=BF16, padding="holes"),
    Case(causal=True, window=(30, 0), lengths=((90, 90), (0, 5), (1, 64), (70, 200)), dtype=BF16),
    Case(q_len=70, heads_q=260, heads_kv=1, batch=1, head_dim=16, note="group-beyond-a-task"),
]


def with_vectors(case: Case) -> Case:
    """The case with head sizes that the extension has."""
    sizes = {
        name: size if size % LANES == 0 else -(-size // LANES) * LANES
        for name in ("head_dim", "head_dim_v")
        if (size := getattr(case, name)) is not None
    }
    return replace(case, **sizes)


def eligible(case: Case) -> bool:
    queries = sum(q for q, _ in case.lengths) if case.lengths else case.q_len
    adds = case.bias is not None or case.alibi or case.dropout_p
    return queries > 1 and not adds and case.dtype in DTYPES


@pytest.fixture
def served(with_extension: list[object], monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The extension serves what it can; gives a list that grows by each prefill that it served."""
    return count_prefills(monkeypatch)


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize(
    "case", [with_vectors(case) for case in [*CASES, *LONG, *BLOCKS] if eligible(case)], ids=str
)
def test_matches_the_oracle(case: Case, fenced: Fence, served: list[object]) -> None:
    """The backward, torch's own, takes its log-sum-exp."""
    check(case, CPU, fenced)
    assert len(served) == 1


@st.composite
def cases(draw: st.DrawFn) -> Case:
    def up_to(most: int, least: int = 1) -> int:
        return draw(st.integers(least, most))

    heads_kv, left = up_to(3), draw(st.sampled_from([-1, 0, 5, 63, 64, 130]))
    causal = draw(st.booleans())
    return Case(
        batch=up_to(2),
        q_len=up_to(200, 2),
        k_len=up_to(300),
        heads_q=heads_kv * up_to(5),
        heads_kv=heads_kv,
        head_dim=LANES * up_to(6),
        head_dim_v=LANES * up_to(6),
        dtype=draw(st.sampled_from(DTYPES)),
        causal=causal,
        window=(left, 0 if causal else draw(st.sampled_from([-1, 0, 7, 90]))),
        sink_tokens=draw(st.sampled_from([0, 0, 1, 70])),
        softcap=draw(st.sampled_from([0.0, 0.0, 3.0])),
        s_aux=draw(st.booleans()),
        padding=draw(st.sampled_from(["", "", "left", "right", "holes", "dead"])),
    )


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(case=cases(), heads_first=st.booleans())
def test_random_calls_match_the_oracle(
    case: Case, heads_first: bool, fenced: Fence, served: list[object]
) -> None:
    def placed(x: Tensor) -> Tensor:
        if not heads_first or x.dim() < 4:
            return fenced(x)
        return fenced(x.transpose(1, 2)).detach().transpose(1, 2).requires_grad_(x.requires_grad)

    before = len(served)
    with torch.no_grad():
        check(case, CPU, placed, backward=False)
    assert len(served) == before + 1


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("offset - left", "offset - left - 1"), ("right + 1", "right + 2")],
    ids=["window+1", "diagonal+1"],
)
def test_negative_control(
    right: str, wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fenced: Fence,
    served: list[object],
) -> None:  # fmt: skip
    """Compiled from sources that hide one key less, it breaks the budget."""
    sources = shutil.copytree(extension.SOURCES, tmp_path / "csrc")
    text = (sources / "prefill.h").read_text()
    assert text.count(right) == 1
    (sources / "prefill.h").write_text(text.replace(right, wrong))
    monkeypatch.setattr(extension, "SOURCES", sources)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    extension.build_cpu_extension()
    for dtype in DTYPES:
        with pytest.raises(AssertionError, match="exceeds"):
            case = Case(q_len=111, causal=True, window=(8, 0), dtype=dtype)
            check(case, CPU, fenced, backward=False)
    assert len(served) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"window_size": (50, 9)}, {"causal": True, "sink_tokens": 3,
     "window_size": (40, 0), "softcap": 2.0}],
    ids=["causal", "window", "sinks-softcap"],
)  # fmt: skip
def test_threads_and_other_rows_change_no_bit(
    options: dict[str, Any], dtype: torch.dtype, served: list[object]
) -> None:
    q = torch.randn(3, 400, 4, 32).to(dtype)
    k, v = (torch.randn(3, 500, 2, 32).to(dtype) for _ in range(2))

    def attend(rows: slice, queries: slice = slice(None)) -> Tensor:
        out = flash_attn_func(q[rows, queries], k[rows], v[rows], **options)
        assert isinstance(out, Tensor)
        return out

    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            found.append(attend(slice(None)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    for row in range(3):
        assert torch.equal(attend(slice(row, row + 1))[0], found[0][row])
    assert torch.equal(attend(slice(None), slice(333, None)), found[0][:, 333:])  # a chunk
    assert len(served) == 7


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_batch_invariance(dtype: torch.dtype, served: list[object]) -> None:
    """A row alone, even of one query, is computed as the row of a batch is."""
    q, k, v = (torch.randn(2, 30, h, 16).to(dtype) for h in (4, 2, 2))
    keep = torch.arange(30) >= torch.tensor([[0], [29]])
    set_batch_invariant(True)
    try:
        both = flash_attn_func(q, k, v, causal=True, key_padding_mask=keep)
        one = flash_attn_func(q[1:, 29:], k[1:, 29:], v[1:, 29:], causal=True)
        assert torch.equal(both[1, 29:], one[0]) and len(served) == 2
        for side in ("left", "right"):
            invariance.test_a_row_does_not_depend_on_its_padding(side, dtype, None)
        assert len(served) == 2 + 2 * 7 * 9
        for features in invariance.FEATURES:
            invariance.test_a_row_does_not_depend_on_others(features, dtype, None)
    finally:
        set_batch_invariant(False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_no_query_sees_is_not_read(dtype: torch.dtype, served: list[object]) -> None:
    """Behind the window a cache's memory may be another's by now."""
    q, k, v = (torch.randn(1, n, 2, 32).to(dtype) for n in (100, 500, 500))
    options: dict[str, Any] = {"causal": True, "window_size": (50, 0), "sink_tokens": 5}
    right = flash_attn_func(q, k, v, **options)
    k[:, 5:350], v[:, 5:350] = NAN, NAN
    assert torch.equal(flash_attn_func(q, k, v, **options), right) and len(served) == 2
    v[:, 350] = NAN  # the first that the first query sees
    assert flash_attn_func(q, k, v, **options).isnan().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinity_stay_where_they_belong(dtype: torch.dtype, served: list[object]) -> None:
    q, k, v = (torch.randn(1, 130, h, 16).to(dtype) for h in (4, 2, 2))
    right = flash_attn_func(q, k, v, causal=True)
    q[0, 70, 1, 3] = NAN
    out = flash_attn_func(q, k, v, causal=True)
    assert out[0, 70, 1].isnan().all()
    out[0, 70, 1] = right[0, 70, 1]
    assert torch.equal(out, right)
    q[0, 70, 1, 3], q[0, 9, 0, 0] = 0.0, float("inf")
    assert flash_attn_func(q, k, v, causal=True)[0, 9, 0].isnan().all()
    assert len(served) == 3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_far_apart(dtype: torch.dtype, served: list[object]) -> None:
    """Weights that vanish, and peaks that come late: sums so far are scaled down to nothing."""
    q = torch.ones(1, 200, 1, 16).to(dtype)
    k = torch.linspace(-900, 900, 200).view(1, 200, 1, 1).expand(1, 200, 1, 16).to(dtype)
    v = torch.randn(1, 200, 1, 16).to(dtype)
    for keys, causal in ((k, True), (k.flip(1), False), (-k, True)):
        out, lse, _ = flash_attn_func(q, keys, v, causal=causal, return_attn_probs=True)
        exact, exact_lse = attention_reference(q, keys, v, causal=causal)
        eager, eager_lse = attention_reference(q, keys, v, causal=causal, dtype=dtype)
        assert_within_budget("out", out, eager, exact)
        assert_within_budget("lse", lse, eager_lse.float(), exact_lse)
    assert len(served) == 3
