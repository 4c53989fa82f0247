"""Gradients of rows that an added mask hides whole: eager's in float32, whatever the mask holds.

A hidden row's scores are all about as low as the mask says, so far from 0 that the log of their
number is lost in the log-sum-exp. Its weights are eager's nevertheless: equal, or nearly.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from decode_calls import DEVICE
from torch import Tensor

from hf_attn_kernels import flash_attn_func, flash_attn_varlen_func, use_backend
from hf_attn_kernels.reference import attention_reference

BACKENDS = ("triton",) if DEVICE == "cuda" else ("cpu", "triton")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LOWEST = torch.finfo(F32).min
INF = float("-inf")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    if request.param == "triton":
        pytest.importorskip("triton")
    with use_backend(request.param):
        yield request.param


@dataclass(frozen=True, kw_only=True)
class Hidden:
    """A mask as models make it: causal, the first keys of a row padded, those rows hidden whole."""

    name: str
    fill: float = LOWEST
    dtype: torch.dtype = F32
    mask_dtype: torch.dtype | None = None
    q_len: int = 37
    padded: tuple[int, ...] = (0, 21)
    heads: tuple[int, int] = (4, 2)
    bias_heads: int = 1
    dim: int = 16
    dim_v: int = 16
    softcap: float = 0.0
    s_aux: bool = False
    causal: bool = False  # hidden by the call as well
    lse: bool = False  # a gradient comes in by the log-sum-exp
    tolerance: float = 2e-6

    @property
    def leaves(self) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(0)
        batch, (heads_q, heads_kv), n = len(self.padded), self.heads, self.q_len

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=g).to(self.dtype).to(DEVICE).requires_grad_()

        found = {
            "q": normal(batch, n, heads_q, self.dim), "k": normal(batch, n, heads_kv, self.dim),
            "v": normal(batch, n, heads_kv, self.dim_v),
            "do": normal(batch, n, heads_q, self.dim_v),
        }  # fmt: skip
        if self.s_aux:
            found["s_aux"] = normal(heads_q)
        return found | {"bias": self.bias().requires_grad_()}

    def bias(self) -> Tensor:
        n = self.q_len
        hidden = torch.ones(n, n, dtype=torch.bool).triu(1)[None].repeat(len(self.padded), 1, 1)
        for row, count in enumerate(self.padded):
            hidden[row, :, :count] = True
        bias = torch.zeros(hidden.shape).masked_fill(hidden, self.fill)[:, None]
        bias = bias.repeat(1, self.bias_heads, 1, 1) if self.bias_heads > 1 else bias
        return bias.to(self.mask_dtype or self.dtype).to(DEVICE)

    @property
    def options(self) -> dict[str, Any]:
        return {"causal": self.causal, "softcap": self.softcap}


CASES = (
    Hidden(name="min"),
    Hidden(name="min-of-bf16", dtype=BF16, fill=torch.finfo(BF16).min),
    Hidden(name="min-of-float32-beside-bf16", dtype=BF16, mask_dtype=F32),
    Hidden(name="billion", fill=-1e9),
    Hidden(name="billion-bf16", fill=-1e9, dtype=BF16),
    # in steps of 2**-10: base 2 and base e round to different ones
    Hidden(name="ten-thousand", fill=-1e4, tolerance=2e-3),
    Hidden(name="nothing", fill=INF),
    Hidden(name="nothing-bf16", fill=INF, dtype=BF16),
    Hidden(name="mqa-heads", heads=(3, 1), bias_heads=3),
    Hidden(name="dim-v", dim=24, dim_v=40),
    Hidden(name="softcap", softcap=3.0),
    Hidden(name="s_aux", s_aux=True),
    Hidden(name="causal-too", causal=True),
    # torch.logsumexp loses the same logarithm of -1e9 in its own backward
    Hidden(name="lse", lse=True, fill=-1e4, tolerance=2e-3),
    Hidden(name="float16", dtype=F16, fill=-6e4, mask_dtype=F32, tolerance=2e-2),
    Hidden(name="all-rows", padded=(37, 37), q_len=37),
)


def gradients(
    case: Hidden, leaves: dict[str, Tensor], out: Tensor, lse: Tensor
) -> dict[str, Tensor]:
    """By name, with the output's own numbers under "out"."""
    total = (out.float() * leaves["do"].detach().float()).sum()
    if case.lse:
        total = total + (lse * torch.linspace(-1, 1, lse.numel(), device=DEVICE).view_as(lse)).sum()
    names = [name for name in leaves if name != "do"]
    found = torch.autograd.grad(total, [leaves[name] for name in names])
    return dict(zip(names, found, strict=True)) | {"out": out}


