"""Every measure as a row: a cell per model, with the change to the source and its interval."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .divergence import safe_exp
from .format import number, percent, size, times
from .options import Comparison


@dataclass(frozen=True)
class Cell:
    value: str
    change: str = ""  # to the source
    interval: str = ""  # 95%, of the change where there is one, else of the value


@dataclass(frozen=True)
class Row:
    group: str
    name: str
    about: str
    cells: tuple[Cell, ...]  # the source's first


def ratio(source: float, mine: float) -> str:
    return times(mine / source) if source else ""


def points(source: float, mine: float) -> str:
    return f"{100 * (mine - source):+.1f} points"


def difference(source: float, mine: float) -> str:
    return signed(mine - source)


def signed(value: float) -> str:
    return ("+" if value > 0 else "") + number(value)


def factor(value: float) -> str:
    """A logarithm as the factor that it stands for."""
    return f"{safe_exp(value):.3g}"


def score(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def per_cent(value: float) -> str:
    return f"{value:.1f}%"


Show = Callable[[Any], str]


@dataclass(frozen=True, kw_only=True)
class Measure:
    """How one figure is read from the results of a model and shown beside the source's."""

    name: str
    about: str
    value: str  # attribute of the results; "a.b" goes through another, None ends the way
    show: Show = number
    change: Callable[[float, float], str] | None = None
    interval: str = ""  # attribute with the two ends
    show_end: Show = number
    error: str = ""  # attribute with a standard error


QUALITY, WRITING, COST = "Predictions", "Greedy texts", "Cost"
ON_TEXT = (
    Measure(
        name="perplexity",
        about="sliding windows; less is better",
        value="perplexity",
        error="perplexity_se",
        change=ratio,
        interval="ln_ratio_ci",
        show_end=factor,
    ),
    Measure(
        name="KL mean",
        about="KL(source ‖ model), nats per token; 0 is the same",
        value="kl_mean",
        interval="kl_ci",
    ),
    Measure(name="KL median", about="of all tokens", value="kl_median"),
    Measure(name="KL 99%", about="exceeded by one token of a hundred", value="kl_p99"),
    Measure(
        name="top-1 same",
        about="tokens where both prefer the same next one",
        value="top1",
        show=percent,
        interval="top1_ci",
        show_end=percent,
    ),
)
OF_ENCODERS = (
    Measure(
        name="masked-LM loss",
        about="nats per masked token; less is better",
        value="loss",
        change=difference,
        interval="loss_difference_ci",
        show_end=signed,
    ),
    Measure(
        name="masked found",
        about="masked tokens that the model finds",
        value="accuracy",
        show=percent,
        change=points,
    ),
    Measure(
        name="masked KL",
        about="KL(source ‖ model), nats per masked token",
        value="kl_mean",
        interval="kl_ci",
    ),
    Measure(
        name="masked top-1 same",
        about="masked tokens where both prefer the same one",
        value="top1",
        show=percent,
    ),
    Measure(
        name="embedding cosine",
        about="between both models' embeddings of a sentence",
        value="cosine",
        interval="cosine_ci",
    ),
    Measure(name="least cosine", about="of the sentence that fares worst", value="cosine_min"),
    Measure(name="Spearman", about="rank correlation of all pairs' similarities", value="spearman"),
    Measure(
        name="neighbours same",
        about="of each sentence's 10 nearest",
        value="neighbours",
        show=percent,
    ),
)
OF_TEXTS = (
    Measure(
        name="greedy same",
        about="prompts with exactly the source's tokens",
        value="same_prompts",
        show=str,
    ),
    Measure(
        name="differs from",
        about="equal tokens before the first other one, median",
        value="median_divergence",
    ),
    Measure(
        name="chrF",
        about="overlap with the source's texts, 100 is the same",
        value="overlap.chrf",
        show=score,
    ),
    Measure(name="BLEU", about="the same, by words", value="overlap.bleu", show=score),
    Measure(
        name="ROUGE-L",
        about="the same, by the longest common subsequence",
        value="overlap.rouge_l",
        show=score,
    ),
    Measure(
        name="repetition",
        about="4-grams that a text has written before",
        value="repetition",
        show=percent,
        change=points,
    ),
)
OF_RECORDS = (
    Measure(
        name="recovered",
        about="by uptraining, of what the conversion lost; from its own control run",
        value="recovered_percent",
        show=per_cent,
    ),
)
OF_COST = (
    Measure(
        name="prefill tok/s",
        about="prompt tokens per second",
        value="prefill_tokens_s",
        change=ratio,
    ),
    Measure(
        name="decode tok/s", about="new tokens per second", value="decode_tokens_s", change=ratio
    ),
    Measure(
        name="KV B/token",
        about="what the cache holds in the end, by its tokens",
        value="kv_bytes_per_token",
        change=ratio,
    ),
    Measure(
        name="peak memory",
        about="of a run, beside the weights",
        value="peak_bytes",
        show=size,
        change=ratio,
    ),
    Measure(name="weights", about="in memory", value="weight_bytes", show=size, change=ratio),
    Measure(name="load s", about="seconds from disk to device", value="load_seconds", show=score),
)


def rows(comparison: Comparison) -> list[Row]:
    """All measures that were taken; those that have no value for any model are left out."""
    c = comparison
    found = [
        *_rows(QUALITY, ON_TEXT, c.quality),
        *_rows(QUALITY, OF_ENCODERS, c.encoders),
        *_rows(QUALITY, OF_RECORDS, c.records),
        *_rows(WRITING, OF_TEXTS, c.generation),
        *_task_rows(c),
        *_rows(COST, OF_COST, c.speed),
    ]
    return [row for row in found if any(cell.value for cell in row.cells)]


def _rows(group: str, measures: Sequence[Measure], results: Sequence[Any]) -> Iterator[Row]:
    for m in measures if results else ():
        cells = (_cell(m, results[0] if i else None, result) for i, result in enumerate(results))
        yield Row(group, m.name, m.about, tuple(cells))


def _cell(m: Measure, source: Any, result: Any) -> Cell:
    """`source` None: the source's own cell."""
    value = _read(result, m.value)
    if value is None:
        return Cell("")
    text = m.show(value)
    if m.error:
        text += f" ± {_read(result, m.error):.2g}"
    if source is None:
        return Cell(text)
    before, ends = _read(source, m.value), _read(result, m.interval) if m.interval else None
    change = m.change(before, value) if m.change and before is not None else ""
    interval = f"{m.show_end(ends[0])} to {m.show_end(ends[1])}" if ends else ""
    return Cell(text, change, interval)


def _read(result: Any, path: str) -> Any:
    for name in path.split("."):
        result = None if result is None else getattr(result, name)
    return result


def _task_rows(c: Comparison) -> Iterator[Row]:
    scores = {(s.task, s.metric, s.label): s for s in c.tasks}
    for task, metric in dict.fromkeys((s.task, s.metric) for s in c.tasks):
        cells, source = [], scores.get((task, metric, c.source))
        for label in (c.source, *c.candidates):
            mine = scores.get((task, metric, label))
            if mine is None:
                cells.append(Cell(""))
                continue
            error = "" if mine.error is None else f" ± {mine.error:.2g}"
            shown = mine is not source and source is not None
            change = difference(source.value, mine.value) if shown and source else ""
            cells.append(Cell(number(mine.value) + error, change))
        yield Row("Tasks", f"{task}, {metric}", "lm-evaluation-harness", tuple(cells))
