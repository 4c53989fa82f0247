"""Causal language models: perplexity, KL to the source and top-1 agreement on windows of a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hf_attn_patch.compare.divergence import measure_quality
from hf_attn_patch.compare.text import Window
from hf_attn_patch.loading import load, parse_spec

from .scores import Progress, Scores
from .texts import word_start

WINDOW = 1024  # tokens, or as many as the model has positions
CHARACTERS_PER_TOKEN = 8  # read per token wanted: more than any tokenizer needs for prose


def language_scores(
    source: Path, outputs: Sequence[Path], text: str, size: int, progress: Progress
) -> list[Scores]:
    """One for each output, on `size` tokens; all in float32, whatever is stored."""
    models = [load(parse_spec(str(path)), dtype="float32") for path in (source, *outputs)]
    positions = models[0].model.config.max_position_embeddings
    windows = spread_windows(models[0].tokenizer, text, size, min(WINDOW, positions))
    done, total = 0, len(models) * sum(window.scored for window in windows)

    def step(tokens: int) -> None:
        nonlocal done
        done += tokens
        progress(done, total)

    found = measure_quality(models, windows, step)
    return [
        Scores(
            tokens=one.tokens,
            source_ppl=found[0].perplexity,
            ppl=one.perplexity,
            kl=one.kl_mean,
            top1=one.top1,
        )
        for one in found[1:]
    ]


def spread_windows(tokenizer: Any, text: str, size: int, length: int) -> list[Window]:
    """`size` tokens in windows spread evenly over the text, each from the beginning of a word.

    Raises ValueError when the text is too short for windows that do not overlap.
    """
    count = max(1, size // length)
    windows = []
    for i in range(count):
        begin = word_start(text, i * len(text) // count)
        end = min((i + 1) * len(text) // count, begin + length * CHARACTERS_PER_TOKEN)
        ids = tokenizer(text[begin:end], add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) < length:
            raise ValueError(
                f"a text of {len(text):,} characters is too short for {count} windows of {length} "
                "tokens: give a longer one, or a smaller --eval-size"
            )
        windows.append(Window(torch.tensor(ids[:length]), scored=length - 1))
    return windows
