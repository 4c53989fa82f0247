"""Whole models: prompts, decode steps, training steps and short prompts, beside sdpa."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from .markdown import Row, csv_rows, measured_on, short, table, unmeasured

MODEL_CSVS, SHORT_CSV = ("model_cpu.csv", "model_gpu.csv"), "short_cpu.csv"
BASE = "sdpa"


def model_table(*phases: str) -> Callable[[Path], str]:
    """Cases down, implementations across; a table for each device."""

    def write(results: Path) -> str:
        rows = [row for name in MODEL_CSVS for row in csv_rows(results / name)]
        rows = [row for row in rows if row["phase"] in phases]
        if not rows:
            return unmeasured(f"{' and '.join(phases).capitalize()} of whole models:", COMMAND)
        devices = dict.fromkeys((row["device"], row["threads"]) for row in rows)
        return "\n\n".join(
            _of_device([row for row in rows if (row["device"], row["threads"]) == device])
            for device in devices
        )

    return write


COMMAND = "python scripts/bench_model.py"


def _of_device(rows: Sequence[Row]) -> str:
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):  # the newest of equal ones counts
        size = f"{row['batch']} × {int(row['context']):,}"
        again = ", checkpointing" if row["checkpointing"] == "1" else ""
        place = (row["model"], row["dtype"], f"{row['phase']}{again}", size)
        cases.setdefault(place, {})[row["impl"]] = row
    impls = list(dict.fromkeys(impl for by in cases.values() for impl in by))
    impls.sort(key=lambda impl: impl != BASE)
    lines = [[*place, *(_cell(by, impl) for impl in impls)] for place, by in cases.items()]
    head = ["model", "dtype", "work", "tokens", *(f"`{impl}`" for impl in impls)]
    return f"{table(head, lines)}\n\n{measured_on(rows)}"


def _cell(by: dict[str, Row], impl: str) -> str:
    row = by.get(impl)
    if row is None:
        return "–"
    if row["why_not"]:
        return row["why_not"]
    of, unit = ("tokens_s", "tokens/s") if row["phase"] == "decode" else ("p50_ms", "ms")
    speed = f"{short(float(row[of]))} {unit}"
    base = by.get(BASE, {}).get("p50_ms")
    faster = f", {float(base) / float(row['p50_ms']):.2f}×" if base and impl != BASE else ""
    return f"{speed}{faster}, {int(row['peak_bytes']) / 2**20:,.0f} MiB"


def short_table(results: Path) -> str:
    """Prompts down, implementations across: the time of `generate` as a multiple of sdpa's."""
    rows = csv_rows(results / SHORT_CSV)
    if not rows:
        return unmeasured("Short prompts'", "python scripts/bench_short.py")
    cases: dict[tuple[str, ...], dict[str, Row]] = {}
    for row in sorted(rows, key=lambda row: row["date"]):
        tokens = f"{row['prompt_tokens']} + {row['new_tokens']}"
        cases.setdefault((row["model"], row["dtype"], tokens), {})[row["impl"]] = row
    others = [impl for impl in dict.fromkeys(row["impl"] for row in rows) if impl != BASE]
    lines = [
        [
            *place,
            f"{short(float(by[BASE]['p50_ms']))} ms",
            *(f"{float(by[impl]['of_sdpa_time']):.3f}" if impl in by else "–" for impl in others),
        ]
        for place, by in cases.items()
    ]
    head = ["model", "dtype", "tokens", f"`{BASE}`", *(f"`{impl}`, × its time" for impl in others)]
    return f"{table(head, lines)}\n\n{measured_on(rows)}"
