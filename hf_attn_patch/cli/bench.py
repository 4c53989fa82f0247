"""`hf-attn bench`: the benchmarks behind the project's tables."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, print_json, print_table

bench_app = typer.Typer(no_args_is_help=True, help="Run a benchmark.")


@bench_app.callback()
def _subject() -> None:
    """Run a benchmark."""  # with a callback typer keeps the subject's name in the command


@bench_app.command("attention")
def attention_command(
    rows: Annotated[
        list[str] | None, typer.Option(help="Only these rows; repeatable. By default all.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Append the results to this CSV.")] = None,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    quick: Annotated[bool, typer.Option(help="Small shapes and few rounds.")] = False,
    json: JsonOption = False,
) -> None:
    """Attention on this machine: each implementation beside SDPA and FlexAttention, in one run."""
    from hf_attn_patch.bench.attention import run

    found = run(rows=rows, out=out, threads=threads, quick=quick)
    if json:
        print_json(found)
        return
    if found:
        filled = [key for key in found[0] if any(row[key] not in (None, "") for row in found)]
        header = [key for key in filled if len(found) == 1 or len({row[key] for row in found}) > 1]
        if same := [f"{key} {_cell(found[0][key])}" for key in filled if key not in header]:
            typer.echo("; ".join(same))  # what all rows share needs no column
        print_table(header, [[_cell(row[key]) for key in header] for row in found])
    if out is not None:
        typer.echo(f"appended {len(found)} rows to {out}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
