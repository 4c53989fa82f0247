"""Tokens per second and memory of `generate_batch`, by attention implementation.

Every run has a process of its own, so that its memory is its own; implementations take turns. With
a shape in a checkpoint's place the weights and the prompts are random: they take the same time, and
no download. Memory is the process's on a CPU, and the device's on a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .memory import Memory
from .shapes import SHAPES, check, load
from .worker import Alone

OURS = "triton_paged_flash2"
IMPLEMENTATIONS = (OURS, "sdpa", "eager")

# fmt: off
COLUMNS = [
    "impl", "model", "dtype", "requests", "prompt_tokens", "longest_prompt", "new_tokens",
    "page_size", "pages", "max_batch_tokens", "rounds", "p20_ms", "p50_ms", "p80_ms", "tokens_s",
    "of_sdpa", "peak_rss_bytes", "generate_bytes", "pool_bytes", "same_tokens", "device", "threads",
    "torch", "triton", "transformers", "commit", "date",
]
# fmt: on


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What every implementation is given to do."""

    checkpoint: str  # a folder, or one of SHAPES
    dtype: str
    device: str
    prompts: list[list[int]]
    new_tokens: int
    page_size: int
    pages: int
    max_batch_tokens: int
    threads: int


@dataclass(frozen=True)
class Sample:
    """One run: the time of `generate_batch` alone, memory at its highest."""

    seconds: float
    peak_rss: int
    generate_bytes: int  # at its highest above what the loaded model took
    pool_bytes: int  # of it, the pages of keys and values
    tokens: list[list[int]]


# --- in the process of one implementation ---------------------------------------------------------


def generate(impl: str, work: Workload) -> Sample:
    """Load, generate a little to warm up, then everything at once."""
    import torch
    from transformers import GenerationConfig

    from hf_attn_patch.transformers_compat.compat import batching_config

    torch.set_num_threads(work.threads)
    model = load(work.checkpoint, impl, work.dtype, work.device)
    batching = batching_config(
        page_size=work.page_size, pages=work.pages, max_batch_tokens=work.max_batch_tokens
    )
    greedy = GenerationConfig(max_new_tokens=work.new_tokens, do_sample=False, eos_token_id=-1)

    with torch.inference_mode():  # every weight touched, every kernel looked up once
        ids = torch.tensor([work.prompts[0]], device=work.device)
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
    memory = Memory(work.device)
    before = memory.now()
    memory.forget_peak()
    start = time.perf_counter()
    answers = model.generate_batch(
        work.prompts,
        generation_config=greedy,
        continuous_batching_config=batching,
        progress_bar=False,
    )
    seconds = time.perf_counter() - start
    peak = memory.peak()
    in_order = sorted(answers.values(), key=lambda answer: int(answer.request_id.split("_")[1]))
    failed = next((answer.error for answer in in_order if answer.error), None)
    if failed or len(in_order) != len(work.prompts):
        raise RuntimeError(f"{impl}: {failed or 'requests are missing'}")
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    pool = per_token * work.pages * work.page_size * getattr(torch, work.dtype).itemsize
    return Sample(
        seconds, peak, peak - before, pool, [list(answer.generated_tokens) for answer in in_order]
    )


# --- around it ------------------------------------------------------------------------------------


def random_prompts(shape: str, requests: int, shortest: int, longest: int) -> list[list[int]]:
    """Random ids of a shape's vocabulary, of the lengths that :func:`read_prompts` gives."""
    import random

    draw = random.Random(0)
    vocabulary = SHAPES[shape].sizes["vocab_size"]
    return [
        [draw.randrange(1, vocabulary) for _ in range(length)]
        for length in lengths(requests, shortest, longest)
    ]


def lengths(requests: int, shortest: int, longest: int) -> list[int]:
    """Spread evenly; 7 is prime to most counts, so that long and short ones alternate."""
    ranks = [(n * 7) % requests for n in range(requests)]
    return [shortest + (longest - shortest) * rank // max(1, requests - 1) for rank in ranks]


def read_prompts(
    checkpoint: Path, text: Path, requests: int, shortest: int, longest: int
) -> list[list[int]]:
    """Prompts of lengths spread evenly from `shortest` to `longest`, from all over the text."""
    import lzma

    from transformers import AutoTokenizer

    raw = text.read_bytes()
    corpus = (lzma.decompress(raw) if text.suffix == ".xz" else raw).decode()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)
    prompts = []
    for n, length in enumerate(lengths(requests, shortest, longest)):
        start = len(corpus) * n // requests
        ids = tokenizer(corpus[start : start + 12 * length], verbose=False)["input_ids"][:length]
        if len(ids) < length:
            raise ValueError(
                f"{text.name} is too short for {requests} prompts of up to {longest} tokens; "
                "give a longer --text, or fewer --requests or a shorter --longest"
            )
        prompts.append(ids)
    return prompts


