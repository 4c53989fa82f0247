"""A whole model by attention implementation: prompts, decode steps and training steps.

Implementations take turns, call by call. On a CPU each has a process of its own, so that its
memory is its own; on a GPU one process holds the weights once, and memory is the device's. Before a
case is timed, each answer is compared with sdpa's; one that is off is named and not timed. A
training step is forward and backward, without an optimizer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..registry import list_implementations
from . import model_worker, shapes
from .model_worker import Case, Facts, Subject, Turn
from .results import append_table, environment, percentiles, read_table
from .worker import Alone

T = TypeVar("T")

BASE = "sdpa"
OURS = tuple(impl.name for impl in list_implementations())
WINDOWED = "triton_swa"  # needs a window
TRAINED = (BASE, "eager", "triton_fa2")
IMPLEMENTATIONS = (BASE, "eager", "triton_fa2", WINDOWED, model_worker.PAGED)
# An answer may be so far from sdpa's, in units of its size; or three times as far as eager's on a
# short text: how much a model makes of a rounding depends on its weights. Where a model has no sdpa
# there is no such yardstick, and eager's answer is compared with, in a wider band.
BAND = {"float32": 1e-3, "bfloat16": 0.05}
WIDER = 4
YARDSTICK = 512  # tokens
# what a failure says -> what its row says; others are tried again by the next run
WHY_NOT = {"out of memory": "does not fit", "ValueError": "not possible"}
CASE_S = 30.0  # after so many seconds a case's rounds end

# fmt: off
KEY = ["impl", "model", "phase", "dtype", "batch", "context", "checkpointing", "device", "threads"]
COLUMNS = [
    *KEY[:7], "rounds", "p20_ms", "p50_ms", "p80_ms", "tokens_s", "peak_bytes", "model_bytes",
    "error", "why_not", "device", "threads", "torch", "triton", "transformers", "commit", "date",
]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What is measured of a phase where nothing else is asked for."""

    batches: tuple[int, ...]
    contexts: tuple[int, ...]
    impls: tuple[str, ...] = IMPLEMENTATIONS
    checkpointing: tuple[bool, ...] = (False,)


PHASES = {
    "prefill": Phase(batches=(1,), contexts=(512, 1024, 2048, 4096)),
    "decode": Phase(batches=(1, 8), contexts=(512, 2048, 8192)),
    "training": Phase(
        batches=(1,), contexts=(1024, 2048), impls=TRAINED, checkpointing=(False, True)
    ),
}


@dataclass
class Bench:
    """One run's processes."""

    subject: Subject
    say: Callable[[str], None]
    stack: ExitStack
    processes: dict[str, Alone] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    allowed: dict[str, float] = field(default_factory=dict)  # by phase

    def call(self, impl: str, function: Callable[..., T], *arguments: object) -> T:
        """In the process of an implementation; a GPU's weights are there once for all."""
        name = impl if self.subject.device == "cpu" else self.subject.name
        process = self.processes.get(name)
        if process is None or not process.alive:
            process = self.processes[name] = self.stack.enter_context(Alone(name))
        return process.call(function, *arguments)

    def attempt(
        self, case: Case, impl: str, function: Callable[[str, Subject, Case], T]
    ) -> T | str:
        """An implementation's part in a case, or what a row says in the place of times ("" for
        none)."""
        try:
            return self.call(impl, function, impl, self.subject, case)
        except RuntimeError as failure:
            why = str(failure).splitlines()[0][:200]
            self.say(f"{case}: {impl} left out: {why}")
            return next((said for word, said in WHY_NOT.items() if word in why), "")

    def tolerance(self, case: Case) -> float:
        """How far an answer may be from the one that it is compared with."""
        if case.phase not in self.allowed:
            band = BAND[self.subject.dtype]
            small = Case(phase=case.phase, batch=1, context=min(case.context, YARDSTICK))
            base, plain = (
                self.attempt(small, impl, model_worker.answer) for impl in (BASE, "eager")
            )
            if isinstance(base, str) or isinstance(plain, str):
                self.allowed[case.phase] = WIDER * band
            else:
                self.allowed[case.phase] = max(band, 3 * distance(plain, base))
        return self.allowed[case.phase]


