"""Time short prompts, one at a time, beside transformers' sdpa: what our calls cost.

python scripts/bench_short.py tests/fixtures/tiny-llama-mha --out results/short_cpu.csv
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "short")

if __name__ == "__main__":
    sys.exit(main())
