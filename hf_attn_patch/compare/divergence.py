"""Perplexity of every model, and how far each one's predictions are from the source's.

All models see the same windows in lock-step, so that the logits of one window at a time are held.
Letters: N scored tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .models import LoadedModel
from .text import Window

ROWS = 128  # token rows whose [ROWS, V] distributions are held in float32 at a time
BLOCK = 64  # neighbouring tokens are correlated: errors are taken between blocks of this many


@dataclass(frozen=True, kw_only=True)
class Quality:
    """`*_se` are standard errors. What compares with the source is None for the source itself."""

    label: str
    tokens: int
    nll: float  # mean negative log likelihood, nats per token
    nll_se: float
    perplexity: float
    perplexity_se: float
    ln_ratio: float | None = None  # ln(perplexity / source's), paired token by token
    ln_ratio_se: float | None = None
    kl_mean: float | None = None  # KL(source || this), nats per token
    kl_se: float | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None  # share of tokens where both prefer the same one
    top1_se: float | None = None


@torch.inference_mode()
def measure_quality(
    models: Sequence[LoadedModel],
    windows: Iterable[Window],
    progress: Callable[[int], None] = lambda tokens: None,
) -> list[Quality]:
    """One `Quality` per model; the first model is the source."""
    nll: list[list[Tensor]] = [[] for _ in models]
    kl: list[list[Tensor]] = [[] for _ in models]
    same: list[list[Tensor]] = [[] for _ in models]
    for window in windows:
        source = _logits(models[0], window)
        targets = window.tokens[-window.scored :]
        for i, model in enumerate(models):
            logits = _logits(model, window) if i else source
            for begin in range(0, window.scored, ROWS):
                rows = slice(begin, begin + ROWS)
                log_q = _log_softmax(logits[rows])
                picked = targets[rows].to(log_q.device)
                nll[i].append(-log_q.gather(1, picked[:, None])[:, 0].cpu())
                if i:
                    log_p = _log_softmax(source[rows]).to(log_q.device)
                    kl[i].append((log_p.exp() * (log_p - log_q)).sum(1).cpu())
                    same[i].append((log_p.argmax(1) == log_q.argmax(1)).cpu())
        progress(window.scored)
    base = torch.cat(nll[0]).double()
    return [
        _quality(model.label, torch.cat(nll[i]).double(), base, kl[i], same[i])
        for i, model in enumerate(models)
    ]


def _logits(loaded: LoadedModel, window: Window) -> Tensor:
    """Logits [N, V] that predict the window's scored tokens."""
    keep = window.scored + 1
    takes = inspect.signature(loaded.model.forward).parameters
    less = {"logits_to_keep": keep} if "logits_to_keep" in takes else {}
    ids = window.tokens[None].to(loaded.device)
    logits: Tensor = loaded.model(input_ids=ids, use_cache=False, **less).logits
    if logits.isnan().any():
        raise RuntimeError(f"{loaded.label} gives NaN logits")
    return logits[0, -keep:-1]


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _quality(
    label: str, nll: Tensor, base: Tensor, kl: list[Tensor], same: list[Tensor]
) -> Quality:
    mean, error = block_mean(nll)
    quality = Quality(
        label=label,
        tokens=len(nll),
        nll=mean,
        nll_se=error,
        perplexity=_exp(mean),
        perplexity_se=_exp(mean) * error,
    )
    if not kl:
        return quality
    divergence, agree = torch.cat(kl).double(), torch.cat(same).double()
    ratio, ratio_error = block_mean(nll - base)
    kl_mean, kl_error = block_mean(divergence)
    top1, top1_error = block_mean(agree)
    return Quality(
        **vars(quality)
        | {
            "ln_ratio": ratio,
            "ln_ratio_se": ratio_error,
            "kl_mean": kl_mean,
            "kl_se": kl_error,
            "kl_median": divergence.median().item(),
            "kl_p99": divergence.quantile(0.99).item(),
            "kl_max": divergence.max().item(),
            "top1": top1,
            "top1_se": top1_error,
        }
    )


def block_mean(values: Tensor) -> tuple[float, float]:
    """Mean of `values` [N] and its standard error, from the means of whole blocks of BLOCK.

    With fewer than two blocks the error is taken between single values; of one value it is NaN.
    """
    blocks = len(values) // BLOCK
    parts = values[: blocks * BLOCK].view(blocks, BLOCK).mean(1) if blocks > 1 else values
    error = parts.std().item() / math.sqrt(len(parts)) if len(parts) > 1 else math.nan
    return values.mean().item(), error


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
