"""How the cost of attention on this machine's CPU grows with length.

python scripts/bench_growth.py --out results/growth_cpu.csv --threads 1
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--curves", nargs="+", metavar="CURVE", help="only these (all)")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--longest", type=int, help="no length above this many tokens")
    parser.add_argument("--rounds", type=int, default=9, help="of each length (9)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args = parser.parse_args(argv)

    from hf_attn_patch.bench.growth import run

    try:
        found = run(
            curves=args.curves,
            out=args.out,
            threads=args.threads,
            longest=args.longest,
            rounds=args.rounds,
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
    for curve in found:
        times = "  ".join(
            f"{n}: {ms:.3g} ms" for n, ms in zip(curve["lengths"], curve["p50_ms"], strict=True)
        )
        grown = "–" if curve["exponent"] is None else f"{curve['exponent']:.2f}"
        print(f"{curve['curve']}: {times}; exponent {grown}, expected {curve['expected']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