def run(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    phases: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    contexts: Sequence[int] | None = None,
    impls: Sequence[str] | None = None,
    dtype: str = "float32",
    device: str = "cpu",
    quick: bool = False,
    rounds: int = 5,
    threads: int = 2,
    budget_s: float = 540.0,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure what of the grid is not yet in the CSV `out`, for about `budget_s` seconds.

    Args:
        checkpoint: folder of a causal language model; or `shape`, one of `shapes.SHAPES`.
        phases: of `PHASES`; batches, contexts, impls: in the place of each phase's own.
        quick: the smallest case of each phase, once.

    Returns:
        One dict per implementation and case, keyed by `COLUMNS`; times in milliseconds per prompt,
        decode step or training step. One that does not fit has `why_not` in the place of times.

    Raises:
        ValueError: what is asked for does not fit together, or `out` has other columns.
        RuntimeError: the model cannot be loaded; or, at the end, this package was wrong.
    """
    name = shapes.check(checkpoint, shape, dtype, device)
    for phase in phases or ():
        if phase not in PHASES:
            raise ValueError(f"unknown phase {phase!r}; possible: {', '.join(PHASES)}")
    if min(*(batches or (1,)), *(contexts or (2,)), rounds, threads) < 1:
        raise ValueError("batches, contexts, rounds and threads must be 1 or more")
    subject = Subject(name=name, dtype=dtype, device=device, threads=threads)
    stamp = environment(device)  # of this process
    env = asdict(stamp) | {"threads": threads}
    windowed = shapes.has_window(name)
    cases = list(grid(phases or tuple(PHASES), batches, contexts, quick))
    done = set() if out is None else _measured(out)
    found: list[dict[str, Any]] = []
    start = time.monotonic()
    with ExitStack() as stack:
        bench = Bench(subject, say, stack)
        known: Facts | None = None
        for number, (case, own) in enumerate(cases):
            wanted = [impl for impl in impls or own if impl != WINDOWED or windowed]
            shared = _shared(name, case, dtype) | env
            if all(_key({"impl": impl} | shared) in done for impl in wanted):
                continue
            if time.monotonic() - start > budget_s:
                say(f"out of time before {len(cases) - number} of {len(cases)} cases: run it again")
                break
            known = known or bench.call(BASE, model_worker.facts, subject)
            rows = measure(bench, case, wanted, known, 1 if quick else rounds)
            rows = [shared | row for row in rows if _key(shared | row) not in done]
            rows = [{column: row.get(column, "") for column in COLUMNS} for row in rows]
            if out is not None:
                append_table(out, COLUMNS, rows)
            found += rows
    if any(f": {name} is off" in line for line in bench.wrong for name in OURS):
        raise RuntimeError("; ".join(bench.wrong))
    return found


def grid(
    phases: Sequence[str],
    batches: Sequence[int] | None,
    contexts: Sequence[int] | None,
    quick: bool,
) -> Iterator[tuple[Case, tuple[str, ...]]]:
    """Cases with their phase's implementations, the short ones first."""
    for name in phases:
        phase = PHASES[name]
        lengths, counts = sorted(contexts or phase.contexts), sorted(batches or phase.batches)
        for context in lengths[:1] if quick else lengths:
            for batch in counts[:1] if quick else counts:
                for again in phase.checkpointing:
                    case = Case(phase=name, batch=batch, context=context, checkpointing=again)
                    yield case, phase.impls


def measure(
    bench: Bench, case: Case, impls: Sequence[str], known: Facts, rounds: int
) -> list[dict[str, Any]]:
    """Rows of the implementations that fit and are right, and of those that do not fit."""
    rows: list[dict[str, Any]] = []
    errors: dict[str, float] = {}
    want: list[float] | None = None
    room = known.free_bytes - FREE
    if bench.subject.device == "cpu":
        room -= len(impls) * known.bytes
    # sdpa's answer is the measure; where it has none, eager's, else that of the first that has one
    for impl in dict.fromkeys((BASE, *sorted(impls, key=lambda impl: impl != "eager"))):
        if needed(case, known, impl) > room:
            bench.say(f"{case}: {impl} does not fit")
            got: list[float] | str = WHY_NOT["out of memory"]
        else:
            got = bench.attempt(case, impl, model_worker.answer)
        if isinstance(got, str):
            rows += [{"impl": impl, "why_not": got}] if got else []
            continue
        want = want or got
        errors[impl] = distance(got, want)
        if not errors[impl] <= (allowed := bench.tolerance(case)):
            off = f"{impl} is off by {errors.pop(impl):.2g}, allowed {allowed:.2g}; not timed"
            bench.wrong.append(f"{case}: {off}")
            bench.say(bench.wrong[-1])
    samples: dict[str, list[Turn]] = {impl: [] for impl in errors}
    start = time.monotonic()
    for number in range(rounds):
        names = list(samples)
        shift = number % max(1, len(names))
        for impl in names[shift:] + names[:shift]:
            sample = bench.attempt(case, impl, model_worker.turn)
            if isinstance(sample, Turn):
                samples[impl].append(sample)
            else:
                del samples[impl]  # it is named, and tried again by the next run
        if time.monotonic() - start > CASE_S:
            break
    for impl, taken in samples.items():
        row = _row(case, taken) | {"impl": impl, "model_bytes": known.bytes}
        bench.say(f"{case}: {impl} {row['p50_ms']:.4g} ms, {row['peak_bytes'] / 2**20:.0f} MiB")
        rows.append(row | {"error": float(f"{errors[impl]:.2g}")})
    return rows


def _row(case: Case, taken: Sequence[Turn]) -> dict[str, Any]:
    timing = percentiles(sample.ms for sample in taken)
    tokens = case.batch * (1 if case.phase == "decode" else case.context)
    return {
        "rounds": len(taken),
        **{key: round(value, 3) for key, value in asdict(timing).items()},
        "tokens_s": round(tokens / timing.p50_ms * 1e3, 2),
        "peak_bytes": max(sample.peak_bytes for sample in taken),
    }


def distance(got: Sequence[float], want: Sequence[float]) -> float:
    """Root mean square of the difference, in units of that of `want`; NaN where there is one."""
    assert len(got) == len(want) > 0
    off = sum((a - b) ** 2 for a, b in zip(got, want, strict=True))
    size = sum(b**2 for b in want)
    return float((off / size) ** 0.5) if size else float("nan")


# --- what fits -----------------------------------------------------------------------------------

FREE = 2**30  # is left to the machine


def needed(case: Case, known: Facts, impl: str) -> int:
    """Bytes that a case takes above the model, as a rough guess: what is clearly too much is left
    out before it is tried. Dense scores are eager's only."""
    tokens = case.batch * case.context
    scores = case.batch * known.heads * case.context**2 * (2 * known.itemsize + 4)
    dense = scores if impl == "eager" else 0
    if case.phase == "decode":
        return tokens * known.kv_bytes
    layer = tokens * (6 * known.width + 3 * known.inner) * known.itemsize
    if case.phase == "prefill":
        return tokens * known.kv_bytes + layer + dense
    kept = tokens * known.width * known.itemsize if case.checkpointing else layer + dense
    logits = tokens * known.vocabulary * (known.itemsize + 2 * 4)
    return known.bytes + logits + known.layers * kept + layer + dense


# --- rows ----------------------------------------------------------------------------------------


def _shared(name: str, case: Case, dtype: str) -> dict[str, Any]:
    return (
        {"model": Path(name).name, "dtype": dtype}
        | asdict(case)
        | {"checkpointing": int(case.checkpointing)}
    )


def _key(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(row[name]) for name in KEY)


def _measured(out: Path) -> set[tuple[str, ...]]:
    return {_key(row) for row in read_table(out, COLUMNS)}