def eager(case: Hidden) -> dict[str, Tensor]:
    leaves = {n: t.detach().float().requires_grad_() for n, t in case.leaves.items()}
    given = {n: t for n, t in leaves.items() if n not in ("do", "lse")}
    found = attention_reference(**given, **case.options, dtype=F32)
    return gradients(case, leaves, *found)


def check(case: Hidden, got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    band = {F32: 1.0, BF16: 10000.0, F16: 500.0}[case.dtype]  # of results that are rounded to it
    for name, true in want.items():
        size = float(true.detach().abs().max()) or 1.0
        torch.testing.assert_close(
            got[name].float(), true, rtol=0, atol=case.tolerance * band * size,
            msg=lambda said, name=name: f"{name}: {said}",
        )  # fmt: skip


def ours(case: Hidden) -> dict[str, Tensor]:
    leaves = case.leaves
    given = {n: t for n, t in leaves.items() if n != "do"}
    out, lse, _ = flash_attn_func(**given, **case.options, return_attn_probs=True)
    return gradients(case, leaves, out, lse)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_gradients_are_eagers(case: Hidden, backend: str, poison_memory: None) -> None:
    got, want = ours(case), eager(case)
    check(case, got, want)
    hidden = want["q"][1, 0]
    assert bool(hidden.abs().max() > 0) == (case.fill > INF and not case.s_aux and not case.causal)


@pytest.mark.parametrize("fill", [LOWEST, -1e9])
def test_without_the_gradient_of_the_mask(fill: float, backend: str) -> None:
    """The commonest call: the mask is made by the model, and torch's fused kernel serves it."""
    case = Hidden(name="", fill=fill, padded=(0, 21, 5), heads=(4, 1))
    leaves = case.leaves
    leaves["bias"] = leaves["bias"].detach()
    names = ("q", "k", "v")
    out = flash_attn_func(*(leaves[n] for n in names), bias=leaves["bias"])
    assert isinstance(out, Tensor)
    got = torch.autograd.grad((out * leaves["do"].detach()).sum(), [leaves[n] for n in names])
    want = eager(case)
    check(case, dict(zip(names, got, strict=True)), {n: want[n] for n in names})


@pytest.mark.parametrize("deterministic", [True, False])
def test_packed_sequences(deterministic: bool, backend: str) -> None:
    case = Hidden(name="", padded=(9,), q_len=21)
    leaves = case.leaves
    cu = torch.tensor([0, 21], dtype=torch.int32, device=DEVICE)
    out, lse, _ = flash_attn_varlen_func(
        *(leaves[n][0] for n in ("q", "k", "v")), cu, cu, 21, 21, bias=leaves["bias"],
        return_attn_probs=True, deterministic=deterministic,
    )  # fmt: skip
    check(case, gradients(case, leaves, out[None], lse[None]), eager(case))


def test_rows_that_are_seen_stay_as_they_were(backend: str) -> None:
    """Another row's mask changes nothing of a row, to the bit."""
    found = []
    for fill in (LOWEST, INF):
        case = Hidden(name="", fill=fill, padded=(0, 21))
        found.append(ours(case))
    for name in ("q", "k", "v"):
        assert torch.equal(found[0][name][0], found[1][name][0])
    assert not torch.equal(found[0]["q"][1], found[1]["q"][1])


def test_control_weights_out_of_the_log_sum_exp_are_seen(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As they were made before: of n keys each with weight 1 instead of 1 / n."""
    case = Hidden(name="")
    if backend == "cpu":
        monkeypatch.setattr("hf_attn_kernels.cpu.blockwise.FAR", float("inf"))
        with pytest.raises(AssertionError, match="q: "):
            check(case, ours(case), eager(case))
        return
    from hf_attn_kernels.triton import forward_launch

    run = forward_launch.run_forward

    def summed(x: Any) -> Any:
        o = run(x)
        o.parts[0].copy_(o.lse * 1.4426950408889634)
        o.parts[1].zero_()
        return o

    monkeypatch.setattr("hf_attn_kernels.triton.op.run_forward", summed)
    with pytest.raises(AssertionError, match="q: "):
        check(case, ours(case), eager(case))
