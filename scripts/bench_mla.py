"""Time a latent attention layer's decoding step on the CPU beside transformers' own.

python scripts/bench_mla.py --out results/mla_cpu.csv --threads 1
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "mla")

if __name__ == "__main__":
    sys.exit(main())
