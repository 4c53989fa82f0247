"""One comparison as rows of text, as Markdown and as one line per candidate."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from .generation import Generation
from .run import Comparison

Table = tuple[list[str], list[list[str]]]  # header, rows

SHOWN_TEXTS = 3


def table(comparison: Comparison) -> Table:
    """One row per model, the source first. Only what was measured has a column."""
    header = ["model"]
    rows = [[label] for label in (comparison.source, *comparison.candidates)]
    for columns in (_quality(comparison), _generation(comparison), _speed(comparison)):
        for name, cells in columns.items():
            header.append(name)
            for row, cell in zip(rows, cells, strict=True):
                row.append(cell)
    return header, rows


def _quality(comparison: Comparison) -> dict[str, list[str]]:
    found = comparison.quality
    if not found:
        return {}
    return {
        "perplexity": [f"{number(q.perplexity)} ± {number(q.perplexity_se)}" for q in found],
        "KL mean": [number(q.kl_mean) for q in found],
        "KL median": [number(q.kl_median) for q in found],
        "KL 99%": [number(q.kl_p99) for q in found],
        "top-1 same": [percent(q.top1) for q in found],
    }


def _generation(comparison: Comparison) -> dict[str, list[str]]:
    found = comparison.generation
    if not found:
        return {}
    others = found[1:]
    return {
        "greedy same": [
            "",
            *map(_same, others),
        ],
        "differs from": ["", *(number(g.median_divergence) for g in others)],
    }


def _same(g: Generation) -> str:
    return f"{sum(d is None for d in g.diverged_at)} of {len(g.prompts)}"


def _speed(comparison: Comparison) -> dict[str, list[str]]:
    found = comparison.speed
    if not found:
        return {}
    return {
        "prefill tok/s": [number(s.prefill_tokens_s) for s in found],
        "decode tok/s": [number(s.decode_tokens_s) for s in found],
        "KV B/token": [number(s.kv_bytes_per_token) for s in found],
        "weights": [size(s.weight_bytes) for s in found],
        "load s": [f"{s.load_seconds:.1f}" for s in found],
    }


def verdicts(comparison: Comparison) -> list[str]:
    """One sentence per candidate: what it costs and what it buys."""
    lines = []
    for i, label in enumerate(comparison.candidates, start=1):
        facts = []
        if comparison.quality:
            q = comparison.quality[i]
            assert q.ln_ratio is not None
            ratio = math.exp(min(q.ln_ratio, 700))
            shown = f"{ratio:.3f}" if ratio < 100 else number(ratio)
            facts.append(
                f"perplexity × {shown} (KL {number(q.kl_mean)}, top-1 {percent(q.top1)} the same)"
            )
        if comparison.generation:
            g = comparison.generation[i]
            facts.append(f"greedy tokens the same in {_same(g)} prompts")
        if comparison.speed:
            a, b = comparison.speed[0], comparison.speed[i]
            facts.append(
                f"prefill × {b.prefill_tokens_s / a.prefill_tokens_s:.2f}, "
                f"decode × {b.decode_tokens_s / a.decode_tokens_s:.2f}"
            )
            if a.kv_bytes and b.kv_bytes:
                facts.append(f"KV cache × {b.kv_bytes / a.kv_bytes:.2f}")
        lines.append(f"{label} against {comparison.source}: {'; '.join(facts)}")
    return lines


def markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """The whole comparison as Markdown: verdicts, table, texts side by side, provenance."""
    header, rows = table(comparison)
    parts = [f"## {title}", "", *(f"- {line}" for line in verdicts(comparison)), ""]
    parts += ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] * len(header)) + "|"]
    parts += ["| " + " | ".join(cell or "–" for cell in row) + " |" for row in rows]
    parts += ["", *_legend(comparison)]
    if comparison.generation:
        parts += ["", *_side_by_side(comparison.generation)]
    facts = "; ".join(f"{key} {value}" for key, value in comparison.provenance.items())
    return "\n".join([*parts, "", f"*Measured on: {facts}.*", ""])


def _legend(comparison: Comparison) -> list[str]:
    options, lines = comparison.options, []
    if comparison.quality:
        lines.append(
            "Perplexity (± its standard error) and divergence over "
            f"{comparison.quality[0].tokens:,} tokens of {options.text.name}, "
            f"window {options.window}, stride {options.stride}. "
            "KL is KL(source ‖ model) in nats per token."
        )
    if comparison.speed:
        s = comparison.speed[0]
        lines.append(
            f"Speed: one sequence, {s.context} prompt tokens, {s.new_tokens} new ones, median of "
            f"{s.rounds} rounds in which the models take turns; KV B/token is what the cache holds "
            "in the end, in bytes, divided by all tokens."
        )
    return lines


def _side_by_side(found: Sequence[Generation]) -> list[str]:
    source, *others = found
    lines = [
        "### Greedy continuations",
        "",
        "“Differs from” is the median position of the first other token, among the prompts where "
        "there is one. `⟦` marks where a text leaves the source's.",
        "",
    ]
    for i, prompt in enumerate(source.prompts[:SHOWN_TEXTS]):
        lines += [f"**{_line(prompt)}**", "", f"- {source.label}: {_line(source.texts[i])}"]
        for g in others:
            if g.diverged_at[i] is None:
                lines.append(f"- {g.label}: the same")
            else:
                lines.append(f"- {g.label}: {_marked(source.texts[i], g.texts[i])}")
        lines.append("")
    return lines[:-1]


def _marked(source: str, text: str) -> str:
    same = (a == b for a, b in zip(source, text, strict=False))
    common = sum(itertools.takewhile(bool, same))
    return f"{_line(text[:common])}⟦{_line(text[common:])}"


def _line(text: str) -> str:
    """One line that Markdown leaves as it is."""
    for sign in "\\`*_<|[":
        text = text.replace(sign, "\\" + sign)
    return " ⏎ ".join(text.split("\n"))


def number(value: float | None) -> str:
    """Three or four significant digits; empty for None."""
    if value is None:
        return ""
    if 0 < abs(value) < 1e-6:
        return "<1e-6"
    if 0 < abs(value) < 1e-3 or abs(value) >= 1e9:
        return f"{value:.1e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1 or value == 0 else f"{value:.3f}"


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}%"


def size(count: float) -> str:
    """Bytes for a reader: 538 MB."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"
