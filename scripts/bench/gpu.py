"""The GPU rows of results/: forward, backward and decode against PyTorch's own attention.

Every contender is checked against the float64 oracle on the shape before it is timed there; one
that is wrong, or cannot run, is named and left out. Rows are appended shape by shape, so a run that
stops at its time budget goes on where it stopped when it is started again. Two ceilings, the copy
rate and the bf16 matmul rate, are measured on the same device and stand in the same file.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hf_attn_patch.bench import baselines as dense
from hf_attn_patch.bench.baselines import Attention, Shape, eager
from hf_attn_patch.bench.flops import rate_per_s
from hf_attn_patch.bench.results import (
    OURS,
    BenchRow,
    Clock,
    Contender,
    Environment,
    Timing,
    append_rows,
    environment,
    measured_keys,
    read_rows,
    time_interleaved,
    wall_clock_ms,
)
from hf_attn_patch.bench.tolerance import Budget, forward_budget, gradient_budgets, gradients

from . import decode, peers

SEQUENCES = (512, 2048, 4096, 8192, 16384)
TOKENS = 16384  # batch x sequence of a forward shape
HEADS = {64: 32, 128: 16, 256: 8}  # heads x head_dim = 2048, as FlashAttention's own benchmark


def _forward_shapes() -> Iterator[Shape]:
    for head_dim, heads in HEADS.items():
        for causal in (False, True):
            for seq in SEQUENCES:
                yield _square("forward", TOKENS // seq, heads, heads, head_dim, seq, causal)
    yield _square("forward", 1, 32, 8, 128, 16384, True)
    yield _square("forward", 1, 32, 8, 128, 16384, True, window=512)


def _backward_shapes() -> Iterator[Shape]:
    for head_dim, heads in HEADS.items():
        for causal in (False, True):
            for seq in (2048, 8192):
                yield _square("backward", TOKENS // seq, heads, heads, head_dim, seq, causal)
    yield _square("backward", 2, 32, 8, 128, 8192, True)


def _square(
    pass_: str,
    batch: int,
    heads_q: int,
    heads_kv: int,
    head_dim: int,
    seq: int,
    causal: bool,
    window: int | None = None,
) -> Shape:
    return Shape(
        pass_=pass_,
        batch=batch,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=head_dim,
        seq_q=seq,
        seq_k=seq,
        causal=causal,
        window=window,
    )


SLICES: dict[str, tuple[Shape, ...]] = {
    "forward": tuple(_forward_shapes()),
    "backward": tuple(_backward_shapes()),
    "decode": tuple(decode.shapes()),
}


CONTENDERS: dict[str, dict[str, Attention]] = {
    "forward": {**dense.PREFILL, **dense.WAYS, **dense.HOPPER, **peers.PREFILL},
    "backward": {**dense.PREFILL, **dense.WAYS, **dense.SUMS, **peers.PREFILL},
    "decode": {**dense.DECODE, **decode.PAGED, **peers.DECODE},
}


# --- clocks ---------------------------------------------------------------------------------------


def cuda_event_ms(call: Contender) -> float:
    """Milliseconds of GPU time of one `call`, its CPU launch cost hidden.

    The GPU first sleeps for about half a millisecond, in which the CPU queues the call; without
    that a short kernel's time would be the time it takes to launch it.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def launch_ms(call: Contender, *, calls: int = 50) -> float:
    """Milliseconds of CPU time that handing one `call` to an idle GPU queue takes."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        call()
    elapsed = (time.perf_counter() - start) * 1e3 / calls
    torch.cuda.synchronize()
    return elapsed


# --- measuring ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Report:
    """What a run did: rows written, contenders left out and why, shapes left for the next run."""

    rows: list[BenchRow] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    shapes_left: int = 0
    copy_gbytes_s: float | None = None  # this device's copy rate, once known


def measure(
    shape: Shape,
    env: Environment,
    device: torch.device,
    report: Report,
    *,
    contenders: Mapping[str, Attention] | None = None,
    rounds: int = 25,
) -> list[BenchRow]:
    """Check, then time, every contender on one shape; returns a row for each that is right."""
    torch.manual_seed(0)
    q, k, v = shape.inputs(device)
    fair = CONTENDERS[shape.pass_] if contenders is None else contenders
    check = _gradient_check if shape.pass_ == "backward" else _forward_check
    gate = check(q, k, v, shape)
    calls: dict[str, Contender] = {}
    for name, attention in fair.items():
        try:
            with _around(attention):
                budgets = gate(attention)
            if all(budget.kept for budget in budgets):
                calls[name] = _call(attention, q, k, v, shape)
                calls[name]()
            else:
                worst = max(budgets, key=lambda b: b.error - b.allowed)
                report.wrong.append(
                    f"{shape} {name}: error {worst.error:.2e}, allowed {worst.allowed:.2e}"
                )
        except (RuntimeError, ValueError, TypeError, ImportError) as error:
            calls.pop(name, None)
            first_line = (str(error).splitlines() or [""])[0]
            report.left_out.append(f"{shape} {name}: {type(error).__name__}: {first_line[:160]}")
    if not calls:
        return []
    on_gpu = device.type == "cuda"
    clock: Clock = cuda_event_ms if on_gpu else wall_clock_ms
    timings = time_interleaved(calls, rounds=rounds, budget_s=20.0, clock=clock)
    peaks = {name: _peak_bytes(call) if on_gpu else None for name, call in calls.items()}
    rows = [_rated(shape, name, env, timings[name], peaks[name]) for name in calls]
    if shape.pass_ == "decode" and on_gpu:
        launches = time_interleaved(calls, rounds=5, clock=launch_ms)
        rows += [
            shape.row(name, env, timing=timing, extra="launch") for name, timing in launches.items()
        ]
    return rows


Gate = Callable[[Attention], list[Budget]]


def _forward_check(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Gate:
    return lambda attention: [forward_budget(attention(q, k, v, shape), q, k, v, shape)]


def _gradient_check(q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Gate:
    # float64 where its dense scores fit, else float32: its own error is far below bf16's
    scores = shape.heads_q * shape.seq_q * shape.seq_k
    exact_dtype = torch.float64 if scores <= 2**27 else torch.float32
    exact = gradients(eager, [x.to(exact_dtype) for x in (q, k, v)], shape)
    plain = gradients(eager, (q, k, v), shape)
    return lambda attention: gradient_budgets(gradients(attention, (q, k, v), shape), exact, plain)


def _around(attention: Attention) -> contextlib.AbstractContextManager[None]:
    """What a contender needs around its forward and its backward."""
    return getattr(attention, "around", contextlib.nullcontext)()


def _call(attention: Attention, q: Tensor, k: Tensor, v: Tensor, shape: Shape) -> Contender:
    if shape.pass_ != "backward":

        def forward() -> Tensor:
            with _around(attention):
                return attention(q, k, v, shape)

        return forward

    with _around(attention):
        out = attention(q, k, v, shape)
    grad = torch.randn_like(out)

    def backward() -> tuple[Tensor, ...]:
        with _around(attention):
            return torch.autograd.grad(out, (q, k, v), grad, retain_graph=True)

    return backward


def _peak_bytes(call: Contender) -> int:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return int(torch.cuda.max_memory_allocated() - before)


def _rated(shape: Shape, name: str, env: Environment, timing: Timing, peak: int | None) -> BenchRow:
    if shape.pass_ == "decode":
        rate = rate_per_s(shape.kv_bytes, timing.p50_ms, unit=1e9)
        return shape.row(name, env, timing=timing, gbytes_s=rate, peak_bytes=peak)
    rate = rate_per_s(shape.flops, timing.p50_ms, unit=1e12)
    return shape.row(name, env, timing=timing, tflops=rate, peak_bytes=peak)


def ceilings(env: Environment, device: torch.device, *, scale: int = 1) -> list[BenchRow]:
    """The device's copy rate (4 GiB) and bf16 matmul rate (8192 cubed); `scale` divides both."""
    size = 8192 // scale
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31 // scale**2, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    clock: Clock = cuda_event_ms if device.type == "cuda" else wall_clock_ms
    calls: dict[str, Contender] = {
        "matmul": lambda: torch.matmul(a, b),
        "copy": lambda: target.copy_(source),
    }
    timings = time_interleaved(calls, rounds=15, budget_s=20.0, clock=clock)
    moved, flops = 2.0 * source.nbytes, 2.0 * size**3
    rates = {
        "matmul": {"tflops": rate_per_s(flops, timings["matmul"].p50_ms, unit=1e12)},
        "copy": {"gbytes_s": rate_per_s(moved, timings["copy"].p50_ms, unit=1e9)},
    }
    nothing = Shape(
        pass_="ceiling", batch=1, heads_q=1, heads_kv=1, head_dim=size, seq_q=size, seq_k=size
    )  # fmt: skip
    return [nothing.row(n, env, timing=timings[n], extra=n, **rates[n]) for n in calls]