def run_alone(impl: str, work: Workload) -> Sample:
    """:func:`generate` in a process of its own."""
    with Alone(impl) as process:
        return process.call(generate, impl, work)


def measure(
    impls: Sequence[str], work: Workload, rounds: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """One row per implementation, all run in turn in every round."""
    samples: dict[str, list[Sample]] = {impl: [] for impl in impls}
    for turn in range(rounds):
        shift = turn % len(impls)
        for impl in (*impls[shift:], *impls[:shift]):
            sample = run_alone(impl, work)
            samples[impl].append(sample)
            say(
                f"round {turn + 1} of {rounds}: {impl} {sample.seconds:.2f} s, "
                f"{sample.generate_bytes / 2**20:.0f} MiB above the model"
            )
    return rows_of(samples, work)


def rows_of(samples: dict[str, list[Sample]], work: Workload) -> list[dict[str, Any]]:
    import torch

    from .results import environment, percentiles

    torch.set_num_threads(work.threads)
    made = len(work.prompts) * work.new_tokens
    reference = samples["eager" if "eager" in samples else next(iter(samples))][0].tokens
    times = {
        impl: percentiles(sample.seconds * 1e3 for sample in runs) for impl, runs in samples.items()
    }
    rows = []
    for impl, runs in samples.items():
        same = min(_same(sample.tokens, reference) for sample in runs)
        rows.append(
            {
                "impl": impl,
                "model": Path(work.checkpoint).name,
                "dtype": work.dtype,
                "requests": len(work.prompts),
                "prompt_tokens": sum(map(len, work.prompts)),
                "longest_prompt": max(map(len, work.prompts)),
                "new_tokens": work.new_tokens,
                "page_size": work.page_size,
                "pages": work.pages,
                "max_batch_tokens": work.max_batch_tokens,
                "rounds": len(runs),
                **{key: round(value, 1) for key, value in asdict(times[impl]).items()},
                "tokens_s": round(made / times[impl].p50_ms * 1e3, 2),
                "of_sdpa": round(times["sdpa"].p50_ms / times[impl].p50_ms, 3)
                if "sdpa" in times
                else "",
                "peak_rss_bytes": max(sample.peak_rss for sample in runs),
                "generate_bytes": max(sample.generate_bytes for sample in runs),
                "pool_bytes": runs[0].pool_bytes,
                "same_tokens": round(same, 4),
                **asdict(environment(torch.device(work.device))),
            }
        )
    return rows


def _same(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Share of requests whose tokens are all equal."""
    pairs = list(zip(ours, theirs, strict=True))
    return sum(mine == other for mine, other in pairs) / len(pairs)


def run(
    checkpoint: Path | None = None,
    *,
    shape: str | None = None,
    text: Path | None = None,
    device: str = "cpu",
    impls: Sequence[str] | None = None,
    requests: int = 32,
    shortest: int = 32,
    longest: int = 512,
    new_tokens: int = 64,
    dtype: str = "float32",
    page_size: int = 64,
    max_batch_tokens: int = 2048,
    rounds: int = 3,
    threads: int = 2,
    out: Path | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Measure implementations on one workload; append their rows to the CSV `out`.

    Args:
        checkpoint: folder of a causal language model, with a `text` that prompts are cut from
            (plain or .xz); or `shape`, one of `shapes.SHAPES`.
        impls: None for `IMPLEMENTATIONS`.
        shortest, longest: tokens of the prompts.

    Raises:
        ValueError: what is asked for does not fit together.
        RuntimeError: an implementation failed.
    """
    name = check(checkpoint, shape, dtype, device)
    if shape is None and text is None:
        raise ValueError("prompts are cut from a text: --text FILE")
    if min(requests, shortest, new_tokens, page_size, rounds) < 1 or longest < shortest:
        raise ValueError("counts must be 1 or more, and the longest prompt at least the shortest")
    sizes = (requests, shortest, longest)
    if shape is not None:
        prompts = random_prompts(shape, *sizes)
    else:
        assert checkpoint is not None and text is not None  # checked above
        prompts = read_prompts(checkpoint, text, *sizes)
    work = Workload(
        checkpoint=name,
        dtype=dtype,
        device=device,
        prompts=prompts,
        new_tokens=new_tokens,
        page_size=page_size,
        pages=sum(-(-(len(ids) + new_tokens) // page_size) for ids in prompts),
        max_batch_tokens=max_batch_tokens,
        threads=threads,
    )
    rows = measure(impls or IMPLEMENTATIONS, work, rounds, say)
    if out is not None:
        from .results import append_table

        append_table(out, COLUMNS, rows)
    return rows
