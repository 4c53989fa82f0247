"""Converter throughput and peak memory beside `cp` of the same checkpoint, in the same run.

python scripts/bench_convert.py --gigabytes 4 --out results/convert_throughput.csv
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "convert")

if __name__ == "__main__":
    sys.exit(main())
