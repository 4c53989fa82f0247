"""One comparison as a table of text and as Markdown."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from .generation import Generation
from .measures import Cell, rows
from .options import Comparison
from .verdict import verdicts

Table = tuple[list[str], list[list[str]]]  # header, rows

SHOWN_TEXTS = 3


def table(comparison: Comparison) -> Table:
    """One row per measure, one column per model, the source first. Only what was measured."""
    header = ["", comparison.source, *comparison.candidates]
    return header, [[row.name, *(_cell(cell) for cell in row.cells)] for row in rows(comparison)]


def _cell(cell: Cell) -> str:
    """Value, then the change and its interval: "31.2 (× 3.13, 2.9 to 3.4)"."""
    more = ", ".join(part for part in (cell.change, cell.interval) if part)
    return f"{cell.value} ({more})" if more else cell.value


def markdown(comparison: Comparison, title: str = "Comparison") -> str:
    """The whole comparison as Markdown: verdicts, table, texts side by side, provenance.

    What comes from models, prompts and folder names is escaped.
    """
    header, body = table(comparison)
    parts = [f"## {title}", "", *(f"- {_line(str(v))}" for v in verdicts(comparison)), ""]
    if body:
        parts += ["| " + " | ".join(map(_line, header)) + " |"]
        parts += ["|" + "|".join(["---"] * len(header)) + "|"]
        parts += ["| " + " | ".join(_line(cell) or "–" for cell in row) + " |" for row in body]
        parts += ["", *map(_line, legend(comparison))]
    if comparison.generation:
        parts += ["", *_side_by_side(comparison.generation)]
    facts = "; ".join(f"{key} {value}" for key, value in comparison.provenance.items())
    return "\n".join([*parts, "", f"*Measured on: {_line(facts)}.*", ""])


def legend(comparison: Comparison) -> list[str]:
    """What the figures were measured on, one sentence or two for each kind."""
    options, lines = comparison.options, []
    if comparison.quality:
        q = comparison.quality[0]
        lines.append(
            f"Perplexity (± its standard error) and divergence over {q.tokens:,} tokens of "
            f"{options.text.name}, window {min(options.window, options.max_tokens)}, stride "
            f"{options.stride}. KL is KL(source ‖ model) in nats per token. 95% intervals: paired "
            f"bootstrap over {q.units} {comparison.units}."
        )
    if comparison.encoders:
        e = comparison.encoders[0]
        masked = f" and {e.masked_tokens:,} masked tokens" if e.masked_tokens else ""
        lines.append(
            f"{e.sentences} sentences{masked} of {options.text.name}; 95% intervals: bootstrap "
            "over sentences, and over rows of masked tokens."
        )
    if comparison.generation and comparison.generation[-1].overlap:
        scores = comparison.generation[-1].overlap
        lines.append(
            f"Greedy texts of up to {options.new_tokens} tokens for "
            f"{counted(len(comparison.generation[0].prompts), 'prompt')}."
            + ("" if scores.chrf is not None else " chrF and BLEU were not measured: they need "
               "the package sacrebleu, and a source that writes something.")
        )  # fmt: skip
    if comparison.speed:
        s = comparison.speed[0]
        what = f"{s.new_tokens} new ones" if s.new_tokens else "one forward pass"
        lines.append(
            f"Speed: batch {s.batch}, {s.context} prompt tokens, {what}, median of "
            f"{counted(s.rounds, 'round')} in which the models take turns."
        )
    return lines


def _side_by_side(found: Sequence[Generation]) -> list[str]:
    source, *others = found
    lines = [
        "### Greedy continuations",
        "",
        "“Differs from” is the median number of equal tokens before the first other one, among the "
        "prompts where there is one. `⟦` marks where a text leaves the source's.",
        "",
    ]
    for i, prompt in enumerate(source.prompts[:SHOWN_TEXTS]):
        lines += [f"**{_line(prompt)}**", "", f"- {_line(source.label)}: {_line(source.texts[i])}"]
        for g in others:
            if g.diverged_at[i] is None:
                lines.append(f"- {_line(g.label)}: the same")
            else:
                common, rest = split_text(source.texts[i], g.texts[i])
                lines.append(f"- {_line(g.label)}: {_line(common)}⟦{_line(rest)}")
        lines.append("")
    return lines[:-1]


def split_text(source: str, text: str) -> tuple[str, str]:
    """`text` cut where it leaves the source's: (common beginning, the rest)."""
    same = (a == b for a, b in zip(source, text, strict=False))
    common = sum(itertools.takewhile(bool, same))
    return text[:common], text[common:]


def folded(text: str) -> str:
    """`text` with many empty lines in a row said in one: broken models write little else."""
    return re.sub(r"\n{4,}", lambda lines: f"\n⏎ × {len(lines[0])}\n", text)


def counted(number: int, what: str) -> str:
    """Such as `1 prompt`, `2 prompts`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def _line(text: str) -> str:
    """One line that Markdown leaves as it is."""
    text = folded(text)
    for sign in "\\`*_<|[":
        text = text.replace(sign, "\\" + sign)
    return " ⏎ ".join(text.split("\n"))
