"""Numbers at their limits, against the float64 oracle: extremes, empty shapes, any configuration.

Padding that holds NaN, fully masked rows, odd lengths and dead rows are in kernel_cases' cases;
here are values that overflow, underflow or vanish, both backends, and calls drawn at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import (
    Case,
    Data,
    assert_within_budget,
    gradients,
    make_data,
    run_kernel,
    run_reference,
)
from torch import Tensor

CPU = torch.device("cpu")
F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
Backend = Callable[[], AbstractContextManager[None]]

SMALL = Case(q_len=17, k_len=35, causal=True, padding="left")


@pytest.fixture(params=["cpu", "triton"])
def backend(
    request: pytest.FixtureRequest, triton_backend: Backend
) -> tuple[torch.device, Backend]:
    if request.param == "cpu":
        return CPU, nullcontext
    device: torch.device = request.getfixturevalue("device")
    return device, triton_backend


def extreme(case: Case, device: torch.device, change: Callable[[Data], None]) -> Data:
    """A case's tensors with some of their values replaced."""
    torch.manual_seed(0)
    data = make_data(case, device)
    with torch.no_grad():
        change(data)
    return data


def compare(
    data: Data, dtype: torch.dtype, run: Backend, *, backward: bool = True, seed: int = 0
) -> None:
    """Kernel against the oracle, as kernel_cases.check, with room for what float32 cannot hold.

    Scores are sums in float32, so the error of a weight grows with them, which eager attention,
    lucky, may not show; and where a query sees a single key, eager's gradient is exactly 0, and
    that of a backward out of the log-sum-exp is the rounding of its terms.
    """
    with run():
        torch.manual_seed(seed)
        out, lse = run_kernel(data)
        got = gradients(data, out, lse) if backward else {}
    torch.manual_seed(seed)  # the seed that the API drew for its dropout
    drawn = int(torch.randint(0, 2**62, (1,), device=data.q.device, dtype=torch.int64))
    exact, exact_lse = run_reference(data, seed=drawn)
    eager, eager_lse = run_reference(data, dtype, drawn)
    size = {name: float(t.detach().nan_to_num(0).abs().amax()) for name, t in data.leaves.items()
            if t.numel()}  # fmt: skip
    dim, eps = data.q.shape[-1], 8 * torch.finfo(F32).eps
    scale = dim**-0.5 if data.options["softmax_scale"] is None else data.options["softmax_scale"]
    scores = size.get("q", 0.0) * size.get("k", 0.0) * scale * math.sqrt(dim)
    slack = eps * max(scores, 1.0) * size.get("v", 0.0)
    assert_within_budget("out", out, eager, exact, slack)
    assert_within_budget("lse", lse, eager_lse.float(), exact_lse)
    if backward:
        want, plain = gradients(data, exact, exact_lse), gradients(data, eager, eager_lse)
        steep = 4.0 * math.sqrt(dim) * slack  # the loss has random weights, which reach 4
        for name, gradient in got.items():
            larger = max(size.get("q", 0.0), size.get("k", 0.0), 1.0) * max(scale, 1.0)
            assert_within_budget(f"d{name}", gradient, plain[name], want[name], steep * larger)


# --- values ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("size", [1e2, 1e4])
def test_large_logits(size: float, dtype: torch.dtype, backend: tuple[Any, Backend]) -> None:
    """Scores of up to ±1e4: exp of one of them is infinite, and of their differences 0 or 1."""
    device, run = backend

    def change(data: Data) -> None:
        data.q.mul_(math.sqrt(size))
        data.k.mul_(math.sqrt(size))

    data = extreme(replace(SMALL, dtype=dtype, scale=1 / 32), device, change)
    scores = torch.einsum("bqhd,bkhd->bhqk", data.q[:, :, ::2].float(), data.k.float()) / 32
    largest = scores.nan_to_num(0).abs().max().item()
    assert size / 3 < largest < 3 * size, f"the scores are at most {largest:.3g}"
    # where one weight is 1 and all else 0, gradients of q and k are rounding noise of zero
    compare(data, dtype, run, backward=size < 1e3)


