"""`hf-attn convert`: a checkpoint with another number of KV heads."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .common import JsonOption, print_json, print_table, progress_bar

if TYPE_CHECKING:
    from hf_attn_converters import ConversionPlan


def convert_command(
    src: Annotated[Path, typer.Argument(help="Folder with config.json and safetensors.")],
    dst: Annotated[Path, typer.Argument(help="Folder to write; must not exist, or be empty.")],
    num_key_value_heads: Annotated[
        int, typer.Option("--num-key-value-heads", "-n", help="KV heads wanted; 1 is MQA.")
    ],
    method: Annotated[str, typer.Option(help="How heads are merged: mean.")] = "mean",
    dry_run: Annotated[bool, typer.Option(help="Print the plan and write nothing.")] = False,
    json: JsonOption = False,
) -> None:
    """Change a checkpoint's KV heads: MHA, GQA and MQA in both directions, streamed.

    More heads is exact. Fewer costs quality: see `hf-attn compare`.
    """
    from hf_attn_converters import convert

    with progress_bar(quiet=dry_run, in_bytes=True) as update:
        result = convert(
            src,
            dst,
            num_key_value_heads=num_key_value_heads,
            method=method,
            dry_run=dry_run,
            progress=lambda done, total, name: update("converting", done, total),
        )
    if json:
        print_json(result.to_json())
        return
    print_table(["", "before", "after"], plan_rows(result.plan), title=result.plan.model_type)
    if dry_run:
        typer.echo(
            f"dry run: nothing written; {result.plan.disk_needed:,} bytes needed, "
            f"{result.plan.disk_free:,} free"
        )
    else:
        rate = result.plan.bytes_after / result.seconds / 1e6
        typer.echo(f"wrote {dst} in {result.seconds:.1f} s ({rate:.0f} MB/s)")


def plan_rows(plan: ConversionPlan) -> list[list[str]]:
    """A plan as the rows of a table: what, before, after."""
    tensors = f"{plan.tensors}, {plan.tensors_changed} of them rewritten ({plan.method})"
    if plan.tensors_dropped:
        tensors += f", {plan.tensors_dropped} tied left out"
    return [
        ["query heads", f"{plan.query_heads}", f"{plan.query_heads}"],
        ["KV heads", f"{plan.kv_heads_before}", f"{plan.kv_heads_after}"],
        [
            "KV bytes per token",
            f"{plan.kv_bytes_per_token_before:,}",
            f"{plan.kv_bytes_per_token_after:,}",
        ],
        ["weights, bytes", f"{plan.bytes_before:,}", f"{plan.bytes_after:,}"],
        ["tensors", f"{plan.tensors + plan.tensors_dropped}", tensors],
        ["files", f"{plan.shards}", f"{plan.shards}"],
    ]
