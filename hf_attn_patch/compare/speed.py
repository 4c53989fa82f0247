"""Prefill and decode rates through `generate`, and the KV cache that a context leaves behind.

Models take turns within each round, so that a busy moment of the machine hits all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .models import LoadedModel


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates are medians over the rounds; `*_spread` their 20th and 80th percentile."""

    label: str
    context: int  # prompt tokens
    new_tokens: int
    rounds: int
    prefill_tokens_s: float
    prefill_spread: tuple[float, float]
    decode_tokens_s: float
    decode_spread: tuple[float, float]
    kv_bytes: int | None  # held after the last token; None for a cache without keys and values
    kv_bytes_per_token: float | None
    load_seconds: float
    weight_bytes: int


class TokenClock:
    """A streamer that keeps the time of every token; `put` is first given the prompt."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())  # generate has fetched the token: it is done

    def end(self) -> None:
        pass


@torch.inference_mode()
def measure_speed(
    models: Sequence[LoadedModel],
    tokens: Tensor,
    *,
    context: int,
    new_tokens: int,
    rounds: int,
    progress: Callable[[int], None] = lambda runs: None,
) -> list[Speed]:
    """Time `rounds` generations of `new_tokens` behind the first `context` of `tokens` [n].

    Prefill is the time to the first token, decode the rest. One warm-up round is not counted.
    """
    if new_tokens < 2:
        raise ValueError(f"decode speed needs at least 2 new tokens, got {new_tokens}")
    prompt = tokens[:context][None]
    prefill: list[list[float]] = [[] for _ in models]
    decode: list[list[float]] = [[] for _ in models]
    held: list[int | None] = [None for _ in models]
    for turn in range(rounds + 1):
        for i, loaded in enumerate(models):
            clock, cache = _timed_run(loaded, prompt, new_tokens)
            progress(1)
            if turn:
                start, first, last = clock[0], clock[1], clock[-1]
                prefill[i].append(prompt.shape[1] / (first - start))
                decode[i].append((new_tokens - 1) / (last - first))
            held[i] = cache_bytes(cache)
    total = prompt.shape[1] + new_tokens - 1  # the last token never enters the cache
    return [
        Speed(
            label=loaded.label,
            context=prompt.shape[1],
            new_tokens=new_tokens,
            rounds=rounds,
            prefill_tokens_s=statistics.median(prefill[i]),
            prefill_spread=_spread(prefill[i]),
            decode_tokens_s=statistics.median(decode[i]),
            decode_spread=_spread(decode[i]),
            kv_bytes=held[i],
            kv_bytes_per_token=None if (size := held[i]) is None else size / total,
            load_seconds=loaded.load_seconds,
            weight_bytes=loaded.weight_bytes,
        )
        for i, loaded in enumerate(models)
    ]


def _timed_run(loaded: LoadedModel, prompt: Tensor, new_tokens: int) -> tuple[list[float], Any]:
    """Times [start, first token, ..., last token], and the cache."""
    clock = TokenClock()
    ids = prompt.to(loaded.device)
    out = loaded.model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        num_beams=1,
        temperature=None,
        top_p=None,
        top_k=None,
        streamer=clock,
        return_dict_in_generate=True,
    )
    assert len(clock.times) == new_tokens + 1, (len(clock.times), new_tokens)
    return clock.times, out.past_key_values


def cache_bytes(cache: Any) -> int | None:
    """Bytes of all keys and values that a transformers cache holds."""
    tensors = [
        tensor
        for layer in getattr(cache, "layers", ())
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, Tensor)
    ]
    return sum(t.numel() * t.element_size() for t in tensors) if tensors else None


def _spread(values: list[float]) -> tuple[float, float]:
    ordered = torch.tensor(values, dtype=torch.float64)
    low, high = ordered.quantile(torch.tensor([0.2, 0.8], dtype=torch.float64)).tolist()
    return low, high
