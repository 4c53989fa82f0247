"""What the Triton kernels take when they are compiled ahead of time."""

from __future__ import annotations

from pathlib import Path

from .markdown import Row, csv_rows, table

AOT_CSV, SASS_CSV = "aot.csv", "sass_model.csv"


def aot_table(results: Path) -> str:
    """Per chip and kernel: how many shipped configurations compile, and the most that one uses."""
    rows = csv_rows(results / AOT_CSV)
    if not rows:
        return "*Not compiled yet: `python scripts/aot_report.py --out results/aot.csv`.*"
    by_chip: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_chip.setdefault((row["arch"], row["kernel"]), []).append(row)
    head = ["chip", "kernel", "configs", "shared memory, at most", "of", "spilling configs"]
    lines = []
    for (arch, kernel), members in by_chip.items():
        shared = max(int(row["shared"]) for row in members)
        spills = [int(row["spilled"]) for row in members]
        spilling = "not known" if min(spills) < 0 else str(sum(s > 0 for s in spills))
        limit = members[0]["shared_limit"]
        cells = [arch, f"`{kernel}`", str(len(members)), str(shared), limit, spilling]
        lines.append(cells)
    return table(head, lines)


def sass_table(results: Path) -> str:
    """What the hot loops ask of the units of a multiprocessor, by the model of their code."""
    rows = csv_rows(results / SASS_CSV)
    if not rows:
        return (
            "*Not counted yet: `python scripts/experiments/sass_model.py --out "
            "results/sass_model.csv`.*"
        )
    units = ("matrix", "copy", "issue", "exp2", "other")
    head = ["kernel", "share of the peak", "binds", *units, "blocks"]
    lines = []
    for row in rows:
        shares = f"{float(row['serial']):.0%} to {float(row['overlapped']):.0%}"
        cycles = [f"{float(row[unit]):.0f}" for unit in units]
        name = f"{row['kernel']} {row['name']}"
        lines.append([name, shares, row["binds"], *cycles, row["blocks"]])
    return table(head, lines)
