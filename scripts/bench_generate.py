"""Tokens per second and memory of `generate_batch`, by attention implementation.

    python scripts/fetch_checkpoint.py smollm2-135m .cache/smollm2-135m
    python scripts/bench_generate.py .cache/smollm2-135m --text corpus.txt \
        --out results/generate_cpu.csv
    python scripts/bench_generate.py --shape llama3-8b --device cuda --dtype bfloat16 \
        --out results/generate_gpu.csv

Every run has a process of its own, so that its memory is its own; implementations take turns. With
--shape the weights and the prompts are random: they take the same time, and no download. Memory is
the process's on a CPU, and the device's on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    from hf_attn_patch.bench.generate import DTYPES, IMPLEMENTATIONS, SHAPES

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="folder of a causal language model")
    add("--shape", choices=SHAPES, help="random weights and prompts in a checkpoint's place")
    add("--device", default="cpu", help="cpu or cuda (cpu)")
    add("--text", type=Path, help="file that the prompts are cut from, .xz or plain")
    add("--impls", nargs="+", default=list(IMPLEMENTATIONS), help=f"({' '.join(IMPLEMENTATIONS)})")
    add("--requests", type=int, default=32, help="prompts (32)")
    add("--shortest", type=int, default=32, help="tokens of the shortest prompt (32)")
    add("--longest", type=int, default=512, help="tokens of the longest prompt (512)")
    add("--new-tokens", type=int, default=64, help="generated per prompt (64)")
    add("--dtype", default="float32", choices=DTYPES, help="(float32)")
    add("--page-size", type=int, default=64, help="tokens of a page (64)")
    add("--max-batch-tokens", type=int, default=2048, help="tokens of one pass at most (2048)")
    add("--rounds", type=int, default=3, help="runs of each (3)")
    add("--threads", type=int, default=2, help="CPU threads (2)")
    add("--out", type=Path, help="CSV to append to")
    add("--json", action="store_true", help="print JSON and nothing else")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = vars(arguments(argv))
    as_json = options.pop("json")

    from hf_attn_patch.bench.generate import run

    try:
        rows = run(**options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        print(
            f"{row['impl']:20} {row['tokens_s']:8.1f} tokens/s  {row['of_sdpa']} x sdpa, "
            f"{row['generate_bytes'] / 2**20:6.0f} MiB above the model (pages "
            f"{row['pool_bytes'] / 2**20:.0f}), {row['same_tokens']:.1%} of requests as eager"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
