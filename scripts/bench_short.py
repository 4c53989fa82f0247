"""Time short prompts, one at a time, beside transformers' sdpa: what our calls cost.

python scripts/bench_short.py tests/fixtures/tiny-llama-mha --out results/short_cpu.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("checkpoint", type=Path, help="folder of a causal language model")
    add("--prompts", nargs="+", type=int, default=[16, 64, 128], help="their tokens (16 64 128)")
    add("--new-tokens", type=int, default=32, help="generated per prompt (32)")
    add("--dtype", default="float32", help="float32 or bfloat16 (float32)")
    add("--rounds", type=int, default=15, help="calls of each (15)")
    add("--threads", type=int, default=1, help="CPU threads (1)")
    add("--out", type=Path, help="CSV to append to")
    add("--json", action="store_true", help="print JSON and nothing else")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")

    from hf_attn_patch.bench.short import run

    try:
        rows = run(**options, say=lambda line: print(line, file=sys.stderr, flush=True))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        same = "the same tokens" if row["same_tokens"] else "OTHER TOKENS"
        print(
            f"{row['prompt_tokens']:5} tokens {row['impl']:20} {row['p50_ms']:9.1f} ms  "
            f"{row['of_sdpa_time']:.3f} x sdpa's time, {same}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
