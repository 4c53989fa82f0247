"""A whole model by attention implementation: prefill, decode and training steps, and their memory.

    python scripts/bench_model.py .cache/smollm2-135m --out results/model_cpu.csv
    python scripts/bench_model.py .cache/smollm2-135m --dtype bfloat16 --out results/model_cpu.csv
    python scripts/bench_model.py --shape mistral-7b --phases prefill --contexts 32768 \
        --device cuda --dtype bfloat16 --out results/model_gpu.csv

A run that stops at its budget goes on from the CSV when it is started again.
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "model")

if __name__ == "__main__":
    sys.exit(main())
