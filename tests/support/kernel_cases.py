"""Kernel test cases as data, and the error budget that each must stay within.

The budget of a result is twice the error that eager attention of the same dtype makes against
float64, plus a rounding band: a kernel may round differently, but not worse.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import poisoned
from torch import Tensor

from hf_attn_kernels import flash_attn_func, flash_attn_varlen_func
from hf_attn_kernels.reference import attention_reference

# Units in the last place of the largest value. In float32 the backward's weights come back out of
# the log-sum-exp, exp(s - lse), whose exponent is rounded where eager's softmax is exact.
BAND = {torch.float32: 8.0, torch.float16: 4.0, torch.bfloat16: 4.0}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call. Letters as in hf_attn_kernels.problem."""

    batch: int = 2
    q_len: int = 63
    k_len: int | None = None  # None: q_len
    heads_q: int = 4
    heads_kv: int = 2
    head_dim: int = 32
    head_dim_v: int | None = None
    dtype: torch.dtype = torch.float32
    scale: float | None = None
    causal: bool = False
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sink_tokens: int = 0
    s_aux: bool = False
    alibi: str = ""  # "", "heads" or "rows"
    bias: tuple[int, int, int] | None = None  # (1 | B, 1 | Hq, 1 | Q); K is added
    bool_bias: bool = False
    padding: str = ""  # "", "left", "right", "holes" or "dead" (a row of padding only)
    dropout_p: float = 0.0
    lengths: tuple[tuple[int, int], ...] = ()  # packed: (query, key) lengths
    note: str = field(default="", compare=False)

    @property
    def keys(self) -> int:
        return self.q_len if self.k_len is None else self.k_len

    def __str__(self) -> str:
        parts = [f"Q{self.q_len}-K{self.keys}-H{self.heads_q}:{self.heads_kv}-D{self.head_dim}"]
        if self.lengths:
            parts = [f"packed{len(self.lengths)}-H{self.heads_q}:{self.heads_kv}-D{self.head_dim}"]
        parts += [f"DV{self.head_dim_v}"] if self.head_dim_v else []
        parts.append(str(self.dtype).removeprefix("torch."))
        parts += ["causal"] if self.causal else []
        parts += [f"W{self.window[0]},{self.window[1]}"] if self.window != (-1, -1) else []
        parts += [f"first{self.sink_tokens}"] if self.sink_tokens else []
        parts += ["softcap"] if self.softcap else []
        parts += ["s_aux"] if self.s_aux else []
        parts += [f"alibi-{self.alibi}"] if self.alibi else []
        if self.bias:
            kind = "mask" if self.bool_bias else "bias"
            parts.append(kind + "x".join(str(n) for n in self.bias))
        parts += [f"pad-{self.padding}"] if self.padding else []
        parts += ["dropout"] if self.dropout_p else []
        parts += [self.note] if self.note else []
        return "-".join(parts)


@dataclass(frozen=True)
class Data:
    """Tensors of a case; `leaves` are those that get a gradient."""

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any]  # of both the kernel and the reference
    leaves: dict[str, Tensor]
    cu: tuple[Tensor, Tensor] | None


def padding_mask(kind: str, batch: int, length: int) -> Tensor:
    keep = torch.ones(batch, length, dtype=torch.bool)
    for b in range(batch):
        n = (b + 1) * length // (batch + 2)
        if kind == "left":
            keep[b, :n] = False
        elif kind == "right":
            keep[b, length - n :] = False
        elif kind == "holes":
            keep[b] = torch.rand(length) > 0.4
    if kind == "dead":
        keep[0] = False
    return keep


def make_data(
    case: Case, device: torch.device, fence: Callable[[Tensor], Tensor] = lambda t: t
) -> Data:
    dim_v = case.head_dim_v or case.head_dim
    if case.lengths:
        lead_q = (sum(q for q, _ in case.lengths) + 2,)  # two tokens behind the last sequence
        lead_k = (sum(k for _, k in case.lengths) + 2,)
    else:
        lead_q, lead_k = (case.batch, case.q_len), (case.batch, case.keys)

    def normal(*shape: int, dtype: torch.dtype = case.dtype) -> Tensor:
        return torch.randn(*shape).to(dtype)

    keep = padding_mask(case.padding, case.batch, case.keys) if case.padding else None
    k, v = normal(*lead_k, case.heads_kv, case.head_dim), normal(*lead_k, case.heads_kv, dim_v)
    if keep is not None:  # padding holds rubbish: nothing of it may come through
        k, v = (x.masked_fill(~keep[..., None, None], float("nan")) for x in (k, v))
    made = {"q": normal(*lead_q, case.heads_q, case.head_dim), "k": k, "v": v}
    if case.s_aux:
        made["s_aux"] = normal(case.heads_q)
    if case.bias is not None:
        longest = (max(q for q, _ in case.lengths), max(k for _, k in case.lengths)) if (
            case.lengths
        ) else (case.q_len, case.keys)  # fmt: skip
        rows = longest[0] if case.bias[2] != 1 else 1
        shape = (case.bias[0], case.bias[1], rows, longest[1])
        made["bias"] = torch.rand(shape) > 0.3 if case.bool_bias else normal(*shape)
    placed = {name: fence(t.to(device)) for name, t in made.items()}
    leaves = {name: t.requires_grad_() for name, t in placed.items() if t.is_floating_point()}
    options: dict[str, Any] = {
        "causal": case.causal, "window_size": case.window, "softcap": case.softcap,
        "softmax_scale": case.scale, "sink_tokens": case.sink_tokens, "dropout_p": case.dropout_p,
        "s_aux": placed.get("s_aux"), "bias": placed.get("bias"),
    }  # fmt: skip
    if case.alibi:
        rows_of = (case.batch if not case.lengths else len(case.lengths),)
        slopes = torch.rand(*(rows_of if case.alibi == "rows" else ()), case.heads_q)
        options["alibi_slopes"] = slopes.to(device)
    cu: tuple[Tensor, Tensor] | None = None
    if keep is not None:
        options["key_padding_mask"] = keep.to(device)
    if case.lengths:
        starts_q, starts_k = (
            torch.tensor([0, *torch.tensor(x).cumsum(0).tolist()], dtype=torch.int32, device=device)
            for x in zip(*case.lengths, strict=True)
        )
        cu = (starts_q, starts_k)
    return Data(placed["q"], placed["k"], placed["v"], options, leaves, cu)


