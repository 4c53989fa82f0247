"""A candidate judged in plain words: identical, hardly different, ... broken."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .format import number, percent, times
from .options import Comparison


@dataclass(frozen=True)
class Grade:
    """`limit`: largest value of the measure that this grade still has."""

    limit: float
    name: str  # also the page's colour: "same", "good", "fair", "poor"
    words: str


# By mean KL in nats per token. For scale, llama.cpp's quantizations of an 8B model: Q8_0 .0002,
# Q5_K_M .005, Q3_K_S .16.
BY_KL = (
    Grade(1e-6, "same", "predicts the same as"),
    Grade(0.005, "good", "hardly differs from"),
    Grade(0.05, "good", "is close to"),
    Grade(0.3, "fair", "differs noticeably from"),
    Grade(1.0, "poor", "is clearly worse than"),
    Grade(math.inf, "poor", "is not usable in place of"),
)
# By 1 - mean cosine of sentence embeddings.
BY_COSINE = (
    Grade(1e-6, "same", "embeds the same as"),
    Grade(0.01, "good", "hardly differs from"),
    Grade(0.05, "good", "is close to"),
    Grade(0.15, "fair", "differs noticeably from"),
    Grade(math.inf, "poor", "is clearly worse than"),
)
IDENTICAL = Grade(0, "same", "is identical to")
UNGRADED = Grade(0, "fair", "was not judged against")


@dataclass(frozen=True)
class Verdict:
    label: str
    grade: Grade
    headline: str  # "mqa is close to source"
    facts: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.headline}: {'; '.join(self.facts)}" if self.facts else self.headline


def verdicts(comparison: Comparison) -> list[Verdict]:
    """One per candidate: how it compares, what it costs and what it buys."""
    found = []
    for i, label in enumerate(comparison.candidates, start=1):
        grade = _grade(comparison, i)
        facts = [*_weights(comparison, i), *_quality(comparison, i), *_speed(comparison, i)]
        headline = f"{label} {grade.words} {comparison.source}"
        found.append(Verdict(label, grade, headline, tuple(facts)))
    return found


def identical(comparison: Comparison, i: int) -> bool:
    """Whether candidate `i` has the source's weights and no measure of it differs at all."""
    c = comparison
    differences: list[float | None] = []
    if c.quality:
        q = c.quality[i]
        differences += [q.kl_max, q.ln_ratio, 1 - (q.top1 or 0)]
    if c.generation:
        differences.append(1 - c.generation[i].exact)
    if c.encoders:
        e = c.encoders[i]
        differences += [e.loss_difference or 0, e.kl_mean or 0, 1 - (e.cosine_min or 0)]
    same = [w.same for w in c.weights if w.label == c.candidates[i - 1]]
    return bool(differences) and same == [True] and not any(differences)


def _grade(c: Comparison, i: int) -> Grade:
    if identical(c, i):
        return IDENTICAL
    if c.quality:
        return _first(BY_KL, c.quality[i].kl_mean)
    if c.encoders:
        cosine = c.encoders[i].cosine
        return _first(BY_COSINE, None if cosine is None else 1 - cosine)
    return UNGRADED


def _first(grades: tuple[Grade, ...], value: float | None) -> Grade:
    assert value is not None
    return next((grade for grade in grades if value <= grade.limit), grades[-1])


def _weights(c: Comparison, i: int) -> list[str]:
    """Weights that must not be overlooked: other ones behind the same results, or the reverse."""
    if not c.weights:
        return []
    w = c.weights[i - 1]
    if w.same:
        return ["the same weights"]
    if w.unmatched:  # converted: everybody expects other weights
        return []
    more = ", ..." if w.different > len(w.examples) else ""
    return [f"{w.different} of {w.tensors} tensors differ ({', '.join(w.examples)}{more})"]


def _quality(c: Comparison, i: int) -> list[str]:
    if identical(c, i):
        return ["every measured difference is zero"]
    facts = []
    if c.quality:
        q = c.quality[i]
        assert q.ln_ratio is not None
        ratio = math.exp(min(q.ln_ratio, 700))
        shown = f"{ratio:.3f}" if ratio < 100 else number(ratio)
        if ends := q.ln_ratio_ci:
            low, high = (f"{math.exp(min(end, 700)):.3g}" for end in ends)
            shown += f", 95% interval {low} to {high}"
        facts.append(
            f"perplexity × {shown} (KL {number(q.kl_mean)}, top-1 {percent(q.top1)} the same)"
        )
    if c.encoders:
        e = c.encoders[i]
        facts.append(
            f"embedding cosine {number(e.cosine)}, {percent(e.neighbours)} of the nearest "
            "neighbours the same"
        )
    if c.generation:
        facts.append(f"greedy tokens the same in {c.generation[i].same_prompts} prompts")
    return facts


def _speed(c: Comparison, i: int) -> list[str]:
    if not c.speed:
        return []
    a, b = c.speed[0], c.speed[i]
    facts = [f"prefill {times(b.prefill_tokens_s / a.prefill_tokens_s)}"]
    if a.decode_tokens_s and b.decode_tokens_s:
        facts[0] += f", decode {times(b.decode_tokens_s / a.decode_tokens_s)}"
    if a.kv_bytes and b.kv_bytes:
        facts.append(f"KV cache {times(b.kv_bytes / a.kv_bytes)}")
    return facts