@pytest.mark.parametrize("sign", [1, -1])
def test_all_logits_alike_and_huge(sign: int, backend: tuple[Any, Backend]) -> None:
    """Every score is ±1e4: the mean of the values, not 0 / 0 and not infinity."""
    device, run = backend

    def change(data: Data) -> None:
        data.q.fill_(100.0)
        data.k.fill_(sign * 100.0)

    data = extreme(Case(q_len=5, k_len=19, head_dim=32, scale=1 / 32), device, change)
    with run():
        out, lse = run_kernel(data)
    mean = data.v.mean(1, keepdim=True).repeat_interleave(2, dim=2).expand_as(out)
    torch.testing.assert_close(out, mean, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(lse, torch.full_like(lse, sign * 1e4 + math.log(19)))


def test_denormals(backend: tuple[Any, Backend]) -> None:
    """Values below the smallest normal number stay, or become 0 as the machine rounds them."""
    device, run = backend
    tiny = torch.finfo(F32).tiny

    def change(data: Data) -> None:
        data.v.mul_(tiny / 16)
        data.q.mul_(tiny)

    data = extreme(SMALL, device, change)
    with run():
        out, lse = run_kernel(data)
    exact, exact_lse = run_reference(data)
    assert (out.double() - exact).abs().max().item() < 2 * tiny
    seen = torch.isfinite(exact_lse)
    torch.testing.assert_close(lse[seen].double(), exact_lse[seen], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("padding", ["left", "right", "holes", "dead"])
def test_rubbish_in_padding(padding: str, backend: tuple[Any, Backend]) -> None:
    """Whatever hidden keys and values hold, the result is to the bit that of zeros there."""
    device, run = backend
    rubbish = (math.inf, math.nan) if run is not nullcontext else (math.inf, -math.inf, 3e38)
    results = []
    for value in (0.0, *rubbish):

        def change(data: Data, value: float = value) -> None:
            hidden = ~data.options["key_padding_mask"]
            data.k[hidden], data.v[hidden] = value, value

        data = extreme(replace(SMALL, padding=padding), device, change)
        with run():
            out, lse = run_kernel(data)
            results.append([out, lse, *gradients(data, out, lse).values()])
    for with_zeros, *with_rubbish in zip(*results, strict=True):
        assert not bool(torch.isnan(with_zeros).any())
        assert all(torch.equal(found, with_zeros) for found in with_rubbish)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_rows_that_see_nothing(dtype: torch.dtype, backend: tuple[Any, Backend]) -> None:
    """By padding, by a mask, by a bias of -inf, by causality: zeros, lse -inf, gradients zero."""
    device, run = backend
    dead = Case(q_len=9, k_len=9, dtype=dtype, padding="dead")
    masked = Case(q_len=9, k_len=9, dtype=dtype, bias=(2, 1, 9), bool_bias=True)
    added = Case(q_len=9, k_len=9, dtype=dtype, bias=(1, 4, 9))
    early = Case(q_len=9, k_len=4, dtype=dtype, causal=True)

    def hide(data: Data) -> None:
        bias = data.options["bias"]
        if bias is not None:
            bias[:, :, 0] = False if bias.dtype == torch.bool else float("-inf")

    for case, row in ((dead, 0), (masked, 0), (added, 0), (early, 0)):
        data = extreme(case, device, hide)
        with run():
            out, lse = run_kernel(data)
            found = gradients(data, out, lse)
        assert bool((out[0, row] == 0).all())
        assert bool(torch.isneginf(lse[0, :, row]).all())
        assert bool((found["q"][0, row] == 0).all())
        assert all(bool(torch.isfinite(g).all()) for g in found.values())


@pytest.mark.parametrize("shape", [(1, 1), (1, 33), (0, 7), (7, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("batch", [1, 0])
def test_one_token_and_none(
    shape: tuple[int, int], batch: int, backend: tuple[Any, Backend]
) -> None:
    device, run = backend
    for features in ({}, {"causal": True, "window": (3, 0), "s_aux": True}):
        case = Case(batch=batch, q_len=shape[0], k_len=shape[1], **features)
        data = extreme(case, device, lambda data: None)
        with run():
            out, lse = run_kernel(data)
            found = gradients(data, out, lse)
        assert out.shape == (batch, shape[0], 4, 32) and lse.shape == (batch, 4, shape[0])
        if out.numel():
            exact, _ = run_reference(data)
            assert_within_budget("out", out, run_reference(data, F32)[0], exact)
        assert all(bool(torch.isfinite(g).all()) for g in found.values())


# --- any configuration ----------------------------------------------------------------------------

lengths = st.sampled_from([1, 2, 15, 16, 17, 33, 63, 64, 65, 100])


@st.composite
def cases(draw: st.DrawFn, longest: int = 100) -> Case:
    groups, heads_kv = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3]))
    q_len, k_len = (min(draw(lengths), longest) for _ in range(2))
    causal = draw(st.booleans())
    left = draw(st.sampled_from([-1, 0, 1, 7, 40]))
    right = 0 if causal else draw(st.sampled_from([-1, 0, 5]))
    softcap = draw(st.sampled_from([0.0, 0.0, 3.0]))
    bias = draw(
        st.sampled_from([None, None, (1, 1, 1), (1, heads_kv * groups, q_len), (2, 1, q_len)])
    )
    return Case(
        q_len=q_len,
        k_len=k_len,
        heads_q=groups * heads_kv,
        heads_kv=heads_kv,
        head_dim=draw(st.sampled_from([8, 16, 40, 64])),
        head_dim_v=draw(st.sampled_from([None, None, 24])),
        dtype=draw(st.sampled_from([F32, F32, BF16, F16])),
        scale=draw(st.sampled_from([None, 0.5])),
        causal=causal,
        window=(left, right),
        softcap=softcap,
        sink_tokens=draw(st.sampled_from([0, 0, 3])) if left >= 0 else 0,
        s_aux=draw(st.booleans()),
        alibi=draw(st.sampled_from(["", "", "heads", "rows"])),
        bias=bias,
        bool_bias=draw(st.booleans()),
        padding=draw(st.sampled_from(["", "left", "right", "holes", "dead"])),
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.0, 0.2])),
    )


