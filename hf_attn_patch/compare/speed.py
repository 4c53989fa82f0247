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

from ..loading import LoadedModel
from .memory import PeakMemory


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Rates are medians over the rounds; `*_spread` their 20th and 80th percentile."""

    label: str
    batch: int  # sequences
    context: int  # prompt tokens of each
    new_tokens: int
    rounds: int
    prefill_tokens_s: float
    prefill_spread: tuple[float, float]
    decode_tokens_s: float | None  # of all sequences together; None for an encoder
    decode_spread: tuple[float, float] | None
    kv_bytes: int | None  # held after the last token; None for a cache without keys and values
    kv_bytes_per_token: float | None
    peak_bytes: int | None  # most that a run needed beside what was there before; None: unknown
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
    batch: int = 1,
    progress: Callable[[int], None] = lambda runs: None,
) -> list[Speed]:
    """Time `rounds` generations of `new_tokens` behind `context` of `tokens` [n].

    The tokens are repeated where they are too few, and the row of them for each of the `batch`
    sequences: time does not depend on what they say. Prefill is the time to the first token,
    decode the rest; an encoder has one forward pass instead. One warm-up round is not counted.
    Raises ValueError when nothing would be decoded.
    """
    if new_tokens < 2:
        raise ValueError(f"decode speed needs at least 2 new tokens, got {new_tokens}")
    repeats = -(-context // len(tokens))
    prompt = tokens.repeat(repeats)[:context].repeat(batch, 1)
    runs: list[list[_Run]] = [[] for _ in models]
    peaks = []
    for turn in range(rounds + 1):
        for i, loaded in enumerate(models):
            run = _generate if loaded.decodes else _encode
            if turn:
                runs[i].append(run(loaded, prompt, new_tokens))
            else:  # memory is looked at here, for that costs time
                run(loaded, prompt[:, :1], 2)
                with PeakMemory(loaded.device) as memory:
                    run(loaded, prompt, new_tokens)
                peaks.append(memory.peak_bytes)
            progress(1)
    return [
        _speed(loaded, runs[i], prompt, new_tokens, peaks[i]) for i, loaded in enumerate(models)
    ]


@dataclass(frozen=True)
class _Run:
    times: list[float]  # start, first token, ..., last token
    kv_bytes: int | None


def _speed(
    loaded: LoadedModel, runs: list[_Run], prompt: Tensor, new_tokens: int, peak: int | None
) -> Speed:
    batch, context = prompt.shape
    prefill = [batch * context / (run.times[1] - run.times[0]) for run in runs]
    decode = [
        batch * (new_tokens - 1) / (run.times[-1] - run.times[1]) for run in runs if loaded.decodes
    ]
    held = runs[-1].kv_bytes
    total = batch * (context + new_tokens - 1)  # the last token never enters the cache
    return Speed(
        label=loaded.label,
        batch=batch,
        context=context,
        new_tokens=new_tokens if loaded.decodes else 0,
        rounds=len(runs),
        prefill_tokens_s=statistics.median(prefill),
        prefill_spread=_spread(prefill),
        decode_tokens_s=statistics.median(decode) if decode else None,
        decode_spread=_spread(decode) if decode else None,
        kv_bytes=held,
        kv_bytes_per_token=None if held is None else held / total,
        peak_bytes=peak,
        load_seconds=loaded.load_seconds,
        weight_bytes=loaded.weight_bytes,
    )


def _generate(loaded: LoadedModel, prompt: Tensor, new_tokens: int) -> _Run:
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
    return _Run(clock.times, cache_bytes(out.past_key_values))


def _encode(loaded: LoadedModel, prompt: Tensor, new_tokens: int) -> _Run:
    """One forward pass of an encoder, which writes no tokens."""
    ids = prompt.to(loaded.device)
    start = time.perf_counter()
    out = loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids))
    next(iter(out.values())).flatten()[0].item()  # waits for an accelerator
    return _Run([start, time.perf_counter()], None)


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
