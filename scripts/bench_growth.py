"""How the cost of attention on this machine's CPU grows with length.

python scripts/bench_growth.py --out results/growth_cpu.csv --threads 1
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "growth")

if __name__ == "__main__":
    sys.exit(main())
