"""Encoders: sentence embeddings of both models, and what a masked language model finds.

Letters: B sequences in a batch, S tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hf_attn_patch  # noqa: F401  registers the encoder classes with fewer KV heads

from .scores import Progress, Scores
from .texts import sentences, spread

BATCH = 32
LONGEST = 128  # tokens of a sentence that count


@torch.inference_mode()
def embedding_scores(
    source: Path, outputs: Sequence[Path], text: str, size: int, progress: Progress
) -> list[Scores]:
    """Cosine between the embeddings of `size` sentences: mean of the tokens' hidden states."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    chosen = spread(sentences(text), size, "sentences of 8 to 40 words")
    chosen.sort(key=len)  # so that a batch needs little padding
    batches = [
        tokenizer(part, padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        for part in _parts(chosen)
    ]
    tokens = sum(int(batch["attention_mask"].sum()) for batch in batches)

    def embeddings(folder: Path) -> Tensor:
        model: Any = AutoModel.from_pretrained(
            folder, dtype=torch.float32, trust_remote_code=False
        ).eval()
        found = []
        for batch in batches:
            hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            found.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(found)

    theirs = embeddings(source)
    found = []
    for number, folder in enumerate(outputs, 1):
        cosine = torch.cosine_similarity(theirs, embeddings(folder)).mean().item()
        found.append(Scores(tokens=tokens, cosine=cosine))
        progress(number, len(outputs))
    return found


@torch.inference_mode()
def masked_scores(
    source: Path, outputs: Sequence[Path], text: str, size: int, progress: Progress
) -> list[Scores]:
    """Each token of `size` lines, or all, masked in turn: is it found, and how like the source?"""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    lines = [line for line in text.splitlines() if line.strip()]
    lines = spread(lines, max(1, min(size, len(lines))), "lines")
    rows = [masked_rows(tokenizer, line) for line in lines]
    theirs, truth = _log_probs(source, rows), torch.cat([t for _, _, t in rows])
    found = []
    for number, folder in enumerate(outputs, 1):
        ours = _log_probs(folder, rows)
        found.append(
            Scores(
                tokens=len(truth),
                source_ppl=_perplexity(theirs, truth),
                ppl=_perplexity(ours, truth),
                kl=(theirs.exp() * (theirs - ours)).sum(1).mean().item(),
                top1=_share(ours.argmax(1) == theirs.argmax(1)),
                accuracy_source=_share(theirs.argmax(1) == truth),
                accuracy=_share(ours.argmax(1) == truth),
            )
        )
        progress(number, len(outputs))
    return found


def masked_rows(tokenizer: Any, line: str) -> tuple[Tensor, Tensor, Tensor]:
    """(ids [B, S] with one token masked in each, its place [B], what it was [B])."""
    encoded = tokenizer(line, return_special_tokens_mask=True)
    ids = torch.tensor(encoded["input_ids"])
    places = (torch.tensor(encoded["special_tokens_mask"]) == 0).nonzero()[:, 0]
    rows = ids.repeat(len(places), 1)
    rows[torch.arange(len(places)), places] = tokenizer.mask_token_id
    return rows, places, ids[places]


def _log_probs(folder: Path, lines: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """[masked tokens, V]."""
    from transformers import AutoModelForMaskedLM

    model: Any = AutoModelForMaskedLM.from_pretrained(
        folder, dtype=torch.float32, trust_remote_code=False
    ).eval()
    found = []
    for rows, places, _ in lines:
        for ids, place in zip(rows.split(BATCH), places.split(BATCH), strict=True):
            logits = model(input_ids=ids).logits[torch.arange(len(ids)), place]
            found.append(logits.log_softmax(1))
    return torch.cat(found)


def _perplexity(log_probs: Tensor, truth: Tensor) -> float:
    return math.exp(-log_probs.gather(1, truth[:, None]).mean().item())


def _share(hits: Tensor) -> float:
    return hits.float().mean().item()


def _parts(items: Sequence[str]) -> Iterator[list[str]]:
    edges = [*range(0, len(items), BATCH), len(items)]
    return (list(items[a:b]) for a, b in pairwise(edges))
