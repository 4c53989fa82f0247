"""How the CPU's cost grows with length: a prefill's square, a window's and a decode step's line.

Each curve is checked against the float64 oracle where that fits, then timed at doubling lengths.
Its exponent is the slope of log time over log length, fitted from `FITTED_FROM` tokens on: below,
the cost of a call that is there whatever its length would flatten it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .baselines import DTYPES, Shape, ours, ours_kvcache
from .results import OURS, BenchRow, append_rows, environment, time_interleaved
from .tolerance import forward_budget, gradient_budgets, gradients

FITTED_FROM = 4096
BUDGET_S = 10.0  # of a length


@dataclass(frozen=True, kw_only=True)
class Curve:
    """One kind of work at growing lengths."""

    shape: Shape  # at the first length
    last: int  # the longest; lengths double up to it
    expected: float  # exponent

    def shapes(self) -> list[Shape]:
        found, keys = [], self.shape.seq_k
        while keys <= self.last:
            queries = 1 if self.shape.pass_ == "decode" else keys
            found.append(replace(self.shape, seq_q=queries, seq_k=keys))
            keys *= 2
        return found


def _shape(pass_: str, heads: tuple[int, int], head_dim: int, window: int | None = None) -> Shape:
    return Shape(
        pass_=pass_, batch=1, heads_q=heads[0], heads_kv=heads[1], head_dim=head_dim,
        seq_q=1024, seq_k=1024, window=window, dtype="fp32",
    )  # fmt: skip


CURVES = {
    "prefill": Curve(shape=_shape("forward", (8, 2), 64), last=65536, expected=2),
    "window": Curve(shape=_shape("forward", (8, 2), 64, 512), last=65536, expected=1),
    "window-training": Curve(shape=_shape("backward", (8, 2), 64, 512), last=65536, expected=1),
    "decode": Curve(shape=_shape("decode", (32, 8), 128), last=65536, expected=1),
}


def run(
    *,
    curves: Sequence[str] | None = None,
    out: Path | None = None,
    threads: int = 1,
    longest: int | None = None,
    rounds: int = 9,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure curves of this package; append their rows to the CSV `out`.

    Args:
        curves: names from `CURVES`; None for all.
        longest: no length above this many tokens.

    Returns:
        For each curve its name, lengths, times in milliseconds, and exponents found and expected.

    Raises:
        ValueError: an unknown curve, or a count below 1.
        RuntimeError: a result is not within the error budget.
    """
    names = list(CURVES) if curves is None else list(curves)
    unknown = [name for name in names if name not in CURVES]
    if unknown:
        raise ValueError(f"unknown curve {unknown[0]!r}; possible: {', '.join(CURVES)}")
    if min(threads, rounds) < 1:
        raise ValueError("threads and rounds must be 1 or more")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    try:
        for name in names:
            shapes = [s for s in CURVES[name].shapes() if longest is None or s.seq_k <= longest]
            rows = []
            for number, shape in enumerate(shapes):
                say(f"{name}: {shape}")
                rows.append(_measure(name, shape, rounds, check_gradients=number == 0))
                if out is not None:
                    append_rows(out, rows[-1:])
            times = [row.timing.p50_ms for row in rows if row.timing is not None]
            lengths = [shape.seq_k for shape in shapes]
            found.append({
                "curve": name,
                "lengths": lengths,
                "p50_ms": times,
                "exponent": exponent(lengths, times),
                "expected": CURVES[name].expected,
            })  # fmt: skip
    finally:
        torch.set_num_threads(before)
    return found


def exponent(lengths: Sequence[float], times: Sequence[float]) -> float | None:
    """Least-squares slope of log time over log length from `FITTED_FROM` on; None for one point."""
    points = [
        (math.log(n), math.log(t)) for n, t in zip(lengths, times, strict=True) if n >= FITTED_FROM
    ]
    if len(points) < 2:
        return None
    x, y = (sum(values) / len(points) for values in zip(*points, strict=True))
    slope: float = sum((a - x) * (b - y) for a, b in points) / sum((a - x) ** 2 for a, _ in points)
    return slope


def _measure(name: str, shape: Shape, rounds: int, check_gradients: bool) -> BenchRow:
    torch.manual_seed(0)
    dtype = DTYPES[shape.dtype]
    q = torch.randn(1, shape.seq_q, shape.heads_q, shape.head_dim, dtype=dtype)
    # as transformers' caches lie: heads first
    k, v = (
        torch.randn(1, shape.heads_kv, shape.seq_k, shape.head_dim, dtype=dtype).transpose(1, 2)
        for _ in range(2)
    )
    if shape.pass_ == "backward":
        leaves = [x.requires_grad_() for x in (q, k, v)]
        if check_gradients:
            _check_gradients(leaves, shape)

        def call() -> object:
            out = ours(q, k, v, shape)
            return torch.autograd.grad(out, leaves, out.detach())
    else:
        attention = ours_kvcache if shape.pass_ == "decode" else ours
        budget = forward_budget(attention(q, k, v, shape), q, k, v, shape)
        if not budget.kept:
            raise RuntimeError(f"{name} at {shape.seq_k} keys is off: {budget}; nothing was timed")

        def call() -> object:
            with torch.no_grad():
                return attention(q, k, v, shape)

    timing = time_interleaved({OURS: call}, rounds=rounds, warmup=1, budget_s=BUDGET_S)[OURS]
    return shape.row(OURS, environment(), timing=timing, extra=name)


def _check_gradients(leaves: Sequence[Tensor], shape: Shape) -> None:
    """By the oracle's own gradients, at the first length only: the oracle is dense."""
    from hf_attn_kernels.reference import attention_reference

    from .baselines import eager

    def oracle(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Tensor:
        causal, window = shape.causal, shape.window_size
        return attention_reference(q, k, v, causal=causal, window_size=window)[0]

    exact = gradients(oracle, [x.double() for x in leaves], shape)
    found, plain = (gradients(attention, leaves, shape) for attention in (ours, eager))
    wrong = [b for b in gradient_budgets(found, exact, plain) if not b.kept]
    if wrong:
        raise RuntimeError(f"a gradient of {shape} is off: {wrong[0]}; nothing was timed")
