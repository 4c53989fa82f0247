"""Tokens per second and memory of `generate_batch`, by attention implementation.

    python scripts/fetch_checkpoint.py smollm2-135m .cache/smollm2-135m
    python scripts/bench_generate.py .cache/smollm2-135m --text corpus.txt \
        --out results/generate_cpu.csv
    python scripts/bench_generate.py --shape llama3-8b --device cuda --dtype bfloat16 \
        --out results/generate_gpu.csv

Every run has a process of its own, so that its memory is its own; implementations take turns. With
--shape the weights and the prompts are random: they take the same time, and no download. Memory is
the process's on a CPU, and the device's on a GPU.
"""

from __future__ import annotations

import sys
from functools import partial

from hf_attn_patch.bench import script

main = partial(script.main, "generate")

if __name__ == "__main__":
    sys.exit(main())