def apart(tensor: Tensor) -> Tensor:
    """`tensor` amid NaN, 8 columns and one row of each other dimension away from all else."""
    block = poisoned(tensor.new_empty([*(n + 2 for n in tensor.shape[:-1]), tensor.shape[-1] + 16]))
    inside = block[(*(slice(1, -1) for _ in tensor.shape[:-1]), slice(8, -8))]
    inside.copy_(tensor.detach())
    return inside.requires_grad_(tensor.requires_grad)


def run_kernel(data: Data, **changes: Any) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of the kernel; `changes` override options."""
    options = {**data.options, **changes}
    if data.cu is None:
        out = flash_attn_func(data.q, data.k, data.v, return_attn_probs=True, **options)
    else:
        longest = (int(c.diff().max()) for c in data.cu)
        out = flash_attn_varlen_func(
            data.q, data.k, data.v, *data.cu, *longest, return_attn_probs=True, **options
        )
    return out[0], out[1]  # type: ignore[return-value]


def run_reference(
    data: Data, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[Tensor, Tensor]:
    options = {**data.options, "dtype": dtype, "dropout_seed": seed}
    if data.cu is not None:
        options |= {"cu_seqlens_q": data.cu[0], "cu_seqlens_k": data.cu[1]}
    return attention_reference(data.q, data.k, data.v, **options)


def gradients(data: Data, out: Tensor, lse: Tensor) -> dict[str, Tensor]:
    """Of a fixed random sum of the output and of the finite log-sum-exps."""
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(t.device) for t in (out, lse)]
    finite = torch.where(torch.isinf(lse), 0.0, lse)
    loss = (out * weights[0].to(out.dtype)).sum() + (finite * weights[1].to(lse.dtype)).sum()
    found = torch.autograd.grad(loss, list(data.leaves.values()))
    return dict(zip(data.leaves, found, strict=True))


def assert_within_budget(
    name: str, got: Tensor, eager: Tensor, exact: Tensor, slack: float = 0.0
) -> None:
    """`got` is at most twice as far from `exact` as `eager`, plus a rounding band and `slack`."""
    assert got.shape == exact.shape, f"{name}: shape {tuple(got.shape)} != {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    infinite = torch.isinf(exact)
    assert bool((torch.isinf(got) == infinite).all()), f"{name}: infinite in other places"
    want, have, plain = (
        torch.where(infinite, 0.0, t.detach().double()) for t in (exact, got, eager)
    )
    error = (have - want).abs().max().item()
    eager_error = (plain - want).abs().max().item()
    band = BAND[got.dtype] * torch.finfo(got.dtype).eps * max(want.abs().max().item(), 1e-3)
    budget = 2 * (eager_error if math.isfinite(eager_error) else 0.0) + band + slack
    assert error <= budget, (
        f"{name}: error {error:.3g} exceeds {budget:.3g} "
        f"(eager's own {eager_error:.3g}, rounding band {band:.3g})"
    )


def check(case: Case, device: torch.device, fence: Callable[[Tensor], Tensor], *,
          backward: bool = True, **changes: Any) -> None:  # fmt: skip
    """Kernel against the oracle, forward and backward; `changes` break the call on purpose."""
    data = make_data(case, device, fence)
    torch.manual_seed(7)
    out, lse = run_kernel(data, **changes)
    torch.manual_seed(7)  # the seed that the API drew for its dropout
    seed = int(torch.randint(0, 2**62, (1,), device=device, dtype=torch.int64))
    exact, exact_lse = run_reference(data, seed=seed)
    eager, eager_lse = run_reference(data, case.dtype, seed)
    assert_within_budget("out", out, eager, exact)
    assert_within_budget("lse", lse, eager_lse.float(), exact_lse)
    if not backward:
        return
    got = gradients(data, out, lse)
    want, plain = gradients(data, exact, exact_lse), gradients(data, eager, eager_lse)
    for name in got:
        keep = case.padding and name in ("k", "v")
        if keep:  # the reference's gradient of rubbish is 0, so must ours be
            assert not bool(torch.isnan(got[name]).any()), f"d{name}: NaN came through"
        assert_within_budget(f"d{name}", got[name], plain[name], want[name])
