"""The CPU backend against the float64 oracle, feature by feature, forward and backward.

The cases are the Triton kernels' own, and longer ones that cross this backend's blocks and tiles.
Inputs lie in a fence of NaN and fresh memory is NaN; padding holds NaN (see kernel_cases).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import Case, assert_within_budget, check, make_data, run_kernel
from test_kernel_attention import CASES
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hf_attn_kernels import flash_attn_func
from hf_attn_kernels.cpu import blockwise, engine_matmul, engine_sdpa, op, plan
from hf_attn_kernels.cpu.choice import Rule, choose, traits_of
from hf_attn_kernels.problem import Pattern, Problem
from hf_attn_kernels.reference import attention_reference

Fence = Callable[[Tensor], Tensor]
CPU = torch.device("cpu")
F16, BF16 = torch.float16, torch.bfloat16

LONG = [
    Case(q_len=300, k_len=1500, causal=True, batch=1, note="prefix"),
    Case(q_len=300, k_len=1500, window=(40, 9), batch=1, dtype=BF16),
    Case(q_len=257, causal=True, window=(99, 0), sink_tokens=5, batch=1),
    Case(q_len=257, causal=True, window=(256, 0), batch=1, note="window-is-S"),
    Case(q_len=257, causal=True, softcap=4.0, batch=1, dtype=F16),
    Case(q_len=111, k_len=1300, causal=True, softcap=4.0, window=(600, 0), sink_tokens=9),
    Case(q_len=1, k_len=5000, causal=True, head_dim=16, note="streamed"),
    Case(q_len=1, k_len=5000, causal=True, head_dim=16, dtype=BF16, heads_kv=1, note="streamed"),
    Case(q_len=2, k_len=5000, causal=True, head_dim=16, padding="right", s_aux=True),
    Case(q_len=1, k_len=5000, causal=True, head_dim=16, window=(63, 0), sink_tokens=4),
    Case(q_len=257, causal=True, padding="left", heads_kv=4),
    Case(q_len=200, bias=(1, 4, 200), batch=1, causal=True, padding="holes"),
    Case(q_len=111, padding="holes", causal=True, alibi="rows", softcap=3.0, dropout_p=0.1,
         window=(50, 0), sink_tokens=3, s_aux=True, bias=(2, 1, 111)),
]  # fmt: skip


@pytest.mark.usefixtures("poison_memory")
@pytest.mark.parametrize("case", [*CASES, *LONG], ids=str)
def test_matches_the_oracle(case: Case, fenced: Fence) -> None:
    check(case, CPU, fenced)


@pytest.fixture(params=[blockwise.FLASH, blockwise.MATMUL])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both engines serve the same call: the choice is speed."""
    name: str = request.param
    monkeypatch.setattr(op, "choose", lambda traits: Rule(name, "forced", lambda t: True))
    yield name


BOTH = [
    Case(q_len=111, causal=True, batch=3),
    Case(q_len=63, k_len=17, causal=True),
    Case(q_len=17, k_len=111, causal=True, heads_kv=4),
    Case(q_len=111, window=(20, 7), dtype=BF16),
    Case(q_len=111, causal=True, window=(20, 0), sink_tokens=4, s_aux=True, padding="right"),
    Case(q_len=63, alibi="rows", bias=(2, 4, 63), bool_bias=True, padding="holes"),
    Case(causal=True, lengths=((5, 9), (0, 1), (35, 35), (23, 18)), heads_kv=1),
]


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_either_engine_matches_the_oracle(case: Case, engine: str, fenced: Fence) -> None:
    check(case, CPU, fenced, backward=engine == blockwise.MATMUL)


@pytest.mark.parametrize("case", BOTH, ids=str)
def test_either_engine_gives_the_same_gradients(case: Case) -> None:
    """Of the output alone, which both engines have; sums in float64, so that they agree closely."""
    found = []
    for name in (blockwise.FLASH, blockwise.MATMUL):
        torch.manual_seed(0)
        data = make_data(case, CPU)
        call = blockwise.call_of(problem_of(data.q, data.k, data.v, case, data.options, data.cu))
        with torch.no_grad():
            out, lse = blockwise.forward(call, name)
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3)).to(out.dtype)
            g = blockwise.backward(call, name, out, lse, grad, None, False)
        found.append((g.q, g.k, g.v, g.s_aux))
    tolerance = 1e-5 if case.dtype == torch.float32 else 2e-2
    for one, other in zip(*found, strict=True):
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def problem_of(q: Tensor, k: Tensor, v: Tensor, case: Case, options: dict, cu: tuple | None):  # type: ignore[no-untyped-def, type-arg]
    """The Problem that the public functions would build."""
    left, right = case.window
    lengths: dict[str, object] = {}
    if cu is not None:
        lengths = {"cu_seqlens_q": cu[0], "cu_seqlens_k": cu[1]}
        lengths |= {
            "max_seqlen_q": int(cu[0].diff().max()),
            "max_seqlen_k": int(cu[1].diff().max()),
        }
    return Problem(
        q=q.detach(),
        k=k.detach(),
        v=v.detach(),
        pattern=Pattern(
            scaling=case.head_dim**-0.5,
            window_left=left,
            window_right=0 if case.causal else right,
            softcap=case.softcap,
            sink_tokens=case.sink_tokens,
            dropout_p=case.dropout_p,
        ),
        s_aux=None if options["s_aux"] is None else options["s_aux"].detach(),
        bias=options["bias"],
        alibi_slopes=options.get("alibi_slopes"),
        key_padding_mask=options.get("key_padding_mask"),
        **lengths,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.float64], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (4, 1), (6, 2)], ids=str)
