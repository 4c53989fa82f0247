"""The gate before a timing: how far a contender's result may be from the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .baselines import Attention, Shape, eager

ROUNDING_BAND = 2.0  # in units of the dtype's eps times the largest value


Contenders = dict[str, Callable[[], Tensor]]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One shape, made: who computes it, and the q, k, v ``[B, S, H, D]`` that the oracle gets."""

    contenders: Contenders
    q: Tensor
    k: Tensor
    v: Tensor
    lengths: tuple[int, ...]  # real tokens of each batch row, on the left; the rest is padding


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How far a result may be from float64: twice same-dtype eager's own error, and a band."""

    error: float
    allowed: float

    @property
    def kept(self) -> bool:
        return self.error <= self.allowed  # False for NaN


def forward_budget(
    out: Tensor, q: Tensor, k: Tensor, v: Tensor, shape: Shape, *, rows: int = 32
) -> Budget:
    """Compare three bands of query rows (first, middle, last) with the dense float64 oracle.

    Bands, because the whole oracle of 16k tokens does not fit; a band with its keys cropped to its
    last row's diagonal keeps the bottom-right alignment, so it is exact. Looks at the last batch
    row; NaN or infinity anywhere in `out` is over any budget.
    """
    from hf_attn_kernels.reference import attention_reference

    if not bool(out.isfinite().all()):
        return Budget(error=float("nan"), allowed=0.0)
    rows = min(rows, shape.seq_q)
    error = allowed = 0.0
    for start in sorted({0, (shape.seq_q - rows) // 2, shape.seq_q - rows}):
        stop = start + rows
        # without causality a band in the middle would need keys to the right of its diagonal
        cropped = shape.causal
        keys = shape.seq_k - shape.seq_q + stop if cropped else shape.seq_k
        if not cropped and shape.window is not None and stop != shape.seq_q:
            continue
        band = replace(shape, seq_q=rows, seq_k=keys)
        q_band, k_band, v_band = q[-1:, start:stop], k[-1:, :keys], v[-1:, :keys]
        exact, _ = attention_reference(
            q_band, k_band, v_band, causal=shape.causal, window_size=shape.window_size
        )
        plain = eager(q_band, k_band, v_band, replace(band, batch=1))
        error = max(error, float((out[-1:, start:stop] - exact).abs().max()))
        allowed = max(allowed, _allowed(plain, exact))
    return Budget(error=error, allowed=allowed)


def gradient_budgets(
    grads: Sequence[Tensor], exact: Sequence[Tensor], plain: Sequence[Tensor]
) -> list[Budget]:
    """dq, dk and dv against the exact gradients, given eager's in the same dtype."""
    return [
        Budget(error=float((got - want).abs().max()), allowed=_allowed(eager_own, want))
        for got, want, eager_own in zip(grads, exact, plain, strict=True)
    ]


def _allowed(plain: Tensor, exact: Tensor) -> float:
    band = ROUNDING_BAND * torch.finfo(plain.dtype).eps * float(exact.abs().max())
    return 2.0 * float((plain - exact).abs().max()) + band


def gradients(attention: Attention, tensors: Sequence[Tensor], shape: Shape) -> list[Tensor]:
    """dq, dk, dv of the sum of squares over the first batch row, in the dtype of `tensors`."""
    leaves = [x.detach()[:1].requires_grad_() for x in tensors]
    out = attention(leaves[0], leaves[1], leaves[2], replace(shape, batch=1))
    return list(torch.autograd.grad(out, leaves, out.detach()))


def worst_error(got: Tensor, trial: Trial, shape: Shape, *, rows: int = 16) -> tuple[float, float]:
    """Largest error and what is allowed: bands of queries of the first and last head group.

    A band is the first, middle and last real queries of each batch row; its keys end at its last
    query's diagonal, which keeps the alignment, so the oracle needs no more memory than the band.
    Allowed is twice the error of the same oracle in the inputs' dtype, and two units of rounding.
    """
    from hf_attn_kernels.reference import attention_reference

    group = shape.heads_q // shape.heads_kv
    error = allowed = 0.0
    for b, length in enumerate(trial.lengths):
        queries = min(length, shape.seq_q)
        for start in sorted({0, max(queries // 2 - rows, 0), max(queries - rows, 0)}):
            stop = min(start + rows, queries)
            keys = length - queries + stop
            for head in sorted({0, shape.heads_kv - 1}):
                heads = slice(head * group, (head + 1) * group)
                cut = (
                    trial.q[b : b + 1, start:stop, heads],
                    trial.k[b : b + 1, :keys, head : head + 1],
                    trial.v[b : b + 1, :keys, head : head + 1],
                )
                exact, plain = (
                    attention_reference(
                        *cut, causal=shape.causal, window_size=shape.window_size, dtype=dtype
                    )[0]
                    for dtype in (torch.float64, cut[0].dtype)
                )
                part = got[b : b + 1, start:stop, heads]
                if not bool(part.isfinite().all()):
                    return float("nan"), allowed
                error = max(error, float((part - exact).abs().max()))
                band = 2 * torch.finfo(plain.dtype).eps * float(exact.abs().max())
                allowed = max(allowed, 2 * float((plain - exact).abs().max()) + band)
    return error, allowed
