"""Time attention on this machine's CPU beside SDPA and FlexAttention.

python scripts/bench_attention.py --out results/attention_cpu.csv --threads 2
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="only these rows (all)")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (2)")
    parser.add_argument("--quick", action="store_true", help="small shapes, three rounds")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)

    from hf_attn_patch.bench.attention import run

    try:
        found = run(
            rows=args.rows,
            out=args.out,
            threads=args.threads,
            quick=args.quick,
            say=lambda line: print(line, file=sys.stderr, flush=True),
        )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    for row in found:
        window = f" W{row['window']}" if row["window"] else ""
        print(
            f"{row['pass']:8} {row['dtype']} {row['seq_q']}x{row['seq_k']}{window} "
            f"{row['extra']:10} {row['impl']:20} {row['p50_ms']:9.2f} ms "
            f"({row['p20_ms']:.2f} .. {row['p80_ms']:.2f})"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