@pytest.mark.parametrize("layout", ["heads-first", "tokens-first"])
@pytest.mark.parametrize("keys", [4096, 5001])
def test_one_query_over_a_long_cache(
    keys: int, layout: str, heads: tuple[int, int], dtype: torch.dtype
) -> None:
    """Both layouts of a cache leave the fused call; with and without the log-sum-exp."""
    q = torch.randn(1, 1, heads[0], 16).to(dtype)
    k, v = (torch.randn(1, keys + 2, heads[1], 16).to(dtype) for _ in range(2))
    if layout == "heads-first":
        k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))
    k, v = k[:, 1:-1], v[:, 1:-1]
    for left in (-1, 4500):
        exact, exact_lse = attention_reference(q, k, v, window_size=(left, -1))
        eager, eager_lse = attention_reference(q, k, v, window_size=(left, -1), dtype=dtype)
        out = flash_attn_func(q, k, v, window_size=(left, -1))
        again, lse, _ = flash_attn_func(q, k, v, window_size=(left, -1), return_attn_probs=True)
        assert isinstance(out, Tensor) and torch.equal(out, again)
        if dtype == torch.float64:
            torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        else:
            assert_within_budget("out", out, eager, exact)
        assert lse is not None
        assert_within_budget("lse", lse, eager_lse.float(), exact_lse)


@pytest.mark.parametrize(
    ("case", "wrong"),
    [
        (Case(q_len=111, causal=True, window=(8, 0)), {"window_size": (9, 0)}),
        (Case(q_len=111, causal=True, dtype=BF16), {"causal": False, "window_size": (-1, 1)}),
        (Case(q_len=63, causal=True, softcap=5.0), {"softcap": 5.5}),
        (Case(q_len=63, causal=True, window=(8, 0), sink_tokens=2), {"sink_tokens": 3}),
    ],
    ids=["window+1", "diagonal+1", "softcap", "sink+1"],
)
def test_negative_control(case: Case, wrong: dict[str, object], fenced: Fence) -> None:
    """The comparison has teeth: a mask shifted by one key breaks the budget."""
    with pytest.raises(AssertionError, match="exceeds"):
        check(case, CPU, fenced, backward=False, **wrong)


@pytest.mark.parametrize("softcap", [0.0, 3.0], ids=["flash", "matmul"])
@pytest.mark.parametrize("window", [(-1, 0), (4, 2)], ids=str)
def test_float64_gradients_are_exact(window: tuple[int, int], softcap: float) -> None:
    q, k, v = (
        torch.randn(1, n, h, 4, dtype=torch.float64, requires_grad=True)
        for n, h in ((6, 4), (9, 2), (9, 2))
    )
    s_aux = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def call(*tensors: Tensor) -> Tensor:
        out = flash_attn_func(*tensors[:3], s_aux=tensors[3], window_size=window, softcap=softcap)
        assert isinstance(out, Tensor)
        return out

    assert torch.autograd.gradcheck(call, (q, k, v, s_aux))


