"""Time a latent attention layer's decoding step on the CPU beside transformers' own.

python scripts/bench_mla.py --out results/mla_cpu.csv --threads 1
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--keys", nargs="+", type=int, default=[1024, 4096, 16384])
    parser.add_argument("--dtypes", nargs="+", default=["fp32", "bf16"])
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds for each timing (20)")
    args = parser.parse_args(argv)

    from hf_attn_patch.bench.mla import run

    try:
        run(
            keys=args.keys,
            dtypes=args.dtypes,
            out=args.out,
            threads=args.threads,
            budget_s=args.budget,
        )
    except (ValueError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
