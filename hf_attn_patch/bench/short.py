"""Short prompts, one at a time: what an implementation costs where attention is the smallest part.

One model in one process, given each implementation in turn, call by call: a model for each would
compare where their weights happen to lie, too. A row says the time of `generate` as a multiple of
sdpa's, from the ratios within each round.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .results import append_table, environment, percentiles

BASE = "sdpa"
IMPLEMENTATIONS = (BASE, "triton_fa2", "triton_paged_flash2")

# fmt: off
COLUMNS = [
    "impl", "model", "dtype", "prompt_tokens", "new_tokens", "rounds", "p20_ms", "p50_ms", "p80_ms",
    "of_sdpa_time", "same_tokens", "device", "threads", "torch", "triton", "transformers", "commit",
    "date",
]
# fmt: on


def run(
    checkpoint: Path,
    *,
    prompts: Sequence[int] = (16, 64, 128),
    new_tokens: int = 32,
    impls: Sequence[str] = IMPLEMENTATIONS,
    dtype: str = "float32",
    rounds: int = 15,
    threads: int = 1,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure `generate` on prompts of these lengths; append the rows to the CSV `out`.

    Args:
        checkpoint: folder of a causal language model.
        impls: sdpa comes first, whether it is named or not.
        rounds: of each length; one call of each implementation a round.

    Returns:
        One dict for each length and implementation, keyed by `COLUMNS`.

    Raises:
        ValueError: no such dtype, or a count below 1.
    """
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"unknown dtype {dtype!r}; possible: float32, bfloat16")
    if not prompts or min(*prompts, new_tokens, rounds, threads) < 1:
        raise ValueError("prompts, new tokens, rounds and threads must be 1 or more")
    names = [BASE, *(name for name in impls if name != BASE)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    found = []
    try:
        model = _model(checkpoint, dtype)
        for length in prompts:
            say(f"{checkpoint.name}: {length} and {new_tokens} tokens")
            rows = [
                {"model": checkpoint.name} | row
                for row in _measure(model, names, length, new_tokens, rounds)
            ]
            if out is not None:
                append_table(out, COLUMNS, rows)
            found += rows
    finally:
        torch.set_num_threads(before)
    return found


def _model(checkpoint: Path, dtype: str) -> Any:
    from transformers import AutoModelForCausalLM

    import hf_attn_patch  # noqa: F401  (registers the implementations)

    return AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=getattr(torch, dtype), attn_implementation=BASE, trust_remote_code=False
    ).eval()


def _measure(
    model: Any, names: Sequence[str], length: int, new_tokens: int, rounds: int
) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator)

    def generate(name: str) -> tuple[Any, float]:
        model.set_attn_implementation(name)
        start = time.perf_counter()
        tokens = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            min_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
        return tokens, (time.perf_counter() - start) * 1e3

    tokens = {name: generate(name)[0] for name in names}  # and a warm-up
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds):
        shift = turn % len(names)
        for name in (*names[shift:], *names[:shift]):
            times[name].append(generate(name)[1])
    rows = []
    for name, taken in times.items():
        ratios = [mine / base for mine, base in zip(taken, times[BASE], strict=True)]
        timing = {key: round(value, 3) for key, value in asdict(percentiles(taken)).items()}
        rows.append(
            {
                "impl": name,
                "dtype": str(model.dtype).removeprefix("torch."),
                "prompt_tokens": length,
                "new_tokens": new_tokens,
                "rounds": rounds,
                **timing,
                "of_sdpa_time": round(statistics.median(ratios), 4),
                "same_tokens": int(torch.equal(tokens[name], tokens[BASE])),
                **asdict(environment()),
            }
        )
    return rows