def test_no_queries_and_no_keys() -> None:
    data = make_data(Case(q_len=5, k_len=0), CPU)
    out, lse = run_kernel(data)
    assert bool((out == 0).all()) and bool(torch.isneginf(lse).all())
    out.sum().backward()
    assert data.q.grad is not None and bool((data.q.grad == 0).all())
    assert run_kernel(make_data(Case(q_len=0, k_len=5), CPU))[0].shape == (2, 0, 4, 32)


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operator made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        found = func(*args, **(kwargs or {}))
        for t in found if isinstance(found, tuple | list) else (found,):
            if isinstance(t, Tensor):
                self.elements = max(self.elements, t.untyped_storage().nbytes() // t.element_size())
        return found


FRUGAL = {
    "window": Case(causal=True, window=(63, 0)),
    "window-sinks-padded": Case(causal=True, window=(63, 0), sink_tokens=4, padding="left"),
    "softcap": Case(causal=True, softcap=5.0),
    "softcap-holes": Case(causal=True, softcap=5.0, padding="holes"),
    "s_aux-dropout": Case(s_aux=True, dropout_p=0.1),
    "alibi": Case(causal=True, alibi="heads"),
}


def largest_tensor(case: Case, length: int) -> int:
    """Elements of the largest tensor of a forward and a backward at `length`."""
    case = replace(case, q_len=length, batch=1, heads_q=2, heads_kv=1, head_dim=16)
    data = make_data(case, CPU)
    problem = problem_of(data.q, data.k, data.v, case, data.options, data.cu)
    problem = replace(problem, dropout_seed=torch.tensor([3]) if case.dropout_p else None)
    name = choose(traits_of(problem)).engine
    with torch.no_grad(), LargestTensor() as seen:  # below the operator, whose inside no mode sees
        call = blockwise.call_of(problem)
        out, lse = blockwise.forward(call, name)
        blockwise.backward(call, name, out, lse, torch.ones_like(out), None, False)
    return seen.elements


@pytest.mark.parametrize("case", FRUGAL.values(), ids=FRUGAL)
def test_memory_is_not_quadratic(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor comes near one head's S * S scores."""
    length = 2048
    monkeypatch.setattr(engine_matmul, "SCORE_ELEMENTS", 2**16)
    monkeypatch.setattr(engine_matmul, "TILE_KEYS", 256)
    monkeypatch.setattr(engine_sdpa, "MASK_ELEMENTS", 2**16)
    assert length * 2 * 16 <= largest_tensor(case, length) <= length * length / 16


def test_the_memory_test_sees_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_matmul, "SCORE_ELEMENTS", 2**30)
    monkeypatch.setattr(engine_matmul, "PACKED_ROWS", 2**30)
    assert largest_tensor(FRUGAL["softcap"], 512) >= 512 * 512


@pytest.mark.parametrize("padded", [False, True], ids=["dense", "padded"])
@pytest.mark.parametrize("q_len", [20, 1], ids=["prefill", "decode"])
def test_compiles_as_one_graph(padded: bool, q_len: int) -> None:
    q, k, v = (
        torch.randn(2, n, h, 8, requires_grad=True) for n, h in ((q_len, 4), (20, 2), (20, 2))
    )
    keep = torch.ones(2, 20, dtype=torch.bool)
    keep[1, :7] = False

    def call(q: Tensor, k: Tensor, v: Tensor, keep: Tensor | None) -> Tensor:
        out = flash_attn_func(q, k, v, causal=True, key_padding_mask=keep)
        assert isinstance(out, Tensor)
        return out.sin()

    mask = keep if padded else None
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        out = function(q, k, v, mask)
        results.append((out, *torch.autograd.grad(out.sum(), (q, k, v))))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("q_len", [20, 1], ids=["prefill", "decode"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
def test_opcheck_of_the_shortest_way(q_len: int, causal: bool) -> None:
    """One fused call, on tensors that lie heads first: strides must be what the fake says."""
    q, k, v = (torch.randn(2, h, n, 8).transpose(1, 2) for n, h in ((q_len, 4), (20, 2), (20, 2)))
    numbers = (0.3, -1, 0 if causal and q_len > 1 else -1, 0.0, 0, 0.0, 0, 0)
    torch.library.opcheck(
        op.cpu_attention, (q, k[:, -q_len:], v[:, -q_len:], *[None] * 7, *numbers)
    )


def test_opcheck() -> None:
    q, k, v = (torch.randn(2, 20, h, 8, requires_grad=True) for h in (4, 2, 2))
    s_aux = torch.randn(4, requires_grad=True)
    bias = torch.randn(1, 4, 20, 20, requires_grad=True)
    keep = torch.rand(2, 20) > 0.3
    slopes, seed = torch.rand(1, 4), torch.tensor([7])
    numbers = (0.3, 5, 0, 2.0, 1, 0.1, 0, 0)
    torch.library.opcheck(
        op.cpu_attention,
        (q, k, v, s_aux, slopes, bias, keep, None, None, seed, *numbers),
        test_utils=(
            "test_schema", "test_autograd_registration", "test_faketensor",
            "test_aot_dispatch_static",
        ),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (Case(causal=True), "causal: flash"),
        (Case(causal=True, softcap=2.0), "matmul (softcap)"),
        (Case(window=(9, 9), padding="left"), "window (9, 9), row by row: flash"),
        (Case(causal=True, dtype=F16), "float16 runs as float32"),
        (Case(head_dim_v=24), "head_dim of v"),
        (Case(causal=True, lengths=((5, 5),)), "sequence by sequence"),
    ],
    ids=["causal", "softcap", "window", "fp16", "DV", "packed"],
)
def test_the_plan_says_which_path(case: Case, words: str) -> None:
    data = make_data(case, CPU)
    assert words in plan(problem_of(data.q, data.k, data.v, case, data.options, data.cu))
