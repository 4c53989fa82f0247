"""How much of the source's texts a candidate's repeat, and how much they repeat themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

NGRAM = 4


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """0 to 100; against the source's texts, and 100 where they are the same.

    `chrf` and `bleu` over all texts together (sacrebleu); None without sacrebleu, and
    where the source wrote nothing. `rouge_l` is the mean over texts.
    """

    rouge_l: float
    chrf: float | None = None
    bleu: float | None = None


def overlap(texts: Sequence[str], source: Sequence[str]) -> Overlap:
    """Scores of `texts` against the source's texts of the same prompts."""
    scores = [rouge_l(a.split(), b.split()) for a, b in zip(texts, source, strict=True)]
    mean = 100 * sum(scores) / len(scores)
    if not any(text.strip() for text in source):
        return Overlap(rouge_l=mean)
    try:
        import sacrebleu
    except ImportError:
        return Overlap(rouge_l=mean)
    return Overlap(
        rouge_l=mean,
        chrf=sacrebleu.corpus_chrf(list(texts), [list(source)]).score,
        # for texts of fewer than four words too
        bleu=sacrebleu.BLEU(effective_order=True).corpus_score(list(texts), [list(source)]).score,
    )


def rouge_l(words: Sequence[str], reference: Sequence[str]) -> float:
    """F1 of the longest common subsequence (Lin 2004, beta 1); two empty texts are the same: 1."""
    if not words or not reference:
        return float(list(words) == list(reference))
    above = [0] * (len(reference) + 1)  # longest of the words so far and of reference[:j]
    for word in words:
        row = [0]
        for j, other in enumerate(reference):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        above = row
    return 2 * above[-1] / (len(words) + len(reference))


def repetition(tokens: Sequence[int]) -> float:
    """Share of a text's n-grams of NGRAM tokens that it has written before; 0 for shorter ones."""
    grams = [tuple(tokens[i : i + NGRAM]) for i in range(len(tokens) - NGRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
