"""Time attention on this machine's CPU beside SDPA and FlexAttention.

python scripts/bench_attention.py --out results/attention_cpu.csv --threads 2
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "attention")

if __name__ == "__main__":
    sys.exit(main())
