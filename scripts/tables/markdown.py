"""What all tables are written with."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path

Row = dict[str, str]


def csv_rows(path: Path) -> list[Row]:
    """A CSV's rows, [] where there is none yet."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def milliseconds(row: Row) -> str:
    p20, p50, p80 = (short(float(row[f"{p}_ms"])) for p in ("p20", "p50", "p80"))
    return f"{p50} ms ({p20} to {p80})"


def unmeasured(what: str, command: str) -> str:
    return f"*{what} rows are not measured yet (`{command}`).*"


def measured_on(rows: Sequence[Row], figures: str = "Medians (20th to 80th percentile)") -> str:
    """Device, threads and versions of the newest row."""
    newest = max(rows, key=lambda row: row["date"])
    threads = f", {newest['threads']} thread" + ("s" if newest["threads"] != "1" else "")
    triton = f"triton {newest['triton'] or 'absent'}, " if "triton" in newest else ""
    return (
        f"{figures}, interleaved, on {newest['device']}{threads}; torch "
        f"{newest['torch']}, {triton}transformers {newest['transformers']}, {newest['date']}."
    )
