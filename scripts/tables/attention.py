"""Attention calls beside their peers, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from hf_attn_patch.bench.growth import exponent
from hf_attn_patch.bench.results import OURS, read_rows

from .markdown import Row, measured_on, milliseconds, short, table, unmeasured

CPU_CSV, GPU_CSV = "attention_cpu.csv", "attention_gpu.csv"
MLA_CSV, GROWTH_CSV = "mla_cpu.csv", "growth_cpu.csv"


class Problem(NamedTuple):
    """What rows of one comparison have in common."""

    pass_: str
    extra: str
    heads: str
    head_dim: str
    sizes: str
    window: str
    causal: str
    batch: str
    dtype: str
    device: str
    threads: str


def _problem(row: Row) -> Problem:
    same = row["seq_q"] == row["seq_k"]
    return Problem(
        pass_=row["pass"],
        extra=row["extra"],
        heads=f"{row['heads_q']}/{row['heads_kv']}",
        head_dim=row["head_dim"],
        sizes=row["seq_k"] if same else f"{row['seq_q']}x{row['seq_k']}",
        window=row["window"],
        causal="causal" if row["causal"] == "1" else "full",
        batch=row["batch"],
        dtype=row["dtype"],
        device=row["device"],
        threads=row["threads"],
    )


def grouped(rows: Iterable[Row]) -> dict[Problem, dict[str, Row]]:
    """Rows by problem and contender; the newest of a contender's rows counts."""
    groups: dict[Problem, dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        groups.setdefault(_problem(row), {})[row["impl"]] = row
    return groups


def is_ours(impl: str) -> bool:
    return impl == OURS or impl.startswith(f"{OURS}:")


def cpu_table(threads: int) -> Callable[[Path], str]:
    """A line per problem and way of ours: its time, and every peer's as a multiple of it."""

    def write(results: Path) -> str:
        rows = [row for row in read_rows(results / CPU_CSV) if row["threads"] == str(threads)]
        if not rows:
            return unmeasured("CPU", f'make bench ARGS="--threads {threads}"')
        lines = []
        for problem, contenders in grouped(rows).items():
            peers = sorted(
                (float(row["p50_ms"]), impl)
                for impl, row in contenders.items()
                if not is_ours(impl)
            )
            for impl, row in contenders.items():
                if not is_ours(impl):
                    continue
                mine, way = float(row["p50_ms"]), impl.removeprefix(OURS).replace(":", ", by the ")
                ratios = " · ".join(f"{peer} {short(ms / mine)}×" for ms, peer in peers)
                lines.append([describe(problem) + way, problem.dtype, milliseconds(row), ratios])
        head = ["work", "dtype", "hf_attn_patch", "the others, × its time"]
        return f"{table(head, lines)}\n\n{measured_on(rows)}"

    return write


def default_table(threads: int) -> Callable[[Path], str]:
    """What an install without the extension does: problems down, dtypes across."""

    def write(results: Path) -> str:
        rows = [row for row in read_rows(results / CPU_CSV) if row["threads"] == str(threads)]
        if not rows:
            return unmeasured("CPU", f'make bench ARGS="--threads {threads}"')
        dtypes = sorted({row["dtype"] for row in rows}, reverse=True)
        lines: dict[str, dict[str, str]] = {}
        for problem, contenders in grouped(rows).items():
            if OURS in contenders:
                lines.setdefault(describe(problem), {})[problem.dtype] = _beside_peers(contenders)
        cells = [[what, *(by.get(dtype, "–") for dtype in dtypes)] for what, by in lines.items()]
        return f"{table(['work', *dtypes], cells)}\n\n{measured_on(rows, 'Medians')}"

    return write


def _beside_peers(contenders: dict[str, Row]) -> str:
    """`891 ms; sdpa 1.11×`: the median of ours and each peer's as a multiple of it."""
    mine = float(contenders[OURS]["p50_ms"])
    peers = sorted(
        (float(r["p50_ms"]), impl) for impl, r in contenders.items() if not is_ours(impl)
    )
    multiples = ", ".join(f"{peer} {short(ms / mine)}×" for ms, peer in peers)
    return f"{short(mine)} ms" + (f"; {multiples}" if multiples else "")


def describe(problem: Problem) -> str:
    window = f", W {problem.window}" if problem.window else ""
    extra = f", {problem.extra}" if problem.extra else ""
    return (
        f"{problem.pass_} {problem.causal} {problem.sizes}{window}{extra}, "
        f"B {problem.batch}, H {problem.heads}, D {problem.head_dim}"
    )


def gpu_table(pass_: str) -> Callable[[Path], str]:
    """Contenders across, problems down; TFLOP/s, for decode GB/s of K and V."""

    def write(results: Path) -> str:
        every = read_rows(results / GPU_CSV)
        rows = [row for row in every if row["pass"] == pass_ and row["extra"] != "launch"]
        if not rows:
            return unmeasured(f"GPU {pass_}", f"make gpu SLICE={pass_}")
        rate, unit = ("gbytes_s", "GB/s") if pass_ == "decode" else ("tflops", "TFLOP/s")
        groups = grouped(rows)
        names = list(dict.fromkeys(impl for contenders in groups.values() for impl in contenders))
        lines = []
        for problem, contenders in groups.items():
            cells = [short(float(contenders[n][rate])) if n in contenders else "–" for n in names]
            lines.append([describe(problem), problem.dtype, *cells])
        limits = [row for row in every if row["pass"] == "ceiling"]
        limit = " · ".join(
            f"{row['extra']} {float(row[rate]):.0f} {unit}" for row in limits if row[rate]
        )
        note = measured_on(rows) + (f" The device's own ceiling: {limit}." if limit else "")
        return f"{table([unit, 'dtype', *names], lines)}\n\n{note}"

    return write


def mla_table(results: Path) -> str:
    """Decoding over latents: this package's time, the peers' as multiples of it."""
    rows = read_rows(results / MLA_CSV)
    if not rows:
        return unmeasured("MLA", "python scripts/bench_mla.py")
    groups = grouped(rows)
    peers = sorted({row["impl"] for row in rows if not is_ours(row["impl"])})
    lines = []
    for problem, contenders in groups.items():
        mine = contenders[OURS]
        ratios = (float(contenders[p]["p50_ms"]) / float(mine["p50_ms"]) for p in peers)
        what = problem.extra.split(";")[0].removeprefix("MLA ")
        keys = f"{int(mine['seq_k']):,}"
        lines.append(
            [what, problem.dtype, keys, milliseconds(mine), *(f"{r:.0f}×" for r in ratios)]
        )
    head = ["what", "dtype", "keys", "triton_mla", *(f"{peer}, × its time" for peer in peers)]
    return f"{table(head, lines)}\n\n{measured_on(rows)}"


def growth_curves(rows: Iterable[Row]) -> dict[str, dict[int, float]]:
    """Milliseconds by length, of each curve; the newest of equal rows counts."""
    curves: dict[str, dict[int, float]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        curves.setdefault(row["extra"], {})[int(row["seq_k"])] = float(row["p50_ms"])
    return curves


def growth_table(results: Path) -> str:
    """Lengths across, curves down, and the exponent of each."""
    rows = read_rows(results / GROWTH_CSV)
    if not rows:
        return unmeasured("Growth", "python scripts/bench_growth.py --out results/growth_cpu.csv")
    curves = growth_curves(rows)
    lengths = sorted({n for times in curves.values() for n in times})
    lines = []
    for name, times in curves.items():
        grown = exponent(list(times), list(times.values()))
        cells = [short(times[n]) if n in times else "–" for n in lengths]
        lines.append([name, *cells, "–" if grown is None else f"{grown:.2f}"])
    head = ["ms", *(f"{n // 1024}k" for n in lengths), "exponent from 4k on"]
    return f"{table(head, lines)}\n\n{measured_on(rows)}"
