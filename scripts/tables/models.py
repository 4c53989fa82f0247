"""Whole models: generation of many requests, and decoding by the number of KV heads."""

from __future__ import annotations

from pathlib import Path

from .markdown import csv_rows, measured_on, short, table, unmeasured

GENERATE_CSV, HEADS_CSV = "generate_cpu.csv", "decode_by_heads.csv"


def generate_table(results: Path) -> str:
    """`generate_batch` by implementation, the fastest first."""
    rows = csv_rows(results / GENERATE_CSV)
    if not rows:
        return unmeasured("Generation", "python scripts/bench_generate.py")
    cells = [
        [
            f"`{row['impl']}`",
            row["dtype"],
            short(float(row["tokens_s"])),
            f"{float(row['of_sdpa']):.2f}×",
            f"{int(row['generate_bytes']) / 2**20:.0f} MiB",
            f"{float(row['same_tokens']):.0%}",
        ]
        for row in sorted(rows, key=lambda row: -float(row["tokens_s"]))
    ]
    head = ["implementation", "dtype", "tokens/s", "of `sdpa`", "memory", "tokens as eager's"]
    first = rows[0]
    about = (
        f"{first['model']}, {first['requests']} prompts of up to {first['longest_prompt']} tokens, "
        f"{first['new_tokens']} new ones each, page_size {first['page_size']}; memory is what "
        f"generating adds to the model, {int(first['pool_bytes']) / 2**20:.0f} MiB of it pages. "
    )
    return f"{table(head, cells)}\n\n{about}{measured_on(rows)}"


def heads_table(results: Path) -> str:
    """One model size with fewer and fewer KV heads, with and without a window."""
    rows = csv_rows(results / HEADS_CSV)
    if not rows:
        return unmeasured("Decoding by KV heads", "python scripts/experiments/decode_by_heads.py")
    cells = [
        [
            row["variant"],
            f"{float(row['ms_per_step']):.1f} ({float(row['p20_ms']):.1f} to "
            f"{float(row['p80_ms']):.1f})",
            f"{float(row['of_mha']):.2f}×",
            f"{int(row['kv_bytes']) / 2**20:.1f} MiB",
            f"{float(row['ppl']):.1f}",
        ]
        for row in rows
    ]
    head = ["variant", "ms per step", "of MHA's time", "KV cache", "perplexity"]
    first = rows[0]
    about = (
        f"{int(first['parameters']) / 1e6:.1f} M parameters in every variant (the MLP takes what "
        f"K and V give up), batch {first['batch']}, {first['context']} tokens of context, "
        f"{first['dtype']}. "
    )
    return f"{table(head, cells)}\n\n{about}{measured_on(rows)}"
