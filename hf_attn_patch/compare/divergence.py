"""Perplexity of every model, and how far each one's predictions are from the source's.

All models see the same windows in lock-step, so that the logits of one window at a time are held.
Letters: L rows of a window (its tokens less the last), N scored tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..loading import LoadedModel
from .intervals import Interval, block_mean, blocks_of, bootstrap
from .text import Window

ROWS = 128  # token rows whose [ROWS, V] distributions are held in float32 at a time


@dataclass(frozen=True, kw_only=True)
class PositionKL:
    """Mean KL of all tokens with `begin` to `end` - 1 tokens before them in their window."""

    begin: int
    end: int
    tokens: int
    kl: float


@dataclass(frozen=True, kw_only=True)
class Quality:
    """`*_se` are standard errors, `*_ci` 95% intervals of the paired bootstrap over `units` units.

    What compares with the source is None for the source itself.
    """

    label: str
    tokens: int
    nll: float  # mean negative log likelihood, nats per token
    nll_se: float
    perplexity: float
    perplexity_se: float
    units: int = 0  # documents, or blocks of tokens where there are too few documents
    ln_ratio: float | None = None  # ln(perplexity / source's), paired token by token
    ln_ratio_se: float | None = None
    ln_ratio_ci: Interval | None = None
    kl_mean: float | None = None  # KL(source || this), nats per token
    kl_se: float | None = None
    kl_ci: Interval | None = None
    kl_median: float | None = None
    kl_p99: float | None = None
    kl_max: float | None = None
    top1: float | None = None  # share of tokens where both prefer the same one
    top1_se: float | None = None
    top1_ci: Interval | None = None
    kl_by_position: tuple[PositionKL, ...] = ()


@dataclass
class _Rows:
    """What one model gave, token by token: scored tokens [N], and KL sums by position."""

    nll: list[Tensor] = field(default_factory=list)
    kl: list[Tensor] = field(default_factory=list)
    same: list[Tensor] = field(default_factory=list)
    by_position: list[Tensor] = field(default_factory=list)  # [L] of each window


@torch.inference_mode()
def measure_quality(
    models: Sequence[LoadedModel],
    windows: Iterable[Window],
    progress: Callable[[int], None] = lambda tokens: None,
    units: Tensor | None = None,
) -> list[Quality]:
    """One `Quality` per model; the first model is the source.

    `units` [N] int64 says which document each scored token belongs to; None: blocks of tokens.
    """
    found = [_Rows() for _ in models]
    for window in windows:
        source = _logits(models[0], window)
        for i, model in enumerate(models):
            logits = _logits(model, window) if i else source
            _add(found[i], window, logits, source if i else None)
            progress(window.scored)
    base = torch.cat(found[0].nll).double()
    if units is None:
        units = blocks_of(len(base))
    return [
        _quality(model.label, rows, base, units) for model, rows in zip(models, found, strict=True)
    ]


def _logits(loaded: LoadedModel, window: Window) -> Tensor:
    """Logits [L, V] that predict the window's tokens after the first."""
    ids = window.tokens[None].to(loaded.device)
    takes = inspect.signature(loaded.model.forward).parameters
    less = {"use_cache": False} if "use_cache" in takes else {}
    logits: Tensor = loaded.model(input_ids=ids, **less).logits
    if logits.isnan().any():
        raise RuntimeError(f"{loaded.label} gives NaN logits")
    return logits[0, :-1]


def _add(rows: _Rows, window: Window, logits: Tensor, source: Tensor | None) -> None:
    """Score a window's last tokens; its divergence from `source` is kept at every position."""
    first = len(logits) - window.scored
    targets = window.tokens[1:]
    kl, same = [], []
    for begin in range(0 if source is not None else first, len(logits), ROWS):
        part = slice(begin, begin + ROWS)
        log_q = _log_softmax(logits[part])
        picked = targets[part].to(log_q.device)
        nll = -log_q.gather(1, picked[:, None])[:, 0].cpu()
        rows.nll.append(nll[max(0, first - begin) :])
        if source is not None:
            log_p = _log_softmax(source[part]).to(log_q.device)
            kl.append((log_p.exp() * (log_p - log_q)).sum(1).cpu())
            same.append((log_p.argmax(1) == log_q.argmax(1)).cpu())
    if source is not None:
        rows.by_position.append(torch.cat(kl))
        rows.kl.append(torch.cat(kl)[first:])
        rows.same.append(torch.cat(same)[first:])


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.float(), dim=-1)


def _quality(label: str, rows: _Rows, base: Tensor, units: Tensor) -> Quality:
    nll = torch.cat(rows.nll).double()
    mean, error = block_mean(nll)
    quality = Quality(
        label=label,
        tokens=len(nll),
        nll=mean,
        nll_se=error,
        perplexity=safe_exp(mean),
        perplexity_se=safe_exp(mean) * error,
        units=len(units.unique()),
    )
    if not rows.kl:
        return quality
    divergence, agree = torch.cat(rows.kl).double(), torch.cat(rows.same).double()
    ratio, ratio_error = block_mean(nll - base)
    kl_mean, kl_error = block_mean(divergence)
    top1, top1_error = block_mean(agree)
    return Quality(
        **vars(quality)
        | {
            "ln_ratio": ratio,
            "ln_ratio_se": ratio_error,
            "ln_ratio_ci": bootstrap(nll - base, units),
            "kl_mean": kl_mean,
            "kl_se": kl_error,
            "kl_ci": bootstrap(divergence, units),
            "kl_median": divergence.median().item(),
            "kl_p99": divergence.quantile(0.99).item(),
            "kl_max": divergence.max().item(),
            "top1": top1,
            "top1_se": top1_error,
            "top1_ci": bootstrap(agree, units),
            "kl_by_position": _by_position(rows.by_position),
        }
    )


def _by_position(windows: Sequence[Tensor]) -> tuple[PositionKL, ...]:
    """Means over 1, 2-3, 4-7, ... tokens of context: twice as many each time."""
    longest, found, begin = max(map(len, windows)), [], 1
    while begin <= longest:
        part = torch.cat([w[begin - 1 : 2 * begin - 1] for w in windows]).double()
        end = min(2 * begin, longest + 1)
        found.append(PositionKL(begin=begin, end=end, tokens=len(part), kl=part.mean().item()))
        begin *= 2
    return tuple(found)


def safe_exp(value: float) -> float:
    """exp, infinite where a float has no room."""
    return math.exp(value) if value < 700 else math.inf