def at_random(examples: int) -> Callable[[Any], Any]:
    """The same examples each time, so that a red run can be run again."""
    slow = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
    return settings(
        max_examples=examples, deadline=None, derandomize=True, suppress_health_check=slow
    )


@at_random(100)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_a_hundred_configurations(case: Case, seed: int) -> None:
    """Forward and backward on the CPU backend."""
    torch.manual_seed(seed)
    compare(make_data(case, CPU), case.dtype, nullcontext, seed=seed)


@at_random(4)
@given(case=cases(longest=17), seed=st.integers(0, 2**16))
def test_configurations_of_the_triton_kernels(
    triton_backend: Backend, device: torch.device, case: Case, seed: int
) -> None:
    """In Triton's interpreter where there is no GPU, hence fewer and shorter."""
    torch.manual_seed(seed)
    compare(make_data(case, device), case.dtype, triton_backend, seed=seed)


@at_random(25)
@given(case=cases(), seed=st.integers(0, 2**16))
def test_the_same_bits_twice(case: Case, seed: int) -> None:
    """Forward and backward of the CPU backend (Triton's: test_kernel_attention.py)."""
    results = []
    for _ in range(2):
        torch.manual_seed(seed)
        data = make_data(case, CPU)
        torch.manual_seed(seed)
        out, lse = run_kernel(data)
        results.append([out, lse, *gradients(data, out, lse).values()])
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_negative_control_a_wrong_scale_is_seen() -> None:
    """What a hundred configurations must notice, they notice."""
    data = extreme(SMALL, CPU, lambda data: None)
    out: Tensor = run_kernel(data, softmax_scale=SMALL.head_dim**-0.5 * 1.001)[0]
    with pytest.raises(AssertionError, match="exceeds"):
        assert_within_budget("out", out, run_reference(data, F32)[0], run_reference(data)[0])