def run(
    slices: Sequence[str],
    *,
    out: Path,
    device: torch.device,
    budget_s: float = 450.0,
    say: Callable[[str], None] = print,
) -> Report:
    """Measure what of `slices` is not yet in `out`, for about `budget_s` seconds.

    Raises ValueError for a slice that does not exist or an `out` with other columns.
    """
    unknown = [name for name in slices if name not in SLICES]
    if unknown:
        raise ValueError(f"unknown slice {unknown[0]!r}; possible: {', '.join(SLICES)}")
    env, report, start = environment(device), Report(), time.monotonic()
    done = measured_keys(out)
    if not any(key[1] == "ceiling" for key in done):
        _write(out, ceilings(env, device), report, say)
    report.copy_gbytes_s = _copy_rate(out)
    shapes = [shape for name in slices for shape in SLICES[name]]
    missing = [shape for shape in shapes if shape.row(OURS, env).key() not in done]
    for number, shape in enumerate(missing):
        if time.monotonic() - start > budget_s:
            report.shapes_left = len(missing) - number
            break
        if (why := decode.too_large(shape)) is not None:
            report.left_out.append(why)
            continue
        _write(out, measure(shape, env, device, report), report, say)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return report


def _copy_rate(out: Path) -> float | None:
    """GB/s of the copy that `ceilings` measured."""
    rates = [row["gbytes_s"] for row in read_rows(out) if row["extra"] == "copy"]
    return float(rates[-1]) if rates else None


def _write(out: Path, rows: Sequence[BenchRow], report: Report, say: Callable[[str], None]) -> None:
    append_rows(out, rows)
    report.rows += rows
    for row in rows:
        assert row.timing is not None
        rate = f"{row.tflops:.0f} TFLOP/s" if row.tflops else f"{row.gbytes_s or 0:.0f} GB/s"
        if row.pass_ == "decode" and row.gbytes_s and report.copy_gbytes_s:
            rate += f", {row.gbytes_s / report.copy_gbytes_s:.0%} of the copy rate"
        say(
            f"{row.pass_} B{row.batch} D{row.head_dim} {row.seq_q}x{row.seq_k} {row.impl} "
            f"{row.extra} {row.timing.p50_ms:.4g} ms, {rate}"
        )
