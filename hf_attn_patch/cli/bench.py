"""`hf-attn bench`: what makes the tables of results, with the options of the scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .common import JsonOption, print_json, print_table

bench_app = typer.Typer(no_args_is_help=True, help="Run a benchmark.")

OutOption = Annotated[Path | None, typer.Option(help="Append the results to this CSV.")]
ThreadsOption = Annotated[int, typer.Option(min=1, help="CPU threads.")]
RoundsOption = Annotated[int, typer.Option(min=1, help="Timed calls of each.")]


@bench_app.callback()
def _subject() -> None:
    """Run a benchmark."""  # with a callback typer keeps the subject's name in the command


@bench_app.command("attention")
def attention_command(
    rows: Annotated[
        list[str] | None, typer.Option(help="Only these rows; repeatable. By default all.")
    ] = None,
    out: OutOption = None,
    threads: ThreadsOption = 2,
    quick: Annotated[bool, typer.Option(help="Small shapes and few rounds.")] = False,
    json: JsonOption = False,
) -> None:
    """Attention on this machine: each implementation beside SDPA and FlexAttention, in one run."""
    from hf_attn_patch.bench.attention import run

    _show(run(rows=rows, out=out, threads=threads, quick=quick), out, json)


@bench_app.command("growth")
def growth_command(
    curves: Annotated[
        list[str] | None, typer.Option(help="Only these curves; repeatable. By default all.")
    ] = None,
    out: OutOption = None,
    threads: ThreadsOption = 1,
    longest: Annotated[int | None, typer.Option(help="No length above so many tokens.")] = None,
    rounds: RoundsOption = 9,
    json: JsonOption = False,
) -> None:
    """How the cost of attention on this machine's CPU grows with length."""
    from hf_attn_patch.bench.growth import run

    found = run(curves=curves, out=out, threads=threads, longest=longest, rounds=rounds)
    if json:
        print_json(found)
        return
    lines: list[dict[str, Any]] = [
        {"curve": curve["curve"]}
        | {str(n): ms for n, ms in zip(curve["lengths"], curve["p50_ms"], strict=True)}
        | {key: curve[key] for key in ("exponent", "expected")}
        for curve in found
    ]
    lengths = sorted({key for line in lines for key in line if key.isdigit()}, key=int)
    keys = ["curve", *lengths, "exponent", "expected"]
    _show([{key: line.get(key) for key in keys} for line in lines], out, json)


@bench_app.command("short")
def short_command(
    checkpoint: Annotated[Path, typer.Argument(help="Folder of a causal language model.")],
    prompts: Annotated[
        list[int] | None, typer.Option(help="Their tokens; repeatable. By default 16, 64, 128.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Generated per prompt.")] = 32,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    rounds: RoundsOption = 15,
    threads: ThreadsOption = 1,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Short prompts, one at a time, beside sdpa: what a call costs where attention is small."""
    from hf_attn_patch.bench.short import run

    found = run(
        checkpoint,
        prompts=prompts or (16, 64, 128),
        new_tokens=new_tokens,
        dtype=dtype,
        rounds=rounds,
        threads=threads,
        out=out,
    )
    _show(found, out, json)


@bench_app.command("generate")
def generate_command(
    checkpoint: Annotated[
        Path | None, typer.Argument(help="Folder of a causal language model.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights and prompts in a checkpoint's place.")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="File that the prompts are cut from, .xz or plain.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    impls: Annotated[
        list[str] | None, typer.Option(help="Only these implementations; repeatable.")
    ] = None,
    requests: Annotated[int, typer.Option(help="Prompts.")] = 32,
    shortest: Annotated[int, typer.Option(help="Tokens of the shortest prompt.")] = 32,
    longest: Annotated[int, typer.Option(help="Tokens of the longest prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Generated per prompt.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    page_size: Annotated[int, typer.Option(help="Tokens of a page.")] = 64,
    max_batch_tokens: Annotated[int, typer.Option(help="Tokens of one pass at most.")] = 2048,
    rounds: RoundsOption = 3,
    threads: ThreadsOption = 2,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """Many requests at once (generate_batch): tokens per second and memory."""
    from hf_attn_patch.bench.generate import IMPLEMENTATIONS, run

    found = run(
        checkpoint,
        shape=shape,
        text=text,
        device=device,
        impls=impls or IMPLEMENTATIONS,
        requests=requests,
        shortest=shortest,
        longest=longest,
        new_tokens=new_tokens,
        dtype=dtype,
        page_size=page_size,
        max_batch_tokens=max_batch_tokens,
        rounds=rounds,
        threads=threads,
        out=out,
    )
    _show(found, out, json)


@bench_app.command("convert")
def convert_command(
    gigabytes: Annotated[float, typer.Option(help="Size of the source.")] = 4,
    shards: Annotated[int, typer.Option(help="Files of the source.")] = 8,
    rounds: RoundsOption = 3,
    folder: Annotated[Path | None, typer.Option(help="Where to work.")] = None,
    out: OutOption = None,
    json: JsonOption = False,
) -> None:
    """The converter beside `cp` of the same bytes: throughput and peak memory."""
    from hf_attn_patch.bench.convert import run

    found = run(gigabytes=gigabytes, shards=shards, rounds=rounds, folder=folder, out=out)
    _show(found, out, json)


def _show(found: list[dict[str, Any]], out: Path | None, json: bool) -> None:
    """Rows as JSON, or as one table; what all of them share stands above it."""
    if json:
        print_json(found)
        return
    if found:
        filled = [key for key in found[0] if any(row[key] not in (None, "") for row in found)]
        header = [key for key in filled if len(found) == 1 or len({row[key] for row in found}) > 1]
        if same := [f"{key} {_cell(found[0][key])}" for key in filled if key not in header]:
            typer.echo("; ".join(same))
        print_table(header, [[_cell(row[key]) for key in header] for row in found])
    if out is not None:
        typer.echo(f"appended {len(found)} rows to {out}")


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
