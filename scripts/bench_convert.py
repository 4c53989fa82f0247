"""Converter throughput and peak memory beside `cp` of the same checkpoint, in the same run.

python scripts/bench_convert.py --gigabytes 4 --out results/convert_throughput.csv
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=4, help="size of the source (4)")
    parser.add_argument("--shards", type=int, default=8, help="files of the source (8)")
    parser.add_argument("--rounds", type=int, default=3, help="counted runs of each (3)")
    parser.add_argument("--folder", type=Path, help="where to work (the temporary folder)")
    parser.add_argument("--out", type=Path, help="CSV to append to")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    options = vars(parser.parse_args(argv))
    as_json = options.pop("json")

    from hf_attn_patch.bench.convert import run

    try:
        rows = run(**options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    if as_json:
        print(json.dumps(rows, indent=2))
        return 0
    for row in rows:
        memory = f", {row['peak_anon_bytes'] / 2**20:.0f} MiB" if row["peak_anon_bytes"] else ""
        print(
            f"{row['impl']:20} {row['p50_ms'] / 1e3:7.2f} s {row['mb_s']:8.1f} MB/s "
            f"{row['of_cp']:5.2f} x cp{memory}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
