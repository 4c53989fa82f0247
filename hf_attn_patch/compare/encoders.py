"""Encoders: what a masked language model finds, and how like their sentence embeddings are.

Letters: B sequences of a batch, S tokens, N masked tokens, M sentences, V vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..loading import LoadedModel
from .intervals import Interval, bootstrap

BATCH = 16
LENGTH = 128  # tokens of a row or a sentence
MASKED = 0.15  # share of a row's tokens that are masked, as in BERT's training
SENTENCES = 512
NEIGHBOURS = 10


@dataclass(frozen=True, kw_only=True)
class EncoderQuality:
    """`*_ci` are 95% intervals of the bootstrap over rows and sentences.

    What compares with the source is None for the source itself; what needs a masked language
    model's head, or a mask token, is None without them.
    """

    label: str
    sentences: int
    masked_tokens: int = 0
    loss: float | None = None  # masked-LM loss, nats per masked token
    accuracy: float | None = None  # share of masked tokens that the model finds
    loss_difference: float | None = None  # to the source's
    loss_difference_ci: Interval | None = None
    kl_mean: float | None = None  # KL(source || this) of masked tokens
    kl_ci: Interval | None = None
    top1: float | None = None
    cosine: float | None = None  # mean between both embeddings of a sentence
    cosine_ci: Interval | None = None
    cosine_min: float | None = None
    spearman: float | None = None  # rank correlation of all pairs' similarities
    neighbours: float | None = None  # share of the 10 nearest sentences that both agree on


@torch.inference_mode()
def measure_encoders(
    models: Sequence[LoadedModel],
    text: str,
    max_tokens: int,
    progress: Callable[[int], None] = lambda models: None,
) -> list[EncoderQuality]:
    """One per model; the first is the source. All see the same masks, drawn with one seed.

    Embeddings are the mean of a sentence's hidden states. Raises ValueError for a text with fewer
    than two sentences or without a row of tokens.
    """
    tokenizer = models[0].tokenizer
    chosen = spread_sentences(text)
    batches = [
        tokenizer(
            chosen[i : i + BATCH],
            padding=True,
            truncation=True,
            max_length=LENGTH,
            return_tensors="pt",
        )
        for i in range(0, len(chosen), BATCH)
    ]
    masked = masked_rows(tokenizer, text, max_tokens) if _can_fill(models) else None
    found: list[EncoderQuality] = []
    first: tuple[Tensor, _Masked | None] | None = None
    for loaded in models:
        mine = embeddings(loaded, batches), _masked_scores(loaded, masked)
        found.append(_quality(loaded.label, mine, first))
        first = first or mine
        progress(1)
    return found


def spread_sentences(text: str) -> list[str]:
    """Up to SENTENCES different ones of 4 to 60 words, evenly over the text, shortest first."""
    joined = re.sub(r"\s+", " ", text)
    every = dict.fromkeys(s.strip() for s in re.split(r"(?<=[.!?])\s", joined))
    usable = [s for s in every if 4 <= len(s.split()) <= 60]
    if len(usable) < 2:
        raise ValueError(
            f"the text has {len(usable)} sentences of 4 to 60 words, embeddings need 2: give a "
            "longer text"
        )
    count = min(SENTENCES, len(usable))
    return sorted((usable[i * len(usable) // count] for i in range(count)), key=len)


@dataclass(frozen=True)
class MaskedRows:
    ids: Tensor  # [R, S] int64, some tokens replaced by the mask
    masked: Tensor  # [R, S] bool
    truth: Tensor  # [N] int64
    rows: Tensor  # [N] int64: the row of each masked token


def masked_rows(tokenizer: Any, text: str, max_tokens: int) -> MaskedRows:
    """Rows of LENGTH tokens between special ones, a share MASKED of them masked, seeded."""
    from hf_attn_converters.io.special_tokens import text_ends

    ids = tokenizer(text[: 16 * max_tokens], add_special_tokens=False, verbose=False)["input_ids"]
    body = LENGTH - tokenizer.num_special_tokens_to_add()
    count = min(len(ids), max_tokens) // body
    if not count:
        raise ValueError(
            f"the text has {len(ids)} tokens, a row of masked ones takes {body}: give a longer "
            "text, or more --max-tokens"
        )
    inner = torch.tensor(ids[: count * body]).view(count, body)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(inner.shape, generator=generator) < MASKED
    chosen[:, 0] |= ~chosen.any(1)  # at least one in each row
    special = text_ends(tokenizer)
    hidden = inner.masked_fill(chosen, tokenizer.mask_token_id)
    ends = [torch.tensor(p).long().expand(count, len(p)) for p in (special.before, special.after)]
    never = [torch.zeros_like(end, dtype=torch.bool) for end in ends]
    return MaskedRows(
        ids=torch.cat([ends[0], hidden, ends[1]], dim=1),
        masked=torch.cat([never[0], chosen, never[1]], dim=1),
        truth=inner[chosen],
        rows=chosen.nonzero()[:, 0],
    )


@dataclass(frozen=True)
class _Masked:
    log_probs: Tensor = field(repr=False)  # [N, V] float32
    nll: Tensor  # [N]
    truth: Tensor  # [N]
    rows: Tensor  # [N]


def _can_fill(models: Sequence[LoadedModel]) -> bool:
    """Whether there is a mask token, and a head on every model."""
    has_mask = models[0].tokenizer.mask_token_id is not None
    return has_mask and all(m.model.base_model is not m.model for m in models)


def _masked_scores(loaded: LoadedModel, rows: MaskedRows | None) -> _Masked | None:
    if rows is None:
        return None
    parts = []
    for ids, masked in zip(rows.ids.split(BATCH), rows.masked.split(BATCH), strict=True):
        logits = loaded.model(input_ids=ids.to(loaded.device)).logits  # [B, S, V]
        if logits.isnan().any():
            raise RuntimeError(f"{loaded.label} gives NaN logits")
        parts.append(logits[masked.to(loaded.device)].float().log_softmax(1).cpu())
    log_probs = torch.cat(parts)
    nll = -log_probs.gather(1, rows.truth[:, None])[:, 0].double()
    return _Masked(log_probs, nll, rows.truth, rows.rows)


def embeddings(loaded: LoadedModel, batches: Sequence[Any]) -> Tensor:
    """Mean hidden state of each sentence, [M, hidden] float32."""
    found = []
    for batch in batches:
        on_device = {k: v.to(loaded.device) for k, v in batch.items()}
        hidden = loaded.model.base_model(**on_device).last_hidden_state.float()
        mask = on_device["attention_mask"][..., None]
        found.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
    return torch.cat(found)


def _quality(
    label: str, mine: tuple[Tensor, _Masked | None], source: tuple[Tensor, _Masked | None] | None
) -> EncoderQuality:
    vectors, masked = mine
    facts: dict[str, Any] = {"label": label, "sentences": len(vectors)}
    if masked is not None:
        hit = masked.log_probs.argmax(1) == masked.truth
        facts |= {
            "masked_tokens": len(hit),
            "loss": masked.nll.mean().item(),
            "accuracy": hit.double().mean().item(),
        }
    if source is None:
        return EncoderQuality(**facts)
    theirs, before = source
    if masked is not None and before is not None:
        difference = masked.nll - before.nll
        kl = (before.log_probs.exp() * (before.log_probs - masked.log_probs)).sum(1).double()
        same = before.log_probs.argmax(1) == masked.log_probs.argmax(1)
        facts |= {
            "loss_difference": difference.mean().item(),
            "loss_difference_ci": bootstrap(difference, masked.rows),
            "kl_mean": kl.mean().item(),
            "kl_ci": bootstrap(kl, masked.rows),
            "top1": same.double().mean().item(),
        }
    cosine = _cosine(theirs, vectors)
    facts |= {
        "cosine": cosine.mean().item(),
        "cosine_ci": bootstrap(cosine, torch.arange(len(cosine))),
        "cosine_min": cosine.min().item(),
        "spearman": spearman(_pairs(theirs), _pairs(vectors)),
        "neighbours": neighbour_agreement(_similarity(theirs), _similarity(vectors)),
    }
    return EncoderQuality(**facts)


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """Cosine of each row with its counterpart, [M] float64; exactly 1 for equal rows."""
    cosine = torch.cosine_similarity(a.double(), b.double())
    return torch.where((a == b).all(1), 1.0, cosine)


def _similarity(vectors: Tensor) -> Tensor:
    """Cosine of all pairs, [M, M] float64."""
    unit: Tensor = torch.nn.functional.normalize(vectors.double(), dim=1)
    return unit @ unit.T


def _pairs(vectors: Tensor) -> Tensor:
    """Similarity of every two different sentences, [M (M - 1) / 2]."""
    a, b = torch.triu_indices(len(vectors), len(vectors), offset=1)
    return _similarity(vectors)[a, b]


def spearman(a: Tensor, b: Tensor) -> float:
    """Rank correlation of two vectors [n]; NaN when one of them has a single value only.

    Equal values share the mean of their ranks.
    """
    x, y = _ranks(a), _ranks(b)
    return (((x - x.mean()) * (y - y.mean())).mean() / (x.std(False) * y.std(False))).item()


def _ranks(values: Tensor) -> Tensor:
    _, index, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts + 1) / 2
    return ranks.double()[index]


def neighbour_agreement(a: Tensor, b: Tensor) -> float:
    """Share of each sentence's nearest NEIGHBOURS that two similarities [M, M] have in common."""
    count = min(NEIGHBOURS, len(a) - 1)
    marks = []
    for matrix in (a, b):
        others = matrix.clone().fill_diagonal_(-torch.inf)
        near = others.topk(count).indices
        marks.append(torch.zeros_like(others, dtype=torch.bool).scatter(1, near, True))
    return ((marks[0] & marks[1]).sum() / (count * len(a))).item()
